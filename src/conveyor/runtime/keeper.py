"""The keeper: takes an application's journal in, keeps it in the archive, and answers questions about it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, Final, ParamSpec, Self, TypeVar

import msgspec

from conveyor.broker import Broker, Clock, Delivery, Settlement
from conveyor.core.jobs import Job, JobFilter, is_for_one, jobs_of, wish_of
from conveyor.core.journal import ENDS, Entry, Kind, Told, each_of
from conveyor.core.message import Message, uuid7
from conveyor.core.questions import Answer, EndOf, JobsOf, JourneyOf, Question, fit
from conveyor.core.settle import DONE, describe
from conveyor.core.wishes import MOST, forget_oldest, latest
from conveyor.errors import BrokerError, BrokerUnavailable, JournalError
from conveyor.runtime.archive import Archive
from conveyor.runtime.batches import told_by
from conveyor.runtime.control import Cancel, Control, Order, Over, tell
from conveyor.runtime.health import Health
from conveyor.runtime.journal import ASK, IN_MEMORY, MSGPACK, journal_queue, keeper_topic
from conveyor.runtime.loop import Loops
from conveyor.runtime.mailbox import Mailbox

log = logging.getLogger("conveyor.keeper")

P = ParamSpec("P")
R = TypeVar("R")

FETCH: Final = 32
"""Batches, or questions, taken from the broker at once."""
ORDERS: Final = 1_000
"""Orders that wait for a broker that is slow at most; beyond, the oldest are dropped: runners that start ask."""
MAY_END: Final = ENDS | {Kind.CANCELLING}
"""What those who wait for an end are told of: who cancels what does not run, ends it."""
SPOILT_DELIVERIES: Final = 5
"""A batch that was handed over so often has ended its keepers; it is dropped."""
AGAIN_SECONDS: Final = 2.0
"""Between two tries to write to an archive that cannot be written."""
LINGER_SECONDS: Final = 0.25
"""While nobody waits for an end, what comes in so long is taken together: each commit costs the queue's file, and its users, something."""
TIDY_SECONDS: Final = 10.0
"""Between two looks at what is too old, or too much."""
LISTINGS: Final = 100
"""Questions that may take long and wait for each other at most."""
MOST_WAITS: Final = 10_000
"""Ids that are waited for at most, over all questions."""
INTAKE_SECONDS: Final = 3.0
"""A keeper that starts takes in so long what waits in its queue before it tells runners what is cancelled."""
DRAIN_SECONDS: Final = 3.0
"""How long the keeper takes in what is still in its queue when it is asked to end."""
RESULTS_AT_ONCE: Final = 50
"""Jobs whose results are read at once, until an answer is full."""
LONGEST_WAIT_SECONDS: Final = 60.0
"""A question that waits is answered by then at the latest; whoever wants to wait longer asks again."""

_encode: Final = msgspec.msgpack.Encoder().encode


