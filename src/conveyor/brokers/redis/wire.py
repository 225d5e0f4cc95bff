"""A message as the fields of a stream's entry, and back (docs/wire-format.md)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from conveyor.broker import DeadLetter
from conveyor.core.message import JSON, NO_HEADERS, PRIORITIES, SOURCE, Message, from_headers, timestamp, to_headers

PREFIX: Final = "ce_"
TOPIC: Final = "conveyor_topic"
"""The field that says what a message was published under, where its type does not."""
PACKED: Final = b"conveyor_fields"
"""The first field of an entry that stands for all fields of its message: see packed() in queue.lua."""
MOST_FIELDS: Final = 1_500
"""Fields of one entry: Lua hands no more than some 8,000 values to a command."""
_WAYS: Final = frozenset({b"ce_duetime", b"ce_priority", b"ce_partitionkey"})
"""What the scripts look at, as `ways` in queue.lua."""
MOST_PLANS: Final = 1_000
"""Sets of fields that are remembered: as many as there are kinds of messages, unless every message has names of its own."""
LATEST_DUE: Final = 9e15
"""Milliseconds: beyond that a double is no whole number any more. Some 285,000 years."""

_ATTRIBUTES: Final = tuple(
    name.encode()
    for name in (
        *("body", "content-type", "ce_id", "ce_source", "ce_type", "ce_time", "ce_partitionkey", "ce_correlationid"),
        *("ce_causationid", "ce_duetime", "ce_expirytime", "ce_priority", TOPIC),
    )
)
"""What is read without a detour; whoever writes others, or spells them in another way, takes it."""
_CONVEYOR: Final = SOURCE.encode()
_JSON: Final = JSON.encode()
_MAYBE: Final = frozenset((first + second).encode() for first in "cC" for second in "eElLoO")
"""How the name of an attribute in another spelling begins (ce-…, cloudEvents:…, Content-Type)."""
_DIGITS: Final = {str(number).encode(): number for number in PRIORITIES}


def fields_of(message: Message, *, topic: bool = False) -> list[Any]:
    """The fields of a message, name after name and value; the body first.

    Parameters:
        topic: say the topic in words of its own, for queues that need not know it.
    """
    headers = to_headers(message, PREFIX)
    if message.key == "":
        headers["ce_partitionkey"] = ""
    if topic or headers["ce_type"] != message.topic:
        headers[TOPIC] = message.topic
    fields: list[Any] = ["body", message.body]
    for pair in headers.items():
        fields += pair
    return fields


def arguments_of(message: Message, queue: str = "") -> list[Any]:
    """A message as publish() in queue.lua takes it.

    Raises:
        ValueError: it has a text that is no UTF-8 (a lone surrogate).
    """
    if message.headers or queue:
        fields = [each.encode() if type(each) is str else each for each in fields_of(message, topic=bool(queue))]
    else:
        fields = _usual_fields_of(message)
    if len(fields) > 2 * MOST_FIELDS:
        fields = _packed(fields)
    key = "-" if message.key is None else "+" + message.key
    way = milliseconds(message.due), message.priority, key.encode()
    return [message.topic.encode(), queue.encode(), *way, len(fields), *fields]


def _usual_fields_of(message: Message) -> list[bytes]:
    """As fields_of(), of a message without headers of its own, in a third of the time."""
    kind = _JSON if message.content_type == JSON else message.content_type.encode()
    fields = [b"body", message.body, b"content-type", kind, b"ce_specversion", b"1.0", b"ce_id", message.id.encode()]
    fields += b"ce_source", _CONVEYOR, b"ce_type", message.topic.encode()
    if message.created:
        fields += b"ce_time", timestamp(message.created).encode()
    if message.key is not None:
        fields += b"ce_partitionkey", message.key.encode()
    if message.correlation_id:
        fields += b"ce_correlationid", message.correlation_id.encode()
    if message.causation_id:
        fields += b"ce_causationid", message.causation_id.encode()
    if message.due:
        fields += b"ce_duetime", timestamp(message.due).encode()
    if message.expires is not None:
        fields += b"ce_expirytime", timestamp(message.expires).encode()
    if message.priority:
        fields += b"ce_priority", b"%d" % message.priority
    return fields


def milliseconds(seconds: float) -> int:
    """Unix seconds as the server counts them; never earlier."""
    return math.ceil(min(max(0.0, seconds * 1000), LATEST_DUE))  # max() gives its first for what is no number


def message_of(fields: Sequence[bytes], *, where: str, topics: Collection[str], now: float) -> Message:
    """The message that an entry holds, whoever wrote it; never an error.

    Parameters:
        where: names the entry; the message's id where it has none.
        topics: what the queue receives.
        now: Unix seconds.
    """
    names = tuple(fields[::2])
    plan = _plans.get(names)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[names] = _plan_of(names)
    places, own = plan
    if own is None and names[0] == PACKED and (inner := _unpacked(fields[1])):
        return message_of([*inner, *fields[2:]], where=where, topics=topics, now=now)
    # A field that is absent is at the end of the list, where nothing is.
    said = [*fields, None]
    body, kind, id_, source, type_, time, key, correlation, causation, due, expires, priority, topic = [
        said[place] for place in places
    ]
    named = _topic(type_, topic, source, topics)
    if (
        own is None
        or source != _CONVEYOR
        or type_ is None
        or not id_
        or (priority is not None and priority not in _DIGITS)
        or (topic is not None and topic != type_)
    ):
        return _foreign(fields, named, where, now)
    created = _seconds(time) if time is not None else 0.0  # Conveyor's own that says no time has none
    return Message(
        id_.decode("utf-8", "replace"),
        named,
        body or b"",
        None if key is None else key.decode("utf-8", "replace"),
        {name: fields[place].decode("utf-8", "replace") for name, place in own} if own else NO_HEADERS,
        JSON if kind == _JSON else _or(kind, JSON),
        correlation.decode("utf-8", "replace") if correlation else None,
        causation.decode("utf-8", "replace") if causation else None,
        created if created is not None else now,
        (_seconds(due) or 0.0) if due else 0.0,
        _seconds(expires) if expires else None,
        _DIGITS[priority] if priority else 0,
    )


Plan = tuple[list[int], list[tuple[str, int]] | None]
"""Where the attributes are in a list of fields, and the application's own headers; None where it takes the detour."""
_plans: Final[dict[tuple[bytes, ...], Plan]] = {}


