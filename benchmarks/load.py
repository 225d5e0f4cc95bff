"""The load that Conveyor carries in all measurements: one small order, and a queue file full of them."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.subject import Load
from conveyor import Conveyor
from conveyor.core.message import Message, uuid7

TOPIC: Final = "order_created"
BODY: Final = b'{"order_id":"A-123456","total":"19.99","customer":"someone@example.org","note":"0123456789abcdefghij"}'
TASKS: Final = 100
"""Coroutines that handle, or publish, at the same time."""
LATER_SECONDS: Final = 86_400.0
FILL_BATCH: Final = 1_000


@dataclass(frozen=True)
class OrderCreated:
    """About 100 bytes of JSON."""

    order_id: str
    total: str
    customer: str
    note: str


ORDER: Final = OrderCreated("A-123456", "19.99", "someone@example.org", "0123456789abcdefghij")


class Countdown:
    """Stops the clock when so many messages have been handled and settled."""

    def __init__(self, messages: int) -> None:
        self.left = messages
        self.over = asyncio.Event()
        self.messages = messages
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def one(self) -> None:
        """Count one."""
        self.left -= 1
        if self.left == 0:
            self.over.set()

    def figures(self) -> dict[str, float]:
        """How fast it went, all threads of this process together."""
        return {
            "rate": self.messages / (time.perf_counter() - self._wall),
            "cpu": (time.process_time() - self._cpu) / self.messages * 1e6,
        }


def url(folder: Path) -> str:
    """The queue file of a folder, with the safe durability."""
    return f"sqlite:///{folder / 'orders.queue'}?durability=full"


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


def consumer(folder: Path) -> Conveyor:
    """An application on the folder's queue file whose only worker receives orders."""
    app = Conveyor("orders", broker=url(folder))

    @app.worker
    async def handle(_: OrderCreated) -> None:
        pass

    return app


def fill(folder: Path, load: Load) -> None:
    """A queue file with what waits in it."""

    async def work() -> None:
        async with consumer(folder) as app:
            await fill_app(app, load)

    asyncio.run(work())
