"""A ticket: what whoever sent a job holds of it, to ask how it is, to wait for its result, and to cancel it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from datetime import timedelta
from typing import Any, Final, Generic, Protocol, TypeVar, cast

from conveyor.core.codec import explain, result_codec_for
from conveyor.core.jobs import Job, JobFilter, Status
from conveyor.core.message import Message
from conveyor.core.words import counted, far
from conveyor.errors import (
    BrokerError,
    HandlerError,
    JobCancelled,
    JobError,
    JobFailed,
    JobTimeout,
    JobUnknown,
    NoKeeper,
    PayloadError,
    RemoteTraceback,
    ResultNotKept,
    is_outage,
)
from conveyor.runtime.ask import ANSWER_SECONDS, LOOK_SECONDS, Asker
from conveyor.runtime.connection import Connection
from conveyor.runtime.control import cancel

log = logging.getLogger("conveyor.ticket")

T = TypeVar("T")
S = TypeVar("S")
Seconds = float | timedelta

PATIENCE_SECONDS: Final = 15.0
"""How long one question waits for the end of a job; then it is asked again."""
GATHER_SECONDS: Final = 0.05
"""Between two questions, so that several ends come in one answer."""
OUTAGE_SECONDS: Final = 0.5
"""The same where the broker is away."""
SOON_SECONDS: Final = 0.5
"""Before the order to cancel what may be running, an answer is waited for no longer."""
STATUS_SECONDS: Final = 15.0
"""How long somebody is asked how a job is: a keeper that ended is started again within seconds."""
MOST_AT_ONCE: Final = 500
"""Jobs that are asked about in one question."""


class Office(Protocol):
    """What a ticket needs of its application."""

    async def connect_journal(self) -> Connection:
        """The open connection of an application whose journal is on.

        Raises:
            ConfigurationError: the journal is off.
        """
        ...

    def result_type(self, job: Job) -> Any:
        """The type of what a job returns, where this application declares it; else Any."""
        ...

    def wait_here(self, work: Coroutine[Any, Any, S], called: str, instead: str) -> S:
        """Run work to its end, for code without an event loop."""
        ...


class Ticket(Generic[T]):
    """A job that was sent: how it is, what it returned, and a way to cancel it. Needs the journal.

    Made by Task.send(), or by Task.ticket() and Conveyor.ticket() for a job that another program has sent.

    Parameters:
        id: the job's, which is its message's.
        message: what was sent; None where another program sent it.
        topic: of the jobs that it may be one of; None where that does not matter.
    """

    def __init__(self, office: Office, id: str, message: Message | None = None, topic: str | None = None) -> None:
        if not isinstance(id, str):
            raise TypeError(f"the id of a job is a text, not {id!r}")
        self.id: Final = id
        self.message: Final = message
        self._office = office
        self._topic = topic

    def __repr__(self) -> str:
        return f"<Ticket {self.id}{f' of {self.message.topic}' if self.message is not None else ''}>"

    async def result(self, timeout: Seconds | None = None) -> T:
        """What the job returned, as soon as it is done.

        Parameters:
            timeout: seconds (or timedelta) to wait for its end; None is as long as it takes, 0 only looks.

        Raises:
            JobFailed: it was given up, and is a dead letter.
            JobCancelled: somebody cancelled it.
            JobTimeout: it has not ended by then (also a TimeoutError).
            JobUnknown: it is another task's job.
            ResultNotKept: it is done, but what it returned was too large, or is no JSON.
            PayloadError: what it returned is not of the type that the task here says.
            NoKeeper: nobody keeps a journal, or nobody answers.
            ConfigurationError: the journal is off.
            ValueError: timeout is no time.
        """
        seconds = _seconds(timeout)
        asker = (await self._office.connect_journal()).asker
        async for job in _ends(asker, [self.id], seconds):
            return cast("T", self.result_in(job))
        try:
            known = await self._known(0.0, LOOK_SECONDS)
            told = in_words(known)
        except (NoKeeper, BrokerError) as error:
            known, told = None, str(error)
        raise JobTimeout(
            f"job {self.id} has not ended after {seconds:g} s: {told}",
            self.id,
            status="" if known is None else known.status,
        )

    async def status(self, timeout: Seconds = STATUS_SECONDS) -> Job:
        """How the job is now: waiting, running, retrying, done, failed, dead or cancelled; with attempts, times, worker, error, progress.

        It may be up to half a second behind. What it returned is not in it, see result().

        Parameters:
            timeout: seconds (or timedelta) in which somebody has to answer: a keeper that ended is being started again.

        Raises:
            JobUnknown: the journal does not know it, or no longer; or it is another task's.
            NoKeeper: in all this time nobody who keeps a journal was there, or answered.
            BrokerError: the same, and the broker is away, or full.
            ConfigurationError: the journal is off.
        """
        connection = await self._office.connect_journal()
        if connection.journal is not None:
            await connection.journal.flush()
        job = await self._known(_seconds(timeout))
        if job is None:
            raise _unknown(self.id)
        return job

    async def _jobs(self, seconds: float, answer_seconds: float = ANSWER_SECONDS) -> list[Job]:
        """What the journal knows of it; while nobody answers, it is asked again and again.

        Parameters:
            answer_seconds: for one answer; at the end of seconds it is less.

        Raises:
            NoKeeper: in all this time nobody who keeps a journal was there, or answered.
            BrokerError: the same, and the broker is away, or full.
        """
        asker = (await self._office.connect_journal()).asker
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            patience = min(answer_seconds, max(LOOK_SECONDS, deadline - loop.time()))
            try:
                return await asker.jobs(JobFilter(ids=(self.id,)), limit=MOST_AT_ONCE, timeout_seconds=patience)
            except (NoKeeper, BrokerError) as error:
                if deadline <= loop.time() or not may_pass(error):
                    raise
            await asyncio.sleep(min(OUTAGE_SECONDS, max(0.0, deadline - loop.time())))

    async def _known(self, seconds: float, answer_seconds: float = ANSWER_SECONDS) -> Job | None:
        found = await self._jobs(seconds, answer_seconds)
        if found:
            return self._own(found[0])
        if self.message is None:
            return None
        sent = self.message
        return Job(id=sent.id, topic=sent.topic, created=sent.created, due=sent.due, correlation_id=sent.correlation_id)

    def result_in(self, job: Job) -> Any:
        """What this job, which has ended, returned.

        Raises:
            JobError: it has no result, or is another task's; says why.
            PayloadError: the result is not of the type that the task here says.
        """
        return result_of(self._own(job), self._office.result_type(job))

    def _own(self, job: Job) -> Job:
        if self._topic not in (None, job.topic):
            raise JobUnknown(
                f"job {self.id} is one of {job.topic}, not of {self._topic}: ask that task for its ticket, or the application",
                self.id,
            )
        return job

    async def cancel(self) -> None:
        """Have it not handled any more, as soon as a worker hears or comes to it; what has ended stays as it is.

        Where it runs it is stopped: an async handler gets a CancelledError, so does a thread at its next Python instruction,
        and a process of the pool (cpu=True) is killed. Nothing that the attempt would have published is. Cancelling is a wish:
        a handler may be done before it is heard.

        Raises:
            BrokerError: nobody could be told.
            JobUnknown: another program sent it, and the journal does not know it; or it is another task's.
            NoKeeper: another program sent it, and nobody keeps a journal.
            ConfigurationError: the journal is off.
        """
        connection = await self._office.connect_journal()
        assert connection.journal is not None
        await connection.journal.flush()
        try:
            # What was sent here can be cancelled also where nobody can say how it is, and is not to run on until somebody can.
            jobs = await (self._jobs(STATUS_SECONDS) if self.message is None else self._jobs(0.0, SOON_SECONDS))
        except (NoKeeper, BrokerError):
            if self.message is None:
                raise
            jobs = []
        for job in jobs:
            self._own(job)
        # A wish that nothing meets would be met by the message that is redriven later.
        if jobs and all(job.status.ended for job in jobs):
            return
        about = jobs[0] if self.message is None and jobs else self.message
        if about is None:
            raise _unknown(self.id)
        at = connection.journal.clock()
        # The order first: what the keeper then has to say about it (it has ended, say) has to come behind it.
        await cancel(connection.broker, {self.id: at})
        connection.journal.cancelling(self.id, about.topic, about.correlation_id, at=at)
        await connection.journal.flush()

    def result_sync(self, timeout: Seconds | None = None) -> T:
        """result() for code without an event loop."""
        return self._office.wait_here(self.result(timeout), "result_sync", "ticket.result(…)")

    def status_sync(self, timeout: Seconds = STATUS_SECONDS) -> Job:
        """status() for code without an event loop."""
        return self._office.wait_here(self.status(timeout), "status_sync", "ticket.status()")

    def cancel_sync(self) -> None:
        """cancel() for code without an event loop."""
        self._office.wait_here(self.cancel(), "cancel_sync", "ticket.cancel()")


async def gather(
    office: Office,
    tickets: Sequence[Ticket[T]],
    *,
    timeout: Seconds | None,
    on_progress: Callable[[int, int], object] | None,
    return_errors: bool,
) -> list[Any]:
    """See Conveyor.gather."""
    seconds = _seconds(timeout)
    if (
        other := next((each for each in cast("Sequence[object]", tickets) if not isinstance(each, Ticket)), None)
    ) is not None:
        raise TypeError(f"gather() takes tickets, not {other!r}: app.ticket(…) makes one of an id")
    asker = (await office.connect_journal()).asker
    by_id = {ticket.id: ticket for ticket in tickets}
    ids = list(by_id)
    found: dict[str, Any] = {}
    if on_progress is not None:
        on_progress(0, len(ids))

    async def collect(some: Sequence[str]) -> None:
        async for job in _ends(asker, some, seconds):
            try:
                found[job.id] = by_id[job.id].result_in(job)
            except (JobError, PayloadError) as error:
                if not return_errors:
                    raise
                found[job.id] = error
            if on_progress is not None:
                on_progress(len(found), len(ids))

    parts = [ids[first : first + MOST_AT_ONCE] for first in range(0, len(ids), MOST_AT_ONCE)]
    tasks = [asyncio.create_task(collect(part), name="gather jobs") for part in parts]
    try:
        await asyncio.gather(*tasks)  # no task group: its errors come in groups
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    late = [id for id in ids if id not in found]
    if late and not return_errors:
        text = f"{counted(len(late), 'job has', 'jobs have')} not ended after {seconds:g} s, such as {late[0]}"
        raise JobTimeout(text, late[0], status="")
    found |= {id: JobTimeout(f"job {id} has not ended after {seconds:g} s", id, status="") for id in late}
    return [found[ticket.id] for ticket in tickets]


async def _ends(asker: Asker, ids: Sequence[str], seconds: float) -> AsyncIterator[Job]:
    """The jobs as they end, each once, until all have or the time is over.

    Raises:
        NoKeeper: in all this time nobody who keeps a journal was there, or answered.
        BrokerError: the same, and the broker is away, or full.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    waiting = set(ids)
    heard = warned = False
    while waiting:
        left = max(0.0, deadline - loop.time())
        pause = GATHER_SECONDS
        try:
            known = await asker.wait(waiting, timeout_seconds=min(left, PATIENCE_SECONDS))
        except (NoKeeper, BrokerError) as error:
            if not may_pass(error) or (deadline <= loop.time() and not heard):
                raise
            if not warned:
                log.warning("waiting on for the end of a job: %s", error)
            warned, known = True, {}
            pause = OUTAGE_SECONDS
        else:
            heard = True
        ended = [job for job in known.values() if job.status.ended and job.id in waiting]
        for job in ended:
            waiting.discard(job.id)
            yield job
        if not ended and deadline <= loop.time():
            return
        if waiting:
            await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))


