"""FastStream on RabbitMQ (aio-pika) and on Redis streams: typed payload, acknowledged after the handler."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import uvloop
from faststream.rabbit import Channel, RabbitBroker, RabbitQueue
from faststream.redis import RedisBroker, StreamSub
from redis.asyncio import Redis

from benchmarks.order import ORDER, TASKS, Handled, OrderCreated, from_tasks
from benchmarks.subject import Load

QUEUE: Final = "orders"
GROUP: Final = "workers"


def _rabbitmq(url: str) -> Any:
    return RabbitBroker(url, default_channel=Channel(prefetch_count=TASKS), logger=None)


async def _publish_to_rabbitmq(url: str, messages: int) -> dict[str, float]:
    async with _rabbitmq(url) as broker:
        await broker.declare_queue(RabbitQueue(QUEUE, durable=True))
        return await from_tasks(messages, lambda: broker.publish(ORDER, queue=QUEUE, persist=True))


def fill_rabbitmq(url: str, load: Load) -> None:
    """A classic durable queue with what waits in it."""
    asyncio.run(_publish_to_rabbitmq(url, load.ready))


def publish_rabbitmq(url: str, load: Load) -> Mapping[str, float]:
    """publish(persist=True), confirmed when it returns."""
    return asyncio.run(_publish_to_rabbitmq(url, load.messages))


async def _run(broker: Any, load: Load, *queue: Any, **stream: Any) -> Mapping[str, float]:
    handled = Handled(load.messages)

    @broker.subscriber(*queue, **stream)
    async def handle(_: OrderCreated) -> None:
        handled.one()

    async with broker:
        await broker.start()
        return await handled.over()


def consume_rabbitmq(url: str, load: Load) -> Mapping[str, float]:
    """In plain asyncio: uvloop gains nothing here."""
    return asyncio.run(_run(_rabbitmq(url), load, RabbitQueue(QUEUE, durable=True)))


async def _fill_redis(url: str, load: Load) -> None:
    async with Redis.from_url(url) as redis:
        await redis.xgroup_create(QUEUE, GROUP, "0", mkstream=True)
    async with RedisBroker(url, logger=None) as broker:
        await from_tasks(load.ready, lambda: broker.publish(ORDER, stream=QUEUE))


def fill_redis(url: str, load: Load) -> None:
    """A stream with what waits in it."""
    asyncio.run(_fill_redis(url, load))


def consume_redis(url: str, load: Load) -> Mapping[str, float]:
    """In batches of 100 from a consumer group; max_workers gains nothing."""
    stream = StreamSub(QUEUE, group=GROUP, consumer="one", max_records=TASKS)
    figures: Mapping[str, float] = uvloop.run(_run(RedisBroker(url, logger=None), load, stream=stream))
    return figures
