"""What the entries of the journal add up to: jobs, and wishes to cancel them, in whichever order entries arrive."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from math import inf
from typing import Final

import msgspec

from conveyor.core.journal import BY_NO_WORKER, ENDS, NEVER_BEGUN, NOWHERE, Entry, Kind, by_time, in_order
from conveyor.core.settle import Reason

FINAL: Final = frozenset({Kind.SUCCEEDED, Kind.DUPLICATE, Kind.RETRIED, Kind.CANCELLED, Kind.DEAD})
"""Behind one of these the same attempt is over, wherever it ran."""
LOST: Final = "what it returned got lost with the process that had done it"
"""Why a result is not kept where the ledger knows that the message was handled, and the journal does not."""
GOOD_ENDS: Final = ENDS - {Kind.DEAD}
"""Those that leave no dead letter."""


class Status(enum.StrEnum):
    """Where a job is."""

    WAITING = "waiting"
    """In its queue."""
    RUNNING = "running"
    """A worker is at it."""
    RETRYING = "retrying"
    """It failed, and waits for its next attempt."""
    DONE = "done"
    """It succeeded."""
    FAILED = "failed"
    """Given up at once, because its error is not one to try again after, or its payload makes no sense; a dead letter."""
    DEAD = "dead"
    """Given up after every attempt, or because its processes died or its time was over; a dead letter."""
    CANCELLED = "cancelled"
    """Somebody cancelled it."""

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self in ENDED


NOT_RUNNING: Final = frozenset({Status.WAITING, Status.RETRYING})
ENDED: Final = frozenset({Status.DONE, Status.FAILED, Status.DEAD, Status.CANCELLED})
GIVEN_UP: Final = frozenset({Status.FAILED, Status.DEAD})
GIVEN_UP_AT_ONCE: Final = frozenset({Reason.REJECTED, Reason.INVALID})
"""The reasons that no further attempt could have changed."""


class Job(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A message and what one worker made of it so far.

    Parameters:
        id: the message's.
        worker: the identity of the worker; "" while none has had it.
        process: where it ran last.
        attempts: begun so far, as far as is known.
        crashes: processes that died while they handled it.
        correlation_id: of the journey; its own id where it began it.
        created: Unix seconds when it was published; None where that is not known.
        due: Unix seconds of the next attempt; 0.0 is at once.
        started: Unix seconds when the last attempt began; None where none did.
        ended: Unix seconds when it was over; None while it is not.
        error: what the last failed attempt failed with; "" where it is done, or none has failed.
        done, total, note: the last progress of the last attempt.
        result: what it returned, as JSON text; None where nothing is kept of it.
        unkept: why nothing is kept of it; "" where it is, or where it returned nothing.
    """

    id: str
    topic: str
    worker: str = ""
    process: str = ""
    queue: str = ""
    status: Status = Status.WAITING
    attempts: int = 0
    crashes: int = 0
    correlation_id: str | None = None
    causation_id: str | None = None
    created: float | None = None
    due: float = 0.0
    started: float | None = None
    ended: float | None = None
    reason: str = ""
    error: str = ""
    traceback: str = ""
    done: float | None = None
    total: float | None = None
    note: str = ""
    result: str | None = None
    unkept: str = ""


class JobFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs are meant; what is None does not restrict.

    Parameters:
        ids: of their messages.
        worker: a worker's identity, or its name alone.
        topic: what they were published under.
        since: Unix seconds; something happened to them since then.
    """

    ids: tuple[str, ...] | None = None
    status: Status | None = None
    worker: str | None = None
    topic: str | None = None
    since: float | None = None

    def fits(self, job: Job) -> bool:
        """Whether a job is one of these; since is for whoever knows the entries."""
        who = job.worker or job.topic  # a task's topic is its worker's identity
        return (
            (self.ids is None or job.id in self.ids)
            and (self.status is None or job.status is self.status)
            and (self.worker is None or f".{who}".endswith(f".{self.worker}"))
            and (self.topic is None or job.topic == self.topic)
        )


def job_of(entries: Iterable[Entry]) -> Job:
    """What the entries of one message, by one worker, add up to; those of several workers are jobs_of()'s.

    Raises:
        ValueError: there are none.
    """
    known = in_order(entries)
    if not known:
        raise ValueError("nothing is known about this job")
    published = [entry for entry in known if entry.kind is Kind.PUBLISHED]
    handled = [entry for entry in known if entry.kind not in BY_NO_WORKER]
    wish = next((entry for entry in reversed(known) if entry.kind is Kind.CANCELLING), None)
    redriven = [entry for entry in known if entry.kind is Kind.REDRIVEN]
    any_one = next((entry for entry in known if entry.topic), known[0])
    job = Job(
        id=any_one.message_id,
        topic=any_one.topic,
        created=published[0].at if published else None,
        due=published[0].due if published else 0.0,
        correlation_id=any_one.journey,
        causation_id=any_one.causation_id,
    )
    if handled:
        job = _handled(job, handled, redriven)
    if job.status in GIVEN_UP and _was_put_back(redriven, job.queue, job.ended or 0.0, inf):
        job = msgspec.structs.replace(job, status=Status.WAITING, ended=None, due=0.0, reason="")
    if wish is not None and job.status in NOT_RUNNING and _holds(wish, handled, redriven):
        # Whoever comes to it lets it go; should a runner have begun before it heard of it, later entries say so.
        job = msgspec.structs.replace(job, status=Status.CANCELLED, ended=max(wish.at, known[-1].at))
    return job


def jobs_of(entries: Iterable[Entry]) -> list[Job]:
    """The jobs that these entries tell of, the newest first: one for each message and worker that had it.

    What no queue received is none.
    """
    published: dict[str, list[Entry]] = {}
    handled: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.kind in BY_NO_WORKER:
            published.setdefault(entry.message_id, []).append(entry)
        else:
            handled.setdefault((entry.message_id, entry.worker), []).append(entry)
    had = {id for id, _ in handled}
    jobs = [job_of([*published.get(id, ()), *own]) for (id, _), own in handled.items()]
    jobs += [job_of(own) for id, own in published.items() if id not in had and _is_job(own)]
    return sorted(jobs, key=lambda job: (-(job.ended or job.started or job.created or 0.0), job.id, job.worker))


class Wish(msgspec.Struct, frozen=True):
    """Somebody wants a message cancelled.

    Parameters:
        at: Unix seconds.
        holds: whoever comes to it lets it go.
        over: the identities of the workers for which it does not hold: the message was, or had become by then, their dead letter.
    """

    at: float
    holds: bool
    over: frozenset[str] = frozenset()


def wish_of(entries: Iterable[Entry]) -> Wish | None:
    """The last wish to have this message cancelled; None where nobody wants that.

    That of a job holds until its worker has ended it. An event may be for more workers than are known: it holds for all but those
    that have given it up.
    """
    known = in_order(entries)
    wish = next((entry for entry in reversed(known) if entry.kind is Kind.CANCELLING), None)
    if wish is None:
        return None
    handled: dict[str, list[Entry]] = {}
    for entry in known:
        if entry.kind not in BY_NO_WORKER:
            handled.setdefault(entry.worker, []).append(entry)
    redriven = [entry for entry in known if entry.kind is Kind.REDRIVEN]
    over = frozenset(worker for worker, own in handled.items() if not _holds(wish, own, redriven))
    has_ended = over | {worker for worker, own in handled.items() if job_of([*own, *redriven]).status.ended}
    is_job = any(is_for_one(entry) for entry in known)
    return Wish(wish.at, holds=not (is_job and has_ended), over=over)


def is_for_one(entry: Entry) -> bool:
    """Whether the message is a job, which no other worker gets: its topic is the worker's identity."""
    return entry.worker == entry.topic and entry.kind not in BY_NO_WORKER


def _is_job(entries: Sequence[Entry]) -> bool:
    """Whether there is a job in what no worker had: not where no queue received it, nor where only somebody else can know more."""
    told = [entry.reason == NOWHERE for entry in entries if entry.kind is Kind.PUBLISHED]
    return not (told and all(told)) and any(entry.kind is not Kind.REDRIVEN for entry in entries)


def _handled(job: Job, handled: Sequence[Entry], redriven: Sequence[Entry]) -> Job:
    """A job with what became of it."""
    handled = _without_refused(_as_they_happened(handled, redriven))
    last = handled[-1]
    succeeded = next((e for e in reversed(handled) if e.kind is Kind.SUCCEEDED), None)
    duplicate = next((e for e in handled if e.kind is Kind.DUPLICATE), None)
    cancelled = next((e for e in handled if e.kind is Kind.CANCELLED), None)
    # What succeeded stays done, whatever a repeated delivery did behind it; a dead letter may be redriven.
    end = succeeded or duplicate or cancelled or (last if last.kind is Kind.DEAD else None)
    decisive = end or last
    failure = next((e for e in reversed(handled) if e.error), None)
    running = [e for e in handled if e.started is not None or e.done is not None]
    begun = next((e.started for e in reversed(running) if e.started is not None), None)
    latest = running[-1] if running else last
    progress = next((e for e in reversed(running) if e.done is not None and _attempt(e) == _attempt(latest)), None)
    return msgspec.structs.replace(
        job,
        worker=decisive.worker,
        process=decisive.process,
        queue=decisive.queue,
        status=_status(decisive),
        attempts=max(e.attempt for e in handled),
        crashes=max(e.crashes for e in handled),
        due=decisive.due,
        started=decisive.started if end is not None and decisive.started is not None else begun,
        ended=None if end is None else end.at,
        reason=decisive.reason,
        error="" if failure is None or _status(decisive) is Status.DONE else failure.error,
        traceback="" if failure is None or _status(decisive) is Status.DONE else failure.traceback,
        done=None if progress is None else progress.done,
        total=None if progress is None else progress.total,
        note="" if progress is None else progress.note,
        result=None if succeeded is None else succeeded.result,
        unkept=succeeded.unkept if succeeded is not None else LOST if duplicate is not None else "",
    )


