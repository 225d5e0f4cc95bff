"""The conformance suite: every promise that a broker keeps, one coroutine each; no test framework inside."""

from __future__ import annotations

from conveyor.testing.promises import (  # noqa: F401 - each import registers the promises of one area
    bounds,
    closing,
    concurrency,
    dead_letters,
    declaring,
    delay,
    fetching,
    killed,
    leases,
    moving,
    operating,
    order,
    priority,
    publishing,
    removing,
    settling,
    temporary,
)
from conveyor.testing.promises.suite import PROMISES, Ended, Makers, Promise, Result, World, promise, prove, run

__all__ = ["PROMISES", "Ended", "Makers", "Promise", "Result", "World", "promise", "prove", "run"]
