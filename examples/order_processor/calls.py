"""How a call to another service can fail, as far as that decides whether it may be made again."""

from __future__ import annotations


class CallFailed(Exception):
    """A call to another service that did not succeed.

    Parameters:
        after_seconds: the other side asked to be left alone for so long.
    """

    def __init__(self, why: str, *, after_seconds: float | None = None) -> None:
        super().__init__(why)
        self.after_seconds = after_seconds


class NotDone(CallFailed):
    """The other side certainly did nothing; another time it may."""


class Refused(CallFailed):
    """The other side certainly did nothing, and would not the next time either."""


class Unclear(CallFailed):
    """Nobody can tell whether the other side did it: its answer never came, or says nothing."""


class AtWork(CallFailed):
    """Another attempt at the same order is making this very call now."""
