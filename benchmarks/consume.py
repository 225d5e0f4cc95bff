"""Consume: claim, decode into a dataclass, await a handler that does nothing, settle."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.load import classic, fill_app, url, with_priorities
from benchmarks.order import Countdown, OrderCreated
from benchmarks.subject import Load
from conveyor import Conveyor
from conveyor.broker import Broker
from conveyor.brokers.memory import MemoryBroker
from conveyor.errors import NoKeeper

kept = Conveyor("orders", journal=True)
"""What `conveyor journal` is told."""


async def _consume(broker: str | Broker, load: Load, *, fill: bool = False, journal: bool = False) -> dict[str, float]:
    app = Conveyor("orders", broker=broker, journal=journal)
    countdown: Countdown

    @app.worker
    async def handle(_: OrderCreated) -> None:
        countdown.one()

    async with app:
        if fill:
            await fill_app(app, load)
        if journal:
            await _until_kept(app)
        countdown = Countdown(load.messages)
        async with app.running(keeper=False):
            await countdown.over.wait()
        return countdown.figures()  # draining settled what was handled


async def _until_kept(app: Conveyor) -> None:
    """Wait for the keeper, which runs in a process of its own."""
    connection = await app.connect()
    while True:
        try:
            await connection.asker.jobs(limit=1)
        except NoKeeper:
            await asyncio.sleep(0.1)
        else:
            return


def with_journal(folder: Path, load: Load) -> Mapping[str, float]:
    """With the journal on, and its keeper in a process of its own, as `conveyor run` has it."""
    said = ("--broker", url(folder), "--log-level", "warning")
    keeper = subprocess.Popen([sys.executable, "-m", "conveyor", "journal", "benchmarks.consume:kept", *said])
    try:
        return asyncio.run(_consume(url(folder), load, journal=True))
    finally:
        keeper.terminate()
        keeper.wait()


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
