"""Promises on much at the same time: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

from conveyor.broker import Delivery, Settlement
from conveyor.core.settle import DONE, Done, Release, RetryAt
from conveyor.testing.promises.suite import World, promise, text, texts, work

PUBLISHERS = 8
EACH = 40
MANY = 5_000
BATCH = 250


@promise("concurrency")
async def many_publishers_and_receivers_lose_and_double_nothing(world: World) -> None:
    """While many tasks of two broker objects publish and receive at once, each message is handed over and done once."""
    queue, other = await world.queue(), await world.another()
    seen: Counter[str] = Counter()
    finished = asyncio.Event()

    async def publish(number: int) -> None:
        for position in range(EACH):
            await (other if number % 2 else world.broker).publish([world.message(queue, f"{number}.{position}")])

    async def handle(delivery: Delivery) -> None:
        seen[text(delivery)] += 1
        await asyncio.sleep(0)
        await world.settle(DONE, delivery)
        if seen.total() == PUBLISHERS * EACH:
            finished.set()

    receivers = [await world.subscribe(queue, by=by) for by in (world.broker, world.broker, other, other)]
    await asyncio.gather(work(world, receivers, handle, finished), *map(publish, range(PUBLISHERS)))
    assert seen == Counter(f"{number}.{position}" for number in range(PUBLISHERS) for position in range(EACH))
    assert await world.ready(receivers[0], queue) == []


@promise("concurrency")
async def a_chain_of_queues_loses_and_doubles_nothing(world: World) -> None:
    """Each message goes through three queues, emitted from one to the next, with failures and releases between: each arrives once."""
    topics = [world.fresh(".topic") for _ in range(3)]
    first, second, third = [await world.queue(topics=[topic]) for topic in topics]
    arrived: Counter[str] = Counter()
    turns = itertools.count(1)
    finished = asyncio.Event()

    async def handle(delivery: Delivery) -> None:
        turn = next(turns)
        if turn % 4 == 0:
            await world.settle(Release() if turn % 8 else RetryAt(0.0, "again"), delivery)
        elif delivery.queue == third.name:
            arrived[text(delivery)] += 1
            await world.settle(DONE, delivery)
            if arrived.total() == EACH:
                finished.set()
        else:
            target = second if delivery.queue == first.name else third
            effect = world.message(target, text(delivery))
            await world.settle(Done((effect,)), delivery)

    await world.put(first, *(str(number) for number in range(EACH)))
    receivers = [await world.subscribe(queue) for queue in (first, second, third) for _ in range(2)]
    await work(world, receivers, handle, finished)
    assert arrived == Counter(str(number) for number in range(EACH))
    for queue, receiver in zip((first, second, third), receivers[::2], strict=True):
        assert await world.ready(receiver, queue) == []


@promise("concurrency")
async def settling_at_the_same_time_settles_once(world: World) -> None:
    """Of many settlements of one delivery at the same time one is accepted, and what it emits is published once."""
    queue, target = await world.queue(), await world.queue()
    await world.put(queue, "x")
    [held] = await world.take(await world.subscribe(queue), 1)
    effects = [world.message(target, str(number)) for number in range(10)]
    lost = await asyncio.gather(*(world.broker.settle([Settlement(held, Done((effect,)))]) for effect in effects))
    assert sum(map(len, lost)) == len(effects) - 1
    assert len(await world.ready(await world.subscribe(target), target)) == 1


@promise("concurrency")
async def many_messages_go_through(world: World) -> None:
    """Thousands of messages, published, fetched and settled in batches, go through in order, each once."""
    queue = await world.queue()
    for start in range(0, MANY, BATCH):
        await world.put(queue, *(str(number) for number in range(start, start + BATCH)))
    subscription = await world.subscribe(queue, prefetch=BATCH)
    received: list[str] = []
    async with world.patience(f"{MANY} messages", lambda: f"got {len(received)}"):
        while len(received) < MANY:
            deliveries = await subscription.fetch(BATCH)
            received += texts(deliveries)
            await world.settle(DONE, *deliveries)
    assert received == [str(number) for number in range(MANY)]
    assert await world.ready(subscription, queue) == []
