"""``conveyor dead``: list, show, redrive and discard dead letters."""

from __future__ import annotations

import asyncio
import difflib
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from cyclopts import App, Parameter, validators

from conveyor.broker import Broker, DeadFilter, DeadLetter
from conveyor.cli import EXIT_CODES
from conveyor.cli.connection import Where, connected
from conveyor.cli.queues import not_there
from conveyor.cli.terminal import FAILED, OK, Output, confirmed, moment, out, payload_text, safe, shortened, span
from conveyor.core.settle import Reason
from conveyor.core.words import counted
from conveyor.errors import BrokerError, ConfigurationError
from conveyor.runtime.journal import journals_to_tell
from conveyor.runtime.journal import redrive as put_back

CHUNK: Final = 500
"""Dead letters per step: many enough that commits cost little, few enough that the bar moves and memory stays flat."""
OF_RABBITMQ: Final = ("maxlen", "delivery_limit")
"""Reasons that RabbitMQ itself writes, besides rejected and expired (rabbitmq.com/docs/dlx, x-death)."""
REASONS_LOOKED_AT: Final = 10_000
"""Dead letters that are looked through for the reasons that other programs gave."""
HERE = Where()
PLAIN = Output()

EXAMPLES = """Examples:
  conveyor dead list --broker sqlite:///shop.queue --queue shop.charge
  conveyor dead show 0199a1b2-… --app shop:app
  conveyor dead redrive --error timeout --dry-run
  conveyor dead redrive --all
  conveyor dead discard --reason invalid --yes
"""

command = App(name="dead", help_epilogue=f"{EXAMPLES}\n{EXIT_CODES}")


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Which:
    """Which dead letters are meant; several filters must all fit.

    Parameters:
        queue: Only those of this queue.
        id: Only those of the message with this id.
        reason: Only those given up for this reason: rejected, exhausted, invalid, crashed or expired.
        error: Only those whose error contains this text (any case).
    """

    queue: str | None = None
    id: str | None = None
    reason: str | None = None
    error: str | None = None

    def filter(self) -> DeadFilter:
        """The same for a broker."""
        return DeadFilter(queue=self.queue, id=self.id, reason=self.reason, error=self.error)

    @property
    def everything(self) -> bool:
        """Nothing restricts it."""
        return self.filter() == DeadFilter()


ANY = Which()


@command.command(name="list", help="List dead letters, oldest first.")
def list_(
    *,
    which: Which = ANY,
    limit: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 50,
    where: Where = HERE,
    output: Output = PLAIN,
) -> int:
    """List dead letters, oldest first.

    Parameters:
        limit: So many at most. Default: 50.
    """
    return asyncio.run(_list(where.url(), which, limit, output))


@command.command(help="Show a dead letter whole: its error, its traceback, its payload.")
def show(
    message_id: Annotated[str, Parameter(name="ID")],
    /,
    *,
    queue: str | None = None,
    where: Where = HERE,
    output: Output = PLAIN,
) -> int:
    """Show a dead letter whole.

    Parameters:
        message_id: The message's id.
        queue: Only the one of this queue.
    """
    return asyncio.run(_show(where.url(), message_id, queue, output))


@command.command(help="Put dead letters back into their queues, with all counts at zero.")
def redrive(
    *,
    which: Which = ANY,
    everything: Annotated[bool, Parameter(name="--all")] = False,
    dry_run: bool = False,
    where: Where = HERE,
    output: Output = PLAIN,
) -> int:
    """Put dead letters back into their queues.

    Parameters:
        everything: Every dead letter there is; needed where no filter is given.
        dry_run: Only say how many.
    """
    _guard(which, everything=everything, verb="redrive")
    return asyncio.run(_act(where.url(), which, output, verb="redrive", dry_run=dry_run))


@command.command(help="Delete dead letters for good.")
def discard(
    *,
    which: Which = ANY,
    everything: Annotated[bool, Parameter(name="--all")] = False,
    yes: bool = False,
    dry_run: bool = False,
    where: Where = HERE,
    output: Output = PLAIN,
) -> int:
    """Delete dead letters for good.

    Parameters:
        everything: Every dead letter there is; needed where no filter is given.
        yes: Do not ask. Needed where nobody can be asked.
        dry_run: Only say how many.
    """
    _guard(which, everything=everything, verb="discard")
    if not (yes or dry_run) and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigurationError("discarding cannot be undone: say --yes (or look first with --dry-run)")
    return asyncio.run(_act(where.url(), which, output, verb="discard", dry_run=dry_run, ask=not yes))


