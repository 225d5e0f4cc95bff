"""A channel on which messages are consumed, and which of its deliveries the server waits for."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterable
from typing import Final

from conveyor.brokers.rabbitmq.amqp import Channel, ChannelClosed, Connection

LARGEST_PREFETCH: Final = 2_000
"""Messages that a consumer has unsettled at most; quorum queues allow no more."""
CLOSED_BY_US: Final = 200
DOUBT_SECONDS: Final = 2.0
"""How soon what was on its way to a cancelled consumer is there again."""


class Work:
    """A channel and its deliveries.

    An acknowledgement is valid only on the channel of its delivery: when this one goes, all that it delivered is lost.
    """

    def __init__(self, connection: Connection, channel: Channel) -> None:
        self.connection = connection
        self.channel = channel
        self._open: dict[int, None] = {}
        self._consumers = itertools.count(1)
        self._retired = False
        self._doubts: dict[str, deque[float]] = {}

    @property
    def lost(self) -> bool:
        """The server has taken everything back."""
        return self.channel.closed.done() or self.connection.closed.done()

    def took(self, tag: int) -> None:
        """A delivery has arrived; they arrive in the order of their tags."""
        self._open[tag] = None

    def open_since(self, tag: int) -> int:
        """How many deliveries the server waits for, of those from this one on."""
        return sum(1 for each in self._open if each >= tag)

    def holds(self, tag: int) -> bool:
        """Whether the server waits for this one."""
        return tag in self._open

    def ack(self, tags: Iterable[int]) -> None:
        """Acknowledge; those before which nothing is open go as one."""
        wanted = set(tags)
        together: list[int] = []
        for tag in self._open:
            if tag not in wanted:
                break
            together.append(tag)
        for tag in together:
            del self._open[tag]
        if together:
            self.channel.ack(together[-1], multiple=True)
        if len(together) < len(wanted):
            for tag in wanted.difference(together):
                if self._open.pop(tag, 0) is None:
                    self.channel.ack(tag)
        self._maybe_close()

    def give_back(self, tags: Iterable[int]) -> None:
        """Let the server put these back to where they were, in this order; it counts them as delivered."""
        for tag in tags:
            if self._open.pop(tag, 0) is None:
                self.channel.nack(tag)
        self._maybe_close()

    def retire(self) -> None:
        """Nobody receives on it any more: close the channel as soon as all that it delivered is settled."""
        self._retired = True
        self._maybe_close()

    def _maybe_close(self) -> None:
        if self._retired and not self._open:
            self.channel.begin_close()

    async def flush(self) -> None:
        """Return when the server has read all that was sent on the channel: it answers requests in order."""
        if not self._retired or self._open:
            await self.channel.qos(0)
            return
        reason = await asyncio.shield(self.channel.closed)  # which was asked for behind all else
        if not (isinstance(reason, ChannelClosed) and reason.code == CLOSED_BY_US):
            raise reason

    def new_name(self) -> str:
        """Of a consumer. Never used before: a quorum queue takes one of the same name for the one that still holds its messages."""
        return f"draw{next(self._consumers)}"

    def cancelled(self, queue: str) -> None:
        """A consumer was cancelled that might have been sent more."""
        soon = asyncio.get_running_loop().time() + DOUBT_SECONDS
        self._doubts.setdefault(queue, deque(maxlen=LARGEST_PREFETCH)).append(soon)

    def doubt(self, queue: str) -> bool:
        """Whether one message may have been counted once for nothing; each cancelled consumer explains one hand-over.

        A quorum queue counts what was on its way to a consumer that was being cancelled, though nobody ever got it.
        """
        doubts = self._doubts.get(queue)
        now = asyncio.get_running_loop().time()
        while doubts:
            if doubts.popleft() > now:
                return True
        return False
