"""A clock that tests turn, and the conformance suite's way to a memory broker that lives by it."""

from __future__ import annotations

import time
from functools import partial

from conveyor.brokers.memory import MemoryBroker, MemoryStore
from conveyor.testing.promises.suite import PATIENCE_SECONDS, Makers


class TurnableClock:
    """A clock that stands still until it is turned. Call it for Unix seconds.

    Parameters:
        now: Unix seconds at first; the real time where None.
    """

    def __init__(self, now: float | None = None) -> None:
        self._now = time.time() if now is None else now

    def __call__(self) -> float:
        return self._now

    def turn(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


def turned_memory(*, patience_seconds: float = PATIENCE_SECONDS) -> Makers:
    """Memory brokers on a store of their own, whose time passes when a promise says so, and not otherwise."""
    store, clock = MemoryStore(), TurnableClock()

    async def pass_time(seconds: float) -> None:
        clock.turn(seconds)
        MemoryBroker(store=store, clock=clock).clock_turned()

    broker = partial(MemoryBroker, store=store, clock=clock)
    return Makers(broker, clock=clock, pass_time=pass_time, patience_seconds=patience_seconds)
