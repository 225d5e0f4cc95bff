"""``conveyor trace``: the journey of a message."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import App, Parameter

from conveyor.cli import EXIT_CODES
from conveyor.cli.asking import Kept
from conveyor.cli.terminal import FAILED, OK, Output, moment, out, safe, shortened, span
from conveyor.core.journal import NOWHERE, Entry, Kind, Stop, stops
from conveyor.core.questions import Answer, JourneyOf
from conveyor.core.words import counted, far
from conveyor.errors import ConfigurationError
from conveyor.runtime.journal import LONGEST_NOTE
from conveyor.runtime.logs import printable

if TYPE_CHECKING:
    from rich.text import Text

HERE = Kept()
PLAIN = Output()
STYLES: Final = {
    Kind.SUCCEEDED: "green",
    Kind.RETRIED: "yellow",
    Kind.DEAD: "red",
    Kind.CANCELLED: "magenta",
    Kind.PUBLISHED: "",
}
TIMES: Final = ("at", "started", "due")
DEEPEST: Final = 20
"""Hops that are indented; a journey may have thousands."""

command = App(
    name="trace",
    help_epilogue=f"""Examples:
  conveyor trace 0199a1b2-… --app shop:app
  conveyor trace 0199a1b2 --broker redis://localhost
  conveyor trace 0199a1b2 --file shop.queue.journal
  conveyor trace 0199a1b2 --json | jq '.messages[].entries[] | select(.error)'

The id is a message's, or a journey's (the correlation id, which every message
on it carries); its beginning is enough where only one journey begins so. It
asks whoever keeps the journal on the broker; where nobody does, it reads the
file.

