"""Every broker, in each of its modes, keeps every promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from conveyor.brokers import from_url
from conveyor.brokers.memory import MemoryBroker, MemoryStore
from conveyor.testing.clock import turned_memory
from conveyor.testing.promises import PROMISES, Ended, Makers, Promise, prove

# To prove another broker, or another mode of one, add one line.
MODES: Final[Mapping[str, Callable[[Path], Makers]]] = {
    "memory": lambda _: Makers(partial(MemoryBroker, store=MemoryStore())),
    "memory, clock turned": lambda _: turned_memory(),
    "sqlite, full": lambda folder: Makers(partial(from_url, f"sqlite:///{folder}/x.queue?durability=full")),
    "sqlite, normal": lambda folder: Makers(partial(from_url, f"sqlite:///{folder}/x.queue?durability=normal")),
}


@pytest.mark.parametrize("promise", PROMISES.values(), ids=PROMISES)
@pytest.mark.parametrize("makers", MODES.values(), ids=MODES)
async def test_a_broker_keeps_its_promises(makers: Callable[[Path], Makers], promise: Promise, tmp_path: Path) -> None:
    here = makers(tmp_path)
    result = await prove(promise, here)
    assert result.ended is not Ended.FAILED, result.trace
    if result.ended is Ended.SKIPPED:
        assert promise.needs & set(here.broker().missing), "skipped, though the broker declares what it needs"
