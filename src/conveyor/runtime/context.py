"""What a handler can ask about the attempt that it is, and say about it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Unpack

from conveyor.core.message import Message
from conveyor.errors import ConveyorError, NoSubscriber
from conveyor.runtime.outgoing import Emitter, Options, Publishing

Tell = Callable[[float, float | None, str], object]
"""Takes progress: done, total, note."""
PublishNow = Callable[[Message], Awaitable[bool]]
"""Publishes a message at once; gives whether a queue receives it."""


class Context:
    """The attempt that a handler is.

    Parameters:
        message: the message being handled, with its envelope.
        attempt: 1 on the first run.
        worker: the worker's name.
    """

    __slots__ = (
        "_cancelled",
        "_emitter",
        "_identity",
        "_publish_now",
        "_stops",
        "_tell",
        "attempt",
        "log",
        "message",
        "worker",
    )

    def __init__(
        self,
        message: Message,
        attempt: int,
        worker: str,
        identity: str,
        emitter: Emitter,
        stops: Callable[[], bool],
        tell: Tell | None,
        publish_now: PublishNow | None,
    ) -> None:
        self.message: Final[Message] = message
        self.attempt: Final[int] = attempt
        self.worker: Final[str] = worker
        self.log: Final = logging.getLogger(f"conveyor.worker.{worker}")
        self._stops = stops
        self._cancelled = False
        self._identity = identity
        self._emitter = emitter
        self._tell = tell
        self._publish_now = publish_now

    @property
    def cancelled(self) -> bool:
        """Whether somebody has cancelled the job.

        A plain ``def`` looks at it between two steps, and ends by itself: what it returns does not matter any more. An ``async def``
        gets a CancelledError, and tells by this a cancellation from a timeout. A process (cpu=True) is killed and never sees it.
        """
        return self._cancelled

    @property
    def shutting_down(self) -> bool:
        """Whether the runner drains: what has not ended when its grace is over is stopped, and runs again elsewhere, uncounted.

        A long handler that can go on from where it was may stop early with Retry(after=0), which counts as an attempt.
        """
        return self._stops()

    @property
    def idempotency_key(self) -> str:
        """The same text on every attempt of this worker on this message: hand it to services that know repeats by it."""
        return idempotency_key(self._identity, self.message.id)

    def progress(self, done: float, total: float | None = None, note: str = "") -> None:
        """Say how far the handler has come: for Ticket.status(), `conveyor jobs` and progress bars. Cheap: say it as often as you like.

        Whoever asks gets the latest. Without a journal nobody can ask, and nothing is sent.

        No number harms the handler: what is below 0, NaN or infinite counts as 0. More than the total is told as it is, since a
        total may have been a guess; a bar is full then.

        Parameters:
            done: so much, in any unit: anything that float() takes for a number, as a Decimal.
            total: of so much; None, or 0, where that is not known.
            note: in words.

        Raises:
            TypeError: done or total is no number.
        """
        try:
            amount, whole = _amount(done), None if total is None else _amount(total) or None
        except TypeError:
            raise TypeError(f"progress({done!r}, {total!r}): both are numbers, in any unit") from None
        if self._tell is not None:
            # The journal carries plain numbers and texts; what else a handler counts in would be nobody's to read.
            self._tell(amount, whole, str(note))

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
        if self._publish_now is None:
            raise ConveyorError(
                "a process of the pool has no broker, so nothing can be published now; use context.publish"
            )
        message = self._emitter.make(event, Options(**options))
        if not await self._publish_now(message) and require_subscriber:
            raise NoSubscriber(
                f"no queue receives {message.topic!r}; run a worker for it once, so that its queue exists"
            )
        return message


def _amount(number: float) -> float:
    """How much it is, for whoever shows it; 0.0 where it is nothing that could be shown.

    Raises:
        TypeError: it is no number.
    """
    try:
        return max(0.0, float(number)) if math.isfinite(number) else 0.0
    except (OverflowError, ValueError):  # 10**400, Decimal("sNaN")
        return 0.0


def cancel(context: Context) -> None:
    """Let a handler see that its job is cancelled."""
    context._cancelled = True


def idempotency_key(worker: str, message_id: str) -> str:
    """A key for the effects of a worker (its identity) on a message, in services that recognise repeats by a key."""
    return hashlib.sha256(f"{worker}\0{message_id}".encode()).hexdigest()


def from_thread(tell: Tell) -> Tell:
    """The same for a handler in a thread: the event loop is woken once for all that was said before it comes to it.

    Called in the event loop that tell belongs to.
    """
    loop = asyncio.get_running_loop()
    lock, latest = threading.Lock(), deque[tuple[float, float | None, str]](maxlen=1)

    def deliver() -> None:
        with lock:
            news = latest.pop()
        tell(*news)

    def say(done: float, total: float | None, note: str) -> None:
        with lock:
            first = not latest
            latest.append((done, total, note))
        if first:
            with contextlib.suppress(RuntimeError):  # the loop has ended before the handler did
                loop.call_soon_threadsafe(deliver)

    return say
