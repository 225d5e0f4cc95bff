"""The AMQP client without a server: field tables, frames cut anywhere, and servers that talk nonsense."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import body, commands, decode, encode, frame, header
from pamqp.base import Frame

from conveyor.brokers.rabbitmq.amqp import (
    Address,
    AmqpError,
    Channel,
    ChannelClosed,
    Connection,
    ConnectionClosed,
    Incoming,
    Malformed,
    Nacked,
    OutcomeUnknown,
    Properties,
    Returned,
    Table,
    connect,
)
from conveyor.brokers.rabbitmq.amqp import channel as channels
from conveyor.brokers.rabbitmq.amqp.frames import NO_PROPERTIES, decode_table, encode_method, encode_table

NAMES: Final = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
MOMENTS: Final = st.integers(0, 4_000_000_000).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))
DECIMALS: Final = st.builds(
    lambda unscaled, scale: Decimal(unscaled).scaleb(-scale), st.integers(0, 2**31 - 1), st.integers(0, 20)
)
PLAIN: Final = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), NAMES, MOMENTS, DECIMALS, st.floats(allow_nan=False)
)
VALUES: Final = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)
TABLES: Final = st.dictionaries(NAMES, VALUES, max_size=8)
SHORT: Final = st.none() | NAMES
PROPERTIES: Final = st.builds(
    Properties,
    content_type=SHORT,
    content_encoding=SHORT,
    headers=st.none() | TABLES,
    delivery_mode=st.none() | st.integers(1, 2),
    priority=st.none() | st.integers(0, 255),
    correlation_id=SHORT,
    reply_to=SHORT,
    expiration=SHORT,
    message_id=SHORT,
    timestamp=st.none() | st.integers(0, 2**32 - 1),
    type=SHORT,
    user_id=SHORT,
    app_id=SHORT,
)

# Field tables and properties ----------------------------------------------------------------------------------------


@given(TABLES)
def test_a_table_comes_back_as_it_went(table: dict[str, Any]) -> None:
    raw = encode_table(table)
    assert decode_table(raw) == (table, len(raw))


@given(TABLES)
def test_pamqp_reads_the_same_out_of_a_table(table: dict[str, Any]) -> None:
    assert decode.field_table(encode_table(table))[1] == table


@given(
    st.dictionaries(
        NAMES,
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), NAMES, MOMENTS, st.floats(width=32)),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
            max_leaves=12,
        ),
        max_size=8,
    )
)
def test_a_table_that_pamqp_wrote_is_read_as_pamqp_reads_it(table: dict[str, Any]) -> None:
    raw = encode.field_table(table)
    assert repr(decode_table(raw)[0]) == repr(decode.field_table(raw)[1])


@given(PROPERTIES)
def test_properties_come_back_as_they_went_and_pamqp_reads_them(properties: Properties) -> None:
    raw = properties.encode()
    assert Properties.decode(raw) == properties
    theirs = header.ContentHeader()
    theirs.unmarshal(struct.pack(">HHQ", 60, 0, 0) + raw)
    assert theirs.properties.headers == (
        properties.headers if properties.headers is not None else theirs.properties.headers
    )
    assert (theirs.properties.message_id or "") == (properties.message_id or "")
    assert theirs.properties.priority == properties.priority


@given(st.binary(max_size=60))
def test_properties_of_any_bytes_are_read_or_refused_as_malformed(raw: bytes) -> None:
    try:
        assert isinstance(Incoming("", "", raw_properties=raw).properties, Properties)
    except Malformed:
        pass


@given(PROPERTIES, st.data())
def test_properties_cut_short_are_malformed(properties: Properties, data: st.DataObject) -> None:
    raw = properties.encode()
    with pytest.raises(Malformed):
        Properties.decode(raw[: data.draw(st.integers(0, len(raw) - 1))])


def test_text_that_is_no_utf8_travels_untouched() -> None:
    raw = Properties(message_id="\udcff\udc80").encode()
    assert raw.endswith(b"\x02\xff\x80")
    assert Properties.decode(raw).encode() == raw
    assert decode_table(b"\x00\x00\x00\x08\x01kS\x00\x00\x00\x01\xff")[0] == {"k": b"\xff"}


def test_bytes_travel_as_bytes_and_a_time_without_zone_is_utc() -> None:
    table: Table = {"raw": b"\x00\xff", "at": datetime(2026, 1, 2)}  # noqa: DTZ001 - the one without zone
    assert decode_table(encode_table(table))[0] == {"raw": b"\x00\xff", "at": datetime(2026, 1, 2, tzinfo=UTC)}


def test_a_time_that_no_calendar_has_stays_a_number() -> None:
    raw = b"\x01kT" + struct.pack(">q", 2**62)
    assert decode_table(struct.pack(">I", len(raw)) + raw)[0] == {"k": 2**62}


def test_tables_nested_beyond_all_sense_are_malformed() -> None:
    raw = b""
    for _ in range(5000):
        raw = b"\x01kF" + struct.pack(">I", len(raw)) + raw
    with pytest.raises(Malformed, match="depth"):
        decode_table(struct.pack(">I", len(raw)) + raw)


@pytest.mark.parametrize(
    "properties",
    [
        Properties(message_id="x" * 256),
        Properties(priority=256),
        Properties(timestamp=-1),
        Properties(headers={"k" * 256: 1}),
        Properties(headers={"k": 2**63}),
        Properties(headers={"k": Decimal("NaN")}),
        Properties(headers={"k": object()}),  # type: ignore[dict-item]
    ],
)
def test_what_amqp_cannot_carry_is_a_value_error(properties: Properties) -> None:
    with pytest.raises(ValueError, match="AMQP"):
        properties.encode()


# A connection without a socket --------------------------------------------------------------------------------------


class Wire:
    """A transport that keeps what was sent; like uvloop's, it is no asyncio.Transport."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.sent = b""
        self.over = False

    def write(self, data: Any) -> None:
        assert not self.over
        self.sent += data

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.over:
            self.over = True
            asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)