def _plan_of(names: tuple[bytes, ...]) -> Plan:
    """How to read entries that have these fields. Of a name that comes twice the first counts."""
    first: dict[bytes, int] = {}
    own: list[tuple[str, int]] | None = []
    for number, name in enumerate(names):
        if name == b"ce_specversion":
            continue
        if name in _ATTRIBUTES and name not in first:
            first[name] = 2 * number + 1
        elif name[:2] in _MAYBE:
            own = None
        elif own is not None:
            own.append((name.decode("utf-8", "replace"), 2 * number + 1))
    return [first.get(name, -1) for name in _ATTRIBUTES], own


def _or(value: bytes | None, default: str) -> str:
    return value.decode("utf-8", "replace") if value else default


def _topic(type_: bytes | None, topic: bytes | None, source: bytes | None, topics: Collection[str]) -> str:
    """What it was published under: what says so; else its type, where the queue knows it; else the queue's only topic."""
    if topic:
        return topic.decode("utf-8", "replace")
    kind = type_.decode("utf-8", "replace") if type_ else ""
    if kind and (source == _CONVEYOR or kind in topics or len(topics) != 1):
        return kind
    return min(topics, default="")


def _foreign(fields: Sequence[bytes], topic: str, where: str, now: float) -> Message:
    """What another program wrote, or an application's own attributes: by all the rules."""
    headers: dict[str, str] = {}
    empty: dict[str, str] = {}
    body, key = b"", None
    seen = False
    values = iter(fields)
    for name in values:
        value = next(values, b"")
        if name == b"body" and not seen:
            body, seen = value, True
        elif name != TOPIC.encode():
            header, content = name.decode("utf-8", "replace"), value.decode("utf-8", "replace")
            headers[header] = content
            if name == b"ce_partitionkey":
                key = content
            elif not content and name[:2] not in _MAYBE:
                empty[header] = ""
    message = from_headers(topic, body, headers, fallback_id=where, now=now)
    if not empty and (key is None or key == message.key):
        return message
    return msgspec.structs.replace(
        message, key=key if message.key is None else message.key, headers={**message.headers, **empty}
    )


