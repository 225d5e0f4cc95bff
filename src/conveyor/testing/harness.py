"""Run an application in a test: in memory, to its last message, turning the clock instead of waiting."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from conveyor.app import Conveyor
from conveyor.broker import DeadFilter, DeadLetter, Delivery, Settlement
from conveyor.brokers.memory import MemoryBroker
from conveyor.core.codec import codec_for
from conveyor.core.events import event_type
from conveyor.core.message import Message
from conveyor.core.settle import Done, RetryAt
from conveyor.errors import ConfigurationError
from conveyor.runtime.control import internal
from conveyor.runtime.outgoing import Publishing
from conveyor.runtime.task import Task
from conveyor.testing.clock import TurnableClock

T = TypeVar("T")

LARGEST_PAGE = 1_000_000
"""Dead letters that a test looks at, at most."""


class _Recorder(MemoryBroker):
    """A memory broker that remembers what went through it."""

    def __init__(self, clock: TurnableClock) -> None:
        super().__init__(clock=clock)
        self.published: list[Message] = []
        self.retried: list[tuple[Message, RetryAt]] = []
        self.dues: list[float] = []
        self.settled = asyncio.Event()

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        unrouted = await super().publish(messages, queue=queue)
        self._note(messages)
        return unrouted

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        lost = await super().settle(settlements)
        gone = {delivery.receipt for delivery in lost}
        for settlement in settlements:
            verdict = settlement.verdict
            if settlement.delivery.receipt in gone:
                continue
            if isinstance(verdict, Done):
                self._note(verdict.emits)
            elif isinstance(verdict, RetryAt):
                self.retried.append((settlement.delivery.message, verdict))
            if due := getattr(verdict, "due", 0.0):
                heapq.heappush(self.dues, due)
        self.settled.set()
        return lost

    def _note(self, messages: Sequence[Message]) -> None:
        own = [message for message in messages if not internal(message.topic)]
        self.published.extend(own)
        for message in own:
            if message.due:
                heapq.heappush(self.dues, message.due)


class Harness:
    """An application on a broker in memory, under a clock that the test turns.

    ``async with Harness(app) as shop:`` runs the workers inside the block; the application is as it was afterwards.

    Parameters:
        app: what is tested.
        provide: type → the object that handlers receive instead of what the application provides.
        database: instead of the application's own.
        run_seconds: real time that run_to_end() may take before it says what is still going on.
    """

    def __init__(
        self,
        app: Conveyor,
        *,
        provide: Mapping[Any, Any] | None = None,
        database: str | None = None,
        run_seconds: float = 30.0,
    ) -> None:
        self.app = app
        self.clock = TurnableClock()
        self._provide = dict(provide or {})
        self._database = database
        self._run_seconds = run_seconds
        self._broker = _Recorder(self.clock)
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await self._broker.open()
            stack.push_async_callback(self._broker.close)
            stack.enter_context(
                self.app.replaced(broker=self._broker, clock=self.clock, provide=self._provide, database=self._database)
            )
            await stack.enter_async_context(self.app.running(grace_seconds=5.0))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def publish(self, event: object, **options: Unpack[Publishing]) -> Message:
        """Publish as Conveyor.publish does, and run to the last message."""
        message = await self.app.publish(event, **options)
        await self.run_to_end()
        return message

    async def run_to_end(self, *, turn_clock: bool = True) -> None:
        """Wait until nothing is ready or in work.

        Parameters:
            turn_clock: also let back-offs and delays pass, by turning the clock to the next one whenever nothing else is left.

        Raises:
            AssertionError: it is still busy after run_seconds; says with what.
        """
        try:
            async with asyncio.timeout(self._run_seconds):
                while True:
                    self._broker.settled.clear()
                    queues = await self._broker.queues()
                    if any(queue.ready or queue.in_flight for queue in queues) or await self._handing_off():
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(0.05):  # the outbox is handed off without a settlement
                                await self._broker.settled.wait()
                    elif turn_clock and any(queue.delayed for queue in queues):
                        self._turn_to_next_due()
                    else:
                        return
        except TimeoutError:
            busy = ", ".join(
                f"{queue.name} (ready {queue.ready}, in flight {queue.in_flight}, delayed {queue.delayed})"
                for queue in await self._broker.queues()
                if queue.ready or queue.in_flight or queue.delayed
            )
            raise AssertionError(f"still at work after {self._run_seconds:g} s: {busy}") from None

    async def turn(self, by: float | timedelta) -> None:
        """Let time pass (seconds or timedelta), and run what has become due by then."""
        self.clock.turn(by.total_seconds() if isinstance(by, timedelta) else by)
        self._broker.clock_turned()
        await self.run_to_end(turn_clock=False)

    def published(self, kind: type[T]) -> list[T]:
        """What was published under a type's topic so far, in order."""
        topic, codec = event_type(kind).topic, codec_for(kind)
        return [codec.decode(message.body) for message in self._broker.published if message.topic == topic]

    def sent(self, task: Task[..., Any]) -> int:
        """How often a task was sent so far."""
        topic = self.app.workers[task.name].queue.topics[0]
        return sum(message.topic == topic for message in self._broker.published)

    def messages(self, kind: type | None = None) -> list[Message]:
        """The messages published so far, in order, with their envelopes; of one type, or all."""
        topic = None if kind is None else event_type(kind).topic
        return [message for message in self._broker.published if topic in (None, message.topic)]

    def retried(self, kind: type | None = None) -> list[str]:
        """The errors of the attempts that were to be repeated, in order."""
        topic = None if kind is None else event_type(kind).topic
        return [verdict.error for message, verdict in self._broker.retried if topic in (None, message.topic)]

    async def dead(self, worker: str | None = None) -> list[DeadLetter]:
        """The dead letters of a worker (by its name), or all, oldest first; their attempts are those that were to be repeated.

        Raises:
            ConfigurationError: there is no such worker.
        """
        if worker is not None and worker not in self.app.workers:
            raise ConfigurationError(
                f"{self.app.name} has no worker named {worker!r}; it has: {', '.join(self.app.workers)}"
            )
        queue = None if worker is None else self.app.workers[worker].queue.name
        return await self._broker.dead_letters(DeadFilter(queue=queue), limit=LARGEST_PAGE)

    async def _handing_off(self) -> bool:
        return await self.app.handing_off()

    def _turn_to_next_due(self) -> None:
        now = self.clock()
        dues = self._broker.dues
        while dues and dues[0] <= now:
            heapq.heappop(dues)
        if dues:
            self.clock.turn(dues[0] - now)
        self._broker.clock_turned()
