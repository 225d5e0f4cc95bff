"""Questions about the journal, asked over the broker: whichever keepers there are answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import AsyncIterator, Collection, Iterable
from math import inf
from typing import Final

import msgspec

from conveyor.broker import Broker, Clock
from conveyor.core.jobs import Job, JobFilter
from conveyor.core.journal import in_order
from conveyor.core.message import Message, uuid7
from conveyor.core.questions import Answer, EndOf, JobsOf, JourneyOf, Question, Request
from conveyor.errors import BrokerError, BrokerUnavailable, NoKeeper, PublishFailed
from conveyor.runtime.journal import ASK, MSGPACK, journal_queues, keeper_topic
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
"""When what was asked for is known: how much longer other keepers may take, which may know of it, too."""
LISTED_SECONDS: Final = 10.0
"""How long it is believed which applications have a journal on the broker: to list queues may mean to count what is in them."""
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


def silence_of(apps: Iterable[str]) -> str:
    """What it means that of these applications nobody answered."""
    return f"nobody who keeps the journal of {' or '.join(apps)} answered: what is only known there is not in this"


class Asker:
    """Asks the keepers of the journal; answers come to a temporary queue of its own.

    Parameters:
        broker: open.
        clock: gives Unix seconds.
        app: the application that asks: where its own keeper is silent, nothing that is not known elsewhere counts as unknown;
            None where nobody's journal is more important than the others'.
    """

    def __init__(self, broker: Broker, clock: Clock, app: str | None = None) -> None:
        self._broker = broker
        self._clock = clock
        self._app = app
        self._apps: set[str] = set() if app is None else {app}
        """The applications that keep, or kept, a journal on the broker, as far as is known."""
        self._refused: set[str] = set()
        """Those of them at whose keepers we may not knock."""
        self._listed_at = -inf
        self._behind: set[str] = set()
        """The applications whose keepers know nothing new, as was said."""
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
        """What all keepers together know, and who of them is silent.

        Raises:
            NoKeeper: nobody keeps a journal here, or nobody answers in time; or the keeper is silent that would know.
        """
        found: list[Answer] = []
        wanted = frozenset(request.which.ids or ()) if isinstance(request, JobsOf) else frozenset[str]()
        async with self._question(request, timeout_seconds) as answers:
            awaited = await self._knock(answers)
            async for answer in answers:
                found.append(answer)
                if wanted:  # somebody asks for the ends of jobs, which may not be known
                    self._warn_of(answer)
                if wanted and wanted <= _ended(found):
                    break
                if awaited <= {each.app for each in found} or (wanted and wanted <= _told(found)):
                    answers.hurry(OTHERS_SECONDS)
        if not found:
            raise NoKeeper(NOBODY_ANSWERED)
        answer = together(found, request)
        silent = self._apps - {each.app for each in found if not each.problem}
        if would_know := self._would_know(answer, wanted - _told(found), silent, awaited):
            problem = next((each.problem for each in found if each.app in would_know), "")
            raise NoKeeper(problem or silence_of(sorted(would_know)))
        return msgspec.structs.replace(answer, silent=tuple(sorted(silent)))

    def _would_know(
        self, answer: Answer, untold: frozenset[str], silent: set[str], awaited: frozenset[str]
    ) -> set[str]:
        """Those of the silent applications that would know of a job, or of a journey, what nobody else can say."""
        if self._app is None:  # whoever looks from outside is told who was silent
            return set()
        own = silent & {self._app}
        if untold:
            # A task's topic begins with its application's name.
            topics = [job.topic for job in answer.jobs if job.id in untold]
            theirs = {app for app in silent for topic in topics if topic.startswith(f"{app}.")}
            return own | theirs | (silent & awaited if len(topics) < len(untold) else set())
        return own if not (answer.jobs or answer.entries) else set()

    async def wait(self, ids: Collection[str], *, timeout_seconds: float) -> dict[str, Job]:
        """Wait until at least one of these jobs has ended, and give all that is known about any of them (with results) by id.

        A keeper that dies meanwhile, or comes later, makes no difference. What nothing is known about is missing; of more than
        a thousand, only some are looked at.

        Returns:
            As they are when the first has ended, or after timeout_seconds.

        Raises:
            NoKeeper: in all this time nobody who keeps a journal was there, or answered; or some of the jobs are not known, and
                this application's own keeper did not.
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
                        self._warn_of(answer)
                        heard = heard or (not answer.problem and self._app in (None, answer.app))
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
                if not heard and not {id for id, job in known.items() if job.worker} >= set(wanted):
                    raise NoKeeper(nobody)
                return known

    def _warn_of(self, answer: Answer) -> None:
        """Log once that a keeper is behind: what it tells of a job, it would tell for as long as that lasts."""
        if not answer.behind:
            self._behind.discard(answer.app)
        elif answer.app not in self._behind:
            self._behind.add(answer.app)
            log.warning("jobs may have ended without the journal knowing: %s", answer.behind)

    async def close(self) -> None:
        """Ask no more."""
        await self._loops.stop()
        if self._is_open:
            await self._mailbox.remove()
            self._is_open = False

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
        body = _encode(Question(id, self._mailbox.name, request))
        message = Message(id, ASK, body, content_type=MSGPACK, created=now)
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

    async def _knock(self, answers: _Answers) -> frozenset[str]:
        """The applications whose keepers are there, as far as can be found out soon; their answers are waited for."""
        loop = asyncio.get_running_loop()
        # A broker that cannot say it now, or not to us, is no reason to have no answer.
        with contextlib.suppress(BrokerError, TimeoutError):
            async with asyncio.timeout_at(min(answers.until, loop.time() + LOOK_SECONDS)):
                if self._listed_at + LISTED_SECONDS <= loop.time():
                    self._listed_at = loop.time()
                    own = set() if self._app is None else {self._app}
                    self._apps = own | set(await journal_queues(self._broker))
                now = self._clock()
                # What has no content is left out by who hears it; that nobody does is what it is to show.
                knocks = {uuid7(now, os.urandom(10)): app for app in self._apps - self._refused}
                empty = [
                    Message(id, keeper_topic(app), b"", content_type=MSGPACK, created=now) for id, app in knocks.items()
                ]
                try:
                    unheard = await self._broker.publish(empty)
                except PublishFailed as error:
                    self._refused.update(knocks[id] for id in error.refused)
                    unheard = frozenset((*error.refused, *error.unknown))
                return frozenset(app for id, app in knocks.items() if id not in unheard)
        return frozenset()

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
    """The answers to a question, as they come, until a time of the event loop."""

    def __init__(self, arriving: asyncio.Queue[Answer], until: float) -> None:
        self.until = until
        self._arriving = arriving

    def hurry(self, seconds: float) -> None:
        """Wait no longer than that from now on."""
        self.until = min(self.until, asyncio.get_running_loop().time() + seconds)

    async def __aiter__(self) -> AsyncIterator[Answer]:
        while True:
            try:
                async with asyncio.timeout_at(self.until):
                    answer = await self._arriving.get()
            except TimeoutError:
                return
            yield answer


def _ended(found: Iterable[Answer]) -> set[str]:
    """The jobs that are known to have ended: nobody can know more."""
    return {job.id for answer in found for job in answer.jobs if job.status.ended}


def _told(found: Iterable[Answer]) -> set[str]:
    """The jobs of which somebody tells who can: a worker had it, or it waits, and the keeper of its own application says so."""
    return {
        job.id
        for answer in found
        for job in answer.jobs
        if job.worker or (answer.app and job.topic.startswith(f"{answer.app}."))
    }


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
