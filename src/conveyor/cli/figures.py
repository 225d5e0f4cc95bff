"""What `conveyor top` says of queues, runners and errors: in columns that fit the terminal, and in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from rich.text import Text

from conveyor.cli.terminal import moment, safe, shortened, span
from conveyor.cli.top import QueueRow, RunnerRow
from conveyor.runtime.control import Failure

SIZES: Final = ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"))
WIDE: Final = 110
"""Columns of a terminal from which on there is room for all that there is to see."""
SHARES: Final = (4, 3, 3)
"""How the lines are shared where the tables want more than there are: queues, runners, errors."""


def brief(number: int) -> str:
    """A count in at most six characters."""
    if number < 100_000:
        return f"{number:,}"
    size, letter = next(((size, letter) for size, letter in SIZES if number < 999.5 * size), SIZES[-1])
    whole = number / size
    return f"{whole:.1f}{letter}" if whole < 99.95 else f"{whole:.0f}{letter}"


def brief_rate(rate: float) -> str:
    """Something in a second, in at most six characters."""
    if rate == 0:
        return "-"
    return f"{rate:.2f}" if rate < 1 else f"{rate:.1f}" if rate < 1_000 else brief(round(rate))


def brief_span(seconds: float | None) -> str:
    """A duration in at most six characters: its largest unit."""
    if seconds is not None and 0.9995 <= seconds < 1:
        seconds = 1.0
    return " ".join(span(seconds).split()[:2])


def brief_bytes(number: int) -> str:
    """Memory in at most seven characters."""
    if number < 999_500_000:
        return f"{number / 1e6:.0f} MB"
    return f"{number / 1e9:.1f} GB" if number < 99_950_000_000 else f"{number / 1e9:.0f} GB"


def in_middle(text: str, columns: int) -> str:
    """A text on one line, cut in its middle to so many characters: names differ at both ends."""
    line = shortened(text, max(columns, len(text) + 1))
    if len(line) <= columns:
        return line
    head = (columns - 1) // 2
    return f"{line[:head]}…{line[len(line) - (columns - 1 - head) :]}"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Parameters:
        width: characters, without the gap behind; 0 shares what is left.
        right: it holds numbers.
        cut: makes a text fit.
        least: columns of the terminal from which on it is there: in a small one, what matters less gives way.
    """

    label: str
    width: int = 0
    right: bool = False
    cut: Callable[[str, int], str] = shortened
    least: int = 0


