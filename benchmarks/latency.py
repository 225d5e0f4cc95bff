"""Latency: published in one process, handled in another one that `conveyor run` keeps; and what such a process weighs idle."""

from __future__ import annotations

import asyncio
import contextlib
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Final

from benchmarks import pings
from benchmarks.load import url
from benchmarks.pings import Ping, Waits
from benchmarks.subject import Load
from conveyor import Conveyor

CALM_SECONDS: Final = 1.0
"""A process is weighed when it has been idle for so long."""

app = Conveyor("latency")
_waits: Final = Waits()


@app.worker
async def receive(ping: Ping) -> None:
    """Note how long it took to get here; with the last one, tell the sender all of them."""
    _waits.note(ping)


@contextlib.asynccontextmanager
async def _receiver(broker: str) -> AsyncIterator[Process]:
    """The supervisor with its runner, as users start them, when a first message was handled. The app is connected meanwhile."""
    app.broker_url = broker
    command = "-m", "conveyor", "run", "benchmarks.latency:app", f"--broker={broker}"
    async with pings.receiver(*command) as process, app:
        await app.publish(Ping(time.monotonic(), 1))
        await pings.answer(process)
        yield process


async def _latency(broker: str, load: Load) -> dict[str, float]:
    async with _receiver(broker) as process:
        await pings.send(load.messages, app.publish)
        return pings.figures(await pings.answer(process))


def latency(folder: Path, load: Load) -> Mapping[str, float]:
    """From before publish() in this process to the handler in the other one, durable in between."""
    return asyncio.run(_latency(url(folder), load))


def on_server(server: str, load: Load) -> Mapping[str, float]:
    """The same over a quorum queue, or a stream."""
    return asyncio.run(_latency(server, load))


async def _weigh(folder: Path, which: Callable[[Process], int]) -> dict[str, float]:
    async with _receiver(url(folder)) as process:
        await asyncio.sleep(CALM_SECONDS)
        return _weight(which(process))


def _weight(pid: int) -> dict[str, float]:
    """Resident memory, and the share of it that is this process' own (proc_pid_smaps_rollup(5)), in megabytes."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes, *_ = line.split()
        fields[name] = int(kilobytes) / 1000 * 1.024
    return {"rss": fields["Rss:"], "pss": fields["Pss:"]}


def _runner(supervisor: Process) -> int:
    [child] = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
    return int(child)


def runner_memory(folder: Path, _: Load) -> Mapping[str, float]:
    """The process that runs the workers, after its first message."""
    return asyncio.run(_weigh(folder, _runner))


def supervisor_memory(folder: Path, _: Load) -> Mapping[str, float]:
    """The process that keeps it alive; there is one for any number of them."""
    return asyncio.run(_weigh(folder, lambda supervisor: supervisor.pid))
