"""Dead letters: a queue beside each queue, which holds what was given up, whole, until somebody takes it out.

AMQP knows no way to look into a queue. So a reader takes the messages one after the other, acknowledges none of those that are to
stay, and gives them back at the end, which leaves them in their order. A lock keeps two readers from hiding letters from each other.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import datetime
from typing import Any, Final

from conveyor.broker import DeadFilter, DeadLetter
from conveyor.brokers.rabbitmq.amqp import Channel, ChannelClosed, Connection, FieldValue, Incoming
from conveyor.brokers.rabbitmq.catalog import Turn
from conveyor.brokers.rabbitmq.envelope import (
    ATTEMPTS,
    DELIVERIES,
    DIED,
    ERROR,
    POSITION,
    QUEUE,
    REASON,
    TOPIC,
    Arrived,
    copy_of,
    properties_of,
    properties_or_none,
    trace_in,
    trace_note,
)
from conveyor.brokers.rabbitmq.held import Held
from conveyor.brokers.rabbitmq.publisher import Outgoing
from conveyor.brokers.rabbitmq.spec import Spec
from conveyor.brokers.rabbitmq.tap import Tap, draw
from conveyor.brokers.rabbitmq.topology import NOT_FOUND
from conveyor.brokers.rabbitmq.work import Work
from conveyor.core.settle import Dead
from conveyor.errors import BrokerError

READ_AT_ONCE: Final = 500
ARRIVAL_SECONDS: Final = 10.0
"""A letter that is counted arrives within this time, or another program has it."""
RETURN_SECONDS: Final = 2.0
"""How long letters may take to be back in their queue."""
CLOCKS_DIFFER_SECONDS: Final = 60.0
"""The hosts that bury letters may disagree about the time by so much; beyond it, the queue's order is that of the positions."""
MICROSECONDS: Final = 1_000_000

Use = Callable[[list[DeadLetter], Spec], Awaitable[None]]
"""What is done with the letters that are taken out, before they are."""


class Positions:
    """Gives every dead letter a position, which tells it from all others and orders them by time."""

    def __init__(self) -> None:
        self._last = 0
        self._mine = os.urandom(4).hex()

    def next(self, now: float) -> str:
        """A position behind all that this object gave before; now is in Unix seconds."""
        self._last = max(self._last + 1, int(now * MICROSECONDS))
        return f"{self._last:016x}{self._mine}"


def letter_of(held: Held, spec: Spec, verdict: Dead, position: str, now: float) -> Outgoing:
    """What is published when a delivery is given up: the body untouched, all else in headers."""
    notes: dict[str, FieldValue] = {
        QUEUE: spec.name,
        REASON: str(verdict.reason),
        ERROR: verdict.error,
        DELIVERIES: held.deliveries,
        ATTEMPTS: held.attempts,
        DIED: now,
        POSITION: position,
        **trace_note(verdict.traceback),
    }
    return Outgoing("", spec.dead, held.incoming.body, copy_of(held.incoming, held.message, notes))


def buried(letter: DeadLetter, spec: Spec, position: str) -> Outgoing:
    """A dead letter that came from elsewhere."""
    notes: dict[str, FieldValue] = {
        TOPIC: letter.message.topic,
        QUEUE: letter.queue,
        REASON: letter.reason,
        ERROR: letter.error,
        DELIVERIES: letter.deliveries,
        ATTEMPTS: letter.attempts,
        DIED: letter.died,
        POSITION: position,
        **trace_note(letter.traceback),
    }
    return Outgoing("", spec.dead, letter.message.body, properties_of(letter.message, notes))


def read_letter(incoming: Incoming, what: Arrived, queue: str, position: str) -> DeadLetter:
    """A message of a dead-letter queue, whether Conveyor or the server's own dead-lettering put it there."""
    headers: Mapping[str, Any] = properties_or_none(incoming).headers or {}
    reason, error = str(headers.get(REASON) or ""), what.error
    death = _first_death(headers)
    if not reason:
        reason = str(death.get("reason") or "unknown")
        error = error or (
            f"dead-lettered by the server from {death.get('queue')}" if death else "put there by another program"
        )
    return DeadLetter(
        position=position,
        queue=queue,
        message=what.message,
        reason=reason,
        error=error,
        traceback=trace_in(headers),
        deliveries=what.noted,
        attempts=what.attempts,
        died=_died(headers),
    )


class Names:
    """Gives the letters of a walk their positions; those that say the very same are counted, in the order in which they lie there."""

    def __init__(self) -> None:
        self._seen = Counter[str]()

    def __call__(self, incoming: Incoming) -> str:
        position = _position_of(incoming)
        self._seen[position] += 1
        return position if self._seen[position] == 1 else f"{position}~{self._seen[position]:06}"


def _position_of(incoming: Incoming) -> str:
    """Where a letter is among the others, the same at each look. What another program put there is known by what it says."""
    properties = properties_or_none(incoming)
    headers: Mapping[str, Any] = properties.headers or {}
    if noted := headers.get(POSITION):
        return str(noted)
    content = hashlib.blake2b(incoming.body, digest_size=8)
    content.update(str(properties.message_id).encode())
    return f"{int(_died(headers) * MICROSECONDS):016x}{content.hexdigest()}"