def _holds(wish: Entry, handled: Sequence[Entry], redriven: Iterable[Entry]) -> bool:
    """Whether a wish to cancel means what is in the queue now: a dead letter that is redriven begins anew."""
    before = [entry for entry in handled if entry.at <= wish.at]
    after = handled[len(before) :]
    was_dead = bool(before) and before[-1].kind is Kind.DEAD
    began_anew = was_dead and _was_put_back(redriven, before[-1].queue, before[-1].at, wish.at)
    return (began_anew or not was_dead) and all(entry.kind is not Kind.DEAD for entry in after)


def _was_put_back(redriven: Iterable[Entry], queue: str, since: float, until: float) -> bool:
    """Whether somebody put the dead letter back into its queue in this time (Unix seconds)."""
    return any(entry.queue == queue and since <= entry.at <= until for entry in redriven)


def _without_refused(handled: Sequence[Entry]) -> list[Entry]:
    """Without the good ends that the broker did not take: whoever told of one tells next that the same attempt is a dead letter."""
    refused = {
        (*_attempt(entry), entry.process): place
        for place, entry in enumerate(handled)
        if entry.kind is Kind.DEAD and entry.reason == Reason.REJECTED and entry.started is None
    }
    return [
        entry
        for place, entry in enumerate(handled)
        if entry.kind not in GOOD_ENDS or refused.get((*_attempt(entry), entry.process), -1) < place
    ]


def _as_they_happened(handled: Sequence[Entry], redriven: Sequence[Entry]) -> list[Entry]:
    """What one worker did with one message, given by time, in the order in which it must have happened.

    Brokers count hand-overs; so no clock that is ahead puts an earlier attempt behind a later one. A dead letter that is redriven is
    counted anew: only times tell that its second life comes behind its first one, for not everybody who redrives tells of it.
    """
    lives: list[list[Entry]] = [[]]
    started, over, is_dead = set[tuple[int, int]](), set[tuple[int, int]](), False
    died = 0.0
    for entry in handled:
        hand_over = attempt, _ = _attempt(entry)
        is_final = entry.kind in FINAL
        if is_dead:
            again = _was_put_back(redriven, entry.queue, died, entry.at)
            if attempt <= 1:  # what a life has but once, begins another one
                again = again or hand_over in over or (entry.kind is Kind.STARTED and hand_over in started)
                again = again or (is_final and any(other <= 1 for other, _ in over))
            if again:
                lives.append([])
                started, over, is_dead = set(), set(), False
        lives[-1].append(entry)
        if entry.kind is Kind.DEAD:
            is_dead, died = True, entry.at
        if entry.kind is Kind.STARTED:
            started.add(hand_over)
        if is_final:
            over.add(hand_over)
    return [entry for life in lives for entry in sorted(life, key=_place)]


def _place(entry: Entry) -> tuple[object, ...]:
    """Of an entry among those of one life: what was given back was so before the same attempt had its end elsewhere."""
    return (*_attempt(entry), entry.kind in FINAL, *by_time(entry))


def _attempt(entry: Entry) -> tuple[int, int]:
    """Which of its attempts it tells of, or comes before which could begin; one that a crash ended is not counted."""
    return entry.attempt + _is_before_it_began(entry), entry.crashes


def _is_before_it_began(entry: Entry) -> bool:
    """Whether it ended before the attempt that was to come."""
    if entry.started is not None:
        return False
    return entry.kind is Kind.CANCELLED or (entry.kind is Kind.DEAD and entry.reason in NEVER_BEGUN)


def _status(entry: Entry) -> Status:
    match entry.kind:
        case Kind.SUCCEEDED | Kind.DUPLICATE:
            return Status.DONE
        case Kind.DEAD:
            return Status.FAILED if entry.reason in GIVEN_UP_AT_ONCE else Status.DEAD
        case Kind.CANCELLED:
            return Status.CANCELLED
        case Kind.STARTED | Kind.PROGRESSED:
            return Status.RUNNING
        case Kind.RETRIED:
            return Status.RETRYING
        case _:
            return Status.WAITING
