"""Workers of every kind that write down what they did, and one of each slow kind that waits until the file ``release`` is there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from conveyor import Conveyor, RetryPolicy

app = Conveyor("steady")
LEASE_SECONDS = float(os.environ.get("LEASE_SECONDS", "3600"))
"""Unless a test says so, nothing comes back by waiting for the end of its lease."""
STEADFAST = RetryPolicy(crashes=1000)
ONCE = RetryPolicy(attempts=1)
DEAF_SECONDS = float(os.environ.get("DEAF_SECONDS", "600"))
"""The timeout of handlers that cannot be ended."""


@dataclass(frozen=True)
class Quick:
    number: int


@dataclass(frozen=True)
class QuickInThread:
    number: int


@dataclass(frozen=True)
class Lingering:
    number: int


@dataclass(frozen=True)
class Slow:
    number: int


@dataclass(frozen=True)
class Grind:
    number: int


@dataclass(frozen=True)
class Deaf:
    number: int


@dataclass(frozen=True)
class Lost:
    number: int


def note(file: str, what: object) -> None:
    """One line, whole, also where several processes write."""
    handle = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(handle, f"{what}\n".encode())
    os.close(handle)


def released() -> bool:
    """Whether the slow ones may end."""
    return Path("release").exists()


@app.worker(retry=STEADFAST, lease=LEASE_SECONDS, concurrency=10)
async def quick(event: Quick) -> None:
    await asyncio.sleep(0.002)
    note("handled", f"quick-{event.number}")


@app.worker(retry=STEADFAST, lease=LEASE_SECONDS, concurrency=4)
def quick_in_thread(event: QuickInThread) -> None:
    time.sleep(0.002)
    note("handled", f"quick_in_thread-{event.number}")


@app.worker(retry=STEADFAST, lease=LEASE_SECONDS, concurrency=2)
async def lingering(event: Lingering) -> None:
    note("begun", f"lingering-{os.getpid()}")
    await asyncio.sleep(0.2)
    note("handled", f"lingering-{event.number}")


@app.worker(retry=STEADFAST, lease=LEASE_SECONDS, concurrency=2)
async def slow(event: Slow) -> None:
    note("begun", f"slow-{os.getpid()}")
    while not released():
        await asyncio.sleep(0.05)
    note("handled", f"slow-{event.number}")


@app.worker(retry=STEADFAST, lease=LEASE_SECONDS, concurrency=1, cpu=True)
def grind(event: Grind) -> None:
    note("begun", f"grind-{os.getpid()}")
    while not released():
        time.sleep(0.05)
    note("handled", f"grind-{event.number}")


@app.worker(retry=ONCE, lease=LEASE_SECONDS, concurrency=1, timeout=DEAF_SECONDS)
async def deaf(event: Deaf) -> None:
    note("begun", f"deaf-{os.getpid()}")
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)


@app.worker(retry=ONCE, lease=LEASE_SECONDS, concurrency=1, timeout=DEAF_SECONDS)
async def lost(event: Lost) -> None:
    note("begun", f"lost-{os.getpid()}")
    await asyncio.to_thread(time.sleep, 3600)
