"""Promises on leases: what a dead or sleeping receiver held comes back and counts, and the sleeper cannot touch it again."""

from __future__ import annotations

import time

from conveyor.broker import DeadFilter, Feature, Settlement
from conveyor.core.settle import DONE, Dead, Done, Release, RetryAt, Verdict
from conveyor.testing.promises.suite import World, promise, texts

EXTENSIONS = 10
TRIES = 10


@promise("leases")
async def an_ended_lease_redelivers_and_counts(world: World) -> None:
    """What a receiver holds without a sign of life goes to another one when its lease ends; the delivery stays counted."""
    queue = await world.queue()
    _, _, [taken] = await world.lose_lease(queue)
    assert (taken.deliveries, taken.attempts, taken.crashes) == (2, 0, 1)


@promise("leases")
async def an_ended_lease_wakes_a_fetch(world: World) -> None:
    """A receiver that waits gets what another one's lease ended on, without anything else happening on the queue."""
    queue = await world.queue(lease_seconds=world.lease_seconds)
    await world.put(queue, "x")
    await world.take(await world.subscribe(queue), 1)
    async with world.waiting(await world.subscribe(queue, by=await world.another())) as [fetch]:
        await world.pass_time(world.lease_seconds * 1.1)
    assert texts(fetch.result()) == ["x"]


@promise("leases")
async def an_extended_lease_holds(world: World) -> None:
    """A receiver that extends in time keeps its deliveries for many times the lease."""
    for _ in range(TRIES):  # again where this very process was held up for so long that it had earned the loss
        queue = await world.queue(lease_seconds=world.lease_seconds)
        await world.put(queue, *"ab")
        subscription, other = await world.subscribe(queue), await world.subscribe(queue, by=await world.another())
        last = time.monotonic()
        held = await world.take(subscription, 2)
        longest = 0.0
        for _ in range(EXTENSIONS):
            await world.pass_time(world.lease_seconds / 4)
            lost = await world.broker.extend(held)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
            if lost:
                break
        stolen = await world.ready(other, queue)
        if max(longest, time.monotonic() - last) > world.lease_seconds * 0.8:
            continue
        assert lost == [], "a lease was lost that was extended in time"
        assert stolen == [], f"given to another receiver, though extended: {texts(stolen)}"
        return
    raise AssertionError(f"this machine is too busy to prove a lease of {world.lease_seconds:g} s")


@promise("leases", Feature.FENCE)
async def a_lost_lease_cannot_be_extended(world: World) -> None:
    """When another receiver has the message, the sleeper's heartbeat is reported as lost, and does not disturb the other."""
    queue = await world.queue()
    lost, other, taken = await world.lose_lease(queue, "ab")
    assert await world.broker.extend(lost) == lost, "a lost lease was extended"
    assert await other.extend(taken) == [], "a lost lease stole the message back"
    await world.settle(DONE, *taken, by=other)


@promise("leases", Feature.FENCE)
async def a_lost_lease_cannot_settle(world: World) -> None:
    """When another receiver has the message, no verdict of the sleeper is accepted, and the other one's is."""
    queue = await world.queue()
    verdicts: list[Verdict] = [DONE, RetryAt(0.0, "late"), Release(), Dead("rejected", "late")]
    lost, other, taken = await world.lose_lease(queue, "abcd")
    late = [Settlement(delivery, verdict) for delivery, verdict in zip(lost, verdicts, strict=True)]
    assert await world.broker.settle(late) == lost, "a lost lease could settle"
    assert await world.ready(await world.subscribe(queue), queue) == [], "a lost lease gave the message back"
    assert await world.broker.dead_letters(DeadFilter(queue=queue.name), limit=10) == []
    await world.settle(RetryAt(0.0, "in time"), *taken, by=other)
    again = await world.take(await world.subscribe(queue), 4)
    assert {(each.deliveries, each.attempts, each.error) for each in again} == {(3, 1, "in time")}


@promise("leases", Feature.FENCE)
async def a_lost_lease_emits_nothing(world: World) -> None:
    """What a sleeper would have emitted with its late Done is not published."""
    queue, target = await world.queue(), await world.queue()
    lost, _, _ = await world.lose_lease(queue)
    assert (
        await world.broker.settle([Settlement(each, Done((world.message(target, "late"),))) for each in lost]) == lost
    )
    assert await world.ready(await world.subscribe(target), target) == []