def _guard(which: Which, *, everything: bool, verb: str) -> None:
    if which.everything and not everything:
        raise ConfigurationError(
            f"{verb} what? Give --queue, --id, --reason or --error, or --all for every dead letter"
        )
    if everything and not which.everything:
        raise ConfigurationError("--all means every dead letter; leave it out, or leave the filters out")


async def _list(url: str, which: Which, limit: int, output: Output) -> int:
    async with connected(url) as broker:
        await _known(broker, which)
        found = [letter async for letter in letters(broker, which.filter(), limit + 1)]
        if not found:
            await _known_reason(broker, which)
    more = len(found) > limit
    shown = found[:limit]
    if output.json:
        output.document({"dead": [as_json(letter) for letter in shown], "more": more})
        return OK
    if not shown:
        output.say("no dead letter" + ("" if which.everything else " fits"))
        return OK
    now = time.time()
    for letter in shown:
        head = f"{shortened(letter.message.id, 100)}  {letter.queue}"
        tail = f" {letter.reason}, {span(now - letter.died)} ago, attempts: {attempts_of(letter)}"
        out().print(safe(head, "bold"), safe(tail, "red"), soft_wrap=True)
        out().print(safe("    " + shortened(letter.error, out().width - 4)), soft_wrap=True)
    if more:
        output.note(f"there are more; --limit {limit * 10} shows more of them, and filters show fewer")
    return OK


async def _show(url: str, message_id: str, queue: str | None, output: Output) -> int:
    async with connected(url) as broker:
        found = [letter async for letter in letters(broker, DeadFilter(id=message_id, queue=queue), CHUNK)]
    if not found:
        raise BrokerError(f"there is no dead letter with the id {message_id!r}; conveyor dead list shows what there is")
    if output.json:
        output.document({"dead": [as_json(letter) for letter in found]})
        return OK
    for letter in found:
        _print(letter, output)
    return OK


def _print(letter: DeadLetter, output: Output) -> None:
    message = letter.message
    facts = {
        "id": message.id,
        "queue": letter.queue,
        "topic": message.topic,
        "key": message.key,
        "reason": letter.reason,
        "died": moment(letter.died),
        "created": moment(message.created),
        "attempts": f"{attempts_of(letter)} of the handler, {counted(letter.deliveries, 'delivery', 'deliveries')}",
        "caused by": message.causation_id,
        "journey": message.correlation_id,
        "content": message.content_type,
        **{f"header {name}": value for name, value in message.headers.items()},
    }
    for name, value in facts.items():
        if value is not None:
            output.say(f"{name:<11} {shortened(value, 1_000)}")
    output.say(f"error       {letter.error}", "red")
    if letter.traceback:
        output.say(letter.traceback.rstrip("\n"), "dim")
    output.say(f"payload     {payload_text(message.body)}\n")


async def _act(url: str, which: Which, output: Output, *, verb: str, dry_run: bool, ask: bool = False) -> int:
    done_word = {"redrive": "redriven", "discard": "discarded"}[verb]
    async with connected(url) as broker:
        await _known(broker, which)
        counts = Counter[tuple[str, str]]()
        async for letter in letters(broker, which.filter(), None):
            counts[letter.queue, letter.reason] += 1
        total = counts.total()
        if not total:
            await _known_reason(broker, which)
        if (
            not dry_run
            and total
            and (not ask or await asyncio.to_thread(confirmed, f"{verb} {counted(total, 'dead letter')} for good?"))
        ):
            done = await _chunks(broker, which.filter(), total, verb, output)
        else:
            done = 0
    if output.json:
        found = [
            {"queue": queue, "reason": reason, "count": count} for (queue, reason), count in sorted(counts.items())
        ]
        output.document({"matched": total, done_word: done, "dry_run": dry_run, "by": found})
    elif not total:
        output.say("no dead letter" + ("" if which.everything else " fits"))
    else:
        for (queue, reason), count in sorted(counts.items()):
            output.say(f"{count:>9,}  {queue}  {reason}")
        output.say(f"{total:,} would be {done_word}" if dry_run else f"{done:,} of {total:,} {done_word}")
    if not total and which.id is not None:
        return FAILED
    return OK if dry_run or done == total else FAILED


