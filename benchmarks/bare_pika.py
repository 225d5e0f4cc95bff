"""The bare loop on RabbitMQ: pika's AsyncioConnection by hand, which is the fastest maintained asyncio client for it.

Decode each message in the callback, then acknowledge it; publish persistent messages with a window of unconfirmed ones. No handlers that
wait, retries, delays, dead letters, reconnection, or errors.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import pika
from pika.adapters.asyncio_connection import AsyncioConnection

from benchmarks import pings
from benchmarks.order import BODY, ORDER, TASKS, Countdown, OrderCreated
from benchmarks.pings import Ping, Waits
from benchmarks.subject import Load

QUEUE: Final = "orders"
PREFETCH: Final = 1_000
READY: Final = "[0.0]"
"""What a receiver says when it listens."""
PERSISTENT: Final = pika.BasicProperties(delivery_mode=2, content_type="application/json")


class _Bare:
    """A connection with one channel, whose callbacks become awaitable where nothing is measured."""

    channel: Any

    def __init__(self) -> None:
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self, url: str, queue_type: str = "classic") -> None:
        """Connect, and declare the durable queue."""
        opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._connection = AsyncioConnection(
            pika.URLParameters(url),
            on_open_callback=opened.set_result,
            on_open_error_callback=lambda _, error: opened.set_exception(RuntimeError(str(error))),
            on_close_callback=lambda _, __: self._closed.set_result(None),
        )
        await opened
        opened = asyncio.get_running_loop().create_future()
        self._connection.channel(on_open_callback=opened.set_result)
        self.channel = await opened
        arguments = {"x-queue-type": queue_type}
        await self.ask(self.channel.queue_declare, QUEUE, durable=True, arguments=arguments)

    async def ask(self, method: Any, *arguments: Any, **options: Any) -> None:
        """Call what answers with a callback."""
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        method(*arguments, callback=answered.set_result, **options)
        await answered

    async def close(self) -> None:
        """In order: the server has read everything that was sent."""
        self._connection.close()
        await self._closed


async def _fill(url: str, load: Load, queue_type: str = "classic") -> None:
    bare = _Bare()
    await bare.open(url, queue_type)
    await _send(bare, load.ready, BODY)
    await bare.close()


async def _send(bare: _Bare, messages: int, body: bytes | None) -> None:
    """Publish so many, with a window of unconfirmed ones; each is encoded anew if no body is given."""
    encode = msgspec.json.Encoder().encode
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    sent = 0
    unconfirmed: set[int] = set()

    def fill_window() -> None:
        nonlocal sent
        while sent < messages and len(unconfirmed) < TASKS:
            bare.channel.basic_publish("", QUEUE, body or encode(ORDER), PERSISTENT, mandatory=True)
            sent += 1
            unconfirmed.add(sent)

    def on_confirm(frame: Any) -> None:
        tag = frame.method.delivery_tag
        if frame.method.multiple:
            unconfirmed.difference_update([each for each in unconfirmed if each <= tag])
        else:
            unconfirmed.discard(tag)
        fill_window()
        if not unconfirmed and not done.done():
            done.set_result(None)

    await bare.ask(bare.channel.confirm_delivery, on_confirm)
    fill_window()
    if messages:
        await done


def fill(url: str, load: Load) -> None:
    """A classic durable queue with what waits in it."""
    asyncio.run(_fill(url, load))


def fill_quorum(url: str, load: Load) -> None:
    """The same, a quorum queue."""
    asyncio.run(_fill(url, load, "quorum"))


async def _consume(url: str, load: Load, queue_type: str) -> dict[str, float]:
    decode = msgspec.json.Decoder(OrderCreated).decode
    bare = _Bare()
    await bare.open(url, queue_type)
    await bare.ask(bare.channel.basic_qos, prefetch_count=PREFETCH)
    countdown = Countdown(load.messages)

    def on_message(channel: Any, method: Any, _: Any, body: bytes) -> None:
        decode(body)
        channel.basic_ack(method.delivery_tag)
        countdown.one()

    bare.channel.basic_consume(QUEUE, on_message)
    await countdown.over.wait()
    await bare.close()
    return countdown.figures()


def consume(url: str, load: Load) -> Mapping[str, float]:
    """Acknowledge each one after decoding it."""
    return asyncio.run(_consume(url, load, "classic"))


def consume_quorum(url: str, load: Load) -> Mapping[str, float]:
    """The same from a quorum queue."""
    return asyncio.run(_consume(url, load, "quorum"))


async def _publish(url: str, load: Load) -> dict[str, float]:
    bare = _Bare()
    await bare.open(url)
    countdown = Countdown(load.messages)
    await _send(bare, load.messages, None)
    figures = countdown.figures()
    await bare.close()
    return figures


def publish(url: str, load: Load) -> Mapping[str, float]:
    """With confirms, 100 of which may be outstanding."""
    return asyncio.run(_publish(url, load))


async def _latency(url: str, load: Load) -> dict[str, float]:
    encode = msgspec.json.Encoder().encode
    bare = _Bare()
    await bare.open(url, "quorum")
    await bare.ask(bare.channel.confirm_delivery, lambda _: None)

    async def publish(ping: Ping) -> None:
        bare.channel.basic_publish("", QUEUE, encode(ping), PERSISTENT, mandatory=True)

    async with pings.receiver("-m", "benchmarks.bare_pika", url) as process:
        await pings.answer(process)
        await pings.send(load.messages, publish)
        figures = pings.figures(await pings.answer(process))
    await bare.close()
    return figures


def latency(url: str, load: Load) -> Mapping[str, float]:
    """basic.publish in this process, a consumer that acknowledges each message in another one."""
    return asyncio.run(_latency(url, load))


async def _receive(url: str) -> None:
    decode = msgspec.json.Decoder(Ping).decode
    waits = Waits()
    bare = _Bare()
    await bare.open(url, "quorum")

    def on_message(channel: Any, method: Any, _: Any, body: bytes) -> None:
        waits.note(decode(body))
        channel.basic_ack(method.delivery_tag)

    await bare.ask(bare.channel.basic_qos, prefetch_count=PREFETCH)
    await bare.ask(bare.channel.basic_consume, QUEUE, on_message)
    print(READY, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_receive(sys.argv[1]))
