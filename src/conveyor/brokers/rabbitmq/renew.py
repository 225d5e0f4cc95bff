"""Deliveries that outlive the server's consumer_timeout: renewed well before, without the receiver noticing.

RabbitMQ closes the channel of a consumer that keeps a delivery unsettled for too long (30 minutes unless set otherwise; AMQP does not
tell), and gives everything on it to others. So a copy of what is still being handled goes into a queue of this object's own, comes from
there to us, and takes the place of the original, which is acknowledged. Should this process die, the copy's time in that queue is over,
and the server routes it back to where it came from.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from conveyor.brokers.rabbitmq.amqp import AmqpError, FieldValue, Incoming
from conveyor.brokers.rabbitmq.envelope import ATTEMPTS, DELIVERIES, DUE, ERROR, RENEWED, copy_of, properties_or_none
from conveyor.brokers.rabbitmq.held import Held, State
from conveyor.brokers.rabbitmq.publisher import Outgoing
from conveyor.brokers.rabbitmq.spec import Spec
from conveyor.brokers.rabbitmq.work import Work
from conveyor.errors import BrokerError

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq import RabbitBroker

log: Final = logging.getLogger("conveyor.rabbitmq")

CHECKS_PER_TIMEOUT: Final = 8
RENEWED_AT: Final = 0.5
"""Share of the time-out after which a delivery is renewed."""
RETURN_SECONDS: Final = 60.0
"""How long a copy may take to us; and after our death, to be back in its queue at the latest."""
UNUSED_SECONDS: Final = 3_600.0
"""When a queue of copies without consumer is deleted: its messages are back where they belong by then."""
DIED: Final = "its process died, or lost the connection, while it was handled for long"


class Renewals:
    """Renews what this broker object holds for long."""

    def __init__(self, broker: RabbitBroker, timeout_seconds: float) -> None:
        self._broker = broker
        self._timeout_seconds = timeout_seconds
        self._expected: dict[str, asyncio.Future[Incoming]] = {}
        self._consuming: dict[str, Work] = {}
        self._work: Work | None = None
        self._allowed: dict[str, bool] = {}
        """Of which queues we may create the queue of copies, as far as that was asked."""
        self._looked = False

    async def announce(self, queues: Sequence[str]) -> None:
        """Say at the start where what takes long cannot be renewed."""
        if refused := await self._refused(queues):
            log.warning("%s", self._risk(refused))

    async def risks(self) -> list[str]:
        """The same, of all that was declared here; of every queue there is where nothing was, as for an operator."""
        queues = list(self._allowed)
        if not queues and not self._looked:
            self._looked = True  # once: the catalog is for one at a time
            queues = [spec.name for spec in await self._broker.all_specs() if not spec.temporary]
        refused = await self._refused(queues)
        return [self._risk(refused)] if refused else []

    async def _refused(self, queues: Sequence[str]) -> list[str]:
        for queue in queues:
            if not self._allowed.get(queue):
                name = f"{queue}.held.{uuid.uuid4().hex}"  # like ours, which may be in use
                self._allowed[queue] = await self._broker.topology.may_create(name)
        return sorted(queue for queue in queues if not self._allowed[queue])

    def _risk(self, queues: Sequence[str]) -> str:
        return (
            f"{self._broker.options.addresses[0].user!r} may not create the queues that long deliveries are renewed with "
            f"(NAME.held.…), of: {', '.join(queues)}. What is handled there for longer than the server's consumer_timeout "
            f"({self._timeout_seconds:g} s) is given to others meanwhile: it runs several times, and its settlement is lost. "
            "Give this user the permission to configure these names, or raise consumer_timeout on the server and in the URL."
        )

    async def run(self) -> None:
        """The loop."""
        while True:
            await asyncio.sleep(self._timeout_seconds / CHECKS_PER_TIMEOUT)
            oldest = asyncio.get_running_loop().time() - self._timeout_seconds * RENEWED_AT
            await self._renew_ordered(oldest)
            by_queue: dict[str, list[Held]] = {}
            for held in self._broker.leases.all():
                if held.since < oldest and held.state is State.HELD and not held.work.lost and held.place is None:
                    by_queue.setdefault(held.queue, []).append(held)
            for queue, helds in by_queue.items():
                try:
                    await self._renew(self._broker.specs[queue], helds)
                except (BrokerError, AmqpError, TimeoutError) as error:
                    log.warning("cannot renew %d long deliveries of %s, trying on: %s", len(helds), queue, error)

    async def _renew_ordered(self, oldest: float) -> None:
        for keyed in list(self._broker.keys.values()):
            try:
                await keyed.renew(oldest)
            except (BrokerError, AmqpError) as error:
                log.warning("cannot renew what is handled for long, trying on: %s", error)

    async def _renew(self, spec: Spec, helds: Sequence[Held]) -> None:
        loop = asyncio.get_running_loop()
        queue, work = await self._own_queue(spec)
        # Whoever settles one from here on waits for its new delivery tag: what was settled until now may not be copied any more.
        helds = [held for held in helds if held.state is State.HELD and not held.work.lost]
        if not helds:
            return
        names = [uuid.uuid4().hex for _ in helds]
        arrivals = [loop.create_future() for _ in helds]
        over = loop.create_future()
        self._expected.update(zip(names, arrivals, strict=True))
        for held in helds:
            held.renewing = over
        try:
            await self._broker.publisher.send_all(
                [self._copy(held, queue, name) for held, name in zip(helds, names, strict=True)]
            )
            async with asyncio.timeout(RETURN_SECONDS / 2):
                await asyncio.wait(arrivals)
        finally:
            for held, name, arrival in zip(helds, names, arrivals, strict=True):
                self._expected.pop(name, None)
                if arrival.done() and not arrival.cancelled():
                    self._swap(held, work, arrival.result())
                held.renewing = None
            over.set_result(None)

    def _swap(self, held: Held, work: Work, copy: Incoming) -> None:
        """The copy is what is held from now on."""
        if work.lost:
            return
        if held.state is State.GONE or held.work.lost:  # nobody has it any more, or the server has the original back
            work.ack([copy.delivery_tag])
            return
        old_work, old = held.work, held.tag
        held.work, held.tag, held.incoming = work, copy.delivery_tag, copy
        held.since = asyncio.get_running_loop().time()
        old_work.ack([old])
        log.info("renewed the delivery of message %s in %s, which takes long", held.message.id, held.queue)

    def _copy(self, held: Held, queue: str, name: str) -> Outgoing:
        notes: dict[str, FieldValue] = {
            DELIVERIES: held.deliveries,
            ATTEMPTS: held.attempts,
            ERROR: DIED,
            DUE: held.due,
            RENEWED: name,
        }
        return Outgoing("", queue, held.incoming.body, copy_of(held.incoming, held.message, notes))

    async def _own_queue(self, spec: Spec) -> tuple[str, Work]:
        """The queue of copies, consumed by us on a channel."""
        queue = f"{spec.name}.held.{self._broker.owner}"
        connection = await self._broker.connection()
        work = self._work
        if work is None or work.lost or work.connection is not connection:
            work = self._work = Work(connection, await connection.channel())
        if self._consuming.get(queue) is not work:
            await self._broker.topology.create_held(spec, queue, RETURN_SECONDS, UNUSED_SECONDS)

            def on_delivery(incoming: Incoming) -> None:
                work.took(incoming.delivery_tag)
                name = (properties_or_none(incoming).headers or {}).get(RENEWED)
                expected = self._expected.get(name) if isinstance(name, str) else None
                if expected is not None and not expected.done():
                    expected.set_result(incoming)
                elif self._consuming.get(queue) is work and not incoming.redelivered:
                    work.ack([incoming.delivery_tag])  # too late: the original is still in our hands
                else:
                    self._broker.spawn(self._back(work, spec, incoming), "giving back what an earlier connection held")

            await asyncio.gather(work.channel.qos(0), work.channel.consume(queue, on_delivery))
            self._consuming[queue] = work
        return queue, work

    async def _back(self, work: Work, spec: Spec, incoming: Incoming) -> None:
        what = self._broker.read(incoming, spec)
        notes: dict[str, FieldValue] = {DELIVERIES: what.noted, ATTEMPTS: what.attempts, ERROR: DIED, DUE: what.due}
        await self._broker.publisher.send_all(
            [Outgoing("", spec.name, incoming.body, copy_of(incoming, what.message, notes))]
        )
        work.ack([incoming.delivery_tag])
