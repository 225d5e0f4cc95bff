"""Messages out of a queue: a consumer that is opened, sends what it may, and is closed again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final

from conveyor.brokers.rabbitmq.amqp import AmqpError, Incoming
from conveyor.brokers.rabbitmq.work import LARGEST_PREFETCH, Work

TIDY_SECONDS: Final = 2.0
"""How long a tap that ends tidily waits for what is on its way, at most."""
LOOK_SECONDS: Final = 0.002
"""Between two looks whether all has come."""
FIRST: Final = ".0"
"""How the consumer tag of a tap's first queue ends."""


class Tap:
    """A consumer of some queues, from open() to close(); what has arrived waits in it until somebody takes it.

    Parameters:
        queues: where from; each may have so many unsettled as the bound says.
        news: set when a message arrives, and when nothing more will.
        tidily: before it ends, all comes that is on its way; else a quorum queue counts that as delivered, though nobody ever got it.
            For a tap of one queue.
        late: called with what arrives after the end: a quorum queue may have sent it before it saw the end.
        arriving: called when a message has arrived.
    """

    def __init__(
        self,
        work: Work,
        queues: Sequence[str],
        bound: int,
        news: asyncio.Event,
        late: Callable[[Incoming], None] | None = None,
        *,
        tidily: bool = False,
        arriving: Callable[[], None] | None = None,
    ) -> None:
        self.work = work
        self.bound = min(bound, LARGEST_PREFETCH)
        self.arrived: list[Incoming] = []
        self.over = False
        """Nothing more is to be expected."""
        self._queues = queues
        self._news = news
        self._late = late
        self._tidily = tidily
        self._arriving = arriving
        self._received = 0
        self._first = 0
        """The first delivery's tag."""
        name = work.new_name()
        self._tags = [f"{name}.{number}" for number in range(len(queues))]
        self._opening: asyncio.Future[list[str | None]] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._closed = False

    async def open(self) -> None:
        """Begin to receive.

        Raises:
            AmqpError: the server refuses it, or is gone.
        """
        channel = self.work.channel
        channel.closed.add_done_callback(self._end)
        self._opening = asyncio.gather(
            channel.qos(self.bound),
            *(
                channel.consume(queue, self._on_delivery, tag=tag, on_cancel=self._end)
                for queue, tag in zip(self._queues, self._tags, strict=True)
            ),
        )
        await asyncio.shield(self._opening)

    async def widen(self, bound: int) -> None:
        """Let a tap of one queue have more unsettled: a second consumer beside the first, which need not be cancelled for that.

        Raises:
            AmqpError: the server refuses it, or is gone.
        """
        more = min(bound - self.bound, LARGEST_PREFETCH)  # of each consumer
        if more <= 0:
            return
        self.bound += more
        [queue], tag = self._queues, f"{self.work.new_name()}{FIRST}"
        self._tags.append(tag)
        channel, before = self.work.channel, self._opening

        async def consume() -> list[str | None]:
            if before is not None:
                await before
            return list(
                await asyncio.gather(
                    channel.qos(more), channel.consume(queue, self._on_delivery, tag=tag, on_cancel=self._end)
                )
            )

        self._opening = asyncio.ensure_future(consume())
        await asyncio.shield(self._opening)

    async def close(self) -> None:
        """Receive no more; returns when the server has seen it, even where the caller is cancelled."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            await asyncio.wait([self._closing])
            raise

    def take(self, limit: int) -> list[Incoming]:
        """Up to limit of what has arrived, in its order."""
        taken, self.arrived = self.arrived[:limit], self.arrived[limit:]
        return taken

    async def _close(self) -> None:
        self._end()
        self.work.channel.closed.remove_done_callback(self._end)
        # A cancel that overtakes the answer to its consume crashes the server's channel: so that answer is waited for, always.
        if self._opening is not None:
            await asyncio.wait([self._opening])
            if self._opening.exception() is None and not self.work.lost:
                if self._tidily:
                    await self._all_came()
                elif self._received != self.bound:  # else it had all that it was allowed
                    for queue in self._queues:
                        self.work.cancelled(queue)
                cancelling = (self.work.channel.cancel(tag) for tag in self._tags)
                await asyncio.gather(*cancelling, return_exceptions=True)
        self._closed = True

    async def _all_came(self) -> None:
        """Return when all has come that its queue has sent, and will send for what was acknowledged.

        What the queue answers comes behind what it has sent. But it may answer before it knows of the last acknowledgements,
        and each of them brings another message where more are waiting: so these are waited for, until the tap is full again.
        """
        [queue] = self._queues
        with contextlib.suppress(AmqpError, TimeoutError):
            async with asyncio.timeout(TIDY_SECONDS):
                while not self._full:
                    more = (await self.work.channel.queue_declare(queue, passive=True)).messages
                    if not more or not self._received:  # nothing was acknowledged where nothing has come
                        break
                    await asyncio.sleep(LOOK_SECONDS)

    @property
    def _full(self) -> bool:
        """Whether the server may send no more."""
        return bool(self._received) and self.work.open_since(self._first) >= self.bound

    def _end(self, _: object = None) -> None:
        self.over = True
        self._news.set()

    def _on_delivery(self, incoming: Incoming) -> None:
        self.work.took(incoming.delivery_tag)
        self._received += 1
        if self._received == 1:
            self._first = incoming.delivery_tag
        if self._closed and self._late is not None:
            self._late(incoming)
        else:
            self.arrived.append(incoming)
            self._news.set()
            if self._arriving is not None:
                self._arriving()


async def come(tap: Tap, news: asyncio.Event, *, until: Callable[[], bool] = lambda: False, whole: int = 1) -> None:
    """Consume until the first messages are there; whoever calls closes the tap.

    Parameters:
        news: the tap's; whoever changes what until sees sets it, too.
        until: looked at when there is news: stop now.
        whole: wait for so many.
    """
    await tap.open()
    while len(tap.arrived) < whole and not tap.over and not until():
        news.clear()
        await news.wait()


async def draw(tap: Tap, news: asyncio.Event, *, whole: int = 1) -> None:
    """Consume until so many messages are there, then stop: what has arrived is in the tap, and none stays in between."""
    try:
        await come(tap, news, whole=whole)
    finally:
        await tap.close()