START: Final = frame.marshal(commands.Connection.Start(0, 9, {"product": "test"}, "PLAIN", "en_US"), 0)
TUNE: Final = frame.marshal(commands.Connection.Tune(2047, 4096, 0), 0)
OPEN_OK: Final = frame.marshal(commands.Connection.OpenOk(), 0)
CHANNEL_OPEN_OK: Final = frame.marshal(commands.Channel.OpenOk(), 1)


class World:
    """An open connection with one channel that confirms and consumes, and the server's side of it."""

    def __init__(self) -> None:
        self.connection = Connection(Address(), heartbeat_seconds=0)
        self.wire = Wire(self.connection)
        self.delivered: list[Incoming] = []
        self.channel: Channel

    async def build(self) -> World:
        self.connection.connection_made(cast(asyncio.Transport, self.wire))
        for raw in (START, TUNE, OPEN_OK):
            self.hear(raw)
        opening = asyncio.ensure_future(self.connection.channel())
        await asyncio.sleep(0)
        self.hear(CHANNEL_OPEN_OK)
        self.channel = await opening
        consuming = asyncio.ensure_future(self.channel.consume("q", self.delivered.append, tag="c"))
        confirming = asyncio.ensure_future(self.channel.confirm_select())
        await asyncio.sleep(0)
        self.say(commands.Basic.ConsumeOk("c"))
        self.say(commands.Confirm.SelectOk())
        await asyncio.gather(consuming, confirming)
        return self

    def hear(self, raw: bytes) -> None:
        self.connection.data_received(raw)

    def say(self, method: Any, number: int = 1) -> None:
        self.hear(frame.marshal(method, number))


