"""Events on their way out: an event becomes a message, fresh or emitted on another one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypedDict, Unpack

import msgspec

from conveyor.broker import DEFAULT_BODY_LIMIT, Clock
from conveyor.core.codec import Codec, codec_for
from conveyor.core.events import EventType, check_topic, event_type, is_event
from conveyor.core.message import PRIORITIES, Message, emitted_id, uuid7
from conveyor.core.words import is_keepable
from conveyor.errors import PayloadError, PayloadTooLarge
from conveyor.runtime.carry import carried_now

HEADERS_LIMIT: Final = 16 * 1024
"""Characters of all the application's headers of a message together."""

UNKEEPABLE: Final = (
    "holds a NUL or a lone surrogate, which no broker carries; "
    'of a file\'s name take os.fsencode(name).decode("utf-8", "replace")'
)


class Publishing(TypedDict, total=False):
    """The options of publish, as keyword arguments; see Options."""

    topic: str | None
    key: str | None
    delay: float | timedelta | None
    at: datetime | float | None
    priority: int
    id: str | None
    expires: float | timedelta | None
    headers: Mapping[str, str] | None


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a publisher may say beside the event.

    Parameters:
        topic: instead of the event's own; needed for dict and bytes.
        key: instead of the event's own.
        delay: seconds (or timedelta) before anybody receives it.
        at: the same as a moment: an aware datetime, or Unix seconds.
        priority: 0 (ordinary) to 9 (first).
        id: the message's id, for publishers that repeat themselves and want that seen.
        expires: seconds (or timedelta) after which it is not worth handling.
        headers: the application's own, text to text.
    """

    topic: str | None = None
    key: str | None = None
    delay: float | timedelta | None = None
    at: datetime | float | None = None
    priority: int = 0
    id: str | None = None
    expires: float | timedelta | None = None
    headers: Mapping[str, str] | None = None


NO_OPTIONS: Final = Options()


class Outgoing:
    """Makes messages of events: encodes, checks, names.

    Parameters:
        clock: gives Unix seconds.
        body_limit: bytes that no payload may exceed.
    """

    def __init__(self, clock: Clock, body_limit: int = DEFAULT_BODY_LIMIT) -> None:
        self.clock = clock
        self.body_limit = body_limit
        self._known: dict[type, tuple[EventType, Codec]] = {}

    def fresh(self, event: object, options: Options = NO_OPTIONS, kind: Any = None) -> Message:
        """The message of an event that nothing caused: the beginning of a journey.

        Parameters:
            kind: the event's type where the object does not tell it (a TypedDict is a dict).

        Raises:
            PayloadError: the event does not fit its own type, or has no topic.
        """
        id = options.id or uuid7(self.clock(), os.urandom(10))
        return self._message(event, options, kind, id, correlation_id=id, causation_id=None)

    def fresh_now(self, event: object, **options: Unpack[Publishing]) -> Message:
        """fresh() with the options as keyword arguments."""
        return self.fresh(event, Options(**options))

    def emitted(
        self, event: object, cause: Message, worker: str, position: int, options: Options = NO_OPTIONS, kind: Any = None
    ) -> Message:
        """The message of the position-th event that worker emits on cause; a repeat makes the same id."""
        id = options.id or emitted_id(cause.id, worker, position)
        return self._message(
            event, options, kind, id, correlation_id=cause.correlation_id or cause.id, causation_id=cause.id
        )

    def raw(self, topic: str, body: bytes, options: Options, content_type: str) -> Message:
        """The message of a payload that is encoded already."""
        id = options.id or uuid7(self.clock(), os.urandom(10))
        check_topic(topic)
        return self._envelope(topic, options.key, body, content_type, options, id, correlation_id=id, causation_id=None)

    def _message(
        self, event: object, options: Options, kind: Any, id: str, *, correlation_id: str, causation_id: str | None
    ) -> Message:
        if kind is None and options.topic is None:
            known = self._known.get(type(event))
            if known is None:
                known = self._known[type(event)] = _known(type(event), None)
        else:
            known = _known(kind or type(event), options.topic)
        event_type, codec = known
        key = options.key
        if key is None and event_type.key is not None:
            key = event_type.key_of(event)
        return self._envelope(
            event_type.topic,
            key,
            codec.encode(event),
            codec.content_type,
            options,
            id,
            correlation_id=correlation_id,
            causation_id=causation_id,
        )

    def _envelope(
        self,
        topic: str,
        key: str | None,
        body: bytes,
        content_type: str,
        options: Options,
        id: str,
        *,
        correlation_id: str,
        causation_id: str | None,
    ) -> Message:
        if len(body) > self.body_limit:
            raise PayloadTooLarge(
                f"the payload for {topic!r} has {len(body):,} bytes, the limit is {self.body_limit:,}; "
                "put large things into a file or an object store and their address into the message"
            )
        if key is not None:
            _check_text("the key", key)
        now = self.clock()
        if options is NO_OPTIONS:
            return Message(id, topic, body, key, carried_now(), content_type, correlation_id, causation_id, now)
        if options.id is not None:
            _check_text("the id", options.id)
        if options.priority not in PRIORITIES:
            raise PayloadError(f"priority is 0 (ordinary) to 9 (first), not {options.priority!r}")
        return Message(
            id,
            topic,
            body,
            key,
            _headers(options.headers, carried_now()),
            content_type,
            correlation_id,
            causation_id,
            now,
            _due(now, options),
            None if options.expires is None else _finite("expires", now + _seconds(options.expires)),
            options.priority,
        )


def _known(kind: Any, topic: str | None) -> tuple[EventType, Codec]:
    if is_event(kind):
        known = event_type(kind)
        return (known if topic is None else EventType(kind, topic, known.key)), codec_for(kind)
    if kind is dict or kind is bytes:
        if topic is None:
            raise PayloadError(f'a payload of {kind.__name__} names no topic; say publish(…, topic="…")')
        return EventType(kind, topic), codec_for(kind)
    raise PayloadError(
        f"{getattr(kind, '__qualname__', kind)} is no event; publish a dataclass, msgspec.Struct, pydantic model or TypedDict "
        "(or dict or bytes with topic=…)"
    )


def _due(now: float, options: Options) -> float:
    if options.at is not None:
        if options.delay is not None:
            raise PayloadError("say either delay= or at=, not both")
        if isinstance(options.at, datetime):
            if options.at.tzinfo is None:
                raise PayloadError(
                    f"at={options.at.isoformat()} has no time zone; use an aware datetime such as datetime.now(UTC)"
                )
            return options.at.astimezone(UTC).timestamp()
        return _finite("at", float(options.at))
    return _finite("delay", now + _seconds(options.delay)) if options.delay else 0.0


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise PayloadError(f"{name}= is a number of seconds, not {value}")
    return value


def _seconds(value: float | timedelta) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else float(value)


def _check_text(what: str, text: object) -> None:
    """Every broker, and every store that a message may come into, can keep this text as it is."""
    if not isinstance(text, str):
        raise PayloadError(f"{what} is text, not {text!r:.200}")
    if not is_keepable(text):
        raise PayloadError(f"{what} {text!a:.200} {UNKEEPABLE}")


def _headers(headers: Mapping[Any, Any] | None, inherited: Mapping[str, str]) -> Mapping[str, str]:
    if not headers:
        return inherited
    size = 0
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise PayloadError(f"headers are text to text, {name!r} is not")
        _check_text("the header", name)
        if not is_keepable(value):
            raise PayloadError(f"the value of the header {name!r:.200} {UNKEEPABLE}")
        size += len(name) + len(value)
    if size > HEADERS_LIMIT:
        raise PayloadTooLarge(
            f"the headers have {size:,} characters, the limit is {HEADERS_LIMIT:,}; put data into the payload"
        )
    return {**inherited, **headers}


class Emitter:
    """Collects what one attempt of a handler emits, in order; every event gets its id from its position.

    Parameters:
        outgoing: makes the messages.
        cause: the message being handled.
        worker: the name of the worker that handles it.
    """

    __slots__ = ("_cause", "_outgoing", "_position", "_worker", "messages")

    def __init__(self, outgoing: Outgoing, cause: Message, worker: str) -> None:
        self._outgoing = outgoing
        self._cause = cause
        self._worker = worker
        self._position = 0
        self.messages: list[Message] = []

    def make(self, event: object, options: Options = NO_OPTIONS, kind: Any = None) -> Message:
        """The message of the next event, not collected."""
        message = self._outgoing.emitted(event, self._cause, self._worker, self._position, options, kind)
        self._position += 1
        return message

    def make_now(self, event: object, **options: Unpack[Publishing]) -> Message:
        """make() with the options as keyword arguments."""
        return self.make(event, Options(**options))

    def add(self, event: object, options: Options = NO_OPTIONS, kind: Any = None) -> Message:
        """Collect an event."""
        message = self.make(event, options, kind)
        self.messages.append(message)
        return message

    def adopt(self, messages: Sequence[Message]) -> None:
        """Collect what another emitter for the same attempt has made, in another process; this one has made nothing yet."""
        self.messages.extend(messages)
        self._position += len(messages)

    def take(self) -> list[Message]:
        """What was collected since the last time."""
        taken, self.messages = self.messages, []
        return taken


def collected(result: object) -> Iterable[object]:
    """The events in what a handler returned: none, one, or a list of them."""
    if result is None:
        return ()
    if isinstance(result, (list, tuple)) and not hasattr(result, "_fields"):
        return [event for event in result if event is not None]
    return (result,)
