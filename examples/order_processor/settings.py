"""The order processor's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import quote, urlsplit

import msgspec

from examples.settings import SettingError, setting

QUEUE: Final = "order-processing"
DEAD_QUEUE: Final = "order-processing-dlq"
EXCHANGE: Final = "skillupworks"
MAIL_SCHEMES: Final = ("smtp", "smtp+starttls", "smtps")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How the service is set up; ``python -m examples.order_processor --help`` shows it."""

    rabbitmq_host: Annotated[str, setting("RabbitMQ: HOST, HOST:PORT, or several with commas")] = "localhost"
    rabbitmq_port: Annotated[int, setting("its port, where HOST names none", ge=1, le=65_535)] = 5672
    rabbitmq_user: Annotated[str, setting("who logs in there")] = "guest"
    rabbitmq_pass: Annotated[str, setting("with which password", secret=True)] = "guest"  # noqa: S105 - RabbitMQ's own default
    rabbitmq_vhost: Annotated[str, setting("its virtual host")] = "/"
    rabbitmq_tls: Annotated[bool, setting("speak TLS")] = False
    rabbitmq_exchange_type: Annotated[
        Literal["direct", "topic", "fanout", "headers"], setting(f"of the exchange {EXCHANGE}, if it has to be created")
    ] = "direct"
    rabbitmq_routing_key: Annotated[str, setting("that paid orders have on that exchange")] = QUEUE
    rabbitmq_queue_type: Annotated[
        Literal["classic", "quorum"],
        setting(
            "of the queues; classic ones are what other programs get who declare them with durable=true and nothing else"
        ),
    ] = "classic"
    rabbitmq_passive: Annotated[bool, setting("use queue and exchange as they are, and declare neither")] = False
    broker: Annotated[
        str,
        setting(
            "URL of a broker; the RABBITMQ_… variables that say where it is then do not count",
            variable="CONVEYOR_BROKER",
        ),
    ] = ""
    prefetch: Annotated[
        int, setting("orders that one process works on at a time", variable="ORDER_PREFETCH", ge=1, le=1000)
    ] = 10
    processes: Annotated[int, setting("processes", variable="ORDER_PROCESSES", ge=1, le=64)] = 1
    http: Annotated[str, setting("serve health and metrics here, such as :9000", variable="CONVEYOR_HTTP")] = ""
    data: Annotated[str, setting("folder of order-processor.db", variable="ORDER_DATA")] = "."
    database: Annotated[
        str,
        setting(
            "database URL instead of sqlite+aiosqlite:///DATA/order-processor.db; machines that share the queue share one on PostgreSQL",
            variable="CONVEYOR_DATABASE",
            secret=True,
        ),
    ] = ""
    order_attempts: Annotated[int, setting("tries of an order before it is a dead letter", ge=1, le=1000)] = 8
    order_retry_seconds: Annotated[
        float, setting("seconds before the second try; then twice as long each time", gt=0, le=3600)
    ] = 1.0
    order_longest_retry_seconds: Annotated[float, setting("seconds between two tries at most", gt=0, le=86_400)] = 60.0
    lease_seconds: Annotated[
        float, setting("seconds after which the orders of a silent process go to others", ge=0.5, le=3600)
    ] = 30.0
    call_timeout_seconds: Annotated[
        float,
        setting(
            "seconds that the mail server or the warehouse may take for an order; the first half of them to be reached",
            gt=0,
            le=600,
        ),
    ] = 10.0
    smtp_url: Annotated[
        str,
        setting("mail server, as smtp+starttls://user:password@host:587; left out, e-mails are simulated", secret=True),
    ] = ""
    mail_from: Annotated[str, setting("sender of confirmations")] = "orders@skillupworks.example"
    mail_to: Annotated[str, setting("their recipient; {userId} stands for the customer")] = (
        "{userId}@customers.skillupworks.example"
    )
    warehouse_url: Annotated[str, setting("the warehouse's HTTP API; left out, it is simulated", secret=True)] = ""
    warehouse_knows_keys: Annotated[
        bool, setting("it knows a repeat by its Idempotency-Key; 0: then nothing that may have arrived is sent again")
    ] = True

    def __post_init__(self) -> None:
        if self.smtp_url:
            _check_url("SMTP_URL", self.smtp_url, MAIL_SCHEMES)
        if self.warehouse_url:
            _check_url("WAREHOUSE_URL", self.warehouse_url, ("http", "https"))
        for name, address in {"MAIL_FROM": self.mail_from, "MAIL_TO": self.mail_to}.items():
            local, _, domain = address.rpartition("@")
            if not (local and domain and address.isascii() and address.isprintable() and " " not in address):
                raise SettingError(f"{name} cannot be {address!r}: it is no e-mail address, such as orders@example.com")
        if self.order_retry_seconds > self.order_longest_retry_seconds:
            raise SettingError("ORDER_RETRY_SECONDS cannot be more than ORDER_LONGEST_RETRY_SECONDS")

    @property
    def broker_url(self) -> str:
        """Where the queues are."""
        if self.broker:
            return self.broker
        hosts = [host.strip() for host in self.rabbitmq_host.split(",") if host.strip()]
        places = ",".join(host if ":" in host else f"{host}:{self.rabbitmq_port}" for host in hosts)
        who = f"{quote(self.rabbitmq_user, safe='')}:{quote(self.rabbitmq_pass, safe='')}"
        scheme = "amqps" if self.rabbitmq_tls else "amqp"
        return f"{scheme}://{who}@{places}/{quote(self.rabbitmq_vhost, safe='')}?queue_type={self.rabbitmq_queue_type}"

    @property
    def database_url(self) -> str:
        """Where it notes what it did."""
        return self.database or f"sqlite+aiosqlite:///{Path(self.data).absolute() / 'order-processor.db'}"


def _check_url(name: str, url: str, schemes: tuple[str, ...]) -> None:
    """Without showing it: it may hold a password."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise SettingError(f"{name} is not as it must be: {' or '.join(f'{scheme}://host:port' for scheme in schemes)}")
