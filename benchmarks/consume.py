"""Consume: claim, decode into a dataclass, await a handler that does nothing, settle."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from benchmarks.load import classic, fill_app, url, with_priorities
from benchmarks.order import Countdown, OrderCreated
from benchmarks.subject import Load
from conveyor import Conveyor
from conveyor.broker import Broker
from conveyor.brokers.memory import MemoryBroker


async def _consume(broker: str | Broker, load: Load, *, fill: bool = False) -> dict[str, float]:
    app = Conveyor("orders", broker=broker)
    countdown: Countdown

    @app.worker
    async def handle(_: OrderCreated) -> None:
        countdown.one()

    async with app:
        if fill:
            await fill_app(app, load)
        countdown = Countdown(load.messages)
        async with app.running():
            await countdown.over.wait()
        return countdown.figures()  # draining settled what was handled


def conveyor(folder: Path, load: Load) -> Mapping[str, float]:
    """As it comes."""
    return asyncio.run(_consume(url(folder), load))


async def _in_memory(load: Load) -> dict[str, float]:
    broker = MemoryBroker()
    await broker.open()
    figures = await _consume(broker, load, fill=True)
    await broker.close()
    return figures


def in_memory(_: Path, load: Load) -> Mapping[str, float]:
    """On the memory broker: nearly all that is left is Conveyor's own share."""
    return asyncio.run(_in_memory(load))


def on_classic(server: str, load: Load) -> Mapping[str, float]:
    """From a classic durable queue of RabbitMQ."""
    return asyncio.run(_consume(classic(server), load))


def on_priorities(server: str, load: Load) -> Mapping[str, float]:
    """From a classic queue that has priorities."""
    return asyncio.run(_consume(with_priorities(server), load))


def on_quorum(server: str, load: Load) -> Mapping[str, float]:
    """From a quorum queue of RabbitMQ."""
    return asyncio.run(_consume(server, load))


def on_redis(server: str, load: Load) -> Mapping[str, float]:
    """From a stream of Redis."""
    return asyncio.run(_consume(server, load))
