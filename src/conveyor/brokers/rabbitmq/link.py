"""A connection that comes back by itself, and what the server's own words mean to Conveyor."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Generic, ParamSpec, TypeVar

from conveyor.brokers.rabbitmq.address import Options
from conveyor.brokers.rabbitmq.amqp import (
    AmqpError,
    ChannelClosed,
    Connection,
    ConnectionClosed,
    ConnectionFailed,
    connect,
)
from conveyor.errors import BrokerError, BrokerUnavailable

log: Final = logging.getLogger("conveyor.rabbitmq")

FIRST_WAIT_SECONDS: Final = 0.1
LONGEST_WAIT_SECONDS: Final = 5.0
"""Between two tries to connect."""
LIVED_SECONDS: Final = 1.0
"""A connection that was lost sooner was of no use: the next one waits, as after a try that failed."""
PATIENCE_SECONDS: Final = 5.0
"""How long a call waits for a connection that is away before it says so."""
CONNECT_SECONDS: Final = 10.0
ACCESS_REFUSED: Final = 403
NOT_ALLOWED: Final = 530

Session = TypeVar("Session")
P = ParamSpec("P")
T = TypeVar("T")


class Link(Generic[Session]):
    """One connection, made anew whenever it was lost and somebody asks for it.

    Parameters:
        options: where to, and as whom.
        name: shown by the server's own tools.
        begin: makes what the callers need (a channel, …) of a new connection.
        heartbeat_seconds: gives the interval to ask for.
    """

    def __init__(
        self,
        options: Options,
        name: str,
        begin: Callable[[Connection], Awaitable[Session]],
        heartbeat_seconds: Callable[[], float],
    ) -> None:
        self._options = options
        self._name = name
        self._begin = begin
        self._heartbeat_seconds = heartbeat_seconds
        self._connecting: asyncio.Task[Session] | None = None
        self._open = False
        self._wait = FIRST_WAIT_SECONDS
        self._connected = float("-inf")
        self._error: Exception | None = None
        self.connection: Connection | None = None
        self._session: Session | None = None

    async def open(self) -> None:
        """Connect for the first time.

        Raises:
            BrokerUnavailable: no server lets us in; says what each of them said.
        """
        self._open = True
        try:
            self._session = await self._connect()
        except (AmqpError, OSError) as error:
            self._open = False
            raise BrokerUnavailable(self._complaint(error)) from error

    async def session(self) -> Session:
        """What begin made of the living connection; waits a little where it is away.

        Raises:
            BrokerUnavailable: it stays away, or the link is closed.
        """
        if self._session is not None and self.connection is not None and not self.connection.closed.done():
            return self._session
        if not self._open:
            raise BrokerUnavailable("the RabbitMQ broker is not open")
        if self._connecting is None:
            if self.connection is not None and self.connection.closed.done():
                log.warning("%s: %s", self._name, self.connection.closed.result())
            self._connecting = asyncio.create_task(self._return(), name=f"{self._name}: connecting")
        connecting = self._connecting
        await asyncio.wait([connecting], timeout=PATIENCE_SECONDS)
        if connecting.done() and not connecting.cancelled():
            return connecting.result()
        raise BrokerUnavailable(self._complaint(self._error))

    async def again(self, session: Session) -> None:
        """This session is of no use any more: its channel was closed. Begin another one."""
        if self._session is session and self.connection is not None:
            log.warning("%s: a channel was closed; beginning anew", self._name)
            await self.leave()

    async def leave(self) -> None:
        """End the connection; who asks for one gets another."""
        if (connection := self.connection) is not None:
            self.connection = self._session = None
            await connection.close()

    def give_up(self, why: str) -> None:
        """Cut the connection, where there is one, without taking leave of a server that does not listen."""
        if self.connection is not None:
            self.connection.give_up(why)

    async def close(self) -> None:
        """Take leave."""
        self._open = False
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
            await asyncio.wait([connecting])
        connection, self.connection, self._session = self.connection, None, None
        if connection is not None:
            await connection.close()

    async def _return(self) -> Session:
        try:
            return await self._come_back()
        finally:  # however it ended: the next call tries again
            if self._connecting is asyncio.current_task():
                self._connecting = None

    async def _come_back(self) -> Session:
        tries = 0
        if asyncio.get_running_loop().time() - self._connected < LIVED_SECONDS:
            await self._pause()
        else:
            self._wait = FIRST_WAIT_SECONDS
        while True:
            try:
                self._session = session = await self._connect()
            except (AmqpError, OSError, BrokerError) as error:
                self._error = error
                tries += 1
                log.log(logging.WARNING if tries == 1 else logging.DEBUG, "%s; trying on", self._complaint(error))
                await self._pause()
            else:
                log.info("connected to RabbitMQ again (%s)", self._name)
                return session

    async def _pause(self) -> None:
        """Longer each time, until a connection has lived."""
        wait, self._wait = self._wait, min(self._wait * 2, LONGEST_WAIT_SECONDS)
        await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    async def _connect(self) -> Session:
        connection = await connect(
            self._options.addresses,
            name=self._name,
            heartbeat_seconds=self._heartbeat_seconds(),
            timeout_seconds=CONNECT_SECONDS,
        )
        try:
            session = await self._begin(connection)
        except BaseException:
            await connection.close()
            raise
        self.connection = connection
        self._connected = asyncio.get_running_loop().time()
        return session

    def _complaint(self, error: Exception | None) -> str:
        where = ", ".join(map(str, self._options.addresses))
        reason: Exception | None = error
        if isinstance(error, ConnectionFailed) and len(error.reasons) == 1:
            reason = error.reasons[0][1]
        if isinstance(reason, ConnectionClosed | ChannelClosed) and reason.code in {ACCESS_REFUSED, NOT_ALLOWED}:
            return f"RabbitMQ at {where} is there, and refuses: {said(reason)}"
        return (
            f"cannot reach RabbitMQ at {where}: {reason or 'no answer yet; is it the AMQP port of a RabbitMQ server?'}"
        )


def at_the_seam(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A method of the seam: what AMQP calls its errors does not get out of it."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except ChannelClosed as error:
            raise BrokerError(f"RabbitMQ refuses: {said(error)}") from error
        except AmqpError as error:
            raise BrokerUnavailable(f"the connection to RabbitMQ was lost: {error}") from error

    return call


def said(error: BaseException) -> str:
    """What the server said; of a missing permission, also that it is one."""
    reason = error if isinstance(error, ChannelClosed) else error.__cause__
    if isinstance(reason, ChannelClosed) and reason.code == ACCESS_REFUSED:
        return f"{error} – a permission is missing (rabbitmqctl set_permissions: configure, write, read)"
    return str(error)
