"""The seam: what a broker is. One file or package in brokers/ implements this page; conveyor.testing proves it.

A broker stores and moves messages. It decides nothing: when to retry and when to give up is decided above it, by pure
functions, and reaches it as verdicts. Everything takes batches, because one commit, one round trip or one thread hop for
many messages is what makes a broker fast; a batch of one is as welcome, and nobody waits for a batch to fill.

All methods are called from one event loop. Any of them may raise BrokerUnavailable (not now: the caller tries again)
or BrokerFull (no room now); a broker that lost its connection restores it by itself, so that a later call succeeds.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from conveyor.core.message import Message
from conveyor.core.settle import Verdict

DEFAULT_LEASE_SECONDS: Final = 30.0
"""Long enough that a pause (garbage, a busy disk) loses no lease; short enough that a dead host is soon made up for."""
DEFAULT_BODY_LIMIT: Final = 1024 * 1024
"""Bytes of a message's body. Larger things belong in a file or an object store, with their address in the message."""

Clock = Callable[[], float]
"""Gives Unix seconds."""
Receipt = object
"""The fencing token of one delivery; only the broker that made it looks inside. Hashable, comparable."""


class Feature(enum.StrEnum):
    """What a broker may be unable to do; a queue that asks for a missing one is refused at the start."""

    DELAY = "delay"
    """Messages with a due time."""
    PRIORITY = "priority"
    """Messages of higher priority first."""
    ORDER = "order"
    """One message per key at a time, in the order of publishing, also during back-off."""
    BOUND = "bound"
    """Queues that drop their oldest message when full."""
    TEMPORARY = "temporary"
    """Queues that vanish with their owner."""
    FENCE = "fence"
    """A settlement with a lost lease is refused."""
    RECLAIM = "reclaim"
    """What a dead process held can be given back before its leases end."""
    AGE = "age"
    """How long the oldest ready message has been waiting is known."""
    DURABLE = "durable"
    """What was published survives the end of every process."""


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """Where the messages of some topics wait for one worker.

    Parameters:
        name: unique on the broker.
        topics: every message published under one of these is put into the queue.
        ordered: per-key order: of several messages with one key only the oldest is delivered (or waited for, where it is not due), the
            next one after its settlement as done or dead. Messages without a key are not ordered.
        max_length: when more than so many messages wait, the oldest are dropped; None is unbounded.
        temporary: it vanishes, with what waits in it, when the broker object that declared it closes or its process dies.
        lease_seconds: how long a delivery belongs to a receiver that gives no sign of life.
        native: settings that only one kind of broker understands (an exchange's name, a queue's type).
    """

    name: str
    topics: tuple[str, ...] = ()
    ordered: bool = False
    max_length: int | None = None
    temporary: bool = False
    lease_seconds: float = DEFAULT_LEASE_SECONDS
    native: Mapping[str, str] = {}


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """One hand-over of a message to a receiver.

    Parameters:
        message: what is delivered.
        queue: where it waited.
        receipt: settles and extends this delivery, and no other one.
        deliveries: hand-overs so far, this one included, released ones not; counted before the receiver has it.
        attempts: hand-overs so far that ended as RetryAt.
        error: what is known about the end of the last one, "" where there was none.
    """

    message: Message
    queue: str
    receipt: Receipt
    deliveries: int
    attempts: int
    error: str = ""

    @property
    def crashes(self) -> int:
        """Earlier hand-overs that ended without a settlement: their process died, or slept past its lease."""
        return self.deliveries - self.attempts - 1


class Settlement(msgspec.Struct, frozen=True, gc=False):
    """How a delivery ends."""

    delivery: Delivery
    verdict: Verdict


class QueueInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A queue as an operator sees it: how it is declared, and what is in it.

    Parameters:
        ready: messages that a receiver could have now.
        in_flight: messages delivered and not yet settled.
        delayed: messages that are not due yet, or wait for an older one of their key.
        dead: dead letters.
        oldest_seconds: how long the oldest ready message has been ready; None where none is, or the broker lacks Feature.AGE.
        consumers: live subscriptions, over all processes; None where the broker cannot tell.
        native: the settings of this kind of broker that it was declared with; empty where the kind knows none.
    """

    name: str
    topics: tuple[str, ...]
    ordered: bool
    max_length: int | None
    temporary: bool
    lease_seconds: float
    ready: int
    in_flight: int
    delayed: int
    dead: int
    oldest_seconds: float | None
    consumers: int | None
    native: Mapping[str, str] = {}


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message given up, kept whole until somebody redrives or discards it.

    Parameters:
        position: names this dead letter on its broker, and orders the list (oldest first).
        reason: one of conveyor.core.settle.Reason, or what another program wrote there.
        attempts: those that were to be repeated; the last one, which ended it, is not among them.
        died: Unix seconds.
    """

    position: str
    queue: str
    message: Message
    reason: str
    error: str
    traceback: str
    deliveries: int
    attempts: int
    died: float


class DeadFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters are meant; what is None does not restrict. error is a part of the text, any case."""

    queue: str | None = None
    id: str | None = None
    reason: str | None = None
    error: str | None = None


class Subscription(Protocol):
    """One receiver of one queue."""

    async def fetch(self, limit: int) -> list[Delivery]:
        """Wait until there is at least one message, then give up to limit of them, oldest of the highest priority first.

        Each is counted and leased before it is returned. When the caller is cancelled, nothing stays behind: what was
        claimed for it is released.

        Raises:
            BrokerError: the subscription or its broker was closed meanwhile.
        """
        ...

    async def close(self) -> None:
        """End it. What was fetched stays leased: the receiver settles or releases it."""
        ...


class Broker(Protocol):
    """Stores and moves messages."""

    owner: str
    """Names this broker object among all processes, unguessably: whoever holds a lease is this owner, never a host or a pid."""
    missing: Mapping[Feature, str]
    """The features that it lacks, each with the reason."""

    async def open(self) -> None:
        """Connect, create what it needs, and check that it is safe to use.

        Raises:
            BrokerError: it cannot be opened; says why and what to do.
        """
        ...

    async def close(self) -> None:
        """Let go of everything that open() took; what is leased to this owner goes back uncounted where that is possible."""
        ...

    async def declare(self, queues: Sequence[Queue]) -> None:
        """Make sure that these queues exist and receive their topics. Any number of times, from any process.

        Topics are only ever added to an existing queue's; lease_seconds and max_length follow the last declaration.

        Raises:
            QueueConflict: a queue exists and differs in what cannot be changed; the text names both sides.
            MissingFeature: a queue asks for what this broker lacks.
        """
        ...

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        """Give the messages to every queue of their topics; return when the broker durably owns them all.

        Messages of one call to one queue keep their order.

        Parameters:
            queue: put them into this declared queue alone, whatever their topics.

        Returns:
            The ids of those whose topic no queue receives: they went nowhere.

        Raises:
            PublishFailed: names which of them it does not own, and which perhaps.
            BrokerError: there is no such queue.
        """
        ...

    async def subscribe(self, queue: str, prefetch: int, *, early: bool = False) -> Subscription:
        """Become a receiver of a declared queue, which is given no more than prefetch deliveries that it has not settled.

        Parameters:
            early: also receive what is not due yet, and what waits behind another message of its key: for whoever moves
                messages elsewhere and handles none. Messages of a key come in their order; those that are not due
                have in message.due when they would have come. What such a receiver loses or leaves behind waits as before.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """End deliveries. What a Done emits is durable before its delivery is gone, atomically with it where the broker can.

        A repeated settlement of the same delivery is reported as lost, and has no effect.

        Returns:
            The deliveries whose lease is lost: nothing was done to them. What they would have emitted was not published,
            or, where a broker cannot fence, was published under ids that tell the repeat.

        Raises:
            PublishFailed: an emitted message cannot be stored; none of these deliveries was settled.
        """
        ...

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Heartbeat: start the leases anew.

        Returns:
            The deliveries whose lease is lost; stop working on them.
        """
        ...

    async def reclaim(self, owner: str, why: str) -> int:
        """Give back at once what a dead owner held. The deliveries stay counted; why is kept as their last error.

        Returns:
            How many; 0 where the broker lacks Feature.RECLAIM.
        """
        ...

    async def queues(self) -> list[QueueInfo]:
        """Every queue there is, by name."""
        ...

    async def dead_letters(self, which: DeadFilter, *, limit: int, after: str | None = None) -> list[DeadLetter]:
        """A page of dead letters, oldest first, beginning behind the position after."""
        ...

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters that came from elsewhere, whole, behind those that are here; their positions are given anew.

        Raises:
            BrokerError: one of their queues is not declared here; none of them was kept.
        """
        ...

    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        """Put dead letters back into their queues (as conveyor.core.message.redriven), behind what waits there, all counts at zero.

        Returns:
            How many there still were.
        """
        ...

    async def discard(self, letters: Sequence[DeadLetter]) -> int:
        """Delete dead letters for good. Returns how many there still were."""
        ...

    async def purge(self, queue: str) -> int:
        """Delete what waits in a queue (ready and delayed), not what is in flight or dead. Returns how many."""
        ...

    async def remove(self, queue: str, *, discard_dead: bool = False) -> None:
        """End a queue for good: no topic leads to it any more, and what is ready, delayed or in flight in it is gone.

        What somebody still holds of it is lost to him. Whoever declares it again has a new one, in which nothing is.

        Parameters:
            discard_dead: its dead letters go with it; otherwise it is refused where there are any, because nobody could redrive them.

        Raises:
            QueueInUse: it has live subscriptions, or dead letters that are to stay; nothing was done to it.
            BrokerError: there is no such queue.
        """
        ...

    async def risks(self) -> list[str]:
        """What in the server's settings or state endangers messages or work: sentences that say what to do; empty where all is well."""
        ...
