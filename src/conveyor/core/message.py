"""The message: a frozen envelope around a payload, and its form on the wire (docs/wire-format.md)."""

from __future__ import annotations

import functools
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
_ATTRIBUTE: Final = re.compile(r"(?:ce[-_]|cloudevents[:_])([a-z0-9]+)", re.IGNORECASE)
_VARIANT: Final = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))
"""A UUID's 17th digit: its two upper bits are 10."""
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


def redriven(message: Message) -> Message:
    """A dead letter's message as it goes back: due at once, and no longer limited in time, or it would expire again."""
    return msgspec.structs.replace(message, due=0.0, expires=None)


def uuid7(unix_seconds: float, random: bytes) -> str:
    """A UUIDv7 as text: 48 bits of milliseconds, then ten random bytes (RFC 9562, section 5.7).

    Parameters:
        unix_seconds: the time it stands for.
        random: ten bytes or more; the first ten are used.
    """
    milliseconds = int(unix_seconds * 1000) & 0xFFFF_FFFF_FFFF
    return _uuid((milliseconds.to_bytes(6, "big") + random[:10]).hex(), "7")


def emitted_id(cause_id: str, worker: str, position: int) -> str:
    """The id of the position-th message that worker emits on the message cause_id: the same on every attempt.

    A UUIDv8 (RFC 9562, section 5.8) from a hash of the three, so that whoever receives a repeat can tell.
    """
    digest = hashlib.blake2b(f"{cause_id}\0{worker}\0{position}".encode(), digest_size=16)
    return _uuid(digest.hexdigest(), "8")


def _uuid(digits: str, version: str) -> str:
    """32 hexadecimal digits as a UUID: one is replaced by the version, two bits of another by the variant (section 4)."""
    return f"{digits[:8]}-{digits[8:12]}-{version}{digits[13:16]}-{_VARIANT[digits[16]]}{digits[17:20]}-{digits[20:]}"


def to_headers(message: Message, prefix: str = PREFIX) -> dict[str, str]:
    """The envelope and the application's headers as a protocol's headers (CloudEvents 1.0.2, binary content mode).

    The media type is under ``content-type``; a protocol with a property for it moves it there. Times are exact to the
    microsecond.

    Parameters:
        prefix: what the protocol writes before the name of an attribute.
    """
    headers: dict[str, str] = {}
    said = {"source": SOURCE, "type": message.topic}
    for name, value in message.headers.items():
        attribute = _attribute(name)
        if attribute is None:
            headers[name] = value
        elif value and (attribute in said or attribute not in _ENVELOPE):
            said[attribute] = value
    headers["content-type"] = message.content_type
    headers[prefix + "specversion"] = "1.0"
    headers[prefix + "id"] = message.id
    for attribute, value in said.items():
        headers[prefix + attribute] = value
    if message.created:
        headers[prefix + "time"] = timestamp(message.created)
    if message.key:
        headers[prefix + "partitionkey"] = message.key
    if message.correlation_id:
        headers[prefix + "correlationid"] = message.correlation_id
    if message.causation_id:
        headers[prefix + "causationid"] = message.causation_id
    if message.due:
        headers[prefix + "duetime"] = timestamp(message.due)
    if message.expires is not None:
        headers[prefix + "expirytime"] = timestamp(message.expires)
    if message.priority:
        headers[prefix + "priority"] = str(message.priority)
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
    for name, value in headers.items():
        attribute = _attribute(name)
        if attribute in _ENVELOPE and isinstance(value, (int, float, datetime)):
            envelope[attribute] = value  # a protocol's own type says more than its text
            continue
        text = _text(value)
        if text is None:
            continue
        if attribute is None:
            own[name] = text
        elif attribute in _ENVELOPE:
            envelope[attribute] = text
        else:
            own[PREFIX + attribute] = text
    get = envelope.get
    source, kind = _text(get("source")), _text(get("type"))
    if source is not None and source != SOURCE:
        own["ce-source"] = source
    if kind is not None and kind != topic:
        own["ce-type"] = kind
    created = _seconds(get("time"))
    return Message(
        id=_text(get("id")) or fallback_id,
        topic=topic,
        body=body,
        key=_text(get("partitionkey")),
        headers=own or NO_HEADERS,
        content_type=_text(get("datacontenttype")) or JSON,
        correlation_id=_text(get("correlationid")),
        causation_id=_text(get("causationid")),
        created=now if created is None else created,
        due=_seconds(get("duetime")) or 0.0,
        expires=_seconds(get("expirytime")),
        priority=_priority(get("priority")),
    )


@functools.lru_cache(maxsize=1024)  # the names of headers are few, and the same in every message
def _attribute(header: str) -> str | None:
    """The CloudEvents attribute that a header carries: its name is lower-case letters and digits (section 3.1)."""
    if header.lower() == _CONTENT_TYPE:
        return "datacontenttype"
    found = _ATTRIBUTE.fullmatch(header)
    return found[1].lower() if found else None


def _text(value: Any) -> str | None:
    """A header's value as text that every store can keep; None where there is none."""
    text: str = value if type(value) is str else _in_words(value)
    if not text or "\0" in text:
        return None
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _in_words(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= _LONGEST_INT):
        return str(value)
    return value.isoformat() if isinstance(value, datetime) else ""


def timestamp(unix_seconds: float) -> str:
    """As RFC 3339 has it; what lies beyond its years 1 to 9999 becomes the nearest that it can say."""
    if not 0.0 <= unix_seconds < _LAST_SECOND:
        return _day_and_time(min(max(unix_seconds, _FIRST_SECOND), _LAST_SECOND)) + "Z"
    whole = int(unix_seconds)
    micro = round((unix_seconds - whole) * 1e6)
    if micro == 1_000_000:
        whole, micro = whole + 1, 0
    return f"{_second(whole)}.{micro:06}Z" if micro else _second(whole) + "Z"


@functools.lru_cache(maxsize=4)  # nearly all that is written now says one of few seconds
def _second(unix_seconds: int) -> str:
    return _day_and_time(unix_seconds)


def _day_and_time(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat().removesuffix("+00:00")


def _seconds(value: Any) -> float | None:
    """A timestamp, as RFC 3339 or as a protocol's own type, in Unix seconds; None where it is none. No zone is UTC."""
    if value is None:
        return None
    try:
        if isinstance(value, (int, float)):
            return float(value) if math.isfinite(value) else None
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value.upper())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, AttributeError):
        return None


def _priority(value: Any) -> int:
    if value is None:
        return 0
    try:
        return min(max(int(value), PRIORITIES[0]), PRIORITIES[-1])
    except (ValueError, OverflowError, TypeError):
        return 0
