"""The memory broker: the whole contract inside one process, for tests and throw-away work. Nothing outlives the process."""

from __future__ import annotations

import asyncio
import enum
import heapq
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import count, islice
from typing import Final
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import msgspec

from conveyor.broker import Clock, DeadFilter, DeadLetter, Delivery, Feature, Queue, QueueInfo, Settlement
from conveyor.core.message import Message, redriven
from conveyor.core.settle import Dead, Done, Release, RetryAt
from conveyor.core.words import counted
from conveyor.errors import BrokerError, BrokerUnavailable, ConfigurationError, QueueConflict, QueueInUse

log = logging.getLogger("conveyor.memory")

SHORTEST_WAIT_SECONDS: Final = 0.001
"""The event loop's clock and the broker's may differ by a little; a timer that fired too soon must not spin."""
STALE_ALLOWED: Final = 64
"""Items of a heap whose message is gone are tolerated up to this number, or to as many as there are live ones."""
LEASE_ENDED: Final = "its lease ended without a sign of life"


def from_url(url: str, *, owner: str | None = None, clock: Clock = time.time) -> MemoryBroker:
    """``memory://`` has a store of its own; ``memory://name`` shares one with every living broker object of this name.

    Raises:
        ConfigurationError: the URL has more than a name.
    """
    parts = urlsplit(url)
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigurationError(f"{url!r}: a memory URL is memory:// or memory://name, without path or options")
    if not parts.netloc:
        return MemoryBroker(owner=owner, clock=clock)
    store = _named.get(parts.netloc)
    if store is None:
        store = _named[parts.netloc] = MemoryStore()
    return MemoryBroker(store=store, owner=owner, clock=clock)


class MemoryStore:
    """What several MemoryBroker objects of one event loop may share: the queues, and what is in them."""

    def __init__(self) -> None:
        self.queues: dict[str, _Queue] = {}
        self.topics: dict[str, list[_Queue]] = {}
        self.dead: dict[str, DeadLetter] = {}
        self.brokers: set[MemoryBroker] = set()
        self.sequence = count(1)

    def put(self, message: Message, now: float) -> bool:
        """Give a message to every queue of its topic; False where there is none."""
        queues = self.topics.get(message.topic)
        if not queues:
            return False
        for queue in queues:
            queue.add(_Entry(message, next(self.sequence), message.due), now)
        return True

    def remove(self, queue: _Queue) -> None:
        """A queue and what is in it are gone; its dead letters are not."""
        del self.queues[queue.name]
        for topic in queue.topics:
            self.topics[topic].remove(queue)
        queue.end(BrokerUnavailable(f"the temporary queue {queue.name!r} is gone with its owner"))


_named: Final[WeakValueDictionary[str, MemoryStore]] = WeakValueDictionary()


class _Where(enum.Enum):
    READY = enum.auto()
    DELAYED = enum.auto()
    BEHIND = enum.auto()
    """An older message of its key comes first."""
    LEASED = enum.auto()
    GONE = enum.auto()


class _Entry:
    """A message in one queue."""

    __slots__ = (
        "ahead",
        "attempts",
        "behind",
        "deliveries",
        "due",
        "error",
        "lease",
        "message",
        "sequence",
        "since",
        "where",
    )

    def __init__(self, message: Message, sequence: int, due: float) -> None:
        self.message = message
        self.sequence = sequence
        self.due = due
        self.where = _Where.BEHIND
        self.since = 0.0
        self.deliveries = 0
        self.attempts = 0
        self.error = ""
        self.lease: _Lease | None = None
        self.ahead: _Entry | None = None
        self.behind: _Entry | None = None


class _Lease:
    """The receipt of one delivery: valid as long as its entry has this very lease."""

    __slots__ = ("ends", "entry", "queue", "seconds", "subscription")

    def __init__(
        self, entry: _Entry, queue: _Queue, subscription: MemorySubscription, seconds: float, ends: float
    ) -> None:
        self.entry = entry
        self.queue = queue
        self.subscription = subscription
        self.seconds = seconds
        self.ends = ends


