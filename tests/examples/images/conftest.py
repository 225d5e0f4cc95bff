"""The brokers that a task queue stands on, and a few small photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from examples.images.pictures import make_photographs

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ
    from servers.redis import Redis


@pytest.fixture(params=["sqlite", "redis", "rabbitmq"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A broker that several processes can reach."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'images.queue'}"
    server: Redis | RabbitMQ = request.getfixturevalue(request.param)
    return server.url()


@pytest.fixture(params=["memory", "sqlite", "redis", "rabbitmq"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every kind of broker."""
    if request.param == "memory":
        return "memory://"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'images.queue'}"
    server: Redis | RabbitMQ = request.getfixturevalue(request.param)
    return server.url()


@pytest.fixture
def photos(tmp_path: Path) -> Sequence[Path]:
    """Six photographs."""
    return make_photographs(tmp_path / "in", 6, (120, 90))
