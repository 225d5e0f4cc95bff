"""Every broker, in each of its modes, keeps every promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conveyor.testing.promises import PROMISES, Ended, Makers, Promise, prove
from tests.brokers.modes import MODES


@pytest.mark.parametrize("promise", PROMISES.values(), ids=PROMISES)
@pytest.mark.parametrize("makers", MODES.values(), ids=MODES)
async def test_a_broker_keeps_its_promises(
    makers: Callable[[pytest.FixtureRequest], Makers], promise: Promise, request: pytest.FixtureRequest
) -> None:
    here = makers(request)
    result = await prove(promise, here)
    assert result.ended is not Ended.FAILED, result.trace
    if result.ended is Ended.SKIPPED:
        assert promise.needs & set(here.broker().missing), "skipped, though the broker declares what it needs"