def may_pass(error: NoKeeper | BrokerError) -> bool:
    """Whether asking the journal again may help: nobody answers it now, or the broker is out of order, or full."""
    return isinstance(error, NoKeeper) or is_outage(error)


def result_of(job: Job, returns: Any) -> Any:
    """What a job that has ended returned.

    Parameters:
        returns: the type of it.

    Raises:
        JobError: it has no result; says why.
        PayloadError: the result is not of this type.
    """
    if job.status is Status.CANCELLED:
        why = f"; last error: {job.error}" if job.error else ""
        raise JobCancelled(f"job {job.id} of {job.worker or job.topic} was cancelled{why}", job.id)
    if job.status is not Status.DONE:
        raise JobFailed(
            f"job {job.id} of {job.worker} was given up after {counted(job.attempts, 'attempt')} ({job.reason}): {job.error}",
            job.id,
            error=job.error,
            traceback=job.traceback,
            attempts=job.attempts,
        ) from (RemoteTraceback(job.traceback) if job.traceback else None)
    if returns is type(None):
        return None
    if job.unkept:
        raise ResultNotKept(f"job {job.id} of {job.worker} is done, but {job.unkept}", job.id)
    if job.result is None:
        return None
    try:
        return result_codec_for(returns).decode(job.result.encode())
    except HandlerError as error:
        raise PayloadError(f"the result of job {job.id} cannot be read here: {error}") from error
    except Exception as error:  # whatever a user's type raises
        raise PayloadError(
            f"the result of job {job.id} is not what {job.worker} says here that it returns: {explain(error)}"
        ) from None


def _unknown(id: str) -> JobUnknown:
    return JobUnknown(
        f"the journal knows no job {id}: there is none, it is too long ago, or its news has not come yet", id
    )


def in_words(job: Job | None) -> str:
    """What is known about a job that has not ended, as a sentence."""
    if job is None:
        return "the journal knows nothing about it"
    told = {
        Status.WAITING: f"it waits in {job.queue or 'its queue'}",
        Status.RETRYING: f"{counted(job.attempts, 'attempt')} failed, and it waits for the next one",
        Status.RUNNING: f"attempt {job.attempts} runs in {job.process}",
    }.get(job.status, f"it is {job.status}")
    if job.status is Status.RUNNING and job.done is not None:
        told += f": {far(job.done, job.total, job.note)}"
    return told + (f"; last error: {job.error}" if job.error else "")


def _seconds(timeout: Seconds | None) -> float:
    """How long to wait.

    Raises:
        ValueError: that is no time.
    """
    if timeout is None:
        return math.inf
    try:
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    except (TypeError, ValueError):
        seconds = math.nan
    if not seconds >= 0.0:
        raise ValueError(f"timeout={timeout!r} is no time to wait: it is 0 or more seconds, or a timedelta")
    return seconds
