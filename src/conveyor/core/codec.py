"""Payloads to bytes and back: fast, strict, and with errors that say what is wrong and where."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import pathlib
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import msgspec

from conveyor.core.events import is_pydantic_model
from conveyor.core.message import JSON
from conveyor.errors import HandlerError, PayloadError

BYTES: Final = "application/octet-stream"
LONGEST_EXPLANATION: Final = 500
"""Characters: enough for a field and a reason, too few to carry a payload into a log."""
_BACKSLASH: Final = ord("\\")
_MAY_HOLD_FLOATS: Final = (msgspec.inspect.FloatType, msgspec.inspect.AnyType, msgspec.inspect.CustomType)
_LONGEST_VALUE: Final = 60
_NAMED_ERRORS: Final = 3
_DEEPEST_BLAME: Final = 20


@dataclass(frozen=True, slots=True)
class Codec:
    """How payloads of one type become bytes and come back.

    Parameters:
        type: the payload's type.
        content_type: the media type of the bytes.
        decode: bytes to payload, at full speed. Whatever it raises means that the bytes are no such payload;
            explain() puts it in words.
        encode: payload to bytes that decode() is sure to accept. Raises PayloadError, naming the field.
    """

    type: Any
    content_type: str
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]

    def explain(self, error: BaseException) -> str:
        """A decode error as a sentence: what is wrong, and where. Bounded, and without the payload."""
        return explain(error)


def codec_for(tp: Any) -> Codec:
    """The codec of a payload type, made once.

    Known are dataclasses, msgspec Structs, pydantic models, TypedDicts and dict as JSON, and whatever these hold:
    Decimal, datetime, date, time, timedelta, UUID, Enum, Path, bytes (base64), lists, sets, tuples, unions, Literals.
    bytes travel as they are. Fields that a type does not know are ignored, so that publishers can add some.

    Raises:
        HandlerError: a type that cannot travel; names the field and says what to do.
    """
    try:
        return _codecs(tp)
    except TypeError:  # an annotation that cannot be hashed, such as Annotated[int, {}]
        return _make_codec(tp)


def result_codec_for(tp: Any) -> Codec:
    """The codec of what a job returns: always JSON, also where the whole of it is bytes (base64); object says no more than Any.

    Raises:
        HandlerError: a type that has no form in JSON; names the field and says what to do.
    """
    return _json_codec(bytes) if tp is bytes else codec_for(Any if tp is object else tp)


def _make_codec(tp: Any) -> Codec:
    if tp is bytes:
        return Codec(bytes, BYTES, bytes, _encode_bytes)
    if is_pydantic_model(tp) or _is_pydantic_dataclass(tp):
        return _pydantic_codec(tp)
    return _json_codec(tp)


_codecs: Final = functools.cache(_make_codec)


def struct_for(name: str, fields: Sequence[tuple[str, Any] | tuple[str, Any, Any]]) -> type[msgspec.Struct]:
    """A payload type made of parameters, for a job.

    Parameters:
        name: the type's name, shown in errors.
        fields: (name, type) or (name, type, default); a default of inspect.Parameter.empty is none.
    """
    made: list[Any] = []
    for field, tp, *default in fields:
        if not default or default[0] is inspect.Parameter.empty:
            made.append((field, tp))
        elif isinstance(default[0], (list, dict, set, bytearray)):
            made.append((field, tp, msgspec.field(default_factory=functools.partial(copy.deepcopy, default[0]))))
        else:
            made.append((field, tp, default[0]))
    return msgspec.defstruct(name, made, frozen=True, kw_only=True)


def explain(error: BaseException) -> str:
    """An encode or decode error as a sentence: what is wrong, and where. Bounded, and without the payload."""
    try:
        text = _explained(error)
    except Exception as broken:  # an error of the user's own whose text cannot be had
        text = f"{type(error).__name__} (its text cannot be had: {type(broken).__name__})"
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= LONGEST_EXPLANATION else text[: LONGEST_EXPLANATION - 1] + "…"


# --- JSON by msgspec ------------------------------------------------------------------------------------------------


def _json_codec(tp: Any) -> Codec:
    try:
        decoder = msgspec.json.Decoder(tp, strict=True, dec_hook=_from_json)
        info = msgspec.inspect.type_info(tp)
    except (TypeError, NameError, ValueError, RecursionError) as error:
        raise _unusable(tp, error) from error
    kinds = set()
    for where, kind in _parts(info):
        if isinstance(kind, msgspec.inspect.CustomType) and not _has_hook(kind.cls):
            raise HandlerError(
                f"{_name(tp)} cannot be a payload: {where} is a {_name(kind.cls)}, which has no form in JSON; "
                "give it a type such as str, or leave it out and look it up in the handler"
            )
        kinds.add(type(kind))
    decode = decoder.decode
    if msgspec.inspect.DecimalType in kinds:
        decode = functools.partial(_decode_finite, decode)
    may_hold_floats = not kinds.isdisjoint(_MAY_HOLD_FLOATS)
    to_json = msgspec.json.Encoder(enc_hook=_to_json).encode

    def encode(payload: Any) -> bytes:
        try:
            body = to_json(payload)
            if may_hold_floats and b"null" in body:  # which is what NaN and infinity become
                _refuse_non_finite(payload)
            decode(body)
        except Exception as error:
            raise _unpublishable(tp, payload, error) from error
        return body

    return Codec(tp, JSON, decode, encode)


def _to_json(value: Any) -> Any:
    """What msgspec does not know by itself, made something that it does."""
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if is_pydantic_model(type(value)):
        return msgspec.Raw(value.model_dump_json(by_alias=True, round_trip=True, warnings="error").encode())
    raise PayloadError(f"the type {_name(type(value))} has no form in JSON")


def _from_json(tp: Any, value: Any) -> Any:
    """The other way round, for the types that _has_hook() names; msgspec adds the place to a ValueError."""
    if is_pydantic_model(tp):
        try:
            return tp.model_validate_json(msgspec.json.encode(value), strict=True)
        except ValueError as error:  # pydantic's own text repeats the payload
            raise ValueError(_explained_pydantic(error, "")) from error
    if isinstance(value, str):
        return tp(value)
    raise ValueError(f"Expected `str`, got `{_json_name(value)}`")


def _has_hook(tp: Any) -> bool:
    return isinstance(tp, type) and (issubclass(tp, pathlib.PurePath) or is_pydantic_model(tp))


def _json_name(value: Any) -> str:
    names = {dict: "object", list: "array", bool: "bool", int: "int", float: "float", type(None): "null"}
    return names.get(type(value), "something else")


def _decode_finite(decode: Callable[[bytes], Any], body: bytes) -> Any:
    """Not every Decimal: msgspec takes the text "NaN" for a Decimal; no sum that contains one can be trusted."""
    payload = decode(body)
    small = body.lower()
    if small.find(b"nan") >= 0 or small.find(b"inf") >= 0 or _BACKSLASH in small:  # find() takes half the time of in
        _refuse_non_finite(payload)
    return payload


# --- JSON by pydantic -----------------------------------------------------------------------------------------------


def _pydantic_codec(tp: Any) -> Codec:
    import pydantic  # it is there, because tp is made with it

    try:
        adapter = pydantic.TypeAdapter(tp)
        adapter.rebuild(raise_errors=True)
    except (pydantic.errors.PydanticUserError, TypeError, NameError) as error:
        raise _unusable(tp, error) from error
    decode = functools.partial(adapter.validate_json, strict=True)

    def encode(payload: Any) -> bytes:
        try:
            body = adapter.dump_json(payload, by_alias=True, round_trip=True, warnings="error")
            if b"null" in body:
                _refuse_non_finite(payload)
            decode(body)
        except Exception as error:
            raise _unpublishable(tp, payload, error) from error
        return body

    return Codec(tp, JSON, decode, encode)


def _is_pydantic_dataclass(tp: Any) -> bool:
    return "pydantic" in sys.modules and dataclasses.is_dataclass(tp) and hasattr(tp, "__pydantic_validator__")


# --- bytes ----------------------------------------------------------------------------------------------------------


def _encode_bytes(payload: Any) -> bytes:
    if not isinstance(payload, (bytes, bytearray, memoryview)):
        raise PayloadError(f"expected bytes, got {_name(type(payload))}")
    return bytes(payload)


# --- types that cannot travel ---------------------------------------------------------------------------------------


def _parts(info: msgspec.inspect.Type) -> Iterator[tuple[str, msgspec.inspect.Type]]:
    """Every type inside a type, with the words that name its place."""
    seen: set[int] = set()
    waiting = [("it", info)]
    while waiting:
        where, kind = waiting.pop()
        if id(kind) in seen:
            continue
        seen.add(id(kind))
        yield where, kind
        waiting.extend((_place(where, field.name), field.type) for field in getattr(kind, "fields", ()))
        inner = [getattr(kind, name, None) for name in ("type", "item_type", "key_type", "value_type")]
        inner += [*getattr(kind, "types", ()), *getattr(kind, "item_types", ())]
        waiting.extend((where, part) for part in inner if isinstance(part, msgspec.inspect.Type))


def _place(where: str, field: str) -> str:
    return f"its field {field!r}" if where == "it" else f"{where[:-1]}.{field}'"


def _unusable(tp: Any, error: Exception) -> HandlerError:
    """Why a type cannot be a payload, with the field at fault where it can be told."""
    if isinstance(error, NameError):
        return HandlerError(
            f"{_name(tp)} cannot be a payload: its annotation {error.name!r} names nothing that can be found; "
            "define or import it at the top of the module"
        )
    for field, annotation in _annotations(tp):
        try:
            msgspec.json.Decoder(annotation, dec_hook=_from_json)
        except Exception as inner:  # whatever it is, it names the field at fault
            return HandlerError(f"{_name(tp)} cannot be a payload: its field {field!r}: {_bounded(str(inner))}")
    return HandlerError(f"{_name(tp)} cannot be a payload: {_bounded(str(error))}")


def _annotations(tp: Any) -> list[tuple[str, Any]]:
    try:
        return list(typing.get_type_hints(tp, include_extras=True).items())
    except Exception:  # it only helps to name a field; the error itself is told anyway
        return []


# --- payloads that cannot travel ------------------------------------------------------------------------------------


def _unpublishable(tp: Any, payload: Any, error: Exception) -> PayloadError:
    said = explain(error)
    where = "" if said.startswith("at `") else _blame(payload)
    return PayloadError(f"{_name(tp)} cannot be encoded: {where and f'at `{where}`: '}{said}")


def _blame(payload: Any) -> str:
    """The place of the first value that cannot be encoded, as in $.lines[0].price; empty where none can be named."""
    path = "$"
    for _ in range(_DEEPEST_BLAME):
        for step, value in _children(payload):
            try:
                msgspec.json.encode(value, enc_hook=_to_json)
            except Exception:  # this is the one that is looked for
                path, payload = path + step, value
                break
        else:
            break
    return "" if path == "$" else _bounded(path)


def _refuse_non_finite(payload: Any) -> None:
    waiting = [("$", payload)]
    while waiting:
        path, value = waiting.pop()
        wrong = (
            not value.is_finite()
            if isinstance(value, Decimal)
            else isinstance(value, float) and not math.isfinite(value)
        )
        if wrong:
            raise PayloadError(f"at `{_bounded(path)}`: {value} is no number; JSON has neither NaN nor infinity")
        waiting.extend((path + step, child) for step, child in _children(value))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f".{key}", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value))
    elif isinstance(value, msgspec.Struct):
        yield from ((f".{name}", getattr(value, name, None)) for name in value.__struct_fields__)
    elif is_pydantic_model(type(value)):
        yield from ((f".{name}", getattr(value, name, None)) for name in type(value).model_fields)


# --- words ----------------------------------------------------------------------------------------------------------

_PLACE: Final = re.compile(r"(?P<what>.*) - at (?P<key>`key` in )?`\$(?P<path>.*)`", re.DOTALL)
_QUOTED: Final = re.compile(rf"'[^']{{{_LONGEST_VALUE},}}'")


def _explained(error: BaseException) -> str:
    if isinstance(error, PayloadError):
        return str(error)
    if isinstance(error, msgspec.ValidationError):
        text = _QUOTED.sub("'…'", str(error))
        found = _PLACE.fullmatch(text)
        if not found:
            return text
        return f"at `${_bounded(found['path'])}`{' (a key)' if found['key'] else ''}: {found['what']}"
    if isinstance(error, msgspec.DecodeError):
        said = str(error)
        return "no JSON: it is empty or ends too early" if "truncated" in said else f"no JSON: {said}"
    if isinstance(error, UnicodeDecodeError):
        return f"no UTF-8: {error.reason} at byte {error.start} of a text"
    if isinstance(error, UnicodeEncodeError):
        return f"a text that is no Unicode: {error.reason} (character {error.start})"
    if isinstance(error, RecursionError):
        return "nested too deep"
    if type(error).__module__.startswith("pydantic") and hasattr(error, "errors"):
        return _explained_pydantic(error)
    return f"{type(error).__name__}: {_bounded(str(error), LONGEST_EXPLANATION)}"


def _explained_pydantic(error: Any, root: str = "$") -> str:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    said = []
    for one in found[:_NAMED_ERRORS]:
        path = root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in one["loc"])
        said.append(f"at `{_bounded(path)}`: {one['msg']}" if one["loc"] else one["msg"])
    more = f"; and {len(found) - _NAMED_ERRORS} more" if len(found) > _NAMED_ERRORS else ""
    return "; ".join(said) + more


def _bounded(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _name(tp: Any) -> str:
    return tp.__name__ if isinstance(tp, type) and not typing.get_args(tp) else str(tp)