def _by_worker(over: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    """As an Over has it."""
    found: dict[str, dict[str, float]] = {}
    for (worker, id), at in over.items():
        found.setdefault(worker, {})[id] = at
    return found


class _Desk:
    """An archive, and the thread that does what is asked of it, one after the other."""

    def __init__(self, archive: Archive, name: str) -> None:
        self._archive = archive
        self._thread = ThreadPoolExecutor(1, name)

    async def do(self, work: Callable[Concatenate[Archive, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Have a method of the archive called; its result."""
        call = functools.partial(work, self._archive, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def close(self) -> None:
        """Close the archive, and end the thread."""
        self._thread.submit(self._archive.close).result()
        self._thread.shutdown()


class _Wait:
    """A question that waits for an end."""

    def __init__(self, question: Question, ids: Iterable[str]) -> None:
        self.question = question
        self.ids = frozenset(ids)
        self.timer: asyncio.TimerHandle | None = None
        self.is_over = False
        """It is answered, or nobody will."""


class Keeper:
    """Keeps the journal of one application, while its block (``async with``) lasts.

    Parameters:
        app: whose.
        broker: open.
        archive: where it is kept; opened and closed here.
        clock: gives Unix seconds.
    """

    def __init__(self, app: str, broker: Broker, archive: Archive, clock: Clock) -> None:
        self.archive: Final = archive
        self.problem: str | None = None
        """Why nothing can be kept now, in words."""
        self._app = app
        self._broker = broker
        self._clock = clock
        self._queue = journal_queue(app)
        name = f"{ASK}.{app}.{uuid.uuid4().hex[:12]}"
        self._mailbox = Mailbox(broker, name, (ASK, keeper_topic(app)), msgspec.msgpack.Decoder(Question).decode)
        self._writer = self._reader = self._lister = _Desk(archive, "conveyor archive")
        if (
            archive.path != IN_MEMORY
        ):  # a question may take long, and must hold up no entry; nor a listing anybody who waits for a job
            self._reader = _Desk(Archive(archive.path, clock=clock), "conveyor archive reader")
            self._lister = _Desk(Archive(archive.path, clock=clock), "conveyor archive lister")
        self._listings: asyncio.Queue[tuple[Question, JourneyOf | JobsOf]] = asyncio.Queue(LISTINGS)
        self._waits: dict[str, set[_Wait]] = {}
        self._cancelled: dict[str, float] = {}
        """The ids of messages that are cancelled and have not ended → when somebody wished it: whichever runner starts is told of them."""
        self._over: dict[tuple[str, str], float] = {}
        """Worker and message → up to when wishes mean nothing any more, because it was given up."""
        self._control = Control(broker, app)
        self._control.wishes = lambda: (dict(self._cancelled), _by_worker(self._over))
        self._ended: set[str] = set()
        """Messages that may have ended, and are waited for: whoever does is still to be answered."""
        self._orders: deque[Order] = deque(maxlen=ORDERS)
        """For runners, still to be sent."""
        self._news = asyncio.Event()
        """Set while one of these is not empty."""
        self._loops = Loops()

    async def __aenter__(self) -> Self:
        try:
            await self._writer.do(Archive.open)
            for desk in (self._reader, self._lister):
                if desk is not self._writer:
                    await desk.do(Archive.open, create=False)
            wishes = await self._writer.do(Archive.cancelled, MOST)
            self._cancelled = {id: wishes[id].at for id in reversed(wishes)}
            self._over = {(worker, id): wish.at for id, wish in wishes.items() for worker in wish.over}
            await self._broker.declare([self._queue])
            await self._mailbox.declare()
            # First what waits: cancellations may be in it, and a runner that starts asks for them once.
            self._loops.start("journal", self._take)
            self._loops.start("tell", self._tell)
            await self._until_drained(INTAKE_SECONDS)
            await self._control.start()
            self._order(Over(_by_worker(self._over)))
            self._order(Cancel(dict(self._cancelled)))
        except BaseException:
            await self._loops.stop()
            await self._control.close()
            self._close()
            raise
        self._loops.start("questions", self._hear)
        self._loops.start("listings", self._answer_listings)
        self._loops.start("tidy", self._tidy)
        log.info("the journal of %s is kept in %s", self._app, self.archive.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._until_drained(DRAIN_SECONDS)
        await self._loops.stop()
        await self._control.close()
        for wait in {wait for waits in self._waits.values() for wait in waits}:
            self._end(wait)
        await self._mailbox.remove()
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def health(self) -> Health:
        """How it is."""
        unready = [] if self.problem is None else [f"journal: {self.problem}"]
        unready += [f"{name}: {problem}" for name, problem in self._loops.problems.items()]
        return Health(unready=tuple(unready))

    def _close(self) -> None:
        for desk in dict.fromkeys((self._lister, self._reader, self._writer)):
            desk.close()

    async def _until_drained(self, seconds: float) -> None:
        """Wait until nothing is left in the queue, and all is told, or nothing can be kept; no longer than that."""
        with contextlib.suppress(TimeoutError, BrokerError):
            async with asyncio.timeout(seconds):
                while self.problem is None:
                    infos = await self._broker.queues()
                    left = next((info for info in infos if info.name == self._queue.name), None)
                    if (left is None or not left.ready + left.in_flight) and not self._news.is_set():
                        return
                    await asyncio.sleep(0.05)

    # --- keeping ------------------------------------------------------------------------------------------------------

    async def _take(self) -> None:
        """Take batches in, for ever: each is settled when it is kept."""
        await self._broker.declare([self._queue])
        subscription = await self._broker.subscribe(self._queue.name, FETCH)
        try:
            while True:
                deliveries = await subscription.fetch(FETCH)
                batches = [(delivery.message.id, self._told(delivery)) for delivery in deliveries]
                await self._keep(batches, deliveries)
                told = [each for _, batch in batches for each in batch]
                await self._heed_cancellations(told)
                if self._waits:
                    self._note_ends(each_of(told))
                await self._broker.settle([Settlement(delivery, DONE) for delivery in deliveries])
                if not self._waits and len(deliveries) < FETCH:  # else there is more, and it is taken together anyway
                    await asyncio.sleep(LINGER_SECONDS)
        finally:
            await subscription.close()

    def _told(self, delivery: Delivery) -> list[Told]:
        """What is in a batch, without what cannot be read; nothing where it ends whoever reads it."""
        try:
            if delivery.deliveries > SPOILT_DELIVERIES:
                raise ValueError(f"handed over {delivery.deliveries} times")
            return told_by(delivery.message.body)
        except Exception as error:  # whatever somebody has put there, the other batches are kept
            log.error("a batch of the journal is dropped, it makes no sense: %s", describe(error))
            return []

    async def _keep(self, batches: Sequence[tuple[str, Sequence[Told]]], deliveries: Sequence[Delivery]) -> None:
        """Write batches, however long it takes until that is possible."""
        while True:
            try:
                await self._writer.do(Archive.write, batches)
                await self._writer.do(Archive.prune, always=False)
            except JournalError as error:
                if self.problem is None:
                    log.error("%s", error)
                self.problem = str(error)
                await asyncio.sleep(AGAIN_SECONDS)
                await self._broker.extend(deliveries)
            else:
                if self.problem is not None:
                    log.info("the journal is kept again")
                self.problem = None
                return

    async def _heed_cancellations(self, told: Sequence[Told]) -> None:
        """Remember what is cancelled until it has ended; runners are told once more, also those that missed it the first time."""
        wishes = (each for each in told if isinstance(each, Entry) and each.kind is Kind.CANCELLING)
        wished = latest(*({wish.message_id: wish.at} for wish in wishes))
        if not wished and not self._cancelled:
            return
        over: dict[tuple[str, str], float] = {}
        for entry in each_of(told):
            if entry.kind in ENDS and (at := self._cancelled.get(entry.message_id)) is not None:
                if entry.kind is Kind.DEAD:
                    over[entry.worker, entry.message_id] = at
                if is_for_one(entry):  # an event may still be on its way to other workers
                    del self._cancelled[entry.message_id]
        if wished:
            for id, own in (await self._known(wished)).items():
                if (wish := wish_of(own)) is not None:
                    over.update({(worker, id): max(wish.at, wished[id]) for worker in wish.over})
                    if not wish.holds:  # it came too late
                        del wished[id]
            self._cancelled.update(wished)
            forget_oldest(self._cancelled)
            self._order(Cancel(wished))
        self._over.update(over)
        forget_oldest(self._over)
        self._order(Over(_by_worker(over)))

    async def _known(self, ids: Iterable[str]) -> dict[str, list[Entry]]:
        """The entries of those of these messages that are known; of none, where that cannot be read."""
        known: dict[str, list[Entry]] = {}
        with contextlib.suppress(JournalError):
            for entry in await self._writer.do(Archive.of, ids, results=False):
                known.setdefault(entry.message_id, []).append(entry)
        return known

    # --- telling ------------------------------------------------------------------------------------------------------

    def _order(self, order: Cancel | Over) -> None:
        """Have runners told, where there is anything to tell."""
        if order.ids if isinstance(order, Cancel) else order.of:
            self._orders.append(order)
            self._news.set()

    def _note_ends(self, entries: Iterable[Entry]) -> None:
        """Have those answered who wait for the end of one of these."""
        self._ended |= {entry.message_id for entry in entries if entry.kind in MAY_END} & self._waits.keys()
        if self._ended:
            self._news.set()

    async def _tell(self) -> None:
        """Tell runners, and those who wait, what has come in, for ever; a slow broker holds up no entry."""
        while True:
            await self._news.wait()
            while self._orders:
                order = self._orders.popleft()
                try:
                    await tell(self._broker, order)
                except BrokerUnavailable:
                    self._orders.appendleft(order)
                    raise
                except BrokerError as error:
                    log.warning("runners cannot be told what is cancelled: %s", describe(error))
            ended, self._ended = self._ended, set()
            for wait in {wait for id in ended & self._waits.keys() for wait in self._waits[id]}:
                with contextlib.suppress(JournalError):  # it cannot be read now; it is answered at its deadline
                    await self._answered(wait)
            if not self._orders and not self._ended:
                self._news.clear()

    async def _tidy(self) -> None:
        while True:
            with contextlib.suppress(JournalError):  # writing says the same
                while await self._writer.do(Archive.prune):
                    pass
            await asyncio.sleep(TIDY_SECONDS)

    # --- answering ----------------------------------------------------------------------------------------------------

    async def _hear(self) -> None:
        """Answer questions, for ever."""
        async with self._mailbox.receiving() as take:
            while True:
                for question in await take():
                    try:
                        await self._consider(question)
                    except JournalError as error:
                        await self._reply(question, Answer(question.id, problem=str(error)))

    async def _answer_listings(self) -> None:
        """Answer what may take long, one after the other, for ever: nobody who waits for an end waits behind it."""
        while True:
            question, request = await self._listings.get()
            try:
                answer = await self._lister.do(Archive.answer, question.id, request)
            except JournalError as error:
                answer = Answer(question.id, problem=str(error))
            await self._reply(question, answer)

    async def _consider(self, question: Question) -> None:
        match question.request:
            case JobsOf(JobFilter(ids=tuple())) as request:
                answer = await self._reader.do(Archive.answer, question.id, request)
                await self._reply(question, answer)
            case JourneyOf() | JobsOf() as request:
                try:
                    self._listings.put_nowait((question, request))
                except asyncio.QueueFull:
                    raise JournalError("the keeper of the journal is asked too much at once; ask again") from None
            case EndOf(ids, seconds):
                await self._wait(_Wait(question, ids[:MOST_WAITS]), min(seconds, LONGEST_WAIT_SECONDS))

    async def _wait(self, wait: _Wait, seconds: float) -> None:
        """Answer when one of them has ended, or after so many seconds."""
        room = max(0, MOST_WAITS - len(self._waits))
        for each in list(wait.ids)[:room]:
            self._waits.setdefault(each, set()).add(wait)  # before looking, so that no end falls between
        try:
            answered = await self._answered(wait, at_once=seconds <= 0)
        except JournalError:
            self._end(wait)
            raise
        if not answered:
            wait.timer = asyncio.get_running_loop().call_later(
                seconds, lambda: self._loops.start(f"answer {id(wait)}", functools.partial(self._late, wait))
            )

    async def _late(self, wait: _Wait) -> None:
        try:
            await self._answered(wait, at_once=True)
        except JournalError as error:
            self._end(wait)
            await self._reply(wait.question, Answer(wait.question.id, problem=str(error)))

    async def _answered(self, wait: _Wait, *, at_once: bool = False) -> bool:
        """Answer where one of them has ended, or at once; gives whether it is over.

        Raises:
            JournalError: it cannot be read.
        """
        jobs = jobs_of(await self._reader.do(Archive.of, wait.ids, results=False))
        if not at_once and not any(job.status.ended for job in jobs):
            return wait.is_over
        fitting, cut = await self._fitting(jobs)
        if wait.is_over:  # an end came in while its first look was under way
            return True
        self._end(wait)
        await self._reply(wait.question, Answer(wait.question.id, jobs=fitting, more=cut))
        return True

    async def _fitting(self, jobs: Sequence[Job]) -> tuple[tuple[Job, ...], bool]:
        """As many as an answer holds, with results, and whether that leaves some out."""
        # What has ended comes first: for the rest it can be asked again.
        ended = list(dict.fromkeys(job.id for job in jobs if job.status.ended))
        found: list[Job] = []
        for first in range(0, len(ended), RESULTS_AT_ONCE):
            found += jobs_of(await self._reader.do(Archive.of, ended[first : first + RESULTS_AT_ONCE]))
            fitting, cut = fit(found)
            if cut:
                return fitting, True
        loaded = frozenset(ended)
        return fit([*found, *(job for job in jobs if job.id not in loaded)])

    def _end(self, wait: _Wait) -> None:
        wait.is_over = True
        if wait.timer is not None:
            wait.timer.cancel()
        for id in wait.ids & self._waits.keys():
            self._waits[id].discard(wait)
            if not self._waits[id]:
                del self._waits[id]

    async def _reply(self, question: Question, answer: Answer) -> None:
        now = self._clock()
        body = _encode(msgspec.structs.replace(answer, behind=self.problem or "", app=self._app))
        message = Message(uuid7(now, os.urandom(10)), question.reply_to, body, content_type=MSGPACK, created=now)
        try:
            await self._broker.publish((message,))
        except BrokerError as error:  # whoever asked is gone, or will ask again
            log.debug("an answer reached nobody: %s", describe(error))
