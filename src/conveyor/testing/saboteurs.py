"""Brokers broken on purpose, one fault each: they prove that the conformance suite catches what it claims to."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec

from conveyor.broker import (
    Broker,
    DeadFilter,
    DeadLetter,
    Delivery,
    Feature,
    Queue,
    QueueInfo,
    Settlement,
    Subscription,
)
from conveyor.core.message import NO_HEADERS, Message
from conveyor.core.settle import DONE, Dead, Done, Release, RetryAt, Verdict
from conveyor.testing.promises.suite import Makers

ONE_IN: Final = 7
"""A fault that is not constant happens to one message in so many."""
KEPT_CHARACTERS: Final = 1_000


@dataclass(slots=True)
class Plot:
    """What the sabotaged broker objects of one store know together."""

    published: int = 0
    messages: dict[str, Message] = field(default_factory=dict)
    latest: dict[tuple[str, str], Delivery] = field(default_factory=dict)
    owners: set[str] = field(default_factory=set)
    topics: set[str] = field(default_factory=set)
    bounds: dict[str, int] = field(default_factory=dict)
    lengths: Counter[str] = field(default_factory=Counter)
    removed: set[str] = field(default_factory=set)
    kept: dict[str, list[Message]] = field(default_factory=dict)


class Honest:
    """Passes everything on to a working broker. The saboteurs break one thing of it each."""

    def __init__(self, broker: Broker, plot: Plot) -> None:
        self.broker = broker
        self.plot = plot
        self.owner = broker.owner
        self.missing: Mapping[Feature, str] = broker.missing
        plot.owners.add(broker.owner)

    async def open(self) -> None:
        await self.broker.open()

    async def close(self) -> None:
        await self.broker.close()

    async def declare(self, queues: Sequence[Queue]) -> None:
        await self.broker.declare(queues)

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        return await self.broker.publish(messages, queue=queue)

    async def subscribe(self, queue: str, prefetch: int, *, early: bool = False) -> Subscription:
        return _Through(self, await self.broker.subscribe(queue, prefetch, early=early))

    async def fetch(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """How a subscription fetches."""
        return await subscription.fetch(limit)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        return await self.broker.settle([Settlement(each.delivery, self.twist(each.verdict)) for each in settlements])

    def twist(self, verdict: Verdict) -> Verdict:
        """What becomes of a verdict."""
        return verdict

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return await self.broker.extend(deliveries)

    async def reclaim(self, owner: str, why: str) -> int:
        return await self.broker.reclaim(owner, why)

    async def queues(self) -> list[QueueInfo]:
        return await self.broker.queues()

    async def dead_letters(self, which: DeadFilter, *, limit: int, after: str | None = None) -> list[DeadLetter]:
        return await self.broker.dead_letters(which, limit=limit, after=after)

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        await self.broker.bury(letters)

    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        return await self.broker.redrive(letters)

    async def discard(self, letters: Sequence[DeadLetter]) -> int:
        return await self.broker.discard(letters)

    async def purge(self, queue: str) -> int:
        return await self.broker.purge(queue)

    async def remove(self, queue: str, *, discard_dead: bool = False) -> None:
        await self.broker.remove(queue, discard_dead=discard_dead)

    async def risks(self) -> list[str]:
        return await self.broker.risks()


class _Through:
    """A subscription whose fetch goes through its saboteur."""

    def __init__(self, broker: Honest, subscription: Subscription) -> None:
        self._broker = broker
        self._subscription = subscription

    async def fetch(self, limit: int) -> list[Delivery]:
        return await self._broker.fetch(self._subscription, limit)

    async def close(self) -> None:
        await self._subscription.close()


Saboteur = Callable[[Broker, Plot], Honest]


def sabotage(makers: Makers, saboteur: Saboteur) -> Makers:
    """The same broker, with a saboteur between it and whoever uses it."""
    plot = Plot()
    return replace(makers, broker=lambda: saboteur(makers.broker(), plot))


class LosesSome(Honest):
    """Accepts one message in a few, and forgets it."""

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        return await self.broker.publish([each for each in messages if not self._unlucky()], queue=queue)

    def _unlucky(self) -> bool:
        self.plot.published += 1
        return self.plot.published % ONE_IN == 0


class RepeatsSome(LosesSome):
    """Publishes one message in a few twice."""

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        return await self.broker.publish(
            [copy for each in messages for copy in [each] * (1 + self._unlucky())], queue=queue
        )


class ReturnsTooSoon(Honest):
    """Says that it owns what is still in its hands: a batch is written with the next one."""

    async def open(self) -> None:
        self._held: tuple[Sequence[Message], str | None] = (), None
        await super().open()

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        (held, to), self._held = self._held, (messages, queue)
        await self.broker.publish(held, queue=to)
        return frozenset()


class ReversesBatches(Honest):
    """Publishes a batch from its end."""

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        return await self.broker.publish(messages[::-1], queue=queue)


class HidesTheUnheard(Honest):
    """Does not report what no queue receives."""

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        await self.broker.publish(messages, queue=queue)
        return frozenset()


class DropsHeaders(Honest):
    """Carries everything but the headers."""

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        return await self.broker.publish(
            [msgspec.structs.replace(each, headers=NO_HEADERS) for each in messages], queue=queue
        )


class GivesATopicToOneQueue(Honest):
    """Knows no fan-out: the first queue of a topic gets its messages, the others nothing."""

    async def declare(self, queues: Sequence[Queue]) -> None:
        for queue in queues:
            known = {info.name: info.topics for info in await self.broker.queues()}.get(queue.name, ())
            topics = tuple(each for each in queue.topics if each in known or each not in self.plot.topics)
            self.plot.topics.update(topics)
            await self.broker.declare([msgspec.structs.replace(queue, topics=topics)])


class NeverWakes(Honest):
    """Gives what is there; a fetch that finds nothing sleeps for ever."""

    async def fetch(self, subscription: Subscription, limit: int) -> list[Delivery]:
        fetch = asyncio.create_task(subscription.fetch(limit))
        await asyncio.sleep(0)
        if not fetch.done():
            fetch.cancel()
            await asyncio.Event().wait()
        return await fetch


class FetchesOnWhenCancelled(Honest):
    """A cancelled fetch goes on in the background, and keeps what it gets."""

    async def open(self) -> None:
        self._fetches: set[asyncio.Task[list[Delivery]]] = set()
        await super().open()

    async def fetch(self, subscription: Subscription, limit: int) -> list[Delivery]:
        fetch = asyncio.create_task(subscription.fetch(limit))
        self._fetches.add(fetch)
        return await asyncio.shield(fetch)

    async def close(self) -> None:
        for fetch in self._fetches:
            fetch.cancel()
        await asyncio.gather(*self._fetches, return_exceptions=True)
        await super().close()


class GivesOneTooMany(Honest):
    """Takes a limit for a suggestion."""

    async def fetch(self, subscription: Subscription, limit: int) -> list[Delivery]:
        return await subscription.fetch(limit + 1)


class CountsNothing(Honest):
    """Every delivery is the first one."""

    async def fetch(self, subscription: Subscription, limit: int) -> list[Delivery]:
        return [msgspec.structs.replace(each, deliveries=1, attempts=0) for each in await subscription.fetch(limit)]


class ForgetsErrors(Honest):
    """Does not keep why the last delivery failed."""

    async def fetch(self, subscription: Subscription, limit: int) -> list[Delivery]:
        return [msgspec.structs.replace(each, error="") for each in await subscription.fetch(limit)]


class KeepsWhatIsDone(Honest):
    """Publishes what a handler emits, and delivers its message again."""

    def twist(self, verdict: Verdict) -> Verdict:
        return Release() if isinstance(verdict, Done) and not verdict.emits else verdict


class LosesEmits(Honest):
    """A message is done, and what its handler emits is forgotten."""

    def twist(self, verdict: Verdict) -> Verdict:
        return DONE if isinstance(verdict, Done) else verdict


class EmitsBeforeItLooks(Honest):
    """Publishes what a handler emits, and only then finds that the lease is lost."""

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        for each in settlements:
            if isinstance(each.verdict, Done):
                await self.broker.publish(each.verdict.emits)
        return await super().settle(settlements)

    def twist(self, verdict: Verdict) -> Verdict:
        return DONE if isinstance(verdict, Done) else verdict


class CountsReleases(Honest):
    """Takes a release for a failure."""

    def twist(self, verdict: Verdict) -> Verdict:
        return RetryAt(verdict.due, "released") if isinstance(verdict, Release) else verdict


class TakesAFailureForARelease(Honest):
    """Tries again without counting."""

    def twist(self, verdict: Verdict) -> Verdict:
        return Release(verdict.due) if isinstance(verdict, RetryAt) else verdict


class DropsTheDead(Honest):
    """What is given up is gone."""

    def twist(self, verdict: Verdict) -> Verdict:
        return DONE if isinstance(verdict, Dead) else verdict


class ShortensTracebacks(Honest):
    """Keeps only the beginning of a dead letter's traceback."""

    def twist(self, verdict: Verdict) -> Verdict:
        if isinstance(verdict, Dead):
            return Dead(verdict.reason, verdict.error, verdict.traceback[:KEPT_CHARACTERS])
        return verdict


