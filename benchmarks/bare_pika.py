"""The bare loop on RabbitMQ: pika's AsyncioConnection by hand, which is the fastest maintained asyncio client for it.

Decode each message in the callback, then acknowledge it; publish persistent messages with a window of unconfirmed ones. The
messages are those that Conveyor carries: what waits was published by it, and what is published has its properties and
headers. No handlers that wait, retries, delays, dead letters, reconnection, or errors.
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
from benchmarks.load import orders
from benchmarks.order import ORDER, TASKS, TOPIC, Countdown, OrderCreated
from benchmarks.pings import Ping, Waits
from benchmarks.subject import Load
from conveyor.brokers.rabbitmq.address import DEFAULT_EXCHANGE
from conveyor.brokers.rabbitmq.envelope import properties_of

FILLED: Final = "orders.handle"
"""The queue that Conveyor made and filled: the same messages in the same queue, taken by another client."""
QUEUE: Final = "orders"
PREFETCH: Final = 1_000
READY: Final = "[0.0]"
"""What a receiver says when it listens."""
BODY_ALONE: Final = pika.BasicProperties(delivery_mode=2, content_type="application/json")


def _envelope() -> pika.BasicProperties:
    """What Conveyor publishes beside a body."""
    [message] = orders(1)
    properties = properties_of(message)._asdict()
    return pika.BasicProperties(**{name: value for name, value in properties.items() if value is not None})


class _Bare:
    """A connection with one channel, whose callbacks become awaitable where nothing is measured."""

    channel: Any

    def __init__(self) -> None:
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self, url: str) -> None:
        """Connect."""
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

    async def declare(self) -> None:
        """A quorum queue."""
        await self.ask(self.channel.queue_declare, QUEUE, durable=True, arguments={"x-queue-type": "quorum"})

    async def ask(self, method: Any, *arguments: Any, **options: Any) -> None:
        """Call what answers with a callback."""
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        method(*arguments, callback=answered.set_result, **options)
        await answered

    async def close(self) -> None:
        """In order: the server has read everything that was sent."""
        self._connection.close()
        await self._closed


async def _consume(url: str, load: Load) -> dict[str, float]:
    decode = msgspec.json.Decoder(OrderCreated).decode
    bare = _Bare()
    await bare.open(url)
    await bare.ask(bare.channel.basic_qos, prefetch_count=PREFETCH)
    countdown = Countdown(load.messages)

    def on_message(channel: Any, method: Any, _: Any, body: bytes) -> None:
        decode(body)
        channel.basic_ack(method.delivery_tag)
        countdown.one()

    bare.channel.basic_consume(FILLED, on_message)
    await countdown.over.wait()
    await bare.close()
    return countdown.figures()


def consume(url: str, load: Load) -> Mapping[str, float]:
    """Acknowledge each one after decoding it."""
    return asyncio.run(_consume(url, load))


async def _publish(
    url: str, load: Load, exchange: str, routing_key: str, properties: pika.BasicProperties
) -> dict[str, float]:
    """Publish with a window of unconfirmed messages; each is encoded anew."""
    encode = msgspec.json.Encoder().encode
    bare = _Bare()
    await bare.open(url)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    sent = 0
    unconfirmed: set[int] = set()

    def fill_window() -> None:
        nonlocal sent
        while sent < load.messages and len(unconfirmed) < TASKS:
            bare.channel.basic_publish(exchange, routing_key, encode(ORDER), properties, mandatory=True)
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
    countdown = Countdown(load.messages)
    fill_window()
    await done
    figures = countdown.figures()
    await bare.close()
    return figures


def publish(url: str, load: Load) -> Mapping[str, float]:
    """With confirms, 100 of which may be outstanding; through the same exchange, with the same properties and headers."""
    return asyncio.run(_publish(url, load, DEFAULT_EXCHANGE, TOPIC, _envelope()))


def publish_body(url: str, load: Load) -> Mapping[str, float]:
    """The same without an envelope, straight to the queue."""
    return asyncio.run(_publish(url, load, "", FILLED, BODY_ALONE))


async def _latency(url: str, load: Load) -> dict[str, float]:
    encode = msgspec.json.Encoder().encode
    bare = _Bare()
    await bare.open(url)
    await bare.declare()
    await bare.ask(bare.channel.confirm_delivery, lambda _: None)
    properties = _envelope()

    async def publish(ping: Ping) -> None:
        bare.channel.basic_publish("", QUEUE, encode(ping), properties, mandatory=True)

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
    await bare.open(url)
    await bare.declare()

    def on_message(channel: Any, method: Any, _: Any, body: bytes) -> None:
        waits.note(decode(body))
        channel.basic_ack(method.delivery_tag)

    await bare.ask(bare.channel.basic_qos, prefetch_count=PREFETCH)
    await bare.ask(bare.channel.basic_consume, QUEUE, on_message)
    print(READY, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_receive(sys.argv[1]))
