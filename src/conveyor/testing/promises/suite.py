"""The conformance suite's frame: what a promise is, the world it is proved in, and the run over all of them."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import os
import re
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from conveyor.broker import Broker, Clock, Delivery, Feature, Queue, Settlement, Subscription
from conveyor.core.message import Message, uuid7
from conveyor.core.settle import DONE, Verdict, describe
from conveyor.errors import BrokerError

PATIENCE_SECONDS: Final = 30.0
"""How long to wait for what must happen: so long that only a broken broker, and no busy machine, exceeds it."""
SHORT_LEASE_SECONDS: Final = 0.5
"""A lease that is meant to end while a promise is proved."""
LONG_LEASE_SECONDS: Final = 300.0
"""A lease that is not meant to end, however busy the machine is."""
PROOF_PATIENCES: Final = 4
"""A whole proof may take so many times as long as anything in it."""
LONGEST_PROOF_SECONDS: Final = (PROOF_PATIENCES + 2) * PATIENCE_SECONDS
"""With its beginning and its end. What is older was left by a process that died."""
NAMES: Final = re.compile(r"promise-([0-9a-f]+)-[0-9a-f]{12}\.")
"""Every name of a world says in which second it began."""
MARK: Final = "(mark)"
"""Says that what was published before it must have come."""
PREFETCH: Final = 10_000
"""No bound, for the promises that are not about it."""
BEGIN_SECONDS: Final = 0.02
"""The chance for a fetch to begin its waiting. Where it takes longer, a promise is easier to keep, never harder."""
MILLISECOND: Final = 0.001
CLOCKS_DIFFER_SECONDS: Final = 0.05
"""A server's clock may be ahead of ours by so much."""
SOME_DAY_SECONDS: Final = 3_600.0
"""A due time that does not come while a promise is proved."""


@dataclass(frozen=True, slots=True)
class Makers:
    """How the suite gets at a broker.

    Parameters:
        broker: gives a new broker object, not opened yet; each call another one, with an owner of its own, on the same
            store. For a broker with Feature.DURABLE it must be picklable and its parts importable, since some promises
            use it in a process that is killed: ``functools.partial(from_url, "sqlite:////tmp/x.queue")`` is.
        lease_seconds: the shortest lease that it is fair to prove the broker with.
        patience_seconds: how long to wait for what must happen.
        clock: the broker's clock; gives Unix seconds.
        pass_time: lets so many seconds pass on that clock.
    """

    broker: Callable[[], Broker]
    lease_seconds: float = SHORT_LEASE_SECONDS
    patience_seconds: float = PATIENCE_SECONDS
    clock: Clock = time.time
    pass_time: Callable[[float], Awaitable[None]] = asyncio.sleep


