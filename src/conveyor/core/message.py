"""The message: a frozen envelope around a payload, and its form on the wire (docs/wire-format.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec

NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
JSON: Final = "application/json"
PRIORITIES: Final = range(10)
"""0 is ordinary, 9 goes first."""


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
