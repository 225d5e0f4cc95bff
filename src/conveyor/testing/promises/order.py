"""Promises on per-key order: one message of a key at a time, in the order of publishing, whatever happens to it."""

from __future__ import annotations

import asyncio
import itertools

from conveyor.broker import DeadFilter, Delivery, Feature
from conveyor.core.settle import DONE, Dead, Done, Release, RetryAt
from conveyor.testing.promises.suite import LONG_LEASE_SECONDS, SOME_DAY_SECONDS, World, promise, text, texts, work

KEYS = 5
EACH = 12


@promise("order", Feature.ORDER)
async def a_key_has_one_message_out_at_a_time(world: World) -> None:
    """Of one key the oldest message is delivered, and the next one when it is done."""
    queue, other = await world.queue(ordered=True), await world.another()
    await world.put(queue, *"abc", key="k")
    here, there = await world.subscribe(queue), await world.subscribe(queue, by=other)
    for expected in "abc":
        [held] = await world.take(here, 1)
        assert text(held) == expected
        assert await world.ready(there, queue) == [], "a second message of the key was given out"
        await world.settle(DONE, held)
    assert await world.ready(here, queue) == []


@promise("order", Feature.ORDER)
async def a_batch_holds_one_message_of_a_key(world: World) -> None:
    """One fetch of many gives one message of each key."""
    queue = await world.queue(ordered=True)
    await world.broker.publish(
        [world.message(queue, f"{key}{number}", key=key) for number in range(3) for key in "abc"]
    )
    assert sorted(texts(await world.ready(await world.subscribe(queue), queue))) == ["a0", "b0", "c0"]


@promise("order", Feature.ORDER)
async def order_is_kept_over_several_publishes(world: World) -> None:
    """Messages of a key that are published one after the other, by whom ever, come in this order."""
    queue, other = await world.queue(ordered=True), await world.another()
    for number in range(10):
        await (other if number % 2 else world.broker).publish([world.message(queue, str(number), key="k")])
    subscription = await world.subscribe(queue)
    for number in range(10):
        [held] = await world.take(subscription, 1)
        assert text(held) == str(number)
        await world.settle(DONE, held)


@promise("order", Feature.ORDER)
async def keys_do_not_wait_for_each_other(world: World) -> None:
    """While a message of one key is held, the other keys go on."""
    queue = await world.queue(ordered=True)
    await world.put(queue, *"ab", key="held")
    subscription = await world.subscribe(queue)
    await world.take(subscription, 1)
    await world.put(queue, *"cd", key="free")
    for expected in "cd":
        [held] = await world.take(subscription, 1)
        assert text(held) == expected
        await world.settle(DONE, held)


@promise("order", Feature.ORDER)
async def messages_without_a_key_wait_for_nobody(world: World) -> None:
    """In an ordered queue, messages without a key are all delivered at once; an empty key is a key."""
    queue = await world.queue(ordered=True)
    await world.put(queue, "k1", "k2", key="k")
    await world.put(queue, "e1", "e2", key="")
    await world.put(queue, *"abc")
    assert sorted(texts(await world.ready(await world.subscribe(queue), queue))) == ["a", "b", "c", "e1", "k1"]


@promise("order", Feature.ORDER)
async def an_unordered_queue_ignores_keys(world: World) -> None:
    """Without order asked for, messages of one key are delivered side by side; a topic may have queues of both kinds."""
    topic = world.fresh(".topic")
    plain, ordered = await world.queue(topics=[topic]), await world.queue(topics=[topic], ordered=True)
    await world.broker.publish([world.message(topic, each, key="k") for each in "abc"])
    assert texts(await world.ready(await world.subscribe(plain), plain)) == ["a", "b", "c"]
    assert texts(await world.ready(await world.subscribe(ordered), ordered)) == ["a"]


@promise("order", Feature.ORDER, Feature.DELAY)
async def order_is_kept_during_back_off(world: World) -> None:
    """While the oldest of a key waits for its next attempt, the others of the key wait behind it."""
    queue = await world.queue(ordered=True)
    await world.put(queue, *"abc", key="k")
    subscription = await world.subscribe(queue)
    [held] = await world.take(subscription, 1)
    await world.settle(RetryAt(world.now() + world.lease_seconds, "again"), held)
    assert await world.ready(subscription, queue) == [], "a younger message passed the one that waits"
    await world.pass_time(world.lease_seconds)
    for expected, attempts in (("a", 1), ("b", 0), ("c", 0)):
        [held] = await world.take(subscription, 1)
        assert (text(held), held.attempts) == (expected, attempts)
        await world.settle(DONE, held)


@promise("order", Feature.ORDER, Feature.DELAY)
async def a_message_that_is_not_due_holds_its_key(world: World) -> None:
    """Of one key only the oldest is delivered, also where it was published for later."""
    queue = await world.queue(ordered=True)
    await world.broker.publish([world.message(queue, "later", key="k", due=world.now() + SOME_DAY_SECONDS)])
    await world.put(queue, "now", key="k")
    await world.put(queue, "other", key="other")
    assert texts(await world.ready(await world.subscribe(queue), queue)) == ["other"]


