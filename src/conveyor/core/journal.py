"""What happened to messages, entry by entry, and the journeys that entries tell of, in whichever order they arrive."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Final, Generic, TypeVar

import msgspec

from conveyor.core.settle import Reason


class Kind(enum.StrEnum):
    """What an entry tells."""

    PUBLISHED = "published"
    """It was published; by a worker's handler, or by a program."""
    STARTED = "started"
    """An attempt was running at that moment; short ones are only noted by their end."""
    PROGRESSED = "progressed"
    """How far the running attempt says it is."""
    SUCCEEDED = "succeeded"
    """The attempt succeeded."""
    DUPLICATE = "duplicate"
    """The ledger knew it already: nothing was done again."""
    RETRIED = "retried"
    """The attempt failed, and another one comes at due."""
    RELEASED = "released"
    """It went back to its queue, uncounted."""
    CANCELLING = "cancelling"
    """Somebody wants it cancelled: no attempt begins any more, and one that runs is stopped."""
    CANCELLED = "cancelled"
    """A worker has let it go, because somebody cancelled it; it is not handled any more."""
    DEAD = "dead"
    """It was given up, and is a dead letter."""
    REDRIVEN = "redriven"
    """Somebody put the dead letter back into its queue."""


NEVER_BEGUN: Final = frozenset({Reason.CRASHED, Reason.EXPIRED})
"""The reasons of dead letters whose last attempt did not begin."""
NOWHERE: Final = "unrouted"
"""The reason with which a message was published that no queue received: nobody waits for it."""
BY_NO_WORKER: Final = frozenset({Kind.PUBLISHED, Kind.CANCELLING, Kind.REDRIVEN})
"""What happens to a message itself, whichever workers it is for."""
ENDS: Final = frozenset({Kind.SUCCEEDED, Kind.DUPLICATE, Kind.CANCELLED, Kind.DEAD})
"""Behind one of these nothing more happens by itself."""


Number = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""Neither NaN nor infinite: what is read as an entry can be kept, and read again."""
Count = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
"""Of a size that every store can keep."""


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One thing that happened to one message. New fields go to the end, with a default.

    Parameters:
        at: Unix seconds.
        worker: the identity (``<application>.<name>``) of the worker that did it; "" is a program that published.
        process: where: ``<host>/<number>``, as its supervisor counts; ``<host>/<pid>`` where it has none.
        queue: where the message waited; "" where that does not matter.
        attempt: 1 is the first; 0 where none was made.
        crashes: earlier hand-overs that ended without a word, because their process died.
        correlation_id: of the journey; None where the message begins it.
        causation_id: of the message whose handler published it; None where no handler did.
        started: Unix seconds when the attempt began; None where none was made.
        due: Unix seconds before which nobody receives the message; 0.0 is at once.
        reason: why it is dead, see conveyor.core.settle.Reason; or NOWHERE.
        error: what the attempt failed with, its type and what it says.
        traceback: where, bounded.
        done: progress: so much, in any unit.
        total: progress: of so much; None where nobody knows.
        note: progress in words.
        result: what the job returned, as JSON text; None where nothing is kept of it.
        unkept: why nothing is kept of it; "" where it is, or where it returned nothing.
    """

    kind: Kind
    at: Number
    message_id: str
    topic: str
    worker: str = ""
    process: str = ""
    queue: str = ""
    attempt: Count = 0
    crashes: Count = 0
    correlation_id: str | None = None
    causation_id: str | None = None
    started: Number | None = None
    due: Number = 0.0
    reason: str = ""
    error: str = ""
    traceback: str = ""
    done: Number | None = None
    total: Number | None = None
    note: str = ""
    result: str | None = None
    unkept: str = ""

    @property
    def journey(self) -> str:
        """The id of the journey that its message belongs to."""
        return self.correlation_id or self.message_id


class Successes(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Entries of attempts that succeeded, in short: what they share is said once, for they are nearly all that there is.

    Parameters:
        topic, worker, process, queue, attempt, crashes: of them all.
        each: of each what OWN names.
    """

    topic: str
    worker: str
    process: str
    queue: str
    attempt: Count
    crashes: Count
    each: list[tuple[str, Number, Number | None, str | None, str | None]]

    def entries(self) -> list[Entry]:
        """The same at length."""
        kind, topic, worker, process, queue = Kind.SUCCEEDED, self.topic, self.worker, self.process, self.queue
        attempt, crashes = self.attempt, self.crashes
        return [
            Entry(kind, at, id, topic, worker, process, queue, attempt, crashes, journey, cause, started)
            for id, at, started, journey, cause in self.each
        ]


OWN: Final = ("message_id", "at", "started", "correlation_id", "causation_id")
"""The fields that differ from one of the Successes to the next."""
Told = Entry | Successes
E = TypeVar("E")


class Batch(msgspec.Struct, Generic[E], frozen=True, array_like=True, gc=False):
    """What a process has to tell, as it travels.

    Parameters:
        entries: or what stands for them.
    """

    entries: list[E]
    successes: list[Successes] = []

    def told(self) -> list[E | Successes]:
        """All that is in it."""
        return [*self.entries, *self.successes]


def each_of(told: Iterable[Told]) -> Iterator[Entry]:
    """Every entry, at length."""
    for one in told:
        if isinstance(one, Successes):
            yield from one.entries()
        else:
            yield one


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """The same entries, each once, by their times; the clocks of several machines may differ."""
    return sorted(set(entries), key=by_time)


class Stop(msgspec.Struct, frozen=True):
    """A message on a journey: what happened to it, and where it led.

    Parameters:
        entries: as they happened.
        leads_to: the messages that its handlers published, as they happened.
    """

    message_id: str
    topic: str
    entries: tuple[Entry, ...]
    leads_to: tuple[Stop, ...] = ()


def stops(entries: Iterable[Entry]) -> list[Stop]:
    """A journey as a tree by causation; its roots are the messages whose cause is not among them."""
    of: dict[str, list[Entry]] = {}
    for entry in in_order(entries):
        of.setdefault(entry.message_id, []).append(entry)
    caused: dict[str, list[str]] = {}
    first: list[str] = []
    for id, own in of.items():
        cause = next((entry.causation_id for entry in own if entry.causation_id in of), None)
        (first if cause is None else caused.setdefault(cause, [])).append(id)
    roots: list[str] = []
    walked: dict[str, list[str]] = {}
    # Ids that come from elsewhere may form a circle, which no root leads to: it is cut at what came first.
    for root in (*first, *of):
        if root in walked:
            continue
        roots.append(root)
        walked[root] = []
        waiting = [root]
        while waiting:  # no recursion: a journey may have more hops than Python has frames
            id = waiting.pop()
            for child in caused.get(id, ()):
                if child not in walked:
                    walked[child] = []
                    walked[id].append(child)
                    waiting.append(child)
    made: dict[str, Stop] = {}
    for id in reversed(walked):
        made[id] = Stop(id, of[id][0].topic, tuple(of[id]), tuple(made[child] for child in walked[id]))
    return [made[root] for root in roots]


_RANK: Final = {kind: place for place, kind in enumerate(Kind)}


def by_time(entry: Entry) -> tuple[object, ...]:
    """By time; what carries the same one, by what must have come first, and then by anything that tells them apart."""
    return (
        entry.at,
        _RANK[entry.kind],
        entry.attempt,
        -1.0 if entry.done is None else entry.done,
        *(str(getattr(entry, field)) for field in entry.__struct_fields__),
    )
