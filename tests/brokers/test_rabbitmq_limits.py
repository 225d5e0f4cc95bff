"""RabbitMQ at its limits: headers that fill a frame, connections that do not last, and consumers by the hundred."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pika
import pytest

from conveyor.broker import DeadFilter, Delivery, Queue, Settlement
from conveyor.brokers.rabbitmq import link, stream
from conveyor.brokers.rabbitmq.address import read_url
from conveyor.brokers.rabbitmq.amqp import Channel, ConnectionClosed
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Dead, RetryAt
from tests.brokers.test_rabbitmq import PATIENCE_SECONDS, one, opened, plainly

if TYPE_CHECKING:
    from pika.adapters.blocking_connection import BlockingChannel

    from servers.rabbitmq import RabbitMQ


@pytest.fixture(params=["quorum", "classic"])
def url(rabbitmq: RabbitMQ, request: pytest.FixtureRequest) -> str:
    return f"{rabbitmq.url()}?queue_type={request.param}"


@pytest.mark.parametrize("size", [130_400, 130_800, 131_030], ids=["room for notes", "room for few", "room for none"])
async def test_a_message_whose_headers_fill_a_frame_is_retried_and_buried_and_disturbs_nobody(
    url: str, size: int
) -> None:
    def send(channel: BlockingChannel) -> None:
        channel.basic_publish("", "q", b"large", pika.BasicProperties(headers={"blob": "x" * size}))

    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",))])
        connections = broker._link.connection, broker.publisher.connection
        await plainly(url, send)
        first = await one(broker, "q")
        assert first.message.headers["blob"] == "x" * size
        retry = RetryAt(time.time() + 0.2, "ValueError: no")  # it waits where the server notes its death
        assert await broker.settle([Settlement(first, retry)]) == []
        second = await one(broker, "q")
        assert (second.message.id, second.message.body, second.attempts) == (first.message.id, b"large", 1)
        buried = Dead("exhausted", "ValueError: " + "no" * 1000, "a traceback\n" * 1000)
        assert await broker.settle([Settlement(second, buried)]) == []
        [letter] = await broker.dead_letters(DeadFilter(queue="q"), limit=10)
        assert (letter.message.id, letter.message.body, letter.reason) == (first.message.id, b"large", "exhausted")
        assert letter.error.startswith("ValueError: no")
        assert set(letter.message.headers.items()) & {("blob", "x" * size), ("conveyor-left-out", "blob")}
        assert (broker._link.connection, broker.publisher.connection) == connections


async def test_connections_that_are_lost_at_once_are_made_ever_more_slowly_until_one_has_lived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Lost:
        def __init__(self) -> None:
            self.closed = asyncio.get_running_loop().create_future()
            self.closed.set_result(ConnectionClosed(0, "lost at once"))

        async def close(self) -> None: ...

    async def connect(*_: object, **__: object) -> Lost:
        return Lost()

    async def begin(_: object) -> str:
        return "session"

    waits: list[float] = []

    def uniform(*_: float) -> float:
        waits.append(lost._wait)
        return 0.0

    lost = link.Link[str](read_url("amqp://localhost"), "a link", begin, lambda: 10.0)
    monkeypatch.setattr(link, "connect", connect)
    monkeypatch.setattr(link, "LIVED_SECONDS", 3600.0)
    monkeypatch.setattr("random.uniform", uniform)
    await lost.open()
    for _ in range(5):
        assert await lost.session() == "session"
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2]  # how long the one after would wait
    monkeypatch.setattr(link, "LIVED_SECONDS", 0.0)
    assert await lost.session() == "session"
    assert (len(waits), lost._wait) == (5, link.FIRST_WAIT_SECONDS)
    await lost.close()


# --- consumers ------------------------------------------------------------------------------------------------------


async def test_fetches_that_each_want_one_more_do_not_each_open_a_consumer(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "KEPT_SECONDS", 10 * PATIENCE_SECONDS)
    consume, consumers = Channel.consume, Counter[str]()

    async def counting(self: Channel, queue: str, *args: Any, **options: Any) -> str:
        consumers[queue] += 1
        return await consume(self, queue, *args, **options)

    monkeypatch.setattr(Channel, "consume", counting)
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",))])
        await broker.publish([Message(f"m{number}", "t", b"{}") for number in range(120)])
        subscription = await broker.subscribe("q", 100)
        held: list[Delivery] = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(held) < 100:
                held += await subscription.fetch(1)
        assert [each.message.id for each in held] == [f"m{number}" for number in range(100)]
        assert consumers["q"] <= 8  # 1, 2, 4, … 64, 100
        assert await broker.settle([Settlement(each, DONE) for each in held]) == []


@pytest.mark.parametrize("ends", ["with little", "cancelled"])
async def test_a_fetch_that_waits_for_room_goes_on_when_another_did_not_need_all_it_asked_for(
    url: str, ends: str
) -> None:
    async with opened(url) as broker, asyncio.timeout(2 * PATIENCE_SECONDS):
        await broker.declare([Queue(name="q", topics=("t",))])
        subscription = await broker.subscribe("q", 10)
        first = asyncio.create_task(subscription.fetch(10))
        while not subscription.stream._fetching:
            await asyncio.sleep(0)
        second = asyncio.create_task(subscription.fetch(10))
        await asyncio.sleep(0)  # it has seen that there is no room
        if ends == "cancelled":
            first.cancel()
        else:
            await broker.publish([Message("a", "t", b"{}")])
        await asyncio.wait([first])
        await broker.publish([Message("b", "t", b"{}")])
        [delivery] = await asyncio.wait_for(second, PATIENCE_SECONDS)
        assert delivery.message.id == "b"
