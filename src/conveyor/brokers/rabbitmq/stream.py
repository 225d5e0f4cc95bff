"""What a subscription receives while its fetches follow each other quickly: the consumer stays open between them.

To open and close one for each fetch costs two round trips. So where the next fetch comes soon, the consumer goes on; the server sends it
a few times what the receiver wants to hold. It is closed when nobody has fetched for a moment, and what came for nobody goes back a
little later: a busy receiver does not keep from others what it has no time for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from conveyor.brokers.rabbitmq.amqp import AmqpError, Incoming
from conveyor.brokers.rabbitmq.tap import Tap
from conveyor.brokers.rabbitmq.work import Work

SOON_SECONDS: Final = 0.1
"""A fetch that comes so soon after another one finds the consumer open."""
AHEAD: Final = 4
"""Times what the receiver wants to hold, the server may have sent: some are handled, some settled, some on their way."""
KEPT_SECONDS: Final = 0.5
"""How long what came for nobody waits for the next fetch."""


class Stream:
    """The messages of one queue for one subscription.

    Parameters:
        bound: the most that it may have unsettled.
        steady: whether the consumer may stay open. A quorum queue counts what was on its way to a consumer that is closed as
            delivered: there it is closed before anything is acknowledged, and so before anything more is sent.
        ended: whether the subscription is at its end.
        give_back: puts back, uncounted, what came for nobody.
        spawn: runs what happens beside the fetches.
    """

    def __init__(
        self,
        queue: str,
        bound: int,
        steady: Callable[[], bool],
        ended: Callable[[], bool],
        give_back: Callable[[Work, list[Incoming]], Coroutine[Any, Any, None]],
        spawn: Callable[[Coroutine[Any, Any, Any], str], Awaitable[Any]],
    ) -> None:
        self._queue = queue
        self._bound = bound
        self._steady = steady
        self._ended = ended
        self._give_back = give_back
        self._spawn = spawn
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
        soon = self._fetching > 0 or (self._steady() and loop.time() - self._last < SOON_SECONDS)
        self._stop_timer()
        self._fetching += 1
        try:
            tap = await self._opened(work, wanted, min(self._bound, AHEAD * wanted) if soon else limit)
            while not tap.arrived and not tap.over and not self._ended():
                self._news.clear()
                await self._news.wait()
            if not soon and self._fetching == 1:
                await tap.close()
            return [] if self._ended() or work.lost else tap.take(limit)
        except asyncio.CancelledError:
            if self._fetching == 1:
                await asyncio.shield(self._spawn(self.close(), f"giving back what came of {self._queue}"))
            raise
        finally:
            self._fetching -= 1
            self._last = loop.time()
            if self._fetching == 0:
                self._set_timer(SOON_SECONDS)

    async def pause(self) -> None:
        """Let nothing more come; what has come stays for the next fetch."""
        async with self._changing:
            if self._tap is not None:
                await self._tap.close()

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

    async def _opened(self, work: Work, wanted: int, bound: int) -> Tap:
        async with self._changing:
            tap = self._tap
            if tap is not None and tap.work is work:
                if tap.arrived or (not tap.over and wanted <= tap.bound):
                    return tap
                await tap.close()
                if tap.arrived:  # meanwhile
                    return tap
            tap = self._tap = Tap(work, [self._queue], bound, self._news, lambda late: self._too_late(work, late))
            try:
                await tap.open()
            except AmqpError:
                self._tap = None
                raise
            return tap

    def _too_late(self, work: Work, incoming: Incoming) -> None:
        self._spawn(self._give_back(work, [incoming]), "giving back what came late")

    def _set_timer(self, seconds: float) -> None:
        self._stop_timer()
        if self._tap is not None and (self._tap.arrived or not self._tap.over):
            self._timer = asyncio.get_running_loop().call_later(seconds, self._on_timer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        self._spawn(self._idle(), f"nobody fetches from {self._queue}")

    async def _idle(self) -> None:
        """Nobody has fetched for a while."""
        if self._tap is None or self._fetching or self._ended():
            return
        if self._tap.over:
            await self.close()
        else:
            await self.pause()
            if self._fetching == 0:
                self._set_timer(KEPT_SECONDS)