def in_a_world(test: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    """Run a test in a loop of its own that must have nothing to complain about."""

    async def run() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        world = await World().build()
        await test(world)
        await asyncio.sleep(0)
        world.wire.abort()
        await asyncio.sleep(0)
        assert complaints == []
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def delivery(number: int, content: bytes, properties: Properties = NO_PROPERTIES, limit: int = 4088) -> bytes:
    """basic.deliver as a server sends it."""
    method = commands.Basic.Deliver("c", number, False, "orders", "order.placed")
    head = struct.pack(">HHQ", 60, 0, len(content)) + properties.encode()
    raw = frame.marshal(method, 1) + struct.pack(">BHI", 2, 1, len(head)) + head + b"\xce"
    for start in range(0, len(content), limit):
        raw += frame.marshal(body.ContentBody(content[start : start + limit]), 1)
    return raw


def test_frames_cut_at_every_byte_are_read_the_same() -> None:
    properties = Properties(headers={"a": 1}, message_id="m")
    raw = delivery(1, b"first", properties) + frame.marshal(commands.Connection.Blocked("low on memory"), 0)
    raw += delivery(2, b"") + b"\x08\x00\x00\x00\x00\x00\x00\xce" + delivery(3, b"third" * 1000)

    async def test(world: World) -> None:
        for cut in range(len(raw) + 1):
            world.delivered.clear()
            world.hear(raw[:cut])
            world.hear(raw[cut:])
            assert [message.body for message in world.delivered] == [b"first", b"", b"third" * 1000]
            assert [message.delivery_tag for message in world.delivered] == [1, 2, 3]
            assert world.delivered[0].properties == properties
        world.delivered.clear()
        for byte in raw:
            world.hear(bytes([byte]))
        assert [message.body for message in world.delivered] == [b"first", b"", b"third" * 1000]
        assert world.connection.blocked == "low on memory"
        assert not world.connection.closed.done()

    in_a_world(test)


def test_a_header_that_the_server_added_to_may_be_larger_than_a_frame() -> None:
    properties = Properties(headers={"blob": "x" * 10_000})
    raw = delivery(1, b"first", properties) + delivery(2, b"", properties)
    assert len(properties.encode()) > 4088

    async def test(world: World) -> None:
        for cut in range(0, len(raw) + 1, 500):
            world.delivered.clear()
            world.hear(raw[:cut])
            world.hear(raw[cut:])
            assert [(each.body, each.properties) for each in world.delivered] == [
                (b"first", properties),
                (b"", properties),
            ]
        assert not world.connection.closed.done()

    in_a_world(test)


@given(st.lists(st.tuples(st.binary(max_size=9000), PROPERTIES), max_size=4), st.data())
def test_whatever_a_server_delivers_in_whatever_pieces_arrives(
    messages: list[tuple[bytes, Properties]], data: st.DataObject
) -> None:
    stream = b"".join(delivery(number, content, properties) for number, (content, properties) in enumerate(messages, 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))

    async def test(world: World) -> None:
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            world.hear(stream[start:stop])
        assert [(message.body, message.properties) for message in world.delivered] == messages

    if all(len(properties.encode()) + 12 <= 4088 for _, properties in messages):
        in_a_world(test)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
@example([b"AMQP\x00\x01\x00\x00"])
def test_garbage_never_raises_and_never_leaves_a_publish_waiting(pieces: list[bytes]) -> None:
    async def test(world: World) -> None:
        confirmed = world.channel.publish("", "q", b"x")
        asked = asyncio.ensure_future(world.channel.queue_declare("q"))
        await asyncio.sleep(0)
        for piece in pieces:
            world.hear(piece)
        world.connection.connection_lost(None)
        with pytest.raises(OutcomeUnknown):
            await confirmed
        with pytest.raises(ConnectionClosed):
            await asked

    in_a_world(test)


def content_header(number: int, size: int, kind: int = 60) -> bytes:
    return struct.pack(">BHIHHQHB", 2, number, 14, kind, 0, size, 0, 0xCE)


def methods(number: int) -> list[bytes]:
    """Every method of AMQP on a channel, its fields empty; but for one that is deprecated."""
    empty = {
        "octet": 0,
        "short": 0,
        "long": 0,
        "longlong": 1,
        "shortstr": "c",
        "longstr": "",
        "table": {},
        "bit": False,
    }
    kinds: list[type[Frame]] = [
        kind for kind in commands.INDEX_MAPPING.values() if kind is not commands.Basic.RecoverAsync
    ]
    return [
        encode_method(kind, number, **{name: empty[kind.amqp_type(name)] for name in kind.attributes()})
        for kind in kinds
    ]


FRAMES: Final = [
    *methods(0),
    *methods(1),
    *methods(2),
    *(delivery(1, b"abc"), delivery(9, b"x" * 9000), START, TUNE, OPEN_OK, CHANNEL_OPEN_OK),
    *(frame.marshal(commands.Basic.Ack(tag, multiple), 1) for tag in (0, 1, 2, 3) for multiple in (False, True)),
    *(frame.marshal(body.ContentBody(b"abc"), number) for number in (0, 1, 2)),
    *(content_header(number, size) for number in (0, 1, 2) for size in (0, 3, 2**63)),
]


@given(st.lists(st.sampled_from(FRAMES), max_size=8), st.data())
def test_well_formed_nonsense_never_raises_and_never_leaves_anybody_waiting(
    frames: list[bytes], data: st.DataObject
) -> None:
    raw = bytearray(b"".join(frames))
    if raw:
        for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=3)):
            raw[place] = data.draw(st.integers(0, 255))

    async def test(world: World) -> None:
        confirmed = [world.channel.publish("", "q", b"x", mandatory=True) for _ in range(2)]
        asked = asyncio.ensure_future(world.channel.queue_declare("q"))
        got = asyncio.ensure_future(world.channel.get("q"))
        await asyncio.sleep(0)
        world.hear(bytes(raw))
        world.hear(b"\xce" * 5000)  # whatever was left open ends here
        await asyncio.sleep(0)
        world.connection.connection_lost(None)
        outcomes = await asyncio.gather(*confirmed, asked, got, return_exceptions=True)
        assert [one for one in outcomes if isinstance(one, BaseException) and not isinstance(one, AmqpError)] == []
        assert world.channel.closed.done()
        assert world.connection.closed.done()

    in_a_world(test)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (delivery(1, b"abc")[:-1] + b"\x00", "without its end mark"),
        (struct.pack(">BHI", 7, 0, 10) + b"x", "unknown type 7"),
        (struct.pack(">BHI", 3, 1, 4089) + b"x" * 4090, "a frame of 4089 bytes, where 4088"),
        (struct.pack(">BHI", 2, 1, 2**24 + 1) + b"x" * 100, "a frame of 16777217 bytes, where 4088"),
        (content_header(1, 3), "a content header without its method"),
        (frame.marshal(body.ContentBody(b"abc"), 1), "a body without its header"),
        (delivery(1, b"abc").replace(struct.pack(">Q", 3), struct.pack(">Q", 2)), "longer than announced"),
        (delivery(1, b"abc").replace(struct.pack(">Q", 3), struct.pack(">Q", 2**40)), "1099511627776 bytes"),
        (delivery(1, b"abc")[:46] + delivery(2, b"abc"), "broke the protocol"),
        (frame.marshal(commands.Basic.Deliver("other", 1, False, "", ""), 1), "unknown consumer b'other'"),
        (frame.marshal(commands.Queue.PurgeOk(1), 1), "Queue.PurgeOk on channel 1, where nobody asked"),
        (frame.marshal(commands.Basic.Ack(7), 1), "a confirm of the publish 7"),
        (frame.marshal(commands.Basic.Qos(), 5), "channel 5, which is not open"),
        (struct.pack(">BHIIB", 1, 1, 4, 0x7777_7777, 0xCE), "a method that nobody can read"),
        (START, "Connection.Start out of turn"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a frame of"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_told_so_and_left(raw: bytes, words: str) -> None:
    async def test(world: World) -> None:
        world.wire.sent = b""
        world.hear(raw)
        reason = world.connection.closed.result()
        assert words in str(reason)
        said = frame.unmarshal(world.wire.sent)[2]
        assert isinstance(said, commands.Connection.Close)
        assert said.reply_code == 501
        assert world.wire.over
        with pytest.raises(ConnectionClosed, match="broke the protocol"):
            world.channel.publish("", "q", b"x")

    in_a_world(test)


async def test_a_server_of_another_protocol_version_is_named() -> None:
    connection = Connection(Address())
    connection.connection_made(cast(asyncio.Transport, Wire(connection)))
    connection.data_received(b"AMQP\x00\x01\x00\x00")
    assert "asks for 1.0.0" in str(connection.closed.result())


async def test_a_server_that_takes_no_password_is_named() -> None:
    connection = Connection(Address())
    connection.connection_made(cast(asyncio.Transport, Wire(connection)))
    connection.data_received(frame.marshal(commands.Connection.Start(0, 9, {}, "EXTERNAL", "en_US"), 0))
    assert "only EXTERNAL" in str(connection.closed.result())


async def test_an_address_that_cannot_travel_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="255"):
        Connection(Address(virtual_host="x" * 300))


