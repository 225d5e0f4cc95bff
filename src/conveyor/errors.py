"""Every error that Conveyor raises, and the two outcomes that a handler may raise.

ConveyorError
├── ConfigurationError          a set-up that cannot work; found before any message moves
│   ├── HandlerError            a handler whose signature or options cannot work
│   ├── MissingExtra            an optional dependency is not installed
│   └── MissingFeature          the broker cannot do what a queue asks for
├── PayloadError                a payload that cannot be encoded, decoded or carried
│   └── PayloadTooLarge
├── BrokerError                 the broker refused or could not be reached
│   ├── BrokerUnavailable       not reachable now; trying again may help
│   ├── BrokerFull              no room: disk, memory or a bound; trying again later may help
│   ├── QueueConflict           a queue exists with other properties
│   ├── QueueInUse              a queue cannot be removed now: somebody receives from it, or it has dead letters
│   └── PublishFailed           some messages of a batch are not (or perhaps not) owned by the broker
├── NoSubscriber                a message that somebody had to receive has no queue
├── LedgerError                 the application's database refused, or is not set up
│   ├── LedgerUnavailable       it cannot be reached or is full; trying again helps once that is over
│   └── LedgerBusy              it had no room or time for this transaction; counts as a failed attempt
├── JournalError                the journal cannot be kept or read
│   └── NoKeeper                nobody keeps a journal there, or nobody answers
├── JobError                    a job whose result cannot be had
│   ├── JobFailed               it was given up, and is a dead letter
│   ├── JobCancelled            somebody cancelled it, or its own handler did by raising this
│   ├── JobTimeout              it has not ended in the time that one would wait (also a TimeoutError)
│   ├── JobUnknown              nothing is known about it
│   └── ResultNotKept           it is done, but what it returned is too large to be kept, or no JSON
├── HandlerTimeout              a handler ran longer than its worker allows
└── HandlerCrashed              the process that ran a handler died
Outcome                         raised by handlers to decide instead of the policy
├── Retry                       again, later
└── Reject                      never again: keep it as a dead letter
AlreadyHandled                  unwinds a handler whose message was handled before; no error, and not to be caught
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any


class ConveyorError(Exception):
    """Anything that Conveyor itself raises."""


class ConfigurationError(ConveyorError):
    """A set-up that cannot work; the text says what to change."""


class HandlerError(ConfigurationError):
    """A handler whose signature or options cannot work; raised where it is registered."""


class MissingExtra(ConfigurationError):
    """An optional dependency is not installed.

    Parameters:
        what: what needs it, as the user would say it ("the Redis broker").
        extra: the extra's name, as in ``pip install conveyor[redis]``.
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'conveyor[{extra}]'")
        self.what = what
        self.extra = extra


class MissingFeature(ConfigurationError):
    """The broker cannot do what a queue asks for."""


class PayloadError(ConveyorError):
    """A payload that cannot be encoded, decoded or validated."""


class PayloadTooLarge(PayloadError):
    """A payload over the size limit (bytes)."""


class BrokerError(ConveyorError):
    """The broker refused, or could not be reached."""


class BrokerUnavailable(BrokerError):
    """The broker is not reachable now; trying again may help."""


class BrokerFull(BrokerError):
    """The broker has no room now: its disk, memory or bound is used up."""


class QueueConflict(BrokerError):
    """A queue exists with other properties; the text names both sides."""


class QueueInUse(BrokerError):
    """A queue is not removed: somebody receives from it, or it has dead letters that were not to go with it.

    Parameters:
        consumers: its live subscriptions.
        dead: its dead letters.
    """

    def __init__(self, queue: str, *, consumers: int = 0, dead: int = 0) -> None:
        why = (
            f"somebody receives from it (consumers: {consumers}); stop its workers first"
            if consumers
            else f"its dead letters would be lost ({dead}); redrive or discard them first, or say that they go with it"
        )
        super().__init__(f"the queue {queue!r} is not removed: {why}")
        self.queue = queue
        self.consumers = consumers
        self.dead = dead


class PublishFailed(BrokerError):
    """Part of a batch is not owned by the broker.

    Parameters:
        refused: message id → why the broker does not have it. Safe to publish again.
        unknown: message id → why nobody can tell whether it has it. Publishing again with the same id
            may deliver it twice.
    """

    def __init__(self, refused: Mapping[str, str], unknown: Mapping[str, str] | None = None) -> None:
        self.refused = dict(refused)
        self.unknown = dict(unknown or {})
        why = next(iter([*self.refused.values(), *self.unknown.values()]), "no reason given")
        super().__init__(f"{len(self.refused)} message(s) refused, {len(self.unknown)} with unknown outcome: {why}")


class NoSubscriber(ConveyorError):
    """A message that somebody had to receive has no queue."""


