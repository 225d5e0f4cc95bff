"""Per-key order: each key belongs to one of a queue's partitions, and each partition to one broker object at a time.

A partition is a queue with a single active consumer, so all messages of a key reach one object, in order; it hands out the oldest of
each key and keeps the others behind it. Nothing is copied: what is to be tried again waits in its place. What was counted is written
into the partition's one-message queue of notes before a message is handed out, so that the next owner knows it; the server's own
counts say nothing here, since they count what was never handed out, too.

An object gives its partitions up as soon as it holds none of their messages and nobody waits for more. It does so by closing the channel:
only then do quorum queues put everything back in its old order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import msgspec

from conveyor.brokers.rabbitmq.amqp import AmqpError, ChannelClosed, Incoming, Properties
from conveyor.brokers.rabbitmq.envelope import PERSISTENT
from conveyor.brokers.rabbitmq.publisher import Outgoing
from conveyor.brokers.rabbitmq.spec import Spec, notes_of
from conveyor.brokers.rabbitmq.topology import NOT_FOUND
from conveyor.brokers.rabbitmq.work import Work
from conveyor.core.message import Message
from conveyor.errors import BrokerError

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq import RabbitBroker

log: Final = logging.getLogger("conveyor.rabbitmq")

AHEAD: Final = 500
"""Messages of a partition that its owner has in its hands at most: those behind the oldest of their key are among them."""
FIRST_SECONDS: Final = 0.1
"""How long to wait for the first messages of partitions that may have another owner."""
RENEWAL_SECONDS: Final = 10.0
"""How long what is delivered anew may take."""
IDLE_SECONDS: Final = 0.1
"""How long nobody has to wait for messages until the partitions are free for others."""


class Note(msgspec.Struct, array_like=True):
    """What was counted of a message that was handed out."""

    deliveries: int
    attempts: int
    error: str
    due: float


_notes: Final = msgspec.json.Decoder(dict[str, Note])


class Place:
    """A message at its place behind the older ones of its key."""

    __slots__ = ("attempts", "deliveries", "due", "error", "incoming", "message", "out", "partition", "work")

    def __init__(self, work: Work, incoming: Incoming, message: Message, due: float, partition: int) -> None:
        self.work = work
        self.incoming = incoming
        self.message = message
        self.partition = partition
        self.due = due
        self.deliveries = 0
        self.attempts = 0
        self.error = ""
        self.out = False

    @property
    def counts(self) -> tuple[float, int, int, str]:
        """When it is due, and its deliveries, attempts and error."""
        return self.due, self.deliveries, self.attempts, self.error

    @counts.setter
    def counts(self, counts: tuple[float, int, int, str]) -> None:
        self.due, self.deliveries, self.attempts, self.error = counts


class Keyed:
    """The keys of one ordered queue, as far as they are in the hands of one broker object."""

    def __init__(self, broker: RabbitBroker, queue: str) -> None:
        self._broker = broker
        self._queue = queue
        self.work: Work | None = None
        self._chains: dict[str, deque[Place]] = {}
        self._unread: list[tuple[int, Incoming]] = []
        self._notes: dict[int, dict[str, Note]] = {}
        self._fetching = 0
        self._waiters: set[asyncio.Event] = set()
        self._changing = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._due: asyncio.TimerHandle | None = None
        self._arrival = asyncio.Event()
        self._since = 0.0
        # Somebody deleted a partition, or its notes: it is created again before all are taken anew.
        self._incomplete = False
        self._full = False
        self._kept: dict[str, Place] = {}
        # What is to be delivered anew, by id; until all of it is there, what else comes waits behind it.
        self._returning: Counter[str] = Counter()
        self._aside: list[tuple[int, Incoming]] = []
        self.renewing: asyncio.Future[None] | None = None
        """Done when what is handed out has its new delivery tags."""

    # Receiving

    async def begin(self, news: asyncio.Event) -> None:
        """Somebody waits for messages, and wants to know when there are some; until end()."""
        self._fetching += 1
        self._waiters.add(news)
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        async with self._changing:
            if self.work is None or self.work.lost:
                await self._own()
        if self._due is None and self._chains:
            self._look()  # nobody was there to be woken when what waits for its time was put back

    def end(self, news: asyncio.Event) -> None:
        """It does not wait any more."""
        self._fetching -= 1
        self._waiters.discard(news)
        self._maybe_idle()

    def ready(self, early: bool) -> bool:
        """Whether there is something to hand out."""
        return any(True for _ in self._candidates(self._broker.clock(), early))

    @property
    def lost(self) -> bool:
        """Whether the partitions have to be taken anew."""
        return self.work is None or self.work.lost

    async def take(self, limit: int, early: bool) -> list[Place]:
        """Hand out up to so many, once that is noted."""
        candidates = self._candidates(self._broker.clock(), early)
        taken = sorted(candidates, key=lambda place: place.message.created)[
            :limit
        ]  # the partitions know no common order
        work = self.work
        for place in taken:
            place.out = True
            place.deliveries += 1
        try:
            await self.note(taken)
        except BaseException:
            for place in taken:
                place.deliveries -= 1
                self.put_back(place)
            raise
        # Taken anew meanwhile, the partitions have other channels: what is of this one will come again there.
        return taken if work is self.work and not self.lost else []

    def put_back(self, place: Place) -> bool:
        """It waits again, at its place; False where the partitions went meanwhile, and it with them."""
        place.out = False
        if not self._has(place):
            return False
        self._look()
        return True

    def finish(self, places: Iterable[Place]) -> None:
        """These are done or dead, and acknowledged; the next ones of their keys have their turn."""
        for place in filter(self._has, places):
            chain = self._chains.get(place.message.key or "")
            if chain is not None and place in chain:
                chain.remove(place)
                if not chain:
                    del self._chains[place.message.key or ""]
            self._notes.get(place.partition, {}).pop(place.message.id, None)
        self._look()

    async def note(self, places: Iterable[Place]) -> None:
        """Write down what is counted of these; return when the server has it. What went with its channel is left out."""
        changed: set[int] = set()
        for place in filter(self._has, places):
            notes = self._notes.setdefault(place.partition, {})
            notes[place.message.id] = Note(place.deliveries, place.attempts, place.error, place.due)
            changed.add(place.partition)
        if changed:
            await self._broker.publisher.send_all([self._written(number) for number in changed])

    def _has(self, place: Place) -> bool:
        """Whether it is of the partitions as they are now in our hands; others may have those that it was of."""
        return place.work is self.work and not self.lost

    # What operators see and do

    @property
    def waiting(self) -> int:
        """Messages in our hands that were not handed out."""
        return (
            sum(1 for chain in self._chains.values() for place in chain if not place.out)
            + len(self._unread)
            + len(self._aside)
        )

    async def purge(self) -> int:
        """Delete what was not handed out; how many."""
        await self.settle_down()
        async with self._changing:
            if self.work is None or self.work.lost:
                return 0
            gone = [place for chain in self._chains.values() for place in chain if not place.out]
            self.work.ack([place.incoming.delivery_tag for place in gone])
            await self.work.flush()
            self.finish(gone)
            return len(gone)

    async def settle_down(self) -> None:
        """Return when what has arrived, or was on its way, is at its place."""
        if self.work is not None and not self.work.lost:
            await self.work.flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_SECONDS * 10):
                while self._unread and not self.lost:  # noqa: ASYNC110 - short, and rarely at all
                    await asyncio.sleep(0.002)

    async def renew(self, oldest: float) -> None:
        """Have everything delivered anew if it was delivered before (the event loop's time): the server loses patience otherwise.

        All of it, in its order, since a quorum queue puts what is given back behind what was given back before. It comes back to
        us, the only active consumer; what is handed out stays so.
        """
        async with self._changing:
            work = self.work
            if work is None or work.lost or self._since > oldest or self.renewing is not None:
                return
            await self.settle_down()
            if self.lost:
                return
            # What is acknowledged already, though its settlement has not heard so, will not come again.
            places = [
                place for chain in self._chains.values() for place in chain if work.holds(place.incoming.delivery_tag)
            ]
            self._since = asyncio.get_running_loop().time()
            renewing = self.renewing = asyncio.get_running_loop().create_future()
            try:
                self._kept = {place.message.id: place for place in places if place.out}
                self._returning = Counter(place.message.id for place in places)
                self._chains.clear()
                work.give_back(sorted(place.incoming.delivery_tag for place in places))
                if places:
                    ends = [renewing, work.channel.closed]
                    await asyncio.wait(ends, timeout=RENEWAL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._renewed()
                self.renewing = None
                if self._kept:
                    log.warning("%d long deliveries of %s did not come back to us", len(self._kept), self._queue)
                self._kept = {}
            self._maybe_idle()

    def _renewed(self) -> None:
        """What was to be delivered anew is there, or will not come; then what came meanwhile."""
        self._returning.clear()
        aside, self._aside = self._aside, []
        for number, incoming in aside:
            if self.work is not None:
                self._put(self.work, number, incoming)
        if self.renewing is not None and not self.renewing.done():
            self.renewing.set_result(None)

    async def close(self) -> None:
        """Give everything back to the server."""
        for timer in (self._idle, self._due):
            if timer is not None:
                timer.cancel()
        self._idle = self._due = None
        async with self._changing:
            await self._disown()

    # Owning partitions

    async def _own(self) -> None:
        self._forget()
        spec = self._broker.specs[self._queue]
        if self._incomplete:
            await self._broker.topology.create_partitions(spec)
            self._incomplete = False
        connection = await self._broker.connection()
        work = self.work = Work(connection, await connection.channel())
        try:
            await self._consume(work, spec)
        except BaseException as error:  # of some partitions only, nobody would ever receive the others
            self._miss(error)
            self.work = None
            self._forget()
            work.channel.begin_close()
            raise

    async def _consume(self, work: Work, spec: Spec) -> None:
        self._since = asyncio.get_running_loop().time()
        await work.channel.qos(AHEAD)
        self._broker.spawn(self._read(work), f"ordering {self._queue}")

        def on_cancel(_: object) -> None:
            log.warning("a partition of %s is gone; creating it again", self._queue)
            self._incomplete = True
            work.channel.begin_close()

        for number, partition in enumerate(spec.partitions):

            def on_delivery(incoming: Incoming, number: int = number) -> None:
                work.took(incoming.delivery_tag)
                if self.work is work:
                    self._unread.append((number, incoming))
                    self._arrival.set()

            await work.channel.consume(partition, on_delivery, on_cancel=on_cancel)
        await self._first(work, spec)

    async def _first(self, work: Work, spec: Spec) -> None:
        """Wait for what there is, unless another object is the owner."""
        deadline = asyncio.get_running_loop().time() + FIRST_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            there = [await work.channel.queue_declare(each, passive=True) for each in spec.partitions]
            if not any(each.messages for each in there):
                break
            await asyncio.sleep(0.005)
        await self.settle_down()

    def _miss(self, error: BaseException) -> None:
        if isinstance(error, ChannelClosed) and error.code == NOT_FOUND:
            self._incomplete = True

    async def _disown(self) -> None:
        work, self.work = self.work, None
        self._forget()
        if work is not None and not work.lost:
            await work.channel.close()
        self._arrival.set()

    def _forget(self) -> None:
        self._chains.clear()
        self._unread.clear()
        self._aside.clear()
        self._returning.clear()
        self._notes.clear()

    async def _read(self, work: Work) -> None:
        """The loop that puts what arrives at its place; before the first of a partition, its notes are read."""
        work.channel.closed.add_done_callback(lambda _: self._arrival.set())
        while self.work is work and not work.lost:
            await self._arrival.wait()
            self._arrival.clear()
            try:
                for number in {number for number, _ in self._unread} - self._notes.keys():
                    self._notes[number] = await self._read_notes(work, number)
            except (BrokerError, AmqpError) as error:
                log.warning("cannot read what was counted in %s, beginning anew: %s", self._queue, error)
                self._miss(error)
                if self.work is work:
                    async with self._changing:
                        await self._disown()
                for news in self._waiters:
                    news.set()
                return
            if self.work is not work or work.lost:
                break
            unread, self._unread = self._unread, []
            for number, incoming in unread:
                if number in self._notes:
                    self._put(work, number, incoming)
                else:
                    self._unread.append((number, incoming))
                    self._arrival.set()
            self._look()
        for news in self._waiters:  # the channel is gone, or given up: whoever waits begins anew
            news.set()

    def _put(self, work: Work, number: int, incoming: Incoming) -> None:
        spec = self._broker.specs[self._queue]
        what = self._broker.read(incoming, spec)
        if self._returning:
            if what.message.id not in self._returning:
                self._aside.append((number, incoming))
                return
            self._returning -= Counter([what.message.id])
        place = Place(work, incoming, what.message, what.due, number)
        note = self._notes[number].get(what.message.id)
        if (kept := self._kept.pop(what.message.id, None)) is not None:
            kept.incoming = incoming
            place = kept
        elif note is not None:
            place.counts = (note.due, note.deliveries, note.attempts, note.error)
        else:
            place.deliveries, place.attempts, place.error = what.noted, what.attempts, what.error
        self._chains.setdefault(what.message.key or "", deque()).append(place)
        if self.renewing is not None and not self._returning and not self.renewing.done():
            self._renewed()

    async def _read_notes(self, work: Work, number: int) -> dict[str, Note]:
        queue = notes_of(self._broker.specs[self._queue].partitions[number])
        taken: list[Incoming] = []
        while (message := await work.channel.get(queue)) is not None:
            work.took(message.delivery_tag)
            taken.append(message)
        if not taken:
            return {}
        notes: dict[str, Note] = {}
        for message in taken:
            try:
                notes |= _notes.decode(message.body)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                log.warning("a note in %s is none of ours, and is dropped: %s", queue, error)
        self._notes[number] = notes
        await self._broker.publisher.send_all([self._written(number)])
        work.ack([message.delivery_tag for message in taken])
        return notes

    def _written(self, number: int) -> Outgoing:
        queue = notes_of(self._broker.specs[self._queue].partitions[number])
        properties = Properties(content_type="application/json", delivery_mode=PERSISTENT)
        return Outgoing("", queue, msgspec.json.encode(self._notes.get(number, {})), properties)

    # Whose turn it is

    def _candidates(self, now: float, early: bool) -> Iterable[Place]:
        for chain in self._chains.values():
            if early:
                yield from (place for place in chain if not place.out)
            elif not (first := chain[0]).out and first.due <= now:
                yield first

    def _look(self) -> None:
        """Wake whoever waits, or be there when the next one is due."""
        now = self._broker.clock()
        dues = [chain[0].due for chain in self._chains.values() if chain and not chain[0].out]
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if any(due <= now for due in dues):
            for news in self._waiters:
                news.set()
        elif dues and self._fetching:
            self._tell_full()
            self._due = asyncio.get_running_loop().call_later(min(max(0.001, min(dues) - now), 3600.0), self._look)
        elif not self._chains and self._waiters:
            for news in self._waiters:  # whoever receives early looks at everything
                news.set()
        self._maybe_idle()

    def _tell_full(self) -> None:
        """Nothing is ready: say so, once, where that is for want of room."""
        there: Counter[int] = Counter()
        busy: set[int] = set()
        for chain in self._chains.values():
            there[chain[0].partition] += len(chain)
            if chain[0].out:
                busy.add(chain[0].partition)
        full = any(count >= AHEAD for number, count in there.items() if number not in busy)
        if full and not self._full:
            log.warning(
                "%d messages of %s, as many as one process takes of a quarter of its keys, wait for a retry or a due time, or behind "
                "one that does: the other keys of that quarter get nothing until then",
                AHEAD,
                self._queue,
            )
        self._full = full

    def _maybe_idle(self) -> None:
        out = any(place.out for chain in self._chains.values() for place in chain)
        if self._fetching or out or self._kept or self.work is None:
            if self._idle is not None:
                self._idle.cancel()
                self._idle = None
        elif self._idle is None:
            self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._idle = None
        self._broker.spawn(self._free(), f"freeing the keys of {self._queue}")

    async def _free(self) -> None:
        async with self._changing:
            out = any(place.out for chain in self._chains.values() for place in chain)
            if not self._fetching and not out:
                await self._disown()


def is_keyed(spec: Spec, message: Message) -> bool:
    """Whether a message of this queue belongs into one of its partitions."""
    return spec.ordered and message.key is not None