class _Queue:
    """One queue. Every entry is at one place: waiting (ready, delayed or behind another one of its key), or leased."""

    def __init__(self, declared: Queue, holder: MemoryBroker) -> None:
        self.name = declared.name
        self.ordered = declared.ordered
        self.temporary = declared.temporary
        self.holder = holder
        self.topics: list[str] = []
        self.max_length: int | None = None
        self.lease_seconds = declared.lease_seconds
        self.dead = 0
        self.subscriptions: set[MemorySubscription] = set()
        self.early: set[MemorySubscription] = set()
        self.waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._clock = holder.clock
        self._waiting: dict[int, _Entry] = {}
        self._ready: list[tuple[int, int, _Entry]] = []
        self._ready_count = 0
        self._delayed: list[tuple[float, int, _Entry]] = []
        self._stale = 0
        self._oldest: list[int] = []
        # Leases of one length end in the order in which they began: a line for each length needs no heap and no scan.
        self._leases: dict[float, OrderedDict[_Lease, None]] = {}
        # The youngest entry of each key; ahead and behind lead through the others.
        self._keys: dict[str, _Entry] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    # Messages come and go

    def add(self, entry: _Entry, now: float) -> None:
        """A message arrives."""
        key = entry.message.key
        if self.ordered and key is not None:
            entry.ahead = self._keys.get(key)
            self._keys[key] = entry
            if entry.ahead is not None:
                entry.ahead.behind = entry
        self._wait(entry, now)

    def claim(self, limit: int, subscription: MemorySubscription, now: float) -> list[Delivery]:
        """Count and lease what is ready, the oldest of the highest priority first."""
        ready, seconds = self._ready, self.lease_seconds
        leases = self._leases.setdefault(seconds, OrderedDict())
        claimed: list[Delivery] = []
        while ready and len(claimed) < limit:
            entry = heapq.heappop(ready)[2]
            if entry.where is _Where.GONE:
                self._stale -= 1
                continue
            self._ready_count -= 1
            del self._waiting[entry.sequence]
            entry.where = _Where.LEASED
            entry.deliveries += 1
            entry.lease = lease = _Lease(entry, self, subscription, seconds, now + seconds)
            leases[lease] = None
            claimed.append(Delivery(entry.message, self.name, lease, entry.deliveries, entry.attempts, entry.error))
        subscription.held += len(claimed)
        if claimed and self.waiters:
            self.wake()
            self.set_timer()
        return claimed

    def claim_early(self, limit: int, subscription: MemorySubscription, now: float) -> list[Delivery]:
        """Count and lease what waits, ready or not, the oldest first."""
        until = now + self.lease_seconds
        leases = self._leases.setdefault(self.lease_seconds, OrderedDict())
        claimed: list[Delivery] = []
        for entry in heapq.nsmallest(limit, self._waiting.values(), key=lambda each: each.sequence):
            if entry.where is _Where.READY:
                self._ready_count -= 1
            del self._waiting[entry.sequence]
            entry.where = _Where.LEASED
            entry.deliveries += 1
            entry.lease = lease = _Lease(entry, self, subscription, self.lease_seconds, until)
            leases[lease] = None
            message = msgspec.structs.replace(entry.message, due=entry.due) if entry.due > now else entry.message
            claimed.append(Delivery(message, self.name, lease, entry.deliveries, entry.attempts, entry.error))
        subscription.held += len(claimed)
        self._remove_stale()
        return claimed

    def finish(self, lease: _Lease, now: float) -> None:
        """A leased message is done or dead; the next one of its key has its turn."""
        self._end_lease(lease)
        self._forget(lease.entry, now)

    def give_back(self, lease: _Lease, due: float, now: float) -> None:
        """A leased message waits again, at its old place in the order."""
        self._end_lease(lease)
        lease.entry.due = due
        self._wait(lease.entry, now)

    def extend(self, lease: _Lease, now: float) -> None:
        """A lease starts anew."""
        del self._leases[lease.seconds][lease]
        lease.seconds = self.lease_seconds
        lease.ends = now + lease.seconds
        self._leases.setdefault(lease.seconds, OrderedDict())[lease] = None

    def purge(self, now: float) -> int:
        """Delete what waits."""
        waiting = sorted(self._waiting.items(), reverse=True)
        for _, entry in waiting:  # the youngest first, so that none gets its turn only to be deleted
            self._drop(entry, now)
        return len(waiting)

    def bound(self, max_length: int | None, now: float) -> None:
        """From now on, the oldest are dropped when more than so many wait."""
        self.max_length = max_length
        self._oldest = sorted(self._waiting) if max_length is not None else []
        self._drop_oldest(now)

    def held_by(self, owner: str) -> list[_Lease]:
        """The leases of one owner."""
        return [lease for leases in self._leases.values() for lease in leases if lease.subscription.owner == owner]

    def info(self, now: float) -> QueueInfo:
        """The figures; what waits behind an older message of its key is among the delayed."""
        since = min((entry.since for _, _, entry in self._ready if entry.where is _Where.READY), default=None)
        return QueueInfo(
            name=self.name,
            topics=tuple(self.topics),
            ordered=self.ordered,
            max_length=self.max_length,
            temporary=self.temporary,
            lease_seconds=self.lease_seconds,
            ready=self._ready_count,
            in_flight=sum(map(len, self._leases.values())),
            delayed=len(self._waiting) - self._ready_count,
            dead=self.dead,
            oldest_seconds=None if since is None else max(0.0, now - since),
            consumers=len(self.subscriptions),
        )

    def __len__(self) -> int:
        return len(self._waiting)

    def _wait(self, entry: _Entry, now: float) -> None:
        self._waiting[entry.sequence] = entry
        if entry.ahead is None:
            self._have_turn(entry, now)
        else:
            entry.where = _Where.BEHIND
        for subscription in self.early:
            subscription.has_news()
        if self.max_length is not None:
            heapq.heappush(self._oldest, entry.sequence)
            self._drop_oldest(now)

    def _have_turn(self, entry: _Entry, now: float) -> None:
        if entry.due <= now:
            self._make_ready(entry, now)
        else:
            entry.where = _Where.DELAYED
            heapq.heappush(self._delayed, (entry.due, entry.sequence, entry))
            if self.waiters:
                self.set_timer()

    def _make_ready(self, entry: _Entry, since: float) -> None:
        entry.where = _Where.READY
        entry.since = since
        self._ready_count += 1
        heapq.heappush(self._ready, (-entry.message.priority, entry.sequence, entry))
        if self.waiters:
            self.wake()

    def _end_lease(self, lease: _Lease) -> None:
        del self._leases[lease.seconds][lease]
        lease.entry.lease = None
        lease.subscription.has_room()

    def _drop_oldest(self, now: float) -> None:
        while self.max_length is not None and len(self._waiting) > self.max_length:
            entry = self._waiting.get(heapq.heappop(self._oldest))
            if entry is not None:
                self._drop(entry, now)
        if len(self._oldest) > STALE_ALLOWED + 2 * len(self._waiting):
            self._oldest = sorted(self._waiting)

    def _drop(self, entry: _Entry, now: float) -> None:
        del self._waiting[entry.sequence]
        if entry.where is _Where.READY:
            self._ready_count -= 1
        if entry.where is not _Where.BEHIND:
            self._stale += 1
        self._forget(entry, now)
        if self._stale > STALE_ALLOWED + len(self._waiting):
            self._remove_stale()

    def _remove_stale(self) -> None:
        # A sorted list is a heap.
        self._ready = sorted(item for item in self._ready if item[2].where is _Where.READY)
        self._delayed = sorted(item for item in self._delayed if item[2].where is _Where.DELAYED)
        self._stale = 0

    def _forget(self, entry: _Entry, now: float) -> None:
        entry.where = _Where.GONE
        key = entry.message.key
        if not self.ordered or key is None:
            return
        ahead, behind = entry.ahead, entry.behind
        entry.ahead = entry.behind = None
        if ahead is not None:
            ahead.behind = behind
        if behind is not None:
            behind.ahead = ahead
            if ahead is None and behind.where is _Where.BEHIND:
                self._have_turn(behind, now)
        elif ahead is not None:
            self._keys[key] = ahead
        else:
            del self._keys[key]

    # Time passes

    def turn(self, now: float) -> None:
        """Carry out what time has brought: due messages are ready, ended leases are lost."""
        while self._delayed and self._delayed[0][0] <= now:
            entry = heapq.heappop(self._delayed)[2]
            if entry.where is _Where.GONE:
                self._stale -= 1
            else:
                self._make_ready(entry, entry.due)
        for leases in self._leases.values():
            while leases and (lease := next(iter(leases))).ends <= now:
                lease.entry.error = LEASE_ENDED
                self.give_back(lease, lease.entry.due, now)

    def set_timer(self) -> None:
        """Somebody waits: be there when time brings something."""
        times = [next(iter(leases)).ends for leases in self._leases.values() if leases]
        if self._delayed:
            times.append(self._delayed[0][0])
        if not times or (self._timer is not None and self._timer_at <= min(times)):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = min(times)
        wait = max(self._timer_at - self._clock(), SHORTEST_WAIT_SECONDS)
        self._timer = asyncio.get_running_loop().call_later(wait, self._time_came)

    def wake(self) -> None:
        """Let one waiting receiver look; where it leaves something, it wakes the next one."""
        while self._ready_count and self.waiters:
            waiter, _ = self.waiters.popitem(last=False)
            if not waiter.done():  # else it has other news
                waiter.set_result(None)
                return

    def end(self, why: BrokerError) -> None:
        """The queue is gone, or its broker."""
        for subscription in tuple(self.subscriptions):
            subscription.end(why)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_came(self) -> None:
        self._timer = None
        self.turn(self._clock())
        if self.waiters:
            self.set_timer()