class _Remembers(Honest):
    """Knows what was given out last, of every message."""

    async def fetch(self, subscription: Subscription, limit: int) -> list[Delivery]:
        deliveries = await subscription.fetch(limit)
        self.plot.latest |= {(each.queue, each.message.id): each for each in deliveries}
        return deliveries

    def _current(self, delivery: Delivery) -> Delivery:
        return self.plot.latest.get((delivery.queue, delivery.message.id), delivery)


class SettlesById(_Remembers):
    """Looks at the message's id and not at the receipt: whoever held it once settles it."""

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        return await self.broker.settle(
            [Settlement(self._current(each.delivery), each.verdict) for each in settlements]
        )


class ExtendsById(_Remembers):
    """A late heartbeat renews whatever lease the message has by now."""

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        return await self.broker.extend([self._current(each) for each in deliveries])


class AcceptsSilently(Honest):
    """Does nothing with a lost lease, and does not tell."""

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        await self.broker.settle(settlements)
        return []


class NeverExtends(Honest):
    """Nods at heartbeats."""

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:  # noqa: ARG002 - that is the sabotage
        return []


class LeasesForEver(Honest):
    """Waits for the dead."""

    async def declare(self, queues: Sequence[Queue]) -> None:
        await self.broker.declare([msgspec.structs.replace(each, lease_seconds=1e9) for each in queues])


