"""The brokers that promises are proved on, each in all of its modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Final

import pytest

from conveyor.brokers import from_url
from conveyor.brokers.memory import MemoryBroker, MemoryStore
from conveyor.testing.clock import turned_memory
from conveyor.testing.promises import Makers

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ
    from servers.redis import Redis


PATIENCE_SECONDS: Final = 60.0
"""Twice the suite's own: here several tests, and a server for each, share few cores."""


def _sqlite(request: pytest.FixtureRequest, durability: str) -> Makers:
    return Makers(partial(from_url, f"sqlite:///{request.getfixturevalue('tmp_path')}/x.queue?durability={durability}"))


def _redis(request: pytest.FixtureRequest) -> Makers:
    server: Redis = request.getfixturevalue("redis")
    return Makers(partial(from_url, server.url()), patience_seconds=PATIENCE_SECONDS)


def _rabbitmq(request: pytest.FixtureRequest, queue_type: str) -> Makers:
    server: RabbitMQ = request.getfixturevalue("one_rabbitmq")
    server.start()
    url = f"{_host_of(server, queue_type)}?queue_type={queue_type}"
    return Makers(partial(from_url, url), lease_seconds=2.0, patience_seconds=PATIENCE_SECONDS)


@cache
def _host_of(server: RabbitMQ, queue_type: str) -> str:
    """One virtual host for all promises: each makes its own queues and removes them, which is quicker than a host for each."""
    return server.url()


with_priorities = partial(_rabbitmq, queue_type="priority")
# To prove another broker, or another mode of one, add one line.
MODES: Final[Mapping[str, Callable[[pytest.FixtureRequest], Makers]]] = {
    "memory": lambda _: Makers(partial(MemoryBroker, store=MemoryStore())),
    "memory, clock turned": lambda _: turned_memory(),
    "sqlite, full": partial(_sqlite, durability="full"),
    "sqlite, normal": partial(_sqlite, durability="normal"),
    "redis": _redis,
    "rabbitmq, quorum": partial(_rabbitmq, queue_type="quorum"),
    "rabbitmq, classic": partial(_rabbitmq, queue_type="classic"),
}
