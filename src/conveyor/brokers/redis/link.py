"""One connection to a Redis server: commands are pipelined, and answers come in their order.

It speaks RESP2 over hiredis itself: a client object's locks, time-outs and tasks for every command would take longer than the
command, and a publisher's message would wait for them on its way to a waiting handler.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import re
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import hiredis

from conveyor.brokers.redis.scripts import Script
from conveyor.errors import BrokerError, BrokerFull, BrokerUnavailable

CONNECT_SECONDS: Final = 5.0
"""A server that has not answered the first commands by then is taken for unreachable."""
ANSWER_SECONDS: Final = 10.0
"""A server that has not answered by then is taken for gone, and the connection for half open."""
LONGEST_PAUSE_SECONDS: Final = 1.0
"""Between two tries to connect, at most. All callers share one try, so none waits for longer than this and CONNECT_SECONDS."""

_NOT_NOW: Final = re.compile(
    r"\b(READONLY|LOADING|MOVED|ASK|CLUSTERDOWN|MASTERDOWN|TRYAGAIN|BUSY|NOREPLICAS|UNBLOCKED|MISCONF|max number of clients)\b"
)
"""A script's errors carry the word of the command that failed at their front (Redis 7) or inside (6.2)."""
_ELSEWHERE: Final = re.compile(r"\b(READONLY|MOVED|MASTERDOWN|CLUSTERDOWN)\b")
"""Another server has the data now: a new connection may find it."""
_MOVED: Final = re.compile(r"\bMOVED \d+ (\S*):(\d+)")
_MORE: Final = object()
_NOT_THE_AUTHORITY: Final = frozenset({9, 10, 62, 64})
"""Why a certificate is refused (openssl-verify(1)), other than for who signed it: not valid yet, or any more, or for this host."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and how to get in."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    database: int = 0
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"Redis at {self.path or f'{self.host}:{self.port}'}"


class NoConnection(BrokerUnavailable):
    """Nothing was sent."""


class Closed(NoConnection):
    """It was ended for good."""


class NotNow(BrokerUnavailable):
    """The server's own answer to one command: it did nothing, and may do it later."""


class Refused(BrokerError):
    """The server's own answer to one command: an error."""


class ForgottenScript(Refused):
    """The server does not know a script (any more): it has to be sent whole."""


def translate(said: str) -> BrokerError:
    """What the server said, as Conveyor's callers know it."""
    if not said.startswith("NOQUEUE") and _NOT_NOW.search(said):  # the queue's name may be such a word
        return NotNow(f"Redis cannot do it now: {said}")
    if re.search(r"\bOOM\b", said):
        return BrokerFull(f"Redis has no memory left (maxmemory): {said}")
    return ForgottenScript(said) if said.startswith("NOSCRIPT") else Refused(said)


