"""Every broker, in each of its modes, keeps every promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conveyor.broker import Feature
from conveyor.testing.promises import PROMISES, Ended, Makers, Promise, prove
from tests.brokers.modes import MODES, with_priorities

OF_PRIORITIES = {name: promise for name, promise in PROMISES.items() if Feature.PRIORITY in promise.needs}


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


@pytest.mark.parametrize("promise", OF_PRIORITIES.values(), ids=OF_PRIORITIES)
async def test_a_classic_queue_with_priorities_keeps_what_it_promises_about_them(
    promise: Promise, request: pytest.FixtureRequest
) -> None:
    result = await prove(promise, with_priorities(request))
    assert result.ended is Ended.PASSED, result.trace
