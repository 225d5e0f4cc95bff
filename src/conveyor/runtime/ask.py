"""Questions about the journal, asked over the broker: whichever keepers there are answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import AsyncIterator, Collection, Iterable
from typing import Final

import msgspec

from conveyor.broker import Broker, Clock
from conveyor.core.journal import Job, JobFilter, in_order
from conveyor.core.message import Message, uuid7
from conveyor.core.questions import Answer, EndOf, JobsOf, JourneyOf, Question, Request
from conveyor.errors import BrokerUnavailable, NoKeeper, PublishFailed
from conveyor.runtime.journal import ASK, MSGPACK
from conveyor.runtime.loop import Loops
from conveyor.runtime.mailbox import Mailbox

log = logging.getLogger("conveyor.ask")

ANSWERS: Final = "conveyor.journal.answers"
"""Begins the names of the queues that answers come to."""
ANSWER_SECONDS: Final = 5.0
"""How long a keeper may take to answer what it need not wait for."""
LOOK_SECONDS: Final = 2.0
"""How long at least, however little time there is: to look takes a moment, too."""
OTHERS_SECONDS: Final = 0.2
"""How much longer than the first one other keepers may take: each application has its own, and a journey may lead through several."""
ASK_AGAIN_SECONDS: Final = 5.0
"""Who waits asks again so often: a keeper may have died, or come."""
NOBODY_SECONDS: Final = 0.25
"""The same where there was no keeper at all."""
MOST_IDS: Final = 1_000
"""Ids in one question."""
ANY: Final = JobFilter()
NOBODY_KEEPS: Final = (
    "nobody keeps a journal on this broker now; conveyor run does where the journal is on (Conveyor(…, journal=True), or"
    " CONVEYOR_JOURNAL=1), and so does conveyor journal APP"
)
NOBODY_ANSWERED: Final = "no keeper of the journal answered in time; see what the processes log about the journal"

_encode: Final = msgspec.msgpack.Encoder().encode


class Asker:
    """Asks the keepers of the journal; answers come to a temporary queue of its own.

    Parameters:
        broker: open.
        clock: gives Unix seconds.
    """

    def __init__(self, broker: Broker, clock: Clock) -> None:
        self._broker = broker
        self._clock = clock
        name = f"{ANSWERS}.{uuid.uuid4().hex[:12]}"
        # It has a topic: not every broker can reach a queue by its name that somebody else has declared.
        self._mailbox = Mailbox(broker, name, (name,), msgspec.msgpack.Decoder(Answer).decode)
        self._asked: dict[str, asyncio.Queue[Answer]] = {}
        self._opening = asyncio.Lock()
        self._is_open = False
        self._loops = Loops()

    async def journey(self, id: str, *, timeout_seconds: float = ANSWER_SECONDS) -> Answer:
        """Everything that is known about a message and all that belongs to its journey.

        Parameters:
            id: a message's or a journey's, or the beginning of one.

        Raises:
            NoKeeper: nobody keeps a journal here, or nobody answers in time.
        """
        return await self.ask(JourneyOf(id), timeout_seconds=timeout_seconds)

    async def jobs(
        self, which: JobFilter = ANY, *, limit: int = 100, timeout_seconds: float = ANSWER_SECONDS
    ) -> list[Job]:
        """Jobs, the newest first, without their results.

        Raises:
            NoKeeper: nobody keeps a journal here, or nobody answers in time.
        """
        return list((await self.ask(JobsOf(which, limit), timeout_seconds=timeout_seconds)).jobs)

    async def ask(self, request: JourneyOf | JobsOf, *, timeout_seconds: float = ANSWER_SECONDS) -> Answer:
        """What all keepers together know.

        Raises:
            NoKeeper: nobody keeps a journal here, or nobody answers in time.
        """
        return together(await self._all(request, timeout_seconds), request)

    async def wait(self, ids: Collection[str], *, timeout_seconds: float) -> dict[str, Job]:
        """Wait until at least one of these jobs has ended, and give all that is known about any of them (with results) by id.

        A keeper that dies meanwhile, or comes later, makes no difference. What nothing is known about is missing; of more than
        a thousand, only some are looked at.

        Returns:
            As they are when the first has ended, or after timeout_seconds.

        Raises:
            NoKeeper: in all this time nobody who keeps a journal was there, or answered.
        """
        wanted = tuple(ids)[:MOST_IDS]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        known: dict[str, Job] = {}
        heard, nobody = False, NOBODY_ANSWERED
        while True:
            left = max(0.0, deadline - loop.time())
            patience, longer = min(left, ASK_AGAIN_SECONDS), OTHERS_SECONDS
            if patience == left and not heard:  # before the end it is worth while to hear at least once how things are
                patience = left / 2
                longer = max(LOOK_SECONDS, left) - patience
            try:
                async with self._question(EndOf(wanted, patience), patience + longer) as answers:
                    async for answer in answers:
                        heard = heard or not answer.problem
                        answers.hurry((patience if answer.problem else 0.0) + OTHERS_SECONDS)
                        jobs = _newest([*known.values(), *answer.jobs])
                        # Several workers may have one message: what has ended is what was waited for.
                        known = {job.id: job for job in sorted(jobs, key=lambda job: job.status.ended)}
                        if any(job.status.ended for job in known.values()):
                            return known
            except NoKeeper as error:
                nobody = str(error)
                await asyncio.sleep(min(left, NOBODY_SECONDS))
            if deadline <= loop.time():
                if not heard:
                    raise NoKeeper(nobody)
                return known

    async def close(self) -> None:
        """Ask no more."""
        await self._loops.stop()
        if self._is_open:
            await self._mailbox.remove()
            self._is_open = False

    async def _all(self, request: Request, timeout_seconds: float) -> list[Answer]:
        """What the keepers answer: the first within a time, the others soon behind it."""
        found: list[Answer] = []
        async with self._question(request, timeout_seconds) as answers:
            async for answer in answers:
                found.append(answer)
                answers.hurry(OTHERS_SECONDS)
        if not found:
            raise NoKeeper(NOBODY_ANSWERED)
        return found

    @contextlib.asynccontextmanager
    async def _question(self, request: Request, timeout_seconds: float) -> AsyncIterator[_Answers]:
        """Ask; gives the answers as they come, until the time is over.

        Raises:
            NoKeeper: nobody hears it.
            BrokerUnavailable: it cannot be asked.
        """
        until = asyncio.get_running_loop().time() + timeout_seconds
        now = self._clock()
        id = uuid7(now, os.urandom(10))
        message = Message(
            id, ASK, _encode(Question(id, self._mailbox.name, request)), content_type=MSGPACK, created=now
        )
        arriving: asyncio.Queue[Answer] = asyncio.Queue()
        self._asked[id] = arriving
        try:
            try:
                async with asyncio.timeout_at(until):
                    await self._open()
                    nobody = await self._broker.publish((message,))
            except TimeoutError:
                raise BrokerUnavailable(f"the broker took no question within {timeout_seconds:g} s") from None
            except PublishFailed as error:
                why = next(iter((*error.refused.values(), *error.unknown.values())))
                raise BrokerUnavailable(f"the question may not have been asked: {why}") from error
            if nobody:
                raise NoKeeper(NOBODY_KEEPS)
            yield _Answers(arriving, until)
        finally:
            del self._asked[id]

    async def _open(self) -> None:
        async with self._opening:
            if not self._is_open:
                await self._mailbox.declare()
                self._loops.start("answers", self._hear)
                self._is_open = True

    async def _hear(self) -> None:
        async with self._mailbox.receiving() as take:
            while True:
                for answer in await take():
                    if answer.to in self._asked:
                        self._asked[answer.to].put_nowait(answer)


class _Answers:
    """The answers to a question, as they come."""

    def __init__(self, arriving: asyncio.Queue[Answer], until: float) -> None:
        self._arriving = arriving
        self._until = until

    def hurry(self, seconds: float) -> None:
        """Wait no longer than that from now on."""
        self._until = min(self._until, asyncio.get_running_loop().time() + seconds)

    async def __aiter__(self) -> AsyncIterator[Answer]:
        while True:
            try:
                async with asyncio.timeout_at(self._until):
                    answer = await self._arriving.get()
            except TimeoutError:
                return
            yield answer


def together(answers: Collection[Answer], request: Request) -> Answer:
    """What several keepers know: each knows what its own application's processes did.

    Raises:
        NoKeeper: all of them have problems.
    """
    good = [answer for answer in answers if not answer.problem]
    if answers and not good:
        raise NoKeeper(next(iter(answers)).problem)
    entries = in_order(entry for answer in good for entry in answer.entries)
    jobs = _newest(job for answer in good for job in answer.jobs)
    limit = request.limit if isinstance(request, JobsOf) else len(jobs)
    return Answer(
        "",
        entries=tuple(entries),
        jobs=tuple(jobs[:limit]),
        others=() if entries else tuple(dict.fromkeys(other for answer in good for other in answer.others)),
        more=len(jobs) > limit or any(answer.more for answer in good),
        behind=next((answer.behind for answer in good if answer.behind), ""),
    )


def _newest(found: Iterable[Job]) -> list[Job]:
    """Each job once, as whoever knows most about it tells it, the newest first."""
    jobs: dict[tuple[str, str], Job] = {}
    for job in found:
        before = jobs.get((job.id, job.worker))
        if before is None or _knows_more(job, before):
            jobs[job.id, job.worker] = job
    had = {id for id, worker in jobs if worker}
    return sorted(
        # An application that only published it knows of no worker.
        (job for job in jobs.values() if job.worker or job.id not in had),
        key=lambda job: -(job.ended or job.started or job.created or 0.0),
    )


def _knows_more(job: Job, before: Job) -> bool:
    return (job.status.ended, job.attempts, job.started or 0.0) > (
        before.status.ended,
        before.attempts,
        before.started or 0.0,
    )
