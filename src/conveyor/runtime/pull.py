"""Pulling: code that asks for messages one by one and says itself how each one ended, instead of having a handler called."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, Generic, Self, TypeVar, Unpack

from conveyor.broker import DeadFilter, DeadLetter, Delivery, Queue, QueueInfo, Settlement, Subscription
from conveyor.core.codec import Codec
from conveyor.core.message import Message
from conveyor.core.retry import RetryPolicy
from conveyor.core.settle import (
    Dead,
    Done,
    Reason,
    Release,
    Verdict,
    verdict_on_arrival,
    verdict_on_error,
)
from conveyor.core.words import keepable
from conveyor.errors import ConfigurationError, PayloadError
from conveyor.runtime.connection import Connection
from conveyor.runtime.consumer import trace_of
from conveyor.runtime.journal import journals_to_tell, redrive
from conveyor.runtime.outgoing import Emitter, Options, Outgoing, Publishing

T = TypeVar("T")

HELD: Final = 100
"""Messages that one puller may hold and not have settled."""


class Pulled(Generic[T]):
    """One message in the hands of whoever pulled it, until they say how it ended or its lease does.

    Parameters:
        payload: what was published.
        message: the message around it.
        attempt: 1 at the first delivery that is to be handled.
        policy: what becomes of it when it fails.
    """

    def __init__(
        self, payload: T, delivery: Delivery, connection: Connection, outgoing: Outgoing, policy: RetryPolicy
    ) -> None:
        self.payload: Final = payload
        self.message: Final = delivery.message
        self.attempt: Final = delivery.attempts + 1
        self._delivery = delivery
        self._connection = connection
        self._clock = outgoing.clock
        self._policy = policy
        self._emitter = Emitter(outgoing, delivery.message, delivery.queue)
        self._begun = time.monotonic()

    def publish(self, event: object, **options: Unpack[Publishing]) -> Message:
        """Publish an event when, and only when, this message ends as done. Takes the options of Conveyor.publish.

        Raises:
            PayloadError: the event does not fit its own type, or has no topic.
        """
        return self._emitter.add(event, Options(**options))

    async def done(self) -> bool:
        """It is handled; what was published with it goes out. Returns whether it was still ours: else somebody else has it.

        Where the broker fails to hear of it, it can be said again, and means the same.
        """
        return await self._settle(Done(tuple(self._emitter.messages)))

    async def failed(self, error: Exception) -> bool:
        """This attempt failed: the policy decides whether it is tried again, or becomes a dead letter. Retry and Reject overrule it.

        Returns whether it was still ours.
        """
        return await self._settle(self._verdict_on(error))

    def final(self, error: Exception) -> bool:
        """Whether failing with this error would be the end of it."""
        return isinstance(self._verdict_on(error), Dead)

    async def give_back(self) -> bool:
        """It was not handled: anybody may have it, and no attempt is counted. Returns whether it was still ours."""
        return await self._settle(Release())

    async def extend(self) -> bool:
        """A sign of life: its lease begins anew. Returns whether it is still ours."""
        return not await self._connection.broker.extend([self._delivery])

    def _verdict_on(self, error: Exception) -> Verdict:
        return verdict_on_error(
            error,
            attempts=self._delivery.attempts,
            policy=self._policy,
            now=self._clock(),
            chance=random.random(),
            traceback=trace_of(error),
        )

    async def _settle(self, verdict: Verdict) -> bool:
        if await self._connection.broker.settle([Settlement(self._delivery, verdict)]):
            return False
        _note(self._connection, self._delivery, verdict, self._begun)
        return True


class Pull(Generic[T]):
    """A receiver of one queue. Made by Conveyor.pull; enter it with ``async with``, which connects and declares the queue.

    What is pulled belongs to the puller for the queue's lease; nobody extends it unless Pulled.extend is called.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        queue: Queue,
        codec: Codec,
        policy: RetryPolicy,
        outgoing: Outgoing,
        prefetch: int,
    ) -> None:
        self.queue: Final = queue
        self._connect = connect
        self._codec = codec
        self._policy = policy
        self._outgoing = outgoing
        self._prefetch = prefetch
        self._one_at_a_time = asyncio.Lock()
        self._connection: Connection | None = None
        self._subscription: Subscription | None = None

    async def __aenter__(self) -> Self:
        self._connection = await self._connect()
        await self._connection.broker.declare([self.queue])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subscription, self._subscription, self._connection = self._subscription, None, None
        if subscription is not None:
            await subscription.close()

    async def take(self, timeout: float | None = None) -> Pulled[T] | None:
        """The next message; None where none came in so many seconds. What cannot be handled becomes a dead letter and is left out.

        Raises:
            BrokerError: the broker cannot be asked now.
        """
        try:
            async with asyncio.timeout(timeout), self._one_at_a_time:
                if self._subscription is None:
                    self._subscription = await self._open.broker.subscribe(self.queue.name, self._prefetch)
                while True:
                    for delivery in await self._subscription.fetch(1):
                        payload = self._read(delivery)
                        if not isinstance(payload, Dead):
                            return Pulled(payload, delivery, self._open, self._outgoing, self._policy)
                        if not await self._open.broker.settle([Settlement(delivery, payload)]):
                            _note(self._open, delivery, payload, None)
        except TimeoutError:
            return None

    def decode(self, message: Message) -> T:
        """The payload of a message, such as a dead letter's.

        Raises:
            PayloadError: it is none.
        """
        try:
            payload: T = self._codec.decode(message.body)
        except Exception as error:
            raise PayloadError(self._codec.explain(error)) from error
        return payload

    async def info(self) -> QueueInfo:
        """The figures of the queue."""
        return next(info for info in await self._open.broker.queues() if info.name == self.queue.name)

    async def dead_letters(
        self, *, id: str | None = None, limit: int = 100, after: str | None = None
    ) -> list[DeadLetter]:
        """A page of the queue's dead letters, oldest first.

        Parameters:
            id: only the one of this message.
            after: begin behind the letter with this position.
        """
        return await self._open.broker.dead_letters(DeadFilter(queue=self.queue.name, id=id), limit=limit, after=after)

    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        """Put dead letters back into the queue, as if they were new; returns how many there still were."""
        broker = self._open.broker
        return await redrive(broker, letters, await journals_to_tell(broker), self._outgoing.clock)

    async def discard(self, letters: Sequence[DeadLetter]) -> int:
        """Delete dead letters for good; returns how many there still were."""
        return await self._open.broker.discard(letters)

    @property
    def _open(self) -> Connection:
        if self._connection is None:
            raise ConfigurationError(f"nothing can be pulled from {self.queue.name} here: async with app.pull(…) as …")
        return self._connection

    def _read(self, delivery: Delivery) -> T | Dead:
        end = verdict_on_arrival(
            delivery.message,
            crashes=delivery.crashes,
            policy=self._policy,
            now=self._outgoing.clock(),
            last_error=delivery.error,
        )
        if end is not None:
            return end
        try:
            return self.decode(delivery.message)
        except PayloadError as error:
            return Dead(Reason.INVALID, keepable(str(error)))


def _note(connection: Connection, delivery: Delivery, verdict: Verdict, begun: float | None) -> None:
    """Tell the journal, where it is on, how a delivery ended; the queue stands for the worker that a puller has not."""
    if connection.journal is not None:
        connection.journal.settled(delivery.queue, delivery, verdict, begun)
        for emitted in verdict.emits if isinstance(verdict, Done) else ():
            connection.journal.published(emitted, delivery.queue)
