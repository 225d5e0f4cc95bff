"""A mailbox: a temporary queue of this process, which goes with it, and what comes into it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Generic, TypeVar

import msgspec

from conveyor.broker import Broker, Queue, Settlement, Subscription
from conveyor.core.settle import DONE, describe
from conveyor.errors import BrokerError

T = TypeVar("T")
log = logging.getLogger("conveyor.mailbox")

LENGTH: Final = 1_000
"""Messages that wait for a process that stands still; the latest are enough."""
FETCH: Final = 200
"""Messages taken at once."""
REMOVE_SECONDS: Final = 1.0
"""An end waits no longer for its queue to be removed: it vanishes with this process in any case."""


class Mailbox(Generic[T]):
    """A temporary queue and what it hears. What nobody can read is left out: topics are open to all, and to other versions.

    Parameters:
        name: of the queue.
        topics: what it hears.
        decode: reads a body; an error leaves the message out.
        length: messages that may wait; beyond, the oldest are dropped.
    """

    def __init__(
        self, broker: Broker, name: str, topics: tuple[str, ...], decode: Callable[[bytes], T], length: int = LENGTH
    ) -> None:
        self._broker = broker
        self._queue = Queue(name=name, topics=topics, temporary=True, max_length=length)
        self._decode = decode
        self._subscribing: asyncio.Task[Subscription] | None = None
        """Left behind by a receiver that was cancelled meanwhile: while its subscription is there, the queue cannot be removed."""

    @property
    def name(self) -> str:
        """Of the queue."""
        return self._queue.name

    async def declare(self, *more_topics: str) -> None:
        """Be there: what is published from then on is not missed. Also hear more topics."""
        await self._broker.declare([msgspec.structs.replace(self._queue, topics=(*self._queue.topics, *more_topics))])

    @contextlib.asynccontextmanager
    async def receiving(self, *more_topics: str) -> AsyncIterator[Callable[[], Awaitable[list[T]]]]:
        """Be there, and receive while the block lasts: gives a function that waits for what comes next.

        What it returns is settled: a failure in between loses it, as the end of this process would.
        """
        await self.declare(*more_topics)
        self._subscribing = asyncio.create_task(self._broker.subscribe(self._queue.name, FETCH), name="mailbox")
        subscription = await asyncio.shield(self._subscribing)
        self._subscribing = None

        async def take() -> list[T]:
            deliveries = await subscription.fetch(FETCH)
            found = []
            for delivery in deliveries:
                try:
                    found.append(self._decode(delivery.message.body))
                except Exception as error:
                    log.debug("left out what cannot be read on %s: %s", delivery.message.topic, describe(error))
            await self._broker.settle([Settlement(delivery, DONE) for delivery in deliveries])
            return found

        try:
            yield take
        finally:
            await subscription.close()

    async def remove(self) -> None:
        """Be there no more, so that nobody waits for an answer; where the broker is away, that is all the same."""
        subscribing, self._subscribing = self._subscribing, None
        with contextlib.suppress(BrokerError, TimeoutError):
            async with asyncio.timeout(REMOVE_SECONDS):
                if subscribing is not None:
                    await (await subscribing).close()
                await self._broker.remove(self._queue.name)
