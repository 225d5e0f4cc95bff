"""Promises on declaring queues, and on what a broker says of itself."""

from __future__ import annotations

import asyncio

from conveyor.broker import Feature, Queue
from conveyor.errors import MissingFeature, QueueConflict
from conveyor.testing.promises.suite import World, promise, texts


@promise("declaring")
async def declaring_again_changes_nothing(world: World) -> None:
    """A queue may be declared any number of times, by anybody: what is in it, and who holds it, stays."""
    queue, other = await world.queue(), await world.another()
    await world.put(queue, *"ab")
    subscription = await world.subscribe(queue)
    held = await world.take(subscription, 1)
    for broker in (world.broker, other, other):
        await broker.declare([queue, queue])
    assert await world.broker.extend(held) == []
    assert texts(await world.ready(subscription, queue)) == ["b"]


@promise("declaring")
async def declaring_at_the_same_time_is_no_conflict(world: World) -> None:
    """Several processes that start at once may declare the same queues; each message still comes once."""
    topic = world.fresh(".topic")
    queues = [Queue(name=world.fresh(), topics=(topic,)) for _ in range(3)]
    brokers = [world.broker, *[await world.another() for _ in range(3)]]
    await asyncio.gather(*(broker.declare(queues) for broker in brokers))
    await world.broker.publish([world.message(topic, "x")])
    for queue in queues:
        assert texts(await world.ready(await world.subscribe(queue), queue)) == ["x"]


@promise("declaring")
async def topics_are_only_added(world: World) -> None:
    """Declared again with other topics, a queue receives the old and the new ones, from every broker object."""
    queue, other = await world.queue(), await world.another()
    added = world.fresh(".added")
    missed = world.message(added, "before")
    assert await world.broker.publish([missed]) == frozenset([missed.id])
    await other.declare([Queue(name=queue.name, topics=(added,), lease_seconds=queue.lease_seconds)])
    batch = [world.message(queue, "old"), world.message(added, "new")]
    assert await world.broker.publish(batch) == frozenset()
    assert texts(await world.ready(await world.subscribe(queue), queue)) == ["old", "new"]
    [info] = [each for each in await world.broker.queues() if each.name == queue.name]
    assert set(info.topics) == {queue.topics[0], added}


@promise("declaring", Feature.ORDER)
async def a_conflict_names_both_sides(world: World) -> None:
    """A queue that exists with another kind of order is refused, by name and with both sides, and stays as it was."""
    queue = await world.queue(ordered=True)
    clash, fresh = Queue(name=queue.name, topics=queue.topics, ordered=False), Queue(name=world.fresh())
    await world.put(queue, *"ab", key="k")
    told = ""
    try:
        await (await world.another()).declare([clash, fresh])
    except QueueConflict as error:
        told = str(error)
    assert told, "a queue was declared as ordered and as unordered"
    assert queue.name in told, f"the error does not name the queue: {told}"
    assert told.lower().count("order") >= 2, f"the error does not name both sides: {told}"
    assert texts(await world.ready(await world.subscribe(queue), queue)) == ["a"]


@promise("declaring")
async def what_is_missing_is_refused(world: World) -> None:
    """A broker says why it lacks what it lacks, and refuses a queue that asks for it, instead of ignoring the wish."""
    asking = {
        Feature.ORDER: Queue(name=world.fresh(), ordered=True),
        Feature.BOUND: Queue(name=world.fresh(), max_length=1),
        Feature.TEMPORARY: Queue(name=world.fresh(), temporary=True),
    }
    for feature, reason in world.broker.missing.items():
        assert reason.strip(), f"no reason is given why {feature} is missing"
        if feature in asking:
            told = ""
            try:
                await world.broker.declare([asking[feature]])
            except MissingFeature as error:
                told = str(error)
            assert told, f"a queue that needs {feature} was accepted, though it is missing"
            assert asking[feature].name in told, f"the error does not name the queue: {told}"


@promise("declaring")
async def every_broker_object_has_an_owner_of_its_own(world: World) -> None:
    """No two broker objects hold leases under the same name, and the name cannot be guessed."""
    owners = {world.broker.owner, *[(await world.another()).owner for _ in range(3)]}
    assert len(owners) == 4
    assert min(map(len, owners)) >= 16
