"""What happened to messages: the entries of the journal, and what they add up to. The order in which they arrive does not matter."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable, Iterator, Sequence
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


FINAL: Final = frozenset({Kind.SUCCEEDED, Kind.DUPLICATE, Kind.RETRIED, Kind.CANCELLED, Kind.DEAD})
"""Behind one of these the same attempt is over, wherever it ran."""
NEVER_BEGUN: Final = frozenset({Reason.CRASHED, Reason.EXPIRED})
"""The reasons of dead letters whose last attempt did not begin."""
LOST: Final = "what it returned got lost with the process that had done it"
"""Why a result is not kept where the ledger knows that the message was handled, and the journal does not."""
NOWHERE: Final = "unrouted"
"""The reason with which a message was published that no queue received: nobody waits for it."""
BY_NO_WORKER: Final = frozenset({Kind.PUBLISHED, Kind.CANCELLING, Kind.REDRIVEN})
"""What happens to a message itself, whichever workers it is for."""
ENDS: Final = frozenset({Kind.SUCCEEDED, Kind.DUPLICATE, Kind.CANCELLED, Kind.DEAD})
"""Behind one of these nothing more happens by itself."""
GOOD_ENDS: Final = ENDS - {Kind.DEAD}
"""Those that leave no dead letter."""


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


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """The same entries, each once, by their times; the clocks of several machines may differ."""
    return sorted(set(entries), key=_order)


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
        correlation_id=any_one.correlation_id,
        causation_id=any_one.causation_id,
    )
    if handled:
        job = _handled(job, handled, redriven)
    if job.status in GIVEN_UP and any(
        entry.queue == job.queue and entry.at >= (job.ended or 0.0) for entry in redriven
    ):
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


def _order(entry: Entry) -> tuple[object, ...]:
    """By time; what carries the same one, by what must have come first, and then by anything that tells them apart."""
    return (
        entry.at,
        _RANK[entry.kind],
        entry.attempt,
        -1.0 if entry.done is None else entry.done,
        *(str(getattr(entry, field)) for field in entry.__struct_fields__),
    )


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
    if was_dead and any(before[-1].at <= entry.at <= wish.at and entry.queue == before[-1].queue for entry in redriven):
        was_dead = False
    return not was_dead and all(entry.kind is not Kind.DEAD for entry in after)


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
            again = any(died <= back.at <= entry.at and back.queue == entry.queue for back in redriven)
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
    return (*_attempt(entry), entry.kind in FINAL, *_order(entry))


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
