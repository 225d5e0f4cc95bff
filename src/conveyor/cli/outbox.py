"""``conveyor outbox``: see and mend what is parked in an app's outbox, because the broker refuses it."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import App, Parameter, validators

from conveyor.cli import EXIT_CODES
from conveyor.cli.application import load_app
from conveyor.cli.terminal import FAILED, OK, Output, confirmed, moment, out, payload_text, safe, shortened, span
from conveyor.core.words import counted
from conveyor.errors import ConfigurationError

if TYPE_CHECKING:
    from conveyor.runtime.ledger import Ledger
    from conveyor.runtime.outbox import Row

CHUNK: Final = 500
"""Rows per step, so that memory stays flat."""
PLAIN = Output()

command = App(
    name="outbox",
    help_epilogue=f"""Examples:
  conveyor outbox list shop:app
  conveyor outbox retry shop:app --id 0199a1b2-…
  conveyor outbox retry shop:app --all
  conveyor outbox discard shop:app --id 0199a1b2-… --yes

An event that the broker refuses again and again (it is too large, say) is
parked in the app's database: it stays there, and so do later ones of its key.
Mend what the error names, then retry. Running workers send what is retried.

{EXIT_CODES}""",
)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Which:
    """Which parked events are meant.

    Parameters:
        id: The event with this id; may be given several times.
        everything: Every parked event there is.
    """

    id: tuple[str, ...] = ()
    everything: Annotated[bool, Parameter(name="--all")] = False

    def check(self, verb: str) -> None:
        """Refuse what names nothing, or twice.

        Raises:
            ConfigurationError: says what to give instead.
        """
        if not self.id and not self.everything:
            raise ConfigurationError(f"{verb} what? Give --id, or --all for every parked event")
        if self.id and self.everything:
            raise ConfigurationError("--all means every parked event; leave it out, or leave --id out")


NONE = Which()


@command.command(name="list", help="List parked events, oldest first, and how much waits.")
def list_(
    app: str,
    /,
    *,
    limit: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 50,
    database: str | None = None,
    output: Output = PLAIN,
) -> int:
    """List parked events, oldest first.

    Parameters:
        app: The app, as module:attribute.
        limit: So many at most. Default: 50.
        database: The ledger's SQLAlchemy URL. Default: the app's, else $CONVEYOR_DATABASE, else conveyor.toml's.
    """
    return asyncio.run(_list(app, database, limit, output))


@command.command(help="Have parked events sent again, with their refusals forgotten.")
def retry(app: str, /, *, which: Which = NONE, database: str | None = None, output: Output = PLAIN) -> int:
    """Have parked events sent again.

    Parameters:
        app: The app, as module:attribute.
        database: The ledger's SQLAlchemy URL. Default: the app's, else $CONVEYOR_DATABASE, else conveyor.toml's.
    """
    which.check("retry")
    return asyncio.run(_act(app, database, which, output, verb="retry"))


@command.command(help="Delete parked events for good: nobody will ever receive them.")
def discard(
    app: str, /, *, which: Which = NONE, yes: bool = False, database: str | None = None, output: Output = PLAIN
) -> int:
    """Delete parked events for good.

    Parameters:
        app: The app, as module:attribute.
        yes: Do not ask. Needed where nobody can be asked.
        database: The ledger's SQLAlchemy URL. Default: the app's, else $CONVEYOR_DATABASE, else conveyor.toml's.
    """
    which.check("discard")
    if not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigurationError("discarding cannot be undone: say --yes (or look first with conveyor outbox list)")
    return asyncio.run(_act(app, database, which, output, verb="discard", ask=not yes))


@asynccontextmanager
async def _ledger(path: str, database: str | None) -> AsyncIterator[Ledger]:
    """The ledger of an app, open."""
    app = load_app(path, database=database)
    ledger = app.new_ledger(uuid.uuid4().hex)
    if ledger is None:
        raise ConfigurationError(
            f"{app.name} has no database, and so no outbox; give --database URL, or set CONVEYOR_DATABASE"
        )
    try:
        await ledger.open()
        yield ledger
    finally:
        await ledger.close()


async def _list(path: str, database: str | None, limit: int, output: Output) -> int:
    async with _ledger(path, database) as ledger:
        found = await ledger.parked(limit + 1)
        pending = await ledger.pending()
    more, shown = len(found) > limit, found[:limit]
    if output.json:
        output.document(
            {
                "parked": [as_json(row) for row in shown],
                "more": more,
                "waiting": pending.rows - pending.parked,
                "oldest_seconds": pending.oldest_seconds,
            }
        )
        return OK
    now = time.time()
    for row in shown:
        message = row.message
        of_key = "" if message.key is None else f", key {shortened(message.key, 50)}"
        head = f"{shortened(message.id, 100)}  {shortened(message.topic, 100)}{of_key}"
        tail = f" refusals: {row.attempts}, created {span(now - message.created)} ago"
        out().print(safe(head, "bold"), safe(tail, "red"), soft_wrap=True)
        out().print(safe("    " + shortened(row.error, out().width - 4)), soft_wrap=True)
    output.say(f"{pending.parked:,} parked, {pending.rows - pending.parked:,} waiting")
    if more:
        output.note(f"there are more; --limit {limit * 10} shows more of them")
    return OK


async def _act(path: str, database: str | None, which: Which, output: Output, *, verb: str, ask: bool = False) -> int:
    done_word = {"retry": "retried", "discard": "discarded"}[verb]
    async with _ledger(path, database) as ledger:
        total = (await ledger.pending()).parked if which.everything else len(set(which.id))
        done = 0
        if total and (
            not ask or await asyncio.to_thread(confirmed, f"{verb} {counted(total, 'parked event')} for good?")
        ):
            done = await _chunks(ledger, which, total, verb)
    if output.json:
        output.document({"matched": total, done_word: done})
    elif not total:
        output.say("no parked event")
    else:
        output.say(f"{done:,} of {total:,} {done_word}")
    if done < total:
        output.note("conveyor outbox list shows what is parked")
    return OK if done >= total else FAILED


async def _chunks(ledger: Ledger, which: Which, total: int, verb: str) -> int:
    """Carry it out, chunk by chunk; never more than there were at first, because what is retried may be parked again."""
    act = ledger.unpark if verb == "retry" else ledger.discard
    if not which.everything:
        return await act(sorted(set(which.id)))
    left, done = total, 0
    while left > 0 and (rows := await ledger.parked(min(CHUNK, left))):
        done += await act([row.message.id for row in rows])
        left -= len(rows)
    return done


def as_json(row: Row) -> dict[str, Any]:
    """A parked event as --json prints it; the payload as text, bytes that are no UTF-8 escaped."""
    message = row.message
    return {
        "id": message.id,
        "topic": message.topic,
        "key": message.key,
        "refusals": row.attempts,
        "error": row.error,
        "created": moment(message.created),
        "correlation_id": message.correlation_id,
        "causation_id": message.causation_id,
        "content_type": message.content_type,
        "headers": dict(message.headers),
        "payload": payload_text(message.body),
    }
