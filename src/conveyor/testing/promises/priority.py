"""Promises on priorities."""

from __future__ import annotations

from conveyor.broker import Feature
from conveyor.core.message import PRIORITIES
from conveyor.core.settle import RetryAt
from conveyor.testing.promises.suite import World, promise, text, texts


@promise("priority", Feature.PRIORITY)
async def higher_priorities_come_first(world: World) -> None:
    """Of what waits, the highest of the ten priorities comes first."""
    queue = await world.queue()
    shuffled = [priority * 7 % 10 for priority in PRIORITIES]
    await world.broker.publish([world.message(queue, str(priority), priority=priority) for priority in shuffled])
    received = await world.take(await world.subscribe(queue), len(PRIORITIES), limit=1)
    assert [int(text(each)) for each in received] == sorted(PRIORITIES, reverse=True)


@promise("priority", Feature.PRIORITY)
async def equal_priorities_keep_their_order(world: World) -> None:
    """Among equal priorities the oldest comes first, also over several publishes."""
    queue = await world.queue()
    for round_ in range(3):
        for priority in (0, 5):
            await world.put(queue, f"{priority}.{round_}.a", f"{priority}.{round_}.b", priority=priority)
    received = texts(await world.take(await world.subscribe(queue), 12))
    assert received == [
        f"{priority}.{round_}.{letter}" for priority in (5, 0) for round_ in range(3) for letter in "ab"
    ]


@promise("priority", Feature.PRIORITY)
async def a_retry_keeps_its_priority(world: World) -> None:
    """A message that is tried again goes before what is less important, as at first."""
    queue = await world.queue()
    await world.put(queue, "important", priority=9)
    subscription = await world.subscribe(queue)
    held = await world.take(subscription, 1)
    await world.put(queue, *"abc", priority=1)
    await world.settle(RetryAt(0.0, "again"), *held)
    assert texts(await world.take(subscription, 4, limit=1)) == ["important", "a", "b", "c"]
