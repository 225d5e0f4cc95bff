"""What handlers emit, and whether any queue received it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from conveyor.broker import Broker, QueueInfo
from conveyor.core.message import Message
from conveyor.core.settle import describe
from conveyor.runtime.journal import CAPACITY, Journal
from conveyor.runtime.metrics import Metrics
from conveyor.runtime.settler import Settler

log = logging.getLogger("conveyor.runner")

DOUBT_SECONDS: Final = 0.5
"""So long the runner waits, at least, before it asks the broker again whether what handlers emit went nowhere."""
KNOWN_DOUBT_SECONDS: Final = 5.0
"""The same where it has said so of the same topics before: to look at queues may mean to count what is in them."""
LAST_LOOK_SECONDS: Final = 1.0
"""How long it may take to ask that at the end."""


class Emitted:
    """Counts and notes what the handlers of a runner emit; of what may have gone nowhere, when that is known.

    Parameters:
        broker: open; asked which topics are received.
        settler: what it has settled has been emitted.
        metrics: counts.
        journal: None where it is off.
    """

    def __init__(self, broker: Broker, settler: Settler, metrics: Metrics, journal: Journal | None) -> None:
        self._broker = broker
        self._settler = settler
        self._metrics = metrics
        self._journal = journal
        self._bound: frozenset[str] = frozenset()
        """Topics that some queue received at the last look."""
        self._in_doubt = asyncio.Event()
        """Set while something was emitted under a topic that is not among them; the next two are about that."""
        self._doubtful: Counter[str] = Counter()
        """How much, by topic."""
        self._untold: list[tuple[Message, str]] = []
        """What the journal is to be told of it, each with the worker that emitted it; without bodies and headers."""
        self._unrouted: set[str] = set()
        """Topics of which it was said that what is emitted goes nowhere."""

    def look_at(self, queues: Iterable[QueueInfo]) -> None:
        """Learn which topics are received, from a look at all queues that somebody has taken."""
        self._bound = frozenset(topic for queue in queues for topic in queue.topics)

    def note(self, worker: str, emits: Sequence[Message], unrouted: frozenset[str] | None) -> None:
        """A handler has emitted these.

        Parameters:
            worker: its worker's identity.
            unrouted: the ids of those that no queue received; None where a settlement takes them along, which does not tell.
        """
        self._metrics.published += len(emits)
        for message in emits:
            nowhere = False
            if unrouted is not None:
                if nowhere := message.id in unrouted:
                    self._count_unrouted(message.topic, 1)
            elif message.topic not in self._bound:
                self._doubtful[message.topic] += 1
                self._in_doubt.set()
                # Beyond its capacity it is told as published, and no more.
                if self._journal is not None and len(self._untold) < CAPACITY:
                    self._untold.append((msgspec.structs.replace(message, body=b"", headers={}), worker))
                    continue
            if self._journal is not None:
                self._journal.published(message, worker, nowhere=nowhere)

    async def watch(self, well: Callable[[], None]) -> None:
        """Find out, for ever, what went nowhere.

        Parameters:
            well: called when that has succeeded.
        """
        while True:
            await self._in_doubt.wait()
            is_new = not self._doubtful.keys() <= self._unrouted
            await self._look_again()
            well()
            await asyncio.sleep(DOUBT_SECONDS if is_new else KNOWN_DOUBT_SECONDS)

    async def end(self) -> None:
        """Look for the last time; what cannot be found out is told as published, and no more."""
        if self._in_doubt.is_set():
            try:
                async with asyncio.timeout(LAST_LOOK_SECONDS):
                    await self._look_again()
            except Exception as error:  # whatever the broker raises, the runner is closed
                log.info("whether a queue received what was emitted last is not known: %s", describe(error))
        self._tell(len(self._untold), None)

    async def _look_again(self) -> None:
        """Ask the broker which of what was emitted under unknown topics went nowhere, and tell.

        An application may have declared its queues since the last look. So nothing is said to have gone nowhere before a look that
        began when it had been settled: whatever queue received it is seen there. A queue that was declared in between is
        seen, too, though it came too late; then nothing is said, which is not false. (What a queue received that was declared
        and removed between two looks went with it.)
        """
        doubtful, untold = self._doubtful.copy(), len(self._untold)
        await self._settler.flush()
        self.look_at(await self._broker.queues())
        for topic, times in doubtful.items():
            if topic not in self._bound:
                self._count_unrouted(topic, times)
        self._doubtful -= doubtful
        self._tell(untold, self._bound)
        if not self._doubtful:
            self._in_doubt.clear()

    def _tell(self, number: int, bound: frozenset[str] | None) -> None:
        """Note the first of what the journal was not told; where it is not known what is received, nothing is said of that."""
        told, self._untold = self._untold[:number], self._untold[number:]
        for message, worker in told:
            assert self._journal is not None
            self._journal.published(message, worker, nowhere=bound is not None and message.topic not in bound)

    def _count_unrouted(self, topic: str, times: int) -> None:
        self._metrics.unrouted += times
        if topic not in self._unrouted:
            self._unrouted.add(topic)
            log.info("no queue receives %r: such events go nowhere (said once)", topic)