class MemorySubscription:
    """One receiver of one queue; made by MemoryBroker.subscribe()."""

    def __init__(self, queue: _Queue, prefetch: int, owner: str, clock: Clock, *, early: bool) -> None:
        self.owner = owner
        self.held = 0
        self._queue = queue
        self._prefetch = prefetch
        self._clock = clock
        self._ended: BrokerError | None = None
        self._fetches: set[asyncio.Future[None]] = set()
        self._claim = queue.claim_early if early else queue.claim
        queue.subscriptions.add(self)
        if early:
            queue.early.add(self)

    async def fetch(self, limit: int) -> list[Delivery]:
        """See conveyor.broker.Subscription. Waits, too, while prefetch deliveries are unsettled."""
        while True:
            if self._ended is not None:
                self._queue.wake()  # in case it was woken for a message: it will not take it
                raise self._ended
            room = min(limit, self._prefetch - self.held)
            if room > 0:
                now = self._clock()
                self._queue.turn(now)
                if claimed := self._claim(room, self, now):
                    return claimed
            await self._news(among_waiters=room > 0)

    async def close(self) -> None:
        """See conveyor.broker.Subscription."""
        self.end(BrokerUnavailable(f"this subscription of {self._queue.name!r} is closed"))

    def end(self, why: BrokerError) -> None:
        """Take part no more; a fetch that waits raises why."""
        self._ended = self._ended or why
        self._queue.subscriptions.discard(self)
        self._queue.early.discard(self)
        self.has_news()

    def has_room(self) -> None:
        """One of its deliveries is no longer in its hands."""
        self.held -= 1
        if self._fetches and self.held == self._prefetch - 1:
            self.has_news()

    def has_news(self) -> None:
        """A fetch that waits looks again."""
        for fetch in self._fetches:
            if not fetch.done():
                fetch.set_result(None)

    async def _news(self, *, among_waiters: bool) -> None:
        """Until there may be a message, or room for one, or the end."""
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._fetches.add(news)
        if among_waiters:
            self._queue.waiters[news] = None
            self._queue.set_timer()
        try:
            await news
        except asyncio.CancelledError:
            self._queue.wake()  # in case it was woken for a message in the same moment: it will not take it
            raise
        finally:
            self._fetches.discard(news)
            self._queue.waiters.pop(news, None)


