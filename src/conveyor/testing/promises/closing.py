"""Promises on closing a broker object."""

from __future__ import annotations

from conveyor.core.settle import DONE, RetryAt
from conveyor.errors import BrokerError
from conveyor.testing.promises.suite import World, promise, texts


@promise("closing")
async def what_a_closed_broker_held_comes_back_uncounted(world: World) -> None:
    """What was fetched and not settled when a broker object closes goes to others at once, and was not delivered."""
    queue, closing = await world.queue(), await world.another()
    await world.put(queue, *"abc")
    leaver = await world.subscribe(queue, by=closing)
    await world.settle(RetryAt(0.0, "failed"), *await world.take(leaver, 1), by=closing)
    await world.take(leaver, 3)
    await closing.close()
    received = await world.take(await world.subscribe(queue), 3)
    assert sorted(
        (text, each.deliveries, each.attempts) for text, each in zip(texts(received), received, strict=True)
    ) == [
        ("a", 2, 1),
        ("b", 1, 0),
        ("c", 1, 0),
    ]


@promise("closing")
async def what_a_closed_broker_settled_stays_settled(world: World) -> None:
    """A settlement that returned before the broker object closed is kept."""
    queue, closing = await world.queue(), await world.another()
    await world.put(queue, *"ab")
    done, _ = await world.take(await world.subscribe(queue, by=closing), 2)
    await world.settle(DONE, done, by=closing)
    await closing.close()
    assert texts(await world.ready(await world.subscribe(queue), queue)) == ["b"]


@promise("closing")
async def closing_touches_nobody_else(world: World) -> None:
    """What other broker objects hold and wait for stays theirs when one closes."""
    queue, idle, closing = await world.queue(), await world.queue(), await world.another()
    await world.put(queue, *"ab")
    held = await world.take(await world.subscribe(queue), 2)
    async with world.waiting(await world.subscribe(idle)) as [fetch]:
        await closing.subscribe(queue.name, 10)
        await closing.close()
        await world.put(idle, "x")
    assert texts(fetch.result()) == ["x"]
    assert await world.broker.extend(held) == []
    await world.settle(DONE, *held)


@promise("closing")
async def a_waiting_fetch_ends_when_its_broker_closes(world: World) -> None:
    """A fetch that waits does not hang when its broker object closes: it raises BrokerError."""
    queue, closing = await world.queue(), await world.another()
    async with world.waiting(await world.subscribe(queue, by=closing)) as [fetch]:
        await closing.close()
    assert isinstance(fetch.exception(), BrokerError), f"it ended with {fetch.exception()!r}"


@promise("closing")
async def closing_twice_is_no_error(world: World) -> None:
    """Subscriptions and broker objects may be closed again, and a subscription after its broker."""
    queue, closing = await world.queue(), await world.another()
    subscription = await world.subscribe(queue, by=closing)
    await subscription.close()
    await subscription.close()
    other = await world.subscribe(queue, by=closing)
    await closing.close()
    await closing.close()
    await other.close()