def meant(letter: DeadLetter, which: DeadFilter) -> bool:
    """Whether a filter lets a letter through."""
    return (
        (which.queue is None or letter.queue == which.queue)
        and (which.id is None or letter.message.id == which.id)
        and (which.reason is None or letter.reason == which.reason)
        and (which.error is None or which.error.casefold() in letter.error.casefold())
    )


class Cemetery:
    """The dead letters of one queue.

    Parameters:
        connection: gives the living connection.
        read: the message that arrived, and which id it has where it has none of its own (made up where that is empty).
        turn: one reader at a time, in all processes.
    """

    def __init__(
        self,
        spec: Spec,
        connection: Callable[[], Awaitable[Connection]],
        read: Callable[[Incoming, str], Arrived],
        turn: Turn,
    ) -> None:
        self._spec = spec
        self._connection = connection
        self._read = read
        self._turn = turn

    async def page(self, which: DeadFilter, limit: int, after: str) -> list[DeadLetter]:
        """The first letters behind a position that a filter lets through, oldest first; no more than these are kept meanwhile."""
        found: list[DeadLetter] = []
        name = Names()

        def look(incoming: Incoming) -> bool:
            letter = self._letter(incoming, name(incoming))
            if letter.position > after and meant(letter, which):
                bisect.insort(found, letter, key=_by_position)
                del found[limit:]
            return len(found) >= limit and (not found or letter.died > found[-1].died + CLOCKS_DIFFER_SECONDS)

        async with self._turn.locked(await self._connection(), f"{self._spec.dead}.lock") as channel:
            await self._walk(channel, look)
        return found

    async def take(self, positions: Collection[str], use: Use) -> int:
        """Take letters out, once they have been used; how many of them still were there."""
        wanted = set(positions)
        taken: list[tuple[DeadLetter, int]] = []
        name = Names()

        def look(incoming: Incoming) -> bool:
            position = name(incoming)
            if position in wanted:
                wanted.discard(position)
                # Two letters that say the same are two messages: what has no id goes back with one of its own.
                taken.append((self._letter(incoming, position, nameless=""), incoming.delivery_tag))
            return not wanted

        async def finish() -> set[int]:
            taken.sort(key=lambda pair: pair[0].position)
            if taken:
                await use([letter for letter, _ in taken], self._spec)
            return {tag for _, tag in taken}

        async with self._turn.locked(await self._connection(), f"{self._spec.dead}.lock") as channel:
            await self._walk(channel, look, finish)
        return len(taken)

    def _letter(self, incoming: Incoming, position: str, *, nameless: str | None = None) -> DeadLetter:
        what = self._read(incoming, position if nameless is None else nameless)
        return read_letter(incoming, what, self._spec.name, position)

    async def _walk(
        self,
        channel: Channel,
        look: Callable[[Incoming], bool],
        finish: Callable[[], Awaitable[set[int]]] | None = None,
    ) -> None:
        """Show the letters one after the other until look says that it is enough; all go back but those that finish names."""
        try:
            left = (await channel.queue_declare(self._spec.dead, passive=True)).messages
        except ChannelClosed as error:
            if error.code == NOT_FOUND:
                return
            raise BrokerError(f"cannot read {self._spec.dead!r}: {error}") from error
        work = Work(channel.connection, channel)
        tags: list[int] = []
        enough = False
        try:
            while left > 0 and not enough:
                news = asyncio.Event()
                tap = Tap(work, [self._spec.dead], min(left, READ_AT_ONCE), news)
                async with asyncio.timeout(ARRIVAL_SECONDS):
                    await draw(tap, news, whole=tap.bound)
                left -= len(tap.arrived)
                for incoming in tap.arrived:
                    tags.append(incoming.delivery_tag)
                    enough = enough or look(incoming)
        except TimeoutError:
            pass  # somebody else took some
        gone = await finish() if finish is not None else set()
        work.ack(gone)
        await self._return(work, [tag for tag in tags if tag not in gone])

    async def _return(self, work: Work, tags: list[int]) -> None:
        """Give them back, and wait until they can be had again: the next reader counts them first."""
        work.give_back(tags)
        await work.flush()
        deadline = asyncio.get_running_loop().time() + RETURN_SECONDS
        for attempt in itertools.count():
            there = (await work.channel.queue_declare(self._spec.dead, passive=True)).messages
            if there >= len(tags) or asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(min(0.002 * 2**attempt, 0.1))


def _by_position(letter: DeadLetter) -> str:
    return letter.position


def _first_death(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    deaths = headers.get("x-death")
    first = deaths[0] if isinstance(deaths, list) and deaths else {}
    return first if isinstance(first, dict) else {}


def _died(headers: Mapping[str, Any]) -> float:
    """Unix seconds; 0 where nobody says when."""
    died = headers.get(DIED)
    if isinstance(died, int | float):
        return float(died)
    moment = _first_death(headers).get("time")
    return moment.timestamp() if isinstance(moment, datetime) else 0.0
