"""The AMQP client against a real RabbitMQ: what it negotiates, what the server refuses, and what happens when it goes away."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import pytest

from conveyor.brokers.rabbitmq.amqp import (
    Address,
    AmqpError,
    Channel,
    ChannelClosed,
    Connection,
    ConnectionClosed,
    ConnectionFailed,
    Incoming,
    Nacked,
    OutcomeUnknown,
    Properties,
    QueueOk,
    Returned,
    Table,
    connect,
)
from servers.certificate import Certificate

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ

PERSISTENT: Final = Properties(delivery_mode=2)


def address_of(rabbitmq: RabbitMQ, **changes: Any) -> Address:
    """A new virtual host of the server."""
    parts = urlsplit(rabbitmq.url())
    fields: dict[str, Any] = {"host": "127.0.0.1", "port": rabbitmq.port, "virtual_host": parts.path[1:]}
    return Address(**{**fields, **changes})


@asynccontextmanager
async def connected(address: Address, **options: Any) -> AsyncIterator[tuple[Connection, Channel]]:
    """A connection with one channel that confirms."""
    connection = await connect([address], **options)
    try:
        channel = await connection.channel()
        await channel.confirm_select()
        yield connection, channel
    finally:
        await connection.close()


class Inbox:
    """What a consumer was delivered, to be waited for."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Incoming] = asyncio.Queue()

    def __call__(self, message: Incoming) -> None:
        self._queue.put_nowait(message)

    async def take(self) -> Incoming:
        async with asyncio.timeout(60):
            return await self._queue.get()

    @property
    def empty(self) -> bool:
        return self._queue.empty()


# Entering -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", r"is no AMQP server; it says b'HTTP/1.1 400"),
        (b"220 mail.example\r\n", "is no AMQP server"),
        (b"+OK\r\n", "is no AMQP server"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "it speaks TLS: use amqps://"),
        (b"AMQP\x00\x01\x00\x00", "asks for 1.0.0"),
    ],
)
async def test_who_does_not_speak_amqp_is_known_by_his_first_words(says: bytes, told: str) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        await reader.read()  # it says no more, and waits
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        with pytest.raises(ConnectionFailed, match=told):
            await connect([address], timeout_seconds=3600.0)


async def test_a_connection_shows_its_name_and_agrees_on_a_heartbeat(rabbitmq: RabbitMQ) -> None:
    address = address_of(rabbitmq)
    async with connected(address, name="the till", heartbeat_seconds=6.5) as (connection, _):
        assert connection.server_properties["product"] == "RabbitMQ"
        assert connection.heartbeat_seconds == 7
        shown = rabbitmq.ctl("list_connections", "vhost", "timeout", "frame_max", "channel_max", "client_properties")
        (line,) = [line for line in shown.splitlines() if address.virtual_host in line]
        assert "the till" in line
        assert line.split("\t")[1:4] == ["7", "131072", "2047"]
    assert isinstance(connection.closed.result(), ConnectionClosed)


async def test_every_host_that_refuses_says_why(rabbitmq: RabbitMQ, free_port: int) -> None:
    address = address_of(rabbitmq)
    there: dict[str, Any] = {"host": "127.0.0.1", "port": rabbitmq.port}
    wrong = [
        Address(**there, virtual_host=address.virtual_host, password="wrong"),
        Address(**there, virtual_host="absent"),
        Address("127.0.0.1", free_port),
    ]
    with pytest.raises(ConnectionFailed) as caught:
        await connect(wrong)
    password, vhost, nobody = (reason for _, reason in caught.value.reasons)
    assert isinstance(password, ConnectionClosed)
    assert password.code == 403
    assert "ACCESS_REFUSED" in str(caught.value)
    assert isinstance(vhost, ConnectionClosed)
    assert "vhost absent not found" in vhost.text
    assert isinstance(nobody, ConnectionRefusedError)
    assert "wrong" not in str(caught.value)


