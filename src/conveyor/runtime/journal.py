"""The journal of one process: notes what happens to messages, and ships the notes in batches to the keeper."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

from conveyor.broker import Broker, Clock, DeadLetter, Delivery, Feature, Queue
from conveyor.core.journal import NEVER_BEGUN, NOWHERE, Entry, Kind
from conveyor.core.message import Message, uuid7
from conveyor.core.settle import DONE, Dead, Done, Release, RetryAt, Verdict, describe
from conveyor.core.words import counted
from conveyor.errors import BrokerError, PublishFailed, is_outage
from conveyor.runtime.batches import Gathered, Row, packed, weight
from conveyor.runtime.loop import Loops
from conveyor.runtime.metrics import Metrics, process_name

log = logging.getLogger("conveyor.journal")

TOPIC: Final = "conveyor.journal"
"""Begins the names of the journal's queues and topics."""
ASK: Final = f"{TOPIC}.ask"
"""The topic of questions about it; every keeper hears it in a temporary queue of its own."""
MSGPACK: Final = "application/msgpack"
FLUSH_SECONDS: Final = 0.25
"""How long an entry waits for others to travel with; what a killed process had noted since then is lost."""
SOON_SECONDS: Final = 0.01
"""How long the end of a job waits: somebody may be waiting for its result."""
HURRIES: Final = 50
"""So often it is shipped so soon between two looks at whether anybody keeps it: while nobody does, batches use up the queue's length."""
CAPACITY: Final = 50_000
"""Entries that wait to be shipped at most; beyond, they are dropped and counted."""
CAPACITY_BYTES: Final = 16 * 1024 * 1024
"""Bytes of results and tracebacks among them at most."""
SHIPPED_AT_ONCE: Final = 8
"""Batches in one call of the broker at most: fewer commits, and no more memory than that."""
QUEUE_LENGTH: Final = 2_000
"""Batches that wait for a keeper at most; beyond, the broker drops the oldest."""
LONGEST_TRACEBACK: Final = 4_000
"""Characters of a traceback, from its end; the dead letter has more of it."""
LONGEST_NOTE: Final = 500
"""Characters of a progress' note."""
RUNNING_SECONDS: Final = 0.1
"""An attempt that runs for so long is noted while it runs; what ends sooner is noted by its end alone."""
NO_ROOM: Final = "the journal had no room for it"
"""Why a result is not kept while too many others wait to be shipped."""
IN_MEMORY: Final = ":memory:"
"""Instead of a file: the journal goes with its process."""
LAST_FLUSH_SECONDS: Final = 2.0
"""How long the last batches may take when everything else has ended."""


def keeper_topic(app: str) -> str:
    """What the keeper of an application hears, and nobody else: what is published under it goes nowhere while there is none."""
    return f"{ASK}.{app}"


def journal_queue(app: str) -> Queue:
    """Where the entries of an application's processes wait for its keeper."""
    name = f"{TOPIC}.{app}"
    return Queue(name=name, topics=(name,), max_length=QUEUE_LENGTH)


async def journal_queues(broker: Broker) -> dict[str, int]:
    """The names of the applications that keep, or kept, a journal on a broker → batches that wait for its keeper.

    Raises:
        BrokerError: the broker cannot say.
    """
    return {
        info.name.removeprefix(f"{TOPIC}."): info.ready + info.in_flight
        for info in await broker.queues()
        if info.name.startswith(f"{TOPIC}.") and not info.temporary
    }


async def journals_to_tell(broker: Broker) -> Collection[str]:
    """The applications whose journals are told of what an operator does; none where the broker cannot say: work does not depend on it."""
    try:
        return await journal_queues(broker)
    except BrokerError as error:
        log.debug("no journal is told of it: %s", describe(error))
        return ()


async def redrive(broker: Broker, letters: Sequence[DeadLetter], apps: Iterable[str], clock: Clock) -> int:
    """Put dead letters back into their queues, and tell the journals of these applications.

    Nothing says whose a queue is that has a name of its own: each journal knows what it knows of the message.

    Returns:
        How many there still were.

    Raises:
        BrokerError: they cannot be put back now.
    """
    at = clock()
    number = await broker.redrive(letters)
    if number == len(letters):  # else nobody knows which of them were there
        for app in apps:
            journal = Journal(app, broker, Metrics(process_name()), clock)
            journal.redriven(letters, at)
            await journal.close()
    return number


