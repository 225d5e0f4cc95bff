"""How deliveries end: what a verdict asks for is published and confirmed, and only then the delivery is acknowledged."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
from conveyor.core.words import counted
from conveyor.errors import BrokerError

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq import RabbitBroker
    from conveyor.brokers.rabbitmq.order import Keyed, Place

log: Final = logging.getLogger("conveyor.rabbitmq")

LEASE_ENDED: Final = "its lease ended without a sign of life"


class Settling:
    """Ends and extends deliveries of a broker object, and of others in this process: a receipt knows whose it is."""

    def __init__(self, broker: RabbitBroker) -> None:
        self._broker = broker
        self._finishing: set[asyncio.Task[list[Delivery]]] = set()

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
        before = [(place, place.counts) for held, _ in taken if (place := held.place) is not None]
        back = {h.subscription for h, verdict in taken if isinstance(verdict, RetryAt | Release) and h.place is None}
        try:
            for subscription in back:
                await subscription.stream.rest()
            await self._note(taken)
            await self._publish(taken)
        except BaseException:
            for place, counts in before:
                place.counts = counts
            for held, _ in taken:
                if held.state is State.SETTLING:
                    held.state = State.HELD
                    held.subscription.broker.leases.begin([held], held.seconds)
            raise
        # What is published is published: to its end, even where the caller is cancelled.
        finishing = asyncio.create_task(self._finish(taken), name="finishing settlements")
        self._finishing.add(finishing)
        finishing.add_done_callback(self._finishing.discard)
        return lost + await asyncio.shield(finishing)

    async def close(self) -> None:
        """Return when no settlement is under way any more; the connection is closed, so none waits for it."""
        if self._finishing:
            await asyncio.wait(self._finishing)

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
        back: dict[int, str] = {}
        """The positions of what goes back to the queue that it came from: with that, it is gone as well."""
        for held, verdict in taken:
            if verdict is not DONE:
                for id_, outgoing in self._asked(held, verdict, self._broker.clock()):
                    if isinstance(verdict, Release) and outgoing.routing_key == held.queue:
                        back[len(batch)] = held.queue
                    ids.append(id_)
                    batch.append(outgoing)
        if batch:
            gone = await self._broker.publisher.send_named(ids, batch, back)
            for queue, number in Counter(back[place] for place in gone).items():
                said = counted(number, "message", "messages")
                log.warning("the queue %s was deleted, and with it %s that were to go back into it", queue, said)

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

    async def _note(self, taken: Sequence[tuple[Held, Verdict]]) -> None:
        """Write down how what waits again at its place in an order is counted from now on."""
        by_keyed: dict[Keyed, list[Place]] = {}
        for held, verdict in taken:
            if held.place is None:
                continue
            match verdict:
                case RetryAt(due, error):
                    held.place.counts = (due, held.deliveries, held.attempts + 1, error)
                case Release(due):
                    held.place.counts = (due, held.deliveries - 1, held.attempts, held.error)
                case _:
                    continue
            by_keyed.setdefault(held.subscription.broker.keyed(held.queue), []).append(held.place)
        for keyed, places in by_keyed.items():
            await keyed.note(places)

    async def _finish(self, taken: Sequence[tuple[Held, Verdict]]) -> list[Delivery]:
        """All that was asked for is noted and published: let go of the deliveries; those that were lost meanwhile are returned."""
        lost: list[Delivery] = []
        away: list[Held] = []
        for held, verdict in taken:
            if held.place is None or not isinstance(verdict, RetryAt | Release):
                away.append(held)
                continue
            if not held.subscription.broker.keyed(held.queue).put_back(held.place):
                lost.append(held.delivery())
            end(held)
        try:
            return lost + await self._acknowledge(away)
        finally:
            for held in away:
                end(held)

    async def _acknowledge(self, helds: Sequence[Held]) -> list[Delivery]:
        """Tell the server that these have ended, and wait until it knows; those whose channel went meanwhile are lost."""
        by_work: dict[Work, list[Held]] = {}
        by_keyed: dict[Keyed, list[Place]] = {}
        for held in helds:
            if held.renewing is not None:
                await asyncio.shield(held.renewing)
            if held.place is not None:
                keyed = held.subscription.broker.keyed(held.queue)
                if keyed.renewing is not None:
                    await asyncio.shield(keyed.renewing)
                held.tag = held.place.incoming.delivery_tag
                by_keyed.setdefault(keyed, []).append(held.place)
            by_work.setdefault(held.work, []).append(held)
        lost: list[Delivery] = []
        for work, known in zip(by_work, await _all_told(by_work), strict=True):
            if not known:
                lost += [held.delivery() for held in by_work[work]]
        for keyed, places in by_keyed.items():
            keyed.finish(places)
        return lost

    async def _give_back(self, helds: Sequence[Held]) -> None:
        """Give these back, counted: what has a place waits there again, whether or not that can be noted now."""
        by_keyed: dict[Keyed, list[Place]] = {}
        for held in helds:
            if held.place is not None:
                held.place.counts = (held.place.due, held.deliveries, held.attempts, LEASE_ENDED)
                keyed = self._broker.keyed(held.queue)
                keyed.put_back(held.place)
                by_keyed.setdefault(keyed, []).append(held.place)
        for keyed, places in by_keyed.items():
            try:
                await keyed.note(places)
            except (BrokerError, AmqpError) as error:
                log.warning("cannot note that the leases of %d messages ended: %s", len(places), error)
        helds = [held for held in helds if held.place is None]
        now = self._broker.clock()
        copies = [self._again(held, held.due, now, held.deliveries, held.attempts, LEASE_ENDED) for held in helds]
        try:
            await self._broker.publisher.send_all(copies)
        except BrokerError as error:
            log.warning("cannot say in a copy that %d leases ended; giving back as it is: %s", len(copies), error)
            copied = False
        else:
            copied = True
        for held in helds:
            if held.renewing is not None:
                await asyncio.shield(held.renewing)
            if held.work.lost:
                continue
            if copied:
                held.work.ack([held.tag])
            else:
                held.work.give_back([held.tag])


async def _all_told(by_work: Mapping[Work, Sequence[Held]]) -> list[bool]:
    """Acknowledge, and wait until the server knows; which channels still lived."""

    async def told(work: Work) -> bool:
        try:
            work.ack([held.tag for held in by_work[work]])
            await work.flush()
        except AmqpError:
            return False
        return True

    if len(by_work) == 1:
        return [await told(work) for work in by_work]
    return await asyncio.gather(*map(told, by_work))


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
    if held.state is not State.GONE:
        held.state = State.GONE
        held.subscription.let_go(held)