async def test_the_first_host_that_lets_it_in_is_used(rabbitmq: RabbitMQ, free_port: int) -> None:
    address = address_of(rabbitmq)
    connection = await connect([Address("127.0.0.1", free_port), address])
    assert connection.address == address
    await connection.close()


async def test_a_server_that_says_nothing_is_given_up() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ConnectionFailed, match="no answer within 0.05 s"),
    ):
        await connect([Address("127.0.0.1", silent.getsockname()[1])], timeout_seconds=0.05)


@pytest.mark.parametrize("tls", [None, ssl.create_default_context()], ids=["plain", "tls"])
async def test_whoever_gives_up_connecting_leaves_no_socket_behind(tls: ssl.SSLContext | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connecting = asyncio.ensure_future(connect([Address("127.0.0.1", silent.getsockname()[1], tls=tls)]))
        accepted, _ = await asyncio.to_thread(silent.accept)
        with accepted:
            assert await asyncio.to_thread(accepted.recv, 65_536)
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
            assert await asyncio.to_thread(accepted.recv, 65_536) == b""


async def test_messages_travel_encrypted_and_a_stranger_is_not_trusted(
    rabbitmq: RabbitMQ, tmp_path: Path, free_port: int
) -> None:
    certificate = Certificate.make(tmp_path)
    address = address_of(rabbitmq)
    listener = f'{{"127.0.0.1", {free_port}}}'
    files = f'{{certfile, "{certificate.file}"}}, {{keyfile, "{certificate.key}"}}'
    rabbitmq.evaluate(f"rabbit_networking:start_ssl_listener({listener}, [{files}], 1)")
    try:
        trusting = ssl.create_default_context(cafile=str(certificate.authority))
        there: dict[str, Any] = {"host": "localhost", "port": free_port, "virtual_host": address.virtual_host}
        async with connected(Address(**there, tls=trusting)) as (_, channel):
            await channel.queue_declare("q")
            await channel.publish("", "q", b"x" * 1_000_000, PERSISTENT, mandatory=True)
            message = await channel.get("q")
            assert message is not None
            assert message.body == b"x" * 1_000_000
        with pytest.raises(ConnectionFailed, match="CERTIFICATE_VERIFY_FAILED"):
            await connect([Address(**there, tls=ssl.create_default_context())])
        with pytest.raises(ConnectionFailed):
            await connect([Address(**there)], timeout_seconds=5.0)
    finally:
        rabbitmq.evaluate(f"rabbit_networking:stop_tcp_listener({listener})")


# Exchanges, queues and messages -------------------------------------------------------------------------------------


async def test_exchanges_and_queues_of_any_name_are_made_bound_and_deleted(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq)) as (_, channel):
        queue, exchange, source = "заказы | a=b", "x{1}*", "s%2F"
        assert await channel.queue_declare(queue, arguments={"x-max-length": 5}) == QueueOk(queue, 0, 0)
        await channel.exchange_declare(exchange, "topic")
        await channel.exchange_declare(source, "fanout", durable=False, auto_delete=False)
        await channel.exchange_bind(exchange, source)
        await channel.queue_bind(queue, exchange, "order.*")
        await channel.publish(source, "order.placed", b"1", mandatory=True)
        await channel.exchange_unbind(exchange, source)
        with pytest.raises(Returned, match="NO_ROUTE"):
            await channel.publish(source, "order.placed", b"2", mandatory=True)
        assert (await channel.queue_declare(queue, passive=True)).messages == 1
        assert await channel.queue_purge(queue) == 1
        await channel.queue_unbind(queue, exchange, "order.*")
        assert await channel.queue_delete(queue) == 0
        await channel.exchange_delete(exchange, if_unused=True)
        await channel.exchange_delete(source)
        invented = await channel.queue_declare(exclusive=True)
        assert invented.name.startswith("amq.gen-")


