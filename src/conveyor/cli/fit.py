"""Whether what one type publishes can be received as another: compared as JSON Schemas, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from conveyor.core.events import is_pydantic_model

DEEPEST: Final = 10
"""Levels that are compared; types that refer to themselves go on for ever."""


def misfit(published: Any, received: Any) -> str | None:
    """Why payloads of the one type are (sometimes) refused where the other one is expected; None where they fit.

    It errs on the side of silence: only what surely cannot fit is told (missing fields, other kinds of JSON values).
    """
    if published is received:
        return None
    if bytes in (published, received):
        return "one is bytes, the other JSON"
    made, wanted = _schema(published, "serialization"), _schema(received, "validation")
    return None if made is None or wanted is None else _misfit(made, wanted, "", 0)


@dataclass(frozen=True, slots=True)
class _Schema:
    """A part of a JSON Schema, with the definitions that it may refer to."""

    body: Mapping[str, Any]
    definitions: Mapping[str, Any]

    def part(self, body: Mapping[str, Any]) -> _Schema:
        """A part of it, with references followed."""
        for _ in range(DEEPEST):
            reference = body.get("$ref")
            if not isinstance(reference, str):
                break
            body = self.definitions.get(reference.rpartition("/")[2], {})
        return _Schema(body, self.definitions)

    def kinds(self, depth: int = 0) -> frozenset[str]:
        """The kinds of JSON values that it lets in; empty where that cannot be told."""
        body = self.body
        if isinstance(kind := body.get("type"), str):
            return frozenset({kind})
        if isinstance(kind, list):
            return frozenset(kind)
        for choice in ("anyOf", "oneOf"):
            if choice in body and depth < DEEPEST:
                kinds = [self.part(option).kinds(depth + 1) for option in body[choice]]
                return frozenset[str]().union(*kinds) if all(kinds) else frozenset()
        if "const" in body:
            return frozenset({_kind_of(body["const"])})
        return frozenset(_kind_of(value) for value in body.get("enum", ()))


def _schema(tp: Any, mode: Literal["serialization", "validation"]) -> _Schema | None:
    try:
        if is_pydantic_model(tp):
            import pydantic  # optional: it is there, because tp is made with it

            body = pydantic.TypeAdapter(tp).json_schema(by_alias=True, mode=mode)
        else:
            body = msgspec.json.schema(tp, schema_hook=lambda _: {})
    except Exception:  # a type whose schema cannot be had is not compared
        return None
    return _Schema(body, body.get("$defs", {})).part(body)


def _misfit(made: _Schema, wanted: _Schema, path: str, depth: int) -> str | None:
    here, there = made.kinds(), wanted.kinds()
    if depth > DEEPEST or not here or not there:
        return None
    if not any(_same(a, b) for a in here for b in there):
        return f"{path or 'it'} is published as {_words(here)} and expected as {_words(there)}"
    if here == there == {"object"}:
        return _misfit_fields(made, wanted, path + "." if path else "", depth)
    items = made.body.get("items"), wanted.body.get("items")
    if here == there == {"array"} and isinstance(items[0], Mapping) and isinstance(items[1], Mapping):
        return _misfit(made.part(items[0]), wanted.part(items[1]), f"{path}[…]", depth + 1)
    if "enum" in made.body and "enum" in wanted.body:
        unknown = [value for value in made.body["enum"] if value not in wanted.body["enum"]]
        return f"{path or 'it'} may be {unknown[0]!r}, which is not expected" if unknown else None
    return None


def _misfit_fields(made: _Schema, wanted: _Schema, prefix: str, depth: int) -> str | None:
    has, takes = made.body.get("properties"), wanted.body.get("properties")
    if has is None or takes is None:
        return None
    for name in wanted.body.get("required", ()):
        if name not in has:
            return f"{prefix}{name} is expected and never published"
    for name, field in takes.items():
        if name in has and (found := _misfit(made.part(has[name]), wanted.part(field), prefix + name, depth + 1)):
            return found
    return None


def _kind_of(value: object) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}
    return names.get(type(value), "object")


def _same(published: str, received: str) -> bool:
    return published == received or {published, received} == {"integer", "number"}


def _words(kinds: frozenset[str]) -> str:
    return " or ".join(sorted(kinds))
