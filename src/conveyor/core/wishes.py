"""Which messages are cancelled: wishes and their ends, which reach a process in any order, and lead everywhere to the same state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf
from typing import Final, TypeVar

K = TypeVar("K")

MOST: Final = 10_000
"""Wishes, and ends of wishes, that are remembered: the latest ones."""


class Wishes:
    """What one worker is not to handle. A wish is known by its message and its time; what ends it ends all earlier ones, too.

    A message that was given up all the same is handled when it is redriven, however late or often its wish is told again.
    """

    __slots__ = ("cancelled", "over")

    def __init__(self) -> None:
        self.cancelled: Final[dict[str, float]] = {}
        """The ids of messages that are not to be handled → when somebody wished it (Unix seconds), what came last at the end."""
        self.over: Final[dict[str, float]] = {}
        """Ids → the time up to which wishes mean nothing any more."""

    def add(self, wished: Mapping[str, float]) -> Collection[str]:
        """Take wishes in; gives the ids of those that mean something."""
        found = {id: at for id, at in wished.items() if at > self.over.get(id, -inf)}
        for id, at in found.items():
            self.cancelled[id] = max(at, self.cancelled.pop(id, at))
        forget_oldest(self.cancelled)
        return found.keys()

    def end(self, over: Mapping[str, float]) -> None:
        """The wishes for these messages up to these times mean nothing any more."""
        for id, at in over.items():
            self.over[id] = max(at, self.over.pop(id, at))
            if self.cancelled.get(id, inf) <= at:
                del self.cancelled[id]
        forget_oldest(self.over)


def latest(*known: Mapping[str, float]) -> dict[str, float]:
    """Id → the latest of its times in any of these."""
    found: dict[str, float] = {}
    for each in known:
        for id, at in each.items():
            found[id] = max(at, found.get(id, at))
    return found


def forget_oldest(of: dict[K, float]) -> None:
    """Keep the latest ones, as many as are remembered."""
    while len(of) > MOST:
        del of[next(iter(of))]
