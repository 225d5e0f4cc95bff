"""Promises on what operators see and do."""

from __future__ import annotations

from conveyor.broker import DeadFilter, Feature, Queue, QueueInfo
from conveyor.core.settle import DONE, Dead, Release
from conveyor.testing.promises.suite import SOME_DAY_SECONDS, World, promise, text, texts


async def info_of(world: World, queue: Queue) -> QueueInfo:
    """The figures of one queue."""
    [info] = [each for each in await world.broker.queues() if each.name == queue.name]
    return info


@promise("operating")
async def every_queue_is_listed(world: World) -> None:
    """queues() lists every queue once, by name, with its topics, whoever declared it."""
    queues = [
        await world.queue(topics=["b", "a"]),
        await world.queue(topics=[]),
        await world.queue(by=await world.another()),
    ]
    listed = await world.broker.queues()
    names = [each.name for each in listed]
    assert names == sorted(set(names)), "the queues are not listed by name, each once"
    for queue in queues:
        [info] = [each for each in listed if each.name == queue.name]
        assert sorted(info.topics) == sorted(queue.topics)
        assert (info.ready, info.in_flight, info.delayed, info.dead, info.oldest_seconds) == (0, 0, 0, 0, None)


@promise("operating")
async def the_figures_of_a_queue_are_right(world: World) -> None:
    """Ready, in flight and dead are counted as they are, through every verdict."""
    queue = await world.queue()
    await world.put(queue, *"abcdef")
    subscription = await world.subscribe(queue)
    a, b, _ = await world.take(subscription, 3)

    async def figures() -> tuple[int, int, int, int]:
        info = await info_of(world, queue)
        return info.ready, info.in_flight, info.delayed, info.dead

    assert await figures() == (3, 3, 0, 0)
    await world.settle(DONE, a)
    assert await figures() == (3, 2, 0, 0)
    await world.settle(Dead("rejected", "no"), b)
    assert await figures() == (3, 1, 0, 1)
    await world.settle(Release(), *await world.take(subscription, 1))
    assert await figures() == (3, 1, 0, 1)
    await world.broker.redrive(await world.broker.dead_letters(DeadFilter(queue=queue.name), limit=10))
    assert await figures() == (4, 1, 0, 0)


@promise("operating", Feature.DELAY)
async def what_is_not_due_counts_as_delayed(world: World) -> None:
    """What waits for its time is counted apart from what is ready."""
    queue = await world.queue()
    later = world.now() + SOME_DAY_SECONDS
    await world.broker.publish([world.message(queue, "later", due=later), world.message(queue, "now")])
    info = await info_of(world, queue)
    assert (info.ready, info.in_flight, info.delayed) == (1, 0, 1)
    await world.settle(Release(later), *await world.take(await world.subscribe(queue), 1))
    info = await info_of(world, queue)
    assert (info.ready, info.in_flight, info.delayed, info.oldest_seconds) == (0, 0, 2, None)


@promise("operating", Feature.AGE)
async def the_age_of_the_oldest_grows(world: World) -> None:
    """oldest_seconds tells how long the oldest ready message has been waiting."""
    queue = await world.queue()
    await world.put(queue, "x")
    before = (await info_of(world, queue)).oldest_seconds
    await world.pass_time(0.1)
    after = (await info_of(world, queue)).oldest_seconds
    assert before is not None
    assert after is not None
    assert 0 <= before < after


@promise("operating")
async def consumers_are_counted(world: World) -> None:
    """A broker that knows its live subscriptions counts them, over all broker objects; one that cannot says None."""
    queue, other = await world.queue(), await world.another()
    counts = [(await info_of(world, queue)).consumers]
    for by in (world.broker, other, other):
        last = await world.subscribe(queue, by=by)
        counts.append((await info_of(world, queue)).consumers)
    await last.close()
    counts.append((await info_of(world, queue)).consumers)
    await other.close()
    counts.append((await info_of(world, queue)).consumers)
    assert counts in ([0, 1, 2, 3, 2, 1], [None] * 6), f"consumers: {counts}"


@promise("operating")
async def a_purge_deletes_what_waits(world: World) -> None:
    """A purge deletes what is ready, and says how much; what is held and what is dead stays, and so do other queues."""
    topic = world.fresh(".topic")
    queue, other = await world.queue(topics=[topic]), await world.queue(topics=[topic])
    await world.broker.publish([world.message(topic, each) for each in "abcde"])
    subscription = await world.subscribe(queue)
    held, dead = await world.take(subscription, 2)
    await world.settle(Dead("rejected", "no"), dead)
    assert await world.broker.purge(queue.name) == 3
    assert await world.broker.purge(queue.name) == 0
    info = await info_of(world, queue)
    assert (info.ready, info.in_flight, info.delayed, info.dead) == (0, 1, 0, 1)
    await world.put(queue, "new")
    await world.settle(Release(), held)
    assert sorted(texts(await world.ready(subscription, queue))) == ["a", "new"]
    assert texts(await world.ready(await world.subscribe(other), other)) == [*"abcde", "new"]


@promise("operating", Feature.DELAY)
async def a_purge_deletes_what_is_delayed(world: World) -> None:
    """A purge deletes what waits for its time, too."""
    queue = await world.queue()
    due = world.now() + 0.2
    await world.broker.publish([world.message(queue, "later", due=due), world.message(queue, "now")])
    assert await world.broker.purge(queue.name) == 2
    await world.pass_time(0.25)
    assert await world.ready(await world.subscribe(queue), queue) == []


@promise("operating")
async def an_operator_disturbs_nobody(world: World) -> None:
    """Looking at queues and dead letters, from another broker object, changes no delivery."""
    queue, operator = await world.queue(), await world.another()
    await world.put(queue, *"ab")
    subscription = await world.subscribe(queue)
    [held] = await world.take(subscription, 1)
    for _ in range(3):
        await operator.queues()
        await operator.dead_letters(DeadFilter(), limit=5)
    assert await world.broker.extend([held]) == []
    await world.settle(DONE, held)
    [rest] = await world.ready(subscription, queue)
    assert (text(rest), rest.deliveries) == ("b", 1)
