"""The deliveries in a broker object's hands, and their leases."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from conveyor.broker import Delivery
from conveyor.brokers.rabbitmq.amqp import Incoming
from conveyor.brokers.rabbitmq.work import Work
from conveyor.core.message import Message

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq.order import Place
    from conveyor.brokers.rabbitmq.subscription import RabbitSubscription

SHORTEST_WAIT_SECONDS: Final = 0.001


class State(enum.Enum):
    """What a delivery in our hands is doing."""

    HELD = enum.auto()
    SETTLING = enum.auto()
    GONE = enum.auto()


class Held:
    """One delivery in our hands; it is its own receipt.

    Parameters:
        deliveries: this one included.
        due: Unix seconds before which it was not to be delivered.
        since: when it came, or was renewed (the event loop's time).
    """

    __slots__ = (
        "attempts",
        "deliveries",
        "due",
        "ends",
        "error",
        "incoming",
        "message",
        "place",
        "queue",
        "renewing",
        "seconds",
        "since",
        "state",
        "subscription",
        "tag",
        "work",
    )

    def __init__(
        self,
        subscription: RabbitSubscription,
        work: Work,
        incoming: Incoming,
        message: Message,
        deliveries: int,
        attempts: int,
        error: str,
        due: float,
        since: float,
    ) -> None:
        self.subscription = subscription
        self.queue = subscription.queue
        self.work = work
        self.incoming = incoming
        self.tag = incoming.delivery_tag
        self.message = message
        self.deliveries = deliveries
        self.attempts = attempts
        self.error = error
        self.due = due
        self.since = since
        self.state = State.HELD
        self.seconds = self.ends = 0.0
        self.renewing: asyncio.Future[None] | None = None
        """Done when it has its new delivery tag."""
        self.place: Place | None = None
        """Where it stands among those of its key, in an ordered queue."""

    def delivery(self) -> Delivery:
        """As the receiver sees it."""
        return Delivery(self.message, self.queue, self, self.deliveries, self.attempts, self.error)


class Leases:
    """Who of what we hold gave no sign of life for too long. A lease is a promise to ourselves: the server knows none.

    Parameters:
        ended: called with those whose leases ended.
    """

    def __init__(self, ended: Callable[[list[Held]], None]) -> None:
        self._ended = ended
        # Leases of one length end in the order in which they began.
        self._lines: dict[float, dict[Held, None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def all(self) -> list[Held]:
        """Everything that is leased."""
        return [held for line in self._lines.values() for held in line]

    def begin(self, helds: Iterable[Held], seconds: float) -> None:
        """These leases begin, or begin anew, now."""
        now = asyncio.get_running_loop().time()
        line = self._lines.setdefault(seconds, {})
        for held in helds:
            if held.seconds:
                self.end(held)
            held.seconds = seconds
            held.ends = now + seconds
            line[held] = None
        if line and (self._timer is None or self._timer_at > now + seconds):
            self._set_timer(now)

    def end(self, held: Held) -> None:
        """This lease is over, in peace."""
        if (line := self._lines.get(held.seconds)) is not None:
            line.pop(held, None)

    def stop(self) -> None:
        """No lease ends any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def turn(self) -> None:
        """Look which leases have ended by now."""
        now = asyncio.get_running_loop().time()
        ended: list[Held] = []
        for line in self._lines.values():
            for held in line:
                if held.ends > now:
                    break
                ended.append(held)
        for held in ended:
            self._lines[held.seconds].pop(held)
        self._lines = {seconds: line for seconds, line in self._lines.items() if line}
        if ended:
            self._ended(ended)

    def _set_timer(self, now: float) -> None:
        firsts = [next(iter(line)).ends for line in self._lines.values() if line]
        self.stop()
        if firsts:
            self._timer_at = max(now + SHORTEST_WAIT_SECONDS, min(firsts))
            self._timer = asyncio.get_running_loop().call_at(self._timer_at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.turn()
        self._set_timer(asyncio.get_running_loop().time())
