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

from conveyor.broker import Broker
from conveyor.cli import EXIT_CODES
from conveyor.cli.asking import files_here, queue_beside, shown
from conveyor.cli.connection import Where, connected
from conveyor.cli.publish import duration
from conveyor.cli.terminal import FAILED, OK, Output, safe, shortened
from conveyor.core.jobs import Job, JobFilter, Status
from conveyor.core.questions import JobsOf
from conveyor.core.words import counted
from conveyor.errors import BrokerError, ConfigurationError, NoKeeper
from conveyor.runtime.ask import MOST_IDS, Asker, silence_of
from conveyor.runtime.journal import LONGEST_NOTE, journal_queues
from conveyor.runtime.logs import printable
from conveyor.runtime.ticket import in_words, may_pass

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

HERE = Where()
PLAIN = Output()
LOOK_SECONDS: Final = 1.0
"""Between two looks at how far jobs are; an end is seen at once."""
WHOLE_ID: Final = 36
"""Characters of an id that Conveyor gives; a shorter one may be the beginning of one."""
MOST_SHORT: Final = 20
"""Beginnings of ids that are looked for at most: each takes a moment."""
ASKED_AT_ONCE: Final = 200
"""Jobs that are looked for in one question."""
MOST_NAMED: Final = 5
"""Unknown jobs that are named."""
MOST_BARS: Final = 8
"""Jobs whose own progress is shown at once."""

