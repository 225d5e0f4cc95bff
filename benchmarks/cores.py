"""Cores: handlers that compute, one after the other or two at once, in processes (cpu=True) or in threads; and what handing over costs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.order import Countdown
from benchmarks.subject import Load
from conveyor import Conveyor
from conveyor.brokers.memory import MemoryBroker

STEPS: Final = 300_000
"""Of pure Python: some twenty milliseconds of one core."""
WARM: Final = 4
"""Messages that come before: they start the processes."""
LARGEST: Final = 64 * 1024 * 1024
"""Bytes."""


@dataclass(frozen=True)
class Sum:
    """What was computed, or how much was seen."""

    number: int


@dataclass(frozen=True)
class Steps:
    """What is to be computed."""

    number: int


def compute(steps: Steps) -> Sum:
    """Keep a core busy."""
    total = 0
    for number in range(steps.number):
        total += number * number
    return Sum(total)


def look(body: bytes) -> Sum:
    """Take much, and do nothing with it."""
    return Sum(len(body))


async def _handled(app: Conveyor, load: Load, event: object, topic: str | None) -> dict[str, float]:
    """Publish events and count what comes of them; the processes are there when the clock starts."""
    warm = Countdown(WARM)
    clock = warm

    @app.worker
    async def count(_: Sum) -> None:
        clock.one()

    async with app.running():
        for _ in range(warm.messages):
            await app.publish(event, topic=topic)
        await warm.over.wait()
        clock = Countdown(load.messages)
        for _ in range(load.messages):
            await app.publish(event, topic=topic)
        await clock.over.wait()
        return {"rate": clock.figures()["rate"]}  # the processes' time is not in this one's


async def _on_memory(load: Load, event: object, topic: str | None, *, cpu: bool, at_once: int) -> dict[str, float]:
    broker = MemoryBroker()
    await broker.open()
    app = Conveyor("cores", broker=broker, body_limit=LARGEST)
    app.worker(cpu=cpu, concurrency=at_once, topic=topic)(compute if topic is None else look)
    try:
        return await _handled(app, load, event, topic)
    finally:
        await broker.close()


def _compute(_: Path, load: Load, *, cpu: bool, at_once: int) -> Mapping[str, float]:
    return asyncio.run(_on_memory(load, Steps(STEPS), None, cpu=cpu, at_once=at_once))


def _hand_over(_: Path, load: Load, *, size: int) -> Mapping[str, float]:
    return asyncio.run(_on_memory(load, bytes(size), "large", cpu=True, at_once=1))


one_process = partial(_compute, cpu=True, at_once=1)
two_processes = partial(_compute, cpu=True, at_once=2)
two_threads = partial(_compute, cpu=False, at_once=2)
small = partial(_hand_over, size=1_000)
megabyte = partial(_hand_over, size=1_000_000)
fifty_megabytes = partial(_hand_over, size=50_000_000)
