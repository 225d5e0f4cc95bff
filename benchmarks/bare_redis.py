"""The bare loop on Redis: redis-py by hand, with batches in both directions and nothing of what makes it safe to use.

XREADGROUP of 100, decode and await a handler for each, one XACK for all of them. What is done stays in the stream: deleting it would
be a second command. No lost leases, retries, delays, dead letters, or errors.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from benchmarks import pings
from benchmarks.order import BODY, ORDER, Countdown, OrderCreated, from_tasks
from benchmarks.pings import Ping, Waits
from benchmarks.subject import Load

STREAM: Final = "orders"
GROUP: Final = "workers"
BATCH: Final = 100
FILL_BATCH: Final = 1_000
WAIT_MILLISECONDS: Final = 5_000
READY: Final = "[0.0]"
"""What a receiver says when it listens."""


async def _fill(url: str, load: Load) -> None:
    async with Redis.from_url(url) as redis:
        await redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)
        for start in range(0, load.ready, FILL_BATCH):
            pipeline = redis.pipeline(transaction=False)
            for _ in range(min(FILL_BATCH, load.ready - start)):
                pipeline.xadd(STREAM, {"body": BODY})
            await pipeline.execute()


def fill(url: str, load: Load) -> None:
    """A stream with what waits in it."""
    asyncio.run(_fill(url, load))


async def _batch(redis: Redis) -> list[tuple[bytes, dict[bytes, bytes]]]:
    answer: Any = await redis.xreadgroup(GROUP, "one", {STREAM: ">"}, count=BATCH, block=WAIT_MILLISECONDS)
    if not answer:
        return []
    if isinstance(answer, dict):
        [[messages]] = answer.values()
    else:
        [[_, messages]] = answer
    return list(messages)


async def _consume(url: str, load: Load) -> dict[str, float]:
    decode = msgspec.json.Decoder(OrderCreated).decode
    async with Redis.from_url(url) as redis:
        countdown = Countdown(load.messages)

        async def handler(_: OrderCreated) -> None:
            countdown.one()

        while countdown.left:
            messages = await _batch(redis)
            for _, fields in messages:
                await handler(decode(fields[b"body"]))
            await redis.xack(STREAM, GROUP, *(id for id, _ in messages))
        return countdown.figures()


def consume(url: str, load: Load) -> Mapping[str, float]:
    """Read 100, handle 100, acknowledge 100."""
    return asyncio.run(_consume(url, load))


async def _publish(url: str, load: Load) -> dict[str, float]:
    encode = msgspec.json.Encoder().encode
    async with Redis.from_url(url) as redis:
        await redis.ping()
        return await from_tasks(load.messages, lambda: redis.xadd(STREAM, {"body": encode(ORDER)}))


def publish(url: str, load: Load) -> Mapping[str, float]:
    """100 tasks, each awaiting its own XADD."""
    return asyncio.run(_publish(url, load))


async def _latency(url: str, load: Load) -> dict[str, float]:
    encode = msgspec.json.Encoder().encode
    await _fill(url, Load(0))
    async with pings.receiver("-m", "benchmarks.bare_redis", url) as process, Redis.from_url(url) as redis:

        async def publish(ping: Ping) -> None:
            await redis.xadd(STREAM, {"body": encode(ping)})

        await pings.answer(process)
        await pings.send(load.messages, publish)
        return pings.figures(await pings.answer(process))


def latency(url: str, load: Load) -> Mapping[str, float]:
    """XADD in this process, XREADGROUP BLOCK and XACK in another one."""
    return asyncio.run(_latency(url, load))


async def _receive(url: str) -> None:
    decode = msgspec.json.Decoder(Ping).decode
    waits = Waits()
    async with Redis.from_url(url) as redis:
        await redis.ping()
        print(READY, flush=True)
        while True:
            if messages := await _batch(redis):
                for _, fields in messages:
                    waits.note(decode(fields[b"body"]))
                await redis.xack(STREAM, GROUP, *(id for id, _ in messages))


if __name__ == "__main__":
    asyncio.run(_receive(sys.argv[1]))
