"""Which broker a command works on, and how it is opened and closed."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

from cyclopts import Parameter

from conveyor import brokers, config
from conveyor.broker import Broker
from conveyor.errors import BrokerError, ConfigurationError


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Where:
    """Which broker; commands that look at one have these flags.

    Parameters:
        broker: The broker's URL. Default: the app's, else $CONVEYOR_BROKER, else conveyor.toml's.
        app: The app whose broker is meant, as module:attribute.
    """

    broker: str | None = None
    app: Annotated[str | None, Parameter(name="--app")] = None

    def url(self) -> str:
        """The URL of the broker that is meant.

        Raises:
            ConfigurationError: nothing says which.
        """
        if self.app is not None and self.broker is None:
            from conveyor.cli.application import broker_url, load_app

            return broker_url(load_app(self.app))
        found = config.load(Path.cwd(), os.environ, {"broker": self.broker}).broker
        if found is not None:
            return found
        files = sorted(Path.cwd().glob("*.queue"))
        here = f"\nThere is a queue file here: --broker sqlite:///{files[0].name}" if files else ""
        raise ConfigurationError(f"which broker? Give --broker URL or --app APP, or set CONVEYOR_BROKER.{here}")


@asynccontextmanager
async def connected(url: str, *, create: bool = False) -> AsyncIterator[Broker]:
    """The broker of a URL, open.

    Parameters:
        create: may make a new SQLite file; whoever only looks should not, because a typing error would.

    Raises:
        BrokerError: it cannot be opened.
        ConfigurationError: the URL is none, or leads nowhere from here.
    """
    broker = _broker(url, create=create)
    with _warnings_left_to_doctor():
        await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


@contextmanager
def _warnings_left_to_doctor() -> Iterator[None]:
    """What a broker's set-up risks is said where workers run, and by conveyor doctor; not above each list of queues."""
    logger = logging.getLogger("conveyor")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _broker(url: str, *, create: bool) -> Broker:
    parts = urlsplit(url)
    if parts.scheme == "memory":
        raise ConfigurationError(
            f"{url} lives inside the process that made it, and no other one can see it; use sqlite:///NAME.queue"
        )
    broker = brokers.from_url(url)
    file = Path(unquote(parts.path.removeprefix("/")))
    if parts.scheme == "sqlite" and not create and not file.exists():
        raise BrokerError(f"there is no queue file {file}; conveyor run makes it (is this the right directory?)")
    return broker
