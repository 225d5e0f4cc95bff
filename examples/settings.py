"""The settings of an example: a frozen Struct, each field of which is an environment variable and a flag."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

S = TypeVar("S", bound=msgspec.Struct)

OFF: Final = ("", "0", "false", "no", "off")


class Known(NamedTuple):
    """What is known about one setting."""

    variable: str
    what: str
    default: Any
    secret: bool


class SettingError(ValueError):
    """A setting that makes no sense; says which one and what it may be."""


def setting(what: str, *, variable: str | None = None, secret: bool = False, **limits: Any) -> msgspec.Meta:
    """What is known about a field beside its type, for use in Annotated.

    Parameters:
        variable: its environment variable; left out, the field's name in capitals.
        secret: it is no flag, because everybody can read a command line.
        limits: as msgspec.Meta has them.
    """
    return msgspec.Meta(description=what, extra={"variable": variable, "secret": secret}, **limits)


def from_environment(kind: type[S], environment: Mapping[str, str] = os.environ) -> S:
    """The settings in environment variables; an empty one is not set.

    Raises:
        SettingError: a value makes no sense.
    """
    values = {}
    for name, known in _known(kind).items():
        if text := environment.get(known.variable, "").strip():
            values[name] = read(kind, name, text, said=known.variable)
    return kind(**values)


def read(kind: type[S], name: str, text: str, *, said: str) -> Any:
    """The value that a text means for a field; said names where it was found."""
    field = next(field for field in msgspec.structs.fields(kind) if field.name == name)
    if isinstance(field.default, bool):
        return text.lower() not in OFF
    try:
        return msgspec.convert(text, field.type, strict=False)
    except msgspec.ValidationError as error:
        raise SettingError(f"{said} cannot be {text!r}: {error}") from error


def parser(kind: type[S], prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A flag for every setting, with its environment variable beside it."""
    secret = [f"  ${known.variable}  {known.what}" for known in _known(kind).values() if known.secret]
    found = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="\n".join(["only in the environment:", *secret, "", epilog]) if secret else epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(found, kind)
    return found


def add_flags(flags: argparse.ArgumentParser, kind: type[msgspec.Struct]) -> None:
    """Add a flag for every setting that is no secret, with its environment variable beside it."""
    for name, known in _known(kind).items():
        if known.secret:
            continue
        tail = "" if known.default in ("", False) else f"; default {known.default}"
        flag, what = "--" + name.replace("_", "-"), f"{known.what} (${known.variable}{tail})".replace("%", "%%")
        if isinstance(known.default, bool):
            flags.add_argument(flag, action="store_const", const="1", help=what)
        else:
            flags.add_argument(flag, metavar=name.split("_")[-1].upper(), help=what)


def from_flags(kind: type[S], flags: argparse.ArgumentParser, arguments: Sequence[str] | None) -> S:
    """The settings in flags, else in the environment; they go into the environment, where the processes started from here look.

    Raises:
        SettingError: a value makes no sense.
    """
    return from_parsed(kind, flags.parse_args(arguments))


def from_parsed(kind: type[S], flags: argparse.Namespace) -> S:
    """from_flags() for a command line that was parsed already.

    Raises:
        SettingError: a value makes no sense.
    """
    given = vars(flags)
    for name, known in _known(kind).items():
        if (text := given.get(name)) is not None:
            read(kind, name, text, said="--" + name.replace("_", "-"))
            os.environ[known.variable] = text
    return from_environment(kind)


def _known(kind: type[msgspec.Struct]) -> dict[str, Known]:
    found = {}
    for field in msgspec.structs.fields(kind):
        meta = next(each for each in field.type.__metadata__ if isinstance(each, msgspec.Meta))
        extra = meta.extra or {}
        variable = extra.get("variable") or field.name.upper()
        found[field.name] = Known(variable, meta.description or "", field.default, bool(extra.get("secret")))
    return found
