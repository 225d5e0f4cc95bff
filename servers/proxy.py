"""A TCP proxy before a server, for faults of the network: it delays, falls silent, cuts, refuses, and loses an answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Final, Self

CHUNK: Final = 64 * 1024


class Proxy:
    """Stands between a client and a server on loopback, in the event loop of the test.

    Parameters:
        target: the server's port.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.delay_seconds = 0.0
        """How long everything is on its way, in either direction."""
        self.accepted = 0
        """Connections that there ever were."""
        self._target: Final = target
        self._pairs: dict[asyncio.Task[None], _Pair] = {}
        self._refuses = False
        self._losing: tuple[bytes, asyncio.Event] | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._pairs, return_exceptions=True)

    @property
    def connections(self) -> int:
        """Those that clients hold open now."""
        return sum(not pair.client_left for pair in self._pairs.values())

    def cut(self) -> None:
        """End every connection at once, as a reset."""
        for task, pair in self._pairs.items():
            pair.abort()
            task.cancel()

    def refuse(self) -> None:
        """Cut every connection, and every new one, until accept()."""
        self._refuses = True
        self.cut()

    def accept(self) -> None:
        """Let connections through again."""
        self._refuses = False

    def fall_silent(self) -> None:
        """The connections of now carry nothing ever more, not even their end: they are half open. New ones work.

        The server keeps its side until it gives up by itself, or cut().
        """
        for pair in self._pairs.values():
            pair.silent = True

    def lose_answer_to(self, mark: bytes) -> asyncio.Event:
        """When a client has sent these bytes, the server gets them whole, and the connection is cut when it answers.

        Returns:
            Is set when it has happened; it happens once.
        """
        done = asyncio.Event()
        self._losing = (mark, done)
        return done

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.accepted += 1
        if self._refuses:
            writer.transport.abort()
            return
        try:
            there, to_server = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = self._pairs[task] = _Pair(writer, to_server)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._upwards(pair, reader))
                group.create_task(self._downwards(pair, there))
        except* (OSError, _Ended):
            pass
        except* asyncio.CancelledError:
            pass  # the proxy was told to cut, and asyncio.start_server() would log it
        finally:
            pair.abort()
            del self._pairs[task]

    async def _upwards(self, pair: _Pair, reader: asyncio.StreamReader) -> None:
        """From the client to the server."""
        seen = b""
        async for data in self._passing(reader, pair):
            if self._losing is not None:
                mark, done = self._losing
                seen = seen[-len(mark) :] + data
                if mark in seen:
                    pair.losing, self._losing = done, None
            pair.to_server.write(data)
            await pair.to_server.drain()
        pair.client_left = True
        if not pair.silent:
            raise _Ended

    async def _downwards(self, pair: _Pair, reader: asyncio.StreamReader) -> None:
        """From the server to the client."""
        async for data in self._passing(reader, pair):
            if pair.losing is not None:
                pair.losing.set()
                break
            pair.to_client.write(data)
            await pair.to_client.drain()
        if not pair.silent:
            raise _Ended

    async def _passing(self, reader: asyncio.StreamReader, pair: _Pair) -> AsyncIterator[bytes]:
        """What arrives and is to go on, until the end; a reset is one, too."""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(CHUNK):
                await asyncio.sleep(self.delay_seconds)
                if not pair.silent:
                    yield data


class _Ended(Exception):
    """One side has closed, or is to be cut: the other one goes with it."""


class _Pair:
    """The two connections that make one."""

    def __init__(self, to_client: asyncio.StreamWriter, to_server: asyncio.StreamWriter) -> None:
        self.to_client = to_client
        self.to_server = to_server
        self.silent = False
        self.client_left = False
        self.losing: asyncio.Event | None = None

    def abort(self) -> None:
        self.to_client.transport.abort()
        self.to_server.transport.abort()