def test_a_password_shows_nowhere() -> None:
    address = Address(password="sesame")
    assert "sesame" not in f"{address!r} {address}"


# Confirms, returns and flow -----------------------------------------------------------------------------------------


def outcome(future: asyncio.Future[None]) -> object:
    return (future.exception() or "confirmed") if future.done() else "waiting"


def test_confirms_settle_one_publish_or_all_up_to_it() -> None:
    async def test(world: World) -> None:
        first, second, third, fourth, fifth = (world.channel.publish("", "q", b"x") for _ in range(5))
        world.say(commands.Basic.Ack(2, False))
        assert [outcome(one) for one in (first, second)] == ["waiting", "confirmed"]
        world.say(commands.Basic.Ack(3, True))
        assert [outcome(one) for one in (first, third, fourth)] == ["confirmed", "confirmed", "waiting"]
        world.say(commands.Basic.Nack(0, True))
        assert isinstance(outcome(fourth), Nacked)
        assert isinstance(outcome(fifth), Nacked)
        assert world.channel.unconfirmed == 0

    in_a_world(test)


def test_what_is_published_right_behind_confirm_select_is_confirmed_too() -> None:
    async def test(world: World) -> None:
        opening = asyncio.ensure_future(world.connection.channel())
        await asyncio.sleep(0)
        world.say(commands.Channel.OpenOk(), 2)
        channel = await opening
        selecting = asyncio.ensure_future(channel.confirm_select())
        await asyncio.sleep(0)
        published = channel.publish("", "q", b"x")
        assert not published.done()
        world.say(commands.Confirm.SelectOk(), 2)
        world.say(commands.Basic.Ack(1), 2)
        await asyncio.gather(selecting, published)

    in_a_world(test)


