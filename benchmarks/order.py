"""What is carried in all measurements, and the clocks: nothing here knows Conveyor, so that peers and bare clients use it too."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

TOPIC: Final = "order_created"
BODY: Final = b'{"order_id":"A-123456","total":"19.99","customer":"someone@example.org","note":"0123456789abcdefghij"}'
TASKS: Final = 100
"""Coroutines that handle, or publish, at the same time."""


@dataclass(frozen=True)
class OrderCreated:
    """About 100 bytes of JSON."""

    order_id: str
    total: str
    customer: str
    note: str


ORDER: Final = OrderCreated("A-123456", "19.99", "someone@example.org", "0123456789abcdefghij")
FIELDS: Final = {
    "order_id": "A-123456",
    "total": "19.99",
    "customer": "someone@example.org",
    "note": "0123456789abcdefghij",
}


class Countdown:
    """Stops the clock when so many messages have been handled and settled."""

    def __init__(self, messages: int) -> None:
        self.left = messages
        self.over = asyncio.Event()
        self.messages = messages
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def one(self) -> None:
        """Count one."""
        self.left -= 1
        if self.left == 0:
            self.over.set()

    def figures(self) -> dict[str, float]:
        """How fast it went, all threads of this process together."""
        return figures(self.messages, time.perf_counter() - self._wall, time.process_time() - self._cpu)


async def from_tasks(messages: int, publish: Callable[[], Awaitable[object]]) -> dict[str, float]:
    """Publish so many from many tasks at once, each awaiting its own."""
    countdown = Countdown(messages)

    async def task(number: int) -> None:
        for _ in range(number, messages, TASKS):
            await publish()

    await asyncio.gather(*(task(number) for number in range(TASKS)))
    return countdown.figures()


class Handled:
    """The clock of a peer: from its first handled message to its last one, so that neither its start nor its end counts.

    Its handlers may run in threads.
    """

    def __init__(self, messages: int) -> None:
        self._messages = messages
        self._left = messages
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._wall = self._cpu = 0.0
        self._figures: dict[str, float] = {}

    def one(self) -> None:
        """Count one."""
        with self._lock:
            if self._left == self._messages:
                self._wall, self._cpu = time.perf_counter(), time.process_time()
            self._left -= 1
            if self._left == 0:
                wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
                self._figures = figures(self._messages - 1, wall, cpu)
                self._over.set()

    def wait(self) -> dict[str, float]:
        """How fast it went, when the last one has been handled."""
        self._over.wait()
        return self._figures

    async def over(self, work: Awaitable[object] | None = None) -> dict[str, float]:
        """The same, in an event loop, while the worker works."""
        over = asyncio.ensure_future(asyncio.to_thread(self.wait))
        if work is None:
            return await over
        working = asyncio.ensure_future(work)
        await asyncio.wait({over, working}, return_when=asyncio.FIRST_COMPLETED)
        if not over.done():
            await working
            raise RuntimeError("the worker ended before its last message")
        return over.result()


def figures(messages: int, wall: float, cpu: float) -> dict[str, float]:
    """What so many messages in so many seconds come to."""
    return {"rate": messages / wall, "cpu": cpu / messages * 1e6}
