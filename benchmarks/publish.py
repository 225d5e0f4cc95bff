"""Publish: 100 tasks at once, each awaiting that its own message is durable before it publishes the next one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.load import classic, consumer, url
from benchmarks.order import ORDER, from_tasks
from benchmarks.subject import Load
from conveyor import Conveyor
from conveyor.brokers.memory import MemoryBroker


async def _publish(app: Conveyor, load: Load) -> dict[str, float]:
    async with app:
        return await from_tasks(load.messages, lambda: app.publish(ORDER))


def conveyor(folder: Path, load: Load) -> Mapping[str, float]:
    """app.publish() on a queue file, every message on the disk when it returns."""
    return asyncio.run(_publish(consumer(url(folder)), load))


async def _in_memory(folder: Path, load: Load) -> dict[str, float]:
    broker = MemoryBroker()
    await broker.open()
    app = consumer(url(folder))
    with app.replaced(broker=broker, clock=time.time):
        figures = await _publish(app, load)
    await broker.close()
    return figures


def in_memory(folder: Path, load: Load) -> Mapping[str, float]:
    """On the memory broker: Conveyor's own share."""
    return asyncio.run(_in_memory(folder, load))


def on_classic(server: str, load: Load) -> Mapping[str, float]:
    """To a classic durable queue of RabbitMQ, every message confirmed when it returns."""
    return asyncio.run(_publish(consumer(classic(server)), load))


def on_quorum(server: str, load: Load) -> Mapping[str, float]:
    """To a quorum queue of RabbitMQ."""
    return asyncio.run(_publish(consumer(server), load))


def on_redis(server: str, load: Load) -> Mapping[str, float]:
    """To a stream of Redis."""
    return asyncio.run(_publish(consumer(server), load))
