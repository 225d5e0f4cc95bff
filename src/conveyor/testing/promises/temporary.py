"""Promises on temporary queues."""

from __future__ import annotations

from conveyor.broker import Feature
from conveyor.testing.promises.suite import World, promise, texts


@promise("temporary", Feature.TEMPORARY)
async def a_temporary_queue_works_as_any_other(world: World) -> None:
    """While its owner lives, a temporary queue receives what anybody publishes."""
    owner = await world.another()
    queue = await world.queue(temporary=True, by=owner)
    await world.put(queue, *"ab")
    assert texts(await world.take(await world.subscribe(queue, by=owner), 2)) == ["a", "b"]


@promise("temporary", Feature.TEMPORARY)
async def a_temporary_queue_vanishes_with_its_owner(world: World) -> None:
    """When the broker object that declared it closes, a temporary queue is gone: nobody lists it, and its topic has no queue."""
    owner = await world.another()
    queue = await world.queue(temporary=True, by=owner)
    await world.put(queue, "waits")
    await owner.close()
    assert queue.name not in {each.name for each in await world.broker.queues()}
    message = world.message(queue, "late")
    assert await world.broker.publish([message]) == frozenset([message.id])


@promise("temporary", Feature.TEMPORARY)
async def a_temporary_queue_takes_nothing_with_it(world: World) -> None:
    """When its owner closes, the lasting queues of the same owner and topic, and temporary ones of others, stay."""
    owner, topic = await world.another(), world.fresh(".topic")
    await world.queue(topics=[topic], temporary=True, by=owner)
    lasting = await world.queue(topics=[topic], by=owner)
    others = await world.queue(topics=[topic], temporary=True)
    await world.broker.publish([world.message(topic, "a")])
    await owner.close()
    assert await world.broker.publish([world.message(topic, "b")]) == frozenset()
    for queue in (lasting, others):
        assert texts(await world.take(await world.subscribe(queue), 2)) == ["a", "b"]
