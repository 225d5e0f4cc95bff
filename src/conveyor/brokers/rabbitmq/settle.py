"""How deliveries end: what a verdict asks for is published and confirmed, and only then the delivery is acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from conveyor.broker import Delivery, Settlement
from conveyor.brokers.rabbitmq import dead
from conveyor.brokers.rabbitmq.amqp import AmqpError, FieldValue
from conveyor.brokers.rabbitmq.delay import place
from conveyor.brokers.rabbitmq.envelope import ATTEMPTS, DELIVERIES, DUE, ERROR, copy_of
from conveyor.brokers.rabbitmq.held import Held, State
from conveyor.brokers.rabbitmq.publisher import Outgoing
from conveyor.brokers.rabbitmq.work import Work
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Dead, Done, Release, RetryAt, Verdict
from conveyor.errors import BrokerError

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq import RabbitBroker
    from conveyor.brokers.rabbitmq.order import Keyed, Place

LEASE_ENDED: Final = "its lease ended without a sign of life"


class Settling:
    """Ends and extends deliveries of a broker object, and of others in this process: a receipt knows whose it is."""

    def __init__(self, broker: RabbitBroker) -> None:
        self._broker = broker

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """See conveyor.broker.Broker."""
        self._broker.leases.turn()
        lost: list[Delivery] = []
        taken: list[tuple[Held, Verdict]] = []
        for settlement in settlements:
            held = _held(settlement.delivery)
            if held is None:
                lost.append(settlement.delivery)
            else:
                held.state = State.SETTLING
                taken.append((held, settlement.verdict))
        try:
            await self._publish(taken)
        except BaseException:
            for held, _ in taken:
                held.state = State.HELD
                held.subscription.broker.leases.begin([held], held.seconds)
            raise
        return lost + await self._acknowledge(await self._put_back(taken))

    def extend(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """See conveyor.broker.Broker."""
        self._broker.leases.turn()
        lost: list[Delivery] = []
        for delivery in deliveries:
            held = delivery.receipt
            if _held(delivery) is not None and isinstance(held, Held):
                owner = held.subscription.broker
                owner.leases.begin([held], owner.specs[held.queue].lease_seconds)
            elif not (isinstance(held, Held) and held.state is State.SETTLING):
                lost.append(delivery)
        return lost

    def leases_ended(self, ended: list[Held]) -> None:
        """Nobody extended these: give them back, counted."""
        there = [held for held in ended if held.state is State.HELD]
        for held in there:
            end(held)
        there = [held for held in there if not held.work.lost]
        if there:
            self._broker.spawn(self._give_back(there), "giving back what was not extended")

    async def _publish(self, taken: Sequence[tuple[Held, Verdict]]) -> None:
        """Publish what the verdicts ask for; return when all of it is confirmed."""
        batch: list[Outgoing] = []
        ids: list[str] = []
        for held, verdict in taken:
            if verdict is not DONE:
                for id_, outgoing in self._asked(held, verdict, self._broker.clock()):
                    ids.append(id_)
                    batch.append(outgoing)
        if batch:
            await self._broker.publisher.send_named(ids, batch)

    def _asked(self, held: Held, verdict: Verdict, now: float) -> list[tuple[str, Outgoing]]:
        """What a verdict has published, each with the id that it is known by."""
        spec = held.subscription.broker.specs[held.queue]
        match verdict:
            case Done(emits):
                return [(message.id, self._emitted(message, now)) for message in emits]
            case Dead():
                letter = dead.letter_of(held, spec, verdict, self._broker.positions.next(now), now)
                return [(held.message.id, letter)]
            case _ if held.place is not None:  # it waits where it is
                return []
            case RetryAt(due, error):
                copy = self._again(held, due, now, held.deliveries, held.attempts + 1, error)
            case Release(due):
                copy = self._again(held, due, now, held.deliveries - 1, held.attempts, held.error)
        return [(held.message.id, copy)]

    def _emitted(self, message: Message, now: float) -> Outgoing:
        return self._broker.outgoing(message, now, None, mandatory=False)

    @staticmethod
    def _again(held: Held, due: float, now: float, deliveries: int, attempts: int, error: str) -> Outgoing:
        spec = held.subscription.broker.specs[held.queue]
        target = spec.name if spec.passive else place(spec, due, now)
        notes: dict[str, FieldValue] = {DELIVERIES: deliveries, ATTEMPTS: attempts, ERROR: error, DUE: due}
        return Outgoing("", target, held.incoming.body, copy_of(held.incoming, held.message, notes))

    async def _acknowledge(self, helds: Sequence[Held]) -> list[Delivery]:
        """Tell the server that these have ended, and wait until it knows; those whose channel went meanwhile are lost."""
        by_work: dict[Work, list[Held]] = {}
        for held in helds:
            if held.renewing is not None:
                await asyncio.shield(held.renewing)
            if held.place is not None:
                renewing = held.subscription.broker.keyed(held.queue).renewing
                if renewing is not None:
                    await asyncio.shield(renewing)
                held.tag = held.place.incoming.delivery_tag
            by_work.setdefault(held.work, []).append(held)
        lost: list[Delivery] = []
        for work, those in by_work.items():
            try:
                work.ack([held.tag for held in those])
                await work.flush()
            except AmqpError:
                lost += [held.delivery() for held in those]
        by_keyed: dict[Keyed, list[Place]] = {}
        for held in helds:
            end(held)
            if held.place is not None:
                by_keyed.setdefault(held.subscription.broker.keyed(held.queue), []).append(held.place)
        for keyed, places in by_keyed.items():
            keyed.finish(places)
        return lost

    async def _put_back(self, taken: Sequence[tuple[Held, Verdict]]) -> list[Held]:
        """Let what has its place in an order wait there again; the others are returned."""
        others: list[Held] = []
        by_keyed: dict[Keyed, list[Place]] = {}
        for held, verdict in taken:
            if held.place is None or not isinstance(verdict, RetryAt | Release):
                others.append(held)
                continue
            keyed = held.subscription.broker.keyed(held.queue)
            if isinstance(verdict, RetryAt):
                keyed.put_back(held.place, verdict.due, held.deliveries, held.attempts + 1, verdict.error)
            else:
                keyed.put_back(held.place, verdict.due, held.deliveries - 1, held.attempts, held.error)
            by_keyed.setdefault(keyed, []).append(held.place)
            end(held)
        for keyed, places in by_keyed.items():
            await keyed.note(places)
        return others

    async def _give_back(self, helds: Sequence[Held]) -> None:
        for held in helds:
            if held.place is not None:
                keyed = self._broker.keyed(held.queue)
                keyed.put_back(held.place, held.place.due, held.deliveries, held.attempts, LEASE_ENDED)
                await keyed.note([held.place])
        helds = [held for held in helds if held.place is None]
        now = self._broker.clock()
        copies = [self._again(held, held.due, now, held.deliveries, held.attempts, LEASE_ENDED) for held in helds]
        try:
            await self._broker.publisher.send_all(copies)
        except BrokerError:
            for held in helds:
                if not held.work.lost:
                    held.work.give_back([held.tag])
            raise
        for held in helds:
            if held.renewing is not None:
                await asyncio.shield(held.renewing)
            if not held.work.lost:
                held.work.ack([held.tag])


def _held(delivery: Delivery) -> Held | None:
    """What a receipt stands for, if it still holds."""
    held = delivery.receipt
    if not isinstance(held, Held) or held.state is not State.HELD:
        return None
    if held.work.lost:
        end(held)
        return None
    return held


def end(held: Held) -> None:
    """It is in our hands no more."""
    held.state = State.GONE
    held.subscription.let_go(held)
