"""Receivers: claim, wait, claim again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

import msgspec

from conveyor.broker import Delivery
from conveyor.brokers.redis.link import text
from conveyor.brokers.redis.wire import message_of
from conveyor.errors import BrokerError, BrokerUnavailable

if TYPE_CHECKING:
    from conveyor.brokers.redis import RedisBroker

LOOK_SECONDS: Final = 2.0
"""A waiting receiver looks by itself after so long: one that was woken for a message may have died before it claimed it."""
MOST_CLAIMED: Final = 1_000
"""In one step: the server does nothing else meanwhile."""


class RedisSubscription:
    """One receiver of one queue; made by RedisBroker.subscribe()."""

    def __init__(
        self, broker: RedisBroker, queue: str, prefetch: int, *, early: bool, topics: Collection[str], ordered: bool
    ) -> None:
        self.queue = queue
        self.ordered = ordered
        self._broker = broker
        self._prefetch = prefetch
        self._early = early
        self._topics = topics
        self._held = 0
        self._ended: BrokerError | None = None
        self._room = asyncio.Event()

    async def fetch(self, limit: int) -> list[Delivery]:
        """See conveyor.broker.Subscription. Waits, too, while prefetch deliveries are unsettled."""
        if limit < 1:
            raise ValueError("a fetch is for at least one message")
        while True:
            if self._ended is not None:
                raise self._ended
            room = min(limit, self._prefetch - self._held, MOST_CLAIMED)
            if room <= 0:
                self._room.clear()
                await self._room.wait()
                continue
            self._held += room  # before the claim is answered: several fetches share the prefetch
            got = 0
            try:
                deliveries, milliseconds = await self._claim(room)
                got = len(deliveries)
            finally:
                self._held -= room - got
                if self._held < self._prefetch:
                    self._room.set()
            if deliveries:
                return deliveries
            wait = LOOK_SECONDS if milliseconds < 0 else min(LOOK_SECONDS, milliseconds / 1000)
            await self._broker.bell.wait(self.queue, wait)

    async def close(self) -> None:
        """See conveyor.broker.Subscription."""
        if self._ended is None:
            self.end(BrokerUnavailable(f"this subscription of {self.queue!r} is closed"))
            await self._broker.leave(self)

    def end(self, why: BrokerError) -> None:
        """Take part no more; a fetch that waits raises why."""
        self._ended = self._ended or why
        self._room.set()
        self._broker.bell.stir(self.queue)

    def lets_go(self) -> None:
        """One of its deliveries is no longer in its hands."""
        self._held -= 1
        self._room.set()

    async def _claim(self, room: int) -> tuple[list[Delivery], int]:
        """What is there, counted and leased; else after how many milliseconds there may be something, -1 where nobody knows."""
        claim, answer = await self._broker.claim(self.queue, room, early=self._early)
        fresh, others, milliseconds = answer
        now = self._broker.clock()
        queue, topics, owner = self.queue, self._topics, self._broker.owner
        tail = f" {claim} {owner}"
        deliveries: list[Delivery] = []
        for ref, counts, fields, due in others:
            name = text(ref)
            counted, failed, _, error = text(counts or b"0 0 0 ").split(" ", 3)
            message = message_of(fields, where=f"{queue}/{_id(name)}", topics=topics, now=now)
            receipt = name + tail
            if due:  # it was given early: the lease and the message say when it would have come
                receipt = f"{name} {claim}@{text(due)} {owner}"
                message = msgspec.structs.replace(message, due=max(message.due, int(due) / 1000))
            deliveries.append(Delivery(message, queue, receipt, int(counted) + 1, int(failed), error))
        tail = "m0" + tail
        for id_, fields in fresh:
            name = id_.decode()
            message = message_of(fields, where=f"{queue}/{name}", topics=topics, now=now)
            deliveries.append(Delivery(message, queue, name + tail, 1, 0))
        self._broker.hold(self, deliveries)
        return deliveries, milliseconds


def _id(reference: str) -> str:
    milliseconds, _, rest = reference[:-2].partition("-")
    return f"{int(milliseconds)}-{int(rest)}"


def topics_of(said: bytes | None) -> tuple[str, ...]:
    """A queue's topics, as its settings have them."""
    topics: list[str] = json.loads(said or b"[]")
    return tuple(topics)
