"""Huey on SQLite, the fastest Python peer there: fsync=True (as durable as Conveyor), results off, four threads.

It deletes a task before it runs it, so a crash loses what was running; Conveyor does not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from huey import SqliteHuey  # type: ignore[import-untyped]

from benchmarks.order import ORDER, Handled, figures
from benchmarks.subject import Load

THREADS: Final = 4


def _huey(folder: Path) -> Any:
    return SqliteHuey("orders", filename=str(folder / "huey.db"), fsync=True, results=False)


def _task(huey: Any, handled: Handled) -> Any:
    def handle(order_id: str, total: str, customer: str, note: str) -> None:  # noqa: ARG001 - the payload's fields
        handled.one()

    return huey.task(name="handle")(handle)


def _send(task: Any, messages: int) -> None:
    for _ in range(messages):
        task(ORDER.order_id, ORDER.total, ORDER.customer, ORDER.note)


def fill(folder: Path, load: Load) -> None:
    """A file with what waits in it."""
    _send(_task(_huey(folder), Handled(0)), load.ready)


def consume(folder: Path, load: Load) -> Mapping[str, float]:
    """Its own consumer, in threads, at their best number."""
    huey, handled = _huey(folder), Handled(load.messages)
    _task(huey, handled)
    consumer = huey.create_consumer(workers=THREADS, periodic=False, check_worker_health=False)
    consumer.start()
    result = handled.wait()
    consumer.stop(graceful=False)
    return result


def publish(folder: Path, load: Load) -> Mapping[str, float]:
    """Sent one by one, as its interface has it; more threads only wait for the file's lock."""
    task = _task(_huey(folder), Handled(0))
    wall, cpu = time.perf_counter(), time.process_time()
    _send(task, load.messages)
    return figures(load.messages, time.perf_counter() - wall, time.process_time() - cpu)
