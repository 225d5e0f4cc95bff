"""Promises on what it takes to leave a broker for another one: everything can be taken out, and put in, as it was."""

from __future__ import annotations

import msgspec

from conveyor.broker import DeadFilter, DeadLetter, Feature, Queue, Subscription
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Dead, Release, RetryAt
from conveyor.errors import BrokerError
from conveyor.testing.promises.operating import info_of
from conveyor.testing.promises.suite import (
    MILLISECOND,
    PREFETCH,
    SOME_DAY_SECONDS,
    World,
    promise,
    same_message,
    text,
    texts,
)

BOUND = 50
LEASE_SECONDS = 77.0


async def early(world: World, queue: Queue) -> Subscription:
    """A receiver of everything that waits in the queue."""
    return await world.broker.subscribe(queue.name, PREFETCH, early=True)


def letter_for(world: World, queue: str, number: int = 0) -> DeadLetter:
    """A dead letter as another broker had it."""
    return DeadLetter(
        position=f"elsewhere-{number}",
        queue=queue,
        message=Message(
            id=world.fresh(),
            topic="a.topic.of.old",
            body=bytes(range(256)),
            key="k",
            headers={"a": "ä"},
            content_type="image/png",
            correlation_id="journey",
            created=round(world.now(), 3) - 1_000,
            priority=3,
        ),
        reason="exhausted",
        error="ValueError: 'Grüße' 100%",
        traceback="line one\nline two",
        deliveries=4,
        attempts=3,
        died=round(world.now(), 3) - 500,
    )


@promise("moving")
async def a_message_for_one_queue_reaches_no_other(world: World) -> None:
    """A message that is published to one queue is received there, whatever its topic, and by no other queue of that topic."""
    topic = world.fresh(".topic")
    one, other = await world.queue(topics=[topic]), await world.queue(topics=[topic])
    known, foreign = world.message(topic, "known"), world.message(world.fresh(".foreign"), "foreign")
    assert await world.broker.publish([known, foreign], queue=one.name) == frozenset()
    received = await world.ready(await world.subscribe(one), one)
    assert texts(received) == ["known", "foreign"]
    same_message(received[1].message, foreign)
    assert await world.ready(await world.subscribe(other), other) == []


@promise("moving")
async def a_message_for_one_queue_wakes_its_receiver(world: World) -> None:
    """A receiver that waits gets what is published to its queue alone."""
    queue = await world.queue()
    async with world.waiting(await world.subscribe(queue, by=await world.another())) as [fetch]:
        await world.broker.publish([world.message(queue, "x")], queue=queue.name)
    assert texts(fetch.result()) == ["x"]


@promise("moving")
async def a_queue_that_does_not_exist_is_refused(world: World) -> None:
    """A message for a queue that nobody declared raises BrokerError; a publish by topic goes on working."""
    queue = await world.queue()
    try:
        await world.broker.publish([world.message(queue, "nowhere")], queue=world.fresh())
    except BrokerError:
        pass
    else:
        raise AssertionError("a message for a queue that does not exist was accepted")
    await world.put(queue, "x")
    assert texts(await world.ready(await world.subscribe(queue), queue)) == ["x"]


@promise("moving", Feature.DELAY)
async def an_early_receiver_gets_what_is_not_due(world: World) -> None:
    """Who receives early gets at once what waits for its time, and learns when that would have come; the others go on waiting."""
    queue, later = await world.queue(), world.now() + SOME_DAY_SECONDS
    await world.broker.publish([world.message(queue, "published", due=later)])
    await world.put(queue, "failed")
    patient = await world.subscribe(queue)
    await world.settle(RetryAt(later + 1, "again"), *await world.take(patient, 1))
    taken = {text(each): each for each in await world.take(await early(world, queue), 2)}
    for name, due in (("published", later), ("failed", later + 1)):
        assert abs(taken[name].message.due - due) <= MILLISECOND, f"{name}: due {taken[name].message.due}, not {due}"
    await world.settle(DONE, *taken.values())
    assert await world.ready(patient, queue) == []
    info = await info_of(world, queue)
    assert (info.ready, info.in_flight, info.delayed) == (0, 0, 0)


@promise("moving", Feature.DELAY)
async def an_early_receiver_is_woken_by_what_is_not_due(world: World) -> None:
    """A message that is published for later wakes who receives early."""
    queue = await world.queue()
    async with world.waiting(await early(world, queue)) as [fetch]:
        await (await world.another()).publish([world.message(queue, "later", due=world.now() + SOME_DAY_SECONDS)])
    assert texts(fetch.result()) == ["later"]


@promise("moving", Feature.DELAY)
async def what_was_taken_early_and_released_waits_for_its_time(world: World) -> None:
    """A message that an early receiver gives back until its due time is delivered then, uncounted."""
    queue, due = await world.queue(), world.now() + world.lease_seconds
    some_day = world.message(queue, "some day", due=world.now() + SOME_DAY_SECONDS)
    await world.broker.publish([world.message(queue, "later", due=due), some_day])
    subscription = await early(world, queue)
    held = await world.take(subscription, 2)
    await subscription.close()
    for each in held:
        await world.settle(Release(each.message.due), each)
    patient = await world.subscribe(queue)
    await world.pass_time(world.lease_seconds)
    [again] = await world.take(patient, 1)
    assert world.now() >= due - MILLISECOND
    assert (text(again), again.deliveries, again.attempts) == ("later", 1, 0)
    assert await world.ready(patient, queue) == []