def returned(publish_properties: Properties, routing_key: str = "nowhere") -> bytes:
    head = struct.pack(">HHQ", 60, 0, 1) + publish_properties.encode()
    method = frame.marshal(commands.Basic.Return(312, "NO_ROUTE", "", routing_key), 1)
    return method + struct.pack(">BHI", 2, 1, len(head)) + head + b"\xce" + frame.marshal(body.ContentBody(b"x"), 1)


def test_a_return_belongs_to_the_publish_with_its_route_and_properties() -> None:
    async def test(world: World) -> None:
        channel = world.channel
        twice = Properties(message_id="twice")
        lost, kept, again = (channel.publish("", "nowhere", b"x", one, mandatory=True) for one in (twice, twice, twice))
        other = channel.publish("", "nowhere", b"x", Properties(message_id="other"), mandatory=True)
        world.hear(returned(twice) + returned(Properties(message_id="other")))
        assert [outcome(one) for one in (lost, kept, again, other)] == ["waiting"] * 4
        world.say(commands.Basic.Ack(0, True))
        assert isinstance(outcome(lost), Returned)
        assert isinstance(outcome(other), Returned)
        assert [outcome(kept), outcome(again)] == ["confirmed"] * 2
        error = outcome(lost)
        assert isinstance(error, Returned)
        assert (error.code, error.text, error.message.properties.message_id) == (312, "NO_ROUTE", "twice")

    in_a_world(test)


def test_a_return_whose_properties_the_server_changed_belongs_to_the_first_of_its_route() -> None:
    async def test(world: World) -> None:
        other = world.channel.publish("", "elsewhere", b"x", mandatory=True)
        lost = world.channel.publish("", "nowhere", b"x", Properties(headers={"BCC": ["a"]}), mandatory=True)
        world.hear(returned(Properties(headers={})))
        world.say(commands.Basic.Ack(0, True))
        assert outcome(other) == "confirmed"
        assert isinstance(outcome(lost), Returned)

    in_a_world(test)


def test_what_was_returned_is_known_even_if_the_confirm_never_comes() -> None:
    async def test(world: World) -> None:
        lost = world.channel.publish("", "nowhere", b"x", mandatory=True)
        unsure = world.channel.publish("", "q", b"x", mandatory=True)
        world.hear(returned(Properties()))
        world.connection.connection_lost(OSError("reset by peer"))
        assert isinstance(outcome(lost), Returned)
        error = outcome(unsure)
        assert isinstance(error, OutcomeUnknown)
        assert "reset by peer" in str(error.__cause__)

    in_a_world(test)