class ReclaimsFromEverybody(Honest):
    """Takes from the living what it should take from the dead."""

    async def reclaim(self, owner: str, why: str) -> int:
        reclaimed = [await self.broker.reclaim(each, why) for each in {*self.plot.owners, owner}]
        return sum(reclaimed)


class NeverReclaims(Honest):
    """Leaves it to the leases."""

    async def reclaim(self, owner: str, why: str) -> int:  # noqa: ARG002 - that is the sabotage
        return 0


class IgnoresDueTimes(Honest):
    """Delivers at once what was to come later."""

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        self.plot.messages |= {each.id: each for each in messages}
        return await self.broker.publish([msgspec.structs.replace(each, due=0.0) for each in messages], queue=queue)

    async def fetch(self, subscription: Subscription, limit: int) -> list[Delivery]:
        return [
            msgspec.structs.replace(each, message=self.plot.messages.get(each.message.id, each.message))
            for each in await subscription.fetch(limit)
        ]


class RetriesAtOnce(Honest):
    """Knows no back-off."""

    def twist(self, verdict: Verdict) -> Verdict:
        return RetryAt(0.0, verdict.error, verdict.traceback) if isinstance(verdict, RetryAt) else verdict


class IgnoresPriorities(IgnoresDueTimes):
    """First come, first served."""

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        self.plot.messages |= {each.id: each for each in messages}
        return await self.broker.publish([msgspec.structs.replace(each, priority=0) for each in messages], queue=queue)


class IgnoresOrder(Honest):
    """Delivers the messages of one key side by side."""

    async def declare(self, queues: Sequence[Queue]) -> None:
        await self.broker.declare([msgspec.structs.replace(each, ordered=False) for each in queues])


class OrdersOnlyWhatIsReady(Honest):
    """Keeps the order of a key, but lets the others pass while one backs off: puts that one behind them."""

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        lost: list[Delivery] = []
        for each in settlements:
            verdict = each.verdict
            backs_off = isinstance(verdict, RetryAt) and verdict.due > 0 and each.delivery.message.key is not None
            if backs_off:
                verdict = Done((msgspec.structs.replace(each.delivery.message, due=verdict.due),))  # type: ignore[union-attr]
            lost += await self.broker.settle([Settlement(each.delivery, verdict)])
        return lost


class IgnoresBounds(Honest):
    """Lets a bounded queue grow."""

    async def declare(self, queues: Sequence[Queue]) -> None:
        await self.broker.declare([msgspec.structs.replace(each, max_length=None) for each in queues])