class World:
    """What a promise is proved in: broker objects on one store, and names that nobody else uses.

    Every promise makes its own queues, so that promises can be proved on a broker that is in use, in any order, and
    side by side.
    """

    def __init__(self, makers: Makers) -> None:
        self.makers = makers
        self.lease_seconds = makers.lease_seconds
        self._name = f"promise-{int(time.time()):x}-{os.urandom(6).hex()}"
        self._numbers = itertools.count(1)
        self._brokers: list[Broker] = []
        self._declared: list[str] = []

    async def __aenter__(self) -> Self:
        self.broker = await self.another()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        async with self.patience("the broker to close"):
            for broker in self._brokers:
                await broker.close()
            with contextlib.suppress(Exception):  # a courtesy to a broker in use: the names are never used again
                await self._tidy()

    async def _tidy(self) -> None:
        """Delete what is left, now that nobody holds anything of it any more."""
        broker = self.makers.broker()
        await broker.open()
        try:
            for queue in self._declared:
                with contextlib.suppress(BrokerError):  # a promise may have removed it itself
                    await broker.remove(queue, discard_dead=True)
        finally:
            await broker.close()

    def now(self) -> float:
        """Unix seconds on the broker's clock."""
        return self.makers.clock()

    async def pass_time(self, seconds: float) -> None:
        """Let so many seconds pass on the broker's clock."""
        await self.makers.pass_time(seconds)

    async def another(self) -> Broker:
        """Another opened broker object on the same store, as another process would have it; closed at the end."""
        broker = self.makers.broker()
        async with self.patience("a broker to open"):
            await broker.open()
        self._brokers.append(broker)
        return broker

    def fresh(self, what: str = "") -> str:
        """A name that was never used before."""
        return f"{self._name}.{next(self._numbers)}{what}"

    async def queue(
        self,
        *,
        topics: Sequence[str] | None = None,
        ordered: bool = False,
        max_length: int | None = None,
        temporary: bool = False,
        lease_seconds: float = LONG_LEASE_SECONDS,
        by: Broker | None = None,
    ) -> Queue:
        """Declare a new queue; it has a topic of its own unless topics are given."""
        queue = Queue(
            name=self.fresh(),
            topics=tuple(topics) if topics is not None else (self.fresh(".topic"),),
            ordered=ordered,
            max_length=max_length,
            temporary=temporary,
            lease_seconds=lease_seconds,
        )
        await (by or self.broker).declare([queue])
        if not temporary:
            self._declared.append(queue.name)
        return queue

    async def with_lease(self, queue: Queue, lease_seconds: float) -> None:
        """Declare the queue again, with another lease for the deliveries to come."""
        await self.broker.declare(
            [
                Queue(
                    name=queue.name,
                    topics=queue.topics,
                    ordered=queue.ordered,
                    max_length=queue.max_length,
                    lease_seconds=lease_seconds,
                )
            ]
        )

    def message(
        self, to: Queue | str, text: str = "x", *, key: str | None = None, due: float = 0.0, priority: int = 0
    ) -> Message:
        """A new message to a queue (by its first topic) or a topic."""
        now = self.now()
        topic = to if isinstance(to, str) else to.topics[0]
        return Message(
            id=uuid7(now, os.urandom(10)),
            topic=topic,
            body=text.encode(),
            key=key,
            created=now,
            due=due,
            priority=priority,
        )

    async def put(self, queue: Queue, *texts: str, key: str | None = None, priority: int = 0) -> list[Message]:
        """Publish messages with these texts to a queue, in one batch."""
        messages = [self.message(queue, text, key=key, priority=priority) for text in texts]
        assert not await self.broker.publish(messages), "a declared queue did not receive its topic"
        return messages

    async def subscribe(self, queue: Queue, *, by: Broker | None = None, prefetch: int = PREFETCH) -> Subscription:
        """A receiver of the queue."""
        return await (by or self.broker).subscribe(queue.name, prefetch)

    async def take(self, subscription: Subscription, number: int, *, limit: int | None = None) -> list[Delivery]:
        """Fetch until so many have come, and not more."""
        taken: list[Delivery] = []
        async with self.patience(f"{number} message(s)", lambda: f"got {[text(each) for each in taken]}"):
            while len(taken) < number:
                fetched = await subscription.fetch(min(limit or number, number - len(taken)))
                assert fetched, "a fetch returned without a message"
                taken += fetched
        assert len(taken) == number, f"a fetch gave more than its limit: {len(taken)} for {number}"
        return taken

    @contextlib.asynccontextmanager
    async def waiting(self, *subscriptions: Subscription) -> AsyncIterator[list[asyncio.Task[list[Delivery]]]]:
        """A fetch of one message on each of these, which have nothing to give yet; they end with the block, or fail."""
        fetches = [asyncio.create_task(each.fetch(1)) for each in subscriptions]
        try:
            await asyncio.sleep(BEGIN_SECONDS)
            assert not any(each.done() for each in fetches), "a fetch did not wait, though there was no message for it"
            yield fetches
            async with self.patience("a waiting fetch to end"):
                await asyncio.wait(fetches)
            assert not any(each.cancelled() for each in fetches), (
                "a fetch ended as cancelled, though nobody cancelled it"
            )
        finally:
            await cancel(*fetches)

    async def ready(self, subscription: Subscription, queue: Queue) -> list[Delivery]:
        """Fetch all that can be had now, without waiting for what will not come: up to a mark that is published behind it."""
        mark = self.message(queue, MARK)
        await self.broker.publish([mark])
        taken: list[Delivery] = []
        async with self.patience("the last published message", lambda: f"got {[text(each) for each in taken]}"):
            while not any(each.message.id == mark.id for each in taken):
                taken += await subscription.fetch(100)
                await asyncio.sleep(0)  # as in settle()
        marks = [each for each in taken if text(each) == MARK]  # a queue of the same topic may have had one, too
        await self.settle(DONE, *marks)
        return [each for each in taken if text(each) != MARK]

    async def settle(self, verdict: Verdict, *deliveries: Delivery, by: Broker | None = None) -> None:
        """Settle deliveries that are held."""
        await asyncio.sleep(0)  # a broker that repeats for ever must not keep the patience from ending
        lost = await (by or self.broker).settle([Settlement(each, verdict) for each in deliveries])
        assert not lost, f"leases were lost that nobody had taken: {[text(each) for each in lost]}"

    async def lose_lease(
        self, queue: Queue, texts: Sequence[str] = ("x",)
    ) -> tuple[list[Delivery], Broker, list[Delivery]]:
        """Publish messages, and let a receiver sleep past its leases until another broker object has them.

        Returns:
            The lost deliveries (of self.broker), the other broker object, and its deliveries of the same messages.
        """
        sleeper, other = await self.subscribe(queue), await self.another()
        await self.with_lease(queue, self.lease_seconds)
        await self.put(queue, *texts)
        lost = await self.take(sleeper, len(texts))
        await sleeper.close()
        await self.with_lease(queue, LONG_LEASE_SECONDS)
        await self.pass_time(self.lease_seconds * 1.1)
        return lost, other, await self.take(await self.subscribe(queue, by=other), len(texts))

    @contextlib.asynccontextmanager
    async def patience(self, what: str, so_far: Callable[[], str] = str, *, times: int = 1) -> AsyncIterator[None]:
        """Fail with what was waited for, and what had come, where it takes longer than anything may."""
        seconds = self.makers.patience_seconds * times
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise AssertionError(f"waited {seconds:g} s for {what}; {so_far()}".strip("; ")) from None