@given(st.data())
def test_every_publish_learns_its_own_fate_whatever_the_order_and_grouping_of_the_confirms(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
    lost = set(data.draw(st.lists(st.integers(1, len(ids)), max_size=4)))
    waiting = set(range(1, len(ids) + 1))
    expected: dict[int, str] = {}
    # A server returns in the order of the publishes, before it confirms any of these.
    answers = [returned(Properties(message_id=f"{ids[number - 1]}{number}")) for number in sorted(lost)]
    for _ in range(data.draw(st.integers(0, 12))):
        if not waiting:
            break
        number = data.draw(st.sampled_from(sorted(waiting)))
        multiple, nacked = data.draw(st.booleans()), data.draw(st.booleans())
        settled = {one for one in waiting if one <= number} if multiple else {number}
        waiting -= settled
        expected.update((one, "Returned" if one in lost else "Nacked" if nacked else "str") for one in settled)
        kind = commands.Basic.Nack if nacked else commands.Basic.Ack
        answers.append(frame.marshal(kind(number, multiple), 1))
    expected.update((one, "Returned" if one in lost else "OutcomeUnknown") for one in waiting)

    async def test(world: World) -> None:
        published = [
            world.channel.publish("", "nowhere", b"x", Properties(message_id=f"{name}{number}"), mandatory=True)
            for number, name in enumerate(ids, 1)
        ]
        for raw in answers:
            world.hear(raw)
        assert world.channel.unconfirmed == len(waiting)
        world.connection.connection_lost(None)
        assert {number: type(outcome(one)).__name__ for number, one in enumerate(published, 1)} == expected

    in_a_world(test)


def test_what_one_tick_sends_goes_out_at_once() -> None:
    async def test(world: World) -> None:
        world.wire.sent = b""
        for number in range(1, 4):
            world.hear(delivery(number, b"x"))
            world.channel.ack(number)
            world.channel.publish("", "q", b"y")
        assert world.wire.sent == b""
        await asyncio.sleep(0)
        assert world.wire.sent.count(b"y\xce") == 3
        assert frame.unmarshal(world.wire.sent)[2].name == "Basic.Ack"

    in_a_world(test)


@pytest.mark.parametrize("size", [0, 1, 4087, 4088, 4089, 10_000])
def test_a_body_goes_out_in_frames_that_the_server_takes(size: int) -> None:
    async def test(world: World) -> None:
        await asyncio.sleep(0)
        world.wire.sent = b""
        world.channel.publish("orders", "order.placed", b"x" * size, Properties(message_id="m"), mandatory=True)
        await asyncio.sleep(0)
        rest, frames = world.wire.sent, []
        while rest:
            used, number, one = frame.unmarshal(rest)
            assert number == 1
            assert used <= 4096
            frames.append(one)
            rest = rest[used:]
        method, head, *bodies = frames
        assert isinstance(method, commands.Basic.Publish)
        assert (method.exchange, method.routing_key, method.mandatory) == ("orders", "order.placed", True)
        assert isinstance(head, header.ContentHeader)
        assert (head.body_size, head.properties.message_id) == (size, "m")
        assert b"".join(one.value for one in bodies if isinstance(one, body.ContentBody)) == b"x" * size
        assert len(bodies) == math.ceil(size / 4088)

    in_a_world(test)


def test_properties_that_fit_into_no_frame_are_refused_before_anything_is_sent() -> None:
    async def test(world: World) -> None:
        with pytest.raises(ValueError, match="AMQP carries"):
            world.channel.publish("", "q", b"x", Properties(headers={"big": "x" * 5000}))
        assert world.channel.unconfirmed == 0

    in_a_world(test)


@pytest.mark.parametrize("why", ["the socket is full", "the server is short of memory", "channel.flow is off"])
def test_drain_waits_while_publishing_is_not_welcome(why: str) -> None:
    async def test(world: World) -> None:
        await world.channel.drain()
        stop, go = {
            "the socket is full": (world.connection.pause_writing, world.connection.resume_writing),
            "the server is short of memory": (
                lambda: world.say(commands.Connection.Blocked("low"), 0),
                lambda: world.say(commands.Connection.Unblocked(), 0),
            ),
            "channel.flow is off": (
                lambda: world.say(commands.Channel.Flow(False)),
                lambda: world.say(commands.Channel.Flow(True)),
            ),
        }[why]
        stop()
        waiting = asyncio.ensure_future(world.channel.drain())
        await asyncio.sleep(0)
        assert not waiting.done()
        go()
        await waiting
        stop()
        waiting = asyncio.ensure_future(world.channel.drain())
        await asyncio.sleep(0)
        world.connection.connection_lost(None)
        with pytest.raises(ConnectionClosed):
            await waiting

    in_a_world(test)


def test_a_listener_that_fails_is_reported_and_stops_nothing() -> None:
    async def run() -> None:
        complaints: list[str] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(repr(context.get("exception"))))
        world = await World().build()
        heard: list[str | None] = []

        def listen(reason: str | None) -> None:
            heard.append(reason)
            raise KeyError(reason)

        world.connection.on_blocked = listen
        world.say(commands.Connection.Blocked("low"), 0)
        world.say(commands.Connection.Unblocked(), 0)
        assert heard == ["low", None]
        assert complaints == ["KeyError('low')", "KeyError(None)"]
        assert not world.connection.closed.done()
        world.wire.abort()
        await asyncio.sleep(0)

    asyncio.run(run())


# Closing ------------------------------------------------------------------------------------------------------------


def test_the_number_of_a_channel_is_used_again_only_after_the_server_agreed() -> None:
    async def test(world: World) -> None:
        closing = asyncio.ensure_future(world.channel.close())
        opening = asyncio.ensure_future(world.connection.channel())
        await asyncio.sleep(0)
        world.say(commands.Channel.OpenOk(), 2)
        second = await opening
        assert second.number == 2
        world.hear(delivery(1, b"too late"))
        assert world.delivered == []
        world.say(commands.Channel.CloseOk())
        await closing
        opening = asyncio.ensure_future(world.connection.channel())
        await asyncio.sleep(0)
        world.say(commands.Channel.OpenOk(), 1)
        assert (await opening).number == 1

    in_a_world(test)


