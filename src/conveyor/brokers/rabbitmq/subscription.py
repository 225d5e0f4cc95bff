"""One receiver of one queue: it consumes only while somebody waits for messages, so that nothing lies about unhandled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from conveyor.broker import Delivery
from conveyor.brokers.rabbitmq.amqp import AmqpError, ChannelClosed, FieldValue, Incoming
from conveyor.brokers.rabbitmq.delay import Mover, moved_copy
from conveyor.brokers.rabbitmq.envelope import ATTEMPTS, DELIVERIES, DUE, ERROR, copy_of
from conveyor.brokers.rabbitmq.order import Keyed, is_keyed
from conveyor.brokers.rabbitmq.publisher import Outgoing
from conveyor.brokers.rabbitmq.spec import Spec
from conveyor.brokers.rabbitmq.work import Held, Work
from conveyor.core.message import Message
from conveyor.errors import BrokerError, BrokerUnavailable

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq import RabbitBroker

LOOK_AGAIN_SECONDS: Final = 1.0
"""How often whoever receives early looks whether there is a delay ladder by now."""
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
        self.mover: Mover | None = None
        self._attaching = asyncio.Lock()

    async def fetch(self, limit: int) -> list[Delivery]:
        """See conveyor.broker.Subscription. Waits, too, while prefetch deliveries are unsettled."""
        while True:
            self._check()
            room = min(limit, self._prefetch - self.held - self._asked)
            if room <= 0:
                await self._more_room()
                continue
            work = await self.broker.work()
            await self.attach(work)
            self._asked += room
            try:
                deliveries = await self._fetch(work, room)
            finally:
                self._asked -= room
            if deliveries:
                return deliveries

    async def close(self) -> None:
        """See conveyor.broker.Subscription."""
        self.end(BrokerUnavailable(f"this subscription of {self.queue!r} is closed"))
        async with self._attaching:
            mover, self.mover = self.mover, None
            if mover is not None:
                try:
                    await mover.stop()
                except AmqpError:
                    pass  # the server has taken back what it had
        self.broker.forget(self)

    def end(self, why: BrokerError) -> None:
        """Take part no more; a fetch that waits raises why."""
        self._ended = self._ended or why
        self.wake()

    def wake(self) -> None:
        """Let the fetches that wait look again."""
        for news in self._news:
            news.set()

    def let_go(self) -> None:
        """One of its deliveries is no longer in its hands."""
        self.held -= 1
        if self._news and self.held + self._asked == self._prefetch - 1:
            self.wake()

    async def attach(self, work: Work) -> None:
        """Have a mover on this channel; its consumer is what counts this subscription, too."""
        if self.mover is not None and self.mover.work is work:
            return
        async with self._attaching:
            self._check()
            spec = self.broker.specs[self.queue]
            if (self.mover is not None and self.mover.work is work) or spec.passive or self._early:
                return
            mover = Mover(self.broker, self.queue, work)
            starting = self.broker.spawn(mover.start(), f"beginning to move what is delayed in {self.queue}")
            starting.add_done_callback(lambda started: self._attached(mover, started))
            try:
                await asyncio.shield(starting)
            except AmqpError as error:
                raise BrokerUnavailable(f"cannot receive from {spec.later!r}: {error}") from error

    def _attached(self, mover: Mover, started: asyncio.Task[None]) -> None:
        if started.cancelled() or started.exception() is not None:
            return
        self.mover = mover
        self.broker.spawn(mover.run(), f"moving what is delayed in {self.queue}")

    def _check(self) -> None:
        if self._ended is not None:
            raise self._ended

    async def _more_room(self) -> None:
        news = asyncio.Event()
        self._news.add(news)
        try:
            await news.wait()
        finally:
            self._news.discard(news)

    async def _fetch(self, work: Work, room: int) -> list[Delivery]:
        # Whoever receives early looks into the delay ladder, too, which others may have raised meanwhile.
        spec = await self.broker.known(self.queue, fresh=self._early)
        if spec.name in self.broker.absent:
            raise BrokerUnavailable(f"the temporary queue {spec.name!r} is being declared again")
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
                raise BrokerUnavailable(f"cannot receive from {self.queue!r}: {error}") from error
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
        drawn: list[Delivery] = []
        self._turn += 1
        if not keyed.ready(self._early) or self._turn % UNKEYED_TURN == 0:  # neither of the two starves the other
            enough = self._enough(again)
            drawn = await self._draw(work, spec, room, news, lambda: enough() or keyed.lost or keyed.ready(self._early))
            await keyed.settle_down()
        room -= len(drawn)
        if room <= 0 or self._ended is not None or keyed.lost or not keyed.ready(self._early):
            return drawn
        helds: list[Held] = []
        for place in await keyed.take(room, self._early):
            held = Held(
                self,
                keyed.work or work,
                place.incoming,
                when(place.message, place.due) if self._early else place.message,
                place.deliveries,
                place.attempts,
                place.error,
            )
            held.place = place
            held.due = place.due
            helds.append(held)
        self.held += len(helds)
        self.broker.leases.begin(helds, spec.lease_seconds)
        return [*drawn, *(held.delivery() for held in helds)]

    async def _draw(
        self, work: Work, spec: Spec, room: int, news: asyncio.Event, until: Callable[[], bool]
    ) -> list[Delivery]:
        queues = [spec.name, spec.later, *spec.ladder] if self._early and not spec.passive else [spec.name]
        arrived: list[Incoming] = []

        def late(incoming: Incoming) -> None:
            self.broker.spawn(self._untouched(work, spec, [incoming]), "giving back what came late")

        try:
            await work.draw(queues, room, until=until, arrived=arrived, news=news, late=late)
            if self._ended is None:
                return await self._accept(work, spec, arrived)
        except asyncio.CancelledError:
            if arrived:
                await asyncio.shield(self.broker.spawn(self._untouched(work, spec, arrived), "release"))
            raise
        except AmqpError as error:
            self._check()
            if isinstance(error, ChannelClosed) and not work.connection.closed.done():
                raise BrokerError(f"cannot receive from {self.queue!r}: {error}") from error
            return []
        if arrived:
            await self._untouched(work, spec, arrived)
        return []

    async def _accept(self, work: Work, spec: Spec, arrived: list[Incoming]) -> list[Delivery]:
        """Count and lease what has come; what may not be delivered now goes elsewhere."""
        broker, now = self.broker, self.broker.clock()
        counts_itself = spec.queue_type == "quorum"
        accepted: list[Held] = []
        elsewhere: list[tuple[Incoming, Outgoing]] = []
        for incoming in arrived:
            what = broker.read(incoming, spec)
            waited = self._early and not incoming.consumer_tag.endswith(
                ".0"
            )  # it was delayed: not delivered, but moved
            if is_keyed(spec, what.message):  # another program put it there, who does not know of the partitions
                copy = moved_copy(incoming, what, "")._replace(exchange=spec.keyed)
                elsewhere.append((incoming, copy))
            elif what.due > now and not self._early:
                target = spec.later if not spec.passive else spec.name
                elsewhere.append((incoming, moved_copy(incoming, what, target)))
            elif incoming.redelivered and not counts_itself and not waited:
                # A classic queue does not count. So the copy says what this delivery was, and is the next one.
                notes: dict[str, FieldValue] = {
                    DELIVERIES: what.noted + 1,
                    ATTEMPTS: what.attempts,
                    ERROR: CRASHED,
                    DUE: 0.0,
                }
                copy = Outgoing("", spec.name, incoming.body, copy_of(incoming, what.message, notes))
                elsewhere.append((incoming, copy))
            else:
                counted = what.noted if waited else what.deliveries
                while counts_itself and counted > what.noted and work.doubt(self.queue):
                    counted -= 1
                deliveries = counted + 1
                error = CRASHED if counted > what.noted else what.error
                message = when(what.message, what.due) if self._early else what.message
                held = Held(self, work, incoming, message, deliveries, what.attempts, error)
                held.due = what.due
                accepted.append(held)
        self.held += len(accepted)
        broker.leases.begin(accepted, spec.lease_seconds)
        if elsewhere:
            await broker.send([copy for _, copy in elsewhere])
            work.ack(incoming.delivery_tag for incoming, _ in elsewhere)
        return [held.delivery() for held in accepted]

    async def _untouched(self, work: Work, spec: Spec, arrived: list[Incoming]) -> None:
        """What came for a fetch that is no more goes back as if it had never come."""
        try:
            copies = [moved_copy(each, self.broker.read(each, spec), spec.name) for each in arrived]
            await self.broker.send(copies)
            work.ack(each.delivery_tag for each in arrived)
        except (BrokerError, AmqpError):
            pass  # they are still the server's, and come back when the channel goes
        finally:
            arrived.clear()


def when(message: Message, due: float) -> Message:
    """A message that tells when it would have been delivered."""
    return message if due <= message.due else msgspec.structs.replace(message, due=due)