class DropsTheNewest(IgnoresBounds):
    """A full queue refuses what comes, instead of dropping its oldest."""

    async def declare(self, queues: Sequence[Queue]) -> None:
        for queue in queues:
            if queue.max_length is not None:
                self.plot.bounds |= dict.fromkeys(queue.topics, queue.max_length)
        await super().declare(queues)

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        return await self.broker.publish([each for each in messages if self._fits(each.topic)], queue=queue)

    def _fits(self, topic: str) -> bool:
        self.plot.lengths[topic] += 1
        return topic not in self.plot.bounds or self.plot.lengths[topic] <= self.plot.bounds[topic]


class KeepsTemporaryQueues(Honest):
    """A temporary queue stays when its owner has gone."""

    async def declare(self, queues: Sequence[Queue]) -> None:
        await self.broker.declare([msgspec.structs.replace(each, temporary=False) for each in queues])


class RedrivesACopy(Honest):
    """A redriven message is delivered, and stays a dead letter."""

    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        await self.broker.publish([each.message for each in letters])
        return len(letters)


class RedrivesToTheTopic(Honest):
    """Publishes a redriven message anew: every queue of its topic gets it."""

    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        there = [each for each in letters if await self.broker.discard([each])]
        await self.broker.publish([each.message for each in there])
        return len(there)


class MatchesAnyError(Honest):
    """Does not look at the text when dead letters are searched by error."""

    async def dead_letters(self, which: DeadFilter, *, limit: int, after: str | None = None) -> list[DeadLetter]:
        return await self.broker.dead_letters(msgspec.structs.replace(which, error=None), limit=limit, after=after)


class ForgetsThePage(Honest):
    """Begins at the first dead letter, whatever page is asked for; ends where that never would."""

    async def dead_letters(self, which: DeadFilter, *, limit: int, after: str | None = None) -> list[DeadLetter]:
        return [] if after is not None else await self.broker.dead_letters(which, limit=limit)


class PurgesTheHeld(_Remembers):
    """Deletes with a purge what receivers hold, too."""

    async def purge(self, queue: str) -> int:
        purged = await self.broker.purge(queue)
        held = [Settlement(each, DONE) for each in self.plot.latest.values() if each.queue == queue]
        return purged + len(held) - len(await self.broker.settle(held))


class LosesTheHeldOnClose(Honest):
    """When it closes, what it was holding is gone."""

    async def open(self) -> None:
        self._held: dict[object, Delivery] = {}
        await super().open()

    async def fetch(self, subscription: Subscription, limit: int) -> list[Delivery]:
        deliveries = await subscription.fetch(limit)
        self._held |= {each.receipt: each for each in deliveries}
        return deliveries

    async def close(self) -> None:
        held, self._held = self._held, {}
        if held:
            await self.broker.settle([Settlement(each, DONE) for each in held.values()])
        await super().close()


class PublishesToEverybody(Honest):
    """Takes the one queue that a message is for as a hint: every queue of its topic gets it."""

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:  # noqa: ARG002 - that is the sabotage
        return await self.broker.publish(messages)


class AcceptsForNobody(Honest):
    """Accepts what is for a queue that does not exist, and forgets it."""

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        there = {info.name for info in await self.broker.queues()}
        return await self.broker.publish(messages, queue=queue) if queue is None or queue in there else frozenset()


class NobodyIsEarly(Honest):
    """Gives only what is ready, also to those who move messages elsewhere."""

    async def subscribe(self, queue: str, prefetch: int, *, early: bool = False) -> Subscription:  # noqa: ARG002 - that is the sabotage
        return await super().subscribe(queue, prefetch)


class ForgetsDueTimes(Honest):
    """Delivers on time, and does not say what the time was."""

    async def fetch(self, subscription: Subscription, limit: int) -> list[Delivery]:
        return [
            msgspec.structs.replace(each, message=msgspec.structs.replace(each.message, due=0.0))
            for each in await subscription.fetch(limit)
        ]


class HurriesWhatIsReleased(Honest):
    """What is given back is ready at once, whatever its time."""

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        return await self.broker.settle([Settlement(each.delivery, self._hurried(each)) for each in settlements])

    def _hurried(self, each: Settlement) -> Verdict:
        # A release alone would not do: some brokers know from the lease itself when it may come again.
        message = msgspec.structs.replace(each.delivery.message, due=0.0)
        return Done((message,)) if isinstance(each.verdict, Release) else each.verdict