async def cancel(*fetches: asyncio.Task[list[Delivery]]) -> None:
    """Cancel, and wait until it is over."""
    for each in fetches:
        each.cancel()
    await asyncio.wait(fetches)


def text(delivery: Delivery) -> str:
    """What the message of a delivery says."""
    return delivery.message.body.decode()


def texts(deliveries: Sequence[Delivery]) -> list[str]:
    """What the messages of some deliveries say."""
    return [text(each) for each in deliveries]


def same_message(received: Message, published: Message) -> None:
    """Fail where the two differ, naming the field."""
    for field in ("id", "topic", "body", "key", "content_type", "correlation_id", "causation_id", "priority"):
        assert getattr(received, field) == getattr(published, field), (
            f"{field}: published {getattr(published, field)!r}, received {getattr(received, field)!r}"
        )
    assert dict(received.headers) == dict(published.headers), f"headers: {published.headers} became {received.headers}"
    for field in ("created", "due", "expires"):
        there, here = getattr(published, field), getattr(received, field)
        same = there == here if there is None or here is None else abs(there - here) <= MILLISECOND
        assert same, f"{field}: published {there!r}, received {here!r}"


async def work(
    world: World,
    subscriptions: Sequence[Subscription],
    handle: Callable[[Delivery], Awaitable[None]],
    until: asyncio.Event,
) -> None:
    """Handle what comes on all of these at the same time, until the event is set; an error ends it at once."""

    async def receive(subscription: Subscription) -> None:
        while True:
            for delivery in await subscription.fetch(3):
                await handle(delivery)

    async def stop() -> None:
        await until.wait()

    tasks = [asyncio.create_task(stop()), *(asyncio.create_task(receive(each)) for each in subscriptions)]
    try:
        async with world.patience("all messages to be handled"):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error


async def sweep(broker: Broker, now: float) -> int:
    """Remove the queues of proofs whose process died in their midst; how many. Those of living ones stay.

    Parameters:
        now: Unix seconds.
    """
    removed = 0
    for queue in await broker.queues():
        began = NAMES.match(queue.name)
        if began is not None and int(began[1], 16) < now - LONGEST_PROOF_SECONDS:
            with contextlib.suppress(BrokerError):  # somebody else has removed it, or looks into it
                await broker.remove(queue.name, discard_dead=True)
                removed += 1
    return removed


Body = Callable[[World], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Promise:
    """Something that every broker keeps.

    Parameters:
        name: the promise as a name.
        area: what it is about.
        needs: the features without which it cannot be asked of a broker.
        sentence: the promise as a sentence.
        body: proves it, or raises AssertionError.
    """

    name: str
    area: str
    needs: frozenset[Feature]
    sentence: str
    body: Body


PROMISES: Final[dict[str, Promise]] = {}
"""Every promise, by name."""


def promise(area: str, *needs: Feature) -> Callable[[Body], Body]:
    """Register a coroutine function as a promise: its name is the promise, its docstring the sentence."""

    def register(body: Body) -> Body:
        name = getattr(body, "__name__", "")
        assert name not in PROMISES, f"the promise {name} is made twice"
        assert body.__doc__, f"the promise {name} has no sentence"
        PROMISES[name] = Promise(name, area, frozenset(needs), body.__doc__.strip(), body)
        return body

    return register


class Ended(enum.StrEnum):
    """How the proof of a promise ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one promise.

    Parameters:
        error: why it failed, or was skipped.
        trace: where it failed.
    """

    promise: Promise
    ended: Ended
    seconds: float
    error: str = ""
    trace: str = ""


async def prove(promise: Promise, makers: Makers) -> Result:
    """Prove one promise on one broker. It is skipped only where the broker itself says that it lacks a needed feature."""
    missing = makers.broker().missing
    lacking = [f"no {feature}: {missing[feature]}" for feature in sorted(promise.needs) if feature in missing]
    if lacking:
        return Result(promise, Ended.SKIPPED, 0.0, "; ".join(lacking))
    started = time.perf_counter()
    try:
        async with World(makers) as world, world.patience("the proof to end", times=PROOF_PATIENCES):
            await promise.body(world)
    except Exception as error:
        return Result(promise, Ended.FAILED, time.perf_counter() - started, describe(error), traceback.format_exc())
    return Result(promise, Ended.PASSED, time.perf_counter() - started)


async def run(
    makers: Makers, only: Collection[str] | None = None, *, tell: Callable[[Result], None] = lambda _: None
) -> list[Result]:
    """Prove the promises one after the other.

    Parameters:
        makers: how to get at the broker.
        only: names of promises or areas; all where None.
        tell: called with each result as it is known.

    Raises:
        ValueError: only names what is neither a promise nor an area.
    """
    known = {*PROMISES, *(each.area for each in PROMISES.values())}
    if unknown := sorted(set(only or ()) - known):
        raise ValueError(f"neither a promise nor an area: {', '.join(unknown)}")
    results: list[Result] = []
    for each in PROMISES.values():
        if only is None or each.name in only or each.area in only:
            results.append(await prove(each, makers))
            tell(results[-1])
    return results
