"""SAQ on Redis: 100 at once, no results kept."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from saq import Queue, Worker

from benchmarks.order import FIELDS, TASKS, Handled, OrderCreated, from_tasks
from benchmarks.peers import run
from benchmarks.subject import Load


async def _fill(url: str, load: Load) -> None:
    queue = Queue.from_url(url)
    await queue.connect()
    await from_tasks(load.ready, lambda: queue.enqueue("handle", order=FIELDS, ttl=-1))
    await queue.disconnect()


def fill(url: str, load: Load) -> None:
    """A list with what waits in it."""
    asyncio.run(_fill(url, load))


async def _consume(url: str, load: Load) -> dict[str, float]:
    handled = Handled(load.messages)

    async def handle(_: Any, *, order: dict[str, str]) -> None:
        OrderCreated(**order)
        handled.one()

    worker = Worker(Queue.from_url(url), functions=[("handle", handle)], concurrency=TASKS)
    return await handled.over(worker.start())


def consume(url: str, load: Load) -> Mapping[str, float]:
    """In plain asyncio: uvloop gains nothing here."""
    return run(_consume(url, load))
