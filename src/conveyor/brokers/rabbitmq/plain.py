"""The short way for what is most common: Conveyor's own messages without headers of the application, straight to and from bytes."""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from datetime import datetime
from typing import Final

from conveyor.brokers.rabbitmq.amqp import Incoming
from conveyor.core.message import JSON, SOURCE, Message, timestamp

PREFIX: Final = "cloudEvents:"
"""CloudEvents 1.0.2, AMQP protocol binding, section 3.1.3."""
LONGEST: Final = 255
"""Bytes of a name or property; AMQP's short string."""
SLOT: Final = "conveyor-slot"
LATEST: Final = 253_402_300_800.0
"""The end of the year 9999, the last that RFC 3339 can write."""

_CONTENT_TYPE, _HEADERS, _DELIVERY_MODE, _PRIORITY = 1 << 15, 1 << 13, 1 << 12, 1 << 11
_CORRELATION_ID, _MESSAGE_ID, _TIMESTAMP, _TYPE = 1 << 10, 1 << 7, 1 << 6, 1 << 5
_SIZE: Final = struct.Struct(">I")
_TIME: Final = struct.Struct(">Q")
_FLAGS: Final = struct.Struct(">H")
_TEXT: Final = ord("S")
_INTEGERS: Final = {ord("b"): 1, ord("s"): 2, ord("I"): 4, ord("l"): 8}


def _name(name: str) -> bytes:
    raw = name.encode()
    return bytes([len(raw)]) + raw + b"S"


def _short(raw: bytes) -> bytes:
    return bytes([len(raw)]) + raw


_NAMES: Final = {
    field: _name(PREFIX + attribute)
    for field, attribute in {
        "id": "id",
        "type": "type",
        "time": "time",
        "key": "partitionkey",
        "causation_id": "causationid",
    }.items()
}
_BEGIN: Final = b"".join(
    _name(PREFIX + attribute) + _SIZE.pack(len(value)) + value.encode()
    for attribute, value in (("specversion", "1.0"), ("source", SOURCE))
)
_JSON_TYPE: Final = _short(JSON.encode())
_BYTES: Final = tuple(bytes([number]) for number in range(LONGEST + 1))


@functools.lru_cache(maxsize=1024)
def _begin(topic: str, id_size: int, time_size: int, others_size: int, correlated: bool) -> tuple[bytes, bytes, bytes]:
    """What is the same in many messages: up to the id, between id and time, and the end."""
    raw = topic.encode()
    kind = _NAMES["type"] + _SIZE.pack(len(raw)) + raw
    until_id = _BEGIN + kind + _NAMES["id"] + _SIZE.pack(id_size)
    until_time = _NAMES["time"] + _SIZE.pack(time_size)
    size = len(until_id) + id_size + len(until_time) + time_size + others_size
    flags = _CONTENT_TYPE | _HEADERS | _DELIVERY_MODE | _MESSAGE_ID | _TIMESTAMP | _TYPE
    if correlated:
        flags |= _CORRELATION_ID
    return _FLAGS.pack(flags) + _JSON_TYPE + _SIZE.pack(size) + until_id, until_time, _short(raw)


def encode(message: Message, slot: bytes) -> bytes | None:
    """The properties of a message that has no more than the usual, as they travel; None for any other.

    Parameters:
        slot: the header that tells the slot of its key, encoded; empty where it has no key.
    """
    created = message.created
    if message.headers or message.due or message.expires is not None or message.priority or not 1.0 <= created < LATEST:
        return None
    id_, correlation = message.id.encode(), (message.correlation_id or "").encode()
    if message.content_type != JSON or len(message.topic) > LONGEST // 4:
        return None
    if not 0 < len(id_) <= LONGEST or len(correlation) > LONGEST:
        return None
    others = slot
    if message.causation_id:
        raw = message.causation_id.encode()
        others = _NAMES["causation_id"] + _SIZE.pack(len(raw)) + raw + others
    if message.key:
        raw = message.key.encode()
        others = _NAMES["key"] + _SIZE.pack(len(raw)) + raw + others
    time = timestamp(created).encode()
    until_id, until_time, kind = _begin(message.topic, len(id_), len(time), len(others), bool(correlation))
    return b"".join(
        (
            until_id,
            id_,
            until_time,
            time,
            others,
            b"\x02",
            _BYTES[len(correlation)] + correlation if correlation else b"",
            _BYTES[len(id_)],
            id_,
            _TIME.pack(int(created)),
            kind,
        )
    )


