"""Huey on SQLite, the fastest Python peer there: fsync=True (as durable as Conveyor), results off, four threads.

It deletes a task before it runs it, so a crash loses what was running; Conveyor does not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from huey import SqliteHuey  # type: ignore[import-untyped]

from benchmarks.load import ORDER
from benchmarks.subject import Load

THREADS: Final = 4


class _Count:
    def __init__(self, messages: int) -> None:
        self.left = messages
        self.over = threading.Event()
        self._lock = threading.Lock()

    def one(self) -> None:
        with self._lock:
            self.left -= 1
            if self.left <= 0:
                self.over.set()


def _huey(folder: Path) -> Any:
    return SqliteHuey("orders", filename=str(folder / "huey.db"), fsync=True, results=False)


def _task(huey: Any, count: _Count) -> Any:
    def handle(order_id: str, total: str, customer: str, note: str) -> None:  # noqa: ARG001 - the payload's fields
        count.one()

    return huey.task(name="handle")(handle)


def _send(task: Any, messages: int) -> None:
    for _ in range(messages):
        task(ORDER.order_id, ORDER.total, ORDER.customer, ORDER.note)


def fill(folder: Path, load: Load) -> None:
    """A file with what waits in it."""
    _send(_task(_huey(folder), _Count(0)), load.ready)


def consume(folder: Path, load: Load) -> Mapping[str, float]:
    """Its own consumer, in threads, at their best number."""
    huey, count = _huey(folder), _Count(load.messages)
    _task(huey, count)
    consumer = huey.create_consumer(workers=THREADS, periodic=False, check_worker_health=False)
    wall, cpu = time.perf_counter(), time.process_time()
    consumer.start()
    count.over.wait()
    figures = _figures(load.messages, wall, cpu)
    consumer.stop(graceful=False)
    return figures


def publish(folder: Path, load: Load) -> Mapping[str, float]:
    """Sent one by one, as its interface has it; more threads only wait for the file's lock."""
    task = _task(_huey(folder), _Count(0))
    wall, cpu = time.perf_counter(), time.process_time()
    _send(task, load.messages)
    return _figures(load.messages, wall, cpu)


def _figures(messages: int, wall: float, cpu: float) -> dict[str, float]:
    return {
        "rate": messages / (time.perf_counter() - wall),
        "cpu": (time.process_time() - cpu) / messages * 1e6,
    }
