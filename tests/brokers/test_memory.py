"""What the memory broker does beyond the promises that every broker keeps."""

from __future__ import annotations

import asyncio
import gc
import logging
import time

import pytest

from conveyor.broker import DeadFilter, Delivery, Feature, Queue, Settlement
from conveyor.brokers import from_url
from conveyor.brokers.memory import MemoryBroker, MemoryStore
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Dead, Release, RetryAt
from conveyor.errors import BrokerError, BrokerUnavailable, ConfigurationError, QueueConflict
from conveyor.testing.clock import TurnableClock

QUEUE = Queue(name="q", topics=("t",))


def message(name: str = "m", *, key: str | None = None, due: float = 0.0) -> Message:
    return Message(id=name, topic="t", body=b"", key=key, due=due)


def ids(deliveries: list[Delivery]) -> list[str]:
    return [each.message.id for each in deliveries]


async def opened(*queues: Queue, broker: MemoryBroker | None = None) -> MemoryBroker:
    broker = broker or MemoryBroker()
    await broker.open()
    await broker.declare(queues or [QUEUE])
    return broker


async def test_a_url_without_a_name_has_a_store_of_its_own() -> None:
    one, other = from_url("memory://"), from_url("memory://")
    await one.open()
    await one.declare([QUEUE])
    await other.open()
    assert await other.queues() == []


async def test_broker_objects_of_one_name_share_a_store() -> None:
    one, other = from_url("memory://shared"), from_url("memory://shared", owner="me")
    await one.open()
    await other.open()
    await one.declare([QUEUE])
    await other.publish([message()])
    assert ids(await (await one.subscribe("q", 1)).fetch(1)) == ["m"]
    assert other.owner == "me"


async def test_a_named_store_ends_with_its_last_broker_object() -> None:
    one = from_url("memory://passing")
    await one.open()
    await one.declare([QUEUE])
    await one.close()
    del one
    gc.collect()
    again = from_url("memory://passing")
    await again.open()
    assert await again.queues() == []


@pytest.mark.parametrize("url", ["memory:///path", "memory://name/path", "memory://?size=3", "memory://name#part"])
def test_a_url_with_more_than_a_name_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"memory:// or memory://name"):
        from_url(url)


async def test_it_says_that_it_keeps_nothing() -> None:
    assert list(MemoryBroker().missing) == [Feature.DURABLE]


async def test_closing_tells_how_much_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    broker = await opened()
    await broker.publish([message("a"), message("b")])
    await (await broker.subscribe("q", 10)).fetch(1)
    with caplog.at_level(logging.WARNING, "conveyor.memory"):
        await broker.close()
    assert "2 messages" in caplog.text


async def test_a_broker_that_is_not_open_is_unavailable() -> None:
    broker = MemoryBroker()
    with pytest.raises(BrokerUnavailable, match="not open"):
        await broker.publish([message()])
    with pytest.raises(BrokerUnavailable, match="not open"):
        await broker.declare([QUEUE])


async def test_a_queue_that_nobody_declared_is_an_error_that_names_it() -> None:
    broker = await opened()
    with pytest.raises(BrokerError, match="no queue 'p'; declare it first"):
        await broker.subscribe("p", 1)
    with pytest.raises(BrokerError, match="no queue 'p'"):
        await broker.purge("p")


async def test_a_conflict_declares_none_of_its_queues() -> None:
    broker = await opened()
    with pytest.raises(QueueConflict, match="lasting and not ordered, and is declared as temporary and not ordered"):
        await broker.declare([Queue(name="new"), Queue(name="q", temporary=True)])
    assert [each.name for each in await broker.queues()] == ["q"]


async def test_a_temporary_queue_belongs_to_one_owner() -> None:
    store, temporary = MemoryStore(), Queue(name="tail", topics=("t",), temporary=True)
    await opened(temporary, broker=MemoryBroker(store=store, owner="one"))
    with pytest.raises(QueueConflict, match="belongs to the broker object one, and is declared by two"):
        await opened(temporary, broker=MemoryBroker(store=store, owner="two"))