async def _chunks(broker: Broker, which: DeadFilter, total: int, verb: str, output: Output) -> int:
    with output.progress() as bar:
        task = bar.add_task(verb, total=total)

        def advance(number: int) -> None:
            bar.advance(task, number)

        if verb == "redrive":
            return await redrive_all(broker, which, total, advance)
        return await carry_out(broker, broker.discard, which, total, advance)


async def redrive_all(
    broker: Broker, which: DeadFilter, total: int, advance: Callable[[int], object] = lambda _: None
) -> int:
    """Put dead letters back, as carry_out(), and tell the journals."""
    apps = await journals_to_tell(broker)
    return await carry_out(broker, lambda letters: put_back(broker, letters, apps, time.time), which, total, advance)


async def carry_out(
    broker: Broker,
    act: Callable[[Sequence[DeadLetter]], Awaitable[int]],
    which: DeadFilter,
    total: int,
    advance: Callable[[int], object] = lambda _: None,
) -> int:
    """Redrive or discard dead letters, chunk by chunk; of how many it was true.

    Parameters:
        total: how many there were at first, and never more: what is redriven may die again.
        advance: called with how many have been dealt with since the last time.
    """
    left, done, after = total, 0, None
    while left > 0:
        page = await broker.dead_letters(which, limit=min(CHUNK, left), after=after)
        if not page:
            break
        done += await act(page)
        left -= len(page)
        after = page[-1].position
        advance(len(page))
    return done


async def letters(broker: Broker, which: DeadFilter, limit: int | None) -> AsyncIterator[DeadLetter]:
    """Dead letters, oldest first, page by page."""
    after, left = None, limit
    while left is None or left > 0:
        size = CHUNK if left is None else min(CHUNK, left)
        page = await broker.dead_letters(which, limit=size, after=after)
        for letter in page:
            yield letter
        if len(page) < size:
            return
        after = page[-1].position
        left = None if left is None else left - len(page)


async def _known(broker: Broker, which: Which) -> None:
    """A queue that is named must exist: a typing error must not look like good news."""
    if which.queue is None:
        return
    names = [queue.name for queue in await broker.queues()]
    if which.queue not in names:
        if (owner := which.queue.removesuffix(".dead")) in names:
            raise BrokerError(f"{which.queue} is where the dead letters of {owner} are kept; say --queue {owner}")
        raise not_there(which.queue, names)


async def _known_reason(broker: Broker, which: Which) -> None:
    """Where nothing fits, its reason must be one that there is: Conveyor's own, or one that other programs wrote.

    Raises:
        ConfigurationError: nobody has given that reason.
    """
    own = [*(reason.value for reason in Reason), *OF_RABBITMQ]
    if (
        which.reason is None
        or which.reason in own
        or await broker.dead_letters(DeadFilter(reason=which.reason), limit=1)
    ):
        return
    here = {letter.reason async for letter in letters(broker, DeadFilter(queue=which.queue), REASONS_LOOKED_AT)}
    known = [*own, *sorted(here.difference(own))]
    near = difflib.get_close_matches(which.reason, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigurationError(f"--reason {which.reason!r} is none; there are: {', '.join(known)}{hint}")


def attempts_of(letter: DeadLetter) -> int:
    """How often the handler tried it: a broker counts the attempts that were to be repeated, and not the one that ended it."""
    ended_by_an_attempt = letter.reason in (Reason.EXHAUSTED, Reason.REJECTED)
    return letter.attempts + 1 if ended_by_an_attempt else letter.attempts


def as_json(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter as --json prints it; the payload as text, bytes that are no UTF-8 escaped."""
    message = letter.message
    return {
        "id": message.id,
        "queue": letter.queue,
        "topic": message.topic,
        "key": message.key,
        "reason": letter.reason,
        "error": letter.error,
        "traceback": letter.traceback,
        "attempts": attempts_of(letter),
        "deliveries": letter.deliveries,
        "died": moment(letter.died),
        "created": moment(message.created),
        "correlation_id": message.correlation_id,
        "causation_id": message.causation_id,
        "content_type": message.content_type,
        "headers": dict(message.headers),
        "payload": payload_text(message.body),
    }
