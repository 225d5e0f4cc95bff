"""streaq on Redis (coredis): 100 at once, no results kept."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from streaq import Worker

from benchmarks.order import FIELDS, TASKS, Handled, OrderCreated
from benchmarks.peers import run
from benchmarks.subject import Load

FILL_BATCH = 100


def _worker(url: str, handled: Handled) -> tuple[Any, Any]:
    worker: Any = Worker(redis_url=url, concurrency=TASKS, handle_signals=False)

    async def handle(order: dict[str, str]) -> None:
        OrderCreated(**order)
        handled.one()

    return worker, worker.task(ttl=0, silent=True, name="handle")(handle)


async def _fill(url: str, load: Load) -> None:
    worker, task = _worker(url, Handled(0))
    async with worker:
        for start in range(0, load.ready, FILL_BATCH):
            await worker.enqueue_many([task.enqueue(FIELDS) for _ in range(min(FILL_BATCH, load.ready - start))])


def fill(url: str, load: Load) -> None:
    """A stream with what waits in it."""
    asyncio.run(_fill(url, load))


async def _consume(url: str, load: Load) -> dict[str, float]:
    handled = Handled(load.messages)
    worker, _ = _worker(url, handled)
    return await handled.over(worker.run_async())


def consume(url: str, load: Load) -> Mapping[str, float]:
    """In plain asyncio: uvloop gains nothing here."""
    return run(_consume(url, load))