class MemoryBroker:
    """A Broker (see conveyor.broker) inside this process.

    Parameters:
        store: what it shares with other objects of the same event loop; one of its own where None.
        owner: the identity under which it holds leases; made up where None.
        clock: gives Unix seconds. Whoever turns the clock by hand calls clock_turned() afterwards.
    """

    missing: Mapping[Feature, str] = {Feature.DURABLE: "a memory broker's messages end with its process"}

    def __init__(self, *, store: MemoryStore | None = None, owner: str | None = None, clock: Clock = time.time) -> None:
        self.owner = owner or uuid.uuid4().hex
        self.store = store or MemoryStore()
        self._alone = store is None
        self.clock = clock

    async def open(self) -> None:
        """See conveyor.broker.Broker."""
        self.store.brokers.add(self)

    async def close(self) -> None:
        """See conveyor.broker.Broker. What waits in a store of its own is lost; the log says how much."""
        if self not in self.store.brokers:
            return
        now = self.clock()
        for queue in list(self.store.queues.values()):
            if queue.temporary and queue.holder is self:
                self.store.remove(queue)
                continue
            for subscription in [each for each in queue.subscriptions if each.owner == self.owner]:
                subscription.end(BrokerUnavailable("the broker is closed"))
            for lease in queue.held_by(self.owner):
                lease.entry.deliveries -= 1
                queue.give_back(lease, lease.entry.due, now)
        self.store.brokers.discard(self)
        left = sum(map(len, self.store.queues.values()))
        if left and self._alone:
            log.warning("the memory broker is closed with %s that nobody has handled", counted(left, "message"))

    def clock_turned(self) -> None:
        """The clock was turned by hand: what is due now is ready, and ended leases are lost."""
        now = self.clock()
        for queue in self.store.queues.values():
            queue.turn(now)

    async def declare(self, queues: Sequence[Queue]) -> None:
        """See conveyor.broker.Broker."""
        for declared in queues:
            self._check_conflict(declared)
        now = self.clock()
        for declared in queues:
            queue = self.store.queues.get(declared.name)
            if queue is None:
                queue = self.store.queues[declared.name] = _Queue(declared, self)
            queue.lease_seconds = declared.lease_seconds
            queue.bound(declared.max_length, now)
            for topic in declared.topics:
                if topic not in queue.topics:
                    queue.topics.append(topic)
                    self.store.topics.setdefault(topic, []).append(queue)

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        """See conveyor.broker.Broker."""
        self._check_open()
        now = self.clock()
        if queue is not None:
            only = self._queue(queue)
            for message in messages:
                only.add(_Entry(message, next(self.store.sequence), message.due), now)
            return frozenset()
        return frozenset([message.id for message in messages if not self.store.put(message, now)])

    async def subscribe(self, queue: str, prefetch: int, *, early: bool = False) -> MemorySubscription:
        """See conveyor.broker.Broker."""
        return MemorySubscription(self._queue(queue), prefetch, self.owner, self.clock, early=early)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """See conveyor.broker.Broker."""
        self._check_open()
        now = self.clock()
        lost: list[Delivery] = []
        for settlement in settlements:
            delivery = settlement.delivery
            lease = self._lease(delivery, now)
            if lease is None:
                lost.append(delivery)
                continue
            match settlement.verdict:
                case Done(emits):
                    for message in emits:
                        self.store.put(message, now)
                    lease.queue.finish(lease, now)
                case RetryAt(due, error):
                    lease.entry.attempts += 1
                    lease.entry.error = error
                    lease.queue.give_back(lease, due, now)
                case Release(due):
                    lease.entry.deliveries -= 1
                    lease.queue.give_back(lease, due, now)
                case Dead() as dead:
                    self._bury(lease, dead, now)
        return lost

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """See conveyor.broker.Broker."""
        self._check_open()
        now = self.clock()
        lost: list[Delivery] = []
        for delivery in deliveries:
            lease = self._lease(delivery, now)
            if lease is None:
                lost.append(delivery)
            else:
                lease.queue.extend(lease, now)
        return lost

    async def reclaim(self, owner: str, why: str) -> int:
        """See conveyor.broker.Broker."""
        self._check_open()
        now = self.clock()
        reclaimed = 0
        for queue in list(self.store.queues.values()):
            if queue.temporary and queue.holder.owner == owner:
                self.store.remove(queue)
                continue
            for lease in queue.held_by(owner):
                lease.entry.error = why
                queue.give_back(lease, lease.entry.due, now)
                reclaimed += 1
        return reclaimed

    async def queues(self) -> list[QueueInfo]:
        """See conveyor.broker.Broker."""
        self._check_open()
        self.clock_turned()
        now = self.clock()
        return [self.store.queues[name].info(now) for name in sorted(self.store.queues)]

    async def dead_letters(self, which: DeadFilter, *, limit: int, after: str | None = None) -> list[DeadLetter]:
        """See conveyor.broker.Broker."""
        self._check_open()
        letters = (
            letter for letter in self.store.dead.values() if letter.position > (after or "") and _meant(letter, which)
        )
        return list(islice(letters, limit))

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """See conveyor.broker.Broker."""
        queues = [self._queue(letter.queue) for letter in letters]
        for letter, queue in zip(letters, queues, strict=True):
            position = self._next_position()
            self.store.dead[position] = msgspec.structs.replace(letter, position=position)
            queue.dead += 1

    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker. They wait behind what is in the queue already."""
        self._check_open()
        now = self.clock()
        there = [letter for letter in letters if letter.queue in self.store.queues and self._unbury(letter)]
        for letter in there:
            self.store.queues[letter.queue].add(_Entry(redriven(letter.message), next(self.store.sequence), now), now)
        return len(there)

    async def discard(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker."""
        self._check_open()
        return sum(map(self._unbury, letters))

    async def purge(self, queue: str) -> int:
        """See conveyor.broker.Broker."""
        return self._queue(queue).purge(self.clock())

    async def remove(self, queue: str, *, discard_dead: bool = False) -> None:
        """See conveyor.broker.Broker."""
        removed = self._queue(queue)
        if removed.subscriptions:
            raise QueueInUse(queue, consumers=len(removed.subscriptions))
        if removed.dead and not discard_dead:
            raise QueueInUse(queue, dead=removed.dead)
        self.store.dead = {place: letter for place, letter in self.store.dead.items() if letter.queue != queue}
        self.store.remove(removed)

    async def risks(self) -> list[str]:
        """See conveyor.broker.Broker. There are none but what is missing."""
        return []

    def _check_open(self) -> None:
        if self not in self.store.brokers:
            raise BrokerUnavailable("the memory broker is not open")

    def _check_conflict(self, declared: Queue) -> None:
        self._check_open()
        queue = self.store.queues.get(declared.name)
        if queue is None:
            return
        there, asked = _nature(queue.ordered, queue.temporary), _nature(declared.ordered, declared.temporary)
        if there != asked:
            raise QueueConflict(
                f"the queue {declared.name!r} exists as {there}, and is declared as {asked}; rename it, or change one of the two"
            )
        if queue.temporary and queue.holder is not self:
            raise QueueConflict(
                f"the temporary queue {declared.name!r} belongs to the broker object {queue.holder.owner}, and is declared by {self.owner}"
            )

    def _queue(self, name: str) -> _Queue:
        self._check_open()
        queue = self.store.queues.get(name)
        if queue is None:
            raise BrokerError(f"there is no queue {name!r}; declare it first")
        return queue

    def _lease(self, delivery: Delivery, now: float) -> _Lease | None:
        """The lease of a delivery, if it has not ended."""
        lease = delivery.receipt
        if not isinstance(lease, _Lease) or self.store.queues.get(delivery.queue) is not lease.queue:
            return None
        if lease.entry.lease is lease and lease.ends <= now:
            lease.queue.turn(now)
        return lease if lease.entry.lease is lease else None

    def _bury(self, lease: _Lease, dead: Dead, now: float) -> None:
        entry = lease.entry
        letter = DeadLetter(
            position=self._next_position(),
            queue=lease.queue.name,
            message=entry.message,
            reason=str(dead.reason),
            error=dead.error,
            traceback=dead.traceback,
            deliveries=entry.deliveries,
            attempts=entry.attempts,
            died=now,
        )
        self.store.dead[letter.position] = letter
        lease.queue.dead += 1
        lease.queue.finish(lease, now)

    def _next_position(self) -> str:
        return f"{next(self.store.sequence):020d}"  # sorts as text in the order of the numbers

    def _unbury(self, letter: DeadLetter) -> bool:
        if self.store.dead.pop(letter.position, None) is None:
            return False
        queue = self.store.queues.get(letter.queue)
        if queue is not None:
            queue.dead -= 1
        return True


def _meant(letter: DeadLetter, which: DeadFilter) -> bool:
    return (
        (which.queue is None or letter.queue == which.queue)
        and (which.id is None or letter.message.id == which.id)
        and (which.reason is None or letter.reason == which.reason)
        and (which.error is None or which.error.casefold() in letter.error.casefold())
    )


def _nature(ordered: bool, temporary: bool) -> str:
    return f"{'temporary' if temporary else 'lasting'} and {'ordered by key' if ordered else 'not ordered'}"
