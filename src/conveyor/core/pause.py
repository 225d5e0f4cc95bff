"""Which queues are paused: decisions that reach every process in any order, and lead everywhere to the same state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

MICROSECONDS: Final = 1_000_000


class Switch(msgspec.Struct, frozen=True, order=True, array_like=True):
    """The last decision about a queue.

    Parameters:
        order: the later decision has the larger one; roughly the microseconds since 1970.
        paused: nobody fetches from the queue.
    """

    order: int
    paused: bool


Switches = Mapping[str, Switch]
"""Queue → the last decision about it."""


def merged(one: Switches, other: Switches) -> dict[str, Switch]:
    """What is known when both are known: of each queue the later decision; of two that are equally late, the pause."""
    known = dict(one)
    for queue, switch in other.items():
        known[queue] = max(known.get(queue, switch), switch)
    return known


def decided(known: Switches, queue: str, *, paused: bool, now: float) -> dict[str, Switch]:
    """A new decision, later than every one that is known, also where somebody's clock was ahead.

    Parameters:
        now: Unix seconds.
    """
    latest = max((switch.order for switch in known.values()), default=0)
    return {queue: Switch(max(latest + 1, int(now * MICROSECONDS)), paused)}


def paused_in(known: Switches) -> frozenset[str]:
    """The queues that are paused."""
    return frozenset(queue for queue, switch in known.items() if switch.paused)
