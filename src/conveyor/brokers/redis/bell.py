"""Who waits for messages: one blocking read for all queues of a broker object, and no polling.

A waiting receiver reads, with the group "bell", from the stream of its queue's fresh messages and from the queue's bell, which
rings for the others. Of several receivers the server wakes one for each message, and never one that has gone: it knows who is
connected. What was read says only that there is something to claim.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Final

from conveyor.brokers.redis.link import Link, text
from conveyor.errors import BrokerError, BrokerUnavailable

BLOCK_SECONDS: Final = 4.0
"""How long the server holds a read for which there is nothing. Below the time after which a silent server is taken for gone."""

AGAIN_SECONDS: Final = 0.1
"""After a read that failed."""


class Bell:
    """Wakes this broker object's receivers.

    Parameters:
        link: the connection that waits; nobody else uses it.
        other: another one, over which the waiting one is told to listen to more.
        prefix: of all keys.
    """

    def __init__(self, link: Link, other: Link, prefix: str, owner: str) -> None:
        self._link = link
        self._other = other
        self._kick = f"{prefix}kick:{owner}"
        self._fresh = f"{prefix}queue:"
        self._bell = f"{prefix}bell:"
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._listening: frozenset[str] = frozenset()
        self._blocked = False
        self._wanted = asyncio.Event()
        self._kicks: set[asyncio.Future[object]] = set()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._listen(), name="redis bell")

    async def close(self) -> None:
        """End; nobody waits any more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._link.close()

    async def wait(self, queue: str, seconds: float) -> None:
        """Until there may be something to claim, and no longer than so many seconds."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(queue, deque()).append(woken)
        self._wanted.set()
        if self._blocked and queue not in self._listening:
            self._tell(self._kick)
        try:
            await asyncio.wait([woken], timeout=seconds)
        except asyncio.CancelledError:
            if woken.done():  # it was woken for a message in the same moment, and will not take it
                self._wake(queue)
            raise
        finally:
            there = self._waiting.get(queue)
            if there is not None:
                with contextlib.suppress(ValueError):
                    there.remove(woken)
                if not there:
                    del self._waiting[queue]

    async def _listen(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while self._waiting:
                self._listening = frozenset(self._waiting)
                streams = [self._kick]
                for queue in self._listening:
                    streams += (self._fresh + queue, self._bell + queue)
                try:
                    rung = await self._read(streams)
                except BrokerError:
                    # The server is gone, or one of the queues, or what we are told by: the receivers' claims show it.
                    self._wake_all()
                    await asyncio.sleep(AGAIN_SECONDS)
                    continue
                for stream in rung:
                    if stream != self._kick:
                        queue = stream.removeprefix(self._fresh)
                        self._wake(queue if queue != stream else stream.removeprefix(self._bell))

    async def _read(self, streams: list[str]) -> list[str]:
        """The streams that have something new."""
        await self._link.connect()
        self._blocked = True
        try:
            milliseconds = int(BLOCK_SECONDS * 1000)
            command = ("XREADGROUP", "GROUP", "bell", "all", "COUNT", 1, "BLOCK", milliseconds, "NOACK", "STREAMS")
            found = await self._link.call(*command, *streams, *(">" for _ in streams))
        finally:
            self._blocked = False
        return [text(stream) for stream, _ in found or ()]

    def _wake(self, queue: str) -> None:
        """Let the one that waits longest look; where nobody of ours waits, let another broker object's."""
        there = self._waiting.get(queue)
        while there:
            woken = there.popleft()
            if not woken.done():
                woken.set_result(None)
                return
        self._tell(self._bell + queue)

    def stir(self, queue: str) -> None:
        """Let all who wait for this queue look."""
        for woken in self._waiting.get(queue, ()):
            if not woken.done():
                woken.set_result(None)

    def _wake_all(self) -> None:
        for queue in self._waiting:
            self.stir(queue)

    def _tell(self, stream: str) -> None:
        """Ring; where that fails, receivers look by themselves before long."""
        with contextlib.suppress(BrokerUnavailable):
            told = self._other.send("XADD", stream, "NOMKSTREAM", "MAXLEN", 16, "*", "r", 1)
            self._kicks.add(told)
            told.add_done_callback(self._told)

    def _told(self, told: asyncio.Future[object]) -> None:
        self._kicks.discard(told)
        if not told.cancelled():
            told.exception()
