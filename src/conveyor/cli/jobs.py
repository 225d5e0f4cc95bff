"""``conveyor jobs``: where jobs are, how far, and how they ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from cyclopts import App, Parameter, validators

from conveyor.cli import EXIT_CODES
from conveyor.cli.asking import Kept
from conveyor.cli.publish import duration
from conveyor.cli.terminal import OK, Output, moment, out, safe, shortened, span, table
from conveyor.core.jobs import Job, JobFilter, Status
from conveyor.core.questions import JobsOf
from conveyor.core.words import counted, far
from conveyor.runtime.logs import printable

if TYPE_CHECKING:
    from rich.table import Table

HERE = Kept()
PLAIN = Output()
STYLES: Final = {
    Status.DONE: "green",
    Status.RUNNING: "cyan",
    Status.RETRYING: "yellow",
    Status.FAILED: "red",
    Status.DEAD: "red",
    Status.CANCELLED: "magenta",
}
TIMES: Final = ("created", "due", "started", "ended")

command = App(
    name="jobs",
    help_epilogue=f"""Examples:
  conveyor jobs --app shop:app
  conveyor jobs --status running --broker redis://localhost
  conveyor jobs --worker charge --status dead --since 2h --limit 20
  conveyor jobs --json | jq '.jobs[] | select(.attempts > 1) | .id'

A job is a message and what one worker made of it. failed is one that its
handler gave up, or that nobody could read; dead is one that failed every
time. What it took is its last attempt's time. conveyor trace ID shows one of
them in full.

{EXIT_CODES}""",
)


@command.default
def jobs(
    *,
    status: Status | None = None,
    worker: str | None = None,
    topic: str | None = None,
    since: Annotated[float | None, Parameter(converter=duration, n_tokens=1)] = None,
    limit: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=10_000))] = 50,
    where: Kept = HERE,
    output: Output = PLAIN,
) -> int:
    """List jobs, the newest first.

    Parameters:
        status: Only these: waiting, running, retrying, done, failed, dead or cancelled.
        worker: Only those of this worker (or task), as NAME or APP.NAME.
        topic: Only those published under this topic.
        since: Only those to which something happened in the last 10m, 2h, 1d.
        limit: So many at most. Default: 50.
    """
    from_then = None if since is None else time.time() - since
    which = JobFilter(status=status, worker=worker, topic=topic, since=from_then)
    answer = asyncio.run(where.answer(JobsOf(which, limit), output))
    if output.json:
        output.document({"jobs": [as_json(job) for job in answer.jobs], "more": answer.more})
    elif answer.jobs:
        out().print(as_table(answer.jobs, time.time()))
    else:
        output.note("no such jobs")
    if answer.more:
        output.note(f"these are the newest {counted(len(answer.jobs), 'job')}; there may be more: see --limit")
    return OK


def as_json(job: Job) -> dict[str, Any]:
    """What --json prints; results and tracebacks are left to those who wait for the job."""
    known: dict[str, Any] = msgspec.to_builtins(job)
    for name in ("result", "unkept", "traceback"):
        del known[name]
    for name in TIMES:
        known[name] = moment(known[name]) if known[name] else None
    return known


def as_table(found: Sequence[Job], now: float) -> Table:
    """What people see."""
    rows = [
        (
            printable(job.id),
            safe(job.status.value, STYLES.get(job.status, "")),
            job.worker or job.topic,
            f"{job.attempts:,}" + (f" + {counted(job.crashes, 'crash', 'crashes')}" if job.crashes else ""),
            span(now - (job.ended or job.started or job.created or now)),
            span(_took(job, now)),
            shortened(far(job.done, job.total, job.note), 100),
            shortened(f"{job.reason}: {job.error}" if job.reason else job.error, 100),
        )
        for job in found
    ]
    return table(
        ("job", "status", "worker", "attempts", "ago", "took", "progress", "error"),
        rows,
        right=("attempts", "ago", "took"),
    )


def _took(job: Job, now: float) -> float | None:
    """How long its last attempt ran, or has been running."""
    if job.started is None:
        return None
    if job.ended is not None:
        return job.ended - job.started
    return now - job.started if job.status is Status.RUNNING else None
