"""A lean AMQP 0-9-1 client for asyncio, which knows nothing of Conveyor (the signatures; the bodies follow)."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple, TypeAlias

FieldValue: TypeAlias = "bool | int | float | str | bytes | Decimal | datetime | Sequence[FieldValue] | Mapping[str, FieldValue] | None"
Table: TypeAlias = Mapping[str, FieldValue]


class AmqpError(Exception): ...


class ConnectionFailed(AmqpError):
    reasons: tuple[tuple[Address, Exception], ...]  # every host's own


class ConnectionClosed(AmqpError):
    code: int  # 0 where the server did not say one (socket gone, heartbeat)
    text: str


class ChannelClosed(AmqpError):
    code: int
    text: str


class Returned(AmqpError):
    code: int
    text: str
    message: Incoming


class Nacked(AmqpError): ...


class OutcomeUnknown(AmqpError): ...  # __cause__ is the ConnectionClosed or ChannelClosed


class Malformed(AmqpError): ...  # Incoming.properties of a message whose properties nobody can read


@dataclass(frozen=True, slots=True)
class Address:
    host: str = "localhost"
    port: int = 5672
    virtual_host: str = "/"
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    tls: ssl.SSLContext | None = None


class Properties(NamedTuple):
    content_type: str | None = None
    content_encoding: str | None = None
    headers: Table | None = None
    delivery_mode: int | None = None
    priority: int | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    expiration: str | None = None
    message_id: str | None = None
    timestamp: int | None = None  # POSIX seconds
    type: str | None = None
    user_id: str | None = None
    app_id: str | None = None

    def encode(self) -> bytes: ...  # ValueError when something does not fit (a short string over 255 bytes …)


class Incoming:
    exchange: str
    routing_key: str
    delivery_tag: int
    redelivered: bool
    consumer_tag: str
    raw_properties: bytes  # may be given to publish() as it is: a copy untouched
    body: bytes
    properties: Properties  # decoded on first use; raises Malformed


class QueueOk(NamedTuple):
    name: str
    messages: int
    consumers: int


async def connect(
    addresses: Sequence[Address],
    *,
    name: str = "",
    heartbeat_seconds: float = 10.0,
    timeout_seconds: float = 10.0,
) -> Connection: ...


class Connection:
    address: Address
    server_properties: Table
    blocked: str | None
    on_blocked: Callable[[str | None], None] | None
    closed: asyncio.Future[AmqpError]  # its *result* is the reason (ConnectionClosed); never an exception

    async def channel(self) -> Channel: ...
    async def close(self, timeout_seconds: float = 5.0) -> None: ...


class Channel:
    number: int
    closed: asyncio.Future[AmqpError]  # its *result* is the reason: ChannelClosed or ConnectionClosed
    unconfirmed: int

    async def exchange_declare(self, exchange: str, kind: str = "topic", *, passive: bool = False, durable: bool = True, auto_delete: bool = False, internal: bool = False, arguments: Table | None = None) -> None: ...
    async def exchange_delete(self, exchange: str, *, if_unused: bool = False) -> None: ...
    async def exchange_bind(self, destination: str, source: str, routing_key: str = "", arguments: Table | None = None) -> None: ...
    async def exchange_unbind(self, destination: str, source: str, routing_key: str = "", arguments: Table | None = None) -> None: ...
    async def queue_declare(self, queue: str = "", *, passive: bool = False, durable: bool = True, exclusive: bool = False, auto_delete: bool = False, arguments: Table | None = None) -> QueueOk: ...
    async def queue_bind(self, queue: str, exchange: str, routing_key: str = "", arguments: Table | None = None) -> None: ...
    async def queue_unbind(self, queue: str, exchange: str, routing_key: str = "", arguments: Table | None = None) -> None: ...
    async def queue_delete(self, queue: str, *, if_unused: bool = False, if_empty: bool = False) -> int: ...
    async def queue_purge(self, queue: str) -> int: ...
    async def qos(self, prefetch: int, *, whole_channel: bool = False) -> None: ...
    async def confirm_select(self) -> None: ...
    async def consume(self, queue: str, on_delivery: Callable[[Incoming], None], *, tag: str = "", no_ack: bool = False, exclusive: bool = False, arguments: Table | None = None, on_cancel: Callable[[str], None] | None = None) -> str: ...
    async def cancel(self, tag: str) -> None: ...
    async def get(self, queue: str, *, no_ack: bool = False) -> Incoming | None: ...
    def ack(self, delivery_tag: int, *, multiple: bool = False) -> None: ...  # synchronous; raises ChannelClosed/ConnectionClosed when the channel is gone
    def nack(self, delivery_tag: int, *, multiple: bool = False, requeue: bool = True) -> None: ...
    def reject(self, delivery_tag: int, *, requeue: bool = True) -> None: ...
    async def recover(self, *, requeue: bool = True) -> None: ...
    async def close(self, timeout_seconds: float = 5.0) -> None: ...

    def publish(self, exchange: str, routing_key: str, body: bytes, properties: Properties | bytes = Properties(), *, mandatory: bool = False) -> asyncio.Future[None]:
        # raises ChannelClosed/ConnectionClosed at once when nothing was sent; the future raises Returned, Nacked, OutcomeUnknown.
        # Without confirm_select the future is done at once and mandatory is refused (ValueError).
        ...

    async def drain(self) -> None: ...  # waits while the buffer is above its mark, channel.flow is off, or the connection is blocked; raises when closed
