"""Promises on bounded queues."""

from __future__ import annotations

from conveyor.broker import Feature, Queue
from conveyor.core.settle import DONE
from conveyor.testing.promises.suite import LONG_LEASE_SECONDS, World, promise, texts


@promise("bounds", Feature.BOUND)
async def a_full_queue_drops_its_oldest(world: World) -> None:
    """When more wait than may, the oldest go and the newest stay, within a batch and over several."""
    queue = await world.queue(max_length=3)
    await world.put(queue, *"abcde")
    await world.put(queue, "f")
    assert texts(await world.take(await world.subscribe(queue), 3)) == ["d", "e", "f"]
    [info] = [each for each in await world.broker.queues() if each.name == queue.name]
    assert (info.ready, info.in_flight, info.dead) == (0, 3, 0)


@promise("bounds", Feature.BOUND)
async def a_bound_never_drops_what_is_held(world: World) -> None:
    """What a receiver holds does not count as waiting, and is not dropped, however much arrives."""
    queue = await world.queue(max_length=2)
    await world.put(queue, *"ab")
    subscription = await world.subscribe(queue)
    held = await world.take(subscription, 2)
    await world.put(queue, *"cdef")
    assert await world.broker.extend(held) == [], "a delivery was dropped while it was held"
    await world.settle(DONE, *held)
    assert texts(await world.take(subscription, 2)) == ["e", "f"]


@promise("bounds", Feature.BOUND)
async def a_bound_is_of_one_queue(world: World) -> None:
    """A full queue drops its own copies only: the other queues of the topic keep theirs, and nothing is reported."""
    topic = world.fresh(".topic")
    bounded, unbounded = await world.queue(topics=[topic], max_length=1), await world.queue(topics=[topic])
    assert await world.broker.publish([world.message(topic, each) for each in "abc"]) == frozenset()
    assert texts(await world.take(await world.subscribe(unbounded), 3)) == ["a", "b", "c"]
    assert texts(await world.take(await world.subscribe(bounded), 1)) == ["c"]


@promise("bounds", Feature.BOUND)
async def a_bound_follows_the_last_declaration(world: World) -> None:
    """Declared again with another bound, or none, a queue keeps to that."""
    queue = await world.queue(max_length=1)
    for max_length, expected in ((2, ["b", "c"]), (None, ["a", "b", "c"])):
        again = Queue(name=queue.name, topics=queue.topics, max_length=max_length, lease_seconds=LONG_LEASE_SECONDS)
        await world.broker.declare([again])
        await world.put(queue, *"abc")
        subscription = await world.subscribe(queue)
        received = await world.take(subscription, len(expected))
        assert texts(received) == expected
        await world.settle(DONE, *received)
        await subscription.close()