_ID_SIZE: Final = 36
_TIME_SIZE: Final = len("2026-01-31T12:00:00.000000Z")
_TO_SECONDS: Final = 19
"""As far as the second goes in such a time."""


def decode_simplest(raw: bytes, topic: str) -> tuple[str, float, str] | None:
    """Id, time of creation and correlation id of what encode() made of a message without key and cause, with ids of the usual size.

    None for any other, which decode() may know.
    """
    until_id, until_time, kind = _begin(topic, _ID_SIZE, _TIME_SIZE, 0, True)
    id_at = len(until_id)
    time_at = id_at + _ID_SIZE + len(until_time)
    mode_at = time_at + _TIME_SIZE
    if not (
        raw.startswith(until_id)
        and raw.startswith(until_time, id_at + _ID_SIZE)
        and raw[mode_at : mode_at + 2] == _PERSISTENT_AND_ID
        and len(raw) == mode_at + 2 + _ID_SIZE + 1 + _ID_SIZE + 8 + len(kind)
    ):
        return None
    time, fraction = raw[time_at : time_at + _TO_SECONDS], raw[time_at + _TO_SECONDS + 1 : mode_at - 1]
    if raw[time_at + _TO_SECONDS] != _POINT or raw[mode_at - 1] != _ZULU or not fraction.isdigit():
        return None
    try:
        micros = _micros(time) + int(fraction)
        id_ = raw[id_at : id_at + _ID_SIZE].decode()
        return id_, micros / 1_000_000, raw[mode_at + 2 : mode_at + 2 + _ID_SIZE].decode()
    except ValueError:
        return None


_POINT, _ZULU = b".Z"
_PERSISTENT_AND_ID: Final = bytes([2, _ID_SIZE])


@functools.lru_cache(maxsize=4)
def _micros(time: bytes) -> int:
    """Microseconds since 1970 of a time in whole seconds; most messages are of the same few."""
    return round(datetime.fromisoformat(f"{time.decode()}Z").timestamp()) * 1_000_000


def decode(incoming: Incoming, known: Mapping[bytes, str]) -> tuple[str, str | None, dict[str, str | int]] | None:
    """The media type, correlation id and headers of a message of Conveyor's own, where all of them are known ones; None where any is not.

    Parameters:
        known: the headers' names as they travel, and what they are called in the answer.
    """
    raw = incoming.raw_properties
    try:
        (flags,) = _FLAGS.unpack_from(raw)
        if flags & (_CONTENT_TYPE | 1 << 14 | _HEADERS) != _CONTENT_TYPE | _HEADERS:
            return None
        position = 3 + raw[2]
        content_type = raw[3:position].decode()
        (size,) = _SIZE.unpack_from(raw, position)
        position += 4
        stop = position + size
        if not raw.startswith(_BEGIN, position):  # another's, or changed by the server
            return None
        position += len(_BEGIN)
        found: dict[str, str | int] = {}
        while position < stop:
            start = position + 1
            position = start + raw[position]
            name = known[raw[start:position]]
            kind = raw[position]
            if kind == _TEXT:
                (size,) = _SIZE.unpack_from(raw, position + 1)
                start = position + 5
                position = start + size
                found[name] = raw[start:position].decode()
            else:
                start = position + 1
                position = start + _INTEGERS[kind]
                found[name] = int.from_bytes(raw[start:position], "big", signed=True)
        correlation = None
        if flags & _CORRELATION_ID:
            start = stop + bool(flags & _DELIVERY_MODE) + bool(flags & _PRIORITY) + 1
            correlation = raw[start : start + raw[start - 1]].decode() or None
    except (KeyError, IndexError, struct.error, UnicodeDecodeError):
        return None
    return content_type, correlation, found
