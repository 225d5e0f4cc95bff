"""Promises on fetching: it waits, wakes, counts, and shares."""

from __future__ import annotations

import asyncio

from conveyor.broker import Delivery
from conveyor.core.settle import DONE, Release, RetryAt
from conveyor.testing.promises.suite import BEGIN_SECONDS, World, cancel, promise, texts

RACES = 50


@promise("fetching")
async def a_fetch_waits_for_a_message(world: World) -> None:
    """A fetch on an empty queue waits, and has the message when one is published."""
    queue = await world.queue()
    async with world.waiting(await world.subscribe(queue)) as [fetch]:
        await world.put(queue, "at last")
    assert texts(fetch.result()) == ["at last"]


@promise("fetching")
async def a_publish_of_another_broker_object_wakes_a_fetch(world: World) -> None:
    """A fetch wakes for what another broker object publishes, as another process would."""
    queue, publisher = await world.queue(), await world.another()
    async with world.waiting(await world.subscribe(queue)) as [fetch]:
        await publisher.publish([world.message(queue, "from afar")])
    assert texts(fetch.result()) == ["from afar"]


@promise("fetching")
async def what_is_given_back_wakes_a_fetch(world: World) -> None:
    """What one receiver releases, or puts back to be tried again at once, a waiting one gets."""
    queue = await world.queue()
    holder, other = await world.subscribe(queue), await world.subscribe(queue, by=await world.another())
    for verdict in (Release(), RetryAt(0.0, "again")):
        await world.put(queue, "x")
        held = await world.take(holder, 1)
        async with world.waiting(other) as [fetch]:
            await world.settle(verdict, *held)
        assert texts(fetch.result()) == ["x"]


@promise("fetching")
async def a_fetch_gives_no_more_than_its_limit(world: World) -> None:
    """A fetch gives at most as many as were asked for; the rest waits for the next one."""
    queue = await world.queue()
    await world.put(queue, *"abcde")
    subscription = await world.subscribe(queue)
    received: list[Delivery] = []
    while len(received) < 5:
        fetched = await subscription.fetch(2)
        assert 1 <= len(fetched) <= 2, f"asked for up to 2, got {len(fetched)}"
        received += fetched
    assert texts(received) == ["a", "b", "c", "d", "e"]


@promise("fetching")
async def a_fetch_does_not_wait_to_be_full(world: World) -> None:
    """A fetch returns what there is; it does not wait until its limit is reached."""
    queue = await world.queue()
    await world.put(queue, "only one")
    subscription = await world.subscribe(queue)
    async with world.patience("a fetch of up to 100 to return the only message"):
        assert texts(await subscription.fetch(100)) == ["only one"]


@promise("fetching")
async def a_receiver_holds_no_more_than_its_prefetch(world: World) -> None:
    """A subscription gives no more than prefetch unsettled deliveries, and goes on when one is settled."""
    queue = await world.queue()
    await world.put(queue, *"abcdef")
    subscription = await world.subscribe(queue, prefetch=3)
    held: list[Delivery] = []
    async with world.patience("three messages"):
        while len(held) < 3:
            held += await subscription.fetch(100)
    assert texts(held) == ["a", "b", "c"]
    async with world.waiting(subscription) as [fetch]:
        await world.settle(DONE, held[0])
    assert texts(fetch.result()) == ["d"]


@promise("fetching")
async def a_first_delivery_counts_one(world: World) -> None:
    """On its first hand-over a message has one delivery, no attempt, no crash and no error."""
    queue = await world.queue()
    await world.put(queue, "x")
    [delivery] = await world.take(await world.subscribe(queue), 1)
    assert (delivery.deliveries, delivery.attempts, delivery.crashes, delivery.error) == (1, 0, 0, "")


@promise("fetching")
async def competing_receivers_get_different_messages(world: World) -> None:
    """Receivers of one queue, of one or of several broker objects, share its messages: each goes to one of them."""
    queue = await world.queue()
    await world.put(queue, *(str(number) for number in range(60)))
    receivers = [await world.subscribe(queue, by=by) for by in (world.broker, world.broker, await world.another())]
    shares = await asyncio.gather(*(world.take(receiver, 20, limit=3) for receiver in receivers))
    assert sorted(int(text) for share in shares for text in texts(share)) == list(range(60))


@promise("fetching")
async def waiting_receivers_share_what_arrives(world: World) -> None:
    """When several receivers wait, and as many messages arrive in one batch, each of them gets one."""
    queue, other = await world.queue(), await world.another()
    receivers = [await world.subscribe(queue, by=by) for by in (world.broker, world.broker, other, other)]
    async with world.waiting(*receivers) as fetches:
        await world.put(queue, *"abcd")
    assert sorted(text for fetch in fetches for text in texts(fetch.result())) == ["a", "b", "c", "d"]


@promise("fetching")
async def what_is_held_is_given_to_nobody_else(world: World) -> None:
    """While a lease lasts, no other receiver gets the message."""
    queue = await world.queue()
    await world.put(queue, *"ab")
    await world.take(await world.subscribe(queue), 2)
    assert await world.ready(await world.subscribe(queue, by=await world.another()), queue) == []


@promise("fetching")
async def a_cancelled_fetch_leaves_nothing_behind(world: World) -> None:
    """A fetch that was cancelled while it waited takes nothing: what comes later goes to others, at their first delivery."""
    queue = await world.queue()
    cancelled = asyncio.create_task((await world.subscribe(queue)).fetch(10))
    await asyncio.sleep(BEGIN_SECONDS)
    await cancel(cancelled)
    await world.put(queue, *"abc")
    received = await world.ready(await world.subscribe(queue, by=await world.another()), queue)
    assert texts(received) == ["a", "b", "c"]
    assert [each.deliveries for each in received] == [1, 1, 1]


@promise("fetching")
async def a_fetch_cancelled_while_a_message_comes_loses_nothing(world: World) -> None:
    """However a cancellation meets a message, the message is returned, or is given to the next fetch, uncounted."""
    queue = await world.queue()
    subscription = await world.subscribe(queue)
    received: list[Delivery] = []
    for race in range(RACES):
        fetch = asyncio.create_task(subscription.fetch(10))
        publish = asyncio.create_task(world.put(queue, str(race)))
        for _ in range(race % 10):
            await asyncio.sleep(0)
        if race % 3 == 2:
            await publish
        await cancel(fetch)
        await publish
        if not fetch.cancelled():
            received += fetch.result()
    received += await world.ready(subscription, queue)
    assert sorted(texts(received), key=int) == [str(race) for race in range(RACES)]
    assert {each.deliveries for each in received} == {1}, "a cancelled fetch was counted"


@promise("fetching")
async def a_closed_subscription_leaves_its_deliveries_held(world: World) -> None:
    """Closing a subscription ends the fetching; what it fetched can still be extended and settled, and goes to nobody else."""
    queue = await world.queue()
    await world.put(queue, *"ab")
    subscription = await world.subscribe(queue)
    held = await world.take(subscription, 2)
    await subscription.close()
    assert await world.ready(await world.subscribe(queue), queue) == []
    assert await world.broker.extend(held) == []
    await world.settle(DONE, *held)


@promise("fetching")
async def a_closed_subscription_takes_no_more(world: World) -> None:
    """What is published after a subscription was closed goes to the others; a closed one keeps nothing from them."""
    queue = await world.queue()
    closed, opened = await world.subscribe(queue), await world.subscribe(queue)
    await closed.close()
    await world.put(queue, *"abcd")
    assert texts(await world.ready(opened, queue)) == ["a", "b", "c", "d"]
