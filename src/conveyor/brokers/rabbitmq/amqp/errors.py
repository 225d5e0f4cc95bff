"""What the AMQP client raises: about a server, a connection, a channel or a message."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq.amqp.connection import Address
    from conveyor.brokers.rabbitmq.amqp.frames import Incoming

NO_CODE: Final = 0
"""The code of a close that the server gave no code for: the socket went away, or the server fell silent."""


class AmqpError(Exception):
    """Anything that this client raises about a server or a message."""


class Malformed(AmqpError):
    """Bytes that break the protocol: the properties of a message, or a frame."""


class ConnectionFailed(AmqpError):
    """No host let this client in.

    Parameters:
        reasons: every address that was tried, and what it answered.
    """

    def __init__(self, reasons: Sequence[tuple[Address, Exception]]) -> None:
        super().__init__("; ".join(f"{address}: {words(error)}" for address, error in reasons))
        self.reasons = tuple(reasons)


class Closed(AmqpError):
    """What a close carries.

    Parameters:
        code: the AMQP reply code; 0 where there is none.
        text: the words of the server, or of this client where the server said nothing.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}" if code else text)
        self.code = code
        self.text = text


class ConnectionClosed(Closed):
    """The connection is gone, and all its channels with it."""


class ChannelClosed(Closed):
    """The channel is gone; its connection still works."""


class Returned(AmqpError):
    """A mandatory publish that the server took but could route to no queue.

    Parameters:
        code: the AMQP reply code, 312 for no route.
        text: the server's words.
        message: the message as it came back.
    """

    def __init__(self, code: int, text: str, message: Incoming) -> None:
        super().__init__(f"{code} {text} (exchange {message.exchange!r}, routing key {message.routing_key!r})")
        self.code = code
        self.text = text
        self.message = message


class Nacked(AmqpError):
    """The server could not take the publish: a full queue that rejects, or an error within the server."""


class OutcomeUnknown(AmqpError):
    """The connection or channel went before the confirm came: the server may or may not have the message."""


def words(error: Exception) -> str:
    """What an error says, or its name if it says nothing."""
    return str(error) or type(error).__name__


def again(reason: AmqpError) -> AmqpError:
    """The same reason as another exception, since one that is raised in many places gathers all their tracebacks."""
    return type(reason)(*((reason.code, reason.text) if isinstance(reason, Closed) else reason.args))


def fail(future: asyncio.Future[Any], error: AmqpError) -> None:
    """Break a promise, unless it has been kept or given up."""
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever gave it up meanwhile is not told by the event loop at exit