def test_a_channel_whose_close_is_not_answered_is_given_up_with_its_number() -> None:
    async def test(world: World) -> None:
        world.hear(delivery(1, b"half")[:-10])
        await world.channel.close(timeout_seconds=0)
        assert "did not answer" in str(world.channel.closed.result())
        world.hear(delivery(1, b"half")[-10:] + delivery(2, b"too late"))
        world.say(commands.Basic.Ack(1))
        assert world.delivered == []
        assert not world.connection.closed.done()
        opening = asyncio.ensure_future(world.connection.channel())
        await asyncio.sleep(0)
        world.say(commands.Channel.OpenOk(), 2)
        assert (await opening).number == 2

    in_a_world(test)


def test_both_sides_may_close_a_channel_at_once() -> None:
    async def test(world: World) -> None:
        closing = asyncio.ensure_future(world.channel.close())
        await asyncio.sleep(0)
        world.say(commands.Channel.Close(406, "PRECONDITION_FAILED - unknown delivery tag 9", 60, 80))
        await closing
        world.say(commands.Channel.CloseOk())
        assert "unknown delivery tag" in str(world.channel.closed.result())
        assert not world.connection.closed.done()

    in_a_world(test)


def test_an_error_of_the_channel_reaches_all_who_wait_on_it() -> None:
    async def test(world: World) -> None:
        published = world.channel.publish("nowhere", "q", b"x")
        asked = [asyncio.ensure_future(world.channel.queue_declare("q", passive=True)) for _ in range(2)]
        await asyncio.sleep(0)
        world.say(commands.Channel.Close(404, "NOT_FOUND - no exchange 'nowhere'", 60, 40))
        for one in asked:
            with pytest.raises(ChannelClosed, match="404 NOT_FOUND - no exchange 'nowhere'"):
                await one
        with pytest.raises(OutcomeUnknown) as caught:
            await published
        assert isinstance(caught.value.__cause__, ChannelClosed)
        with pytest.raises(ChannelClosed, match="NOT_FOUND"):
            world.channel.ack(1)

    in_a_world(test)


def test_a_consumer_that_the_server_ends_is_told() -> None:
    async def test(world: World) -> None:
        cancelled: list[str] = []
        consuming = asyncio.ensure_future(
            world.channel.consume("q", world.delivered.append, tag="d", on_cancel=cancelled.append)
        )
        await asyncio.sleep(0)
        world.say(commands.Basic.ConsumeOk("d"))
        await consuming
        world.say(commands.Basic.Cancel("d"))
        assert cancelled == ["d"]

    in_a_world(test)


def test_the_answers_to_consumers_may_overtake_each_other_and_others() -> None:
    async def test(world: World) -> None:
        first = asyncio.ensure_future(world.channel.consume("slow", world.delivered.append, tag="slow"))
        second = asyncio.ensure_future(world.channel.consume("quick", world.delivered.append, tag="quick"))
        third = asyncio.ensure_future(world.channel.queue_purge("q"))
        await asyncio.sleep(0)
        world.say(commands.Queue.PurgeOk(3))
        world.say(commands.Basic.ConsumeOk("quick"))
        assert await third == 3
        assert await second == "quick"
        assert not first.done()
        world.say(commands.Basic.ConsumeOk("slow"))
        assert await first == "slow"

    in_a_world(test)


@pytest.mark.parametrize("by", ["the client", "the server"])
def test_what_was_on_its_way_to_a_consumer_that_ended_still_arrives(by: str) -> None:
    async def test(world: World) -> None:
        if by == "the client":
            cancelling = asyncio.ensure_future(world.channel.cancel("c"))
            await asyncio.sleep(0)
            world.say(commands.Basic.CancelOk("c"))
            await cancelling
        else:
            world.say(commands.Basic.Cancel("c"))
        world.hear(delivery(1, b"late"))
        assert [message.body for message in world.delivered] == [b"late"]

    in_a_world(test)


def test_a_message_that_was_asked_for_and_never_came_whole_is_not_waited_for() -> None:
    async def test(world: World) -> None:
        got = asyncio.ensure_future(world.channel.get("q"))
        await asyncio.sleep(0)
        world.say(commands.Basic.GetOk(1, False, "", "q", 0))
        world.hear(content_header(1, 3))
        world.connection.connection_lost(None)
        with pytest.raises(ConnectionClosed):
            await got

    in_a_world(test)


def test_a_return_that_arrives_while_its_channel_is_being_closed_still_counts() -> None:
    async def test(world: World) -> None:
        lost = world.channel.publish("", "nowhere", b"x", mandatory=True)
        raw = returned(Properties())
        world.hear(raw[:-5])
        closing = asyncio.ensure_future(world.channel.close())
        await asyncio.sleep(0)
        world.hear(raw[-5:])
        world.say(commands.Basic.Ack(1))
        world.say(commands.Channel.CloseOk())
        await closing
        assert isinstance(outcome(lost), Returned)

    in_a_world(test)