def widths(columns: Sequence[Column], texts: Sequence[Sequence[str]], room: int) -> list[int]:
    """How wide each column is: the fixed ones as they say; of the others each gets what it needs, and the last of them the rest.

    Parameters:
        texts: of each row, in the order of the columns.
        room: characters of a line.
    """
    left = room - sum(column.width + 1 for column in columns)
    found = [column.width for column in columns]
    flexible = [place for place, column in enumerate(columns) if not column.width]
    for turn, place in enumerate(flexible):
        needed = max((len(row[place]) for row in texts), default=0)
        needed = max(needed, len(columns[place].label))
        others = len(flexible) - turn - 1
        found[place] = max(1, left if not others else min(needed, left * 2 // (others + 2)))
        left -= found[place]
    return found


def heights(room: int, wanted: Sequence[int]) -> list[int]:
    """How many lines each table gets: as many as it wants, or else its share; what is left goes to the last one.

    Parameters:
        room: lines that there are.
        wanted: by each.
    """
    found = [0] * len(wanted)
    short = dict(enumerate(SHARES[: len(wanted)]))
    while short:
        left, parts = room - sum(found), sum(short.values())
        content = [place for place, share in short.items() if wanted[place] * parts <= left * share]
        for place in content:
            found[place] = wanted[place]
            del short[place]
        if not content:  # whole lines first, then those with the largest rest
            rests = sorted(short, key=lambda place: -(left * short[place] % parts))
            for place, share in short.items():
                found[place] = left * share // parts
            for place in rests[: room - sum(found)]:
                found[place] += 1
            return found
    found[-1] += room - sum(found)
    return found


def fitted(cell: str | Text, column: Column, width: int, style: str = "") -> Text:
    """A cell, cut and aligned as its column has it."""
    text, style = (cell.plain, str(cell.style)) if isinstance(cell, Text) else (cell, style)
    line = column.cut(text, width)
    return Text((line.rjust(width) if column.right else line.ljust(width)) + " ", style)


QUEUES: Final = (
    Column("QUEUE", cut=in_middle),
    Column("ready", 6, right=True),
    Column("in flight", 9, right=True, least=50),
    Column("delayed", 7, right=True, least=70),
    Column("dead", 6, right=True),
    Column("oldest", 6, right=True, least=60),
    Column("rate/s", 6, right=True),
    Column("failed", 6, right=True, least=70),
    Column("retried", 7, right=True, least=80),
    Column("workers", least=WIDE),
)
RUNNERS: Final = (
    Column("RUNNER", cut=in_middle),
    Column("pid", 7, right=True, least=WIDE),
    Column("app", 12, cut=in_middle, least=WIDE),
    Column("rate/s", 6, right=True),
    Column("in flight", 9, right=True, least=60),
    Column("failed", 6, right=True, least=50),
    Column("retried", 7, right=True, least=WIDE),
    Column("memory", 7, right=True, least=70),
    Column("health"),
)
ERRORS: Final = (
    Column("LATEST", 8),
    Column("worker", 14, cut=in_middle),
    Column("attempt", 7, right=True, least=60),
    Column("queue", 24, cut=in_middle, least=WIDE),
    Column("error"),
)


def queue_cells(row: QueueRow) -> Sequence[str | Text]:
    """A queue's row."""
    return (
        safe(row.name, "yellow" if row.paused else ""),
        brief(row.ready),
        brief(row.in_flight),
        brief(row.delayed),
        safe(brief(row.dead), "red" if row.dead else ""),
        brief_span(row.oldest_seconds),
        safe("paused", "yellow") if row.paused else brief_rate(row.rate),
        safe(brief(row.failed), "red" if row.failed else ""),
        brief(row.retried),
        ", ".join(row.workers),
    )


def runner_cells(row: RunnerRow) -> Sequence[str | Text]:
    """A runner's row."""
    status = row.status
    return (
        status.process,
        str(status.pid),
        status.app,
        brief_rate(row.rate),
        brief(sum(worker.in_flight for worker in status.workers)),
        brief(sum(worker.failed for worker in status.workers)),
        brief(sum(worker.retried for worker in status.workers)),
        brief_bytes(status.resident_bytes),
        safe(row.health, "" if row.well else "red" if row.silent_seconds or status.health.unhealthy else "yellow"),
    )


def failure_cells(failure: Failure) -> Sequence[str | Text]:
    """An error's row."""
    return (
        datetime.fromtimestamp(failure.at).astimezone().strftime("%H:%M:%S"),
        failure.worker,
        safe("dead", "red") if failure.dead else str(failure.attempt),
        failure.queue,
        failure.error.split("\n", 1)[0],
    )


Texts = tuple[str, str]
"""What is wrapped, and the lines below it, which are not."""


def runner_text(row: RunnerRow) -> Texts:
    """All of a runner."""
    status = row.status
    facts = [
        f"runner      {status.runner} of {status.app}",
        f"process     {status.process}, pid {status.pid} on {status.host}",
        f"started     {moment(status.started)}",
        f"memory      {brief_bytes(status.resident_bytes)}",
        f"health      {row.health}",
        *(f"note        {note}" for note in status.health.notes),
        "",
    ]
    longest = max((len(each.name) for each in status.workers), default=0)
    width = min(20, max(longest, len("worker")))
    columns = f"{'worker':<{width}}   done failed retried   dead in flight  queue"
    workers = [
        f"{in_middle(each.name, width):<{width}} {brief(each.handled):>6} {brief(each.failed):>6} {brief(each.retried):>7} "
        f"{brief(each.dead):>6} {brief(each.in_flight):>9}  {each.queue}{' (paused)' if each.paused else ''}"
        for each in status.workers
    ]
    return "\n".join(facts), "\n".join((columns, *workers))


def queue_text(row: QueueRow) -> Texts:
    """All of a queue."""
    text = "\n".join(
        (
            f"queue       {row.name}{' (paused)' if row.paused else ''}",
            f"workers     {', '.join(row.workers) or 'none is running'}",
            f"ready       {row.ready:,}"
            + ("" if row.oldest_seconds is None else f", the oldest for {span(row.oldest_seconds)}"),
            f"in flight   {row.in_flight:,}",
            f"delayed     {row.delayed:,}",
            f"dead        {row.dead:,}",
            f"rate        {row.rate:,.2f} in a second",
            f"failed      {row.failed:,}, of which {row.retried:,} are tried again",
        )
    )
    return text, ""


def failure_text(failure: Failure) -> Texts:
    """All of an error."""
    became = "it became a dead letter" if failure.dead else "it is tried again"
    text = (
        f"message     {failure.message_id}\nqueue       {failure.queue}\nworker      {failure.worker}\n"
        f"at          {moment(failure.at)}\nattempt     {failure.attempt}; {became}\n\n{failure.error}\n"
    )
    return text, failure.traceback
