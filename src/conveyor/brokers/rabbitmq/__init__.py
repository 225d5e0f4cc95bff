"""The RabbitMQ broker: quorum queues (or classic ones), publisher confirms, and no plugin.

Two connections: one publishes (publisher.py), one consumes (work.py, subscription.py). Leases (held.py) are this object's own promise; a
process that sleeps is cut off by the server's heartbeats, which then gives back what it held.

A message that goes anywhere but away – to be tried again, delayed, dead – is copied there, the copy is confirmed, and only then
the original is acknowledged. The counts travel in the copy's headers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Collection, Coroutine, Mapping, Sequence
from typing import Any, Final

import msgspec

from conveyor.broker import Clock, DeadFilter, DeadLetter, Delivery, Feature, Queue, QueueInfo, Settlement
from conveyor.brokers.rabbitmq import dead
from conveyor.brokers.rabbitmq.address import Options, read_url
from conveyor.brokers.rabbitmq.amqp import AmqpError, Connection, Incoming
from conveyor.brokers.rabbitmq.catalog import Catalog, Turn
from conveyor.brokers.rabbitmq.delay import place
from conveyor.brokers.rabbitmq.envelope import (
    TOPIC,
    Arrived,
    properties_of,
    published,
    read,
    routing_key,
)
from conveyor.brokers.rabbitmq.held import Leases, State
from conveyor.brokers.rabbitmq.link import Link, at_the_seam
from conveyor.brokers.rabbitmq.operating import Operating, old_version
from conveyor.brokers.rabbitmq.order import Keyed
from conveyor.brokers.rabbitmq.publisher import Outgoing, Publisher, told
from conveyor.brokers.rabbitmq.renew import Renewals
from conveyor.brokers.rabbitmq.settle import Settling
from conveyor.brokers.rabbitmq.spec import Spec, check_conflict, merged, spec_of
from conveyor.brokers.rabbitmq.subscription import RabbitSubscription
from conveyor.brokers.rabbitmq.topology import Topology
from conveyor.core.message import Message
from conveyor.core.settle import Release
from conveyor.errors import BrokerError, BrokerFull, BrokerUnavailable, PublishFailed, QueueConflict

__all__ = ["RabbitBroker", "RabbitSubscription", "from_url"]

log: Final = logging.getLogger("conveyor.rabbitmq")

CLOSE_SECONDS: Final = 10.0
"""How long closing may take to give back what is held; the server gives back the rest, counted."""
FAREWELL_SECONDS: Final = 2.0
"""Whoever ends a fetch or a subscription waits for the server's answer, unless it says nothing at all for so long."""
TEMPORARY_AGAIN_SECONDS: Final = 1.0
SHORTEST_HEARTBEAT_SECONDS: Final = 2.0


def from_url(url: str, *, owner: str | None = None, clock: Clock = time.time) -> RabbitBroker:
    """``amqp://user:password@host1:5672,host2/vhost?queue_type=classic``, or ``amqps://…``; see docs/wire-format.md.

    Raises:
        ConfigurationError: the URL has parts that make no sense here.
    """
    return RabbitBroker(read_url(url), owner=owner, clock=clock)