async def test_a_fetch_of_a_temporary_queue_ends_with_its_owner() -> None:
    store, temporary = MemoryStore(), Queue(name="tail", topics=("t",), temporary=True)
    owner, other = MemoryBroker(store=store), await opened(broker=MemoryBroker(store=store))
    await opened(temporary, broker=owner)
    fetch = asyncio.create_task((await other.subscribe("tail", 1)).fetch(1))
    await asyncio.sleep(0)
    await owner.close()
    with pytest.raises(BrokerUnavailable, match="gone with its owner"):
        await fetch


async def test_turning_the_clock_wakes_a_fetch_without_waiting() -> None:
    clock = TurnableClock()
    broker = await opened(broker=MemoryBroker(clock=clock))
    await broker.publish([message(due=clock() + 86_400)])
    fetch = asyncio.create_task((await broker.subscribe("q", 1)).fetch(1))
    await asyncio.sleep(0)
    clock.turn(86_399)
    broker.clock_turned()
    await asyncio.sleep(0)
    assert not fetch.done()
    clock.turn(1)
    broker.clock_turned()
    assert ids(await fetch) == ["m"]


async def test_a_lease_that_ends_under_a_turned_clock_is_lost() -> None:
    clock = TurnableClock()
    broker = await opened(broker=MemoryBroker(clock=clock))
    await broker.publish([message()])
    subscription = await broker.subscribe("q", 2)
    [held] = await subscription.fetch(1)
    clock.turn(QUEUE.lease_seconds)
    assert await broker.extend([held]) == [held]
    [again] = await subscription.fetch(1)
    assert (again.deliveries, again.crashes, again.error) == (2, 1, "its lease ended without a sign of life")


async def test_an_earlier_time_is_not_missed_by_a_fetch_that_waits_for_a_later_one() -> None:
    broker = await opened()
    await broker.publish([message("late", due=time.time() + 3_600)])
    fetch = asyncio.create_task((await broker.subscribe("q", 1)).fetch(1))
    await asyncio.sleep(0)
    await broker.publish([message("soon", due=time.time() + 0.02)])
    assert ids(await fetch) == ["soon"]


async def test_leases_of_different_lengths_end_each_at_its_time() -> None:
    clock = TurnableClock()
    broker = await opened(Queue(name="q", topics=("t",), lease_seconds=100), broker=MemoryBroker(clock=clock))
    await broker.publish([message("long"), message("short")])
    subscription = await broker.subscribe("q", 10)
    await subscription.fetch(1)
    await broker.declare([Queue(name="q", topics=("t",), lease_seconds=10)])
    await subscription.fetch(1)
    clock.turn(11)
    broker.clock_turned()
    assert ids(await subscription.fetch(10)) == ["short"]


async def test_a_woken_fetch_that_is_cancelled_wakes_the_next_one() -> None:
    broker = await opened()
    first = asyncio.create_task((await broker.subscribe("q", 1)).fetch(1))
    second = asyncio.create_task((await broker.subscribe("q", 1)).fetch(1))
    await asyncio.sleep(0)
    await broker.publish([message()])
    first.cancel()
    assert ids(await second) == ["m"]
    assert first.cancelled()


async def test_a_woken_fetch_whose_subscription_closes_wakes_the_next_one() -> None:
    broker = await opened()
    closing = await broker.subscribe("q", 1)
    first = asyncio.create_task(closing.fetch(1))
    second = asyncio.create_task((await broker.subscribe("q", 1)).fetch(1))
    await asyncio.sleep(0)
    await broker.publish([message()])
    await closing.close()
    assert ids(await second) == ["m"]
    with pytest.raises(BrokerUnavailable, match="closed"):
        await first


async def test_cancelled_fetches_leave_no_trace() -> None:
    broker = await opened()
    subscription = await broker.subscribe("q", 1)
    for _ in range(100):
        fetch = asyncio.create_task(subscription.fetch(1))
        await asyncio.sleep(0)
        fetch.cancel()
        await asyncio.wait([fetch])
    assert not broker.store.queues["q"].waiters