@promise("leases", Feature.FENCE)
async def only_the_lost_of_a_batch_are_refused(world: World) -> None:
    """In a batch of lost and held deliveries the held ones are settled, and exactly the lost ones reported."""
    queue = await world.queue()
    lost, _, _ = await world.lose_lease(queue, "ab")
    await world.put(queue, *"cd")
    subscription = await world.subscribe(queue)
    held = await world.take(subscription, 2)
    batch = [lost[0], held[0], lost[1], held[1]]
    assert await world.broker.extend(batch) == lost
    assert await world.broker.settle([Settlement(each, DONE) for each in batch]) == lost
    assert await world.ready(subscription, queue) == []


@promise("leases")
async def only_what_is_extended_is_kept(world: World) -> None:
    """A heartbeat is for the deliveries that it names: the leases of the others end."""
    queue = await world.queue(lease_seconds=world.lease_seconds)
    await world.put(queue, "extended", "forgotten")
    extended, _ = await world.take(await world.subscribe(queue), 2)
    await world.with_lease(queue, 300.0)
    if await world.broker.extend([extended]) == []:  # else this process was held up for longer than the lease
        await world.pass_time(world.lease_seconds * 1.1)
        assert texts(await world.take(await world.subscribe(queue, by=await world.another()), 1)) == ["forgotten"]
        await world.settle(DONE, extended)


@promise("leases", Feature.RECLAIM)
async def what_a_dead_owner_held_is_reclaimed_at_once(world: World) -> None:
    """reclaim() gives back everything that an owner held, in every queue, counted, with the reason, and says how much."""
    queue, other = await world.queue(), await world.queue()
    await world.put(queue, *"ab")
    await world.put(other, "c")
    dying = await world.another()
    await world.take(await world.subscribe(queue, by=dying), 2)
    await world.take(await world.subscribe(other, by=dying), 1)
    assert await world.broker.reclaim(dying.owner, "killed by signal 9") == 3
    back = [
        *await world.take(await world.subscribe(queue), 2),
        *await world.take(await world.subscribe(other), 1),
    ]
    assert sorted(texts(back)) == ["a", "b", "c"]
    assert {(each.deliveries, each.attempts, each.crashes, each.error) for each in back} == {
        (2, 0, 1, "killed by signal 9")
    }


@promise("leases", Feature.RECLAIM)
async def a_reclaim_wakes_a_fetch(world: World) -> None:
    """A receiver that waits gets what is reclaimed."""
    queue, dying = await world.queue(), await world.another()
    await world.put(queue, "x")
    await world.take(await world.subscribe(queue, by=dying), 1)
    async with world.waiting(await world.subscribe(queue)) as [fetch]:
        await world.broker.reclaim(dying.owner, "killed")
    assert texts(fetch.result()) == ["x"]


@promise("leases", Feature.RECLAIM)
async def a_reclaim_touches_nobody_else(world: World) -> None:
    """What other owners hold stays theirs; an owner that holds nothing, or that nobody knows, is no error."""
    queue, living, dying = await world.queue(), await world.another(), await world.another()
    await world.put(queue, *"ab")
    held = await world.take(await world.subscribe(queue, by=living), 2)
    assert await world.broker.reclaim(dying.owner, "killed") == 0
    assert await world.broker.reclaim(world.fresh(".nobody"), "killed") == 0
    assert await world.broker.reclaim("", "killed") == 0
    assert await world.ready(await world.subscribe(queue), queue) == []
    await world.settle(DONE, *held, by=living)


@promise("leases", Feature.RECLAIM, Feature.FENCE)
async def a_reclaimed_lease_is_lost(world: World) -> None:
    """An owner that was believed dead can neither settle nor extend what was reclaimed from it."""
    queue, slow = await world.queue(), await world.another()
    await world.put(queue, *"ab")
    held = await world.take(await world.subscribe(queue, by=slow), 2)
    assert await world.broker.reclaim(slow.owner, "believed dead") == 2
    taken = await world.take(await world.subscribe(queue), 2)
    assert await slow.extend(held) == held
    assert await slow.settle([Settlement(each, DONE) for each in held]) == held
    await world.settle(DONE, *taken)


@promise("leases", Feature.RECLAIM)
async def every_crash_counts(world: World) -> None:
    """A message that kills each process that handles it can be told by its crashes, apart from its attempts."""
    queue = await world.queue()
    await world.put(queue, "poison")
    await world.settle(RetryAt(0.0, "failed"), *await world.take(await world.subscribe(queue), 1))
    for crash in range(3):
        dying = await world.another()
        [held] = await world.take(await world.subscribe(queue, by=dying), 1)
        assert (held.attempts, held.crashes) == (1, crash)
        assert await world.broker.reclaim(dying.owner, f"crash {crash + 1}") == 1
    [held] = await world.take(await world.subscribe(queue), 1)
    assert (held.deliveries, held.attempts, held.crashes, held.error) == (5, 1, 3, "crash 3")
