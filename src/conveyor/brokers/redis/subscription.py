"""Receivers: claim, wait, claim again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

import msgspec

from conveyor.broker import Delivery
from conveyor.brokers.redis import scripts
from conveyor.brokers.redis.link import ForgottenScript, Link, Refused, text
from conveyor.brokers.redis.wire import message_of
from conveyor.errors import BrokerError, BrokerUnavailable

if TYPE_CHECKING:
    from conveyor.brokers.redis import RedisBroker

LOOK_SECONDS: Final = 2.0
"""A waiting receiver looks by itself after so long: one that was woken for a message may have died before it claimed it."""
MOST_CLAIMED: Final = 1_000
"""In one step: the server does nothing else meanwhile."""


class RedisSubscription:
    """One receiver of one queue; made by RedisBroker.subscribe().

    It waits over a connection of its own, in a read for which there is nothing yet; right behind the read is the next claim, so that
    the server answers with the message itself, and not only that there is one.
    """

    def __init__(
        self, broker: RedisBroker, link: Link, queue: str, prefetch: int, *, early: bool, topics: Collection[str]
    ) -> None:
        self.queue = queue
        self._broker = broker
        self._link = link
        self._prefetch = prefetch
        self._early = early
        self._topics = topics
        self._held = 0
        self._ended: BrokerError | None = None
        self._claim = 0
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()

    async def fetch(self, limit: int) -> list[Delivery]:
        """See conveyor.broker.Subscription. Waits, too, while prefetch deliveries are unsettled."""
        if limit < 1:
            raise ValueError("a fetch is for at least one message")
        async with self._turn:
            wait_seconds = 0.0
            while True:
                if self._ended is not None:
                    raise self._ended
                room = min(limit, self._prefetch - self._held, MOST_CLAIMED)
                if room <= 0:
                    self._room.clear()
                    await self._room.wait()
                    continue
                deliveries, wait_seconds = await self._receive(room, wait_seconds)
                if deliveries:
                    return deliveries

    async def close(self) -> None:
        """See conveyor.broker.Subscription."""
        if self._ended is None:
            self.end(BrokerUnavailable(f"this subscription of {self.queue!r} is closed"))
            await self._broker.leave(self)

    def end(self, why: BrokerError) -> None:
        """Take part no more; a fetch that waits raises why."""
        self._ended = self._ended or why
        self._let_claim_go()
        self._link.close()
        self._room.set()

    def lets_go(self) -> None:
        """One of its deliveries is no longer in its hands."""
        self._held -= 1
        self._room.set()

    async def _receive(self, room: int, wait_seconds: float) -> tuple[list[Delivery], float]:
        """What is there by then, counted and leased; and how long to wait where there is nothing."""
        try:
            answer = await self._ask(room, wait_seconds)
        except asyncio.CancelledError:
            # A read cannot be called back; without its connection it is over, and the claim behind it.
            self._let_claim_go()
            self._link.drop("nobody waits any more")
            raise
        except BrokerError:
            self._let_claim_go()
            if self._ended is not None:
                raise self._ended from None
            raise
        claim, self._claim = self._claim, 0
        deliveries = self._deliveries(claim, answer)
        milliseconds: int = answer[2]
        self._held += len(deliveries)
        self._broker.hold(self, deliveries)
        return deliveries, LOOK_SECONDS if milliseconds < 0 else min(LOOK_SECONDS, milliseconds / 1000)

    async def _ask(self, room: int, wait_seconds: float) -> Any:
        """The answer to a claim, which the server looks at when there is news, or the time is over."""
        link, broker, queue = self._link, self._broker, self.queue
        claim = await broker.next_claim()
        await link.connect()
        self._claim = claim
        if wait_seconds:
            streams = broker.streams_of(queue)
            command = ("XREADGROUP", "GROUP", "bell", "all", "COUNT", 1, "BLOCK", math.ceil(wait_seconds * 1000))
            news = link.send(*command, "NOACK", "STREAMS", *streams, ">", ">")
        arguments = queue, room, self._claim, broker.owner, int(self._early), int(wait_seconds > 0)
        claimed = link.post(scripts.CLAIM, *arguments)
        if wait_seconds:
            with contextlib.suppress(Refused):  # the queue is gone: the claim says so
                await news
        try:
            return await claimed
        except ForgottenScript:
            pass
        except Refused as error:
            raise broker.explain(error, queue) from None
        return await link.run(scripts.CLAIM, *arguments)

    def _let_claim_go(self) -> None:
        claim, self._claim = self._claim, 0
        if claim:
            self._broker.void(claim, self.queue)

    def _deliveries(self, claim: int, answer: Any) -> list[Delivery]:
        fresh, others, _ = answer
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
        return deliveries


def _id(reference: str) -> str:
    milliseconds, _, rest = reference[:-2].partition("-")
    return f"{int(milliseconds)}-{int(rest)}"


def topics_of(said: bytes | None) -> tuple[str, ...]:
    """A queue's topics, as its settings have them."""
    topics: list[str] = json.loads(said or b"[]")
    return tuple(topics)
