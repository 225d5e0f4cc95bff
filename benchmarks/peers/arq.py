"""arq on Redis: 100 at once, polling every 10 ms, no results kept."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from arq import Worker, create_pool, func
from arq.connections import RedisSettings

from benchmarks.order import FIELDS, TASKS, Handled, OrderCreated, from_tasks
from benchmarks.peers import run
from benchmarks.subject import Load

POLL_SECONDS: Final = 0.01


async def _fill(url: str, load: Load) -> None:
    pool = await create_pool(RedisSettings.from_dsn(url))
    await from_tasks(load.ready, lambda: pool.enqueue_job("handle", FIELDS))
    await pool.aclose()


def fill(url: str, load: Load) -> None:
    """A sorted set with what waits in it."""
    asyncio.run(_fill(url, load))


async def _consume(url: str, load: Load) -> dict[str, float]:
    handled = Handled(load.messages)

    async def handle(_: Any, order: dict[str, str]) -> None:
        OrderCreated(**order)
        handled.one()

    worker: Any = Worker(
        functions=[func(handle, name="handle", keep_result=0)],
        redis_settings=RedisSettings.from_dsn(url),
        max_jobs=TASKS,
        poll_delay=POLL_SECONDS,
        handle_signals=False,
        log_results=False,
    )
    return await handled.over(worker.async_run())


def consume(url: str, load: Load) -> Mapping[str, float]:
    """In plain asyncio."""
    return run(_consume(url, load))
