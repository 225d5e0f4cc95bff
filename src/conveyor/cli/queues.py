"""``conveyor queues``: what waits, what is at work, what is dead; and queues that nobody needs any more."""

from __future__ import annotations

import asyncio
import difflib
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter, validators

from conveyor.broker import QueueInfo
from conveyor.cli import EXIT_CODES
from conveyor.cli.connection import Where, connected
from conveyor.cli.terminal import FAILED, OK, Output, confirmed, out, safe, span, table
from conveyor.config import masked
from conveyor.core.words import counted
from conveyor.errors import BrokerError, ConfigurationError, QueueInUse

if TYPE_CHECKING:
    from rich.table import Table

HERE = Where()
PLAIN = Output()

command = App(
    name="queues",
    help_epilogue=f"""Examples:
  conveyor queues --broker sqlite:///shop.queue
  conveyor queues --app shop:app --watch
  conveyor queues --json | jq '.queues[] | select(.dead > 0) | .name'
  conveyor queues remove shop.old --dry-run

With --watch --json it prints one JSON document per line and look.

{EXIT_CODES}""",
)


@command.default
def queues(
    *,
    watch: bool = False,
    interval: Annotated[float, Parameter(validator=validators.Number(gte=0.1))] = 2.0,
    where: Where = HERE,
    output: Output = PLAIN,
) -> int:
    """Show every queue.

    Parameters:
        watch: Look again and again, until Ctrl-C.
        interval: Seconds from one look to the next. Default: 2.
    """
    return asyncio.run(_queues(where.url(), interval if watch else None, output))


@command.command(
    help="Remove queues for good, with their topics. Refused while somebody receives from them.",
    help_epilogue=f"""Examples:
  conveyor queues remove shop.old --dry-run
  conveyor queues remove shop.old shop.older --with-messages --with-dead --yes

A worker that still declares such a queue makes a new one when it starts.

{EXIT_CODES}""",
)
def remove(
    *names: Annotated[str, Parameter(name="NAME")],
    with_messages: bool = False,
    with_dead: bool = False,
    yes: bool = False,
    dry_run: bool = False,
    where: Where = HERE,
    output: Output = PLAIN,
) -> int:
    """Remove queues for good.

    Parameters:
        names: The queues.
        with_messages: Also where messages wait in them: these are lost.
        with_dead: Also where they have dead letters: these are lost.
        yes: Do not ask. Needed where nobody can be asked.
        dry_run: Only say what would go.
    """
    if not names:
        raise ConfigurationError("which queue? Give its name; conveyor queues lists them")
    if not (yes or dry_run) and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigurationError("removing cannot be undone: say --yes (or look first with --dry-run)")
    kept = _Kept(messages=not with_messages, dead=not with_dead)
    return asyncio.run(_remove(where.url(), dict.fromkeys(names), kept, output, dry_run=dry_run, ask=not yes))


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a queue may not take with it."""

    messages: bool
    dead: bool

    def check(self, queue: QueueInfo) -> None:
        """Raise BrokerError where its removal would take something that is to stay."""
        if queue.consumers:
            raise QueueInUse(queue.name, consumers=queue.consumers)
        if (messages := messages_of(queue)) and self.messages:
            raise BrokerError(
                f"the queue {queue.name!r} is not removed: {counted(messages, 'message')} in it would be lost; "
                "let workers handle them, carry them elsewhere with conveyor move, or say --with-messages"
            )
        if queue.dead and self.dead:
            raise BrokerError(
                f"the queue {queue.name!r} is not removed: {counted(queue.dead, 'dead letter')} of it would be lost; "
                "redrive or discard them with conveyor dead, or say --with-dead"
            )


async def _remove(url: str, names: Collection[str], kept: _Kept, output: Output, *, dry_run: bool, ask: bool) -> int:
    async with connected(url) as broker:
        there = {queue.name: queue for queue in await broker.queues()}
        for name in names:
            if name not in there:
                raise not_there(name, there)
            kept.check(there[name])
        chosen = [there[name] for name in names]
        lost = sum(map(messages_of, chosen)), sum(queue.dead for queue in chosen)
        what = (
            f"{counted(len(chosen), 'queue')} with {counted(lost[0], 'message')} and {counted(lost[1], 'dead letter')}"
        )
        removed: list[str] = []
        if not dry_run and (not ask or await asyncio.to_thread(confirmed, f"remove {what} for good?")):
            for name in names:
                await broker.remove(name, discard_dead=not kept.dead)
                removed.append(name)
    if output.json:
        output.document(
            {"matched": list(names), "removed": removed, "messages": lost[0], "dead": lost[1], "dry_run": dry_run}
        )
    else:
        output.say(f"{what} would be removed" if dry_run else f"{what} removed" if removed else "nothing removed")
    return OK if removed or dry_run else FAILED


def messages_of(queue: QueueInfo) -> int:
    """What a queue holds, without its dead letters."""
    return queue.ready + queue.in_flight + queue.delayed


def not_there(name: str, names: Collection[str]) -> BrokerError:
    """What to say of a queue that does not exist: a typing error must not look like good news."""
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names) or 'none'}"
    return BrokerError(f"there is no queue {name!r}; {hint}")


async def _queues(url: str, interval: float | None, output: Output) -> int:
    async with connected(url) as broker:
        if interval is None:
            found = await broker.queues()
            if output.json:
                output.document(as_json(url, found))
            elif found:
                out().print(as_table(found))
            else:
                output.say(f"{masked(url)} has no queues yet; conveyor run APP declares them")
            return OK
        if output.json:
            while True:
                output.line(as_json(url, await broker.queues()))
                await asyncio.sleep(interval)
        from rich.live import Live

        with Live(as_table(await broker.queues()), console=out(), auto_refresh=False, screen=out().is_terminal) as live:
            while True:
                await asyncio.sleep(interval)
                live.update(as_table(await broker.queues()), refresh=True)


def as_json(url: str, found: Sequence[QueueInfo]) -> dict[str, Any]:
    """What --json prints."""
    return {
        "broker": masked(url),
        "queues": [
            {
                "name": queue.name,
                "topics": list(queue.topics),
                "ready": queue.ready,
                "in_flight": queue.in_flight,
                "delayed": queue.delayed,
                "dead": queue.dead,
                "oldest_seconds": queue.oldest_seconds,
                "consumers": queue.consumers,
            }
            for queue in found
        ],
    }


def as_table(found: Sequence[QueueInfo]) -> Table:
    """What people see; what needs a look is in colour."""
    numbers = ("ready", "in flight", "delayed", "dead", "oldest", "consumers")
    rows = [
        (
            safe(queue.name, "bold"),
            f"{queue.ready:,}",
            f"{queue.in_flight:,}",
            f"{queue.delayed:,}",
            safe(f"{queue.dead:,}", "red" if queue.dead else ""),
            span(queue.oldest_seconds),
            safe(
                "?" if queue.consumers is None else f"{queue.consumers:,}",
                "yellow" if queue.consumers == 0 and (queue.ready or queue.delayed) else "",
            ),
            ", ".join(queue.topics),
        )
        for queue in found
    ]
    return table(("queue", *numbers, "topics"), rows, right=numbers)
