"""Headers that go on: from the message being handled to what its handler publishes, calls and logs."""

from __future__ import annotations

import logging
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from urllib.parse import quote

import msgspec

from conveyor.core.message import NO_HEADERS, Message
from conveyor.runtime.logs import current

log = logging.getLogger("conveyor.carry")

_PLAIN: Final = re.compile(r"[!-~]+(?: +[!-~]+)*")
_AS_IT_IS: Final = string.punctuation.replace("%", "").replace('"', "")


class Carry(msgspec.Struct, frozen=True):
    """A header that goes on.

    Parameters:
        header: its name; of a message that arrives, in any case.
        field: what its value is called in log lines; None leaves it out of them.
        make: gives the value where a message comes without one; None carries nothing then.
    """

    header: str
    field: str | None = None
    make: Callable[[Message], str] | None = None

    def value(self, message: Message) -> str | None:
        """What is carried on from a message."""
        wanted = self.header.lower()
        for name, value in message.headers.items():
            if name.lower() == wanted:
                return value
        if self.make is None:
            return None
        try:
            return self.make(message)
        except Exception:  # the application's own, at a message of anybody's making
            log.exception("no %s could be made up for the message %s", self.header, message.id)
            return None


def carried_on(carries: Sequence[Carry], message: Message) -> tuple[dict[str, str], dict[str, str]]:
    """What goes on from a message: the headers, and the fields of log lines."""
    headers: dict[str, str] = {}
    fields: dict[str, str] = {}
    for carry in carries:
        value = carry.value(message)
        if value:
            headers[carry.header] = value
            if carry.field is not None:
                fields[carry.field] = value
    return headers, fields


def carried_now() -> Mapping[str, str]:
    """The headers that the message being handled carries on, as they are; empty outside of a handler."""
    about = current.get()
    return NO_HEADERS if about is None or about.carried is None else about.carried


def carried() -> Mapping[str, str]:
    """The headers that the message being handled carries on (``app.carry``), for calls to other services; empty outside of a handler.

    ``httpx.AsyncClient(event_hooks={"request": [add]})`` with ``async def add(request): request.headers.update(carried())``
    puts them on every request. Such a header holds printable ASCII only: of a value that has anything else, which another program may have
    sent, that is percent-encoded, as CloudEvents does it.
    """
    return {
        name: value if _PLAIN.fullmatch(value) else quote(value, _AS_IT_IS) for name, value in carried_now().items()
    }