@promise("order", Feature.ORDER)
async def order_is_kept_when_a_lease_ends(world: World) -> None:
    """After its receiver died, the oldest of a key comes again, before the others of the key."""
    queue = await world.queue(ordered=True, lease_seconds=world.lease_seconds)
    await world.put(queue, *"ab", key="k")
    await world.take(await world.subscribe(queue), 1)
    await world.with_lease(queue, LONG_LEASE_SECONDS)
    await world.pass_time(world.lease_seconds * 1.1)
    subscription = await world.subscribe(queue, by=await world.another())
    [held] = await world.take(subscription, 1)
    assert (text(held), held.deliveries) == ("a", 2)
    assert await world.ready(subscription, queue) == []


@promise("order", Feature.ORDER)
async def order_is_kept_across_a_release(world: World) -> None:
    """A released message is again the first of its key, and so is one that is tried again at once."""
    queue = await world.queue(ordered=True)
    await world.put(queue, *"abc", key="k")
    subscription = await world.subscribe(queue)
    for verdict in (Release(), RetryAt(0.0, "again"), Release()):
        [held] = await world.take(subscription, 1)
        assert text(held) == "a"
        await world.settle(verdict, held)
    for expected in "abc":
        [held] = await world.take(subscription, 1)
        assert text(held) == expected
        await world.settle(DONE, held)


@promise("order", Feature.ORDER)
async def a_dead_message_frees_its_key(world: World) -> None:
    """When the oldest of a key is given up, the next one is delivered."""
    queue = await world.queue(ordered=True)
    await world.put(queue, *"ab", key="k")
    subscription = await world.subscribe(queue)
    await world.settle(Dead("rejected", "no"), *await world.take(subscription, 1))
    assert texts(await world.take(subscription, 1)) == ["b"]


@promise("order", Feature.ORDER)
async def a_settlement_wakes_the_next_of_its_key(world: World) -> None:
    """A receiver that waits gets the next message of a key when the one before it is done."""
    queue = await world.queue(ordered=True)
    await world.put(queue, *"ab", key="k")
    held = await world.take(await world.subscribe(queue), 1)
    async with world.waiting(await world.subscribe(queue, by=await world.another())) as [fetch]:
        await world.settle(DONE, *held)
    assert texts(fetch.result()) == ["b"]


@promise("order", Feature.ORDER)
async def a_purge_frees_its_keys(world: World) -> None:
    """After a purge, a new message of a purged key is delivered; one that is held still holds its key."""
    queue = await world.queue(ordered=True)
    subscription = await world.subscribe(queue)
    await world.put(queue, *"abc", key="waiting")
    await world.put(queue, *"abc", key="held")
    waiting, held = await world.take(subscription, 2)
    await world.settle(Release(), waiting)
    assert await world.broker.purge(queue.name) == 5
    await world.put(queue, "new", key="waiting")
    await world.put(queue, "new", key="held")
    [new] = await world.ready(subscription, queue)
    assert new.message.key == "waiting"
    await world.settle(DONE, held)
    [new] = await world.take(subscription, 1)
    assert new.message.key == "held"


@promise("order", Feature.ORDER)
async def emitted_messages_are_ordered(world: World) -> None:
    """What handlers emit to an ordered queue is ordered as what is published is."""
    source, target = await world.queue(), await world.queue(ordered=True)
    await world.put(source, "cause")
    held = await world.take(await world.subscribe(source), 1)
    await world.put(target, "1", key="k")
    await world.settle(Done(tuple(world.message(target, each, key="k") for each in "23")), *held)
    await world.put(target, "4", key="k")
    subscription = await world.subscribe(target)
    for expected in "1234":
        received = await world.take(subscription, 1)
        assert texts(received) == [expected]
        await world.settle(DONE, *received)


@promise("order", Feature.ORDER)
async def a_redriven_message_waits_for_its_key(world: World) -> None:
    """A redriven message of a key is not delivered beside another one of its key."""
    queue = await world.queue(ordered=True)
    await world.put(queue, *"ab", key="k")
    subscription = await world.subscribe(queue)
    await world.settle(Dead("rejected", "no"), *await world.take(subscription, 1))
    held = await world.take(subscription, 1)
    letters = await world.broker.dead_letters(DeadFilter(queue=queue.name), limit=10)
    assert await world.broker.redrive(letters) == 1
    assert await world.ready(subscription, queue) == [], "two messages of one key were out at once"
    await world.settle(DONE, *held)
    assert texts(await world.take(subscription, 1)) == ["a"]


@promise("order", Feature.ORDER)
async def order_is_kept_among_many_receivers(world: World) -> None:
    """With many keys and several receivers, which fail and release now and then, each key comes in order, one at a time."""
    queue = await world.queue(ordered=True)
    keys = [f"key {number}" for number in range(KEYS)]
    await world.broker.publish([world.message(queue, str(number), key=key) for number in range(EACH) for key in keys])
    done: dict[str, list[int]] = {key: [] for key in keys}
    out: set[str] = set()
    turns = itertools.count(1)
    finished = asyncio.Event()

    async def handle(delivery: Delivery) -> None:
        key = delivery.message.key or ""
        assert key not in out, f"two messages of {key} were out at once"
        out.add(key)
        await asyncio.sleep(0)
        out.discard(key)
        turn = next(turns)
        if turn % 5 == 0:
            await world.settle(Release() if turn % 2 else RetryAt(0.0, "again"), delivery)
            return
        done[key].append(int(text(delivery)))
        await world.settle(DONE, delivery)
        if sum(map(len, done.values())) == KEYS * EACH:
            finished.set()

    other = await world.another()
    await work(
        world, [await world.subscribe(queue, by=by) for by in (world.broker, world.broker, other)], handle, finished
    )
    assert done == {key: list(range(EACH)) for key in keys}
