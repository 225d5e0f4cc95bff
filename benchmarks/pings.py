"""Pings: messages at an even pace that carry when they were sent, for whoever measures how long they were on their way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

PER_SECOND: Final = 200
PATIENCE_SECONDS: Final = 60.0
LONGEST_LINE: Final = 1_000_000


@dataclass(frozen=True)
class Ping:
    """One message of many.

    Parameters:
        sent: the machine's monotonic clock just before it was published.
        of: so many are sent.
    """

    sent: float
    of: int


class Waits:
    """What a receiver notes; with the last ping of a series it tells the sender all of it."""

    def __init__(self) -> None:
        self._waits: list[float] = []

    def note(self, ping: Ping) -> None:
        """A ping is here."""
        self._waits.append((time.monotonic() - ping.sent) * 1000)
        if len(self._waits) == ping.of:
            print(json.dumps(self._waits), flush=True)
            self._waits.clear()


@contextlib.asynccontextmanager
async def receiver(*arguments: str) -> AsyncIterator[Process]:
    """A Python process that notes Waits."""
    process = await create_subprocess_exec(sys.executable, *arguments, stdout=PIPE, limit=LONGEST_LINE)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield process
    finally:
        process.terminate()
        await process.wait()


async def answer(process: Process) -> list[float]:
    """The waits of a series, in milliseconds, when the receiver has its last message."""
    assert process.stdout is not None
    waits: list[float] = json.loads(await process.stdout.readline())
    return waits


async def send(number: int, publish: Callable[[Ping], Awaitable[object]]) -> None:
    """So many pings; a late one does not make the next one late."""
    begin = time.monotonic()
    async with asyncio.TaskGroup() as publishing:
        for each in range(number):
            await asyncio.sleep(max(0.0, begin + each / PER_SECOND - time.monotonic()))
            publishing.create_task(_publish(publish, Ping(time.monotonic(), number)))


async def _publish(publish: Callable[[Ping], Awaitable[object]], ping: Ping) -> None:
    await publish(ping)


def figures(waits: list[float]) -> dict[str, float]:
    """How they are spread."""
    return {"median": statistics.median(waits), "p99": statistics.quantiles(waits, n=100)[98]}
