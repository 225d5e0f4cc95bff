"""The Redis broker: streams on one server (6.2 or later, also of a cluster), with every step one atomic script.

link.py is a connection, lua/ has the scripts (queue.lua says where a message is), lane.py sends batches that are not done twice,
subscription.py receives, wire.py is the form of a message, health.py judges the server's settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import random
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

from conveyor.broker import Clock, DeadFilter, DeadLetter, Delivery, Feature, Queue, QueueInfo, Settlement
from conveyor.brokers.redis import scripts
from conveyor.brokers.redis.address import address_of
from conveyor.brokers.redis.graveyard import Graveyard
from conveyor.brokers.redis.health import refuse_danger, risks_of, said_by
from conveyor.brokers.redis.lane import Unknown
from conveyor.brokers.redis.link import Address, ForgottenScript, Link, Refused, text
from conveyor.brokers.redis.sending import Publishing, Settling
from conveyor.brokers.redis.subscription import RedisSubscription, topics_of
from conveyor.core.message import Message
from conveyor.errors import BrokerError, BrokerUnavailable, QueueConflict, QueueInUse

__all__ = ["RedisBroker", "RedisSubscription", "from_url"]

log: Final = logging.getLogger("conveyor.redis")

BEAT_SECONDS: Final = 5.0
"""Between two signs of life of a broker object."""
DEAD_AFTER_SECONDS: Final = 20.0
"""Without a sign of life for so long, a broker object's temporary queues vanish."""
FAREWELL_SECONDS: Final = 2.0
"""Whoever takes leave waits no longer for a server that says nothing."""
PURGED_AT_ONCE: Final = 2_000
"""Messages of one step: the server does nothing else meanwhile."""
FROM_THE_BEGINNING: Final = b"0"
"""A cursor; as an answer, it is the end."""
DEFAULT_NAMESPACE: Final = "conveyor"


def from_url(url: str, *, owner: str | None = None, clock: Clock = time.time) -> RedisBroker:
    """``redis://[user:password@]host[:port][/database]``, ``rediss://…`` (TLS) or ``unix:///path``, with ``?namespace=conveyor``.

    For TLS, ``cafile``, ``certfile``, ``keyfile`` and ``verify=no`` say whom to trust and what to show, as in a URL of RabbitMQ.

    Raises:
        ConfigurationError: the URL has parts that make no sense here.
    """
    address, namespace = address_of(url, DEFAULT_NAMESPACE)
    return RedisBroker(address, namespace=namespace, owner=owner, clock=clock)


