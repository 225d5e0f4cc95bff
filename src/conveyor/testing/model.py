"""A model of a broker, and a hypothesis state machine that plays any broker against it, looking for a sequence that differs.

Needs hypothesis. ``TestMyBroker = machine(my_store).TestCase`` is a test for pytest and unittest.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from conveyor.broker import Broker, Clock, DeadFilter, DeadLetter, Delivery, Feature, Queue, Settlement, Subscription
from conveyor.core.message import Message, redriven
from conveyor.core.settle import Dead, Done, Release, RetryAt, Verdict
from conveyor.testing.clock import TurnableClock

T = TypeVar("T")
Store = Callable[[Clock], AbstractContextManager[Callable[[], Broker]]]
"""Given the clock to live by, opens a new, empty store, and gives a maker of (unopened) broker objects on it."""

START: Final = 1_700_000_000.0
LEASE_SECONDS: Final = 10.0
PATIENCE_SECONDS: Final = 30.0
"""No call may take longer; the clock of the model stands still meanwhile."""
ANY_ERROR: Final = None
"""After a lease that ended, the broker may say what it likes."""

CROWDED: Final = 12
"""Messages from which on a purge is worth its while: it ends many stories."""
OWNERS: Final = range(2)
PLAIN, ORDERED = "plain", "ordered"
TOPICS: Final = {"a": (PLAIN, ORDERED), "b": (ORDERED,), "nobody": ()}
"""topic → its queues."""


@dataclass(slots=True, eq=False)
class Copy:
    """A message in one queue, as the model knows it.

    Parameters:
        number: its place in the order of publishing.
        plain: was never given back and never had to wait, so that its place among its like is certain.
        deliveries: what the count may be; more than one where the contract leaves the broker a choice.
        held: the delivery that has it; until when, and by which owner.
    """

    queue: str
    message: Message
    number: int
    due: float
    plain: bool
    deliveries: frozenset[int] = frozenset([0])
    attempts: int = 0
    error: str | None = ""
    held: Delivery | None = None
    until: float = 0.0
    owner: str = ""


@dataclass(slots=True)
class Model:
    """What must be in the broker: the copies that are alive, and the dead."""

    alive: list[Copy] = field(default_factory=list)
    dead: list[Copy] = field(default_factory=list)
    numbers: Iterable[int] = field(default_factory=itertools.count)

    def publish(self, message: Message, now: float, queues: Iterable[str]) -> None:
        for queue in queues:
            self.alive.append(Copy(queue, message, next(iter(self.numbers)), message.due, plain=message.due <= now))

    def deliverable(self, queue: str, now: float) -> list[Copy]:
        """What a fetch may give, the oldest first."""
        return [each for each in self.alive if each.queue == queue and self._free(each, now) and self._first(each)]

    def _free(self, copy: Copy, now: float) -> bool:
        return copy.due <= now if copy.held is None else copy.until <= now

    def _first(self, copy: Copy) -> bool:
        key = copy.message.key
        return (
            copy.queue != ORDERED
            or key is None
            or copy
            is min((e for e in self.alive if e.queue == ORDERED and e.message.key == key), key=lambda e: e.number)
        )

    def give_back(self, copy: Copy, due: float, deliveries: frozenset[int]) -> None:
        copy.held, copy.plain, copy.due, copy.deliveries = None, False, due, deliveries

    def holder_of(self, delivery: Delivery) -> Copy | None:
        """The copy that a delivery holds, if it still does."""
        return next(
            (each for each in self.alive if each.held is not None and each.held.receipt == delivery.receipt), None
        )


KINDS: Final = ["done", "emit", "retry", "retry", "release", "dead"]
WAITS = st.sampled_from([0.0, 0.0, 0.0, 3.0, 12.0])
"""Seconds from now; mostly none."""
PICKS = st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True)


def machine(store: Store) -> type[RuleBasedStateMachine]:
    """The state machine that plays a broker against the model."""

    class BrokerMachine(_BrokerMachine):
        open_store = staticmethod(store)

    return BrokerMachine


class _BrokerMachine(RuleBasedStateMachine):
    """Two broker objects on one store, of which each may be dead, asleep or late; queues with and without order."""

    open_store: Store

    def __init__(self) -> None:
        super().__init__()
        self.clock = TurnableClock(START)
        self.model = Model()
        self.ids = itertools.count(1)
        self.handed: list[Delivery] = []
        self.sure = True
        self.loop = asyncio.new_event_loop()
        self.store = self.open_store(self.clock)
        self.maker = self.store.__enter__()
        self.brokers: list[Broker] = []
        self.subscriptions: dict[tuple[str, str], Subscription] = {}
        for _ in OWNERS:
            self.brokers.append(self.do(self._opened()))
        self.missing = self.brokers[0].missing

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        async def patiently() -> T:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await coroutine

        return self.loop.run_until_complete(patiently())

    async def _opened(self) -> Broker:
        broker = self.maker()
        await broker.open()
        await self._attend(broker, [PLAIN, ORDERED])
        return broker

    async def _attend(self, broker: Broker, names: Sequence[str]) -> None:
        """Declare queues, and receive from them."""
        queues = {name: tuple(t for t, those in TOPICS.items() if name in those) for name in names}
        ordered = Feature.ORDER not in broker.missing
        await broker.declare(
            [
                Queue(name=name, topics=topics, ordered=ordered and name == ORDERED, lease_seconds=LEASE_SECONDS)
                for name, topics in queues.items()
            ]
        )
        for name in queues:
            self.subscriptions[broker.owner, name] = await broker.subscribe(name, 1_000)

    def _message(self, topic: str, key: str | None, priority: int, wait: float) -> Message:
        now = self.clock()
        return Message(
            id=f"m{next(self.ids)}",
            topic=topic,
            body=b"x",
            key=None if Feature.ORDER in self.missing else key,
            created=now,
            due=now + wait if wait and Feature.DELAY not in self.missing else 0.0,
            priority=0 if Feature.PRIORITY in self.missing else priority,
        )

    @rule(
        by=st.sampled_from(OWNERS),
        kinds=st.lists(
            st.tuples(
                st.sampled_from(sorted(TOPICS)), st.sampled_from([None, "k", "l"]), st.sampled_from([0, 0, 5]), WAITS
            ),
            min_size=1,
            max_size=4,
        ),
    )
    def publish(self, by: int, kinds: list[tuple[str, str | None, int, float]]) -> None:
        messages = [self._message(*kind) for kind in kinds]
        unheard = self.do(self.brokers[by].publish(messages))
        assert unheard == {each.id for each in messages if not TOPICS[each.topic]}
        for message in messages:
            self.model.publish(message, self.clock(), TOPICS[message.topic])

    @rule(by=st.sampled_from(OWNERS), queue=st.sampled_from([PLAIN, ORDERED]), limit=st.integers(1, 5))
    def fetch(self, by: int, queue: str, limit: int) -> None:
        if self.model.deliverable(queue, self.clock()):
            self._fetch(self.brokers[by], queue, limit)

    @rule(
        by=st.sampled_from(OWNERS),
        queue=st.sampled_from([PLAIN, ORDERED]),
        kinds=st.lists(st.sampled_from(KINDS), min_size=5, max_size=5),
        wait=WAITS,
    )
    def work(self, by: int, queue: str, kinds: list[str], wait: float) -> None:
        """What mostly happens: what is fetched is settled. Done often enough, it lets a message go through much."""
        if self.model.deliverable(queue, self.clock()):
            self._settle(self.brokers[by], self._fetch(self.brokers[by], queue, 3), kinds, wait)

    def _fetch(self, broker: Broker, queue: str, limit: int) -> list[Delivery]:
        now = self.clock()
        could = self.model.deliverable(queue, now)
        self.sure = False
        deliveries = self.do(self.subscriptions[broker.owner, queue].fetch(limit))
        assert 1 <= len(deliveries) <= limit
        given = [self._given(delivery, could) for delivery in deliveries]
        # How soon it is noticed what time has brought, while there is something else to give, is the broker's affair.
        left = [each for each in could if each not in given and each.held is None and each.due == 0.0]
        self._check_order(given, left)
        for copy, delivery in zip(given, deliveries, strict=True):
            copy.held, copy.until, copy.owner = delivery, now + LEASE_SECONDS, broker.owner
        self.handed += deliveries
        self.sure = True
        return deliveries

    def _given(self, delivery: Delivery, could: list[Copy]) -> Copy:
        copy = next((each for each in could if each.message.id == delivery.message.id), None)
        assert copy is not None, f"{delivery.message.id} was delivered, and must not be"
        assert copy.held is None or copy.held.receipt != delivery.receipt, "two deliveries have one receipt"
        assert delivery.message == copy.message
        assert delivery.deliveries - 1 in copy.deliveries, f"{copy}: delivered as {delivery}"
        assert delivery.attempts == copy.attempts, f"{copy}: delivered as {delivery}"
        if copy.held is None and copy.error is not ANY_ERROR:
            assert delivery.error == copy.error, f"{copy}: delivered as {delivery}"
        else:
            copy.error = delivery.error
        copy.deliveries = frozenset([delivery.deliveries])
        return copy

    def _check_order(self, given: list[Copy], left: list[Copy]) -> None:
        priorities = [each.message.priority for each in given]
        assert priorities == sorted(priorities, reverse=True), "a lower priority came first"
        assert all(each.message.priority <= priorities[-1] for each in left), "a lower priority came first"
        for priority in set(priorities):
            numbers = [each.number for each in given if each.plain and each.message.priority == priority]
            behind = [each.number for each in left if each.plain and each.message.priority == priority]
            assert numbers == sorted(numbers), "a younger message came first"
            assert not numbers or not behind or numbers[-1] < min(behind), "a younger message came first"

    @precondition(lambda self: bool(self.handed))
    @rule(
        by=st.sampled_from(OWNERS),
        picks=PICKS,
        kinds=st.lists(st.sampled_from(KINDS), min_size=4, max_size=4),
        wait=WAITS,
    )
    def settle(self, by: int, picks: list[int], kinds: list[str], wait: float) -> None:
        """What was handed over at some time is settled, by whoever thinks to have it still."""
        self._settle(self.brokers[by], self._picked(picks), kinds, wait)

    def _settle(self, broker: Broker, deliveries: list[Delivery], kinds: list[str], wait: float) -> None:
        verdicts = [self._verdict(kind, wait) for kind in kinds[: len(deliveries)]]
        settlements = [Settlement(each, verdict) for each, verdict in zip(deliveries, verdicts, strict=True)]
        self.sure = False
        lost = {each.receipt for each in self.do(broker.settle(settlements))}
        for delivery, verdict in zip(deliveries, verdicts, strict=True):
            copy = self._still_held(delivery, lost=delivery.receipt in lost)
            if copy is not None:
                self._settled(copy, verdict)
        self.sure = True

    def _picked(self, picks: list[int]) -> list[Delivery]:
        recent = self.handed[-12:]
        return list({id(each): each for each in (recent[pick % len(recent)] for pick in picks)}.values())

    def _verdict(self, kind: str, wait: float) -> Verdict:
        due = self.clock() + wait if wait and Feature.DELAY not in self.missing else 0.0
        match kind:
            case "done":
                return Done()
            case "emit":
                return Done((self._message("a", "k", 0, 0.0), self._message("b", "l", 0, wait)))
            case "retry":
                return RetryAt(due, f"error {next(self.ids)}", "trace")
            case "release":
                return Release(due)
            case _:
                return Dead("rejected", f"error {next(self.ids)}", "trace")

    def _still_held(self, delivery: Delivery, *, lost: bool) -> Copy | None:
        """The copy that a delivery was accepted for; checks that it was accepted, or refused, with right."""
        copy = self.model.holder_of(delivery)
        if copy is None:
            assert lost, f"{delivery} has lost its lease, and was accepted"
            return None
        if not lost:
            return copy
        assert copy.until <= self.clock(), f"{copy} is held, and {delivery} was refused"
        copy.error = ANY_ERROR
        self.model.give_back(copy, 0.0, copy.deliveries)
        return None

    def _settled(self, copy: Copy, verdict: Verdict) -> None:
        match verdict:
            case Done(emits):
                self.model.alive.remove(copy)
                for message in emits:
                    self.model.publish(message, self.clock(), TOPICS[message.topic])
            case RetryAt(due, error):
                copy.attempts += 1
                copy.error = error
                self.model.give_back(copy, due, copy.deliveries)
            case Release(due):
                self.model.give_back(copy, due, frozenset(each - 1 for each in copy.deliveries))
            case Dead(_, error):
                self.model.alive.remove(copy)
                copy.error = error
                self.model.dead.append(copy)

    @precondition(lambda self: bool(self.handed))
    @rule(by=st.sampled_from(OWNERS), picks=PICKS)
    def extend(self, by: int, picks: list[int]) -> None:
        deliveries = self._picked(picks)
        lost = {each.receipt for each in self.do(self.brokers[by].extend(deliveries))}
        for delivery in deliveries:
            copy = self._still_held(delivery, lost=delivery.receipt in lost)
            if copy is not None:
                copy.until = self.clock() + LEASE_SECONDS

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.turn(seconds)

    @precondition(lambda self: Feature.RECLAIM not in self.missing)
    @rule(dead=st.sampled_from(OWNERS))
    def reclaim(self, dead: int) -> None:
        """One is believed dead by the other, and works on as a zombie."""
        owner = self.brokers[dead].owner
        held = [each for each in self.model.alive if each.held is not None and each.owner == owner]
        sure = sum(each.until > self.clock() for each in held)
        reclaimed = self.do(self.brokers[1 - dead].reclaim(owner, "killed"))
        assert sure <= reclaimed <= len(held)
        for copy in held:
            copy.error = "killed" if copy.until > self.clock() else ANY_ERROR
            self.model.give_back(copy, 0.0, copy.deliveries)

    @precondition(lambda self: any(each.held is not None for each in self.model.alive))
    @rule(leaver=st.sampled_from(OWNERS))
    def close(self, leaver: int) -> None:
        """One is closed in order, and started anew."""
        broker, now = self.brokers[leaver], self.clock()
        self.do(broker.close())
        for copy in self.model.alive:
            if copy.held is not None and copy.owner == broker.owner:
                uncounted = frozenset(each - 1 for each in copy.deliveries)
                copy.error = copy.error if copy.until > now else ANY_ERROR
                self.model.give_back(copy, 0.0, uncounted if copy.until > now else uncounted | copy.deliveries)
        self.brokers[leaver] = self.do(self._opened())

    @precondition(lambda self: len(self.model.alive) > CROWDED)
    @rule(by=st.sampled_from(OWNERS), queue=st.sampled_from([PLAIN, ORDERED]))
    def purge(self, by: int, queue: str) -> None:
        now = self.clock()
        # What is held beyond its lease waits, or does not: the broker decides, and the figures tell.
        for copy in self.model.alive:
            if copy.queue == queue and copy.held is not None and copy.until <= now:
                return
        waiting = [each for each in self.model.alive if each.queue == queue and each.held is None]
        assert self.do(self.brokers[by].purge(queue)) == len(waiting)
        self.model.alive = [each for each in self.model.alive if each not in waiting]

    @precondition(lambda self: len(self.model.alive) > CROWDED)
    @rule(by=st.sampled_from(OWNERS), queue=st.sampled_from([PLAIN, ORDERED]))
    def remove(self, by: int, queue: str) -> None:
        """A queue goes with all that is in it, and somebody declares it again."""
        for broker in self.brokers:
            self.do(self.subscriptions[broker.owner, queue].close())
        self.do(self.brokers[by].remove(queue, discard_dead=True))
        self.model.alive = [each for each in self.model.alive if each.queue != queue]
        self.model.dead = [each for each in self.model.dead if each.queue != queue]
        for broker in self.brokers:
            self.do(self._attend(broker, [queue]))

    @precondition(lambda self: bool(self.model.dead))
    @rule(by=st.sampled_from(OWNERS), picks=st.lists(st.integers(0, 3), min_size=1, max_size=4), discard=st.booleans())
    def deal_with_the_dead(self, by: int, picks: list[int], discard: bool) -> None:
        letters = self._letters(self.brokers[by])
        chosen = [letter for number, letter in enumerate(letters) if number in picks]
        act = self.brokers[by].discard if discard else self.brokers[by].redrive
        assert self.do(act([*chosen, *chosen])) == len(chosen)
        for letter in chosen:
            copy = next(e for e in self.model.dead if (e.queue, e.message.id) == (letter.queue, letter.message.id))
            self.model.dead.remove(copy)
            if not discard:
                self.model.publish(redriven(copy.message), self.clock(), [copy.queue])
                self.model.alive[-1].plain = False

    def _letters(self, broker: Broker) -> list[DeadLetter]:
        letters = self.do(broker.dead_letters(DeadFilter(), limit=1_000))
        found = [(e.queue, e.message.id, e.deliveries, e.attempts, e.error, e.traceback) for e in letters]
        expected = [(e.queue, e.message.id, max(e.deliveries), e.attempts, e.error, "trace") for e in self.model.dead]
        assert sorted(found) == sorted(expected), f"dead letters: {found} instead of {expected}"
        return letters

    @rule(by=st.sampled_from(OWNERS))
    def look(self, by: int) -> None:
        now = self.clock()
        for info in self.do(self.brokers[by].queues()):
            copies = [each for each in self.model.alive if each.queue == info.name]
            assert info.ready + info.delayed + info.in_flight == len(copies), f"{info} for {copies}"
            assert info.dead == sum(each.queue == info.name for each in self.model.dead)
            if not any(each.held is not None and each.until <= now for each in copies):
                assert info.in_flight == sum(each.held is not None for each in copies), f"{info} for {copies}"
                assert info.ready == len(self.model.deliverable(info.name, now)), f"{info} for {copies}"

    def teardown(self) -> None:
        """Whatever happened: everything that is alive can be worked off, and then nothing is left."""
        try:
            if self.sure:  # else a difference was found already, and the model is no measure any more
                self._work_off()
        finally:
            for each in self.brokers:
                self.do(each.close())
            self.store.__exit__(None, None, None)
            self.loop.close()

    def _work_off(self) -> None:
        self.clock.turn(1_000.0)
        broker = self.brokers[0]
        for queue in (PLAIN, ORDERED):
            while self.model.deliverable(queue, self.clock()):
                deliveries = self._fetch(broker, queue, 100)
                assert self.do(broker.settle([Settlement(each, Done()) for each in deliveries])) == []
                for delivery in deliveries:
                    copy = self.model.holder_of(delivery)
                    assert copy is not None
                    self.model.alive.remove(copy)
        assert not self.model.alive
        self._letters(broker)
        self.look(0)
