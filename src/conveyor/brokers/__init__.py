"""The brokers, by the scheme of their URL; a driver is imported when its broker is asked for."""

from __future__ import annotations

import importlib
import time
from typing import Final, Protocol, cast
from urllib.parse import urlsplit

from conveyor.broker import Broker, Clock
from conveyor.errors import ConfigurationError, MissingExtra


class BrokerModule(Protocol):
    """What a file or package in this folder offers."""

    def from_url(self, url: str, *, owner: str | None, clock: Clock) -> Broker:
        """The broker that a URL names, not opened yet.

        Raises:
            ConfigurationError: the URL has parts that this broker does not understand.
        """
        ...


SCHEMES: Final[dict[str, tuple[str, str | None]]] = {
    # scheme: (module, the extra that its driver comes with)
    "amqp": ("conveyor.brokers.rabbitmq", "rabbitmq"),
    "amqps": ("conveyor.brokers.rabbitmq", "rabbitmq"),
    "memory": ("conveyor.brokers.memory", None),
    "sqlite": ("conveyor.brokers.sqlite", None),
    "redis": ("conveyor.brokers.redis", "redis"),
    "rediss": ("conveyor.brokers.redis", "redis"),
    "unix": ("conveyor.brokers.redis", "redis"),
}

SERVERS: Final = frozenset({"amqp", "amqps", "redis", "rediss"})
"""The schemes with a host, and often a password."""


def from_url(url: str, *, owner: str | None = None, clock: Clock = time.time) -> Broker:
    """The broker that a URL names, not opened yet.

    Parameters:
        url: such as ``sqlite:///shop.queue`` or ``memory://``.
        owner: the identity under which it holds leases; made up where None.
        clock: gives Unix seconds.

    Raises:
        ConfigurationError: the scheme is unknown, or the URL makes no sense to its broker.
        MissingExtra: the broker's driver is not installed.
    """
    parts = urlsplit(url)
    scheme = parts.scheme
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        said = f"unknown broker scheme {scheme!r}" if scheme else f"{url!r} is no broker URL"
        raise ConfigurationError(f"{said}; known are {known} (for example sqlite:///shop.queue)")
    # What is wrong is not repeated here: it may be a part of a password.
    if scheme in SERVERS and not url[len(scheme) :].startswith("://"):
        raise ConfigurationError(f"a URL of this broker begins with {scheme}:// (two slashes)")
    if scheme in SERVERS and "@" in parts.path:
        raise ConfigurationError(
            f"{scheme}://…: there is an @ behind the first slash; in a user's name or a password, @ is written %40 and / is written %2F"
        )
    module, extra = SCHEMES[scheme]
    try:
        found = cast("BrokerModule", importlib.import_module(module))
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("conveyor"):
            raise
        raise MissingExtra(f"the {scheme} broker", extra) from error
    return found.from_url(url, owner=owner, clock=clock)
