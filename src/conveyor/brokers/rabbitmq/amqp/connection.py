"""A connection to one server: greeting, negotiation, heartbeats, frames in and out, and its end."""

from __future__ import annotations

import asyncio
import itertools
import math
import platform
import ssl
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

from pamqp import commands

from conveyor.brokers.rabbitmq.amqp.channel import CLOSE_SECONDS, Channel
from conveyor.brokers.rabbitmq.amqp.errors import (
    NO_CODE,
    AmqpError,
    ConnectionClosed,
    ConnectionFailed,
    Malformed,
    again,
    fail,
    words,
)
from conveyor.brokers.rabbitmq.amqp.frames import (
    BODY,
    FRAME,
    FRAME_END,
    HEADER,
    HEARTBEAT,
    METHOD,
    Table,
    decode_method,
    encode_method,
)

MAX_FRAME_BYTES: Final = 131_072
"""What this client offers for a frame; RabbitMQ's own default."""
MAX_HEADER_BYTES: Final = 16 * 1024 * 1024
"""A larger content header is refused. RabbitMQ does not split one, and adds to it (x-death) what may not fit the frame any more."""
MAX_CHANNELS: Final = 2047
"""What this client offers for channels on a connection; RabbitMQ's own default."""
HIGH_WATER_BYTES: Final = 256 * 1024
"""Unsent bytes above which `Channel.drain` waits."""
FRAME_ERROR: Final = 501
TLS_ALERT: Final = 0x15
HEARTBEAT_FRAME: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is and as whom to enter.

    Parameters:
        tls: how to encrypt and whom to trust; None is plain TCP.
    """

    host: str = "localhost"
    port: int = 5672
    virtual_host: str = "/"
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"{'amqps' if self.tls else 'amqp'}://{self.host}:{self.port} (virtual host {self.virtual_host!r})"


async def connect(
    addresses: Sequence[Address],
    *,
    name: str = "",
    heartbeat_seconds: float = 10.0,
    timeout_seconds: float = 10.0,
) -> Connection:
    """A connection to the first of some addresses that lets this client in.

    Parameters:
        name: shown by the server's own tools.
        heartbeat_seconds: either side that hears nothing for two of these gives the other up; whole seconds travel, so it
            is rounded up. 0 switches heartbeats off, unless the server insists.
        timeout_seconds: for each address, until it has let the client in.

    Raises:
        ConnectionFailed: none did.
    """
    reasons: list[tuple[Address, Exception]] = []
    for address in addresses:
        connection = Connection(address, name, heartbeat_seconds)
        try:
            async with asyncio.timeout(timeout_seconds):
                await connection.open()
        except TimeoutError:
            said = f"no answer within {timeout_seconds:g} s; is it the AMQP port of a RabbitMQ server?"
            reasons.append((address, TimeoutError(said)))
        except ssl.SSLError as error:
            reasons.append(
                (address, error if isinstance(error, ssl.SSLCertVerificationError) else OSError(_tls_said(error)))
            )
        except (OSError, AmqpError) as error:
            reasons.append((address, error))
        else:
            return connection
    raise ConnectionFailed(reasons)


def _tls_said(error: ssl.SSLError) -> str:
    return f"TLS failed ({error.reason or error}); does it speak TLS on this port (5671 as a rule)? amqp:// is without"


def _start_ok(address: Address, name: str) -> bytes:
    abilities = "publisher_confirms consumer_cancel_notify connection.blocked basic.nack authentication_failure_close"
    about: Table = {
        "product": "conveyor-amqp",
        "platform": f"Python {platform.python_version()}",
        "capabilities": dict.fromkeys(abilities.split(), True),
        **({"connection_name": name} if name else {}),
    }
    answer = {
        "client_properties": about,
        "mechanism": "PLAIN",
        "response": f"\0{address.user}\0{address.password}",
        "locale": "en_US",
    }
    return encode_method(commands.Connection.StartOk, 0, **answer)


class Connection(asyncio.Protocol):
    """A connection to one server; `connect` makes it. It belongs to the event loop that made it and to no other thread.

    Parameters:
        server_properties: what the server says of itself.
        blocked: why the server takes no publishes now; None while it does.
        on_blocked: called with that reason, and with None when it is over.
        closed: done when the connection is gone; its result is the reason.
    """

    def __init__(self, address: Address, name: str = "", heartbeat_seconds: float = 10.0) -> None:
        self._loop = asyncio.get_running_loop()
        self.address = address
        self.server_properties: Table = {}
        self.blocked: str | None = None
        self.on_blocked: Callable[[str | None], None] | None = None
        self.closed: asyncio.Future[AmqpError] = self._loop.create_future()
        self.closing = False
        self.max_payload = MAX_FRAME_BYTES - 8
        self.heartbeat_seconds = math.ceil(heartbeat_seconds)
        # Made now, so that an address which cannot travel is refused before anything is sent.
        self._start_ok = _start_ok(address, name)
        self._enter = encode_method(commands.Connection.Open, 0, virtual_host=address.virtual_host)
        self._transport: asyncio.Transport | None = None
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._channels: dict[int, Channel] = {}
        self._max_channels = MAX_CHANNELS
        self._free_numbers: deque[int] = deque()
        self._next_numbers = itertools.count(1)
        self._tail = b""
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._writable = True
        self._waiters: set[asyncio.Future[None]] = set()
        self.heard = 0
        """How often the server has said something."""
        self._heard_before = -1
        self._sent = True
        self._silent_ticks = 0
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Connect and negotiate; whatever interrupts it leaves nothing behind."""
        host, port, tls = self.address.host, self.address.port, self.address.tls
        try:
            await self._loop.create_connection(lambda: self, host, port, ssl=tls)
            await self._opened
        except BaseException:
            await self._cut(ConnectionClosed(NO_CODE, "the connection was never opened"))
            raise

    async def channel(self, *, patient: bool = False) -> Channel:
        """A new channel.

        Parameters:
            patient: its requests wait for their answers for as long as the connection lives.

        Raises:
            ConnectionClosed: the connection is gone.
            AmqpError: the connection has as many as the server allows.
        """
        self.check()
        number = self._free_numbers.popleft() if self._free_numbers else next(self._next_numbers)
        if number > self._max_channels:
            self._next_numbers = itertools.count(number)
            raise AmqpError(f"the server allows {self._max_channels} channels on a connection")
        channel = self._channels[number] = Channel(self, number, patient=patient)
        try:
            await channel.request(commands.Channel.Open, commands.Channel.OpenOk)
        except asyncio.CancelledError:
            channel.begin_close()
            raise
        return channel

    async def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Send what is waiting, take leave of the server, and cut the socket if that takes too long."""
        try:
            async with asyncio.timeout(timeout_seconds):
                if not self.closed.done() and not self.closing:
                    self.closing = True
                    for channel in self._channels.values():
                        channel.ignore_deliveries()
                    close = {"reply_code": 200, "reply_text": "goodbye", "class_id": 0, "method_id": 0}
                    self.send(encode_method(commands.Connection.Close, 0, **close))
                await asyncio.shield(self._lost)
        except TimeoutError:
            pass  # cut below
        finally:
            await self._cut(ConnectionClosed(200, "closed by this client"))

    def check(self) -> None:
        """Raise what ended the connection, if anything did."""
        if self.closed.done():
            raise again(self.closed.result())
        if self.closing:
            raise ConnectionClosed(200, "closed by this client")

    # What the channels use: sending, waiting until sending is welcome, and leaving.

    def send(self, *parts: bytes) -> None:
        """Send some bytes with all that this tick of the event loop sends."""
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += parts
        for part in parts:
            self._unsent_bytes += len(part)
        if self._unsent_bytes > HIGH_WATER_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._unsent and self._transport is not None and not self.closed.done():
            data = self._unsent[0] if len(self._unsent) == 1 else b"".join(self._unsent)
            self._unsent.clear()
            self._unsent_bytes = 0
            self._sent = True
            self._transport.write(data)

    @property
    def congested(self) -> bool:
        """Whether publishing should wait: the socket takes no more, or the server asked for a pause."""
        return not self._writable or self.blocked is not None

    async def changed(self) -> None:
        """Wait until something changed that publishing may be waiting for."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def wake(self) -> None:
        """Let all who wait in `changed` look again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def forget(self, number: int) -> None:
        """A channel that both sides closed; its number may be used again."""
        if self._channels.pop(number, None) is not None:
            self._free_numbers.append(number)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have all the methods, but are no asyncio.Transport.
        self._transport = transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        transport.write(b"AMQP\x00\x00\x09\x01")

    def connection_lost(self, exc: Exception | None) -> None:
        what = f"the connection was lost: {words(exc)}" if exc else "the server hung up"
        self._finish(ConnectionClosed(NO_CODE, what))
        if not self._lost.done():
            self._lost.set_result(None)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self.wake()

    def data_received(self, data: bytes) -> None:
        self.heard += 1
        if self.closed.done():
            return
        if self._tail:
            data = self._tail + data
        try:
            self._tail = data[self._read(data) :]
        except (Malformed, struct.error, IndexError) as error:
            self._tail = b""
            what = str(error) if isinstance(error, Malformed) else "a frame shorter than its content"
            self._refuse(FRAME_ERROR, f"the server broke the protocol: {what}")

    def _read(self, data: bytes) -> int:
        """Handle all whole frames of some bytes; how far they reach."""
        if not self._opened.done() and data and data[0] != METHOD:
            self._check_greeting(data)
        position, end = 0, len(data)
        while end - position >= 8 and not self.closed.done():
            kind, number, size = FRAME.unpack_from(data, position)
            start = position + 7
            stop = start + size
            if size > self.max_payload and (kind != HEADER or size > MAX_HEADER_BYTES):
                raise Malformed(f"a frame of {size} bytes, where {self.max_payload} were agreed on")
            if stop >= end:
                if kind not in {METHOD, HEADER, BODY, HEARTBEAT}:
                    raise Malformed(f"a frame of the unknown type {kind}")
                break
            if data[stop] != FRAME_END:
                raise Malformed("a frame without its end mark")
            channel = self._channels.get(number)
            if channel is None:
                self._on_frame(kind, number, data[start:stop])
                position = stop + 1
            else:
                position = channel.on_frame(kind, data, start, stop)
        return position

    def _check_greeting(self, data: bytes) -> None:
        """Say what is wrong at the first bytes of somebody who does not speak AMQP 0.9.1; he may say no more, and wait for us."""
        if data.startswith(b"AMQP") and len(data) >= 8:
            version = ".".join(map(str, data[5:8]))
            raise Malformed(f"it does not speak AMQP 0.9.1 but asks for {version}")
        if data[0] == TLS_ALERT:
            raise Malformed("it speaks TLS: use amqps://, or the port without it")
        if data[0] != HEARTBEAT and not b"AMQP".startswith(data[:4]):
            raise Malformed(f"what answers on this port is no AMQP server; it says {data[:40]!r}")

    # The connection's own methods

    def _on_frame(self, kind: int, number: int, payload: bytes) -> None:
        if kind == HEARTBEAT and number == 0:
            return
        if kind != METHOD or number != 0:
            raise Malformed(f"a frame of type {kind} on channel {number}, which is not open")
        match frame := decode_method(payload):
            case commands.Connection.Close():
                self.send(encode_method(commands.Connection.CloseOk, 0))
                self._flush()
                self._leave(ConnectionClosed(frame.reply_code or NO_CODE, frame.reply_text))
            case commands.Connection.CloseOk() if self.closing:
                self._leave(ConnectionClosed(200, "closed by this client"))
            case commands.Connection.Blocked():
                self._set_blocked(frame.reason)
            case commands.Connection.Unblocked():
                self._set_blocked(None)
            case commands.Connection.Start() if not self._opened.done():
                self._start(frame)
            case commands.Connection.Tune() if not self._opened.done():
                self._tune(frame)
            case commands.Connection.OpenOk() if not self._opened.done():
                self._opened.set_result(None)
            case _:
                raise Malformed(f"{frame.name} out of turn")

    def _start(self, frame: commands.Connection.Start) -> None:
        offered = str(frame.mechanisms).split()
        if "PLAIN" not in offered:
            self._leave(ConnectionClosed(NO_CODE, f"the server takes no password (PLAIN), only {', '.join(offered)}"))
            return
        if isinstance(frame.server_properties, dict):
            self.server_properties = frame.server_properties
        self.send(self._start_ok)

    def _tune(self, frame: commands.Connection.Tune) -> None:
        max_frame = min(frame.frame_max or MAX_FRAME_BYTES, MAX_FRAME_BYTES)
        if max_frame < 4096:  # the smallest that the specification allows
            raise Malformed(f"it wants frames of at most {max_frame} bytes")
        self.max_payload = max_frame - 8
        self._max_channels = min(frame.channel_max or MAX_CHANNELS, MAX_CHANNELS)
        asked, wanted = int(frame.heartbeat or 0), self.heartbeat_seconds
        self.heartbeat_seconds = min(asked, wanted) if asked and wanted else max(asked, wanted)
        tuned = {"channel_max": self._max_channels, "frame_max": max_frame, "heartbeat": self.heartbeat_seconds}
        self.send(
            encode_method(commands.Connection.TuneOk, 0, **tuned),
            self._enter,
        )
        if self.heartbeat_seconds:
            self._timer = self._loop.call_later(self.heartbeat_seconds / 2, self._tick)

    def _tick(self) -> None:
        """Twice an interval: say that this side lives, and see whether the other does."""
        self._silent_ticks = 0 if self.heard != self._heard_before else self._silent_ticks + 1
        # The third tick in a row comes between 1.5 and 2 intervals after the last sign of life.
        if self._silent_ticks >= 3:
            self.give_up(f"the server was silent for two heartbeats of {self.heartbeat_seconds} s")
            return
        if not self._sent and self._transport is not None and self._writable:
            self._transport.write(HEARTBEAT_FRAME)
        self._heard_before = self.heard
        self._sent = False
        self._timer = self._loop.call_later(self.heartbeat_seconds / 2, self._tick)

    def _set_blocked(self, reason: str | None) -> None:
        self.blocked = reason
        self.wake()
        if self.on_blocked is not None:
            self.call(self.on_blocked, reason)

    def call(self, listener: Callable[[Any], None], argument: object) -> None:
        """Call a listener, whose failure is the event loop's to report and must not end the reading."""
        try:
            listener(argument)
        except Exception as error:
            text = "a listener of the AMQP client failed"
            self._loop.call_exception_handler({"message": text, "exception": error, "protocol": self})

    # The end

    def _refuse(self, code: int, text: str) -> None:
        """End a connection whose server cannot be understood, and tell it why."""
        if self._opened.done() and not self.closed.done():
            close = {"reply_code": code, "reply_text": ascii(text)[:200], "class_id": 0, "method_id": 0}
            self.send(encode_method(commands.Connection.Close, 0, **close))
            self._flush()
        self._leave(ConnectionClosed(code, text))

    def _leave(self, reason: ConnectionClosed) -> None:
        """Everything is over; let the transport send what it still has, but not for ever."""
        self._finish(reason)
        if self._transport is not None:
            self._transport.close()
            self._timer = self._loop.call_later(CLOSE_SECONDS, self._abort)

    def give_up(self, why: str) -> None:
        """The other side is of no use any more: end it without a word."""
        self._finish(ConnectionClosed(NO_CODE, why))
        self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _cut(self, reason: ConnectionClosed) -> None:
        """Leave no socket behind."""
        self._finish(reason)
        if self._transport is not None and not self._lost.done():
            self._abort()
            await asyncio.shield(self._lost)

    def _finish(self, reason: ConnectionClosed) -> None:
        """Every promise that this connection made is settled with the reason why it ended."""
        if self._timer is not None:
            self._timer.cancel()
        if self.closed.done():
            return
        self.closed.set_result(reason)
        self._unsent.clear()
        if not self._opened.done():
            fail(self._opened, reason)
        for channel in list(self._channels.values()):
            channel.finish(reason)
        self.wake()
