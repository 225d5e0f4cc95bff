"""The message: a frozen envelope around a payload, and its form on the wire (docs/wire-format.md)."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

import msgspec

NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
JSON: Final = "application/json"
PRIORITIES: Final = range(10)
"""0 is ordinary, 9 goes first."""
PREFIX: Final = "ce-"
"""Before the name of a CloudEvents attribute in HTTP, NATS and Message.headers. Redis and Kafka say ce_, AMQP says
cloudEvents: or cloudEvents_ (CloudEvents 1.0.2, protocol bindings, section 3.1.3). All of them are understood."""
SOURCE: Final = "conveyor"
"""The CloudEvents source of a message that does not carry one of its own as the header ce-source."""

_CONTENT_TYPE: Final = "content-type"
_ENVELOPE: Final = frozenset(
    {"specversion", "id", "source", "type", "time", "datacontenttype", "partitionkey"}
    | {"correlationid", "causationid", "duetime", "expirytime", "priority"}
)
_OVERRIDABLE: Final = frozenset({"source", "type"})
_ATTRIBUTE: Final = re.compile(r"(?:ce[-_]|cloudevents[:_])([a-z0-9]+)", re.IGNORECASE)
_LONGEST_INT: Final = 128
"""Bits. No protocol has longer ones; Python refuses to write very long ones in decimal."""
_FIRST_SECOND: Final = datetime.min.replace(tzinfo=UTC).timestamp()
_LAST_SECOND: Final = datetime.max.replace(tzinfo=UTC, microsecond=0).timestamp()


class Message(msgspec.Struct, frozen=True, gc=False):
    """A message as it travels: made once, never changed.

    Parameters:
        id: a UUIDv7 where Conveyor made it; from other programs any text.
        topic: the name it was published under.
        body: the payload, encoded.
        key: what keeps related messages in order (an order's id, a customer's id).
        headers: the application's own headers; the envelope's attributes are not among them.
        content_type: the media type of body.
        correlation_id: the id of the first message of the journey that this one belongs to.
        causation_id: the id of the message whose handler emitted this one.
        created: Unix seconds.
        due: Unix seconds before which nobody receives it; 0.0 is at once.
        expires: Unix seconds after which it is not worth handling; None is never.
        priority: 0 (ordinary) to 9 (first).
    """

    id: str
    topic: str
    body: bytes
    key: str | None = None
    headers: Mapping[str, str] = NO_HEADERS
    content_type: str = JSON
    correlation_id: str | None = None
    causation_id: str | None = None
    created: float = 0.0
    due: float = 0.0
    expires: float | None = None
    priority: int = 0


def uuid7(unix_seconds: float, random: bytes) -> str:
    """A UUIDv7 as text: 48 bits of milliseconds, then ten random bytes (RFC 9562, section 5.7).

    Parameters:
        unix_seconds: the time it stands for.
        random: ten bytes or more; the first ten are used.
    """
    value = (int(unix_seconds * 1000) & 0xFFFF_FFFF_FFFF) << 80 | int.from_bytes(random[:10], "big")
    value = value & ~(0xF << 76) | (0x7 << 76)
    value = value & ~(0x3 << 62) | (0x2 << 62)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def emitted_id(cause_id: str, worker: str, position: int) -> str:
    """The id of the position-th message that worker emits on the message cause_id: the same on every attempt.

    A UUIDv8 (RFC 9562, section 5.8) from a hash of the three, so that whoever receives a repeat can tell.
    """
    digest = hashlib.blake2b(f"{cause_id}\0{worker}\0{position}".encode(), digest_size=16).digest()
    value = int.from_bytes(digest, "big")
    value = value & ~(0xF << 76) | (0x8 << 76)
    value = value & ~(0x3 << 62) | (0x2 << 62)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def to_headers(message: Message, prefix: str = PREFIX) -> dict[str, str]:
    """The envelope and the application's headers as a protocol's headers (CloudEvents 1.0.2, binary content mode).

    The media type is under ``content-type``; a protocol with a property for it moves it there. Times are exact to the
    microsecond.

    Parameters:
        prefix: what the protocol writes before the name of an attribute.
    """
    envelope = {
        "specversion": "1.0",
        "id": message.id,
        "source": SOURCE,
        "type": message.topic,
        "time": _timestamp(message.created) if message.created else None,
        "partitionkey": message.key,
        "correlationid": message.correlation_id,
        "causationid": message.causation_id,
        "duetime": _timestamp(message.due) if message.due else None,
        "expirytime": None if message.expires is None else _timestamp(message.expires),
        "priority": str(message.priority) if message.priority else None,
    }
    headers = {}
    for name, value in message.headers.items():
        attribute = _attribute(name)
        if attribute is None:
            if name.lower() != _CONTENT_TYPE:
                headers[name] = value
        elif value and (attribute in _OVERRIDABLE or attribute not in _ENVELOPE):
            envelope[attribute] = value
    headers.update({prefix + name: value for name, value in envelope.items() if value})
    headers[_CONTENT_TYPE] = message.content_type
    return headers


def from_headers(topic: str, body: bytes, headers: Mapping[str, Any], *, fallback_id: str, now: float) -> Message:
    """The message that arrived with these headers, from Conveyor or from any other program; never an error.

    An attribute that is missing or makes no sense gets its default. Headers that are no text and no number are
    dropped. Extension attributes that the envelope does not know stay in the message's headers as ``ce-…``, and so do
    a foreign source and type.

    Parameters:
        topic: what it was published under.
        headers: as the protocol gave them; names in any case, with any of the CloudEvents prefixes.
        fallback_id: its id where the headers have none.
        now: Unix seconds; taken for created where the headers have no time.
    """
    envelope: dict[str, Any] = {}
    own: dict[str, str] = {}
    content_type: str | None = None
    for name, value in headers.items():
        text = _text(value)
        attribute = _attribute(name)
        if text is None:
            continue
        if name.lower() == _CONTENT_TYPE:
            content_type = text
        elif attribute is None:
            own[name] = text
        elif attribute in _ENVELOPE:
            envelope[attribute] = value if isinstance(value, (int, float, datetime)) else text
        else:
            own[PREFIX + attribute] = text
    for attribute, usual in (("source", SOURCE), ("type", topic)):
        said = _text(envelope.get(attribute))
        if said is not None and said != usual:
            own[PREFIX + attribute] = said
    created, expires = _seconds(envelope.get("time")), _seconds(envelope.get("expirytime"))
    return Message(
        id=_text(envelope.get("id")) or fallback_id,
        topic=topic,
        body=body,
        key=_text(envelope.get("partitionkey")),
        headers=own or NO_HEADERS,
        content_type=content_type or _text(envelope.get("datacontenttype")) or JSON,
        correlation_id=_text(envelope.get("correlationid")),
        causation_id=_text(envelope.get("causationid")),
        created=now if created is None else created,
        due=_seconds(envelope.get("duetime")) or 0.0,
        expires=expires,
        priority=_priority(envelope.get("priority")),
    )


def _attribute(header: str) -> str | None:
    """The CloudEvents attribute that a header carries: its name is lower-case letters and digits (section 3.1)."""
    found = _ATTRIBUTE.fullmatch(header)
    return found[1].lower() if found else None


def _text(value: Any) -> str | None:
    """A header's value as text that every store can keep; None where there is none."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    elif isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= _LONGEST_INT):
        value = str(value)
    elif isinstance(value, datetime):
        value = value.isoformat()
    if not isinstance(value, str) or not value or "\0" in value:
        return None
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def _timestamp(unix_seconds: float) -> str:
    """As RFC 3339 has it; what lies beyond its years 1 to 9999 becomes the nearest that it can say."""
    within = min(max(unix_seconds, _FIRST_SECOND), _LAST_SECOND)
    return datetime.fromtimestamp(within, UTC).isoformat().replace("+00:00", "Z")


def _seconds(value: Any) -> float | None:
    """A timestamp, as RFC 3339 or as a protocol's own type, in Unix seconds; None where it is none. No zone is UTC."""
    try:
        if isinstance(value, (int, float)):
            return float(value) if math.isfinite(value) else None
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value.upper())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, AttributeError):
        return None


def _priority(value: Any) -> int:
    try:
        return min(max(int(value), PRIORITIES[0]), PRIORITIES[-1])
    except (ValueError, OverflowError, TypeError):
        return 0