class Running(NamedTuple):
    """An attempt that runs now.

    Parameters:
        worker: its identity.
        begun: when, on the monotonic clock.
    """

    worker: str
    delivery: Delivery
    begun: float


class Journal:
    """Gathers entries and ships them; it never waits, never raises, and drops (and counts) what there is no room for.

    Parameters:
        app: whose keeper gets them.
        broker: open; the journal's queue is declared.
        metrics: counts what is dropped.
        clock: gives Unix seconds.
        number: of this process below its supervisor; None where there is none.
    """

    def __init__(self, app: str, broker: Broker, metrics: Metrics, clock: Clock, number: str | None = None) -> None:
        self.process: Final = process_name(number)
        self.at_work: list[Callable[[], Iterable[Running]]] = []
        """Each gives what runs now; runners add themselves."""
        self.clock: Final = clock
        self._queue = journal_queue(app)
        self._keeper = keeper_topic(app)
        self._broker = broker
        self._metrics = metrics
        self._entries: list[Entry | Row] = []
        self._successes = Gathered(self.process)
        self._noted = 0
        """How many of both."""
        self._bytes = 0
        self._progress: dict[tuple[str, str], Entry] = {}
        """The latest of each worker and message since the last flush."""
        self._told: frozenset[Any] = frozenset()
        """The receipts of what ran at the last flush: it is noted."""
        self._unsent: deque[tuple[int, Message]] = deque()
        """Batches under way, each with the number of its entries."""
        self._failures = 0
        self._zero = clock() - monotonic()
        """What the clock said when the monotonic one was at zero."""
        self._soon = asyncio.Event()
        self._shipping = asyncio.Lock()
        self._loops = Loops()

    # --- noting -------------------------------------------------------------------------------------------------------

    def note(self, entry: Entry, *, soon: bool = False) -> None:
        """Take an entry in.

        Parameters:
            soon: somebody may be waiting for it: ship it at once.
        """
        if not self._has_room():
            return
        if entry.result is not None or entry.traceback:
            size = weight(entry)
            if self._bytes + size <= CAPACITY_BYTES:
                self._bytes += size
            else:  # what happened is told all the same: somebody may wait for the end
                unkept = entry.unkept if entry.result is None else NO_ROOM
                entry = msgspec.structs.replace(entry, result=None, traceback="", unkept=unkept)
        self._entries.append(entry)
        if soon:
            self._soon.set()

    def published(self, message: Message, worker: str = "", *, nowhere: bool = False) -> None:
        """A message was published.

        Parameters:
            worker: the identity of the worker whose handler did it; "" is a program.
            nowhere: no queue received it.
        """
        id, journey = message.id, message.correlation_id
        cause = None if journey == id else journey, message.causation_id
        row = ("published", message.created, id, message.topic, worker, self.process, "", 0, 0, *cause)
        if nowhere:
            self._note_row((*row, None, message.due, NOWHERE))
        else:
            self._note_row((*row, None, message.due) if message.due else row)

    def _note_row(self, row: Row) -> None:
        if self._has_room():
            self._entries.append(row)

    def _has_room(self) -> bool:
        """Count one more that is noted; where there is no room for it, it is dropped."""
        if self._noted >= CAPACITY:
            self._drop(1)
            return False
        self._noted += 1
        return True

    def cancelling(self, id: str, topic: str, journey: str | None, *, at: float | None = None) -> None:
        """Somebody wants a message cancelled.

        Parameters:
            id: the message's; it belongs to the journey with the id that is given.
            at: Unix seconds; None is now.
        """
        at, journey = self.clock() if at is None else at, None if journey == id else journey
        entry = Entry(Kind.CANCELLING, at, id, topic, process=self.process, correlation_id=journey)
        self.note(entry, soon=True)

    def redriven(self, letters: Iterable[DeadLetter], at: float) -> None:
        """Dead letters were put back into their queues.

        Parameters:
            at: Unix seconds, before anybody could receive them again.
        """
        for letter in letters:
            message = letter.message
            journey = None if message.correlation_id == message.id else message.correlation_id
            behind = max(at, letter.died)  # also where our clock is
            entry = Entry(
                Kind.REDRIVEN, behind, message.id, message.topic, "", self.process, letter.queue, 0, 0, journey
            )
            self.note(entry, soon=True)

    def settled(
        self,
        worker: str,
        delivery: Delivery,
        verdict: Verdict,
        begun: float | None,
        ended: float | None = None,
        *,
        soon: bool = False,
    ) -> None:
        """A delivery has ended, and with it perhaps the message; what it emits is noted by whoever knows where that went.

        Parameters:
            worker: the identity of the worker that had it.
            begun: when the attempt began, on the monotonic clock; None where none was made.
            ended: when it ended, on the same clock; None is now.
            soon: somebody may be waiting for its result.
        """
        now = self._zero + (monotonic() if ended is None else ended)
        started = None if begun is None else self._zero + begun
        if verdict is not DONE:
            self._settled_otherwise(worker, delivery, verdict, now, started, soon=soon)
            return
        message, attempts = delivery.message, delivery.attempts
        id, journey = message.id, message.correlation_id
        if self._noted >= CAPACITY:
            self._drop(1)
            return
        self._noted += 1  # as _has_room(), without a call for each message
        again, row = (
            delivery.deliveries - attempts - 1,
            (id, now, started, None if journey == id else journey, message.causation_id),
        )
        try:
            self._successes.add(message.topic, worker, delivery.queue, attempts + 1, again, row)
        except Exception:  # a text of half characters: at length there is a way for it
            entry = (Kind.SUCCEEDED, now, id, message.topic, worker, self.process, delivery.queue, attempts + 1, again)
            self._entries.append((*entry, *row[-2:], started))
        if soon:
            self._soon.set()

    def _settled_otherwise(
        self, worker: str, delivery: Delivery, verdict: Verdict, now: float, started: float | None, *, soon: bool
    ) -> None:
        message = delivery.message
        id, journey, attempt = message.id, message.correlation_id, delivery.attempts + 1
        kind, due, reason, error, traceback = Kind.SUCCEEDED, 0.0, "", "", ""
        result, unkept = None, ""
        if type(verdict) is Done:
            result, unkept = verdict.result, verdict.unkept
            if verdict.repeated:
                kind = Kind.DUPLICATE
            elif verdict.cancelled:
                kind, attempt = Kind.CANCELLED, attempt if started is not None else delivery.attempts
                error = verdict.error
        elif type(verdict) is RetryAt:
            kind, due, error, traceback = Kind.RETRIED, verdict.due, verdict.error, verdict.traceback
        elif type(verdict) is Dead:
            kind, reason, error, traceback = Kind.DEAD, verdict.reason, verdict.error, verdict.traceback
            if reason in NEVER_BEGUN:
                started, attempt = None, delivery.attempts
        elif type(verdict) is Release:
            if started is None:
                return  # nobody had looked at it
            kind, due = Kind.RELEASED, verdict.due
        self.note(
            Entry(
                kind,
                now,
                id,
                message.topic,
                worker,
                self.process,
                delivery.queue,
                attempt,
                delivery.deliveries - delivery.attempts - 1,
                None if journey == id else journey,
                message.causation_id,
                started,
                due,
                reason,
                error,
                traceback[-LONGEST_TRACEBACK:],
                None,
                None,
                "",
                result,
                unkept,
            ),
            soon=soon,
        )

    def progressed(
        self, worker: str, delivery: Delivery, done: float, total: float | None = None, note: str = ""
    ) -> None:
        """The attempt that runs says how far it is; of several between two flushes the last one counts."""
        key = worker, delivery.message.id
        if len(self._progress) >= CAPACITY and key not in self._progress:
            self._drop(1)
            return
        self._progress[key] = self._of(
            Kind.PROGRESSED,
            self.clock(),
            worker,
            delivery,
            done=done,
            total=total,
            note=note[:LONGEST_NOTE],
        )

    def _of(self, kind: Kind, at: float, worker: str, delivery: Delivery, **more: Any) -> Entry:
        message = delivery.message
        return Entry(
            kind,
            at,
            message.id,
            message.topic,
            worker,
            self.process,
            delivery.queue,
            delivery.attempts + 1,
            delivery.crashes,
            None if message.correlation_id == message.id else message.correlation_id,
            message.causation_id,
            **more,
        )

    def _drop(self, entries: int) -> None:
        if self._metrics.journal_dropped == 0:
            log.warning(
                "the journal cannot keep up, or its broker is away: entries are dropped (said once; see the metrics)"
            )
        self._metrics.journal_dropped += entries

    # --- shipping -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to ship."""
        self._loops.start("journal", self._run)

    async def _run(self) -> None:
        hurries, is_kept = 0, True
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._soon.wait()
                    await asyncio.sleep(SOON_SECONDS if is_kept else FLUSH_SECONDS)
            hurries += self._soon.is_set()
            self._soon.clear()
            await self.flush()
            if hurries >= (HURRIES if is_kept else 1):
                hurries, is_kept = 0, await self._is_kept()

    async def _is_kept(self) -> bool:
        """Whether there is a keeper, which may have somebody waiting for an end."""
        now = self.clock()
        # An empty question, which a keeper leaves out: that it is heard is the answer.
        empty = Message(uuid7(now, os.urandom(10)), self._keeper, b"", content_type=MSGPACK, created=now)
        try:
            return not await self._broker.publish((empty,))
        except BrokerError:
            return False

    async def flush(self) -> None:
        """Ship what has gathered; what the broker cannot take now stays for the next time, within bounds."""
        self._zero = self.clock() - monotonic()  # once for all that is noted until the next time
        async with self._shipping:
            if not self._unsent:
                self._gather()
            while self._unsent and await self._ship(list(islice(self._unsent, SHIPPED_AT_ONCE))):
                pass

    async def close(self) -> None:
        """Ship what is left, without waiting long, and end."""
        await self._loops.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_FLUSH_SECONDS):
                await self.flush()
                await self.flush()  # where something was unsent, that alone went before
        if left := self._noted + sum(count for count, _ in self._unsent):
            self._drop(left)

    def _gather(self) -> None:
        """Make batches of all that is to tell."""
        told = []
        for source in self.at_work:
            for worker, delivery, begun in source():
                if (ran := monotonic() - begun) >= RUNNING_SECONDS:
                    told.append(delivery.receipt)
                    if delivery.receipt not in self._told:
                        began = self.clock() - ran
                        self.note(self._of(Kind.STARTED, began, worker, delivery, started=began))
        self._told = frozenset(told)
        entries, self._entries = [*self._entries, *self._progress.values()], []
        heavy, self._bytes, self._noted = self._bytes > 0, 0, 0
        self._progress.clear()
        for body, number, unfit in packed(entries, self._successes.take(), heavy=heavy):
            now = self.clock()
            if unfit:
                log.error("%s of the journal dropped: they cannot be encoded", counted(unfit, "entry", "entries"))
                self._drop(unfit)
            id = uuid7(now, os.urandom(10))
            self._unsent.append((number, Message(id, self._queue.name, body, content_type=MSGPACK, created=now)))

    async def _ship(self, batches: Sequence[tuple[int, Message]]) -> bool:
        """Give batches to the broker; False where they should be tried again later."""
        messages = [message for _, message in batches]
        try:
            try:
                await self._broker.publish(messages, queue=self._queue.name)
            except BrokerError as error:
                if _may_pass(error):
                    raise
                await self._broker.declare([self._queue])  # perhaps somebody deleted it
                await self._broker.publish(messages, queue=self._queue.name)
        except BrokerError as error:
            self._say(error)
            if _may_pass(error):  # what did arrive comes again: the keeper knows a batch by its id
                return False
            refused = error.refused if isinstance(error, PublishFailed) else {message.id for message in messages}
            self._drop(sum(count for count, message in batches if message.id in refused))
        else:
            self._failures = 0
        for _ in batches:
            self._unsent.popleft()
        return True

    def _say(self, error: BrokerError) -> None:
        self._failures += 1
        log.log(
            logging.WARNING if self._failures == 1 else logging.DEBUG,
            "the journal cannot be shipped, work goes on: %s",
            describe(error),
        )


def _may_pass(error: BrokerError) -> bool:
    """Whether the same batches may get through later."""
    return is_outage(error) or (isinstance(error, PublishFailed) and bool(error.unknown))


def place(app: str, said: bool | str | Path, broker: Broker, url: str | None) -> Path | str:
    """Where the journal of an application is kept: a file, or IN_MEMORY.

    Parameters:
        said: the file's name; or True, for the usual place: beside the queue file, in memory where the messages are, else in the
            working directory, named after the application.
        url: of the broker; None for one that was made in code.
    """
    if not isinstance(said, bool):
        return IN_MEMORY if said == IN_MEMORY else Path(said)
    parts = urlsplit(url or "")
    if parts.scheme == "sqlite":
        return Path(f"{unquote(parts.path[1:])}.journal")
    return IN_MEMORY if Feature.DURABLE in broker.missing else Path(f"{app}.journal")
