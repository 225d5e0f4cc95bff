"""What AMQP 0-9-1 sends, as bytes: field tables, properties, messages and methods; no I/O."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from pamqp import commands
from pamqp.base import Frame

from conveyor.brokers.rabbitmq.amqp.errors import Malformed, words

FieldValue: TypeAlias = (
    "bool | int | float | str | bytes | Decimal | datetime | Sequence[FieldValue] | Mapping[str, FieldValue] | None"
)
Table: TypeAlias = Mapping[str, FieldValue]
"""A field table: headers of a message, arguments of a queue, properties of a server."""

MAX_DEPTH: Final = 64
"""How deeply field tables may nest before they count as malformed."""

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
FRAME_END: Final = 0xCE
FRAME: Final = struct.Struct(">BHI")
"""How a frame starts: its type, channel and size."""
END: Final = b"\xce"
"""How it ends."""

TEXT: Final = ord("S")
"""The letter before a text in a table."""

_U8: Final = struct.Struct(">B")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_I32: Final = struct.Struct(">i")
_U64: Final = struct.Struct(">Q")
_I64: Final = struct.Struct(">q")
_TEXT: Final = struct.Struct(">BI")  # the letter and the length of a text in a table


def encode_text(text: str) -> bytes:
    """A text as UTF-8; what came in as bytes that are none goes out as the same bytes."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")


