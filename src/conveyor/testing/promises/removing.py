"""Promises on removing queues."""

from __future__ import annotations

from conveyor.broker import Broker, DeadFilter, Feature, Queue, Settlement
from conveyor.core.settle import DONE, Dead, Release
from conveyor.errors import BrokerError, QueueInUse
from conveyor.testing.promises.operating import info_of
from conveyor.testing.promises.suite import SOME_DAY_SECONDS, World, promise, texts


async def refused(broker: Broker, queue: Queue, *, discard_dead: bool = False) -> QueueInUse:
    """The error that a removal ends with; the queue is still listed."""
    try:
        await broker.remove(queue.name, discard_dead=discard_dead)
    except QueueInUse as error:
        told = error
    else:
        raise AssertionError("a queue that is in use was removed")
    assert queue.name in str(told), f"the error does not name the queue: {told}"
    assert queue.name in {each.name for each in await broker.queues()}, "a refused removal removed the queue"
    return told


@promise("removing")
async def a_removed_queue_is_gone(world: World) -> None:
    """A removed queue is not listed, nobody can use it, and its topics do not lead to it; other queues of its topic stay."""
    topic, other = world.fresh(".topic"), await world.another()
    queue, alone, stays = [await world.queue(topics=[each]) for each in (topic, world.fresh(".alone"), topic)]
    await other.declare([queue, alone])
    for each in (queue, alone):
        await world.broker.remove(each.name)
    assert {each.name for each in await other.queues()}.isdisjoint([queue.name, alone.name])
    unheard = world.message(alone, "nobody hears it")
    for broker in (world.broker, other):
        assert await broker.publish([world.message(topic, "x")]) == frozenset()
        assert await broker.publish([unheard]) == frozenset([unheard.id])
        told = False
        try:
            await broker.publish([world.message(topic, "for it alone")], queue=queue.name)
        except BrokerError:
            told = True
        assert told, "a removed queue takes messages"
    assert texts(await world.ready(await world.subscribe(stays), stays)) == ["x", "x"]


@promise("removing")
async def a_removed_queue_leaves_nothing_behind(world: World) -> None:
    """What waits in a removed queue, and what somebody still holds of it, does not come back, not even when it is declared again."""
    queue = await world.queue()
    await world.put(queue, *"abc")
    subscription = await world.subscribe(queue)
    held = await world.take(subscription, 2)
    await subscription.close()
    await world.broker.remove(queue.name)
    back, dead = held
    settlements = [Settlement(back, Release()), Settlement(dead, Dead("rejected", "no"))]
    assert await world.broker.settle(settlements) == held, "a delivery of a removed queue was settled"
    await world.broker.declare([queue])
    info = await info_of(world, queue)
    assert (info.ready, info.in_flight, info.delayed, info.dead) == (0, 0, 0, 0)
    await world.put(queue, "new")
    [new] = await world.ready(await world.subscribe(queue), queue)
    assert texts([new]) == ["new"]


@promise("removing", Feature.DELAY)
async def what_is_delayed_goes_with_its_queue(world: World) -> None:
    """What waits for its time in a removed queue does not come, and what is published for later goes nowhere."""
    queue = await world.queue()
    soon, later = world.now() + 0.3, world.now() + SOME_DAY_SECONDS
    await world.broker.publish([world.message(queue, "soon", due=soon), world.message(queue, "later", due=later)])
    [now] = await world.put(queue, "now")
    subscription = await world.subscribe(queue)
    assert (await world.take(subscription, 1))[0].message.id == now.id
    await subscription.close()
    await world.broker.remove(queue.name)
    unheard = world.message(queue, "unheard", due=later)
    assert await world.broker.publish([unheard]) == frozenset([unheard.id])
    await world.broker.declare([queue])
    await world.pass_time(0.4)
    info = await info_of(world, queue)
    assert (info.ready, info.delayed) == (0, 0)
    assert await world.ready(await world.subscribe(queue), queue) == []


@promise("removing", Feature.ORDER)
async def a_removed_queue_holds_no_key(world: World) -> None:
    """A key of which a message was out when its queue was removed is free in the new one, which may be of another kind."""
    queue = await world.queue(ordered=True)
    await world.put(queue, *"ab", key="k")
    subscription = await world.subscribe(queue)
    await world.take(subscription, 1)
    await subscription.close()
    await world.broker.remove(queue.name)
    plain = Queue(name=queue.name, topics=queue.topics, lease_seconds=queue.lease_seconds)
    await world.broker.declare([plain])
    await world.put(queue, *"cd", key="k")
    receiver = await world.subscribe(queue)
    assert texts(await world.take(receiver, 2)) == ["c", "d"]
    await receiver.close()
    await world.broker.remove(queue.name)
    await world.broker.declare([queue])
    await world.put(queue, *"ef", key="k")
    assert texts(await world.ready(await world.subscribe(queue), queue)) == ["e"]


@promise("removing")
async def a_queue_that_is_received_from_stays(world: World) -> None:
    """A queue with live subscriptions is not removed, whoever has them, and keeps what is in it; without them it is."""
    queue, other = await world.queue(), await world.another()
    await world.put(queue, *"ab")
    receiver = await world.subscribe(queue, by=other)
    if (await info_of(world, queue)).consumers is not None:
        assert (await refused(world.broker, queue)).consumers == 1
        assert texts(await world.take(receiver, 2)) == ["a", "b"]
    await receiver.close()
    await world.broker.remove(queue.name)
    assert queue.name not in {each.name for each in await world.broker.queues()}


@promise("removing")
async def dead_letters_keep_their_queue(world: World) -> None:
    """A queue with dead letters is not removed, and what waits in it stays, unless they are to go, too; those of others stay."""
    topic = world.fresh(".topic")
    queue, other = await world.queue(topics=[topic]), await world.queue(topics=[topic])
    await world.broker.publish([world.message(topic, each) for each in "ab"])
    for each in (queue, other):
        subscription = await world.subscribe(each)
        await world.settle(Dead("rejected", "no"), *await world.take(subscription, 1))
        await subscription.close()
    assert (await refused(world.broker, queue)).dead == 1
    receiver = await world.subscribe(queue)
    await world.settle(Release(), *await world.take(receiver, 1))
    await receiver.close()
    await world.broker.remove(queue.name, discard_dead=True)
    assert await world.broker.dead_letters(DeadFilter(queue=queue.name), limit=10) == []
    assert len(await world.broker.dead_letters(DeadFilter(queue=other.name), limit=10)) == 1
    await world.broker.declare([queue])
    assert (await info_of(world, queue)).dead == 0
    await world.settle(DONE, *await world.ready(await world.subscribe(other), other))


@promise("removing")
async def a_queue_that_is_not_there_cannot_be_removed(world: World) -> None:
    """To remove what does not exist is an error that names it: a typing error must not look like success."""
    name, told = world.fresh(), ""
    try:
        await world.broker.remove(name)
    except BrokerError as error:
        told = str(error)
    assert name in told, f"the removal of an unknown queue was no error that names it: {told!r}"
