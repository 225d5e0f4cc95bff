"""Conveyor's side of all measurements: an application that receives orders, and its queue full of them."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Final

from benchmarks.order import BODY, TOPIC, OrderCreated
from benchmarks.subject import Load
from conveyor import Conveyor
from conveyor.core.message import Message, uuid7

LATER_SECONDS: Final = 86_400.0
FILL_BATCH: Final = 1_000


def url(folder: Path) -> str:
    """The queue file of a folder, with the safe durability."""
    return f"sqlite:///{folder / 'orders.queue'}?durability=full"


def classic(server: str) -> str:
    """RabbitMQ with classic queues."""
    return f"{server}?queue_type=classic"


def with_priorities(server: str) -> str:
    """RabbitMQ with classic queues that have priorities."""
    return f"{server}?queue_type=priority"


def orders(number: int, due: float = 0.0) -> list[Message]:
    """So many messages, as app.publish() would make them."""
    now = time.time()
    ids = [uuid7(now, os.urandom(10)) for _ in range(number)]
    return [Message(id, TOPIC, BODY, correlation_id=id, created=now, due=due) for id in ids]


async def fill_app(app: Conveyor, load: Load) -> None:
    """Publish what waits, in large batches."""
    for number, due in ((load.ready, 0.0), (load.delayed, time.time() + LATER_SECONDS)):
        for start in range(0, number, FILL_BATCH):
            await app.broker.publish(orders(min(FILL_BATCH, number - start), due))


def consumer(broker: str) -> Conveyor:
    """An application whose only worker receives orders."""
    app = Conveyor("orders", broker=broker)

    @app.worker
    async def handle(_: OrderCreated) -> None:
        pass

    return app


async def _fill(broker: str, load: Load) -> None:
    async with consumer(broker) as app:
        await fill_app(app, load)


def fill(folder: Path, load: Load) -> None:
    """A queue file with what waits in it."""
    asyncio.run(_fill(url(folder), load))


def fill_classic(server: str, load: Load) -> None:
    """A classic durable queue with what waits in it."""
    asyncio.run(_fill(classic(server), load))


def fill_with_priorities(server: str, load: Load) -> None:
    """The same, with priorities."""
    asyncio.run(_fill(with_priorities(server), load))


def fill_server(server: str, load: Load) -> None:
    """What a broker has by default, a quorum queue or a stream, with what waits in it."""
    asyncio.run(_fill(server, load))
