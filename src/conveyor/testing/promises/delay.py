"""Promises on due times."""

from __future__ import annotations

from conveyor.broker import Feature
from conveyor.core.settle import DONE, Done
from conveyor.testing.promises.suite import CLOCKS_DIFFER_SECONDS, SOME_DAY_SECONDS, World, promise, texts

SOON_SECONDS = 0.3
A_CENTURY_SECONDS = 100 * 365 * 86_400.0


@promise("delay", Feature.DELAY)
async def a_message_waits_until_it_is_due(world: World) -> None:
    """Nobody receives a message before its due time; a receiver that waits has it then."""
    queue = await world.queue()
    subscription = await world.subscribe(queue)
    due = world.now() + SOON_SECONDS
    await world.broker.publish([world.message(queue, "soon", due=due)])
    async with world.waiting(subscription) as [fetch]:
        await world.pass_time(SOON_SECONDS)
    assert texts(fetch.result()) == ["soon"]
    assert world.now() >= due - CLOCKS_DIFFER_SECONDS, "it came before it was due"


@promise("delay", Feature.DELAY)
async def what_is_not_due_lets_others_pass(world: World) -> None:
    """A message that waits for its time, even one of a higher priority, is not in the way of the others."""
    queue = await world.queue()
    batch = [
        world.message(queue, "some day", due=world.now() + SOME_DAY_SECONDS),
        world.message(queue, "in a century", due=world.now() + A_CENTURY_SECONDS, priority=9),
        world.message(queue, "now"),
    ]
    await world.broker.publish(batch)
    assert texts(await world.ready(await world.subscribe(queue), queue)) == ["now"]


@promise("delay", Feature.DELAY)
async def a_due_time_that_is_over_means_at_once(world: World) -> None:
    """A message that was due before it was published waits for nothing."""
    queue = await world.queue()
    await world.broker.publish(
        [world.message(queue, "late", due=world.now() - SOME_DAY_SECONDS), world.message(queue, "now")]
    )
    assert sorted(texts(await world.ready(await world.subscribe(queue), queue))) == ["late", "now"]


@promise("delay", Feature.DELAY)
async def every_queue_waits_for_a_due_time(world: World) -> None:
    """A message of several queues waits in each of them, and comes in each of them."""
    topic = world.fresh(".topic")
    queues = [await world.queue(topics=[topic]) for _ in range(2)]
    due = world.now() + SOON_SECONDS
    await world.broker.publish([world.message(topic, "soon", due=due)])
    await world.pass_time(SOON_SECONDS)
    for queue in queues:
        assert texts(await world.take(await world.subscribe(queue), 1)) == ["soon"]
        assert world.now() >= due - CLOCKS_DIFFER_SECONDS, "it came before it was due"


@promise("delay", Feature.DELAY)
async def an_emit_may_be_put_off(world: World) -> None:
    """What a handler emits for later comes later."""
    source, target = await world.queue(), await world.queue()
    await world.put(source, "cause")
    held = await world.take(await world.subscribe(source), 1)
    due = world.now() + SOON_SECONDS
    emits = (
        world.message(target, "soon", due=due),
        world.message(target, "some day", due=world.now() + SOME_DAY_SECONDS),
        world.message(target, "now"),
    )
    await world.settle(Done(emits), *held)
    subscription = await world.subscribe(target)
    first = await world.take(subscription, 1)
    assert texts(first) == ["now"]
    await world.settle(DONE, *first)
    await world.pass_time(SOON_SECONDS)
    assert texts(await world.take(subscription, 1)) == ["soon"]
    assert world.now() >= due - CLOCKS_DIFFER_SECONDS, "it came before it was due"
