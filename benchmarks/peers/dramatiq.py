"""Dramatiq on RabbitMQ and on Redis: eight threads, prefetch 100, the default middleware, acknowledged after the actor.

The worker is the one that `dramatiq -p 1 -t 8` runs in its one process.
"""

from __future__ import annotations

import os

os.environ["dramatiq_queue_prefetch"] = "100"  # noqa: SIM112 - its name, read when dramatiq is imported

import time
from collections.abc import Mapping
from typing import Any, Final

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker

from benchmarks.order import FIELDS, Handled, OrderCreated, figures
from benchmarks.subject import Load

THREADS: Final = 8


def _actor(broker: Any, handled: Handled) -> Any:
    def handle(order: dict[str, str]) -> None:
        OrderCreated(**order)
        handled.one()

    return dramatiq.actor(handle, broker=broker, queue_name="orders")


def _send(broker: Any, messages: int) -> dict[str, float]:
    actor = _actor(broker, Handled(0))
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(messages):
        actor.send(FIELDS)
    result = figures(messages, time.perf_counter() - wall, time.process_time() - cpu)
    broker.close()
    return result


def _consume(broker: Any, load: Load) -> dict[str, float]:
    handled = Handled(load.messages)
    _actor(broker, handled)
    worker = dramatiq.Worker(broker, worker_threads=THREADS)
    worker.start()
    result = handled.wait()
    worker.stop()
    broker.close()
    return result


def fill_rabbitmq(url: str, load: Load) -> None:
    """A classic durable queue with what waits in it."""
    _send(RabbitmqBroker(url=url), load.ready)


def publish_rabbitmq(url: str, load: Load) -> Mapping[str, float]:
    """confirm_delivery=True, one by one, as its interface has it."""
    return _send(RabbitmqBroker(url=url, confirm_delivery=True), load.messages)


def consume_rabbitmq(url: str, load: Load) -> Mapping[str, float]:
    """Acknowledged after the actor."""
    return _consume(RabbitmqBroker(url=url), load)


def fill_redis(url: str, load: Load) -> None:
    """A list with what waits in it."""
    _send(RedisBroker(url=url), load.ready)


def consume_redis(url: str, load: Load) -> Mapping[str, float]:
    """Acknowledged after the actor."""
    return _consume(RedisBroker(url=url), load)
