"""Celery on RabbitMQ: acks_late, no results, no gossip, mingle and events; two prefork children, which are faster than threads.

So it has one process that receives and two that handle: the processor time is that of all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from celery import Celery

from benchmarks.order import FIELDS, OrderCreated, figures
from benchmarks.subject import Load

CHILDREN: Final = 2
MULTIPLIER: Final = 50
"""Each child may hold so many."""


class _Shared:
    """The clock of benchmarks.order.Handled, for processes that were forked from this one."""

    def __init__(self, messages: int) -> None:
        self._messages = messages
        self._left = multiprocessing.Value("q", messages)
        self._first = multiprocessing.Array("d", 2)
        self._last = multiprocessing.Array("d", 2)
        self._over = multiprocessing.Event()
        self._pid = os.getpid()

    def one(self) -> None:
        with self._left.get_lock():
            if self._left.value == self._messages:
                self._first[:] = [time.perf_counter(), self._cpu()]
            self._left.value -= 1
            if self._left.value == 0:
                self._last[:] = [time.perf_counter(), self._cpu()]
                self._over.set()

    def wait(self) -> dict[str, float]:
        self._over.wait()
        (began, cpu_before), (ended, cpu_after) = self._first[:], self._last[:]
        return figures(self._messages - 1, ended - began, cpu_after - cpu_before)

    def _cpu(self) -> float:
        """Processor seconds of the worker and its children so far (proc_pid_stat(5))."""
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
        ticks = 0
        for pid in (str(self._pid), *children):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def _app(url: str) -> Any:
    app = Celery("orders", broker=url)
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=MULTIPLIER,
        broker_transport_options={"confirm_publish": True},
        broker_connection_retry_on_startup=True,
    )
    return app


def _task(app: Any, handled: _Shared | None) -> Any:
    def handle(order: dict[str, str]) -> None:
        OrderCreated(**order)
        if handled is not None:
            handled.one()

    return app.task(handle, name="handle")


def _send(url: str, messages: int) -> dict[str, float]:
    app = _app(url)
    task = _task(app, None)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(messages):
        task.delay(FIELDS)
    result = figures(messages, time.perf_counter() - wall, time.process_time() - cpu)
    app.close()
    return result


def fill(url: str, load: Load) -> None:
    """A classic durable queue with what waits in it."""
    _send(url, load.ready)


def publish(url: str, load: Load) -> Mapping[str, float]:
    """confirm_publish, one by one, as its interface has it."""
    return _send(url, load.messages)


def consume(url: str, load: Load) -> Mapping[str, float]:
    """The worker, in this process and its children."""
    handled = _Shared(load.messages)
    app = _app(url)
    _task(app, handled)
    shown: dict[str, float] = {}

    def stop_when_over() -> None:
        shown.update(handled.wait())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_over, daemon=True).start()
    worker = app.Worker(
        pool="prefork",
        concurrency=CHILDREN,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
        loglevel="ERROR",
    )
    worker.start()
    return shown