class ReversesFetches(Honest):
    """Gives the youngest of a batch first."""

    async def fetch(self, subscription: Subscription, limit: int) -> list[Delivery]:
        return (await subscription.fetch(limit))[::-1]


class BuriesWithoutReason(Honest):
    """Of dead letters from elsewhere, only the messages are kept."""

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        bare = [msgspec.structs.replace(each, reason="moved", error="", traceback="") for each in letters]
        await self.broker.bury(bare)


class BuriesAnywhere(Honest):
    """Leaves out those dead letters whose queue it does not have."""

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        there = {info.name for info in await self.broker.queues()}
        await self.broker.bury([each for each in letters if each.queue in there])


class ForgetsDeclarations(Honest):
    """Knows what is in a queue, and not how it was declared."""

    async def queues(self) -> list[QueueInfo]:
        return [
            msgspec.structs.replace(each, ordered=False, max_length=None, temporary=False, lease_seconds=1.0)
            for each in await self.broker.queues()
        ]


class HidesTheRemoved(Honest):
    """Empties a removed queue and shows it to nobody; its topics still lead to it."""

    async def remove(self, queue: str, *, discard_dead: bool = False) -> None:  # noqa: ARG002 - it is only hidden
        await self.broker.purge(queue)
        self.plot.removed.add(queue)

    async def queues(self) -> list[QueueInfo]:
        return [each for each in await self.broker.queues() if each.name not in self.plot.removed]


class KeepsWhatWasRemoved(Honest):
    """A removed queue that is declared again has in it what it had."""

    async def remove(self, queue: str, *, discard_dead: bool = False) -> None:
        there = next((each.ready for each in await self.broker.queues() if each.name == queue), 0)
        if there:
            subscription = await self.broker.subscribe(queue, there)
            self.plot.kept[queue] = [each.message for each in await subscription.fetch(there)]
            await subscription.close()
        await self.broker.remove(queue, discard_dead=discard_dead)

    async def declare(self, queues: Sequence[Queue]) -> None:
        await self.broker.declare(queues)
        for queue in queues:
            await self.broker.publish(self.plot.kept.pop(queue.name, []), queue=queue.name)


class RemovesTheDead(Honest):
    """Dead letters go with their queue, whatever was asked for."""

    async def remove(self, queue: str, *, discard_dead: bool = False) -> None:  # noqa: ARG002 - that is the sabotage
        await self.broker.remove(queue, discard_dead=True)


class PanicsWithoutReason(Honest):
    """Says that something is wrong, and not what."""

    async def risks(self) -> list[str]:
        return ["bad"]


SABOTEURS: Final[tuple[type[Honest], ...]] = (
    LosesSome,
    RepeatsSome,
    ReturnsTooSoon,
    ReversesBatches,
    HidesTheUnheard,
    DropsHeaders,
    GivesATopicToOneQueue,
    NeverWakes,
    FetchesOnWhenCancelled,
    GivesOneTooMany,
    CountsNothing,
    ForgetsErrors,
    KeepsWhatIsDone,
    LosesEmits,
    EmitsBeforeItLooks,
    CountsReleases,
    TakesAFailureForARelease,
    DropsTheDead,
    ShortensTracebacks,
    SettlesById,
    ExtendsById,
    AcceptsSilently,
    NeverExtends,
    LeasesForEver,
    ReclaimsFromEverybody,
    NeverReclaims,
    IgnoresDueTimes,
    RetriesAtOnce,
    IgnoresPriorities,
    IgnoresOrder,
    OrdersOnlyWhatIsReady,
    IgnoresBounds,
    DropsTheNewest,
    KeepsTemporaryQueues,
    RedrivesACopy,
    RedrivesToTheTopic,
    MatchesAnyError,
    ForgetsThePage,
    PurgesTheHeld,
    LosesTheHeldOnClose,
    PublishesToEverybody,
    AcceptsForNobody,
    NobodyIsEarly,
    ForgetsDueTimes,
    HurriesWhatIsReleased,
    ReversesFetches,
    BuriesWithoutReason,
    BuriesAnywhere,
    ForgetsDeclarations,
    HidesTheRemoved,
    KeepsWhatWasRemoved,
    RemovesTheDead,
    PanicsWithoutReason,
)
