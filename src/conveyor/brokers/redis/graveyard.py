"""Dead letters: a stream for each queue, read in pages."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, Final, cast

from conveyor.broker import DeadFilter, DeadLetter
from conveyor.brokers.redis import scripts
from conveyor.brokers.redis.link import Link, Refused, text
from conveyor.brokers.redis.wire import dead_fields_of, letter_of, position_of
from conveyor.errors import BrokerError

MOST_READ: Final = 200
"""Letters of one answer: each may carry a megabyte and a long traceback."""
MOST_MOVED: Final = 200


class Graveyard:
    """The dead letters of a namespace."""

    def __init__(self, link: Link, prefix: str) -> None:
        self._link = link
        self._prefix = prefix

    async def page(self, which: DeadFilter, limit: int, after: str | None) -> list[DeadLetter]:
        """See conveyor.broker.Broker.dead_letters."""
        queues = [which.queue] if which.queue is not None else await self._queues()
        found: list[DeadLetter] = []
        for queue in queues:
            found += await self._of_queue(queue, which, limit, after)
        return heapq.nsmallest(limit, found, key=lambda letter: letter.position)

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """See conveyor.broker.Broker.bury."""
        there = {*await self._queues()}
        for letter in letters:
            if letter.queue not in there:
                raise BrokerError(f"there is no queue {letter.queue!r}; declare it first")
        for start in range(0, len(letters), MOST_MOVED):
            arguments: list[Any] = []
            for letter in letters[start : start + MOST_MOVED]:
                fields = dead_fields_of(letter)
                arguments += (letter.queue, len(fields), *fields)
            try:
                await self._link.run(scripts.BURY, *arguments)
            except Refused as error:
                raise BrokerError(f"a dead letter's queue is gone: {error}") from error

    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker.redrive."""
        moved = 0
        for start in range(0, len(letters), MOST_MOVED):
            arguments: list[str] = []
            for letter in letters[start : start + MOST_MOVED]:
                id_, queue = position_of(letter.position)
                if id_:
                    arguments += (queue, id_)
            moved += cast("int", await self._link.run(scripts.REDRIVE, *arguments))
        return moved

    async def discard(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker.discard."""
        gone = 0
        for letter in letters:
            id_, queue = position_of(letter.position)
            if id_:
                gone += cast("int", await self._link.call("XDEL", f"{self._prefix}dead:{queue}", id_))
        return gone

    async def _queues(self) -> list[str]:
        return sorted(text(name) for name in await self._link.call("SMEMBERS", f"{self._prefix}queues"))

    async def _of_queue(self, queue: str, which: DeadFilter, limit: int, after: str | None) -> list[DeadLetter]:
        """Up to limit letters of one queue, behind a position that may be another queue's."""
        id_, of = position_of(after) if after is not None else ("", "")
        begin = "-" if not id_ else id_ if queue > of else f"({id_}"
        found: list[DeadLetter] = []
        while len(found) < limit:
            entries = await self._link.call(
                "XRANGE", f"{self._prefix}dead:{queue}", begin, "+", "COUNT", min(MOST_READ, limit)
            )
            for entry in entries:
                letter = letter_of(queue, entry)
                if _is_meant(letter, which):
                    found.append(letter)
            if len(entries) < min(MOST_READ, limit):
                break
            begin = f"({text(entries[-1][0])}"
        return found[:limit]


def _is_meant(letter: DeadLetter, which: DeadFilter) -> bool:
    return (
        (which.id is None or letter.message.id == which.id)
        and (which.reason is None or letter.reason == which.reason)
        and (which.error is None or which.error.casefold() in letter.error.casefold())
    )
