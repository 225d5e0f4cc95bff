"""A message's way to AMQP's properties and back: the short ways say what the long one says."""

from __future__ import annotations

import math
import uuid
from datetime import datetime
from typing import Final

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conveyor.brokers.rabbitmq import envelope, plain
from conveyor.brokers.rabbitmq.amqp import FieldValue, Incoming, Properties
from conveyor.brokers.rabbitmq.envelope import Arrived, properties_of, published, read
from conveyor.core.message import Message

TEXTS: Final = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
IDS: Final = st.uuids().map(str) | TEXTS
CREATED: Final = st.one_of(
    st.integers(1, 4_000_000_000).map(float), st.integers(10**6, 4 * 10**15).map(lambda micros: micros / 1e6)
)
MESSAGES: Final = st.builds(
    Message,
    id=IDS,
    topic=st.sampled_from(("order.placed", "größe")),
    body=st.binary(max_size=20),
    key=st.none() | TEXTS,
    headers=st.just({}) | st.dictionaries(st.sampled_from(("tenant", "trace")), TEXTS),
    correlation_id=IDS,
    causation_id=st.none() | IDS,
    created=CREATED,
)
ID: Final = str(uuid.UUID(int=7))
NOW: Final = 1_800_000_000.0


def arrived(message: Message, properties: Properties | bytes) -> Arrived:
    """As the server hands it over."""
    raw = properties if isinstance(properties, bytes) else properties.encode()
    incoming = Incoming("conveyor", message.topic, 1)
    incoming.raw_properties, incoming.body = raw, message.body
    return read(incoming, (message.topic,), frozenset({"conveyor"}), NOW)


@given(MESSAGES)
@example(Message(ID, "order.placed", b"", correlation_id=ID, created=1_700_000_000.000001))
@example(Message(ID, "order.placed", b"", correlation_id=ID, created=1_700_000_000.0))
def test_what_is_sent_the_short_way_is_read_as_what_is_sent_the_long_way(message: Message) -> None:
    short, long = arrived(message, published(message)), arrived(message, properties_of(message))
    assert short == long
    same = msgspec.structs.replace(short.message, created=0.0) == msgspec.structs.replace(message, created=0.0)
    assert same
    assert math.isclose(short.message.created, message.created, abs_tol=1e-6)  # times travel in microseconds


def test_most_messages_take_the_shortest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "decode", None)
    monkeypatch.setattr(envelope, "_read_any", None)
    message = Message(ID, "order.placed", b"{}", correlation_id=ID, created=1_700_000_000.5)
    assert arrived(message, published(message)).message == message


@given(st.data())
def test_whatever_is_changed_on_the_way_is_read_as_by_the_long_way_or_not_at_all(data: st.DataObject) -> None:
    message = Message(ID, "order.placed", b"{}", correlation_id=ID, created=1_700_000_000.25)
    raw = bytearray(published(message))  # type: ignore[arg-type]
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    simple = plain.decode_simplest(bytes(raw), message.topic)
    if simple is None:
        return
    incoming = Incoming("conveyor", message.topic, 1)
    incoming.raw_properties = bytes(raw)
    found = plain.decode(incoming, envelope._KNOWN)
    if found is not None:
        id_, created, journey = simple
        assert (id_, journey) == (found[2]["cloudEvents:id"], found[1])
        assert created == datetime.fromisoformat(str(found[2]["cloudEvents:time"])).timestamp()


NOTES: Final[dict[str, FieldValue]] = {
    envelope.DELIVERIES: 3,
    envelope.ATTEMPTS: 2,
    envelope.REASON: "exhausted",
    envelope.POSITION: "p",
}


@given(
    st.dictionaries(st.sampled_from(("blob", "tenant", "cloudEvents:id")), st.text("xä", max_size=200)),
    st.text("aé", max_size=300),
    st.text("t", max_size=300),
    st.integers(400, 800),
)
def test_a_copy_that_has_no_room_loses_its_traceback_first_then_of_its_error_and_a_foreign_header_last(
    foreign: dict[str, str], error: str, trace: str, room: int
) -> None:
    whole = Properties(headers={**foreign, **NOTES, envelope.ERROR: error, envelope.TRACEBACK: trace})
    made = envelope.shortened(whole, room)
    if len(whole.encode()) <= room:
        assert made is None
        return
    assert made is not None
    assert len(made.properties) <= room
    headers = Properties.decode(made.properties).headers or {}
    assert {name: headers[name] for name in NOTES} == NOTES
    assert {name for name in foreign if name not in headers} == set(made.left_out)
    assert headers.get(envelope.LEFT_OUT, "") == ", ".join(made.left_out)
    if not made.left_out:
        assert envelope.TRACEBACK not in headers
        kept = str(headers[envelope.ERROR])
        assert kept == error or (kept.endswith("…") and error.startswith(kept[:-1]))


@pytest.mark.parametrize("properties", [b"\x00\x00", Properties(), Properties(headers={"blob": "x" * 900})])
def test_what_a_program_publishes_itself_is_never_shortened(properties: Properties | bytes) -> None:
    assert envelope.shortened(properties, 400) is None
