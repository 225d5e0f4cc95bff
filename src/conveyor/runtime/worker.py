"""A worker as the runtime sees it: a handler's plan with its queue and its policies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypedDict

from conveyor.broker import Queue
from conveyor.core.codec import Codec
from conveyor.core.handler import Mode, Plan
from conveyor.core.retry import RetryPolicy

DEFAULT_TIMEOUT_SECONDS: Final = 600.0
"""Longer than nearly any single step should take, short enough that a hung one is noticed the same hour."""
DEFAULT_CONCURRENCY: Final[Mapping[Mode, int]] = {Mode.ASYNC: 100, Mode.THREAD: 10, Mode.PROCESS: os.cpu_count() or 1}
"""Coroutines are nearly free; threads cost memory; more processes than cores only wait for each other."""
PREFETCH_PER_SLOT: Final = 2
"""While one message of a slot is handled, the next one is on its way; more would only wait where others could work."""
DEEPEST_PREFETCH: Final = 10
"""Times as many where handlers are so quick that none of them waits for long: fewer and larger batches."""
PREFETCH_SECONDS: Final = 0.05
"""So much work may wait in a process while others could do it."""


def room_for(prefetch: int, deepest: int, rate: float) -> int:
    """How many messages a process should hold: what it handles in PREFETCH_SECONDS, within the worker's bounds.

    Parameters:
        prefetch: the fewest.
        deepest: the most.
        rate: messages that it handles in a second.
    """
    return max(prefetch, min(deepest, int(rate * PREFETCH_SECONDS)))


class Native(TypedDict, total=False):
    """What a queue on RabbitMQ may be told about things that belong to others; the other brokers have no such things, and do not care.

    Parameters:
        exchange: bind the queue to this exchange, too; it is declared (durable) where it is missing.
        exchange_type: of that exchange; left out, topic.
        routing_key: of the binding; left out, the worker's topics.
        dead_queue: where its dead letters are kept; left out, ``<queue>.dead``.
        queue_type: instead of the one that the broker's URL says.
        passive: use queue and exchange as they are, and declare nothing.
    """

    exchange: str
    exchange_type: Literal["topic", "direct", "fanout", "headers"]
    routing_key: str
    dead_queue: str
    queue_type: Literal["quorum", "classic"]
    passive: bool


@dataclass(frozen=True, slots=True)
class Worker:
    """A handler, the queue that feeds it, and how it is run.

    Parameters:
        name: unique in its application.
        identity: names it among all applications: ``<application>.<name>``.
        plan: how the handler is called.
        queue: where its messages wait.
        codecs: topic → what decodes a payload published under it.
        retry: when it is run again.
        concurrency: how many messages (batches) are handled at once in one process.
        prefetch: how many messages one process holds.
        deepest: how many it holds at most, while its handlers are quick.
        timeout_seconds: how long one attempt may take; None is as long as it likes.
        batch: how many messages are handled by one call; 1 is no batch.
    """

    name: str
    identity: str
    plan: Plan
    queue: Queue
    codecs: Mapping[str, Codec]
    retry: RetryPolicy
    concurrency: int
    prefetch: int
    deepest: int
    timeout_seconds: float | None
    batch: int
