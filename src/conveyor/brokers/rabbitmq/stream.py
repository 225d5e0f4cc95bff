"""What a subscription receives while its fetches follow each other quickly: the consumer stays open between them.

To open and close one for each fetch costs two round trips; and a quorum queue counts what was on its way to a consumer that is closed
as delivered, though nobody ever got it. So the consumer stays open. The server sends it what the receiver wants to hold, and a classic
queue, where fetches follow each other quickly, a few times that. It is closed when something has come and nobody fetches it for a
moment: that goes back, for a busy receiver does not keep from others what it has no time for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from conveyor.brokers.rabbitmq.amqp import AmqpError, Incoming
from conveyor.brokers.rabbitmq.tap import Tap
from conveyor.brokers.rabbitmq.work import Work

SOON_SECONDS: Final = 0.1
"""Fetches that follow each other so soon are quick."""
AHEAD: Final = 4
"""Times what the receiver wants to hold, the server may have sent: some are handled, some settled, some on their way."""
KEPT_SECONDS: Final = 0.5
"""How long what came for nobody waits for the next fetch."""
WIDEN: Final = 2
"""A consumer that may have too little gets so many times that at least, within the bound."""
SHRINK: Final = 4
"""A consumer that may have so many times more than is wanted is replaced."""


class Stream:
    """The messages of one queue for one subscription.

    Parameters:
        bound: the most that it may have unsettled.
        replicated: whether it is a quorum queue. It sends no more than the receiver wants to hold: what came for nobody is copied back,
            and there that is dear.
        ended: whether the subscription is at its end.
        give_back: puts back, uncounted, what came for nobody.
        spawn: runs what happens beside the fetches.
        farewell: runs what tells the server of an end, and waits for its answer, within reason.
    """

    def __init__(
        self,
        queue: str,
        bound: int,
        replicated: Callable[[], bool],
        ended: Callable[[], bool],
        give_back: Callable[[Work, list[Incoming]], Coroutine[Any, Any, None]],
        spawn: Callable[[Coroutine[Any, Any, Any], str], Awaitable[Any]],
        farewell: Callable[[Coroutine[Any, Any, None], str], Awaitable[None]],
    ) -> None:
        self._queue = queue
        self._bound = bound
        self._replicated = replicated
        self._ended = ended
        self._give_back = give_back
        self._spawn = spawn
        self._farewell = farewell
        self._tap: Tap | None = None
        self._changing = asyncio.Lock()
        self._news = asyncio.Event()
        self._fetching = 0
        self._last = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Messages that have come, and nobody has fetched."""
        return 0 if self._tap is None or self._tap.work.lost else len(self._tap.arrived)

    def wake(self) -> None:
        """Let who waits look whether the subscription is at its end."""
        self._news.set()

    async def fetch(self, work: Work, limit: int, wanted: int) -> list[Incoming]:
        """Wait for messages, and return up to limit of them; none where there is reason to begin anew.

        Parameters:
            wanted: how many the receiver wants to hold, with those that it holds already.

        Raises:
            AmqpError: the queue cannot be consumed.
        """
        loop = asyncio.get_running_loop()
        quick = not self._replicated() and loop.time() - self._last < SOON_SECONDS
        self._stop_timer()
        self._fetching += 1
        try:
            tap = await self._opened(work, min(self._bound, AHEAD * wanted if quick else wanted))
            while not tap.arrived and not tap.over and not self._ended():
                self._news.clear()
                await self._news.wait()
            return [] if self._ended() or work.lost else tap.take(limit)
        except asyncio.CancelledError:
            if self._fetching == 1:
                await self._farewell(self.close(), f"giving back what came of {self._queue}")
            raise
        finally:
            self._fetching -= 1
            self._last = loop.time()
            self._watch()

    async def pause(self) -> None:
        """Let nothing more come; what has come stays for the next fetch."""
        async with self._changing:
            if self._tap is not None:
                await self._tap.close()

    async def rest(self) -> None:
        """Before something goes back that is for anyone: let it not come here at once where nobody fetches."""
        if self._fetching == 0:
            await self.pause()

    async def purge(self) -> int:
        """Delete what has come, and nobody has fetched; how many."""
        await self.pause()
        if self._tap is None or self._tap.work.lost:
            return 0
        gone, work = self._tap.take(self.waiting), self._tap.work
        work.ack([each.delivery_tag for each in gone])
        await work.flush()
        return len(gone)

    async def quiet(self) -> None:
        """Return when what was on its way has come."""
        if self._tap is not None and not self._tap.over:
            await self._tap.work.flush()

    async def close(self) -> None:
        """Let nothing more come, and give back what nobody has fetched."""
        self._stop_timer()
        await self.pause()
        tap, self._tap = self._tap, None
        if tap is not None and tap.arrived and not tap.work.lost:
            await self._give_back(tap.work, tap.take(len(tap.arrived)))

    async def _opened(self, work: Work, bound: int) -> Tap:
        async with self._changing:
            tap = self._tap
            if tap is not None and tap.work is work:
                if not tap.over and bound > tap.bound:
                    # Fetches that each want one more shall not each open a consumer.
                    await tap.widen(max(bound, min(WIDEN * tap.bound, self._bound)))
                if tap.arrived or (not tap.over and tap.bound < SHRINK * bound):
                    return tap
                await tap.close()
                if tap.arrived:  # meanwhile
                    return tap
            tap = self._tap = Tap(
                work,
                [self._queue],
                bound,
                self._news,
                lambda late: self._too_late(work, late),
                tidily=self._replicated(),
                arriving=self._watch,
            )
            try:
                await tap.open()
            except AmqpError:
                self._tap = None
                raise
            return tap

    def _too_late(self, work: Work, incoming: Incoming) -> None:
        self._spawn(self._give_back(work, [incoming]), "giving back what came late")

    def _watch(self) -> None:
        """What has come shall not wait for long where nobody fetches."""
        if self._fetching == 0 and self._timer is None and self._tap is not None and self._tap.arrived:
            self._timer = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._on_timer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        self._spawn(self._idle(), f"nobody fetches from {self._queue}")

    async def _idle(self) -> None:
        """Nobody has fetched for a while."""
        if not self._fetching and not self._ended():
            await self.close()
