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

from conveyor.brokers.rabbitmq.amqp import AmqpError, Connection, FieldValue, Incoming
from conveyor.brokers.rabbitmq.envelope import ATTEMPTS, DELIVERIES, DUE, ERROR, Arrived, copy_of
from conveyor.brokers.rabbitmq.publisher import Outgoing
from conveyor.brokers.rabbitmq.spec import Spec, steps_for
from conveyor.brokers.rabbitmq.work import Work
from conveyor.errors import BrokerError

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq import RabbitBroker

log: Final = logging.getLogger("conveyor.rabbitmq")

MOVED_AT_ONCE: Final = 500
"""Messages in the hands of a mover at most."""
PATIENCE_SECONDS: Final = 3.0
"""How long whoever subscribes waits for the mover to begin."""
AGAIN_SECONDS: Final = 1.0
"""How soon a move that failed is tried again."""


def place(spec: Spec, due: float, now: float) -> str:
    """The queue where a message waits until it is due."""
    left = due - now
    if left <= 0:
        return spec.name
    steps = min(spec.steps, steps_for(left))
    return spec.rung(steps - 1) if steps else spec.later


class Mover:
    """Takes what waits for its time from rung to rung; one for every subscription, as long as its connection lives.

    It has a channel of its own, which may stand still for as long as it likes: a quorum queue without a leader answers nobody, and
    nobody shall wait for ``<queue>.later`` who wants what is in the queue itself.
    """

    def __init__(self, broker: RabbitBroker, queue: str, connection: Connection) -> None:
        self.connection = connection
        self.problem: str | None = None
        """Why nothing is moved now, in words; None while all is well."""
        self.patience_over = False
        """Nobody needs to wait for its beginning any more."""
        self._broker = broker
        self._queue = queue
        self._work: Work | None = None
        self._tag = ""
        self._arrived: list[Incoming] = []
        self._news = asyncio.Event()
        self._begun = asyncio.Event()
        self._moving = asyncio.Lock()
        self._stopped = False

    @property
    def waiting(self) -> int:
        """Messages in its hands."""
        return len(self._arrived)

    async def begun(self) -> None:
        """Return when it receives, or when that takes too long."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self._begun.wait()
        except TimeoutError:
            self._complain(
                f"the server does not answer who wants to consume {self._queue}.later: has that queue a leader?"
            )
        self.patience_over = True

    async def run(self) -> None:
        """The loop."""
        while not self.connection.closed.done() and not self._stopped:
            try:
                work = await self._begin()
                self.problem = None
                self._begun.set()
                await self._attend(work)
            except AmqpError as error:
                self._complain(str(error))
            finally:
                self._begun.set()
                self._drop_channel()
            if not self._stopped:
                self._arrived = []  # the server has taken it back
                await asyncio.sleep(AGAIN_SECONDS)

    def _drop_channel(self) -> None:
        """No consumer stays behind; stop() sees to that itself."""
        if not self._stopped and self._work is not None:
            self._work.channel.begin_close()

    async def stop(self) -> None:
        """Receive no more. What is in its hands is put back, uncounted as it is by its header alone."""
        self._stopped = True
        async with self._moving:
            work, arrived = self._work, self._arrived
            self._arrived = []
            self._news.set()
            if work is None or work.lost:
                return
            if self._tag:
                await work.channel.cancel(self._tag)
                work.give_back([each.delivery_tag for each in arrived])
                await work.channel.close()
            else:
                work.channel.begin_close()  # it waits for an answer, and would wait for this one, too

    async def purge(self) -> int:
        """Delete what is in its hands; how many."""
        await self.quiet()
        async with self._moving:
            arrived, self._arrived = self._arrived, []
            if self._work is not None and not self._work.lost:
                self._work.ack([each.delivery_tag for each in arrived])
            return len(arrived)

    async def quiet(self) -> None:
        """Return when nothing is on its way from one queue to another."""
        if self._work is not None and self._tag and not self._work.lost:
            await self._work.flush()
        async with self._moving:
            pass

    async def _begin(self) -> Work:
        """Receive, on a new channel."""
        channel = await self.connection.channel(patient=True)
        self._tag = ""
        work = self._work = Work(self.connection, channel)

        def on_delivery(incoming: Incoming) -> None:
            work.took(incoming.delivery_tag)
            self._arrived.append(incoming)
            self._news.set()

        later = self._broker.specs[self._queue].later
        consuming = channel.consume(later, on_delivery, on_cancel=lambda _: channel.begin_close())
        _, self._tag = await asyncio.gather(channel.qos(MOVED_AT_ONCE), consuming)
        return work

    async def _attend(self, work: Work) -> None:
        """Move whatever comes, until the channel is gone."""
        work.channel.closed.add_done_callback(lambda _: self._news.set())
        while not work.lost and not self._stopped:
            await self._news.wait()
            self._news.clear()
            try:
                async with self._moving:
                    soonest = await self._move(work)
            except BrokerError as error:
                log.warning("cannot move what is delayed in %s, trying on: %s", self._queue, error)
                soonest = AGAIN_SECONDS
            if soonest is not None:
                asyncio.get_running_loop().call_later(soonest, self._news.set)

    def _complain(self, what: str) -> None:
        if self.problem != what and not self.connection.closed.done() and not self._stopped:
            log.warning("cannot move what is delayed in %s, trying on: %s", self._queue, what)
            self.problem = what

    async def _move(self, work: Work) -> float | None:
        """Move all that can be moved now; in how many seconds there will be more to do."""
        if not self._arrived or work.lost:
            return None
        broker, now = self._broker, self._broker.clock()
        spec = broker.specs[self._queue]
        read_all = [(each, broker.read(each, spec)) for each in self._arrived]
        steps = steps_for(max(what.due for _, what in read_all) - now)
        if steps > spec.steps:
            spec = await broker.raise_ladder(spec, steps)
        moved: list[tuple[Incoming, Arrived, str]] = []
        soonest: float | None = None
        for incoming, what in read_all:
            target = place(spec, what.due, now)
            if target == spec.later:
                soonest = min(what.due - now, soonest or what.due - now)
            else:
                moved.append((incoming, what, target))
        if moved:
            await broker.publisher.send_all([moved_copy(incoming, what, target) for incoming, what, target in moved])
            gone = {incoming.delivery_tag for incoming, _, _ in moved}
            self._arrived = [each for each in self._arrived if each.delivery_tag not in gone]
            work.ack(gone)
        return soonest


def moved_copy(incoming: Incoming, what: Arrived, target: str) -> Outgoing:
    """A copy of a message for another queue, counted as it was counted so far; that it was moved counts nothing."""
    notes: dict[str, FieldValue] = {DELIVERIES: what.noted, ATTEMPTS: what.attempts, ERROR: what.error, DUE: what.due}
    return Outgoing("", target, incoming.body, copy_of(incoming, what.message, notes))
