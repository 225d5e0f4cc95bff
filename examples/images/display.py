"""What is seen while the command works: a progress bar and the processes with their health and rate, or plain lines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from msgspec import Struct
from rich.console import Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from examples.images.files import HOST
from examples.images.folder import Run
from examples.images.registry import WorkerRegistry

SILENT_SECONDS: Final = 30.0
"""A process that ended no image for so long is said to be silent; a large image may take that long."""
SAY_SECONDS: Final = 10.0
"""Between two plain lines at most."""
TENTHS: Final = 10


class RunDisplay:
    """A run of the command, to be drawn again and again (rich calls it)."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),  # what the others leave
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            expand=True,
        )
        self._line = self._bar.add_task("images", total=None, rate="")
        self._run: Run | None = None
        self._started = time.monotonic()

    def watch(self, run: Run) -> None:
        """The run begins."""
        self._run, self._started = run, time.monotonic()

    def __rich__(self) -> RenderableType:
        """See rich.protocol."""
        run = self._run
        if run is None:
            return self._bar
        report, elapsed = run.report, time.monotonic() - self._started
        rate = report.processed / elapsed if elapsed else 0.0
        failed = f", [red]{report.failed} failed[/]" if report.failed else ""
        self._bar.update(self._line, total=run.total, completed=run.ended, rate=f"{rate:.1f}/s{failed}")
        parts: list[RenderableType] = [self._bar]
        if run.workers:
            parts.append(_processes(run))
        # Never a full line at the end: a terminal writes ^C behind it.
        parts.append("finishing the images in hand; Ctrl-C again leaves them to the next run" if run.stopping else "")
        return Group(*parts)


class PlainProgress:
    """A run of the command in plain lines, where nothing can be drawn.

    Parameters:
        say: called with each line.
        clock: gives seconds; tests turn it.
    """

    def __init__(self, say: Callable[[str], object], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._last = Said(0, clock())

    def look(self, run: Run) -> None:
        """Say how far it is, where that is due."""
        now = Said(run.ended, self._clock())
        if is_due(self._last, now, run.total):
            self._last = now
            failed = f", {run.report.failed} failed" if run.report.failed else ""
            self._say(f"{run.ended} of {run.total} images{failed}")


class Said(Struct, frozen=True):
    """How far a run was when that was said.

    Parameters:
        ended: images.
        at: monotonic seconds.
    """

    ended: int
    at: float


def is_due(last: Said, now: Said, total: int) -> bool:
    """Whether how far it is is to be said again: at each tenth, and every few seconds where that takes long."""
    another_tenth = now.ended * TENTHS // max(total, 1) > last.ended * TENTHS // max(total, 1)
    return another_tenth or now.at - last.at >= SAY_SECONDS


def _processes(run: Run) -> Table:
    now = time.monotonic()
    table = Table("process", "health", box=None, padding=(0, 2))
    for column in ("completed", "rate", "last image"):
        table.add_column(column, justify="right")
    for (host, process), seen in sorted(run.workers.items()):
        lifetime = seen.last - seen.first
        rate = f"{seen.completed / lifetime:.1f}/s" if lifetime > 0 else ""
        health = "finished" if run.ended == run.total else _health(host, process, now - seen.last)
        name = str(process) if host == HOST else f"{host}:{process}"
        table.add_row(_cut(name), health, str(seen.completed), rate, _ago(now - seen.last))
    return table


def _health(host: str, process: int, silence: float) -> str:
    if host == HOST:  # elsewhere, a process of that id is another one
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return "[red]ended[/]"
        except PermissionError:
            pass  # it is there
    return "[yellow]silent[/]" if silence > SILENT_SECONDS else "[green]running[/]"


def workers_table(registry: WorkerRegistry) -> RenderableType:
    """The workers of a task queue, as their heartbeats tell."""
    statuses = registry.workers()
    if not statuses:
        return Text("no worker was heard of yet (those that stopped before are silent)")
    table = Table("worker", "process", "health", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("done", "failed", "rate", "heard"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("at work on")
    colours = {"running": "green", "stopped": "dim", "failing": "yellow", "dead": "red"}
    for status in statuses:
        beat = status.beat
        table.add_row(
            _cut(beat.worker_id),
            _cut(beat.process.rpartition(":")[0]),
            Text(status.health, colours[status.health], no_wrap=True),
            str(beat.completed),
            str(beat.failed),
            f"{status.rate:.2f}/s" if beat.running and not status.dead else "",
            _ago(status.seconds_ago),
            _cut(" ".join(beat.task_ids)),
        )
    return table


def _cut(text: str) -> Text:
    """A cell that is cut off, and not wrapped, where the terminal is too narrow for all."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s ago"
