"""Live tails: every watcher in this process sees what is published under a topic from now on."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from conveyor.broker import Broker
from conveyor.core.codec import Codec
from conveyor.runtime.loop import Loops
from conveyor.runtime.mailbox import Mailbox

log = logging.getLogger("conveyor.watch")

T = TypeVar("T")

BUFFER: Final = 1_000
"""Events that a watcher may be behind; a slower one misses the oldest."""


class Watch(Generic[T]):
    """The events of one topic, as they are published.

    Iterate over it; or enter it with ``async with``, which returns when it is sure to miss nothing that is published from then on.

    Parameters:
        where: events for which it is false are left out.
        buffer: how many events it may be behind before it misses the oldest.
    """

    def __init__(self, hub: _Hub, buffer: int, where: Callable[[T], bool] | None) -> None:
        self._hub = hub
        self._where = where
        self._events: deque[T] = deque(maxlen=buffer)
        self._arrived = asyncio.Event()
        self.missed = 0
        """Events that came while the buffer was full."""

    async def __aenter__(self) -> Self:
        await self._hub.open()
        self._hub.watches.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hub.watches.discard(self)

    async def __aiter__(self) -> AsyncIterator[T]:
        async with self:
            while True:
                while self._events:
                    yield self._events.popleft()
                self._arrived.clear()
                await self._arrived.wait()

    def offer(self, event: T) -> None:
        """Take an event in; never waits."""
        try:
            if self._where is not None and not self._where(event):
                return
        except Exception:
            log.exception("a watcher's where= failed; the event is left out for it, and only for it")
            return
        if len(self._events) == self._events.maxlen:
            self.missed += 1
        self._events.append(event)
        self._arrived.set()


class _Hub:
    """One temporary queue for one topic, shared by all the watches of this process."""

    def __init__(self, mailbox: Mailbox[Any]) -> None:
        self.watches: set[Watch[Any]] = set()
        self._mailbox = mailbox
        self._opening = asyncio.Lock()
        self._open = False
        self._loops = Loops()

    async def open(self) -> None:
        async with self._opening:
            if not self._open:
                await self._mailbox.declare()
                self._loops.start(f"watch {self._mailbox.name}", self._run)
                self._open = True

    async def close(self) -> None:
        await self._loops.stop()

    async def _run(self) -> None:
        async with self._mailbox.receiving() as take:
            while True:
                for event in await take():
                    for watch in tuple(self.watches):
                        watch.offer(event)


class Watches:
    """All the live tails of one process.

    Parameters:
        broker: open.
        prefix: begins the names of the temporary queues.
    """

    def __init__(self, broker: Broker, prefix: str) -> None:
        self._broker = broker
        self._prefix = prefix
        self._hubs: dict[tuple[str, Any], _Hub] = {}

    def watch(
        self, topic: str, codec: Codec, where: Callable[[T], bool] | None = None, buffer: int = BUFFER
    ) -> Watch[T]:
        """A new tail of a topic."""
        hub = self._hubs.get((topic, codec.type))
        if hub is None:
            name = f"{self._prefix}.watch.{topic}.{self._broker.owner[:12]}.{len(self._hubs)}"
            mailbox = Mailbox(self._broker, name, (topic,), codec.decode, length=10 * BUFFER)
            hub = self._hubs[topic, codec.type] = _Hub(mailbox)
        return Watch(hub, buffer, where)

    async def close(self) -> None:
        """End them all."""
        for hub in self._hubs.values():
            await hub.close()
