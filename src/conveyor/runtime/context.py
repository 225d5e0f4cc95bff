"""What a handler can ask about the attempt that it is."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import Final, Unpack

from conveyor.broker import Broker, Delivery
from conveyor.core.message import Message
from conveyor.errors import NoSubscriber
from conveyor.runtime.outgoing import Emitter, Options, Publishing


class Context:
    """The attempt that a handler is.

    Parameters:
        message: the message being handled, with its envelope.
        attempt: 1 on the first run.
        worker: the worker's name.
        shutting_down: set when the runner drains; a long handler may look at it and stop early with Retry(after=0).
    """

    __slots__ = ("_broker", "_emitter", "_identity", "attempt", "log", "message", "shutting_down", "worker")

    def __init__(
        self,
        delivery: Delivery,
        worker: str,
        identity: str,
        emitter: Emitter,
        broker: Broker,
        shutting_down: asyncio.Event,
    ) -> None:
        self.message: Final[Message] = delivery.message
        self.attempt: Final[int] = delivery.attempts + 1
        self.worker: Final[str] = worker
        self.shutting_down: Final = shutting_down
        self.log: Final = logging.getLogger(f"conveyor.worker.{worker}")
        self._identity = identity
        self._emitter = emitter
        self._broker = broker

    @property
    def idempotency_key(self) -> str:
        """The same text on every attempt of this worker on this message: hand it to services that know repeats by it."""
        return idempotency_key(self._identity, self.message.id)

    def publish(self, event: object, **options: Unpack[Publishing]) -> Message:
        """Publish an event when, and only when, this attempt succeeds.

        Takes the options of Conveyor.publish. Inside a handler with a Transaction the event is part of it.

        Raises:
            PayloadError: the event does not fit its own type, or has no topic.
        """
        return self._emitter.add(event, Options(**options))

    async def publish_now(
        self, event: object, *, require_subscriber: bool = False, **options: Unpack[Publishing]
    ) -> Message:
        """Publish an event at once, whatever becomes of this attempt; returns when the broker durably has it.

        For what has to be done after the message has gone on, and for news of a long handler. A repeated attempt publishes it again,
        under the same id, so that its receivers can tell. It is no part of a Transaction.

        Raises:
            PayloadError: the event does not fit its own type, or has no topic.
            NoSubscriber: no queue receives it, and require_subscriber.
            BrokerError: the broker does not have it.
        """
        message = self._emitter.make(event, Options(**options))
        if await self._broker.publish((message,)) and require_subscriber:
            raise NoSubscriber(
                f"no queue receives {message.topic!r}; run a worker for it once, so that its queue exists"
            )
        return message


def idempotency_key(worker: str, message_id: str) -> str:
    """A key for the effects of a worker (its identity) on a message, in services that recognise repeats by a key."""
    return hashlib.sha256(f"{worker}\0{message_id}".encode()).hexdigest()