@pytest.mark.parametrize("size", [0, 1, 131_064, 131_065, 5_000_000])
async def test_a_message_of_any_size_arrives_whole(rabbitmq: RabbitMQ, size: int) -> None:
    content = os.urandom(size)
    headers: Table = {"a": 1, "b": 2.5, "c": [True, None, {"d": "ü"}], "raw": b"\xff", "large": 2**40}
    properties = Properties(
        "application/json", headers=headers, delivery_mode=2, message_id="m", timestamp=1_800_000_000
    )
    async with connected(address_of(rabbitmq)) as (_, channel):
        await channel.queue_declare("q")
        await channel.publish("", "q", content, properties, mandatory=True)
        inbox = Inbox()
        tag = await channel.consume("q", inbox)
        message = await inbox.take()
        assert message.body == content
        assert message.properties == properties
        assert (message.exchange, message.routing_key, message.consumer_tag) == ("", "q", tag)
        assert not message.redelivered
        await channel.publish("", "copies", message.body, message.raw_properties)
        channel.ack(message.delivery_tag)
        await channel.cancel(tag)
        assert await channel.get("q") is None


async def test_what_is_given_back_comes_again_and_what_is_settled_does_not(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq)) as (connection, channel):
        await channel.queue_declare("q")
        await channel.qos(10)
        for number in range(5):
            await channel.publish("", "q", b"%d" % number, PERSISTENT, mandatory=True)
        inbox = Inbox()
        await channel.consume("q", inbox)
        first = [await inbox.take() for _ in range(5)]
        assert [message.body for message in first] == [b"0", b"1", b"2", b"3", b"4"]
        channel.ack(first[1].delivery_tag, multiple=True)
        channel.nack(first[2].delivery_tag)
        channel.reject(first[3].delivery_tag)
        channel.nack(first[4].delivery_tag, requeue=False)
        again = [await inbox.take() for _ in range(2)]
        assert {message.body for message in again} == {b"2", b"3"}
        assert all(message.redelivered for message in again)
        await channel.close()
        other = await connection.channel()
        await other.queue_declare("q", passive=True)
        left = [await other.get("q") for _ in range(3)]
        assert sorted(message.body for message in left if message) == [b"2", b"3"]
        await other.recover()
        assert await other.queue_delete("q") == 2


async def test_no_more_is_delivered_than_prefetch_allows(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq)) as (_, channel):
        await channel.queue_declare("q")
        for _ in range(5):
            await channel.publish("", "q", b"x")
        await channel.qos(2)
        inbox = Inbox()
        await channel.consume("q", inbox)
        first = [await inbox.take() for _ in range(2)]
        await channel.qos(2)  # whatever the server had sent before it has arrived before its answer
        assert inbox.empty
        channel.ack(first[-1].delivery_tag, multiple=True)
        await inbox.take()


async def test_a_consumer_hears_when_its_queue_is_deleted(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq)) as (_, channel):
        await channel.queue_declare("q")
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        tag = await channel.consume("q", Inbox(), on_cancel=ended.set_result)
        await channel.queue_delete("q")
        async with asyncio.timeout(60):
            assert await ended == tag


# Publishing ---------------------------------------------------------------------------------------------------------


async def test_of_many_publishes_at_once_each_knows_its_own_fate(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq)) as (_, channel):
        await channel.queue_declare("q")
        await channel.queue_declare("full", arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
        await channel.publish("", "full", b"x")

        async def publish(number: int) -> str:
            await channel.drain()
            properties = Properties(message_id=str(number))
            try:
                await channel.publish("", ("q", "full", "nowhere")[number % 3], b"x", properties, mandatory=True)
            except (Returned, Nacked) as error:
                if isinstance(error, Returned):
                    assert error.message.properties.message_id == str(number)
                return type(error).__name__
            return "confirmed"

        outcomes = await asyncio.gather(*map(publish, range(300)))
        assert outcomes == ["confirmed", "Nacked", "Returned"] * 100
        assert channel.unconfirmed == 0
        assert (await channel.queue_declare("q", passive=True)).messages == 100


async def test_an_error_of_a_channel_has_the_servers_words_and_leaves_the_connection_usable(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq)) as (connection, channel):
        published = channel.publish("absent", "key", b"x")
        with pytest.raises(OutcomeUnknown, match="no exchange 'absent'"):
            await published
        assert isinstance(channel.closed.result(), ChannelClosed)
        with pytest.raises(ChannelClosed, match="404 NOT_FOUND"):
            channel.publish("", "q", b"x")
        other = await connection.channel()
        assert other.number == channel.number
        await other.queue_declare("q")
        with pytest.raises(ChannelClosed) as caught:
            await other.queue_declare("q", arguments={"x-max-length": 3})
        assert caught.value.code == 406
        assert "inequivalent arg 'x-max-length'" in caught.value.text
        third = await connection.channel()
        third.ack(99)
        with pytest.raises(ChannelClosed, match="unknown delivery tag 99"):
            await third.qos(1)
        await (await connection.channel()).queue_delete("q")


