"""``conveyor queues``: what waits, what is at work, what is dead."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter, validators

from conveyor.broker import QueueInfo
from conveyor.cli import EXIT_CODES
from conveyor.cli.connection import Where, connected
from conveyor.cli.terminal import OK, Output, out, safe, span, table
from conveyor.config import masked

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