class LedgerError(ConveyorError):
    """The application's database refused, or is not set up for Conveyor."""


class LedgerUnavailable(LedgerError):
    """The application's database is out of order: not reachable, or its disk is full. No fault of a message, so it counts no attempt.

    Parameters:
        unknown: nobody can tell whether the transaction was committed. Doing it again is safe for a handler
            (its inbox tells a repeat); anyone else has to look.
    """

    def __init__(self, text: str, *, unknown: bool = False) -> None:
        super().__init__(text)
        self.unknown = unknown


class LedgerBusy(LedgerError):
    """The application's database works, but not for this transaction: it met a deadlock or conflict, waited too long for a lock or a
    connection, or was silent for too long. Trying again may help; as it may also be the handler's own doing, each time counts.
    """


class JournalError(ConveyorError):
    """The journal cannot be kept or read; the text says why and what to do."""


class NoKeeper(JournalError):
    """A question about the journal found nobody who keeps one, or nobody answered it in time."""


class JobError(ConveyorError):
    """A job whose result cannot be had.

    Parameters:
        id: the job's, which is its message's.
    """

    def __init__(self, text: str, id: str) -> None:
        super().__init__(text)
        self.id = id


class JobFailed(JobError):
    """A job was given up: it is a dead letter, with this error.

    Where it was raised there is this error's ``__cause__``, a RemoteTraceback.

    Parameters:
        error: what its last attempt failed with, type and text.
        traceback: where, as text; "" where that is not known.
        attempts: how often it was tried.
    """

    def __init__(self, text: str, id: str, *, error: str, traceback: str, attempts: int) -> None:
        super().__init__(text, id)
        self.error = error
        self.traceback = traceback
        self.attempts = attempts


class JobCancelled(JobError):
    """A job was cancelled before it was done.

    A handler may raise it: its job ends as cancelled, neither done nor failed, and nothing of what the attempt would have published is.

    Parameters:
        id: the job's; a handler leaves it out, and means its own. One with another job's id, as that one's ticket raises it, is
            a failure like any other.
    """

    def __init__(self, why: str = "cancelled", id: str = "") -> None:
        super().__init__(why, id)


class JobTimeout(JobError, TimeoutError):
    """A job has not ended in the time that one would wait; it goes on. The text says what is known about it.

    Parameters:
        status: where it is ("waiting", "running", "retrying"); "" where nothing is known.
    """

    def __init__(self, text: str, id: str, *, status: str) -> None:
        super().__init__(text, id)
        self.status = status


class JobUnknown(JobError):
    """The journal knows nothing about such a job."""


class ResultNotKept(JobError):
    """The job is done, but what it returned is not kept; the text says why."""


class RemoteTraceback(Exception):
    """Where an error was raised in another process; the cause of the error here."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


class HandlerTimeout(ConveyorError):
    """A handler ran longer than its worker allows."""


class HandlerCrashed(ConveyorError):
    """The process that ran a handler died."""


class Outcome(Exception):
    """What a handler raises to decide instead of its policy."""


class Retry(Outcome):
    """Raised by a handler: run me again later, whatever the policy says about this error.

    It counts as an attempt, so that the policy's limit still ends it.

    Parameters:
        after: seconds (or timedelta) until then; left out, the policy's back-off decides.
        why: the text kept with the message.

    Raises:
        ValueError: after is no number of seconds.
    """

    def __init__(self, why: str = "the handler asked for a retry", *, after: float | timedelta | None = None) -> None:
        super().__init__(why)
        seconds: Any = after.total_seconds() if isinstance(after, timedelta) else after
        if seconds is not None and not (isinstance(seconds, int | float) and 0 <= seconds < math.inf):
            raise ValueError(f"Retry(after={after!r}): seconds, or a timedelta, from 0 on")
        self.after_seconds = seconds


class Reject(Outcome):
    """Raised by a handler: never run me again on this message; keep it as a dead letter with this reason."""

    def __init__(self, why: str) -> None:
        super().__init__(why)


class AlreadyHandled(BaseException):
    """Unwinds a handler whose message was handled before, where it first touches its transaction.

    Not an Exception, so that a handler's ``except Exception`` does not take it for a failure to make up for.

    Parameters:
        worker: whose handler it is.
        message_ids: those of its messages that were handled before.
    """

    def __init__(self, worker: str, message_ids: tuple[str, ...]) -> None:
        super().__init__(f"{worker} has handled {', '.join(message_ids)} before")
        self.worker = worker
        self.message_ids = message_ids


def is_outage(error: BaseException) -> bool:
    """Whether a broker or a database was out of order, or had no room: such an attempt is repeated, and not counted."""
    if isinstance(error, PublishFailed):
        return bool(error.unknown) and not error.refused
    return isinstance(error, (BrokerUnavailable, BrokerFull, LedgerUnavailable))
