"""taskiq on RabbitMQ (taskiq-aio-pika) and on Redis streams (taskiq-redis), under uvloop, as its own command has it.

The receiver is the one that `taskiq worker -w 1 --max-async-tasks 100 --max-prefetch 100` runs. There is no result backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import uvloop
from taskiq.api import run_receiver_task
from taskiq_aio_pika import AioPikaBroker
from taskiq_aio_pika.queue import Queue, QueueType
from taskiq_redis import RedisStreamBroker

from benchmarks.order import ORDER, TASKS, Handled, OrderCreated, from_tasks
from benchmarks.peers import run
from benchmarks.subject import Load

DEAD: Final = "orders.dead"


def _rabbitmq(url: str) -> Any:
    queue = Queue(type=QueueType.CLASSIC, name="orders")
    return AioPikaBroker(
        url, qos=TASKS, task_queues=[queue], dead_letter_queue=Queue(type=QueueType.CLASSIC, name=DEAD)
    )


def _redis(url: str) -> Any:
    return RedisStreamBroker(url, consumer_id="0", xread_count=TASKS)


def _task(broker: Any, handled: Handled) -> Any:
    @broker.task(task_name="handle")
    async def handle(order: OrderCreated) -> None:  # noqa: ARG001 - the payload
        handled.one()

    return handle


async def _publish(make: Callable[[str], Any], url: str, messages: int) -> dict[str, float]:
    broker = make(url)
    task = _task(broker, Handled(0))
    await broker.startup()
    figures = await from_tasks(messages, lambda: task.kiq(ORDER))
    await broker.shutdown()
    return figures


async def _consume(make: Callable[[str], Any], url: str, load: Load) -> dict[str, float]:
    broker, handled = make(url), Handled(load.messages)
    _task(broker, handled)
    return await handled.over(run_receiver_task(broker, max_async_tasks=TASKS, max_prefetch=TASKS, run_startup=True))


def fill_rabbitmq(url: str, load: Load) -> None:
    """A classic durable queue with what waits in it."""
    uvloop.run(_publish(_rabbitmq, url, load.ready))


def publish_rabbitmq(url: str, load: Load) -> Mapping[str, float]:
    """kiq(), confirmed when it returns."""
    figures: Mapping[str, float] = uvloop.run(_publish(_rabbitmq, url, load.messages))
    return figures


def consume_rabbitmq(url: str, load: Load) -> Mapping[str, float]:
    """Acknowledged when saved, as is its default: after the handler."""
    return run(_consume(_rabbitmq, url, load), uvloop.new_event_loop)


def fill_redis(url: str, load: Load) -> None:
    """A stream with what waits in it."""
    uvloop.run(_publish(_redis, url, load.ready))


def consume_redis(url: str, load: Load) -> Mapping[str, float]:
    """From a consumer group, 100 at a time."""
    return run(_consume(_redis, url, load), uvloop.new_event_loop)
