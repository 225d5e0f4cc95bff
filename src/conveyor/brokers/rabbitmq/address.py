"""What an ``amqp://`` URL says: where the servers are, as whom to enter, and how this broker behaves there."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from conveyor.brokers.rabbitmq.amqp import Address
from conveyor.errors import ConfigurationError

PORTS: Final = {"amqp": 5672, "amqps": 5671}
DEFAULT_EXCHANGE: Final = "conveyor"
DEFAULT_HEARTBEAT_SECONDS: Final = 10.0
"""The server gives up a silent client after two of these: sooner than the default lease ends."""
DEFAULT_CONSUMER_TIMEOUT_SECONDS: Final = 1800.0
"""RabbitMQ's own default for how long a delivery may stay unsettled; the server does not tell it over AMQP."""
QUEUE_TYPES: Final = ("quorum", "classic", "priority")
OPTIONS: Final = ("queue_type", "exchange", "heartbeat", "consumer_timeout", "cafile", "certfile", "keyfile", "verify")


@dataclass(frozen=True, slots=True)
class Options:
    """What a URL asks for.

    Parameters:
        addresses: the servers, tried in turn.
        queue_type: of the queues that are declared: quorum (replicated), classic, or priority (classic with priorities).
        exchange: the topic exchange of all of Conveyor's topics.
        heartbeat_seconds: either side that hears nothing for two of these gives the other up.
        consumer_timeout_seconds: the server's setting of this name; longer deliveries are renewed well before.
    """

    addresses: tuple[Address, ...]
    queue_type: str = "quorum"
    exchange: str = DEFAULT_EXCHANGE
    heartbeat_seconds: float = DEFAULT_HEARTBEAT_SECONDS
    consumer_timeout_seconds: float = DEFAULT_CONSUMER_TIMEOUT_SECONDS

    @property
    def replicated(self) -> bool:
        """Its queues are quorum queues."""
        return self.queue_type == "quorum"


def read_url(url: str) -> Options:
    """The options that a URL asks for: ``amqp://user:password@host1:5672,host2/vhost?queue_type=classic``.

    As with RabbitMQ's own URIs, no path is the virtual host ``/``, and ``%2F`` in it is a slash.

    Raises:
        ConfigurationError: a part of it makes no sense.
    """
    parts = urlsplit(url)
    if parts.fragment or parts.path.count("/") > 1:
        raise ConfigurationError(
            f"{parts.scheme}://…{parts.path}: a RabbitMQ URL is amqp://user:password@host:port/virtual-host?options, "
            "and a slash in the virtual host's name is written %2F"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise ConfigurationError(f"unknown option {unknown[0]!r} of a RabbitMQ URL; known are {', '.join(OPTIONS)}")
    queue_type = options.get("queue_type", "quorum")
    if queue_type not in QUEUE_TYPES:
        raise ConfigurationError(f"queue_type is {', '.join(QUEUE_TYPES)}, not {queue_type!r}")
    exchange = options.get("exchange", DEFAULT_EXCHANGE)
    if not exchange or exchange.startswith("amq."):
        raise ConfigurationError(f"exchange={exchange!r}: a name that is not empty and does not begin with amq.")
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    tls = _tls(parts.scheme, options)
    addresses = tuple(
        Address(
            host=host,
            port=port,
            virtual_host=unquote(parts.path[1:]) or "/",
            user=unquote(user) or "guest",
            password=unquote(password) if credentials else "guest",
            tls=tls,
        )
        for host, port in (_host(each, PORTS[parts.scheme]) for each in (hosts or "localhost").split(","))
    )
    return Options(
        addresses=addresses,
        queue_type=queue_type,
        exchange=exchange,
        heartbeat_seconds=_seconds(options, "heartbeat", DEFAULT_HEARTBEAT_SECONDS),
        consumer_timeout_seconds=_seconds(options, "consumer_timeout", DEFAULT_CONSUMER_TIMEOUT_SECONDS),
    )


def _host(text: str, default_port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        if not parts.hostname:
            raise ValueError("no host")
        return parts.hostname, parts.port or default_port
    except ValueError as error:
        raise ConfigurationError(f"{text!r} is no host:port of a RabbitMQ server ({error})") from None


def _seconds(options: dict[str, str], name: str, default: float) -> float:
    text = options.get(name)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigurationError(f"{name}={text!r}: seconds, more than 0")
    return seconds


def _tls(scheme: str, options: dict[str, str]) -> ssl.SSLContext | None:
    cafile, certfile, keyfile = options.get("cafile"), options.get("certfile"), options.get("keyfile")
    verify = options.get("verify", "yes")
    if verify not in {"yes", "no"}:
        raise ConfigurationError(f"verify is yes or no, not {verify!r}")
    if scheme != "amqps":
        if wrong := [name for name in ("cafile", "certfile", "keyfile", "verify") if name in options]:
            raise ConfigurationError(f"{wrong[0]} is for amqps://; amqp:// has no TLS")
        return None
    try:
        context = ssl.create_default_context(cafile=cafile)
        if certfile:
            context.load_cert_chain(certfile, keyfile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"the TLS files of the RabbitMQ URL cannot be used: {error}") from error
    if verify == "no":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
