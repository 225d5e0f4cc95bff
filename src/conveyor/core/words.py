"""How counts and progress are said, and texts that every store can keep."""

from __future__ import annotations

import re
from typing import Final

_UNKEPT: Final = re.compile("[\0\ud800-\udfff]")
"""NUL, which PostgreSQL and AMQP's readers in C do not take, and lone surrogates, which no encoding has; a name of a file that is not
UTF-8 has them in Python."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """A count with its noun: 1 message, 1,200 messages.

    Parameters:
        one: the noun in the singular.
        many: its plural; left out, an s is added.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def far(done: float | None, total: float | None, note: str) -> str:
    """Progress in words: 3 of 4, the third step; "" where there is none."""
    if done is None:
        return ""
    amount = _amount(done) if total is None else f"{_amount(done)} of {_amount(total)}"
    return f"{amount}, {note}" if note else amount


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number.is_integer() and abs(number) < 1e15 else f"{number:g}"


def keepable(text: str) -> str:
    """The text as every store can keep it: what has no place in UTF-8, and NUL, is written as an escape."""
    if text.isascii() and "\0" not in text:
        return text
    return _UNKEPT.sub(lambda found: f"\\x{ord(found[0]):02x}" if found[0] == "\0" else f"\\u{ord(found[0]):04x}", text)


def is_keepable(text: str) -> bool:
    """Whether every store can keep the text as it is."""
    return _UNKEPT.search(text) is None