def test_a_request_that_nobody_waits_for_any_more_does_not_confuse_the_next() -> None:
    async def test(world: World) -> None:
        given_up = asyncio.ensure_future(world.channel.queue_purge("a"))
        asked = asyncio.ensure_future(world.channel.queue_purge("b"))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        world.say(commands.Queue.PurgeOk(1))
        world.say(commands.Queue.PurgeOk(2))
        assert await asked == 2

    in_a_world(test)


# A server that stops answering --------------------------------------------------------------------------------------


class Peer:
    """A server on a socket that lets a client in, opens a channel, and answers nothing after that."""

    def __init__(self) -> None:
        self.writer: asyncio.StreamWriter
        self.heard = asyncio.Event()
        """Something was asked that gets no answer."""
        self.left = asyncio.Event()
        """The client has cut the connection."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        try:
            await reader.readexactly(8)
            writer.write(START)
            await self._method(reader, commands.Connection.StartOk)
            writer.write(TUNE)
            await self._method(reader, commands.Connection.Open)
            writer.write(OPEN_OK)
            await self._method(reader, commands.Channel.Open)
            writer.write(CHANNEL_OPEN_OK)
            while await reader.read(4096):
                self.heard.set()
        except ConnectionError:
            pass  # an aborted socket says so
        finally:
            self.left.set()
            writer.close()

    def say(self, method: Frame) -> None:
        self.writer.write(frame.marshal(method, 0))

    async def _method(self, reader: asyncio.StreamReader, until: type[Frame]) -> None:
        while True:
            head = await reader.readexactly(7)
            rest = await reader.readexactly(int.from_bytes(head[3:7], "big") + 1)
            if isinstance(frame.unmarshal(head + rest)[2], until):
                return


@asynccontextmanager
async def facing_a_peer(monkeypatch: pytest.MonkeyPatch, answer_seconds: float) -> AsyncIterator[tuple[Peer, Channel]]:
    """A channel of a client that waits so long for answers."""
    monkeypatch.setattr(channels, "ANSWER_SECONDS", answer_seconds)
    peer = Peer()
    async with asyncio.timeout(60), await asyncio.start_server(peer.serve, "127.0.0.1", 0) as server:
        connection = await connect([Address("127.0.0.1", server.sockets[0].getsockname()[1])], heartbeat_seconds=0)
        try:
            yield peer, await connection.channel()
        finally:
            await connection.close(timeout_seconds=0.0)  # nobody would answer
            await peer.left.wait()


async def test_a_server_that_does_not_answer_a_request_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with facing_a_peer(monkeypatch, 0.2) as (peer, channel):
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(outcome_of(channel.queue_declare(name))) for name in "ab"]
        for each in asked:
            error = each.result()
            assert isinstance(error, ConnectionClosed)
            assert "the server did not answer Queue.Declare within 0.2 s" in str(error)
        assert channel.connection.closed.done()
        await peer.left.wait()


async def test_a_server_that_said_that_it_is_blocked_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with facing_a_peer(monkeypatch, 0.05) as (peer, channel):
        told: asyncio.Queue[str | None] = asyncio.Queue()
        channel.connection.on_blocked = told.put_nowait
        peer.say(commands.Connection.Blocked("low on memory"))
        assert await told.get() == "low on memory"
        asking = asyncio.create_task(outcome_of(channel.queue_declare("a")))
        await peer.heard.wait()
        # Ten times the limit: a client that counted on would have left by now, and a slow machine lets it stay longer, not shorter.
        await asyncio.wait([asking], timeout=0.5)
        assert not asking.done()
        assert not channel.connection.closed.done()
        peer.say(commands.Connection.Unblocked())
        assert await told.get() is None
        assert isinstance(await asking, ConnectionClosed)


async def test_an_answer_that_comes_in_time_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async with facing_a_peer(monkeypatch, 30.0) as (peer, channel):
        asking = asyncio.create_task(channel.queue_declare("a"))
        await peer.heard.wait()
        peer.writer.write(frame.marshal(commands.Queue.DeclareOk("a", 7, 1), 1))
        assert (await asking).messages == 7
        assert not channel.connection.closed.done()


async def outcome_of(asked: Coroutine[Any, Any, object]) -> object:
    """What comes of a request: its answer, or the error."""
    try:
        return await asked
    except AmqpError as error:
        return error
