"""How counts are said."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """A count with its noun: 1 message, 1,200 messages.

    Parameters:
        one: the noun in the singular.
        many: its plural; left out, an s is added.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"
