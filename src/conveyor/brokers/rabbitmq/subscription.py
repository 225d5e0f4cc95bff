"""One receiver of one queue: it waits for messages, and counts and leases what has come before anybody sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from conveyor.broker import Delivery
from conveyor.brokers.rabbitmq.amqp import AmqpError, ChannelClosed, Connection, FieldValue, Incoming
from conveyor.brokers.rabbitmq.delay import AGAIN_SECONDS, Mover, moved_copy
from conveyor.brokers.rabbitmq.envelope import ATTEMPTS, DELIVERIES, DUE, ERROR, Arrived, copy_of
from conveyor.brokers.rabbitmq.held import Held
from conveyor.brokers.rabbitmq.link import said
from conveyor.brokers.rabbitmq.order import Keyed, is_keyed
from conveyor.brokers.rabbitmq.publisher import Outgoing
from conveyor.brokers.rabbitmq.spec import Spec
from conveyor.brokers.rabbitmq.stream import Stream
from conveyor.brokers.rabbitmq.tap import FIRST, Tap, come
from conveyor.brokers.rabbitmq.work import Work
from conveyor.core.message import Message
from conveyor.errors import BrokerError, BrokerUnavailable

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq import RabbitBroker

log: Final = logging.getLogger("conveyor.rabbitmq")

LOOK_AGAIN_SECONDS: Final = 1.0
"""How often whoever receives early looks whether there is a delay ladder by now."""
PASSIVE_SECONDS: Final = 0.25
"""How long a message that is not due is held before it goes to the end of a queue that others have made; meanwhile it takes the room
of one that is."""
UNKEYED_TURN: Final = 4
"""Of so many fetches, one also looks for messages without a key where those with one are never at an end."""
CRASHED: Final = "its process died, or lost the connection, without a word"


class RabbitSubscription:
    """One receiver of one queue; made by RabbitBroker.subscribe()."""

    def __init__(self, broker: RabbitBroker, queue: str, prefetch: int, early: bool) -> None:
        self.broker = broker
        self.queue = queue
        self.held = 0
        self._asked = 0
        self._turn = 0
        self._prefetch = prefetch
        self._early = early
        self._ended: BrokerError | None = None
        self._news: set[asyncio.Event] = set()
        self._room = asyncio.Event()
        self._work: Work | None = None
        self._opening = asyncio.Lock()
        self._aside: dict[Incoming, Outgoing] = {}
        self._waiting: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self.mover: Mover | None = None
        """Moves what is delayed in the queue, where this object may."""
        self.stream = Stream(
            queue,
            prefetch,
            lambda: broker.specs[queue].replicated,
            lambda: self._ended is not None,
            self._untouched,
            broker.spawn,
            broker.farewell,
        )

    async def fetch(self, limit: int) -> list[Delivery]:
        """See conveyor.broker.Subscription. Waits, too, while prefetch deliveries are unsettled."""
        while True:
            self._check()
            room = min(limit, self._prefetch - self.held - self._asked)
            if room <= 0:
                self._room.clear()
                await self._room.wait()
                continue
            self._asked += room
            try:
                work = await self._channel()
                await self.attach(work.connection)
                deliveries = await self._fetch(work, room)
            finally:
                self._asked -= room
                self._tell_of_room()
            if deliveries:
                return deliveries

    async def close(self) -> None:
        """See conveyor.broker.Subscription."""
        self.end(BrokerUnavailable(f"this subscription of {self.queue!r} is closed"))
        mover, self.mover = self.mover, None
        await self.broker.farewell(self._take_leave(mover), f"closing a subscription of {self.queue}")
        self.broker.forget(self)

    async def _take_leave(self, mover: Mover | None) -> None:
        try:
            await self.stream.close()
            if self._waiting:
                await asyncio.wait(self._waiting)
            if mover is not None:
                await mover.stop()
            if self._work is not None:
                self._work.retire()
        except AmqpError:
            pass  # the server has taken back what it had

    @property
    def aside(self) -> int:
        """Messages in its hands that are not due."""
        return len(self._aside)

    async def quiet(self) -> None:
        """Return when nothing is on its way, neither to here nor from one queue to another."""
        await self.stream.quiet()
        if self.mover is not None:
            await self.mover.quiet()

    async def purge(self) -> int:
        """Delete what is in its hands and was not fetched; how many."""
        moving = 0 if self.mover is None else await self.mover.purge()
        moving += await self.stream.purge()
        aside, self._aside = list(self._aside), {}
        if aside and self._work is not None and not self._work.lost:
            self._work.ack([each.delivery_tag for each in aside])
            await self._work.flush()
        return moving + len(aside)

    def end(self, why: BrokerError) -> None:
        """Take part no more; a fetch that waits raises why."""
        self._ended = self._ended or why
        self._over.set()
        self.wake()

    def wake(self) -> None:
        """Let the fetches that wait look again."""
        self.stream.wake()
        self._room.set()
        for news in self._news:
            news.set()

    def let_go(self, held: Held) -> None:
        """One of its deliveries is no longer in its hands."""
        self.broker.leases.end(held)
        self.held -= 1
        self._tell_of_room()

    def _tell_of_room(self) -> None:
        """Let a fetch that waits for room look whether there is some."""
        if self.held + self._asked < self._prefetch:
            self._room.set()

    async def attach(self, connection: Connection) -> None:
        """Have a mover on this connection; its consumer is what counts this subscription, too."""
        mover = self.mover
        if mover is None or mover.connection is not connection:
            self._check()
            if self._early or self.broker.specs[self.queue].passive:
                return
            mover = self.mover = Mover(self.broker, self.queue, connection)
            self.broker.spawn(mover.run(), f"moving what is delayed in {self.queue}")
        if not mover.patience_over:
            await mover.begun()

    async def _channel(self) -> Work:
        """A channel of its own: what the server refuses here closes nobody else's."""
        connection = await self.broker.connection()
        async with self._opening:
            work = self._work
            if work is None or work.lost or work.connection is not connection:
                try:
                    work = self._work = Work(connection, await connection.channel())
                except AmqpError as error:
                    raise BrokerUnavailable(f"cannot receive from {self.queue!r}: {said(error)}") from error
            return work

    def _check(self) -> None:
        if self._ended is not None:
            raise self._ended

    async def _fetch(self, work: Work, room: int) -> list[Delivery]:
        # Whoever receives early looks into the delay ladder, too, which others may have raised meanwhile.
        spec = await self.broker.known(self.queue, fresh=self._early)
        if spec.name in self.broker.absent:
            raise BrokerUnavailable(f"the temporary queue {spec.name!r} is being declared again")
        if not spec.ordered and not self._early:
            return await self._received(work, spec, room)
        news = asyncio.Event()
        self._news.add(news)
        again = asyncio.get_running_loop().call_later(LOOK_AGAIN_SECONDS, self.wake) if self._early else None
        try:
            if not spec.ordered:
                return await self._draw(work, spec, room, news, self._enough(again))
            keyed = self.broker.keyed(self.queue)
            try:
                await keyed.begin(news)
                return await self._in_order(work, spec, room, news, keyed, again)
            except AmqpError as error:
                raise BrokerUnavailable(f"cannot receive from {self.queue!r}: {said(error)}") from error
            finally:
                keyed.end(news)
        finally:
            self._news.discard(news)
            if again is not None:
                again.cancel()

    def _enough(self, again: asyncio.TimerHandle | None) -> Callable[[], bool]:
        """Whether to stop waiting though nothing came."""
        if again is None:
            return lambda: self._ended is not None
        return lambda: self._ended is not None or again.when() <= asyncio.get_running_loop().time()

    async def _in_order(
        self,
        work: Work,
        spec: Spec,
        room: int,
        news: asyncio.Event,
        keyed: Keyed,
        again: asyncio.TimerHandle | None,
    ) -> list[Delivery]:
        """What has a key comes from the partitions, what has none from the queue itself."""
        self._turn += 1
        if not keyed.ready(self._early) or self._turn % UNKEYED_TURN == 0:  # neither of the two starves the other
            enough = self._enough(again)
            drawn = await self._draw(work, spec, room, news, lambda: enough() or keyed.lost or keyed.ready(self._early))
            if drawn:  # they are leased: whatever breaks from here on, nobody would hear of them
                return drawn
            await keyed.settle_down()
        if self._ended is not None or keyed.lost or not keyed.ready(self._early):
            return []
        helds: list[Held] = []
        places = await keyed.take(room, self._early)
        since = asyncio.get_running_loop().time()
        for place in places:
            held = Held(
                self,
                place.work,
                place.incoming,
                when(place.message, place.due) if self._early else place.message,
                place.deliveries,
                place.attempts,
                place.error,
                place.due,
                since,
            )
            held.place = place
            helds.append(held)
        self.held += len(helds)
        self.broker.leases.begin(helds, spec.lease_seconds)
        return [held.delivery() for held in helds]

    async def _received(self, work: Work, spec: Spec, room: int) -> list[Delivery]:
        """From a queue without order."""
        try:
            arrived = await self.stream.fetch(work, room, self.held + self._asked)
        except AmqpError as error:
            self._explain(work, error)
            return []
        return await self._accept(work, spec, arrived) if arrived else []

    async def _draw(
        self, work: Work, spec: Spec, room: int, news: asyncio.Event, until: Callable[[], bool]
    ) -> list[Delivery]:
        """From the queue itself, and where this receives early, from where delayed messages wait."""
        queues = [spec.name, spec.later, *spec.ladder] if self._early and not spec.passive else [spec.name]

        def late(incoming: Incoming) -> None:
            self.broker.spawn(self._untouched(work, [incoming]), "giving back what came late")

        tidily = spec.replicated and len(queues) == 1
        tap: Tap | None = None
        try:
            if tidily:
                # A consumer that could be sent more while it ends has that counted, though nobody gets it: so it asks for what is there.
                room = max(1, min(room, (await work.channel.queue_declare(spec.name, passive=True)).messages))
            tap = Tap(work, queues, room, news, late, tidily=tidily)
            await come(tap, news, until=until)
            await tap.close()
        except asyncio.CancelledError:
            if tap is not None:
                await self.broker.farewell(self._abandon(work, tap), f"giving back what came of {self.queue}")
            raise
        except AmqpError as error:
            if tap is not None:
                await tap.close()
            self._explain(work, error)
            return []
        if self._ended is not None:
            await self._untouched(work, tap.arrived)
            return []
        return await self._accept(work, spec, tap.arrived)

    async def _abandon(self, work: Work, tap: Tap) -> None:
        """Nobody waits any more for what this tap brings."""
        await tap.close()
        if tap.arrived:
            await self._untouched(work, tap.arrived)

    def _explain(self, work: Work, error: AmqpError) -> None:
        """Consuming failed: raise what makes it useless to try again at once."""
        self._check()
        if isinstance(error, ChannelClosed) and not work.connection.closed.done():
            raise BrokerError(f"cannot receive from {self.queue!r}: {said(error)}") from error

    async def _accept(self, work: Work, spec: Spec, arrived: list[Incoming]) -> list[Delivery]:
        """Count and lease what has come; what may not be delivered now goes elsewhere first."""
        read, now = self.broker.read, self.broker.clock()
        come = [(incoming, read(incoming, spec)) for incoming in arrived]
        if spec.passive and not self._early:
            early = [(each, what) for each, what in come if what.due > now and not is_keyed(spec, what.message)]
            if early:
                come = [each for each in come if each not in early]
                self._set_aside(work, spec, early, now)
        elsewhere = [
            (each, copy) for each, what in come if (copy := self._elsewhere(spec, each, what, now)) is not None
        ]
        if elsewhere:
            away = {incoming.delivery_tag for incoming, _ in elsewhere}
            come = [(each, what) for each, what in come if each.delivery_tag not in away]
            try:
                await self._send(work, elsewhere)
            except asyncio.CancelledError:
                if come:
                    staying = [incoming for incoming, _ in come]
                    await self.broker.farewell(self._untouched(work, staying), f"giving back what came of {self.queue}")
                raise
        since = asyncio.get_running_loop().time()
        helds: list[Held] = []
        for incoming, what in come:
            message, counted, error = what.message, what.deliveries, what.error
            if counted > what.noted or self._early:
                if self._early:
                    message = when(message, what.due)
                if self._early and not incoming.consumer_tag.endswith(
                    FIRST
                ):  # it was delayed: not delivered, but moved
                    counted = what.noted
                else:
                    counted = self._counted(work, spec, incoming, what)
                if counted > what.noted:
                    error = CRASHED
            helds.append(Held(self, work, incoming, message, counted + 1, what.attempts, error, what.due, since))
        self.held += len(helds)
        self.broker.leases.begin(helds, spec.lease_seconds)
        return [held.delivery() for held in helds]

    def _elsewhere(self, spec: Spec, incoming: Incoming, what: Arrived, now: float) -> Outgoing | None:
        """The copy of a message that may not be delivered from here now; None of one that may."""
        waited = self._early and not incoming.consumer_tag.endswith(FIRST)
        if is_keyed(spec, what.message):  # another program put it there, who does not know of the partitions
            return moved_copy(incoming, what, "")._replace(exchange=spec.keyed)
        if what.due > now and not self._early:
            return moved_copy(incoming, what, spec.later)
        if incoming.redelivered and not spec.replicated and not waited:
            # A classic queue does not count. So the copy says what this delivery was, and is the next one.
            return self._counted_copy(spec, incoming, what, what.noted + 1, due=0.0)
        return None

    def _counted(self, work: Work, spec: Spec, incoming: Incoming, what: Arrived) -> int:
        """How often it was handed over before, the deaths included that the server has counted since that was noted."""
        if not spec.replicated:
            return what.noted + incoming.redelivered
        # What came for nobody is delivered first of all, and in one go: hardly to a cancelled consumer again. So a doubt
        # explains a message's only crash; of one with several, none is explained away.
        only = what.deliveries - what.attempts == 1 and what.deliveries > what.noted
        return what.deliveries - (only and work.doubt(self.queue))

    @staticmethod
    def _counted_copy(spec: Spec, incoming: Incoming, what: Arrived, counted: int, *, due: float) -> Outgoing:
        """A copy for its own queue that says how often it was handed over, the last time to somebody who died."""
        notes: dict[str, FieldValue] = {DELIVERIES: counted, ATTEMPTS: what.attempts, ERROR: CRASHED, DUE: due}
        return Outgoing("", spec.name, incoming.body, copy_of(incoming, what.message, notes))

    def _set_aside(self, work: Work, spec: Spec, early: list[tuple[Incoming, Arrived]], now: float) -> None:
        """A passive queue has no other place for what is not due: held for a moment, it goes to its end, and comes round again."""
        copies = {incoming: moved_copy(incoming, what, spec.name) for incoming, what in early}
        self._aside |= copies
        seconds = min(PASSIVE_SECONDS, min(what.due for _, what in early) - now)

        async def wait() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._over.wait()
            there = [
                (incoming, copy) for incoming, copy in copies.items() if self._aside.pop(incoming, None) is not None
            ]
            if there:
                await self._send(work, there)

        task = self.broker.spawn(wait(), f"holding what is not due in {self.queue}")
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _send(self, work: Work, elsewhere: list[tuple[Incoming, Outgoing]]) -> None:
        """Send copies, and acknowledge what they stand for; to its end, even where the caller is cancelled."""

        async def send() -> None:
            while not work.lost:
                try:
                    await self.broker.publisher.send_all([copy for _, copy in elsewhere])
                except BrokerError as error:
                    log.warning("cannot move what came in %s, trying on: %s", self.queue, error)
                    await asyncio.sleep(AGAIN_SECONDS)
                else:
                    work.ack([incoming.delivery_tag for incoming, _ in elsewhere])
                    return

        await asyncio.shield(self.broker.spawn(send(), f"moving what came in {self.queue}"))

    async def _untouched(self, work: Work, arrived: list[Incoming]) -> None:
        """What came for a fetch that is no more goes back as if it had never come."""
        spec = self.broker.specs[self.queue]
        try:
            copies = [self._as_it_came(work, spec, each) for each in arrived]
            await self.broker.publisher.send_all(copies)
            work.ack([each.delivery_tag for each in arrived])
        except (BrokerError, AmqpError):
            if not work.lost:  # else the server has them back already
                work.give_back([each.delivery_tag for each in arrived])

    def _as_it_came(self, work: Work, spec: Spec, incoming: Incoming) -> Outgoing:
        """A copy for its own queue, counted as what came: the server's own counts end with the original."""
        what = self.broker.read(incoming, spec)
        counted = what.noted if self._early else self._counted(work, spec, incoming, what)
        if counted <= what.noted:
            return moved_copy(incoming, what, spec.name)
        return self._counted_copy(spec, incoming, what, counted, due=what.due)


def when(message: Message, due: float) -> Message:
    """A message that tells when it would have been delivered."""
    return message if due <= message.due else msgspec.structs.replace(message, due=due)
