"""A message as AMQP carries it: properties and headers to and from the envelope, and what Conveyor adds to its copies."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec

from conveyor.brokers.rabbitmq import plain
from conveyor.brokers.rabbitmq.amqp import FieldValue, Incoming, Malformed, Properties
from conveyor.brokers.rabbitmq.amqp.frames import encode_table
from conveyor.brokers.rabbitmq.plain import PREFIX, SLOT
from conveyor.core.message import JSON, SOURCE, Message, from_headers, to_headers

PERSISTENT: Final = 2
LONGEST_SHORT_TEXT: Final = 255
"""Bytes of a property; AMQP's short string."""
PLAIN_TRACEBACK_BYTES: Final = 16_384
"""A longer traceback is compressed: all headers of a message share one frame of 128 KiB."""
LONGEST_TRACEBACK_BYTES: Final = 1024 * 1024
"""What is unpacked of a compressed one, whoever wrote it: a few kilobytes may stand for gigabytes."""
SLOTS: Final = 16
"""The keys of ordered queues are spread over so many slots; every message with a key carries its own."""

TOPIC: Final = "conveyor-topic"
DELIVERIES: Final = "conveyor-deliveries"
ATTEMPTS: Final = "conveyor-attempts"
ERROR: Final = "conveyor-error"
DUE: Final = "conveyor-due"
RENEWED: Final = "conveyor-renewed"
QUEUE: Final = "conveyor-queue"
REASON: Final = "conveyor-reason"
TRACEBACK: Final = "conveyor-traceback"
TRACEBACK_ZLIB: Final = "conveyor-traceback-zlib"
DIED: Final = "conveyor-died"
POSITION: Final = "conveyor-position"
OWN: Final = frozenset(
    {TOPIC, SLOT, DELIVERIES, ATTEMPTS, ERROR, DUE, RENEWED, QUEUE, REASON, TRACEBACK, TRACEBACK_ZLIB, DIED, POSITION}
)
"""Headers that are Conveyor's notes beside the message, and no part of it."""
LEFT_OUT: Final = "conveyor-left-out"
"""Names the sender's headers for which a copy had no room. No note, but a header of the message from then on: whoever handles it
sees what is missing."""
SERVERS: Final = (
    "x-death",
    "x-first-death-",
    "x-last-death-",
    "x-delivery-count",
    "x-acquired-count",
    "x-stream-offset",
)
"""What the server itself writes, by the beginning of the name. Never copied: x-death would make it see a cycle."""
REROUTING: Final = frozenset({"CC", "BCC"})
"""The sender's further routing keys: in a copy they would send it there again."""


class Arrived(NamedTuple):
    """A message with the notes beside it.

    Parameters:
        deliveries: counted before this one.
        attempts: those that failed.
        error: how the last one ended.
        due: Unix seconds before which nobody is to have it.
        noted: deliveries that a header tells, without those that the server counts in this queue.
    """

    message: Message
    deliveries: int
    attempts: int
    error: str
    due: float
    noted: int


_SLOTS: Final = tuple(encode_table({SLOT: slot})[4:] for slot in range(SLOTS))


def slot_of(key: str) -> int:
    """Which of the slots a key falls into: the CRC-32 (as in zlib) of its UTF-8, modulo 16."""
    return zlib.crc32(key.encode()) % SLOTS


def published(message: Message) -> Properties | bytes:
    """What is published beside a message's body: as bytes where that is simple."""
    slot = b"" if message.key is None else _SLOTS[slot_of(message.key)]
    try:
        return plain.encode(message, slot) or properties_of(message)
    except UnicodeEncodeError:  # whoever sends it says so
        return properties_of(message)


def properties_of(message: Message, notes: Mapping[str, FieldValue] | None = None) -> Properties:
    """What is published beside a message's body, with Conveyor's notes."""
    headers: dict[str, FieldValue] = dict(to_headers(message, PREFIX))
    correlation_id = _short(message.correlation_id)
    if correlation_id is not None:
        del headers[_CORRELATION]  # the property says it
    content_type = str(headers.pop("content-type", JSON))
    if message.key is not None:
        headers[SLOT] = slot_of(message.key)
    if notes:
        headers.update(notes)
    short_content_type = _short(content_type)
    if short_content_type is None:
        headers["content-type"] = content_type
    return Properties(
        content_type=short_content_type,
        headers=headers,
        delivery_mode=PERSISTENT,
        priority=message.priority or None,
        correlation_id=correlation_id,
        message_id=_short(message.id),
        timestamp=int(message.created) if message.created >= 1 else None,
        type=_short(message.topic),
    )