{EXIT_CODES}""",
)


@command.default
def trace(
    message_id: Annotated[str, Parameter(name="ID")],
    /,
    *,
    where: Kept = HERE,
    output: Output = PLAIN,
) -> int:
    """Show everything that happened on the journey of a message.

    Parameters:
        message_id: The message's id, or the journey's, or the beginning of one.
    """
    if not message_id:
        raise ConfigurationError("trace which message? Give its id, or the beginning of it; conveyor jobs lists ids")
    answer = asyncio.run(where.answer(JourneyOf(message_id), output))
    if output.json:
        output.document(as_json(answer))
    elif answer.entries:
        for line in as_text(answer, message_id):
            out().print(line, soft_wrap=True)
    if answer.others:
        output.note(f"{printable(message_id)} may mean several journeys; write more of it:", "yellow")
        for other in answer.others:
            output.note(f"  {printable(other)}")
        return FAILED
    if not answer.entries:
        output.note(
            f"the journal knows nothing of {printable(message_id)}: it is too old, or was never published here", "red"
        )
        return FAILED
    if answer.more:
        output.note(f"these are {counted(len(answer.entries), 'entry', 'entries')} of it; there are more", "yellow")
    return OK


# --- JSON -----------------------------------------------------------------------------------------------------------------


def as_json(answer: Answer) -> dict[str, Any]:
    """What --json prints; messages come behind their causes."""
    messages = [
        {
            "id": stop.message_id,
            "topic": stop.topic,
            "caused_by": next((entry.causation_id for entry in stop.entries if entry.causation_id), None),
            "entries": [_entry(entry) for entry in stop.entries],
        }
        for stop, _ in _walk(stops(answer.entries))
    ]
    journey = answer.entries[0].journey if answer.entries else None
    return {"journey": journey, "messages": messages, "more": answer.more, "others": list(answer.others)}


def _entry(entry: Entry) -> dict[str, Any]:
    """What there is to tell; what is empty is left out."""
    empty = dict(zip(reversed(entry.__struct_fields__), reversed(entry.__struct_defaults__), strict=False))
    known = {name: getattr(entry, name) for name in entry.__struct_fields__}
    known = {name: value for name, value in known.items() if name not in empty or value != empty[name]}
    for name in ("message_id", "topic", "correlation_id", "causation_id"):
        known.pop(name, None)
    return known | {name: _moment(known[name]) for name in TIMES if name in known} | {"kind": entry.kind.value}


# --- text -----------------------------------------------------------------------------------------------------------------


def as_text(answer: Answer, asked: str) -> Iterator[Text]:
    """What people see: a tree of messages, under each what happened to it."""
    first, last = answer.entries[0], answer.entries[-1]
    ids = {entry.message_id for entry in answer.entries}
    # A whole id is not the beginning of another one: order-1 is not order-10.
    meant = {asked} if asked in (*ids, first.journey) else {id for id in ids if id.startswith(asked)}
    over = f"{counted(len(ids), 'message')}, {span(last.at - first.at)} from {_moment(first.at)}"
    yield safe(printable(f"journey {first.journey}: {over}"), "bold")
    for stop, depth in _walk(stops(answer.entries)):
        indent = "   " * min(depth, DEEPEST)
        yield safe("")
        mark = "  ← you asked for it" if stop.message_id in meant and depth else ""
        yield safe(printable(f"{indent}{stop.topic} {stop.message_id}{mark}"), "bold")
        for entry, line in told(stop):
            yield safe(printable(f"{indent}  {_moment(entry.at)}  {line}"), STYLES.get(entry.kind, "cyan"))
            for more in entry.error.splitlines():
                yield safe(f"{indent}  {'':24}    {more}", STYLES.get(entry.kind, ""))


def told(stop: Stop) -> Iterator[tuple[Entry, str]]:
    """What happened at a stop, in words; an attempt whose end is known is told by its end alone."""
    # The same attempt begins again where it was given back, uncounted: only an end behind an entry is its end.
    ended = {
        (e.worker, e.attempt, e.crashes): e.at for e in stop.entries if e.kind not in (Kind.STARTED, Kind.PROGRESSED)
    }
    latest = {e.worker: e for e in stop.entries if e.kind is not Kind.PUBLISHED}
    progress = {(e.worker, e.attempt): e for e in stop.entries if e.kind is Kind.PROGRESSED}
    for entry in stop.entries:
        over = ended.get((entry.worker, entry.attempt, entry.crashes), -inf) >= entry.at
        if entry.kind is Kind.STARTED and not over:
            running = latest[entry.worker].attempt == entry.attempt and latest[entry.worker].crashes == entry.crashes
            said = "is running" if running else "began; its end is not known (its process died?)"
            yield entry, f"{entry.worker}: attempt {entry.attempt} {said}{_where(entry)}"
        elif entry.kind is Kind.PROGRESSED and not over and entry is progress[entry.worker, entry.attempt]:
            yield entry, f"{entry.worker}: {shortened(far(entry.done, entry.total, entry.note), LONGEST_NOTE)}"
        elif entry.kind not in (Kind.STARTED, Kind.PROGRESSED):
            yield entry, _line(entry)


def _line(entry: Entry) -> str:
    took = "" if entry.started is None else _span(entry.at - entry.started)
    attempt = f"{entry.worker}: attempt {entry.attempt}"
    match entry.kind:
        case Kind.PUBLISHED:
            said = f"published by {entry.worker}" if entry.worker else "published"
            said += f", due {_moment(entry.due)}" if entry.due else ""
            said += "; no queue received it" if entry.reason == NOWHERE else ""
        case Kind.SUCCEEDED:
            said = f"{attempt} succeeded in {took}"
        case Kind.DUPLICATE:
            said = f"{entry.worker}: a duplicate; it had been done before"
        case Kind.RETRIED:
            said = f"{attempt} failed after {took}, again at {_moment(entry.due)}"
        case Kind.RELEASED:
            said = f"{attempt} was given back after {took}, uncounted"
        case Kind.CANCELLED:
            said = f"{entry.worker}: cancelled" + (f" after {took}" if took else "")
        case Kind.DEAD:
            said = f"{attempt} failed after {took}" if took else f"{entry.worker}"
            said += f": dead letter ({entry.reason})"
        case Kind.CANCELLING:
            said = "somebody wants it cancelled"
        case Kind.REDRIVEN:
            said = f"somebody put it back into {entry.queue}"
        case _:
            said = entry.kind.value
    crashes = f" (after {counted(entry.crashes, 'crash', 'crashes')})" if entry.crashes else ""
    unkept = f"; {shortened(entry.unkept, LONGEST_NOTE)}" if entry.unkept else ""
    return f"{said}{crashes}{unkept}{_where(entry)}"


def _where(entry: Entry) -> str:
    return f"  [{entry.process}]" if entry.process else ""


def _walk(tree: Sequence[Stop]) -> Iterator[tuple[Stop, int]]:
    """Every stop with its depth, causes first."""
    waiting = [(stop, 0) for stop in reversed(tree)]
    while waiting:
        stop, depth = waiting.pop()
        yield stop, depth
        waiting.extend((each, depth + 1) for each in reversed(stop.leads_to))


def _span(seconds: float) -> str:
    """More exactly than span(): attempts are short."""
    return (
        f"{max(0.0, seconds) * 1000:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s" if seconds < 60 else span(seconds)
    )


def _moment(unix_seconds: float) -> str:
    return moment(unix_seconds, "milliseconds")
