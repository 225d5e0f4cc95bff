"""``conveyor wait``: wait for jobs, see how far they are, and have what they returned."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from cyclopts import App, Parameter

from conveyor.cli import EXIT_CODES
from conveyor.cli.connection import Where, connected
from conveyor.cli.publish import duration
from conveyor.cli.terminal import FAILED, OK, Output, safe, shortened
from conveyor.core.journal import Job, Status
from conveyor.core.words import counted
from conveyor.errors import ConfigurationError, NoKeeper
from conveyor.runtime.ask import Asker
from conveyor.runtime.ticket import in_words

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

HERE = Where()
PLAIN = Output()
LOOK_SECONDS: Final = 1.0
"""Between two looks at how far jobs are; an end is seen at once."""
MOST_BARS: Final = 8
"""Jobs whose own progress is shown at once."""

command = App(
    name="wait",
    help_epilogue=f"""Examples:
  conveyor wait 01a201f4-633d-75ae-9a38-cd4e0d74b3a0
  conveyor wait --timeout 10m --app shop:app ID ID ID
  conveyor jobs --status running --json | jq -r '.jobs[].id' | conveyor wait -

Prints one line for each job, in the order of their ends: its id, how it ended,
and what it returned, as JSON, or its error. 1 is the exit code as soon as one
was not done, or has not ended in time.

{EXIT_CODES}""",
)


@command.default
def wait(
    *ids: Annotated[str, Parameter(allow_leading_hyphen=True)],
    timeout: Annotated[float | None, Parameter(converter=duration, n_tokens=1)] = None,
    where: Where = HERE,
    output: Output = PLAIN,
) -> int:
    """Wait until jobs have ended.

    Parameters:
        ids: Of the jobs: what ticket.id is; - reads them from stdin, one a line.
        timeout: Wait no longer than 90s, 10m, 2h. Default: as long as it takes.
    """
    wanted = tuple(dict.fromkeys(sys.stdin.read().split() if ids == ("-",) else ids))
    if not wanted:
        raise ConfigurationError("wait for which jobs? Give their ids, or - to read them from stdin")
    return asyncio.run(_wait(wanted, math.inf if timeout is None else timeout, where.url(), output))


async def _wait(ids: Sequence[str], seconds: float, url: str, output: Output) -> int:
    last: dict[str, Job] = {}
    good = 0
    async with connected(url) as broker, contextlib.AsyncExitStack() as stack:
        asker = Asker(broker, time.time)
        stack.push_async_callback(asker.close)
        bars = _Bars(stack.enter_context(output.progress()), len(ids))
        async for known, ended in _looks(asker, ids, seconds, output):
            last |= known
            bars.show(known, ended)
            for job in ended:
                good += job.status is Status.DONE
                _tell(job, output, bars)
    left = [id for id in ids if id not in last or not last[id].status.ended]
    for id in left:
        output.note(f"{id} has not ended after {seconds:g} s: {in_words(last.get(id))}", "yellow")
    if len(ids) > 1:
        output.note(f"{good:,} of {counted(len(ids), 'job')} done")
    return OK if good == len(ids) else FAILED


async def _looks(
    asker: Asker, ids: Sequence[str], seconds: float, output: Output
) -> AsyncIterator[tuple[dict[str, Job], list[Job]]]:
    """What is known, from time to time, and which have ended since the last time; until all have, or the time is over."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    waiting, warned = dict.fromkeys(ids), False
    while waiting:
        left = max(0.0, deadline - loop.time())
        try:
            known = await asker.wait(waiting, timeout_seconds=min(left, LOOK_SECONDS))
        except NoKeeper as error:
            if not warned:
                output.note(str(error), "yellow")
            known, warned = {}, True
        ended = [job for job in known.values() if job.id in waiting and job.status.ended]
        for job in ended:
            del waiting[job.id]
        yield known, ended
        if not ended and deadline <= loop.time():
            return


def _tell(job: Job, output: Output, bars: _Bars) -> None:
    """One line on stdout; on a terminal it goes above the bars."""
    told: dict[str, Any] = {"id": job.id, "status": str(job.status), "worker": job.worker, "attempts": job.attempts}
    if job.status is Status.DONE:
        told["result"] = None if job.result is None else msgspec.json.decode(job.result)
        text = shortened(job.unkept or job.result or "", 500)
    else:
        text = shortened(job.error, 500)
    if job.error or job.unkept:
        told["error"] = job.error or job.unkept
    if output.json:
        output.line(told)
    elif sys.stdout.isatty() and sys.stderr.isatty():
        bars.above(f"{job.id} {job.status}{f' {text}' if text else ''}")
    else:
        output.say(f"{job.id} {job.status}{f' {text}' if text else ''}")


class _Bars:
    """A bar for all jobs, and one for each of the first that say how far they are."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._all = progress.add_task(counted(total, "job"), total=total)
        self._own: dict[str, TaskID] = {}

    def above(self, line: str) -> None:
        """Print a line that stays."""
        self._progress.console.print(safe(line), soft_wrap=True)

    def show(self, known: dict[str, Job], ended: Sequence[Job]) -> None:
        """What has become known."""
        self._progress.advance(self._all, len(ended))
        for job in known.values():
            if job.id in self._own:
                if job.status.ended:
                    self._progress.remove_task(self._own.pop(job.id))
                    continue
            elif job.status is not Status.RUNNING or job.done is None or len(self._own) >= MOST_BARS:
                continue
            else:
                self._own[job.id] = self._progress.add_task(job.worker)
            text = shortened(f"{job.worker} {job.note}", 40)
            self._progress.update(self._own[job.id], description=text, completed=job.done or 0.0, total=job.total)