@promise("moving", Feature.DELAY)
async def what_was_taken_early_and_lost_waits_for_its_time(world: World) -> None:
    """When an early receiver goes without settling, what was not due is not delivered sooner for that."""
    queue, mover = await world.queue(), await world.another()
    await world.broker.publish([world.message(queue, "later", due=world.now() + SOME_DAY_SECONDS)])
    await world.put(queue, "now")
    await world.take(await mover.subscribe(queue.name, PREFETCH, early=True), 2)
    await mover.close()
    assert texts(await world.ready(await world.subscribe(queue), queue)) == ["now"]
    info = await info_of(world, queue)
    assert (info.in_flight, info.delayed) == (1, 1)


@promise("moving", Feature.ORDER)
async def an_early_receiver_gets_a_key_in_its_order(world: World) -> None:
    """Who receives early gets all messages of a key side by side, in the order of publishing."""
    queue = await world.queue(ordered=True)
    await world.broker.publish(
        [world.message(queue, f"{key}{number}", key=key) for number in range(5) for key in ("a", "b")]
    )
    taken = texts(await world.take(await early(world, queue), 10, limit=3))
    for key in "ab":
        assert [each for each in taken if each.startswith(key)] == [f"{key}{number}" for number in range(5)]


@promise("moving", Feature.ORDER)
async def what_was_taken_early_and_left_keeps_its_order(world: World) -> None:
    """When an early receiver settles the first of a key and goes, the next ones come in their order, one at a time."""
    queue, mover = await world.queue(ordered=True), await world.another()
    await world.put(queue, *"abcd", key="k")
    held = await world.take(await mover.subscribe(queue.name, PREFETCH, early=True), 3)
    assert texts(held) == ["a", "b", "c"]
    await world.settle(DONE, held[0], by=mover)
    await mover.close()
    subscription = await world.subscribe(queue)
    for expected in "bcd":
        [delivery] = await world.ready(subscription, queue)
        assert (text(delivery), delivery.deliveries) == (expected, 1)
        await world.settle(DONE, delivery)


@promise("moving")
async def a_dead_letter_from_elsewhere_is_kept_whole(world: World) -> None:
    """Dead letters of another broker are kept whole, behind those that are here, and are counted, redriven and discarded like them."""
    queue = await world.queue()
    await world.put(queue, "here")
    subscription = await world.subscribe(queue)
    await world.settle(Dead("rejected", "no"), *await world.take(subscription, 1))
    brought = [letter_for(world, queue.name, number) for number in range(3)]
    await world.broker.bury(brought)
    assert (await info_of(world, queue)).dead == 4
    first, *found = await world.broker.dead_letters(DeadFilter(queue=queue.name), limit=10)
    assert first.message.body == b"here"
    assert len({each.position for each in (first, *found)}) == 4
    for letter, there in zip(brought, found, strict=True):
        same_message(there.message, letter.message)
        for field in ("queue", "reason", "error", "traceback", "deliveries", "attempts"):
            assert getattr(there, field) == getattr(letter, field), field
        assert abs(there.died - letter.died) <= MILLISECOND
    assert await world.broker.discard(found[:1]) == 1
    assert await world.broker.redrive(found[1:2]) == 1
    [delivery] = await world.take(subscription, 1)
    same_message(delivery.message, brought[1].message)
    assert (delivery.deliveries, delivery.attempts, delivery.error) == (1, 0, "")


@promise("moving")
async def dead_letters_of_an_unknown_queue_are_refused(world: World) -> None:
    """Dead letters of a queue that is not declared here raise BrokerError, and none of the batch is kept."""
    queue = await world.queue()
    try:
        await world.broker.bury([letter_for(world, queue.name), letter_for(world, world.fresh())])
    except BrokerError:
        pass
    else:
        raise AssertionError("a dead letter of a queue that does not exist was accepted")
    assert await world.broker.dead_letters(DeadFilter(queue=queue.name), limit=10) == []


async def declared_as(world: World, queue: Queue) -> None:
    """Fail where the list of queues does not tell how this one was declared."""
    info = await info_of(world, queue)
    for field in ("ordered", "max_length", "temporary", "lease_seconds"):
        assert getattr(info, field) == getattr(queue, field), f"{field}: {getattr(info, field)!r} of {queue}"


@promise("moving")
async def a_queue_tells_how_it_is_declared(world: World) -> None:
    """The list of queues has what it takes to declare each one elsewhere: topics and lease, also of the last declaration."""
    queue = await world.queue(lease_seconds=LEASE_SECONDS)
    await declared_as(world, queue)
    await world.with_lease(queue, LEASE_SECONDS * 2)
    await declared_as(world, msgspec.structs.replace(queue, lease_seconds=LEASE_SECONDS * 2))


@promise("moving", Feature.ORDER)
async def an_ordered_queue_says_so(world: World) -> None:
    """The list of queues tells which are ordered."""
    await declared_as(world, await world.queue(ordered=True))


@promise("moving", Feature.BOUND)
async def a_bounded_queue_tells_its_bound(world: World) -> None:
    """The list of queues tells the bound of the last declaration."""
    queue = await world.queue(max_length=BOUND)
    await declared_as(world, queue)
    wider = msgspec.structs.replace(queue, max_length=BOUND * 2)
    await world.broker.declare([wider])
    await declared_as(world, wider)


@promise("moving", Feature.TEMPORARY)
async def a_temporary_queue_says_so(world: World) -> None:
    """The list of queues tells which are temporary."""
    await declared_as(world, await world.queue(temporary=True))


@promise("moving")
async def risks_are_told_in_sentences(world: World) -> None:
    """risks() tells in words what endangers messages, the same each time, and disturbs nobody."""
    queue = await world.queue()
    risks = await world.broker.risks()
    for risk in risks:
        assert len(risk.split()) > 2, f"{risk!r} does not say what to do"
    assert await world.broker.risks() == risks
    await world.put(queue, "x")
    assert texts(await world.ready(await world.subscribe(queue), queue)) == ["x"]