class _Wire(asyncio.Protocol):
    """The bytes: packs commands, and gives each answer to who waits for it."""

    def __init__(self, on_error: Callable[[str], None], on_lost: Callable[[_Wire, Exception | None], None]) -> None:
        self._on_error = on_error
        self._on_lost = on_lost
        self._reader = hiredis.Reader(replyError=translate, protocolError=BrokerUnavailable, notEnoughData=_MORE)
        self.pending: deque[tuple[asyncio.Future[Any], float]] = deque()
        self.transport: asyncio.Transport | None = None
        self.room = asyncio.Event()
        self.room.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (answer := self._reader.gets()) is not _MORE:
                future, _ = self.pending.popleft()
                if isinstance(answer, BrokerError):
                    if isinstance(answer, NotNow):
                        self._on_error(str(answer))
                    if not future.done():
                        future.set_exception(answer)
                        future.exception()  # so that nobody need have waited for it
                elif not future.done():
                    future.set_result(answer)
        except (BrokerUnavailable, IndexError):  # no RESP, or an answer that nobody asked for
            self.abort()

    def pause_writing(self) -> None:
        self.room.clear()

    def resume_writing(self) -> None:
        self.room.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.room.set()
        self._on_lost(self, error)

    def send(self, command: tuple[Any, ...], now: float) -> asyncio.Future[Any]:
        assert self.transport is not None
        packed = hiredis.pack_command(command)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.pending.append((answer, now))
        self.transport.write(packed)
        return answer

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Link:
    """A connection that is made when it is needed, and made anew when it was lost.

    Parameters:
        key: names our namespace to every script (KEYS[1]).
        greet: what is said first on every new connection; nobody else's commands are sent before it is over.
    """

    def __init__(self, address: Address, key: str, greet: Callable[[Link], Awaitable[None]] | None = None) -> None:
        self._address = address
        self._key = key
        self._greet = greet
        self._wire: _Wire | None = None
        self._greeted = False
        self._watch: asyncio.TimerHandle | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._failures = 0
        self._not_before = 0.0
        self._elsewhere: tuple[str, int] | None = None
        self._mute = False
        """The connection was given up, or not made, because the server said nothing."""
        self._closed = False

    @property
    def is_ready(self) -> bool:
        """There is a connection, as far as we know."""
        return self._greeted

    async def connect(self) -> None:
        """Make sure that there is a connection.

        Raises:
            BrokerUnavailable: there is none now.
            BrokerError: the server refuses us.
        """
        if self._greeted:
            return
        self._check_open()
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._try(), name=f"connecting to {self._address}")
            self._connecting.add_done_callback(self._tried)
        connecting = self._connecting
        await asyncio.wait([connecting])
        if connecting.cancelled():
            raise Closed("the broker is closed")
        if (error := connecting.exception()) is not None:
            raise _again(error)

    def _tried(self, connecting: asyncio.Task[None]) -> None:
        self._connecting = None
        if not connecting.cancelled():
            connecting.exception()  # its callers may be gone

    async def _try(self) -> None:
        """Connect once, not too soon after the last time."""
        loop = asyncio.get_running_loop()
        if (pause := self._not_before - loop.time()) > 0:
            await asyncio.sleep(pause)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                try:
                    await self._begin()
                except NotNow:
                    if self._elsewhere is None:
                        raise
                    self.drop("the keys are elsewhere in the cluster")
                    await self._begin()
        except BaseException as error:
            self._failures += 1
            longest = min(LONGEST_PAUSE_SECONDS, 0.05 * 2 ** min(self._failures, 10))
            self._not_before = loop.time() + longest * random.uniform(0.5, 1.0)
            said = f"no connection to {self._address}: {_why(error, self._address)}"
            self.drop(said)
            self._mute = isinstance(error, TimeoutError)
            if isinstance(error, Refused):
                raise BrokerError(said) from error
            if isinstance(error, BrokerUnavailable | OSError | TimeoutError):
                raise NoConnection(said) from error
            raise
        self._failures = 0
        self._mute = False

    def patience(self, seconds: float) -> float:
        """How much is left of a time for an answer, where the server has been silent for some of it already."""
        if not self._greeted:
            return 0.0 if self._mute else seconds
        if self._wire is None or not self._wire.pending:
            return seconds
        return max(0.0, self._wire.pending[0][1] + seconds - asyncio.get_running_loop().time())

    async def call(self, *command: Any) -> Any:
        """Send a command; its answer.

        Raises:
            BrokerUnavailable: there is no connection, or it was lost before the answer came.
            BrokerFull: the server has no memory left.
            Refused: the server's error.
        """
        if not self._greeted:
            await self.connect()
        if self._wire is not None and not self._wire.room.is_set():
            await self._wire.room.wait()
        return await self.send(*command)

    async def run(self, script: Script, *arguments: Any) -> Any:
        """Run a script in our namespace; its answer. Raises as call()."""
        if not self._greeted:
            await self.connect()
        if self._wire is not None and not self._wire.room.is_set():
            await self._wire.room.wait()
        return await self.run_now(script, *arguments)

    async def run_now(self, script: Script, *arguments: Any) -> Any:
        """As run(), on the connection that there is, also while it is being greeted."""
        try:
            return await self.send("EVALSHA", script.digest, 1, self._key, *arguments)
        except ForgottenScript:
            return await self.send("EVAL", script.text, 1, self._key, *arguments)

    def post(self, script: Script, *arguments: Any, whole: bool = False) -> asyncio.Future[Any]:
        """Have a script run behind all that was sent before; waits for nothing. Raises as call().

        Parameters:
            whole: send its text, which the server has forgotten.
        """
        if whole:
            return self.send("EVAL", script.text, 1, self._key, *arguments)
        return self.send("EVALSHA", script.digest, 1, self._key, *arguments)

    def send(self, *command: Any) -> asyncio.Future[Any]:
        """Send a command on the connection that there is; the answer comes later. Raises as call()."""
        if self._wire is None:
            raise NoConnection(f"there is no connection to {self._address}")
        loop = asyncio.get_running_loop()
        answer = self._wire.send(command, loop.time())
        if self._watch is None:
            self._watch = loop.call_later(ANSWER_SECONDS, self._look)
        return answer

    def drop(self, why: str) -> None:
        """Let go of the connection that there is; whoever waits for an answer hears why."""
        wire, self._wire, self._greeted = self._wire, None, False
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if wire is not None:
            wire.abort()
            for future, _ in wire.pending:
                if not future.done():
                    future.set_exception(BrokerUnavailable(why))
                    future.exception()  # so that nobody need have waited for it

    def close(self) -> None:
        """End it for good."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        self.drop("the broker is closed")

    async def _begin(self) -> None:
        self._check_open()
        here, loop = self._address, asyncio.get_running_loop()
        host, port = self._elsewhere or (here.host, here.port)
        self._elsewhere = None  # where nobody answers there, we ask again where we asked first

        def make() -> _Wire:
            return _Wire(self._has_error, self._was_lost)

        if here.path is not None:
            _, wire = await loop.create_unix_connection(make, here.path)
        else:
            name = shown_by(host, here.host) if here.tls is not None else None
            _, wire = await loop.create_connection(make, host, port, ssl=here.tls, server_hostname=name)
        self._wire = wire
        self._check_open()  # it may have been closed meanwhile
        if here.password is not None:
            await self.send("AUTH", *([here.user] if here.user is not None else []), here.password)
        if here.database:
            await self.send("SELECT", here.database)
        await self.send("EXISTS", self._key)  # a cluster says here where our keys are
        if self._greet is not None:
            await self._greet(self)
        self._greeted = self._wire is wire
        if not self._greeted:
            raise BrokerUnavailable("it was lost at once")

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the broker is closed")

    def _has_error(self, said: str) -> None:
        if _ELSEWHERE.search(said):
            moved = _MOVED.search(said)
            if moved is not None and moved[1]:
                self._elsewhere = moved[1], int(moved[2])
            asyncio.get_running_loop().call_soon(self._leave, self._wire, said)

    def _leave(self, wire: _Wire | None, said: str) -> None:
        if wire is self._wire:
            self.drop(said)

    def _was_lost(self, wire: _Wire, error: Exception | None) -> None:
        if wire is self._wire:
            self.drop(f"the connection to {self._address} was lost: {error or 'the server ended it'}")

    def _look(self) -> None:
        """Give the connection up where the oldest command has waited too long."""
        self._watch = None
        if self._wire is None or not self._wire.pending:
            return
        loop = asyncio.get_running_loop()
        left = self._wire.pending[0][1] + ANSWER_SECONDS - loop.time()
        if left > 0:
            self._watch = loop.call_later(left, self._look)
        else:
            self._mute = True
            self.drop(f"{self._address} has not answered for {ANSWER_SECONDS:g} s")


def shown_by(host: str, first: str) -> str:
    """The name that has to be in a node's certificate.

    Parameters:
        host: the node's, as the cluster calls it: its own name, or only its address, which a certificate of names does not have.
        first: the host that the URL names.
    """
    return first if _is_address(host) and not _is_address(first) else host


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _again(error: BaseException) -> BaseException:
    """One of its own for each caller: an exception that several tasks raise would gather the traces of all of them."""
    return type(error)(str(error)) if isinstance(error, BrokerError) else error


def _why(error: BaseException, address: Address) -> str:
    """What kept us from connecting, and what to look at where the error itself says little."""
    if isinstance(error, TimeoutError):
        said = f"no answer within {CONNECT_SECONDS:g} s"
        if address.tls is not None:
            return f"{said} to the beginning of TLS; does it speak TLS on this port (tls-port)? redis:// is without"
        return f"{said}; is it Redis that listens there, without TLS (rediss:// is with)?"
    if isinstance(error, ssl.SSLCertVerificationError):
        said = f"its certificate is refused: {error.verify_message.rstrip('.')}"
        if error.verify_code in _NOT_THE_AUTHORITY:
            return said
        return f"{said}; cafile= in the URL names the file with the certificate of the authority that signed it"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason or error}); does it speak TLS on this port (tls-port)? redis:// is without"
    if f" to {address}" in str(error):  # it ended while it greeted
        said = str(error).replace(f" to {address}", "")
        if address.tls is not None:  # since TLS 1.3 a client's certificate is looked at behind the handshake
            return f"{said}; does it ask for a certificate that it trusts (certfile= and keyfile= in the URL)?"
        return f"{said}; is it Redis that listens there, without TLS (rediss:// is with)?"
    return str(error) or type(error).__name__


def text(value: bytes) -> str:
    """What the server says, as text."""
    return value.decode("utf-8", "replace")