def decode_text(raw: bytes) -> str:
    """A text from UTF-8; bytes that are none are kept for `encode_text`."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape")


def _encode_short_text(text: str) -> bytes:
    raw = encode_text(text)
    if len(raw) > 255:
        raise ValueError(f"AMQP carries at most 255 bytes here, these are {len(raw)}: {text[:60]!r}…")
    return _U8.pack(len(raw)) + raw


# The names of headers are few, and the same in every message.
_encode_key: Final = lru_cache(maxsize=1024)(_encode_short_text)


def _encode_long_text(text: str) -> bytes:
    raw = encode_text(text)
    return _U32.pack(len(raw)) + raw


def _encode_number(value: float | Decimal) -> bytes:
    if isinstance(value, bool):
        return b"t\x01" if value else b"t\x00"
    if isinstance(value, int):
        if -0x8000_0000 <= value < 0x8000_0000:
            return b"I" + _I32.pack(value)
        if -(2**63) <= value < 2**63:
            return b"l" + _I64.pack(value)
        raise ValueError(f"AMQP has no integer as large as {value}")
    if isinstance(value, float):
        return b"d" + struct.pack(">d", value)
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int) or not -255 <= exponent <= 9:
        raise ValueError(f"AMQP has no decimal such as {value}")
    unscaled = int("".join(map(str, digits))) * (-1 if sign else 1) * 10 ** max(exponent, 0)
    if not -0x8000_0000 <= unscaled < 0x8000_0000:
        raise ValueError(f"AMQP has no decimal such as {value}")
    return b"D" + _U8.pack(max(-exponent, 0)) + _I32.pack(unscaled)


def _encode_value(value: FieldValue) -> bytes:
    if isinstance(value, str):
        raw = encode_text(value)
        return _TEXT.pack(TEXT, len(raw)) + raw
    if isinstance(value, (int, float, Decimal)):
        return _encode_number(value)
    if value is None:
        return b"V"
    if isinstance(value, Mapping):
        return b"F" + encode_table(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return b"x" + _U32.pack(len(value)) + value
    if isinstance(value, datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        return b"T" + _I64.pack(math.floor(moment.timestamp()))
    if isinstance(value, Sequence):
        raw = b"".join(map(_encode_value, value))
        return b"A" + _U32.pack(len(raw)) + raw
    raise ValueError(f"AMQP has no type for {type(value).__name__}: {value!r}")


def encode_table(table: Table) -> bytes:
    """A field table as it travels; ValueError names what AMQP cannot carry."""
    parts: list[bytes] = []
    for key, value in table.items():
        parts += (_encode_key(key), _encode_value(value))
    raw = b"".join(parts)
    return _U32.pack(len(raw)) + raw


Decoded = TypeVar("Decoded")
_Decode: TypeAlias = Callable[[bytes, int, int], tuple[Decoded, int]]
"""Reads one value of some bytes at a position and nesting depth; returns it and the position behind it."""


def _decode_with(layout: struct.Struct) -> _Decode[Any]:
    def decode(data: bytes, position: int, _depth: int) -> tuple[Any, int]:
        return layout.unpack_from(data, position)[0], position + layout.size

    return decode


def _span(data: bytes, position: int) -> tuple[int, int]:
    """Where the content behind a 32-bit length starts and stops."""
    start = position + 4
    stop = start + _U32.unpack_from(data, position)[0]
    if stop > len(data):
        raise Malformed("a length points behind the end of its frame")
    return start, stop


def _decode_short_text(data: bytes, position: int, _depth: int = 0) -> tuple[str, int]:
    stop = position + 1 + data[position]
    if stop > len(data):
        raise Malformed("a length points behind the end of its frame")
    return decode_text(data[position + 1 : stop]), stop


def _decode_long_text(data: bytes, position: int, _depth: int) -> tuple[str | bytes, int]:
    start = position + 4
    stop = start + _U32.unpack_from(data, position)[0]
    raw = data[start:stop]
    if stop > len(data):
        raise Malformed("a length points behind the end of its frame")
    try:
        return raw.decode(), stop
    except UnicodeDecodeError:
        return raw, stop


def _decode_bytes(data: bytes, position: int, _depth: int) -> tuple[bytes, int]:
    start, stop = _span(data, position)
    return data[start:stop], stop


def _decode_bool(data: bytes, position: int, _depth: int) -> tuple[bool, int]:
    return data[position] != 0, position + 1


def _decode_void(_data: bytes, position: int, _depth: int) -> tuple[None, int]:
    return None, position


def _decode_decimal(data: bytes, position: int, _depth: int) -> tuple[Decimal, int]:
    scale, unscaled = struct.unpack_from(">Bi", data, position)
    return Decimal(unscaled).scaleb(-scale), position + 5


def _decode_time(data: bytes, position: int, _depth: int) -> tuple[datetime | int, int]:
    seconds: int = _I64.unpack_from(data, position)[0]
    try:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds), position + 8
    except OverflowError:  # some clients write other units; what no calendar has stays a number
        return seconds, position + 8


def _decode_array(data: bytes, position: int, depth: int) -> tuple[list[FieldValue], int]:
    position, stop = _span(data, position)
    values = []
    while position < stop:
        value, position = _decode_value(data, position, depth + 1)
        values.append(value)
    if position != stop:
        raise Malformed("an array is longer than announced")
    return values, stop


def decode_table(data: bytes, position: int = 0, depth: int = 0) -> tuple[dict[str, FieldValue], int]:
    """The field table at a position of some bytes, and the position behind it."""
    position, stop = _span(data, position)
    table: dict[str, FieldValue] = {}
    while position < stop:
        start = position + 1
        position = start + data[position]
        key = decode_text(data[start:position])
        if data[position] == TEXT:  # nearly all are
            table[key], position = _decode_long_text(data, position + 1, depth)
        else:
            table[key], position = _decode_value(data, position, depth + 1)
    if position != stop:
        raise Malformed("a table is longer than announced")
    return table, stop


def _decode_value(data: bytes, position: int, depth: int) -> tuple[FieldValue, int]:
    decode = _DECODERS.get(data[position])
    if decode is None or depth > MAX_DEPTH:
        raise Malformed(f"a field of type {data[position : position + 1]!r} at depth {depth}")
    return decode(data, position + 1, depth)


# The letters that RabbitMQ uses, which differ from those of the specification: https://www.rabbitmq.com/amqp-0-9-1-errata
_DECODERS: Final[dict[int, _Decode[FieldValue]]] = {
    ord("t"): _decode_bool,
    ord("b"): _decode_with(struct.Struct(">b")),
    ord("B"): _decode_with(_U8),
    ord("s"): _decode_with(struct.Struct(">h")),
    ord("u"): _decode_with(_U16),
    ord("I"): _decode_with(_I32),
    ord("i"): _decode_with(_U32),
    ord("l"): _decode_with(_I64),
    ord("L"): _decode_with(_I64),
    ord("f"): _decode_with(struct.Struct(">f")),
    ord("d"): _decode_with(struct.Struct(">d")),
    ord("D"): _decode_decimal,
    TEXT: _decode_long_text,
    ord("x"): _decode_bytes,
    ord("A"): _decode_array,
    ord("T"): _decode_time,
    ord("F"): decode_table,
    ord("V"): _decode_void,
}

_ENCODE_DOMAIN: Final[dict[str, Callable[[Any], bytes]]] = {
    "octet": _U8.pack,
    "short": _U16.pack,
    "long": _U32.pack,
    "longlong": _U64.pack,
    "shortstr": _encode_short_text,
    "longstr": _encode_long_text,
    "table": encode_table,
}


class Properties(NamedTuple):
    """What travels beside a message's body; see the basic class of AMQP 0-9-1.

    Parameters:
        delivery_mode: 2 survives a restart of the server in a durable queue, 1 does not.
        priority: 0 to 255.
        expiration: milliseconds after which the server drops it, in decimal digits.
        timestamp: POSIX seconds.
    """

    content_type: str | None = None
    content_encoding: str | None = None
    headers: Table | None = None
    delivery_mode: int | None = None
    priority: int | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    expiration: str | None = None
    message_id: str | None = None
    timestamp: int | None = None
    type: str | None = None
    user_id: str | None = None
    app_id: str | None = None

    def encode(self) -> bytes:
        """As they travel.

        Raises:
            ValueError: something that AMQP cannot carry, such as a text of more than 255 bytes.
        """
        flags = 0
        parts = [b""]
        try:
            for value, (flag, encode, _) in zip(self, _PROPERTIES, strict=False):
                if value is not None:
                    flags |= flag
                    parts.append(encode(value))
        except struct.error as error:
            raise ValueError(f"AMQP cannot carry one of {self}: {error}") from error
        parts[0] = _U16.pack(flags)
        return b"".join(parts)

    @classmethod
    def decode(cls, raw: bytes) -> Properties:
        """What `encode` made.

        Raises:
            Malformed: nobody can read these.
        """
        try:
            (flags,) = _U16.unpack_from(raw)
            position = 2
            values: dict[str, Any] = {}
            for name, decode in _layout(flags):
                values[name], position = decode(raw, position, 0)
        except (struct.error, IndexError) as error:
            raise Malformed("the properties are shorter than announced") from error
        if position != len(raw) or flags & 0b11:
            raise Malformed("there is something behind the properties")
        values.pop(_CLUSTER_ID, None)
        return cls(**values)


_SHORT_TEXT: Final = (_encode_short_text, _decode_short_text)
_OCTET: Final = (_U8.pack, _decode_with(_U8))
_KINDS: Final[tuple[tuple[Callable[[Any], bytes], _Decode[Any]], ...]] = (
    *(_SHORT_TEXT, _SHORT_TEXT, (encode_table, decode_table), _OCTET, _OCTET),
    *(_SHORT_TEXT, _SHORT_TEXT, _SHORT_TEXT, _SHORT_TEXT, (_U64.pack, _decode_with(_U64))),
    *(_SHORT_TEXT, _SHORT_TEXT, _SHORT_TEXT, _SHORT_TEXT),  # the last, cluster_id, is read over and never written
)
_PROPERTIES: Final = tuple((1 << (15 - place), *kind) for place, kind in enumerate(_KINDS))
_CLUSTER_ID: Final = "cluster_id"
NO_PROPERTIES: Final = Properties()


@lru_cache(maxsize=256)
def _layout(flags: int) -> tuple[tuple[str, _Decode[Any]], ...]:
    """Which properties follow their flags."""
    names = (*Properties._fields, _CLUSTER_ID)
    return tuple((name, decode) for name, (flag, _, decode) in zip(names, _PROPERTIES, strict=True) if flags & flag)


class Incoming:
    """A message from the server: delivered, got or returned.

    Parameters:
        delivery_tag: names it on its channel, for ack and nack; 0 for one that was returned.
        raw_properties: as they came; `Channel.publish` takes them as they are.
    """

    __slots__ = (
        "_properties",
        "body",
        "consumer_tag",
        "delivery_tag",
        "exchange",
        "raw_properties",
        "redelivered",
        "routing_key",
    )

    def __init__(
        self,
        exchange: str,
        routing_key: str,
        delivery_tag: int = 0,
        redelivered: bool = False,
        consumer_tag: str = "",
        raw_properties: bytes = b"\x00\x00",
        body: bytes = b"",
    ) -> None:
        self.exchange = exchange
        self.routing_key = routing_key
        self.delivery_tag = delivery_tag
        self.redelivered = redelivered
        self.consumer_tag = consumer_tag
        self.raw_properties = raw_properties
        self.body = body
        self._properties: Properties | None = None

    @property
    def properties(self) -> Properties:
        """Decoded when first asked for.

        Raises:
            Malformed: nobody can read them.
        """
        if self._properties is None:
            self._properties = Properties.decode(self.raw_properties)
        return self._properties

    def __repr__(self) -> str:
        return f"Incoming({self.exchange!r}, {self.routing_key!r}, tag {self.delivery_tag}, {len(self.body)} bytes)"


def encode_method(method: type[Frame], number: int, **fields: Any) -> bytes:
    """The frame of a method on a channel; fields that are not given have pamqp's defaults.

    pamqp's own encoding is not used: it refuses names that RabbitMQ allows, and writes floats in half their precision.
    """
    defaults = method()
    payload = bytearray(_U32.pack(method.index))
    bits = places = 0
    for name in method.attributes():
        value = fields[name] if name in fields else getattr(defaults, name)
        domain = method.amqp_type(name)
        if domain == "bit":
            bits |= bool(value) << places
            places += 1
            continue
        if places:
            payload.append(bits)
            bits = places = 0
        payload += _ENCODE_DOMAIN[domain](value)
    if places:
        payload.append(bits)
    return b"".join((FRAME.pack(METHOD, number, len(payload)), payload, END))


def decode_method(payload: bytes) -> Frame:
    """The method that a frame carries.

    Raises:
        Malformed: it is none.
    """
    try:
        frame: Frame = commands.INDEX_MAPPING[_U32.unpack_from(payload)[0]]()
        frame.unmarshal(payload[4:])
    except Exception as error:  # pamqp raises many kinds for broken bytes
        raise Malformed(f"a method that nobody can read: {words(error)}") from error
    return frame