def _seconds(value: bytes) -> float | None:
    try:
        moment = datetime.fromisoformat(value.decode().upper())
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def dead_fields_of(letter: DeadLetter) -> list[bytes]:
    """A dead letter as an entry: what it is dead of, then the message's own fields."""
    about = letter.reason, letter.error, letter.traceback, letter.deliveries, letter.attempts, milliseconds(letter.died)
    fields = [_bytes(each) for each in fields_of(letter.message, topic=True)]
    if len(fields) > 2 * MOST_FIELDS:
        fields = _packed(fields)
    return [each for name, said in zip(_ABOUT, about, strict=True) for each in (name, _bytes(said))] + fields


def readable(said: str) -> bytes:
    """What is kept for people to read, whatever it consists of."""
    return said.encode("utf-8", "replace")


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else readable(str(value))


def _packed(fields: list[bytes]) -> list[bytes]:
    """As packed() in queue.lua."""
    way = [each for pair in zip(fields[::2], fields[1::2], strict=True) if pair[0] in _WAYS for each in pair]
    return [PACKED, b"".join(len(each).to_bytes(4, "big") + each for each in fields), *way]


def _unpacked(packed: bytes) -> list[bytes] | None:
    """Names and values, each behind its length; None where they are not."""
    fields: list[bytes] = []
    place = 0
    while place < len(packed):
        start = place + 4
        place = start + int.from_bytes(packed[place:start], "big")
        fields.append(packed[start:place])
    if place > len(packed) or len(fields) % 2 or fields[:1] == [PACKED]:
        return None
    return fields


_ABOUT: Final = (b"dead_reason", b"dead_error", b"dead_traceback", b"dead_deliveries", b"dead_attempts", b"dead_time")
"""What a dead letter has before the message's own fields. Others may write there: any of them may be missing."""
_LONGEST_NUMBER: Final = 14
"""Digits that make sense, of a count or of a time in milliseconds."""


def letter_of(queue: str, entry: Sequence[Any]) -> DeadLetter:
    """The dead letter that an entry holds, whoever wrote it; never an error."""
    id_, fields = entry[0].decode(), entry[1]
    said: dict[bytes, bytes] = {}
    for name, value in zip(fields[::2], fields[1::2], strict=True):
        if name not in _ABOUT or name in said:
            break
        said[name] = value

    def text(name: bytes, default: str = "") -> str:
        return said[name].decode("utf-8", "replace") if name in said else default

    def number(name: bytes) -> int:
        value = said.get(name, b"")
        return int(value) if value.isdigit() and len(value) <= _LONGEST_NUMBER else 0

    died = number(b"dead_time") / 1000
    return DeadLetter(
        position=f"{_padded(id_)}@{queue}",
        queue=queue,
        message=message_of(fields[2 * len(said) :], where=f"{queue}/{id_}", topics=(), now=died),
        reason=text(b"dead_reason", "unknown"),
        error=text(b"dead_error"),
        traceback=text(b"dead_traceback"),
        deliveries=number(b"dead_deliveries"),
        attempts=number(b"dead_attempts"),
        died=died,
    )


def _padded(id_: str) -> str:
    """An entry's id so that text sorts by age."""
    milliseconds, _, sequence = id_.partition("-")
    return f"{milliseconds:0>13}-{sequence:0>6}"


def position_of(position: str) -> tuple[str, str]:
    """The id and the queue of a dead letter's position; two empty texts where it is none."""
    id_, _, queue = position.partition("@")
    milliseconds, _, sequence = id_.partition("-")
    if not (milliseconds.isdecimal() and sequence.isdecimal()):
        return "", ""
    return f"{int(milliseconds)}-{int(sequence)}", queue
