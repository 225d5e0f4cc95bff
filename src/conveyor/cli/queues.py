"""``conveyor queues``: what waits, what is at work, what is dead; queues that shall rest, and those that nobody needs any more."""

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
from conveyor.core.pause import paused_in
from conveyor.core.words import counted
from conveyor.errors import BrokerError, ConfigurationError, QueueInUse
from conveyor.runtime.control import Operator, Paused, Status, internal, paused_queues

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
  conveyor queues pause shop.charge
  conveyor queues resume shop.charge
  conveyor queues remove shop.old --dry-run

With --watch --json it prints one JSON document per line and look. Of each
queue it tells name, topics, ready, in_flight, delayed, dead, oldest_seconds,
consumers and paused. What nobody can tell is null: paused where runners are
there and do not answer (where there is none, nothing is paused).

{EXIT_CODES}""",
)


@command.default
def queues(
    *,
    watch: bool = False,
    interval: Annotated[float, Parameter(validator=validators.Number(gte=0.1))] = 2.0,
    everything: Annotated[bool, Parameter(name="--all")] = False,
    where: Where = HERE,
    output: Output = PLAIN,
) -> int:
    """Show every queue.

    Parameters:
        watch: Look again and again, until Ctrl-C.
        interval: Seconds from one look to the next. Default: 2.
        everything: Also Conveyor's own queues, whose names begin with conveyor.
    """
    return asyncio.run(_queues(where.url(), interval if watch else None, output, everything=everything))


PAUSING = f"""What runs is finished; what was fetched and not begun goes back, uncounted.
Runners keep a pause among themselves: it lasts until conveyor queues resume, or
until none of them is left that knows it.

Fails where no runner answers: then nothing was changed. Those that were told and
have not confirmed it in time are named.

{EXIT_CODES}"""
Names = Annotated[str, Parameter(name="QUEUE")]


@command.command(
    help="Let no worker fetch from queues, until they are resumed.",
    help_epilogue=f"""Examples:
  conveyor queues pause shop.charge
  conveyor queues pause shop.charge shop.mail --app shop:app --json

{PAUSING}""",
)
def pause(*names: Names, where: Where = HERE, output: Output = PLAIN) -> int:
    """Let no worker fetch from queues.

    Parameters:
        names: The queues.
    """
    return _turned(names, where, output, paused=True)


@command.command(
    help="Let workers fetch again from queues that were paused.",
    help_epilogue=f"""Examples:
  conveyor queues resume shop.charge

Fails where no runner answers: then nothing was changed.

{EXIT_CODES}""",
)
def resume(*names: Names, where: Where = HERE, output: Output = PLAIN) -> int:
    """Let workers fetch again from queues that were paused.

    Parameters:
        names: The queues.
    """
    return _turned(names, where, output, paused=False)


def _turned(names: Sequence[str], where: Where, output: Output, *, paused: bool) -> int:
    if not names:
        raise ConfigurationError("which queue? Give its name; conveyor queues lists them")
    return asyncio.run(_turn(where.url(), list(dict.fromkeys(names)), output, paused=paused))


async def _turn(url: str, names: Sequence[str], output: Output, *, paused: bool) -> int:
    word = "paused" if paused else "going on"
    async with connected(url) as broker:
        there = [queue.name for queue in await broker.queues()]
        for name in names:
            if name not in there:
                raise not_there(name, there)
        async with Operator(broker) as operator:
            told = by_runner(await operator.hear_all())  # a decision has to be later than what they know
            answered: dict[str, Status] = {}
            if told:
                for name in names:
                    await operator.turn(name, paused=paused)
                answered = by_runner(await operator.hear_all())
    heeding = {
        name: [
            each for each in answered.values() if (name in paused_in(each.switches)) == paused and name in each.queues
        ]
        for name in names
    }
    silent = [each for runner, each in told.items() if runner not in answered]
    if output.json:
        output.document(
            {
                "queues": list(names),
                "paused": paused,
                "runners": len(answered),
                "working": {
                    name: [{"process": each.process, "pid": each.pid} for each in found]
                    for name, found in heeding.items()
                },
                "unconfirmed": [{"process": each.process, "pid": each.pid} for each in silent],
            }
        )
    elif told:
        for name, found in heeding.items():
            nobody = not found and not any(name in each.queues for each in silent)
            runners = (
                "no runner works on it now; those that do later will know" if nobody else counted(len(found), "runner")
            )
            output.say(f"{name} is {word}: {runners}")
    if silent:
        who = ", ".join(f"{each.process} (pid {each.pid})" for each in silent)
        output.note(f"told, and not confirmed yet: {who}; the same command asks again", "yellow")
    if not told:
        output.note("no runner answers, and only runners keep a pause: nothing was changed", "red")
    return OK if told else FAILED


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


def by_runner(statuses: Sequence[Status]) -> dict[str, Status]:
    """The same, by what names a runner among all."""
    return {status.runner: status for status in statuses}


def messages_of(queue: QueueInfo) -> int:
    """What a queue holds, without its dead letters."""
    return queue.ready + queue.in_flight + queue.delayed


def not_there(name: str, names: Collection[str]) -> BrokerError:
    """What to say of a queue that does not exist: a typing error must not look like good news."""
    names = [each for each in names if not internal(each)]
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names) or 'none'}"
    return BrokerError(f"there is no queue {name!r}; {hint}")


async def _queues(url: str, interval: float | None, output: Output, *, everything: bool) -> int:
    async with connected(url) as broker:

        async def look() -> tuple[list[QueueInfo], Paused]:
            paused = await paused_queues(broker)
            return [queue for queue in await broker.queues() if everything or not internal(queue.name)], paused

        if interval is None:
            found, paused = await look()
            if output.json:
                output.document(as_json(url, found, paused))
            elif found:
                out().print(as_table(found, paused))
            else:
                output.say(f"{masked(url)} has no queues yet; conveyor run APP declares them")
            return OK
        if output.json:
            while True:
                output.line(as_json(url, *await look()))
                await asyncio.sleep(interval)
        from rich.live import Live

        with Live(as_table(*await look()), console=out(), auto_refresh=False, screen=out().is_terminal) as live:
            while True:
                await asyncio.sleep(interval)
                live.update(as_table(*await look()), refresh=True)


def as_json(url: str, found: Sequence[QueueInfo], paused: Paused) -> dict[str, Any]:
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
                "paused": None if paused is None else queue.name in paused,
            }
            for queue in found
        ],
    }


def as_table(found: Sequence[QueueInfo], paused: Paused) -> Table:
    """What people see; what needs a look is in colour."""
    numbers = ("ready", "in flight", "delayed", "dead", "oldest", "consumers")
    rows = [
        (
            safe(f"{queue.name} (paused)", "bold yellow") if queue.name in (paused or ()) else safe(queue.name, "bold"),
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