class RabbitBroker:
    """A Broker (see conveyor.broker) on RabbitMQ.

    Parameters:
        owner: names this object; made up where None.
        clock: gives Unix seconds, for due times; leases go by the event loop's own clock.
    """

    def __init__(self, options: Options, *, owner: str | None = None, clock: Clock = time.time) -> None:
        self.owner = owner or uuid.uuid4().hex
        self.clock = clock
        self.options = options
        self.missing: Mapping[Feature, str] = _missing(options.queue_type)
        self.specs: dict[str, Spec] = {}
        """Every queue that this object has heard of."""
        self.absent: set[str] = set()
        """Temporary queues that went with a connection, and are not there again yet."""
        self._settling = Settling(self)
        self._operating = Operating(self)
        self.leases = Leases(self._settling.leases_ended)
        self.subscriptions: set[RabbitSubscription] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._farewells: set[asyncio.Task[None]] = set()
        """Ends that the server was told of, and has not answered."""
        self._heard_last = -1
        """What had been heard when the server was found silent."""
        self.keys: dict[str, Keyed] = {}
        self.positions = dead.Positions()
        self._is_open = False
        self._shortest_lease = math.inf
        name = f"conveyor {self.owner[:8]}"
        self._link: Link[Connection] = Link(options, f"{name} consumes", self._begin, self._heartbeat_seconds)
        self.topology = Topology(self.connection, options.exchange)
        self.publisher = Publisher(
            options, f"{name} publishes", self.topology.prepare, self._heartbeat_seconds, self._rungs_again
        )
        self._catalog = Catalog(
            self.connection,
            self.publisher.send_all,
            f"{options.exchange}.catalog",
            options.replicated,
            Turn(self.spawn),
        )
        self._renewals = Renewals(self, options.consumer_timeout_seconds)
        self._exchanges = frozenset({options.exchange, self.topology.later_exchange})

    # Opening and closing

    @at_the_seam
    async def open(self) -> None:
        """See conveyor.broker.Broker."""
        if self._is_open:
            return
        try:
            await self.publisher.open()
            await self._link.open()
            self._is_open = True
            await self._catalog.open()
            self.spawn(self._renewals.run(), "renewing long deliveries")
        except BaseException:
            self._is_open = False
            await self._link.close()
            await self.publisher.close()
            raise
        if (complaint := old_version(self.topology.version)) is not None:
            log.warning("%s", complaint)

    async def close(self) -> None:
        """See conveyor.broker.Broker."""
        if not self._is_open:
            return
        why = BrokerUnavailable("the broker is closed")
        for subscription in list(self.subscriptions):
            subscription.end(why)
        self.leases.stop()
        try:
            if self._farewells and not await self._answers():
                log.warning("RabbitMQ does not answer: left without a word; what it gives back for that, it counts")
                self._link.give_up("the server did not answer at the end")
                self.publisher.give_up("the server did not answer at the end")
            else:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._take_leave()
        except (TimeoutError, BrokerError, AmqpError) as error:
            log.warning("closed without giving back everything: %s; the server does that, and counts it", error)
        finally:
            self._is_open = False
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            await asyncio.gather(self._link.close(), self.publisher.close())
            await self._settling.close()

    async def _take_leave(self) -> None:
        """Give back what is held, and remove what is only ours."""
        for subscription in list(self.subscriptions):
            await subscription.close()
        if self._farewells:
            await asyncio.wait(self._farewells)
        await self._give_back_all()
        for keyed in self.keys.values():
            await keyed.close()
        for spec in [each for each in self.specs.values() if each.temporary]:
            for queue in (spec.name, spec.later):
                await self.topology.delete(queue)

    async def _answers(self) -> bool:
        """Whether the server says anything at all on the connection that consumes, where that lives."""
        connection = self._link.connection
        if connection is None or connection.closed.done():
            return True
        try:
            async with asyncio.timeout(FAREWELL_SECONDS / 4):
                (await connection.channel()).begin_close()
        except TimeoutError:
            return False
        except AmqpError:
            pass
        return True

    async def _give_back_all(self) -> None:
        held = [each for each in self.leases.all() if each.state is State.HELD]
        if held:
            await self.settle([Settlement(each.delivery(), Release(each.due)) for each in held])

    async def _begin(self, connection: Connection) -> Connection:
        await self.topology.prepare(connection)  # of a server that came back empty; nobody here may publish
        for spec in [each for each in self.specs.values() if each.temporary]:
            self.absent.add(spec.name)
            self.spawn(self._temporary_again(spec.name, connection), f"declaring {spec.name} again")
        return connection

    async def _temporary_again(self, queue: str, connection: Connection) -> None:
        """A temporary queue went with its connection; what waited in it is lost, what comes is not."""

        async def this() -> Connection:
            return connection

        topology = Topology(this, self.options.exchange)
        told = False
        while not connection.closed.done() and (spec := self.specs.get(queue)) is not None:
            try:
                await topology.create(spec, None)
            except QueueConflict:  # the server has not noticed yet that the old connection is dead
                await asyncio.sleep(TEMPORARY_AGAIN_SECONDS)
            except (BrokerError, AmqpError) as error:
                log.log(
                    logging.DEBUG if told else logging.WARNING, "cannot declare %s again, trying on: %s", queue, error
                )
                told = True
                await asyncio.sleep(TEMPORARY_AGAIN_SECONDS)
            else:
                self.absent.discard(queue)
                return

    def _heartbeat_seconds(self) -> float:
        """Half of the shortest lease, so that a process that sleeps past it is cut off in about that time."""
        return min(self.options.heartbeat_seconds, max(SHORTEST_HEARTBEAT_SECONDS, self._shortest_lease / 2))

    async def _beat_for(self, specs: Sequence[Spec]) -> None:
        """Have heartbeats that are quick enough for these, too, while nothing is lost with a connection: they are fixed as it begins."""
        self._shortest_lease = min([self._shortest_lease, *(spec.lease_seconds for spec in specs)])
        settled = self.subscriptions or any(spec.temporary for spec in self.specs.values())
        if not settled and (await self.connection()).heartbeat_seconds > math.ceil(self._heartbeat_seconds()):
            await self._link.leave()

    # What the parts share

    async def connection(self) -> Connection:
        """The living connection that consumes."""
        return await self._link.session()

    def read(self, incoming: Incoming, spec: Spec, nameless: str = "") -> Arrived:
        """The message that arrived in a queue; nameless is the id of one that has none, made up where it is empty."""
        return read(incoming, spec.topics, self._exchanges, self.clock(), nameless)

    def spawn(self, what: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Do something beside; it ends with this object at the latest."""
        task = asyncio.create_task(what, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def farewell(self, what: Coroutine[Any, Any, None], name: str) -> None:
        """Tell the server of an end, and wait until it knows; where it has fallen silent, that goes on beside.

        Once it was waited for in vain, nobody does again before it has said something.
        """
        task = self.spawn(what, name)
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)
        while not task.done():
            before = self._heard
            await asyncio.wait([task], timeout=0.0 if before == self._heard_last else FAREWELL_SECONDS)
            if before == self._heard and not task.done():
                self._heard_last = before
                return
        if not task.cancelled():
            task.result()

    @property
    def _heard(self) -> int:
        """How often the server has said something, on the connections that live."""
        return sum(each.heard for each in (self._link.connection, self.publisher.connection) if each is not None)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s failed: %s", task.get_name(), error)

    def keyed(self, queue: str) -> Keyed:
        """The keys of an ordered queue, as far as they are in this object's hands."""
        keyed = self.keys.get(queue)
        if keyed is None:
            keyed = self.keys[queue] = Keyed(self, queue)
        return keyed

    def forget(self, subscription: RabbitSubscription) -> None:
        """A subscription has closed."""
        self.subscriptions.discard(subscription)

    async def raise_ladder(self, spec: Spec, steps: int) -> Spec:
        """Create the queues that hold what is delayed, up to so many, and tell everybody."""
        if not await self.topology.raise_ladder(spec, steps):
            return spec
        known = self.specs[spec.name]
        self.specs[spec.name] = spec = msgspec.structs.replace(known, steps=max(steps, known.steps))
        if not spec.temporary:
            async with self._catalog.changing() as catalog:
                there = catalog.get(spec.name, spec)
                if steps > there.steps:
                    catalog[spec.name] = msgspec.structs.replace(there, steps=steps, version=there.version + 1)
        return spec

    async def _rungs_again(self, gone: Collection[str]) -> dict[str, str]:
        """Queues of a delay ladder that somebody deleted are declared again; where we may not, what was for them waits beside it."""
        there: dict[str, str] = {}
        for spec in list(self.specs.values()):
            lost = [step for step in range(spec.steps) if spec.rung(step) in gone]
            if not lost or await self.topology.count(spec.later) is None:  # none of ours, or all of the queue is gone
                continue
            raised = await self.topology.raise_ladder(spec, spec.steps)
            if not raised:
                self.specs[spec.name] = msgspec.structs.replace(self.specs[spec.name], steps=lost[0])
            there |= {spec.rung(step): spec.rung(step) if raised else spec.later for step in lost}
        return there

    # Declaring

    @at_the_seam
    async def declare(self, queues: Sequence[Queue]) -> None:
        """See conveyor.broker.Broker."""
        self._check_open()
        specs = [spec_of(queue, self.options.queue_type) for queue in queues]
        lasting = [spec for spec in specs if not spec.temporary]
        await self._beat_for(specs)
        for spec in specs:
            if spec.temporary:
                await self._declare_temporary(spec)
        if not lasting:
            return
        # What is declared again may have been deleted by somebody, and the catalog with it.
        if any(spec.name in self.specs for spec in lasting):
            await self._catalog.open()
        async with self._catalog.changing() as catalog:
            for spec in lasting:
                check_conflict(spec, (catalog if self._catalog.available else self.specs).get(spec.name))
            for spec in lasting:
                there = catalog.get(spec.name)
                combined = merged(spec, there)
                await self.topology.create(spec, there)
                self.specs[spec.name] = catalog[spec.name] = (
                    combined if combined == there else msgspec.structs.replace(combined, version=combined.version + 1)
                )
        await self._renewals.announce([spec.name for spec in lasting])

    async def _declare_temporary(self, spec: Spec) -> None:
        there = self.specs.get(spec.name)
        check_conflict(spec, there)
        combined = merged(spec, there)
        await self.topology.create(combined, there)
        self.specs[spec.name] = combined
        self.absent.discard(spec.name)

    # Publishing

    @at_the_seam
    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        """See conveyor.broker.Broker."""
        self._check_open()
        spec = None if queue is None else await self.known(queue)
        now = self.clock()
        batch = [self.outgoing(message, now, spec) for message in messages]
        fates = await self.publisher.send(batch)
        unrouted, refused, unknown, full = told(messages, fates)
        if len(full) == len(messages) > 0:
            raise BrokerFull(full[0])
        if refused or unknown:
            raise PublishFailed(refused, unknown)
        if unrouted and spec is not None:
            raise BrokerError(f"the queue {spec.name!r} is gone")
        return unrouted

    def outgoing(self, message: Message, now: float, spec: Spec | None, *, mandatory: bool = True) -> Outgoing:
        """A message on its way to the queues of its topic, or to one queue alone."""
        delayed = message.due > now
        if spec is None:
            exchange = self.topology.later_exchange if delayed else self.options.exchange
            return Outgoing(exchange, routing_key(message.topic), message.body, published(message), mandatory)
        properties = properties_of(message, {TOPIC: message.topic})
        if spec.ordered and message.key is not None:
            return Outgoing(spec.keyed, "", message.body, properties, mandatory)
        target = place(spec, message.due, now) if delayed and not spec.passive else spec.name
        return Outgoing("", target, message.body, properties, mandatory)

    # Receiving

    @at_the_seam
    async def subscribe(self, queue: str, prefetch: int, *, early: bool = False) -> RabbitSubscription:
        """See conveyor.broker.Broker."""
        self._check_open()
        await self._beat_for([await self.known(queue, fresh=True)])
        subscription = RabbitSubscription(self, queue, prefetch, early)
        self.subscriptions.add(subscription)
        try:
            await subscription.attach(await self.connection())
        except BaseException:
            await subscription.close()
            raise
        return subscription

    @at_the_seam
    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """See conveyor.broker.Broker."""
        self._check_open()
        return await self._settling.settle(settlements)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """See conveyor.broker.Broker."""
        self._check_open()
        return self._settling.extend(deliveries)

    async def reclaim(self, owner: str, why: str) -> int:  # noqa: ARG002 - the server needs no telling
        """See conveyor.broker.Broker. What a dead process held, the server has given back already."""
        self._check_open()
        return 0

    # What operators need

    @at_the_seam
    async def queues(self) -> list[QueueInfo]:
        """See conveyor.broker.Broker. What is in flight is what this very object holds: AMQP tells no more.

        Of temporary queues only this object's own are known.
        """
        self._check_open()
        return await self._operating.queues()

    @at_the_seam
    async def purge(self, queue: str) -> int:
        """See conveyor.broker.Broker."""
        self._check_open()
        return await self._operating.purge(await self.known(queue, fresh=True))

    @at_the_seam
    async def remove(self, queue: str, *, discard_dead: bool = False) -> None:
        """See conveyor.broker.Broker.

        What others have made stays: a passive queue, an exchange, a dead-letter queue with a name of its own. Conveyor forgets it.
        """
        self._check_open()
        mine = self.specs.get(queue)
        if mine is not None and mine.temporary:
            await self._operating.remove(mine, discard_dead=discard_dead)
        else:
            async with self._catalog.changing() as catalog:
                spec = catalog.get(queue) if self._catalog.available else mine
                if spec is None:
                    raise BrokerError(f"there is no queue {queue!r}; declare it first")
                self.specs[queue] = spec
                await self._operating.remove(spec, discard_dead=discard_dead)
                catalog.pop(queue, None)
        self.specs.pop(queue, None)

    @at_the_seam
    async def dead_letters(self, which: DeadFilter, *, limit: int, after: str | None = None) -> list[DeadLetter]:
        """See conveyor.broker.Broker. Reading takes no letter away, but nobody else can read the same ones meanwhile."""
        self._check_open()
        return await self._operating.dead_letters(which, limit, after or "")

    @at_the_seam
    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """See conveyor.broker.Broker."""
        self._check_open()
        await self._operating.bury(letters)

    @at_the_seam
    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker."""
        self._check_open()
        return await self._operating.redrive(letters)

    @at_the_seam
    async def discard(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker."""
        self._check_open()
        return await self._operating.discard(letters)

    @at_the_seam
    async def risks(self) -> list[str]:
        """See conveyor.broker.Broker."""
        self._check_open()
        await self.connection()
        await self.publisher.probe()
        return [*self._operating.risks(), *await self._renewals.risks()]

    async def all_specs(self) -> list[Spec]:
        """Every queue that there is, fresh from the catalog, and this object's own temporary ones."""
        there = await self._catalog.read()
        self.specs.update(there)
        found = [
            spec for spec in self.specs.values() if spec.temporary or spec.name in there or not self._catalog.available
        ]
        return sorted(found, key=lambda spec: spec.name)

    async def known(self, queue: str, *, fresh: bool = False) -> Spec:
        """A declared queue; fresh looks it up anew."""
        spec = self.specs.get(queue)
        if spec is None or (fresh and not spec.temporary):
            there = await self._catalog.read()
            self.specs.update(there)  # what is gone stays known to whoever has something of it in his hands
            spec = there.get(queue) if self._catalog.available else self.specs.get(queue)
        if spec is None:
            raise BrokerError(f"there is no queue {queue!r}; declare it first")
        return spec

    def _check_open(self) -> None:
        if not self._is_open:
            raise BrokerUnavailable("the RabbitMQ broker is not open")


def _missing(queue_type: str) -> Mapping[Feature, str]:
    missing = {
        Feature.RECLAIM: "RabbitMQ gives back what a dead process held by itself, at once; from a living one nobody can take it",
        Feature.AGE: "AMQP cannot look at a message without delivering it",
    }
    if queue_type != "priority":
        missing[Feature.PRIORITY] = (
            "a queue has priorities, at twice the cost, where it is declared with them (?queue_type=priority)"
        )
    return missing