def read(
    incoming: Incoming, topics: tuple[str, ...], exchanges: frozenset[str], now: float, nameless: str = ""
) -> Arrived:
    """The message that arrived, whoever sent it; never an error.

    Parameters:
        topics: what the queue receives.
        exchanges: those in which the routing key is the topic.
        now: Unix seconds.
        nameless: the id of a message that has none; a new one each time where this is empty.
    """
    return _read_plain(incoming, topics, exchanges) or _read_any(incoming, topics, exchanges, now, nameless)


def _read_plain(incoming: Incoming, topics: tuple[str, ...], exchanges: frozenset[str]) -> Arrived | None:
    """The short way for what is most common: what plain.encode() made, from the exchange."""
    if incoming.exchange not in exchanges or incoming.routing_key not in topics:
        return None
    if (simple := plain.decode_simplest(incoming.raw_properties, incoming.routing_key)) is not None:
        id_, created, journey = simple
        message = Message(id_, incoming.routing_key, incoming.body, correlation_id=journey, created=created)
        return Arrived(message, 0, 0, "", 0.0, 0)
    found = plain.decode(incoming, _KNOWN)
    if found is None:
        return None
    content_type, correlation_id, headers = found
    if headers.get(_TYPE) != incoming.routing_key:
        return None
    try:
        get: Callable[..., Any] = headers.get
        message = Message(
            id=str(headers[_ID]),
            topic=incoming.routing_key,
            body=incoming.body,
            key=get(_KEY, "" if SLOT in headers else None),
            content_type=content_type or JSON,
            correlation_id=get(_CORRELATION, correlation_id),
            causation_id=get(_CAUSATION),
            created=datetime.fromisoformat(get(_TIME)).timestamp(),
        )
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    return Arrived(message, _number(headers.get("x-delivery-count")), 0, "", 0.0, 0)


_ID, _TIME, _TYPE, _KEY = (PREFIX + name for name in ("id", "time", "type", "partitionkey"))
_CORRELATION, _CAUSATION = PREFIX + "correlationid", PREFIX + "causationid"
_KNOWN: Final = {
    name.encode(): name for name in (_ID, _TIME, _TYPE, _KEY, _CORRELATION, _CAUSATION, SLOT, "x-delivery-count")
}


def _read_any(
    incoming: Incoming, topics: tuple[str, ...], exchanges: frozenset[str], now: float, nameless: str
) -> Arrived:
    properties = properties_or_none(incoming)
    headers: dict[str, Any] = dict(properties.headers or {})
    notes = {name: headers.pop(name) for name in OWN & headers.keys()}
    delivery_count = _number(headers.get("x-delivery-count"))
    for name in [name for name in headers if name.startswith(SERVERS)]:
        del headers[name]
    if properties.content_type is not None:
        headers["content-type"] = properties.content_type
    present = {name.lower() for name in headers}
    for attribute, value in (
        ("correlationid", properties.correlation_id),
        ("time", properties.timestamp),
        ("priority", properties.priority),
    ):
        if value is not None and not any(f"{start}{attribute}" in present for start in _PREFIXES):
            headers[PREFIX + attribute] = value
    topic = _topic(incoming, notes.get(TOPIC), headers, properties.type, topics, exchanges)
    ours = headers.get(PREFIX + "source") == SOURCE  # then a time that is not there was never set
    message = from_headers(
        topic,
        incoming.body,
        headers,
        fallback_id=properties.message_id or nameless or uuid.uuid4().hex,
        now=0.0 if ours else now,
    )
    if message.key is None and SLOT in notes:
        message = msgspec.structs.replace(message, key="")  # an empty key is one, though CloudEvents has none
    empty = {name: "" for name, value in headers.items() if value == "" and not name.lower().startswith(_PREFIXES)}
    if empty:
        message = msgspec.structs.replace(message, headers={**message.headers, **empty})
    due = notes.get(DUE)
    return Arrived(
        message,
        _number(notes.get(DELIVERIES)) + delivery_count,
        _number(notes.get(ATTEMPTS)),
        str(notes.get(ERROR) or ""),
        message.due if not isinstance(due, int | float) else float(due),
        _number(notes.get(DELIVERIES)),
    )


def copy_of(incoming: Incoming, message: Message, notes: Mapping[str, FieldValue]) -> Properties:
    """The properties of a copy: as they came, foreign ones too, but with these notes, and with the id that was made up.

    What would let the server drop, refuse or reroute the copy is left out: expiration, user-id, CC and BCC.
    """
    properties = properties_or_none(incoming)
    headers: dict[str, FieldValue] = {
        name: value
        for name, value in (properties.headers or {}).items()
        if name not in OWN and name not in REROUTING and not name.startswith(SERVERS)
    }
    headers.setdefault(PREFIX + "id", message.id)
    if message.key is not None:
        headers[SLOT] = slot_of(message.key)
    headers[TOPIC] = message.topic
    headers.update(notes)
    return properties._replace(headers=headers, delivery_mode=PERSISTENT, expiration=None, user_id=None)


