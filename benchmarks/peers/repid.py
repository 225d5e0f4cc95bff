"""Repid on Redis streams, under uvloop: the fastest peer there. Every message is acknowledged by a command of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import uvloop
from repid import RedisServer, Repid, Router

from benchmarks.order import FIELDS, TASKS, Handled, OrderCreated, from_tasks
from benchmarks.peers import run
from benchmarks.subject import Load

CHANNEL: Final = "orders"


def _app(url: str) -> Any:
    app = Repid()
    app.servers.register_server("default", RedisServer(url, batch_size=TASKS), is_default=True)
    return app


async def _fill(url: str, load: Load) -> None:
    app = _app(url)
    async with app.servers.default.connection():
        await from_tasks(
            load.ready, lambda: app.send_message_json(channel=CHANNEL, payload=FIELDS, headers={"topic": "handle"})
        )


def fill(url: str, load: Load) -> None:
    """A stream with what waits in it."""
    uvloop.run(_fill(url, load))


async def _consume(url: str, load: Load) -> dict[str, float]:
    app, router, handled = _app(url), Router(), Handled(load.messages)

    async def handle(order_id: str, total: str, customer: str, note: str) -> None:
        OrderCreated(order_id, total, customer, note)
        handled.one()

    router.actor(handle, channel=CHANNEL)
    app.include_router(router)
    async with app.servers.default.connection():
        return await handled.over(app.run_worker(tasks_limit=TASKS, graceful_shutdown_time=1.0))


def consume(url: str, load: Load) -> Mapping[str, float]:
    """100 at once, read 100 at a time."""
    return run(_consume(url, load), uvloop.new_event_loop)
