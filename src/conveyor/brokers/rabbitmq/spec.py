"""A queue as Conveyor knows it on RabbitMQ: what was declared, and the names of all that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from conveyor.broker import DEFAULT_LEASE_SECONDS, Queue
from conveyor.brokers.rabbitmq.address import QUEUE_TYPES
from conveyor.errors import ConfigurationError, QueueConflict

PARTITIONS: Final = 4
"""Queues into which the keys of an ordered queue are spread; each has one receiver at a time."""
RUNGS: Final = tuple(0.125 * 8**step for step in range(8))
"""Seconds that the queues of a delay ladder hold a message: 0.125, 1, 8, … 262,144 (3 days)."""
NATIVE: Final = ("exchange", "exchange_type", "routing_key", "dead_queue", "queue_type", "passive")


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """A queue as Conveyor knows it: what was declared, and how it was created.

    Parameters:
        queue_type: quorum, classic, or priority (classic with priorities).
        steps: so many queues of its delay ladder exist, from the lowest one up.
        version: grows with each change.
    """

    name: str
    topics: tuple[str, ...] = ()
    ordered: bool = False
    max_length: int | None = None
    lease_seconds: float = DEFAULT_LEASE_SECONDS
    native: Mapping[str, str] = {}
    queue_type: str = "quorum"
    temporary: bool = False
    steps: int = 0
    version: int = 0

    @property
    def dead(self) -> str:
        """Where its dead letters are kept."""
        return self.native.get("dead_queue") or f"{self.name}.dead"

    @property
    def later(self) -> str:
        """Where what is not due waits to be put onto the ladder."""
        return f"{self.name}.later"

    @property
    def keyed(self) -> str:
        """The exchange that tells an ordered queue's keys apart."""
        return f"{self.name}.keyed"

    @property
    def unkeyed(self) -> str:
        """The exchange for what has no key."""
        return f"{self.name}.unkeyed"

    @property
    def partitions(self) -> list[str]:
        """An ordered queue's queues by key."""
        return [f"{self.name}.keyed.{number}" for number in range(PARTITIONS)] if self.ordered else []

    def rung(self, step: int) -> str:
        """A queue of the delay ladder."""
        return f"{self.name}.delay.{step}"

    @property
    def ladder(self) -> list[str]:
        """The queues of the delay ladder that exist."""
        return [self.rung(step) for step in range(self.steps)]

    @property
    def replicated(self) -> bool:
        """Its queues are quorum queues."""
        return self.queue_type == "quorum"

    @property
    def passive(self) -> bool:
        """It is another's: used, never declared."""
        return self.native.get("passive") == "true"


def spec_of(queue: Queue, queue_type: str) -> Spec:
    """What a declaration asks for.

    Raises:
        ConfigurationError: its native settings make no sense here.
    """
    if unknown := sorted(queue.native.keys() - set(NATIVE)):
        raise ConfigurationError(
            f"the queue {queue.name!r} has the native setting {unknown[0]!r}; RabbitMQ knows {', '.join(NATIVE)}"
        )
    chosen = "classic" if queue.temporary else queue.native.get("queue_type", queue_type)
    if chosen not in QUEUE_TYPES:
        raise ConfigurationError(f"the queue {queue.name!r}: queue_type is {', '.join(QUEUE_TYPES)}, not {chosen!r}")
    if queue.native.get("passive", "false") not in {"true", "false"}:
        raise ConfigurationError(f"the queue {queue.name!r}: passive is 'true' or 'false'")
    return Spec(
        name=queue.name,
        topics=queue.topics,
        ordered=queue.ordered,
        max_length=queue.max_length,
        lease_seconds=queue.lease_seconds,
        native=dict(queue.native),
        queue_type=chosen,
        temporary=queue.temporary,
    )


def steps_for(seconds: float) -> int:
    """How many queues of a delay ladder it takes to wait so long; 0 is none."""
    return sum(rung <= seconds for rung in RUNGS)


def notes_of(partition: str) -> str:
    """The queue with the one message that says what of a partition is being handled."""
    return f"{partition}.notes"


def check_conflict(asked: Spec, there: Spec | None) -> None:
    """Raise QueueConflict where a declaration and what is there differ in what cannot be changed."""
    if there is not None and (there.ordered, there.temporary) != (asked.ordered, asked.temporary):
        raise QueueConflict(
            f"the queue {asked.name!r} exists as {_nature(there)}, and is declared as {_nature(asked)}; rename it, or change one of the two"
        )


def _nature(spec: Spec) -> str:
    return f"{'temporary' if spec.temporary else 'lasting'} and {'ordered by key' if spec.ordered else 'not ordered'}"


def merged(asked: Spec, there: Spec | None) -> Spec:
    """Topics are only ever added; what was found out about the queue stays."""
    if there is None:
        return asked
    topics = (*there.topics, *(topic for topic in asked.topics if topic not in there.topics))
    return msgspec.structs.replace(
        asked, topics=topics, steps=there.steps, version=there.version, queue_type=asked.queue_type
    )
