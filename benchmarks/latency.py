"""Latency: published in one process, handled in another one that `conveyor run` keeps; and what such a process weighs idle."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.load import url
from benchmarks.subject import Load
from conveyor import Conveyor

PER_SECOND: Final = 200
PATIENCE_SECONDS: Final = 60.0
LONGEST_LINE: Final = 1_000_000
CALM_SECONDS: Final = 1.0
"""A process is weighed when it has been idle for so long."""


@dataclass(frozen=True)
class Ping:
    """One message of many.

    Parameters:
        sent: the machine's monotonic clock just before it was published.
        of: so many are sent.
    """

    sent: float
    of: int


app = Conveyor("latency")
_waits: list[float] = []


@app.worker
async def receive(ping: Ping) -> None:
    """Note how long it took to get here; with the last one, tell the sender all of them."""
    _waits.append((time.monotonic() - ping.sent) * 1000)
    if len(_waits) == ping.of:
        print(msgspec.json.encode(_waits).decode(), flush=True)
        _waits.clear()


class _Receiver:
    """The receiving processes, as users start them."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.supervisor = process.pid

    @property
    def runner(self) -> int:
        """The process that the supervisor keeps."""
        [child] = Path(f"/proc/{self.supervisor}/task/{self.supervisor}/children").read_text().split()
        return int(child)

    async def waits(self) -> list[float]:
        """What it measured, when it has the last message of a series."""
        assert self._process.stdout is not None
        return msgspec.json.decode(await self._process.stdout.readline(), type=list[float])


@contextlib.asynccontextmanager
async def _receiver(folder: Path) -> AsyncIterator[_Receiver]:
    """The receiver, when it has handled its first message. The app is connected meanwhile."""
    app.broker_url = url(folder)
    command = [sys.executable, "-m", "conveyor", "run", "benchmarks.latency:app", f"--broker={url(folder)}"]
    process = await create_subprocess_exec(*command, stdout=PIPE, limit=LONGEST_LINE)
    receiver = _Receiver(process)
    try:
        async with app, asyncio.timeout(PATIENCE_SECONDS):
            await app.publish(Ping(time.monotonic(), 1))
            await receiver.waits()
            yield receiver
    finally:
        process.terminate()
        await process.wait()


async def _latency(folder: Path, load: Load) -> dict[str, float]:
    async with _receiver(folder) as receiver:
        begin = time.monotonic()
        async with asyncio.TaskGroup() as publishing:  # a late one must not make the next one late
            for number in range(load.messages):
                await asyncio.sleep(max(0.0, begin + number / PER_SECOND - time.monotonic()))
                publishing.create_task(app.publish(Ping(time.monotonic(), load.messages)))
        waits = await receiver.waits()
    return {"median": statistics.median(waits), "p99": statistics.quantiles(waits, n=100)[98]}


def latency(folder: Path, load: Load) -> Mapping[str, float]:
    """From before publish() in this process to the handler in the other one, durable in between."""
    return asyncio.run(_latency(folder, load))


async def _weigh(folder: Path, which: Callable[[_Receiver], int]) -> dict[str, float]:
    async with _receiver(folder) as receiver:
        await asyncio.sleep(CALM_SECONDS)
        return _weight(which(receiver))


def _weight(pid: int) -> dict[str, float]:
    """Resident memory, and the share of it that is this process' own (proc_pid_smaps_rollup(5)), in megabytes."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes, *_ = line.split()
        fields[name] = int(kilobytes) / 1000 * 1.024
    return {"rss": fields["Rss:"], "pss": fields["Pss:"]}


def runner_memory(folder: Path, _: Load) -> Mapping[str, float]:
    """The process that runs the workers, after its first message."""
    return asyncio.run(_weigh(folder, lambda receiver: receiver.runner))


def supervisor_memory(folder: Path, _: Load) -> Mapping[str, float]:
    """The process that keeps it alive; there is one for any number of them."""
    return asyncio.run(_weigh(folder, lambda receiver: receiver.supervisor))