async def test_a_receipt_of_another_store_settles_nothing() -> None:
    one, other = await opened(), await opened()
    for broker in (one, other):
        await broker.publish([message()])
    [held] = await (await one.subscribe("q", 1)).fetch(1)
    assert await other.settle([Settlement(held, DONE)]) == [held]
    assert await one.settle([Settlement(held, DONE)]) == []


async def test_a_bounded_queue_that_nobody_reads_stays_small() -> None:
    broker = await opened(Queue(name="q", topics=("t",), max_length=10, ordered=True))
    for number in range(5_000):
        due = time.time() + 3_600 if number % 3 == 0 else 0.0
        await broker.publish([message(str(number), key=f"k{number % 4}" if number % 2 else None, due=due)])
    queue = broker.store.queues["q"]
    assert len(queue) == 10
    assert sum(len(each) for each in (queue._ready, queue._delayed, queue._oldest)) < 500
    assert len(queue._keys) <= 4


async def test_nothing_is_kept_of_what_is_done() -> None:
    broker = await opened(Queue(name="q", topics=("t",), ordered=True))
    subscription = await broker.subscribe("q", 1_000)
    for number in range(1_000):
        await broker.publish([message(str(number), key=f"k{number}")])
    await broker.settle([Settlement(each, DONE) for each in await subscription.fetch(1_000)])
    queue = broker.store.queues["q"]
    assert not len(queue)
    assert not queue._ready
    assert not queue._keys
    assert not any(queue._leases.values())


async def test_a_dropped_message_lets_the_next_of_its_key_pass() -> None:
    broker = await opened(Queue(name="q", topics=("t",), max_length=2, ordered=True))
    await broker.publish([message(each, key="k") for each in "abc"])
    subscription = await broker.subscribe("q", 10)
    [held] = await subscription.fetch(10)
    assert ids([held]) == ["b"]
    await broker.publish([message(each, key="k") for each in "def"])
    await broker.settle([Settlement(held, DONE)])
    [held] = await subscription.fetch(10)
    assert ids([held]) == ["e"]


async def test_what_comes_back_to_a_full_queue_is_its_oldest() -> None:
    broker = await opened(Queue(name="q", topics=("t",), max_length=2))
    await broker.publish([message("a")])
    subscription = await broker.subscribe("q", 10)
    held = await subscription.fetch(1)
    await broker.publish([message("b"), message("c")])
    await broker.settle([Settlement(each, Release()) for each in held])
    assert ids(await subscription.fetch(10)) == ["b", "c"]


async def test_a_released_message_goes_before_younger_ones() -> None:
    broker = await opened()
    await broker.publish([message(each) for each in "abc"])
    subscription = await broker.subscribe("q", 10)
    a, b, c = await subscription.fetch(3)
    await broker.settle([Settlement(c, Release()), Settlement(a, RetryAt(0.0, "x")), Settlement(b, Release())])
    assert ids(await subscription.fetch(3)) == ["a", "b", "c"]


async def test_redriven_messages_wait_behind_what_is_there() -> None:
    broker = await opened()
    await broker.publish([message("dead"), message("waiting")])
    subscription = await broker.subscribe("q", 10)
    await broker.settle([Settlement(each, Dead("rejected", "no")) for each in await subscription.fetch(1)])
    assert await broker.redrive(await broker.dead_letters(DeadFilter(), limit=10)) == 1
    assert ids(await subscription.fetch(2)) == ["waiting", "dead"]


async def test_dead_letters_of_a_vanished_queue_stay_and_cannot_be_redriven() -> None:
    store = MemoryStore()
    owner, other = MemoryBroker(store=store), await opened(broker=MemoryBroker(store=store))
    await opened(Queue(name="tail", topics=("t",), temporary=True), broker=owner)
    await other.publish([message()])
    held = await (await owner.subscribe("tail", 1)).fetch(1)
    await owner.settle([Settlement(each, Dead("rejected", "no")) for each in held])
    await owner.close()
    letters = await other.dead_letters(DeadFilter(queue="tail"), limit=10)
    assert len(letters) == 1
    assert await other.redrive(letters) == 0
    assert await other.discard(letters) == 1