class RedisBroker:
    """A Broker (see conveyor.broker) on a Redis server.

    Parameters:
        address: where the server is.
        namespace: broker objects with one namespace see each other's queues; all their keys begin with it.
        owner: the identity under which it holds leases; made up where None.
        clock: gives Unix seconds, for what has no time of its own; leases and due times are the server's.
    """

    missing: Mapping[Feature, str] = {}

    def __init__(
        self,
        address: Address,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        owner: str | None = None,
        clock: Clock = time.time,
    ) -> None:
        self.owner = owner or uuid.uuid4().hex
        self.clock = clock
        self._prefix = f"{{{namespace}}}:"
        self._address = address
        self._link = Link(address, self._prefix + "queues", self._greet)
        self._sender = uuid.uuid4().hex  # of this object's batches; an owner may have had, or have, other objects
        self._publishing = Publishing(self._link, self._sender)
        self._settling = Settling(self._link, self._sender)
        self._graveyard = Graveyard(self._link, self._prefix)
        self._claims = random.getrandbits(40)  # its claims are no other object's, either
        self._doubtful: dict[int, str] = {}
        self._posted: set[asyncio.Future[Any]] = set()
        self._declared: dict[str, Queue] = {}
        self._subscriptions: set[RedisSubscription] = set()
        self._received: set[str] = set()
        self._held: dict[str, RedisSubscription] = {}
        self._beating: asyncio.Task[None] | None = None
        self._closed: BrokerError | None = BrokerUnavailable("the broker is not open")

    async def open(self) -> None:
        """See conveyor.broker.Broker. Refuses a server that evicts; says in the log what its persistence means."""
        if self._closed is None:
            return
        self._closed = None
        try:
            await self._link.connect()
            told = await said_by(self._link)
            refuse_danger(told)
        except BaseException:
            if not self._link.is_ready:
                self._link.close()  # nobody is there of whom to take leave, which would be tried for as long again
            await self.close()
            raise
        for risk in risks_of(told, self.clock()):
            log.warning(risk)
        self._beating = asyncio.create_task(self._beat(), name="redis beat")

    async def close(self) -> None:
        """See conveyor.broker.Broker."""
        if self._closed is not None:
            return
        self._closed = BrokerUnavailable("the broker is closed")
        for subscription in tuple(self._subscriptions):
            subscription.end(self._closed)
        if self._beating is not None:
            self._beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._beating
        try:
            await self._knock()
            with contextlib.suppress(BrokerError):  # else the leases end by themselves, and the signs of life
                await self._publishing.close()
                await self._settling.close()
                await self._give_back(self._received, self.owner, "", counted=False)
                await self._link.run(scripts.LEAVE, self.owner)
        finally:
            self._link.close()
            self._subscriptions.clear()
            self._held.clear()

    async def _knock(self) -> None:
        """Before closing: whom nobody answers, he leaves without a word."""
        try:
            async with asyncio.timeout(self._link.patience(FAREWELL_SECONDS)):
                await self._link.call("EXISTS", self._prefix + "queues")
        except TimeoutError:
            log.warning("Redis does not answer: left without a word; what was held comes back when the leases end")
            self._link.close()
        except BrokerError:
            pass  # it may be there in a moment, or it says why not

    async def declare(self, queues: Sequence[Queue]) -> None:
        """See conveyor.broker.Broker."""
        self._check_open()
        if not queues:
            return
        await self._link.connect()
        await self._declare(queues)
        for queue in queues:
            self._declared[queue.name] = queue

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        """See conveyor.broker.Broker."""
        self._check_open()
        return await self._publishing.publish(messages, queue) if messages else frozenset()

    async def subscribe(self, queue: str, prefetch: int, *, early: bool = False) -> RedisSubscription:
        """See conveyor.broker.Broker."""
        self._check_open()
        topics, ordered = await self._ask(scripts.ATTEND, queue, self.owner, 1)
        link = Link(self._address, self._prefix + "queues", _bring_scripts)
        subscription = RedisSubscription(self, link, queue, prefetch, early=early, topics=topics_of(topics))
        self._settling.knows(queue, ordered=bool(ordered))
        self._subscriptions.add(subscription)
        self._received.add(queue)
        return subscription

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """See conveyor.broker.Broker."""
        self._check_open()
        if not settlements:
            return []
        try:
            lost = await self._settling.settle(settlements)
        except (asyncio.CancelledError, Unknown):
            # It is or will be done all the same, as far as anybody can tell: whoever does not repeat it has them off his hands, too.
            self._let_go(each.delivery for each in settlements)
            raise
        self._let_go(each.delivery for each in settlements)
        return lost

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """See conveyor.broker.Broker."""
        self._check_open()
        lost = await self._settling.extend(deliveries) if deliveries else []
        self._let_go(lost)
        return lost

    async def reclaim(self, owner: str, why: str) -> int:
        """See conveyor.broker.Broker. Its temporary queues vanish."""
        self._check_open()
        if not owner:
            return 0
        await self._link.run(scripts.LEAVE, owner)
        queues = [text(name) for name in await self._link.call("SMEMBERS", self._prefix + "queues")]
        return await self._give_back(queues, owner, why, counted=True)

    async def queues(self) -> list[QueueInfo]:
        """See conveyor.broker.Broker."""
        self._check_open()
        found = [_info(*figures) for figures in await self._link.run(scripts.QUEUES)]
        return sorted(found, key=lambda each: each.name)

    async def dead_letters(self, which: DeadFilter, *, limit: int, after: str | None = None) -> list[DeadLetter]:
        """See conveyor.broker.Broker."""
        self._check_open()
        return await self._graveyard.page(which, limit, after)

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """See conveyor.broker.Broker."""
        self._check_open()
        await self._graveyard.bury(letters)

    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker."""
        self._check_open()
        return await self._graveyard.redrive(letters)

    async def discard(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker."""
        self._check_open()
        return await self._graveyard.discard(letters)

    async def purge(self, queue: str) -> int:
        """See conveyor.broker.Broker."""
        self._check_open()
        purged = 0
        while True:
            gone = cast("int", await self._ask(scripts.PURGE, queue, PURGED_AT_ONCE))
            purged += gone
            if gone < PURGED_AT_ONCE:
                return purged

    async def remove(self, queue: str, *, discard_dead: bool = False) -> None:
        """See conveyor.broker.Broker."""
        self._check_open()
        await self._remove(queue, discard_dead=discard_dead, only_look=True)
        await self.purge(queue)  # in parts: the server serves others between them
        await self._remove(queue, discard_dead=discard_dead, only_look=False)
        self._declared.pop(queue, None)

    async def risks(self) -> list[str]:
        """See conveyor.broker.Broker."""
        self._check_open()
        await self._link.connect()
        return risks_of(await said_by(self._link), self.clock())

    async def next_claim(self) -> int:
        """For a subscription: numbers its claims; the number is in the leases. What earlier ones left behind is given back before."""
        if self._doubtful:
            await self._link.connect()
        self._claims += 1
        return self._claims

    def streams_of(self, queue: str) -> tuple[str, str]:
        """For a subscription: where it hears of news of its queue."""
        return f"{self._prefix}queue:{queue}", f"{self._prefix}bell:{queue}"

    def void(self, claim: int, queue: str) -> None:
        """For a subscription: nobody hears the answer to this claim. What it takes, or will take, goes back."""
        self._doubtful[claim] = queue
        self._void(claim, queue, FROM_THE_BEGINNING)

    def hold(self, subscription: RedisSubscription, deliveries: Sequence[Delivery]) -> None:
        """For a subscription: these are in its hands until they are settled or lost."""
        held = self._held
        for delivery in deliveries:
            held[cast("str", delivery.receipt)] = subscription

    async def leave(self, subscription: RedisSubscription) -> None:
        """For a subscription: it is closed."""
        self._subscriptions.discard(subscription)
        if self._closed is None:
            # Else it is gone with its queue, or with our next sign of life.
            with contextlib.suppress(BrokerError, TimeoutError):
                async with asyncio.timeout(self._link.patience(FAREWELL_SECONDS)):
                    await self._ask(scripts.ATTEND, subscription.queue, self.owner, -1)

    async def _greet(self, link: Link) -> None:
        """First on every connection: the scripts are there, the server knows who lives, and what was half done is undone."""
        await _bring_scripts(link)
        await link.run_now(scripts.BEAT, self.owner, int(DEAD_AFTER_SECONDS * 1000), self._sender)
        for claim, queue in tuple(self._doubtful.items()):
            cursor: Any = None
            while cursor != FROM_THE_BEGINNING:
                cursor = await link.run_now(scripts.VOID, self.owner, claim, queue, cursor or FROM_THE_BEGINNING)
            del self._doubtful[claim]
        await self._declare_missing()

    async def _declare_missing(self) -> None:
        """Temporary queues may have vanished while this process slept, and others with a server that came back empty."""
        if self._declared:
            known = await self._link.send("SMISMEMBER", self._prefix + "queues", *self._declared)
            if gone := [queue for queue, is_there in zip(self._declared.values(), known, strict=True) if not is_there]:
                await self._declare(gone)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            with contextlib.suppress(BrokerError):
                if await self._link.run(scripts.BEAT, self.owner, int(DEAD_AFTER_SECONDS * 1000), self._sender):
                    await self._declare_missing()

    async def _declare(self, queues: Sequence[Queue]) -> None:
        arguments: list[Any] = [self.owner]
        for queue in queues:
            arguments += (
                queue.name,
                int(queue.ordered),
                "" if queue.max_length is None else queue.max_length,
                math.ceil(queue.lease_seconds * 1000),
                int(queue.temporary),
                json.dumps(queue.topics),
            )
        conflict = await self._link.run_now(scripts.DECLARE, *arguments)
        if conflict:
            place, ordered, temporary, holder = conflict
            declared = queues[(place - 2) // 6]
            raise _conflict(declared, text(ordered) == "1", text(temporary) == "1", text(holder), self.owner)

    async def _remove(self, queue: str, *, discard_dead: bool, only_look: bool) -> None:
        consumers, dead = await self._ask(scripts.REMOVE, queue, int(discard_dead), int(only_look))
        if consumers:
            raise QueueInUse(queue, consumers=consumers)
        if dead and not discard_dead:
            raise QueueInUse(queue, dead=dead)

    async def _ask(self, script: scripts.Script, queue: str, *arguments: Any) -> Any:
        """Run a script on one queue, which must be there."""
        try:
            return await self._link.run(script, queue, *arguments)
        except Refused as error:
            raise self.explain(error, queue) from None

    def explain(self, error: Refused, queue: str) -> BrokerError:
        """What a script said of a queue, in words."""
        if "NOQUEUE" not in str(error):
            return error
        if (declared := self._declared.get(queue)) is not None and declared.temporary:
            return BrokerUnavailable(f"the temporary queue {queue!r} is gone")
        return BrokerError(f"there is no queue {queue!r}; declare it first")

    def _void(self, claim: int, queue: str, cursor: bytes, *, whole: bool = False) -> None:
        with contextlib.suppress(BrokerUnavailable):  # then it is done on the next connection
            posted = self._link.post(scripts.VOID, self.owner, claim, queue, cursor, whole=whole)
            self._posted.add(posted)
            posted.add_done_callback(lambda done: self._voided(done, claim, queue, cursor))

    def _voided(self, done: asyncio.Future[Any], claim: int, queue: str, cursor: bytes) -> None:
        self._posted.discard(done)
        if done.cancelled():
            return
        if (error := done.exception()) is not None:
            if isinstance(error, ForgottenScript):
                self._void(claim, queue, cursor, whole=True)
            return
        if done.result() == FROM_THE_BEGINNING:  # that is the end
            self._doubtful.pop(claim, None)
        else:
            self._void(claim, queue, done.result())

    async def _give_back(self, queues: Iterable[str], owner: str, why: str, *, counted: bool) -> int:
        """What an owner leased in these queues; how many."""
        given = 0
        for queue in queues:
            cursor: Any = None
            while cursor != FROM_THE_BEGINNING:
                arguments = owner, int(counted), why, queue, cursor or FROM_THE_BEGINNING
                number, cursor = await self._link.run(scripts.GIVE_BACK, *arguments)
                given += number
        return given

    def _let_go(self, deliveries: Iterable[Delivery]) -> None:
        held = self._held
        for delivery in deliveries:
            subscription = held.pop(cast("str", delivery.receipt), None)
            if subscription is not None:
                subscription.lets_go()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed


async def _bring_scripts(link: Link) -> None:
    """Make sure that the server knows the scripts; where only EVAL is allowed, they come with their first use."""
    with contextlib.suppress(Refused):
        there = await link.send("SCRIPT", "EXISTS", *(script.digest for script in scripts.ALL))
        for script, known in zip(scripts.ALL, there, strict=True):
            if not known:
                await link.send("SCRIPT", "LOAD", script.text)


def _info(name: bytes, topics: bytes, *figures: int) -> QueueInfo:
    ready, in_flight, delayed, dead, oldest, consumers, ordered, max_length, temporary, lease = figures
    return QueueInfo(
        name=text(name),
        topics=topics_of(topics),
        ready=ready,
        in_flight=in_flight,
        delayed=delayed,
        dead=dead,
        oldest_seconds=None if oldest < 0 else oldest / 1000,
        consumers=consumers,
        ordered=bool(ordered),
        max_length=None if max_length < 0 else max_length,
        temporary=bool(temporary),
        lease_seconds=lease / 1000,
    )


def _conflict(declared: Queue, ordered: bool, temporary: bool, holder: str, owner: str) -> QueueConflict:
    if (ordered, temporary) == (declared.ordered, declared.temporary):
        return QueueConflict(
            f"the temporary queue {declared.name!r} belongs to the broker object {holder}, and is declared by {owner}"
        )
    there, asked = _nature(ordered, temporary), _nature(declared.ordered, declared.temporary)
    return QueueConflict(
        f"the queue {declared.name!r} exists as {there}, and is declared as {asked}; rename it, or change one of the two"
    )


def _nature(ordered: bool, temporary: bool) -> str:
    return f"{'temporary' if temporary else 'lasting'} and {'ordered by key' if ordered else 'not ordered'}"
