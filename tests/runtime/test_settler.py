from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import pytest

from conveyor.broker import DeadFilter, DeadLetter, Delivery, Queue, Settlement
from conveyor.brokers.memory import MemoryBroker
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Dead, Verdict
from conveyor.runtime.settler import Settler

QUEUE: Final = Queue(name="q", topics=("t",))
NUMBER: Final = 20


class FaultyBroker(MemoryBroker):
    """Raises what no broker should, for as long as it is told so.

    Parameters:
        at_fault: whether these settlements are refused so.
    """

    def __init__(self, at_fault: Callable[[Sequence[Settlement]], bool]) -> None:
        super().__init__()
        self.at_fault = at_fault
        self.calls = 0

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        self.calls += 1
        if self.at_fault(settlements):
            raise RuntimeError("a driver's mistake")
        return await super().settle(settlements)


async def one_delivery(broker: MemoryBroker) -> Delivery:
    """The only message of a broker that is opened for it."""
    await broker.open()
    await broker.declare([QUEUE])
    await broker.publish([Message("1", "t", b"")])
    (delivery,) = await (await broker.subscribe("q", 1)).fetch(1)
    return delivery


async def all_settled(settler: Settler) -> None:
    """Have a settler settle what it has been given."""
    running = asyncio.create_task(settler.run())
    async with asyncio.timeout(60):
        await settler.flush()
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])


async def settled(broker: FaultyBroker) -> tuple[Settler, list[Delivery], list[DeadLetter], int]:
    """What becomes of messages that are settled together: the settler, what it lost, the dead letters, and how many are still held."""
    lost: list[Delivery] = []
    await broker.open()
    try:
        await broker.declare([QUEUE])
        await broker.publish([Message(str(number), "t", b"") for number in range(NUMBER)])
        subscription = await broker.subscribe("q", NUMBER)
        settler = Settler(broker, lost.append)
        for delivery in await subscription.fetch(NUMBER):
            settler.add(delivery, DONE)
        await all_settled(settler)
        (info,) = await broker.queues()
        return settler, lost, await broker.dead_letters(DeadFilter(), limit=NUMBER), info.in_flight
    finally:
        await broker.close()


async def test_a_mistake_of_a_broker_that_passes_costs_nothing() -> None:
    broker = FaultyBroker(lambda _: broker.calls == 1)
    settler, lost, dead, in_flight = await settled(broker)
    assert (lost, dead, in_flight, settler.problem) == ([], [], 0, None)


async def test_a_single_message_survives_a_mistake_of_a_broker_that_passes() -> None:
    broker = FaultyBroker(lambda batch: len(batch) > 1 or broker.calls < 8)
    settler, lost, dead, in_flight = await settled(broker)
    assert (lost, dead, in_flight, settler.problem) == ([], [], 0, None)


async def test_what_the_broker_took_instead_of_a_verdict_is_told() -> None:
    broker = FaultyBroker(lambda batch: any(each.verdict is DONE for each in batch))
    delivery = await one_delivery(broker)
    told: list[tuple[Delivery, Verdict, Dead]] = []
    settler = Settler(broker, lambda _: None, lambda *refused: told.append(refused))
    settler.add(delivery, DONE)
    await all_settled(settler)
    await broker.close()
    why = "the broker refuses what its handler decided: RuntimeError: a driver's mistake"
    assert told == [(delivery, DONE, Dead("rejected", why))]


async def test_only_the_message_that_a_broker_fails_at_becomes_a_dead_letter() -> None:
    broker = FaultyBroker(lambda batch: any(e.delivery.message.id == "7" and e.verdict is DONE for e in batch))
    settler, lost, (letter,), in_flight = await settled(broker)
    assert letter.message.id == "7"
    assert letter.error == "the broker refuses what its handler decided: RuntimeError: a driver's mistake"
    assert (lost, in_flight, settler.problem) == ([], 0, None)


async def test_what_cannot_be_settled_at_all_is_left_to_its_lease_and_holds_up_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = FaultyBroker(lambda batch: any(each.delivery.message.id == "7" for each in batch))
    settler, lost, dead, in_flight = await settled(broker)
    assert [each.message.id for each in lost] == ["7"]
    assert (dead, in_flight, settler.problem) == ([], 1, None)
    assert "message 7 cannot be settled" in caplog.text


async def test_while_a_broker_fails_as_it_should_not_the_problem_is_told() -> None:
    told: list[str | None] = []

    def at_fault(batch: Sequence[Settlement]) -> bool:
        told.append(settler.problem)
        return len(told) < 4

    broker = FaultyBroker(at_fault)
    delivery = await one_delivery(broker)
    settler = Settler(broker, lambda _: None)
    settler.add(delivery, Dead("rejected", "no"))
    await all_settled(settler)
    await broker.close()
    assert told == [None, *["settling fails: RuntimeError: a driver's mistake"] * 3]
    assert settler.problem is None


async def test_what_waits_is_settled_when_the_loop_starts_anew() -> None:
    broken: list[Delivery] = []

    def lost(delivery: Delivery) -> None:
        broken.append(delivery)
        raise RuntimeError("whoever hears of it breaks")

    broker = MemoryBroker()
    delivery = await one_delivery(broker)
    await broker.settle([Settlement(delivery, DONE)])
    settler = Settler(broker, lost)
    settler.add(delivery, DONE)
    with pytest.raises(RuntimeError):
        await settler.run()
    await all_settled(settler)
    await broker.close()
    assert broken == [delivery]
