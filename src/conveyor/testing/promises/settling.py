"""Promises on settling: each verdict does what it says, once, and what a handler emits is published with its end."""

from __future__ import annotations

from conveyor.broker import DeadFilter, Feature, Settlement
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Dead, Done, Release, RetryAt, Verdict
from conveyor.testing.promises.suite import (
    CLOCKS_DIFFER_SECONDS,
    SOME_DAY_SECONDS,
    World,
    promise,
    same_message,
    text,
    texts,
)

SOON_SECONDS = 0.3


@promise("settling")
async def a_done_message_is_gone(world: World) -> None:
    """What is done is delivered to nobody again, and is no dead letter."""
    queue = await world.queue()
    await world.put(queue, *"abc")
    subscription = await world.subscribe(queue)
    await world.settle(DONE, *await world.take(subscription, 3))
    await subscription.close()
    assert await world.ready(await world.subscribe(queue, by=await world.another()), queue) == []
    assert await world.broker.dead_letters(DeadFilter(queue=queue.name), limit=10) == []


@promise("settling")
async def a_done_publishes_what_it_emits(world: World) -> None:
    """What a handler emits is published with its Done: to every queue of each topic, once, and in order."""
    source, first, second = await world.queue(), await world.queue(), await world.queue()
    both = await world.queue(topics=[first.topics[0], second.topics[0]])
    await world.put(source, "cause")
    held = await world.take(await world.subscribe(source), 1)
    emits = [world.message(first, "1"), world.message(second, "2"), world.message(first, "3")]
    nobody = world.message(world.fresh(".nobody"), "to nobody")
    await world.settle(Done((*emits, nobody)), *held)
    for queue, expected in ((first, ["1", "3"]), (second, ["2"]), (both, ["1", "2", "3"])):
        subscription = await world.subscribe(queue)
        assert texts(await world.take(subscription, len(expected))) == expected
    for queue in (first, second, both):
        rest = await world.ready(await world.subscribe(queue), queue)
        assert rest == [], f"emitted once, received again: {texts(rest)}"


@promise("settling")
async def an_emitted_message_is_whole(world: World) -> None:
    """An emitted message keeps every field, as a published one does."""
    source, target = await world.queue(), await world.queue()
    await world.put(source, "cause")
    held = await world.take(await world.subscribe(source), 1)
    emitted = Message(
        id=world.fresh(),
        topic=target.topics[0],
        body=b"\x00\xff",
        key="k",
        headers={"a": "ä"},
        content_type="application/octet-stream",
        correlation_id="journey",
        causation_id=held[0].message.id,
        created=round(world.now(), 3),
        priority=3,
    )
    await world.settle(Done((emitted,)), *held)
    [received] = await world.take(await world.subscribe(target), 1)
    same_message(received.message, emitted)


@promise("settling")
async def an_emit_wakes_its_receiver(world: World) -> None:
    """A receiver that waits for what a handler emits gets it when the handler's delivery is settled."""
    source, target = await world.queue(), await world.queue()
    await world.put(source, "cause")
    held = await world.take(await world.subscribe(source), 1)
    async with world.waiting(await world.subscribe(target, by=await world.another())) as [fetch]:
        await world.settle(Done((world.message(target, "effect"),)), *held)
    assert texts(fetch.result()) == ["effect"]


@promise("settling")
async def a_second_settlement_is_lost_and_does_nothing(world: World) -> None:
    """Settling a delivery again, whatever the verdict, is reported as lost, publishes nothing and brings nothing back."""
    queue, target = await world.queue(), await world.queue()
    await world.put(queue, "x")
    subscription = await world.subscribe(queue)
    [held] = await world.take(subscription, 1)
    await world.settle(DONE, held)
    again: list[Verdict] = [
        Done((world.message(target, "again"),)),
        RetryAt(0.0, "again"),
        Release(),
        Dead("rejected", "again"),
    ]
    for verdict in again:
        assert await world.broker.settle([Settlement(held, verdict)]) == [held], f"{verdict} was accepted"
    assert await world.broker.extend([held]) == [held], "a settled delivery was extended"
    assert await world.ready(subscription, queue) == []
    assert await world.ready(await world.subscribe(target), target) == []
    assert await world.broker.dead_letters(DeadFilter(queue=queue.name), limit=10) == []


@promise("settling")
async def a_delivery_twice_in_one_batch_is_settled_once(world: World) -> None:
    """Of two settlements of one delivery in one batch the first counts, and the second is lost."""
    queue, target = await world.queue(), await world.queue()
    await world.put(queue, "x")
    [held] = await world.take(await world.subscribe(queue), 1)
    done = Settlement(held, Done((world.message(target, "effect"),)))
    assert await world.broker.settle([done, done]) == [held]
    assert texts(await world.ready(await world.subscribe(target), target)) == ["effect"]