class Shortened(NamedTuple):
    """A copy's properties, made to fit.

    Parameters:
        properties: encoded.
        left_out: the names of foreign headers for which there was no room.
    """

    properties: bytes
    left_out: tuple[str, ...] = ()


def shortened(properties: Properties | bytes, room: int) -> Shortened | None:
    """The properties of a copy, which with its notes need more than the bytes there are; None of what is no copy, or fits.

    The traceback goes first, then the end of the error. Where that is not enough, the largest foreign headers go, and another one
    names them from then on: a copy that cannot be sent would leave the message to be delivered again, for ever.
    """
    if isinstance(properties, bytes) or DELIVERIES not in (properties.headers or {}):
        return None
    headers: dict[str, FieldValue] = dict(properties.headers or {})

    def sized() -> bytes:
        return properties._replace(headers=headers).encode()

    raw = sized()
    if len(raw) <= room:
        return None
    trace: dict[str, FieldValue] = {name: headers.pop(name) for name in (TRACEBACK, TRACEBACK_ZLIB) if name in headers}
    if len(raw := sized()) <= room:
        return Shortened(raw)
    error = str(headers.get(ERROR) or "")
    headers[ERROR] = cut(error, len(error.encode()) - (len(raw) - room))
    if len(raw := sized()) <= room:
        return Shortened(raw)
    headers.update({**trace, ERROR: error})
    known = str(headers.pop(LEFT_OUT, ""))
    foreign = sorted(
        (name for name in headers if name not in OWN), key=lambda name: len(encode_table({name: headers[name]}))
    )
    left_out: list[str] = []
    while len(raw) > room and foreign:
        left_out.append(foreign.pop())
        del headers[left_out[-1]]
        headers[LEFT_OUT] = cut(", ".join([*filter(None, [known]), *left_out]), LONGEST_SHORT_TEXT)
        raw = sized()
    return Shortened(raw, tuple(left_out)) if len(raw) <= room else None


def cut(text: str, most: int) -> str:
    """As much of a text as so many bytes hold."""
    raw = text.encode()
    return text if len(raw) <= most else raw[: max(0, most - len(_CUT))].decode(errors="ignore") + _CUT.decode()


_CUT: Final = "…".encode()


def trace_note(traceback: str) -> dict[str, FieldValue]:
    """A traceback as a header; a long one compressed."""
    plain = traceback.encode()
    if len(plain) <= PLAIN_TRACEBACK_BYTES:
        return {TRACEBACK: traceback} if traceback else {}
    return {TRACEBACK_ZLIB: zlib.compress(plain)}


def trace_in(headers: Mapping[str, Any]) -> str:
    """The traceback of a dead letter's headers."""
    packed = headers.get(TRACEBACK_ZLIB)
    if packed is None:
        return str(headers.get(TRACEBACK) or "")
    try:
        raw = packed.encode("latin-1") if isinstance(packed, str) else packed
        return zlib.decompressobj().decompress(raw, LONGEST_TRACEBACK_BYTES).decode(errors="replace")
    except (zlib.error, ValueError, TypeError):
        return "(its traceback cannot be read)"


def properties_or_none(incoming: Incoming) -> Properties:
    """The properties; empty ones where nobody can read them."""
    try:
        return incoming.properties
    except Malformed:
        return Properties()


_PREFIXES: Final = ("cloudevents:", "cloudevents_", "ce-", "ce_")


def _topic(
    incoming: Incoming,
    noted: object,
    headers: Mapping[str, Any],
    kind: str | None,
    topics: tuple[str, ...],
    exchanges: frozenset[str],
) -> str:
    if isinstance(noted, str) and noted:
        return noted
    published = topic_of(incoming.routing_key)
    if incoming.exchange in exchanges and (published in topics or not topics):
        return published
    for name, value in headers.items():
        if isinstance(value, str) and value in topics and name.lower() in _TYPES:
            return value
    if kind in topics:
        return str(kind)
    return topics[0] if len(topics) == 1 else published


_TYPES: Final = frozenset(prefix + "type" for prefix in _PREFIXES)


def routing_key(topic: str) -> str:
    """A topic as a routing key: a word that a binding would take for a wildcard is written in per cent."""
    if "*" not in topic and "#" not in topic:
        return topic
    return ".".join(_ESCAPED.get(word, word) for word in topic.split("."))


def topic_of(key: str) -> str:
    """The topic that a routing key stands for."""
    if "%2" not in key:
        return key
    return ".".join(_PLAIN.get(word, word) for word in key.split("."))


_ESCAPED: Final = {"*": "%2A", "#": "%23"}
_PLAIN: Final = {escaped: word for word, escaped in _ESCAPED.items()}


def _short(text: str | None) -> str | None:
    """A text that fits into a property."""
    return text if text and len(text.encode()) <= LONGEST_SHORT_TEXT else None


def _number(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
