"""The Lua scripts: each is one atomic step, sent by its digest."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from typing import Final


@dataclass(frozen=True, slots=True)
class Script:
    """A script as the server knows it.

    Parameters:
        digest: SHA-1 of the text; names it in EVALSHA.
    """

    text: str
    digest: str


_FOLDER: Final = resources.files("conveyor.brokers.redis") / "lua"
_REST: Final = "-- The rest of queue.lua that is needed:\n"
"""Stands in a script that is often over before: what is used only below it is defined only there."""
_NO_CODE: Final = re.compile(r"--.*|'[^']*'")
_WORD: Final = re.compile(r"\w+")
_DEFINITION: Final = re.compile(r"^local (?:function )?(\w+(?:, \w+)*)", re.MULTILINE)


def _definitions() -> list[tuple[frozenset[str], str]]:
    """What queue.lua defines, in order: the names, and the text."""
    text = (_FOLDER / "queue.lua").read_text()
    found = list(_DEFINITION.finditer(text))
    ends = [*(each.start() for each in found[1:]), len(text)]
    return [(frozenset(each[1].split(", ")), text[each.start() : end]) for each, end in zip(found, ends, strict=True)]


_COMMON: Final = _definitions()


def script_of(text: str) -> Script:
    """A script with what it uses of queue.lua, and nothing more: the server defines all of that anew each time it runs it."""
    missing = list(_COMMON)
    parts = []
    for part in text.split(_REST):
        for definition in reversed(missing.copy()):
            names, defining = definition
            if not names.isdisjoint(_WORD.findall(_NO_CODE.sub("", part))):
                part = defining + part  # noqa: PLW2901
                missing.remove(definition)
        parts.append(part)
    text = _REST.join(parts)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _load(name: str) -> Script:
    return script_of((_FOLDER / f"{name}.lua").read_text())


ATTEND: Final = _load("attend")
BEAT: Final = _load("beat")
BURY: Final = _load("bury")
CLAIM: Final = _load("claim")
DECLARE: Final = _load("declare")
EXTEND: Final = _load("extend")
GIVE_BACK: Final = _load("give_back")
LEAVE: Final = _load("leave")
PUBLISH: Final = _load("publish")
PURGE: Final = _load("purge")
QUEUES: Final = _load("queues")
REDRIVE: Final = _load("redrive")
REMOVE: Final = _load("remove")
SETTLE: Final = _load("settle")
VOID: Final = _load("void")

ALL: Final = (
    *(ATTEND, BEAT, BURY, CLAIM, DECLARE, EXTEND, GIVE_BACK, LEAVE, PUBLISH, PURGE, QUEUES, REDRIVE, REMOVE, SETTLE),
    VOID,
)