async def test_drain_keeps_what_waits_for_a_slow_server_within_bounds(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq)) as (connection, channel):
        await channel.queue_declare("q")
        rabbitmq.pause()
        try:
            published = []
            while not connection.congested:  # until the sockets of both sides are full
                published.append(channel.publish("", "q", b"x" * 50_000))
                await asyncio.sleep(0)
            assert len(published) < 1000
            waiting = [asyncio.ensure_future(channel.drain()) for _ in range(3)]
            await asyncio.sleep(0)
            assert not any(one.done() for one in waiting)
        finally:
            rabbitmq.resume()
        async with asyncio.timeout(60):
            await asyncio.gather(*waiting, *published)


async def test_mandatory_without_confirms_is_refused(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq)) as (connection, _):
        channel = await connection.channel()
        with pytest.raises(ValueError, match="confirm_select"):
            channel.publish("", "q", b"x", mandatory=True)
        await channel.publish("", "q", b"x")


async def test_a_server_short_of_memory_blocks_publishing_and_says_why(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq)) as (connection, channel):
        await channel.queue_declare("q")
        heard: asyncio.Queue[str | None] = asyncio.Queue()
        connection.on_blocked = heard.put_nowait
        limit = rabbitmq.evaluate("vm_memory_monitor:get_vm_memory_high_watermark()")
        rabbitmq.ctl("set_vm_memory_high_watermark", "0")
        try:
            published = channel.publish("", "q", b"x", PERSISTENT, mandatory=True)
            async with asyncio.timeout(60):
                assert await heard.get() == "low on memory"
            assert connection.blocked == "low on memory"
            waiting = asyncio.ensure_future(channel.drain())
            await asyncio.sleep(0)
            assert not waiting.done()
        finally:
            rabbitmq.ctl("set_vm_memory_high_watermark", limit)
        async with asyncio.timeout(60):
            assert await heard.get() is None
            await waiting
            await published
        assert connection.blocked is None


# The end ------------------------------------------------------------------------------------------------------------


async def test_when_the_server_is_killed_everybody_who_waits_is_told(rabbitmq: RabbitMQ) -> None:
    address = address_of(rabbitmq)
    async with connected(address) as (connection, channel):
        await channel.queue_declare("q")
        await channel.publish("", "q", b"kept", PERSISTENT, mandatory=True)
        rabbitmq.pause()
        published = [channel.publish("", "q", b"x", PERSISTENT) for _ in range(10)]
        asked = [asyncio.ensure_future(ask()) for ask in (channel.queue_declare, connection.channel)]
        connection.pause_writing()
        asked.append(asyncio.ensure_future(channel.drain()))
        await asyncio.sleep(0)
        rabbitmq.kill()
        outcomes = await asyncio.gather(*published, *asked, return_exceptions=True)
        assert [type(one) for one in outcomes] == [OutcomeUnknown] * 10 + [ConnectionClosed] * 3
        with pytest.raises(ConnectionClosed):
            await connection.channel()
        with pytest.raises(ConnectionClosed):
            channel.publish("", "q", b"x")
        with pytest.raises(ConnectionClosed):
            channel.ack(1)
        await channel.close()
    rabbitmq.start()
    async with connected(address) as (_, channel):
        message = await channel.get("q")
        assert message is not None
        assert message.body == b"kept"


