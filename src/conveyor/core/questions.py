"""What can be asked about the journal, and what is answered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

import msgspec

from conveyor.core.jobs import Job, JobFilter
from conveyor.core.journal import Entry

LARGEST_ANSWER_BYTES: Final = 2 * 1024 * 1024
"""Bytes of texts and results in an answer."""
CUT: Final = "left out here: the whole journey would not fit into an answer"
"""Why there is no result in it."""


class JourneyOf(msgspec.Struct, frozen=True, tag="journey", omit_defaults=True):
    """The whole journey of a message.

    Parameters:
        id: of the message, or of the journey (its correlation id); the beginning of one is enough where only one begins so.
    """

    id: str


class JobsOf(msgspec.Struct, frozen=True, tag="jobs", omit_defaults=True):
    """Jobs, the newest first, without their results."""

    which: JobFilter = JobFilter()
    limit: int = 100


class EndOf(msgspec.Struct, frozen=True, tag="end", omit_defaults=True):
    """The jobs of these messages, with their results, as soon as one has ended; after a while, as they are then.

    Parameters:
        seconds: how long the answer may wait for an end, from when the question is heard: clocks of two machines differ.
    """

    ids: tuple[str, ...]
    seconds: float


Request = JourneyOf | JobsOf | EndOf


class Question(msgspec.Struct, frozen=True):
    """A request on its way.

    Parameters:
        id: the answer carries it.
        reply_to: the topic that the answer goes to.
    """

    id: str
    reply_to: str
    request: Request


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one keeper knows, or several together.

    Parameters:
        to: the question's id.
        app: the application whose journal it keeps; "" where there are several, or where that is not known.
        entries: of the journey, in any order.
        jobs: those that were asked for.
        others: journeys that begin with the id as well, so that it is not clear which is meant.
        more: there is more than fits into an answer.
        behind: why the newest may not be in it; "" where they are.
        problem: why it can say nothing; "" where it can.
        silent: applications that keep, or kept, a journal here, of which nobody answered: what they did is not in this.
    """

    to: str
    entries: tuple[Entry, ...] = ()
    jobs: tuple[Job, ...] = ()
    others: tuple[str, ...] = ()
    more: bool = False
    behind: str = ""
    problem: str = ""
    app: str = ""
    silent: tuple[str, ...] = ()


T = TypeVar("T", Entry, Job)


def fit(found: Iterable[T]) -> tuple[tuple[T, ...], bool]:
    """As many as an answer may hold, and whether that leaves some out."""
    room = LARGEST_ANSWER_BYTES
    fitting: list[T] = []
    for each in found:
        room -= 300 + len(each.error) + len(each.traceback) + len(each.note) + len(each.result or "")
        if room < 0 and fitting:
            return tuple(fitting), True
        fitting.append(each)
    return tuple(fitting), False


def shortened(entry: Entry) -> Entry:
    """An entry without what may be long."""
    unkept = entry.unkept if entry.result is None else CUT
    return msgspec.structs.replace(entry, traceback="", result=None, unkept=unkept)