command = App(
    name="wait",
    help_epilogue=f"""Examples:
  conveyor wait 01a201f4-633d-75ae-9a38-cd4e0d74b3a0
  conveyor wait 01a201f4-633d --app shop:app
  conveyor wait --timeout 10m --app shop:app ID ID ID
  conveyor jobs --status running --json | jq -r '.jobs[].id' | conveyor wait -

Where nothing says which broker, it is that of the queue file in the working
directory beside which a journal is kept.

Prints one line for each job, in the order of their ends: its id, how it ended,
and what it returned, as JSON, or its error. The beginning of an id is enough
where only one job begins so. A job that nobody knows yet is waited for, and
that is said. While whoever keeps the journal is away, this waits, and says so.
1 is the exit code where one was not done, has not ended in time, or may mean
several; 2 where no journal was ever kept, without which there is nothing to
hear.

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
        ids: Of the jobs: what ticket.id is, or its beginning; - reads them from stdin, one a line.
        timeout: Wait no longer than 90s, 10m, 2h. Default: as long as it takes.
    """
    wanted = tuple(dict.fromkeys(sys.stdin.read().split() if ids == ("-",) else ids))
    if not wanted:
        raise ConfigurationError("wait for which jobs? Give their ids, or - to read them from stdin")
    return asyncio.run(_wait(wanted, math.inf if timeout is None else timeout, where, output))


async def _wait(ids: Sequence[str], seconds: float, where: Where, output: Output) -> int:
    deadline = asyncio.get_running_loop().time() + seconds
    last: dict[str, Job] = {}
    good = 0
    async with connected(_url(where, output)) as broker, contextlib.AsyncExitStack() as stack:
        asker = Asker(broker, time.time)
        stack.push_async_callback(asker.close)
        found = await _found(asker, broker, ids, deadline, where, output)
        if found is None:
            return FAILED
        ids = found
        bars = _Bars(stack.enter_context(output.progress()), len(ids))
        async for known, ended in _looks(asker, ids, deadline, output):
            last |= known
            bars.show(known, ended)
            for job in ended:
                good += job.status is Status.DONE
                _tell(job, output, bars)
    left = [id for id in ids if id not in last or not last[id].status.ended]
    for id in left:
        output.note(
            f"{id} has not ended after {seconds:g} s: {shortened(in_words(last.get(id)), LONGEST_NOTE)}", "yellow"
        )
    if len(ids) > 1:
        output.note(f"{good:,} of {counted(len(ids), 'job')} done")
    return OK if good == len(ids) else FAILED


def _url(where: Where, output: Output) -> str:
    """The broker that is meant; where nothing says which, that of the one queue file in the working directory with a journal.

    Raises:
        ConfigurationError: nothing says which, or there are several.
    """
    try:
        return where.url()
    except ConfigurationError as error:
        if where.broker is not None or where.app is not None:
            raise
        kept = {file: url for file in files_here() if (url := queue_beside(file)) is not None}
        if len(kept) > 1:
            raise ConfigurationError(f"{error}\nJournals of several are here: {', '.join(map(shown, kept))}") from error
        for file, url in kept.items():
            output.note(f"asking whoever keeps {shown(file)}")
            return url
        raise


async def _found(
    asker: Asker, broker: Broker, ids: Sequence[str], deadline: float, where: Where, output: Output
) -> list[str] | None:
    """The whole ids of these jobs; None where the beginning of one may mean several. Says which of them nobody knows.

    Raises:
        ConfigurationError: no journal was ever kept there.
        NoKeeper: until the deadline nobody was there who keeps one.
    """
    loop = asyncio.get_running_loop()
    warned = False
    while True:
        try:
            unknown, silent = await _unknown(asker, ids)
            short = [id for id in unknown if len(id) < WHOLE_ID][:MOST_SHORT]
            meant = {id: await _beginning_so(asker, id) for id in short}
            break
        except NoKeeper as error:
            await _refuse_without_journal(broker, where)
            if deadline <= loop.time():
                if warned:
                    raise NoKeeper("nobody came who keeps the journal") from error
                raise
            if not warned:
                output.note(f"{error}\nwaiting for somebody who does; conveyor trace ID reads what was kept", "yellow")
            warned = True
        await asyncio.sleep(min(LOOK_SECONDS, max(0.0, deadline - loop.time())))
    if unclear := {id: found for id, found in meant.items() if len(found) > 1}:
        for id, found in unclear.items():
            output.note(f"{id} may mean several jobs; write more of it:", "yellow")
            for other in found:
                output.note(f"  {other}")
        return None
    if missing := [id for id in unknown if not meant.get(id)]:
        await _refuse_without_journal(broker, where)
        if silent:
            output.note(silence_of(silent), "yellow")
        if loop.time() < deadline:
            _tell_unknown(missing, output)
    return list(dict.fromkeys(next(iter(meant.get(id, ())), id) for id in ids))


async def _unknown(asker: Asker, ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of which nothing is known, and the applications whose keepers were silent."""
    known: set[str] = set()
    silent: set[str] = set()
    for first in range(0, len(ids), ASKED_AT_ONCE):
        some = tuple(ids[first : first + ASKED_AT_ONCE])
        answer = await asker.ask(JobsOf(JobFilter(ids=some), limit=10 * ASKED_AT_ONCE))
        known.update(job.id for job in answer.jobs)
        silent.update(answer.silent)
    return [id for id in ids if id not in known], sorted(silent)


async def _beginning_so(asker: Asker, beginning: str) -> list[str]:
    """The messages whose ids begin so; where there are many, some."""
    answer = await asker.journey(beginning)
    found = {entry.message_id for entry in answer.entries if entry.message_id.startswith(beginning)}
    return sorted(found) or list(answer.others)


async def _refuse_without_journal(broker: Broker, where: Where) -> None:
    """Fail where nothing can come.

    Raises:
        ConfigurationError: no journal was ever kept there.
    """
    apps = await journal_queues(broker)
    if where.app is not None:
        from conveyor.cli.application import load_app

        app = load_app(where.app)
        if app.name not in apps and app.journal_place(broker) is None:
            raise ConfigurationError(
                f"{app.name} keeps no journal, and without it nobody can tell how a job ends; say"
                f" Conveyor({app.name!r}, journal=True) or set CONVEYOR_JOURNAL=1 where it runs"
            )
    elif not apps:
        raise ConfigurationError(
            "no journal was ever kept on this broker, and without it nobody can tell how a job ends; say"
            " Conveyor(…, journal=True) or set CONVEYOR_JOURNAL=1 where its workers run"
        )


def _tell_unknown(ids: Sequence[str], output: Output) -> None:
    for id in ids[:MOST_NAMED]:
        output.note(
            f"no job {id} is known yet (not sent, its news has not come, or too long ago); waiting for it", "yellow"
        )
    if len(ids) > MOST_NAMED:
        output.note(f"nor are {len(ids) - MOST_NAMED:,} more", "yellow")
    if any(len(id) < WHOLE_ID for id in ids):
        output.note("the beginning of an id is enough only where the job is known", "yellow")


async def _looks(
    asker: Asker, ids: Sequence[str], deadline: float, output: Output
) -> AsyncIterator[tuple[dict[str, Job], list[Job]]]:
    """What is known, from time to time, and which have ended since the last time; until all have, or the time is over."""
    loop = asyncio.get_running_loop()
    waiting, warned = dict.fromkeys(ids), False
    while waiting:
        left = max(0.0, deadline - loop.time())
        try:
            known = await asker.wait(list(waiting)[:MOST_IDS], timeout_seconds=min(left, LOOK_SECONDS))
        except (NoKeeper, BrokerError) as error:
            if not may_pass(error):
                raise
            if not warned:
                output.note(f"{error}; waiting on", "yellow")
            known, warned = {}, True
            if isinstance(error, BrokerError):
                await asyncio.sleep(min(left, LOOK_SECONDS))
        ended = [job for job in known.values() if job.id in waiting and job.status.ended]
        for job in ended:
            del waiting[job.id]
        if len(waiting) > MOST_IDS:  # the others come next
            for id in list(waiting)[:MOST_IDS]:
                waiting[id] = waiting.pop(id)
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
        bars.above(f"{printable(job.id)} {job.status}{f' {text}' if text else ''}")
    else:
        output.say(f"{printable(job.id)} {job.status}{f' {text}' if text else ''}")


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
                self._own[job.id] = self._progress.add_task(job.worker, total=None)
            text = shortened(f"{job.worker} {job.note}", 40)
            self._progress.update(self._own[job.id], description=text, completed=job.done or 0.0, total=job.total)