async def test_a_server_that_stops_in_order_says_so(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq)) as (connection, channel):
        rabbitmq.stop()
        async with asyncio.timeout(60):
            reason = await channel.closed
        assert isinstance(reason, ConnectionClosed)
        assert reason.code == 320
        assert "CONNECTION_FORCED" in str(connection.closed.result())
    rabbitmq.start()


async def test_a_server_that_falls_silent_is_noticed_by_its_heartbeats(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq), heartbeat_seconds=1) as (connection, channel):
        rabbitmq.pause()
        try:
            published = channel.publish("", "q", b"x")
            async with asyncio.timeout(60):
                with pytest.raises(OutcomeUnknown, match="silent for two heartbeats"):
                    await published
        finally:
            rabbitmq.resume()
        assert "silent" in str(connection.closed.result())


async def test_an_idle_connection_lives_on_by_heartbeats_alone(rabbitmq: RabbitMQ) -> None:
    async with connected(address_of(rabbitmq), heartbeat_seconds=1) as (connection, channel):
        # Three intervals with nothing to say: either side would have given the other up after two.
        done, _ = await asyncio.wait([connection.closed], timeout=3.2)
        assert not done
        await channel.queue_declare("q")


async def test_closing_a_connection_to_a_silent_server_takes_no_longer_than_asked(rabbitmq: RabbitMQ) -> None:
    connection = await connect([address_of(rabbitmq)])
    channel = await connection.channel()
    await channel.confirm_select()
    rabbitmq.pause()
    try:
        published = channel.publish("", "q", b"x")
        await connection.close(timeout_seconds=0.1)
        with pytest.raises(OutcomeUnknown):
            await published
    finally:
        rabbitmq.resume()


async def test_publishes_that_were_sent_before_an_orderly_close_reach_the_server(rabbitmq: RabbitMQ) -> None:
    address = address_of(rabbitmq)
    connection = await connect([address])
    channel = await connection.channel()
    await channel.queue_declare("q")
    for _ in range(1000):
        channel.publish("", "q", b"x" * 1000)
    await connection.close()
    async with connected(address) as (_, channel):
        assert (await channel.queue_declare("q", passive=True)).messages == 1000


async def test_a_connection_has_as_many_channels_as_the_server_allows(rabbitmq: RabbitMQ) -> None:
    rabbitmq.set("channel_max", "3")
    try:
        async with connected(address_of(rabbitmq)) as (connection, first):
            await connection.channel()
            third = await connection.channel()
            with pytest.raises(AmqpError, match="allows 3 channels"):
                await connection.channel()
            await third.close()
            assert (await connection.channel()).number == third.number
            await first.close()
            assert (await connection.channel()).number == first.number
    finally:
        rabbitmq.set("channel_max", "2047")


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_five_hundred_connections_leave_nothing_behind(rabbitmq: RabbitMQ) -> None:
    address = address_of(rabbitmq)
    unraisable: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unraisable.append(context))
    async with connected(address) as (_, channel):
        await channel.queue_declare("q")
    descriptors, tasks = open_descriptors(), len(asyncio.all_tasks())

    async def visit(close: Callable[[Connection], Any]) -> None:
        for _ in range(10):
            connection = await connect([address], timeout_seconds=60.0)
            channel = await connection.channel()
            await channel.confirm_select()
            await channel.publish("", "q", b"x", mandatory=True)
            await close(connection)

    async def cut(connection: Connection) -> None:
        await connection.close(timeout_seconds=0)

    await asyncio.gather(*(visit(cut if number % 5 == 0 else Connection.close) for number in range(50)))
    gc.collect()
    assert open_descriptors() == descriptors
    assert len(asyncio.all_tasks()) == tasks
    assert unraisable == []
    async with connected(address) as (_, channel):
        assert (await channel.queue_declare("q", passive=True)).messages == 500
