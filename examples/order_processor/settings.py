"""The settings of this service: one frozen value from the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_type_hints
from urllib.parse import quote, urlsplit

QUEUE: Final = "order-processing"
DEAD_QUEUE: Final = "order-processing-dlq"
EXCHANGE: Final = "skillupworks"


class SettingError(ValueError):
    """A setting that makes no sense; says which one and what it may be."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known about one setting: its environment variable and its meaning; a secret one is no flag."""

    what: str
    variable: str
    read: Callable[[str], Any] = str
    secret: bool = False


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise ValueError(f"a whole number from {least} to {most}")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.01 <= seconds <= 86_400:
        raise ValueError("seconds, from 0.01 to 86400")
    return seconds


def _flag(text: str) -> bool:
    if text.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("say 1 or 0")
    return text.lower() in ("1", "true", "yes", "on")


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return read


def _mail_server(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("smtp", "smtps", "smtp+starttls") or not parts.hostname or parts.path.strip("/"):
        raise ValueError("a mail server is smtp://host:port, smtp+starttls://host:port or smtps://host:port")
    return text


def _web_address(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an address is http://host/path or https://host/path")
    return text


def _mail_address(text: str) -> str:
    local, _, domain = text.rpartition("@")
    if not local or not domain or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("an e-mail address, such as orders@example.com")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the service is set up; ``python -m examples.order_processor --help`` shows it."""

    host: Annotated[str, Setting("RabbitMQ's host; several with commas between", "RABBITMQ_HOST")] = "localhost"
    port: Annotated[int, Setting("RabbitMQ's port", "RABBITMQ_PORT", _whole(1, 65_535))] = 5672
    user: Annotated[str, Setting("RabbitMQ's user", "RABBITMQ_USER")] = "guest"
    password: Annotated[str, Setting("that user's password", "RABBITMQ_PASS", secret=True)] = "guest"  # noqa: S105 - RabbitMQ's own
    vhost: Annotated[str, Setting("RabbitMQ's virtual host", "RABBITMQ_VHOST")] = "/"
    tls: Annotated[bool, Setting("speak TLS to RabbitMQ", "RABBITMQ_TLS", _flag)] = False
    exchange_type: Annotated[
        Literal["direct", "topic", "fanout", "headers"],
        Setting(
            f"type of the exchange {EXCHANGE}",
            "RABBITMQ_EXCHANGE_TYPE",
            _one_of("direct", "topic", "fanout", "headers"),
        ),
    ] = "direct"
    routing_key: Annotated[str, Setting("of paid orders on that exchange", "RABBITMQ_ROUTING_KEY")] = QUEUE
    queue_type: Annotated[
        Literal["classic", "quorum"],
        Setting(f"type of the queue {QUEUE}", "RABBITMQ_QUEUE_TYPE", _one_of("classic", "quorum")),
    ] = "classic"
    passive: Annotated[
        bool, Setting("use queue and exchange as they are, and declare neither", "RABBITMQ_PASSIVE", _flag)
    ] = False
    data: Annotated[Path, Setting("folder of order-processor.db", "ORDER_DATA", Path)] = Path()
    database: Annotated[
        str,
        Setting("database URL; several machines share one on PostgreSQL", "CONVEYOR_DATABASE", secret=True),
    ] = ""
    prefetch: Annotated[
        int, Setting("orders that one process works on at a time", "ORDER_PREFETCH", _whole(1, 1000))
    ] = 10
    processes: Annotated[int, Setting("processes", "ORDER_PROCESSES", _whole(1, 64))] = 1
    attempts: Annotated[
        int, Setting("attempts at an order before it is a dead letter", "ORDER_ATTEMPTS", _whole(1, 1000))
    ] = 8
    retry: Annotated[float, Setting("seconds before the second attempt; doubles", "ORDER_RETRY_SECONDS", _seconds)] = 1
    longest_retry: Annotated[
        float, Setting("seconds between two attempts at most", "ORDER_LONGEST_RETRY_SECONDS", _seconds)
    ] = 60
    lease: Annotated[
        float, Setting("seconds after which a silent process' orders go to others", "ORDER_LEASE_SECONDS", _seconds)
    ] = 30
    call_timeout: Annotated[
        float, Setting("seconds that mail server or warehouse may take", "CALL_TIMEOUT_SECONDS", _seconds)
    ] = 10
    smtp: Annotated[str, Setting("mail server; left out: simulated", "SMTP_URL", _mail_server, secret=True)] = ""
    mail_from: Annotated[str, Setting("sender of confirmations", "MAIL_FROM", _mail_address)] = (
        "orders@skillupworks.example"
    )
    mail_to: Annotated[str, Setting("their recipient; {userId} is the customer", "MAIL_TO", _mail_address)] = (
        "{userId}@customers.skillupworks.example"
    )
    warehouse: Annotated[
        str, Setting("the warehouse's API; left out: simulated", "WAREHOUSE_URL", _web_address, secret=True)
    ] = ""
    warehouse_knows_keys: Annotated[
        bool, Setting("it knows a repeat by its Idempotency-Key", "WAREHOUSE_KNOWS_KEYS", _flag)
    ] = True
    http: Annotated[str, Setting("serve health and metrics here, such as :9000", "CONVEYOR_HTTP")] = ""

    def __post_init__(self) -> None:
        file = self.data.absolute() / "order-processor.db"
        object.__setattr__(self, "database", self.database or f"sqlite+aiosqlite:///{file}")

    @property
    def broker(self) -> str:
        """The broker's URL."""
        scheme = "amqps" if self.tls else "amqp"
        hosts = [host.strip() for host in self.host.split(",") if host.strip()]
        places = ",".join(host if ":" in host else f"{host}:{self.port}" for host in hosts)
        who = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}"
        return f"{scheme}://{who}@{places}/{quote(self.vhost, safe='')}?queue_type={self.queue_type}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """The settings in environment variables; an empty one is not set.

        Raises:
            SettingError: a value makes no sense.
        """
        values = {}
        for name, setting in SETTINGS.items():
            if text := environment.get(setting.variable, "").strip():
                values[name] = read(setting.variable, setting, text)
        return cls(**values)


def read(said: str, setting: Setting, text: str) -> Any:
    """The value that a text means; said names where it was found."""
    try:
        return setting.read(text)
    except ValueError as error:
        shown = "what it is" if setting.secret else repr(text)
        raise SettingError(f"{said} cannot be {shown}: {error}") from error


_HINTS: Final = get_type_hints(Settings, include_extras=True)
SETTINGS: Final[Mapping[str, Setting]] = {f.name: _HINTS[f.name].__metadata__[0] for f in fields(Settings)}
