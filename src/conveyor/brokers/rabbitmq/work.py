"""What a broker object holds: the channel it consumes on, the deliveries in its hands, and their leases."""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from conveyor.broker import Delivery
from conveyor.brokers.rabbitmq.amqp import Channel, Connection, Incoming
from conveyor.core.message import Message

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq.order import Place
    from conveyor.brokers.rabbitmq.subscription import RabbitSubscription

LARGEST_PREFETCH: Final = 2_000
"""Messages that one round trip brings at most; quorum queues allow no more."""


SHORTEST_WAIT_SECONDS: Final = 0.001
DOUBT_SECONDS: Final = 2.0
"""How soon what was on its way to a cancelled consumer is there again."""


class Work:
    """The channel on which everything is consumed, and which of its deliveries the server waits for.

    An acknowledgement is valid only on the channel of its delivery: when this one goes, all that it delivered is lost.
    """

    def __init__(self, connection: Connection, channel: Channel) -> None:
        self.connection = connection
        self.channel = channel
        self._open: dict[int, None] = {}
        self._draws = itertools.count(1)
        self._doubts: dict[str, deque[float]] = {}

    @property
    def lost(self) -> bool:
        """The server has taken everything back."""
        return self.channel.closed.done() or self.connection.closed.done()

    def took(self, tag: int) -> None:
        """A delivery has arrived; they arrive in the order of their tags."""
        self._open[tag] = None

    def ack(self, tags: Iterable[int]) -> None:
        """Acknowledge; those before which nothing is open go as one."""
        wanted = set(tags)
        front = 0
        while self._open and (tag := next(iter(self._open))) in wanted:
            del self._open[tag]
            wanted.discard(tag)
            front = tag
        if front:
            self.channel.ack(front, multiple=True)
        for tag in wanted:
            if self._open.pop(tag, 0) is None:
                self.channel.ack(tag)

    def give_back(self, tags: Iterable[int]) -> None:
        """Let the server put these back to where they were, in this order; it counts them as delivered."""
        for tag in tags:
            if self._open.pop(tag, 0) is None:
                self.channel.nack(tag)

    def doubt(self, queue: str) -> bool:
        """Whether a message may have been counted as delivered for nothing; each cancelled consumer explains one.

        A quorum queue counts what was on its way to a consumer that was being cancelled, though nobody ever got it.
        """
        doubts = self._doubts.get(queue)
        now = asyncio.get_running_loop().time()
        while doubts:
            if doubts.popleft() > now:
                return True
        return False

    async def flush(self) -> None:
        """Return when the server has read all that was sent on the channel: it answers requests in order."""
        await self.channel.qos(0)

    async def draw(
        self,
        queues: list[str],
        limit: int,
        *,
        until: Callable[[], bool] | None = None,
        arrived: list[Incoming] | None = None,
        news: asyncio.Event | None = None,
        whole: int = 1,
        late: Callable[[Incoming], None] | None = None,
    ) -> list[Incoming]:
        """Up to limit messages: consume until the first ones are there, then stop. None stays in between.

        Parameters:
            queues: where from; each may give limit.
            until: looked at when there is news: stop now.
            arrived: filled as they come, so that a cancelled caller finds them.
            news: set when a message arrives; whoever changes what until sees sets it, too.
            whole: wait for so many.
            late: called with what arrives when all is over: a quorum queue may have sent it before it saw the end.
        """
        arrived = [] if arrived is None else arrived
        news = asyncio.Event() if news is None else news

        over = False

        def on_delivery(incoming: Incoming) -> None:
            self._open[incoming.delivery_tag] = None
            if over and late is not None:
                late(incoming)
            else:
                arrived.append(incoming)
                news.set()

        channel = self.channel
        # Never used before: a quorum queue takes a consumer of the same name for the one that still holds its messages.
        draw = next(self._draws)
        tags = [f"draw{draw}.{number}" for number in range(len(queues))]
        cut = asyncio.ensure_future(asyncio.shield(channel.closed))
        cut.add_done_callback(lambda _: news.set())
        # A cancel that overtakes the answer to its consume crashes the server's channel: so that answer is waited for, always.
        consuming = asyncio.gather(
            channel.qos(min(limit, LARGEST_PREFETCH)),
            *(
                channel.consume(queue, on_delivery, tag=tag, on_cancel=lambda _: news.set())
                for queue, tag in zip(queues, tags, strict=True)
            ),
        )

        async def stop() -> None:
            await asyncio.wait([consuming])
            if consuming.exception() is not None or self.lost:
                return
            if len(arrived) < limit:
                soon = asyncio.get_running_loop().time() + DOUBT_SECONDS
                for queue in queues:
                    self._doubts.setdefault(queue, deque(maxlen=LARGEST_PREFETCH)).append(soon)
            await asyncio.gather(*(channel.cancel(tag) for tag in tags), return_exceptions=True)

        try:
            await asyncio.shield(consuming)
            while len(arrived) < whole and not self.lost and not (until is not None and until()):
                news.clear()
                await news.wait()
        finally:
            cut.cancel()
            stopping = asyncio.ensure_future(stop())
            try:
                await asyncio.shield(stopping)
            except asyncio.CancelledError:
                await stopping
                raise
            over = True
        return arrived


class State(enum.Enum):
    """What a delivery in our hands is doing."""

    HELD = enum.auto()
    SETTLING = enum.auto()
    GONE = enum.auto()


class Held:
    """One delivery in our hands; it is its own receipt.

    Parameters:
        queue: its queue's name.
        origin: the physical queue that it came from.
        deliveries: this one included.
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
        self.due = 0.0
        self.state = State.HELD
        self.seconds = 0.0
        self.ends = 0.0
        self.since = asyncio.get_running_loop().time()
        self.renewing: asyncio.Future[None] | None = None
        self.place: Place | None = None

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
        self._lines: dict[float, OrderedDict[Held, None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def all(self) -> list[Held]:
        """Everything that is leased."""
        return [held for line in self._lines.values() for held in line]

    def begin(self, helds: Iterable[Held], seconds: float) -> None:
        """These leases begin, or begin anew, now."""
        now = asyncio.get_running_loop().time()
        line = self._lines.get(seconds)
        if line is None:
            line = self._lines[seconds] = OrderedDict()
        for held in helds:
            if held.seconds != seconds:
                self.end(held)
            held.seconds = seconds
            held.ends = now + seconds
            line[held] = None
            line.move_to_end(held)
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
