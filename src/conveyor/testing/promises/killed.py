"""Promises on durability: proved by a process that is killed (SIGKILL) in the middle of its work."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from conveyor.broker import Broker, Feature, Queue, Settlement
from conveyor.core.message import Message
from conveyor.core.settle import Done
from conveyor.testing.promises.suite import World, promise, texts

SINGLES = 5
BATCH = 50


@promise("killed", Feature.DURABLE)
async def what_was_published_survives_a_kill(world: World) -> None:
    """A process that is killed as soon as publish() returns has lost nothing that publish() returned for."""
    queue = await world.queue()
    _, published = await killed(world, "publish", queue.topics[0])
    assert len(published) == SINGLES + BATCH
    received = await world.take(await world.subscribe(queue), len(published))
    assert [each.message.id for each in received] == published


@promise("killed", Feature.DURABLE)
async def what_was_settled_survives_a_kill(world: World) -> None:
    """A process that is killed as soon as settle() returns: what is done stays done, and what it emits is published."""
    queue, target = await world.queue(), await world.queue()
    await world.put(queue, "cause")
    _, emitted = await killed(world, "settle", queue.name, target.topics[0])
    assert await world.ready(await world.subscribe(queue), queue) == []
    received = await world.take(await world.subscribe(target), 1)
    assert [each.message.id for each in received] == emitted


@promise("killed", Feature.DURABLE)
async def what_a_killed_process_held_comes_back(world: World) -> None:
    """What a process held when it was killed comes back when its lease ends, and the delivery counts."""
    queue = await world.queue(lease_seconds=world.lease_seconds)
    await world.put(queue, *"ab")
    await killed(world, "hold", queue.name)
    await world.with_lease(queue, 300.0)
    await world.pass_time(world.lease_seconds * 1.1)
    received = await world.take(await world.subscribe(queue), 2)
    assert {(each.deliveries, each.attempts) for each in received} == {(2, 0)}


@promise("killed", Feature.DURABLE, Feature.RECLAIM)
async def what_a_killed_process_held_is_reclaimed(world: World) -> None:
    """Who sees a process die gives back what it held by its owner's name, long before the lease ends."""
    queue = await world.queue()
    await world.put(queue, *"ab")
    owner, _ = await killed(world, "hold", queue.name)
    assert await world.broker.reclaim(owner, "killed by signal 9") == 2
    received = await world.take(await world.subscribe(queue), 2)
    assert sorted(texts(received)) == ["a", "b"]
    assert {(each.deliveries, each.error) for each in received} == {(2, "killed by signal 9")}


@promise("killed", Feature.DURABLE, Feature.TEMPORARY, Feature.RECLAIM)
async def a_temporary_queue_of_a_killed_process_vanishes(world: World) -> None:
    """When it is known that its owner died, a temporary queue is gone."""
    name = world.fresh(".temporary")
    owner, _ = await killed(world, "declare_temporary", name)
    await world.broker.reclaim(owner, "killed by signal 9")
    assert name not in {each.name for each in await world.broker.queues()}


async def killed(world: World, act: str, *names: str) -> tuple[str, list[str]]:
    """Do an act in another process, which is killed at its end.

    Returns:
        The owner that the process was, and the ids that it reported.
    """
    try:
        task = pickle.dumps((world.makers.broker, act, names))
    except Exception as error:
        raise AssertionError(
            f"Makers.broker cannot be pickled, and so not be used in a process that is killed: {error}"
        ) from error
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from conveyor.testing.promises.killed import child; child()",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        async with world.patience("another process to do its part"):
            told, complaint = await process.communicate(task)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == -signal.SIGKILL, f"the other process failed: {complaint.decode(errors='replace')}"
    report = json.loads(told)
    return report["owner"], report["ids"]


def child() -> NoReturn:
    """What runs in the other process; it does not return."""
    maker, act, names = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our parent process
    asyncio.run(_act(maker, act, names))
    raise SystemExit("still alive")


async def _act(maker: Callable[[], Broker], act: str, names: Sequence[str]) -> None:
    broker = maker()
    await broker.open()
    ids: list[str] = []
    match act:
        case "publish":
            messages = [Message(id=os.urandom(16).hex(), topic=names[0], body=b"x") for _ in range(SINGLES + BATCH)]
            for message in messages[:SINGLES]:
                await broker.publish([message])
            await broker.publish(messages[SINGLES:])
            ids = [each.id for each in messages]
        case "settle":
            held = await (await broker.subscribe(names[0], 1)).fetch(1)
            effect = Message(id=os.urandom(16).hex(), topic=names[1], body=b"x")
            assert await broker.settle([Settlement(each, Done((effect,))) for each in held]) == []
            ids = [effect.id]
        case "hold":
            subscription = await broker.subscribe(names[0], 10)
            while len(ids) < 2:
                ids += [each.message.id for each in await subscription.fetch(10)]
        case "declare_temporary":
            await broker.declare([Queue(name=names[0], topics=(names[0],), temporary=True)])
    sys.stdout.write(json.dumps({"owner": broker.owner, "ids": ids}))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
