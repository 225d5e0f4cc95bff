"""Messages that are not due: up and down a ladder of queues that hold each message for a fixed time, without any plugin.

What is not due goes to ``<queue>.later``, from the exchange for such topics or as a copy. Every subscription has a mover,
which takes it from there to the rung of the longest time that is not too long; when that is over, the server puts it back
into ``<queue>.later`` (a dead-letter route), and the mover decides again. What is due goes to the queue itself. So nothing is
early; the mover itself waits only for what is shorter than the shortest rung.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from conveyor.brokers.rabbitmq.amqp import AmqpError, FieldValue, Incoming
from conveyor.brokers.rabbitmq.envelope import ATTEMPTS, DELIVERIES, DUE, ERROR, Arrived, copy_of
from conveyor.brokers.rabbitmq.publisher import Outgoing
from conveyor.brokers.rabbitmq.spec import RUNGS, Spec
from conveyor.brokers.rabbitmq.work import Work
from conveyor.errors import BrokerError

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq import RabbitBroker

log: Final = logging.getLogger("conveyor.rabbitmq")

MOVED_AT_ONCE: Final = 500
"""Messages in the hands of a mover at most."""
AGAIN_SECONDS: Final = 1.0
"""How soon a move that failed is tried again."""


def place(spec: Spec, due: float, now: float) -> str:
    """The queue where a message waits until it is due."""
    left = due - now
    if left <= 0:
        return spec.name
    if not spec.rungs or left < RUNGS[0]:
        return spec.later
    return spec.rung(max(step for step, seconds in enumerate(RUNGS) if seconds <= left))


class Mover:
    """Takes what waits for its time from rung to rung; one for every subscription, as long as its channel lives."""

    def __init__(self, broker: RabbitBroker, queue: str, work: Work) -> None:
        self.work = work
        self._broker = broker
        self._queue = queue
        self._arrived: list[Incoming] = []
        self._news = asyncio.Event()
        self._moving = asyncio.Lock()
        self._tag = ""

    @property
    def waiting(self) -> int:
        """Messages in its hands."""
        return len(self._arrived)

    async def start(self) -> None:
        """Begin to receive."""

        def on_delivery(incoming: Incoming) -> None:
            self.work.took(incoming.delivery_tag)
            self._arrived.append(incoming)
            self._news.set()

        spec = self._broker.specs[self._queue]
        channel = self.work.channel
        _, self._tag = await asyncio.gather(channel.qos(MOVED_AT_ONCE), channel.consume(spec.later, on_delivery))

    async def stop(self) -> None:
        """Receive no more. What is in its hands is put back, uncounted as it is by its header alone."""
        async with self._moving:
            if not self.work.lost:
                await self.work.channel.cancel(self._tag)
                self.work.give_back([each.delivery_tag for each in self._arrived])
            self._arrived = []

    async def purge(self) -> int:
        """Delete what is in its hands; how many."""
        await self.quiet()
        async with self._moving:
            arrived, self._arrived = self._arrived, []
            self.work.ack([each.delivery_tag for each in arrived])
            return len(arrived)

    async def quiet(self) -> None:
        """Return when nothing is on its way from one queue to another."""
        if not self.work.lost:
            await self.work.flush()
        async with self._moving:
            pass

    async def run(self) -> None:
        """The loop."""
        self.work.channel.closed.add_done_callback(lambda _: self._news.set())
        while not self.work.lost:
            await self._news.wait()
            self._news.clear()
            try:
                async with self._moving:
                    soonest = await self._move()
            except (BrokerError, AmqpError) as error:
                log.warning("cannot move what is delayed in %s, trying on: %s", self._queue, error)
                soonest = AGAIN_SECONDS
            if soonest is not None:
                asyncio.get_running_loop().call_later(soonest, self._news.set)

    async def _move(self) -> float | None:
        """Move all that can be moved now; in how many seconds there will be more to do."""
        if not self._arrived:
            return None
        broker, now = self._broker, self._broker.clock()
        spec = broker.specs[self._queue]
        read_all = [(each, broker.read(each, spec)) for each in self._arrived]
        if not spec.rungs and any(what.due - now >= RUNGS[0] for _, what in read_all):
            spec = await broker.raise_ladder(spec)
        moved: list[tuple[Incoming, Arrived, str]] = []
        soonest: float | None = None
        for incoming, what in read_all:
            target = place(spec, what.due, now)
            if target == spec.later:
                soonest = min(what.due - now, soonest or what.due - now)
            else:
                moved.append((incoming, what, target))
        if moved:
            await broker.send([moved_copy(incoming, what, target) for incoming, what, target in moved])
            gone = {incoming.delivery_tag for incoming, _, _ in moved}
            self._arrived = [each for each in self._arrived if each.delivery_tag not in gone]
            self.work.ack(gone)
        return soonest


def moved_copy(incoming: Incoming, what: Arrived, target: str) -> Outgoing:
    """A copy of a message for another queue, counted as it was counted so far; that it was moved counts nothing."""
    notes: dict[str, FieldValue] = {DELIVERIES: what.noted, ATTEMPTS: what.attempts, ERROR: what.error, DUE: what.due}
    return Outgoing("", target, incoming.body, copy_of(incoming, what.message, notes))
