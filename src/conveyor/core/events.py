"""Event types and their topics: what a payload type is called on the wire, and which of its fields is the key."""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, TypeVar, overload
from uuid import UUID

import msgspec

from conveyor.errors import ConfigurationError, HandlerError, PayloadError

T = TypeVar("T")

_TOPIC: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_WORDS: Final = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+")
_RECORD: Final = "__conveyor_event__"


@dataclass(frozen=True, slots=True)
class EventType:
    """A payload type with the topic that it is published under.

    Parameters:
        type: the payload's type.
        topic: the name on the wire.
        key: the field whose value is the message's key; None for no key.

    Raises:
        ConfigurationError: the topic is no valid name, or the type has no such field.
    """

    type: Any
    topic: str
    key: str | None = None

    def __post_init__(self) -> None:
        check_topic(self.topic)
        if self.key is not None:
            _check_key(self.type, self.key)

    def key_of(self, payload: Any) -> str | None:
        """The key of one payload, as text: what its key field holds; None where there is none.

        Raises:
            PayloadError: the field is missing, or holds something that is no name (a list, an object).
        """
        if self.key is None:
            return None
        try:
            value = payload[self.key] if isinstance(payload, Mapping) else getattr(payload, self.key)
        except (KeyError, AttributeError):
            raise PayloadError(f"{_name(self.type)} has no value for its key field {self.key!r}") from None
        return _key_text(value, self)


@overload
def event(topic: type[T], /) -> type[T]: ...
@overload
def event(topic: str | None = None, /, *, key: str | None = None) -> Callable[[type[T]], type[T]]: ...
def event(topic: str | type[T] | None = None, /, *, key: str | None = None) -> type[T] | Callable[[type[T]], type[T]]:
    """Say what a payload type is called on the wire, and which field keeps related events in order.

    Parameters:
        topic: the name; left out, the class name in snake_case.
        key: the name of the field whose value becomes the message's key.

    Raises:
        ConfigurationError: the topic is no valid name, or the type has no such field.
    """
    if isinstance(topic, type):
        return _record(topic, None, None)
    return lambda tp: _record(tp, topic, key)


def event_type(tp: Any) -> EventType:
    """The event type of a payload type, made once: as @event says, else the class name in snake_case without a key.

    Raises:
        HandlerError: tp is no type that names an event.
    """
    if not is_event(tp):
        raise HandlerError(
            f"{_name(tp)} names no event; use a dataclass, msgspec.Struct, pydantic model or TypedDict "
            "(dict and bytes can be published and received with topic=…)"
        )
    return _event_types(tp)


@functools.cache
def _event_types(tp: type) -> EventType:
    # Only what was said about this very class: a subclass is another event and has a topic of its own.
    topic, key = vars(tp).get(_RECORD, (None, None))
    if topic is None:
        topic = default_topic(tp.__name__)
        if not _TOPIC.fullmatch(topic):
            raise ConfigurationError(
                f'{_name(tp)} makes no valid topic ({topic!r:.220}); name one: @event("order.created")'
            )
    return EventType(tp, topic, key)


def is_event(tp: Any) -> bool:
    """Whether a type names an event by itself: a dataclass, msgspec.Struct, pydantic model or TypedDict."""
    if not isinstance(tp, type):
        return False
    return dataclasses.is_dataclass(tp) or issubclass(tp, msgspec.Struct) or is_typed_dict(tp) or is_pydantic_model(tp)


def is_typed_dict(tp: Any) -> bool:
    """Whether tp is a TypedDict, of typing or of typing_extensions."""
    return isinstance(tp, type) and issubclass(tp, dict) and hasattr(tp, "__required_keys__")


def is_pydantic_model(tp: Any) -> bool:
    """Whether tp is a pydantic model; pydantic is not imported for it: who has a model has pydantic."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(tp, type) and issubclass(tp, pydantic.BaseModel)


def default_topic(class_name: str) -> str:
    """A class name in snake_case: OrderCreated is order_created, HTTPRequest is http_request."""
    parts = class_name.split("_")
    return "_".join("_".join(_WORDS.findall(part)).lower() if part.isascii() else part.lower() for part in parts)


def check_topic(topic: object) -> str:
    """The topic itself, where it is a name that every broker can carry.

    Raises:
        ConfigurationError: it is not.
    """
    if isinstance(topic, str) and _TOPIC.fullmatch(topic):
        return topic
    raise ConfigurationError(
        f"{topic!r:.220} is no topic: 1 to 200 letters (A-Z, a-z), digits, '_', '-' and '.', "
        "beginning with a letter, digit or '_', for example order.created"
    )


def _record(tp: type[T], topic: str | None, key: str | None) -> type[T]:
    if not isinstance(tp, type):
        raise ConfigurationError(f"@event belongs on a class, not on {tp!r:.100}")
    if topic is not None:
        check_topic(topic)
    if key is not None and is_event(tp):  # below @dataclass the fields are not known yet: event_type() looks then
        _check_key(tp, key)
    setattr(tp, _RECORD, (topic, key))
    return tp


def _check_key(tp: Any, key: str) -> None:
    known = _fields(tp)
    if known is not None and key not in known:
        has = ", ".join(known) or "none at all"
        raise ConfigurationError(f"key={key!r} is no field of {_name(tp)}; its fields are: {has}")


def _fields(tp: Any) -> tuple[str, ...] | None:
    """The names of a payload type's fields; None where it may have any."""
    if dataclasses.is_dataclass(tp):
        return tuple(field.name for field in dataclasses.fields(tp))
    if isinstance(tp, type) and issubclass(tp, msgspec.Struct):
        return tp.__struct_fields__
    if is_pydantic_model(tp):
        return tuple(tp.model_fields)
    if is_typed_dict(tp):
        return tuple(typing.cast("Mapping[str, Any]", tp.__annotations__))
    return None


def _key_text(value: Any, kind: EventType) -> str | None:
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or value == "":
        return None
    if isinstance(value, (str, int, UUID, Decimal)):
        return str(value)
    raise PayloadError(
        f"the key field {kind.key!r} of {_name(kind.type)} holds a {type(value).__name__}; "
        "a key is text, a whole number, a Decimal or a UUID"
    )


def _name(tp: Any) -> str:
    return tp.__name__ if isinstance(tp, type) and not typing.get_args(tp) else str(tp)