@promise("settling")
async def a_batch_may_mix_verdicts(world: World) -> None:
    """One batch settles deliveries of several queues in every way at once."""
    queue, other, target = await world.queue(), await world.queue(), await world.queue()
    await world.put(queue, "done", "retry", "release", "dead")
    await world.put(other, "done too")
    subscription = await world.subscribe(queue)
    done, retry, release, dead = await world.take(subscription, 4)
    [done_too] = await world.take(await world.subscribe(other), 1)
    settlements = [
        Settlement(done, Done((world.message(target, "effect"),))),
        Settlement(retry, RetryAt(0.0, "failed")),
        Settlement(done_too, DONE),
        Settlement(release, Release()),
        Settlement(dead, Dead("rejected", "no")),
    ]
    assert await world.broker.settle(settlements) == []
    back = {text(each): each for each in await world.take(subscription, 2)}
    assert back.keys() == {"retry", "release"}
    assert (back["retry"].deliveries, back["retry"].attempts, back["retry"].error) == (2, 1, "failed")
    assert (back["release"].deliveries, back["release"].attempts) == (1, 0)
    assert await world.ready(subscription, queue) == []
    assert await world.ready(await world.subscribe(other), other) == []
    assert texts(await world.ready(await world.subscribe(target), target)) == ["effect"]
    [letter] = await world.broker.dead_letters(DeadFilter(queue=queue.name), limit=10)
    assert letter.message.id == dead.message.id


@promise("settling")
async def a_retry_counts_as_an_attempt(world: World) -> None:
    """Every RetryAt counts one attempt, and its error comes with the next delivery."""
    queue = await world.queue()
    await world.put(queue, "x")
    subscription = await world.subscribe(queue)
    for attempt in range(4):
        [held] = await world.take(subscription, 1)
        assert (held.deliveries, held.attempts, held.crashes) == (attempt + 1, attempt, 0)
        assert held.error == (f"failure {attempt}" if attempt else "")
        await world.settle(RetryAt(0.0, f"failure {attempt + 1}", "a trace"), held)


@promise("settling")
async def a_retry_changes_nothing_else(world: World) -> None:
    """A message that is tried again is the same message, in its queue only."""
    topic = world.fresh(".topic")
    queue, other = await world.queue(topics=[topic]), await world.queue(topics=[topic])
    message = Message(id=world.fresh(), topic=topic, body=b"\xff", key="k", headers={"a": "ä"}, created=1.5, priority=2)
    await world.broker.publish([message])
    subscription, others = await world.subscribe(queue), await world.subscribe(other)
    await world.settle(RetryAt(0.0, "again"), *await world.take(subscription, 1))
    [again] = await world.take(subscription, 1)
    same_message(again.message, message)
    assert again.queue == queue.name
    [copy] = await world.take(others, 1)
    assert (copy.deliveries, copy.attempts) == (1, 0)
    assert await world.ready(others, other) == []


@promise("settling", Feature.DELAY)
async def a_retry_comes_when_it_is_due(world: World) -> None:
    """A RetryAt with a time to come waits until then, and lets others pass."""
    queue = await world.queue()
    await world.put(queue, "soon", "some day")
    subscription = await world.subscribe(queue)
    soon, some_day = await world.take(subscription, 2)
    await world.settle(RetryAt(world.now() + SOME_DAY_SECONDS, "x"), some_day)
    due = world.now() + SOON_SECONDS
    await world.settle(RetryAt(due, "x"), soon)
    await world.put(queue, "another")
    assert texts(await world.take(subscription, 1)) == ["another"]
    await world.pass_time(SOON_SECONDS)
    assert texts(await world.take(subscription, 1)) == ["soon"]
    assert world.now() >= due - CLOCKS_DIFFER_SECONDS, "it came before it was due"
    assert await world.ready(subscription, queue) == []


@promise("settling")
async def a_release_does_not_count(world: World) -> None:
    """However often a delivery is released, the next one is again the first, without attempts."""
    queue = await world.queue()
    await world.put(queue, "x")
    subscription = await world.subscribe(queue)
    for _ in range(4):
        [held] = await world.take(subscription, 1)
        assert (held.deliveries, held.attempts, held.crashes) == (1, 0, 0)
        await world.settle(Release(), held)


@promise("settling")
async def a_release_keeps_what_was_counted(world: World) -> None:
    """A release takes back its own delivery only: earlier attempts, and their error, stay."""
    queue = await world.queue()
    await world.put(queue, "x")
    subscription = await world.subscribe(queue)
    await world.settle(RetryAt(0.0, "failed"), *await world.take(subscription, 1))
    await world.settle(Release(), *await world.take(subscription, 1))
    [held] = await world.take(subscription, 1)
    assert (held.deliveries, held.attempts, held.error) == (2, 1, "failed")


@promise("settling")
async def a_release_is_for_anyone(world: World) -> None:
    """What one receiver releases, another one gets, with the count of a first delivery."""
    queue, other = await world.queue(), await world.another()
    await world.put(queue, *"ab")
    releaser = await world.subscribe(queue)
    await world.settle(Release(), *await world.take(releaser, 2))
    await releaser.close()
    received = await world.take(await world.subscribe(queue, by=other), 2)
    assert sorted(texts(received)) == ["a", "b"]
    assert [each.deliveries for each in received] == [1, 1]


@promise("settling", Feature.DELAY)
async def a_release_may_be_put_off(world: World) -> None:
    """A Release with a time to come waits until then, uncounted."""
    queue = await world.queue()
    await world.put(queue, "soon", "some day")
    subscription = await world.subscribe(queue)
    soon, some_day = await world.take(subscription, 2)
    await world.settle(Release(world.now() + SOME_DAY_SECONDS), some_day)
    due = world.now() + SOON_SECONDS
    await world.settle(Release(due), soon)
    await world.pass_time(SOON_SECONDS)
    [back] = await world.take(subscription, 1)
    assert (text(back), back.deliveries) == ("soon", 1)
    assert world.now() >= due - CLOCKS_DIFFER_SECONDS, "it came before it was due"
    assert await world.ready(subscription, queue) == []
