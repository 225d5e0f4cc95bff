"""The runner: fetch, call, settle; and everything that can go wrong in between."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conveyor import Context, Conveyor, Message, Reject, Retry, RetryPolicy
from conveyor.broker import Broker, DeadFilter, DeadLetter, Delivery, Queue, QueueInfo, Settlement
from conveyor.brokers.memory import MemoryBroker, MemoryStore, MemorySubscription
from conveyor.core.journal import Kind
from conveyor.core.message import Message as Envelope
from conveyor.core.settle import Done, Release
from conveyor.errors import BrokerUnavailable, PayloadError, PublishFailed
from conveyor.runtime import emitted as emitted_module
from conveyor.runtime import runner as runner_module
from conveyor.runtime.runner import Runner
from conveyor.runtime.worker import room_for
from conveyor.testing.harness import Harness


@dataclass(frozen=True)
class Order:
    number: int


@dataclass(frozen=True)
class Paid:
    number: int


AT_ONCE = RetryPolicy(attempts=3, initial=0.0)


async def queue_info(app: Conveyor, worker: str) -> QueueInfo:
    name = app.workers[worker].queue.name
    return next(info for info in await app.broker.queues() if info.name == name)


async def dead_letters(app: Conveyor) -> list[DeadLetter]:
    return await app.broker.dead_letters(DeadFilter(), limit=100)


@contextlib.asynccontextmanager
async def opened(broker: MemoryBroker) -> AsyncIterator[MemoryBroker]:
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


async def test_what_a_handler_returns_reaches_the_next_one_with_its_correlation() -> None:
    app = Conveyor("t")

    @app.worker
    async def charge(order: Order) -> Paid:
        return Paid(order.number)

    seen: list[Message] = []

    @app.worker
    async def ship(paid: Paid, message: Message) -> None:
        seen.append(message)

    async with Harness(app) as run:
        first = await run.publish(Order(7))
        assert run.published(Paid) == [Paid(7)]
    assert seen[0].correlation_id == first.id
    assert seen[0].causation_id == first.id


async def test_every_kind_of_handler_runs_and_publishes() -> None:
    app = Conveyor("t")

    @app.worker(name="async_one")
    async def async_one(order: Order) -> Paid | None:
        return Paid(1) if order.number else None

    @app.worker(name="sync_list")
    def sync_list(order: Order) -> list[Paid]:
        return [Paid(2), Paid(3)]

    @app.worker(name="sync_generator")
    def sync_generator(order: Order) -> Iterator[Paid]:
        yield Paid(4)
        yield Paid(5)

    @app.worker(name="async_generator")
    async def async_generator(order: Order) -> AsyncIterator[Paid]:
        yield Paid(6)

    @app.worker(name="with_context")
    def with_context(order: Order, context: Context) -> None:
        context.publish(Paid(7))

    async with Harness(app) as run:
        await run.publish(Order(1))
        assert sorted(paid.number for paid in run.published(Paid)) == [1, 2, 3, 4, 5, 6, 7]


async def test_a_repeated_attempt_emits_the_same_ids() -> None:
    app = Conveyor("t")
    ids: list[str] = []

    @app.worker(retry=AT_ONCE)
    async def charge(order: Order, context: Context) -> Paid:
        ids.append(context.publish(Paid(order.number)).id)
        if context.attempt < 3:
            raise ValueError("not yet")
        return Paid(order.number)

    async with Harness(app) as run:
        await run.publish(Order(1))
        assert len(ids) == 3
        assert len(set(ids)) == 1
        assert len(run.published(Paid)) == 2  # the last attempt's only


async def test_a_failing_handler_is_retried_and_then_kept_whole_as_a_dead_letter() -> None:
    app = Conveyor("t")

    @app.worker(retry=RetryPolicy(attempts=3))
    async def charge(order: Order) -> None:
        raise ValueError("the bank is closed")

    async with Harness(app) as run:
        message = await run.publish(Order(1), headers={"shop": "north"})
        assert len(run.retried()) == 2
        (letter,) = await run.dead("charge")
    assert letter.message.id == message.id
    assert letter.message.headers == {"shop": "north"}
    assert letter.reason == "exhausted"
    assert letter.error == "ValueError: the bank is closed"
    assert "the bank is closed" in letter.traceback


@pytest.mark.parametrize("expected", [Reject("unknown customer"), PayloadError("no such country")])
async def test_what_a_handler_refuses_on_purpose_is_kept_without_a_traceback(expected: Exception) -> None:
    app = Conveyor("t")

    @app.worker
    async def charge(order: Order) -> None:
        if order.number == 1:
            raise expected
        raise expected from KeyError("customer 7")

    async with Harness(app) as run:
        await run.publish(Order(1))
        await run.publish(Order(2))
        first, second = await run.dead("charge")
    assert first.traceback == ""
    assert second.traceback == "caused by KeyError: 'customer 7'\n"


async def test_reject_and_payloads_that_do_not_decode_burn_no_retries() -> None:
    app = Conveyor("t", broker=(broker := MemoryBroker()))

    @app.worker
    async def charge(order: Order) -> None:
        raise Reject("unknown customer")

    async with opened(broker), app.running():
        await app.publish(Order(1))
        for body in (b'{"number": "one"}', b"\xff\xfe", b"[" * 100_000, b""):
            await broker.publish([Envelope("x", "order", body)])
        letters: list[DeadLetter] = []
        async with asyncio.timeout(60):
            while len(letters) < 5:
                letters = await dead_letters(app)
                await asyncio.sleep(0)
    assert sorted(letter.reason for letter in letters) == ["invalid"] * 4 + ["rejected"]
    assert all(letter.attempts == 0 for letter in letters)
    assert {letter.message.body for letter in letters if letter.reason == "invalid"} >= {b"\xff\xfe", b"[" * 100_000}


async def test_retry_with_a_delay_overrides_the_policy() -> None:
    app = Conveyor("t")
    ran_at: list[float] = []

    @app.worker
    async def charge(order: Order, context: Context) -> None:
        ran_at.append(run.clock())
        if context.attempt == 1:
            raise Retry("rate limited", after=3600.0)

    async with Harness(app) as run:
        await run.publish(Order(1))
    assert ran_at[1] - ran_at[0] == pytest.approx(3600.0)


async def test_a_handler_over_its_time_is_cancelled_and_counts_as_failed() -> None:
    app = Conveyor("t")
    cancelled = asyncio.Event()

    @app.worker(timeout=0.05, retry=RetryPolicy(attempts=1))
    async def charge(order: Order) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with Harness(app) as run:
        await run.publish(Order(1))
        assert cancelled.is_set()
        (letter,) = await run.dead()
    assert letter.error.startswith("HandlerTimeout")


async def test_a_handler_that_swallows_cancellation_is_left_behind_and_its_place_taken() -> None:
    app = Conveyor("t")
    release = asyncio.Event()

    @app.worker(timeout=0.02, concurrency=1, retry=RetryPolicy(attempts=1))
    async def charge(order: Order) -> None:
        while order.number == 1 and not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    async with Harness(app) as run:
        await run.publish(Order(1))
        await run.publish(Order(2))
        (letter,) = await run.dead()
        assert "ignores being cancelled" in letter.error
        release.set()


async def test_a_thread_that_loops_forever_is_interrupted() -> None:
    app = Conveyor("t")
    ended = threading.Event()

    @app.worker(timeout=0.05, retry=RetryPolicy(attempts=1))
    def charge(order: Order) -> None:
        try:
            while True:
                time.monotonic()
        finally:
            ended.set()

    async with Harness(app) as run:
        await run.publish(Order(1))
        assert ended.wait(10)
        (letter,) = await run.dead()
    assert letter.reason == "exhausted"


@pytest.mark.parametrize(
    "raised", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, asyncio.CancelledError]
)
@pytest.mark.parametrize("threaded", [False, True], ids=["async", "thread"])
async def test_whatever_a_handler_raises_only_its_message_fails(raised: type[BaseException], threaded: bool) -> None:
    app = Conveyor("t")
    done: list[int] = []
    once = RetryPolicy(attempts=1)

    def work(order: Order) -> None:
        if order.number == 1:
            raise raised
        done.append(order.number)

    if threaded:
        app.worker(name="work", retry=once)(work)
    else:

        @app.worker(name="work", retry=once)
        async def work_async(order: Order) -> None:
            work(order)

    async with Harness(app) as run:
        await app.publish(Order(1))
        await run.publish(Order(2))
        assert len(await run.dead()) == 1
    assert done == [2]


async def test_a_bad_message_in_a_batch_does_not_take_its_neighbours_down() -> None:
    app = Conveyor("t", broker=(broker := MemoryBroker()))
    handled: list[int] = []
    enough = asyncio.Event()

    @app.worker(batch=100, retry=AT_ONCE, concurrency=1)
    async def charge(orders: list[Order]) -> list[Paid]:
        if any(order.number == 13 for order in orders):
            raise ValueError("unlucky")
        handled.extend(order.number for order in orders)
        if len(handled) >= 19:
            enough.set()
        return [Paid(order.number) for order in orders]

    async with opened(broker), app:
        for number in range(20):
            await app.publish(Order(number))
        await broker.publish([Envelope("bad", "order", b"{}")])
        async with app.running():
            async with asyncio.timeout(60):
                await enough.wait()
                while len(letters := await dead_letters(app)) < 2:
                    await asyncio.sleep(0)
    assert sorted(handled) == [n for n in range(20) if n != 13]
    assert sorted(letter.reason for letter in letters) == ["exhausted", "invalid"]


async def test_only_the_message_that_is_rejected_in_a_batch_becomes_a_dead_letter() -> None:
    app = Conveyor("t", broker=(broker := MemoryBroker()))

    @app.worker(batch=10)
    async def charge(orders: list[Order]) -> None:
        if any(order.number == 3 for order in orders):
            raise Reject("a stranger")

    async with opened(broker), app:
        for number in range(10):
            await app.publish(Order(number))
        async with app.running():
            async with asyncio.timeout(60):
                while (info := await queue_info(app, "charge")).ready or info.in_flight:
                    await asyncio.sleep(0)
        (letter,) = await dead_letters(app)
    assert b"3" in letter.message.body
    assert app.metrics.worker("charge").retried == 0


async def test_what_a_batch_emits_is_published_also_where_one_of_its_leases_is_lost() -> None:
    store = MemoryStore()
    app = Conveyor("t", broker=(broker := MemoryBroker(store=store)))
    released = asyncio.Event()

    @app.worker(batch=8)
    async def charge(orders: list[Order]) -> list[Paid]:
        if not released.is_set():
            await other.reclaim(broker.owner, "taken for dead")
            subscription = await other.subscribe(app.workers["charge"].queue.name, 1)
            assert len(await subscription.fetch(1)) == 1
            released.set()
        return [Paid(order.number) for order in orders]

    paid: list[int] = []
    enough = asyncio.Event()

    @app.worker
    async def ship(receipt: Paid) -> None:
        paid.append(receipt.number)
        if set(paid) == set(range(8)):
            enough.set()

    async with opened(broker), opened(MemoryBroker(store=store)) as other, app:
        for number in range(8):
            await app.publish(Order(number))
        async with app.running():
            async with asyncio.timeout(60):
                await enough.wait()


async def test_a_message_of_a_topic_that_the_worker_does_not_receive_is_kept_as_invalid() -> None:
    app = Conveyor("t", broker=(broker := MemoryBroker()))
    handled: list[Paid] = []

    @app.worker(queue="shared")
    async def ship(paid: Paid) -> None:
        handled.append(paid)

    async with opened(broker):
        await broker.declare([Queue(name="shared", topics=("order",))])  # what an earlier version received
        async with app.running():
            await app.publish(Order(1))
            await app.publish(Paid(2))
            async with asyncio.timeout(60):
                while not (letters := await dead_letters(app)) or not handled:
                    await asyncio.sleep(0)
    assert letters[0].reason == "invalid"
    assert "its topic 'order' is none of those" in letters[0].error
    assert handled == [Paid(2)]


@pytest.mark.parametrize("after", [float("inf"), float("nan"), -1.0, "30"])
async def test_a_retry_at_no_sensible_time_is_a_failed_attempt_and_holds_up_nobody(after: Any) -> None:
    app = Conveyor("t")

    @app.worker(retry=RetryPolicy(attempts=1))
    async def charge(order: Order) -> None:
        raise Retry("rate limited", after=after)

    async with Harness(app) as run:
        await run.publish(Order(1))
        (letter,) = await run.dead()
    assert "ValueError: Retry(after=" in letter.error


async def test_an_error_that_cannot_even_be_formatted_costs_no_lane() -> None:
    app = Conveyor("t")

    class Notes:
        def __iter__(self) -> Iterator[str]:
            raise RuntimeError("no notes")

        def __str__(self) -> str:
            raise RuntimeError("no text")

    class HostileError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    @app.worker(concurrency=1, retry=RetryPolicy(attempts=1))
    async def charge(order: Order) -> None:
        error = HostileError()
        error.__notes__ = Notes()  # type: ignore[assignment]
        raise error

    async with Harness(app) as run:
        for number in range(3):
            await run.publish(Order(number))
        assert len(await run.dead()) == 3


async def test_a_suspect_that_swallows_cancellation_stops_nobody_else() -> None:
    store = MemoryStore()
    app = Conveyor("t", broker=(broker := MemoryBroker(store=store)))
    release, done = asyncio.Event(), asyncio.Event()

    @app.worker(timeout=0.02, retry=RetryPolicy(attempts=1))
    async def charge(order: Order) -> None:
        if order.number == 1:
            done.set()
            return
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    async with opened(broker), app:
        queue = app.workers["charge"].queue.name
        await app.publish(Order(0))
        for _ in range(2):
            victim = MemoryBroker(store=store)
            await victim.open()
            await (await victim.subscribe(queue, 1)).fetch(1)
            await broker.reclaim(victim.owner, "killed")
        async with app.running() as runner:
            async with asyncio.timeout(60):
                while not await dead_letters(app):
                    await asyncio.sleep(0.001)
                await app.publish(Order(1))
                await done.wait()
            assert runner.health().ready
            release.set()


class Asked(MemoryBroker):
    """A broker that counts how often it is asked for its queues, and can hold back settlements or be unable to tell."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        super().__init__(store=store)
        self.looks = 0
        self.unable: Callable[[int], bool] = lambda _: False
        self.settling, self.may_settle = asyncio.Event(), asyncio.Event()
        self.may_settle.set()

    async def queues(self) -> list[QueueInfo]:
        self.looks += 1
        if self.unable(self.looks):
            raise BrokerUnavailable("away")
        return await super().queues()

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        self.settling.set()
        await self.may_settle.wait()
        return await super().settle(settlements)


def charging(broker: Broker | str, *, batch: int = 1, journal: bool = False) -> tuple[Conveyor, asyncio.Queue[int]]:
    """An application that makes payments of orders, and the numbers of those that it has handled."""
    app, handled = Conveyor("charging", broker=broker, journal=journal), asyncio.Queue[int]()

    if batch == 1:

        @app.worker
        async def charge(order: Order) -> Paid:
            handled.put_nowait(order.number)
            return Paid(order.number)

    else:

        @app.worker(name="charge", batch=batch)
        async def charge_several(orders: list[Order]) -> list[Paid]:
            for order in orders:
                handled.put_nowait(order.number)
            return [Paid(order.number) for order in orders]

    return app, handled


def shipping(broker: Broker | str) -> tuple[Conveyor, asyncio.Queue[int]]:
    """Another application, which receives payments, and the numbers of those."""
    app, received = Conveyor("shipping", broker=broker), asyncio.Queue[int]()

    @app.worker
    async def ship(paid: Paid) -> None:
        received.put_nowait(paid.number)

    return app, received


async def told_of_payments(app: Conveyor, order: Message) -> list[str]:
    """What the journal says of what an order has led to, as soon as it says anything: the reasons of the entries."""
    asker = (await app.connect()).asker
    async with asyncio.timeout(60):
        while True:
            entries = (await asker.journey(order.id)).entries
            if reasons := [each.reason for each in entries if each.kind is Kind.PUBLISHED and each.topic == "paid"]:
                return reasons
            await asyncio.sleep(0.01)


@pytest.fixture(params=["memory", "sqlite"])
async def two_brokers(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[tuple[Broker | str, Broker | str]]:
    """Of two processes, with the same queues."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/t.queue", f"sqlite:///{tmp_path}/t.queue"
        return
    store = MemoryStore()
    async with opened(MemoryBroker(store=store)) as one, opened(MemoryBroker(store=store)) as other:
        yield one, other


async def test_what_an_application_receives_that_started_later_is_not_said_to_have_gone_nowhere(
    two_brokers: tuple[Broker | str, Broker | str], caplog: pytest.LogCaptureFixture
) -> None:
    charging_app, _ = charging(two_brokers[0], journal=True)
    shipping_app, received = shipping(two_brokers[1])
    with caplog.at_level(logging.INFO):
        async with charging_app.running(), shipping_app.running():
            sent = await charging_app.publish(Order(1))
            assert await received.get() == 1
            assert await told_of_payments(charging_app, sent) == [""]
    assert charging_app.metrics.unrouted == 0
    assert "go nowhere" not in caplog.text


async def test_what_no_application_receives_is_told_by_the_journal_the_metrics_and_once_by_the_log(
    two_brokers: tuple[Broker | str, Broker | str], caplog: pytest.LogCaptureFixture
) -> None:
    app, _ = charging(two_brokers[0], journal=True)
    with caplog.at_level(logging.INFO):
        async with app.running():
            for number in (1, 2):
                sent = await app.publish(Order(number))
                assert await told_of_payments(app, sent) == ["unrouted"]
            assert (app.metrics.unrouted, app.metrics.published) == (2, 4)
    assert caplog.text.count("no queue receives 'paid'") == 1


async def test_nothing_is_said_to_have_gone_nowhere_before_it_has_gone(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    async with opened(broker := Asked(store)), opened(other := MemoryBroker(store=store)):
        app, _ = charging(broker)
        shipping_app, received = shipping(other)
        broker.may_settle.clear()
        with caplog.at_level(logging.INFO):
            async with app.running():
                await app.publish(Order(1))
                await broker.settling.wait()
                for _ in range(100):  # whoever does not wait for the settlement looks now
                    await asyncio.sleep(0)
                async with shipping_app.running():
                    broker.may_settle.set()
                    assert await received.get() == 1
        assert app.metrics.unrouted == 0
        assert "go nowhere" not in caplog.text


async def test_the_broker_is_asked_where_events_go_once_for_many_and_not_while_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(emitted_module, "DOUBT_SECONDS", 3_600.0)
    store = MemoryStore()
    async with opened(broker := Asked(store)), opened(other := MemoryBroker(store=store)):
        app, handled = charging(broker)
        shipping_app, received = shipping(other)

        async def charged(number: int) -> None:
            for each in range(number):
                await app.publish(Order(each))
            for _ in range(number):
                await handled.get()

        async with app.running():
            await charged(300)
        assert app.metrics.unrouted == 300
        assert broker.looks <= 3  # at the start, at the first event, at the end

        broker.looks = 0
        async with shipping_app.running(), app.running():
            await charged(300)
            for _ in range(300):
                await received.get()
        assert app.metrics.unrouted == 300
        assert broker.looks == 1


async def test_where_a_look_fails_what_went_nowhere_is_counted_later_and_once() -> None:
    async with opened(broker := Asked()):
        app, _ = charging(broker)
        broker.unable = lambda look: look in (2, 3)
        async with app.running() as runner:
            await app.publish(Order(1))
            async with asyncio.timeout(60):
                while not app.metrics.unrouted or not runner.health().ready:
                    await asyncio.sleep(0.001)
        assert app.metrics.unrouted == 1


async def test_where_the_broker_cannot_tell_any_more_what_was_emitted_is_told_as_published_and_nothing_else() -> None:
    async with opened(broker := Asked()):
        app, handled = charging(broker, journal=True)
        broker.unable = lambda look: look > 1
        async with app:
            async with app.running(keeper=False):
                sent = await app.publish(Order(1))
                await handled.get()
            broker.unable = lambda _: False
            async with app.keeper(broker):
                assert await told_of_payments(app, sent) == [""]
        assert app.metrics.unrouted == 0


@pytest.mark.parametrize(("topic", "reason", "unrouted"), [("paid", "", 0), ("other", "unrouted", 2)])
async def test_what_a_batch_emits_went_nowhere_where_the_broker_answers_so(
    topic: str, reason: str, unrouted: int
) -> None:
    async with opened(broker := MemoryBroker()):
        app = Conveyor("charging", broker=broker, journal=True)
        begun, may_end = asyncio.Event(), asyncio.Event()

        @app.worker(batch=2)
        async def charge(orders: list[Order]) -> list[Paid]:
            begun.set()
            await may_end.wait()
            return [Paid(order.number) for order in orders]

        async with app:
            sent = [await app.publish(Order(number)) for number in range(2)]
            async with app.running():
                await begun.wait()
                await broker.declare([Queue(name="shipping.ship", topics=(topic,))])
                may_end.set()
                assert set(await told_of_payments(app, sent[0])) == {reason}
        assert app.metrics.unrouted == unrouted


async def test_an_expired_message_is_not_handled() -> None:
    app = Conveyor("t")
    handled: list[Order] = []

    @app.worker
    async def charge(order: Order) -> None:
        handled.append(order)

    async with Harness(app) as run:
        await app.publish(Order(1), delay=60.0, expires=30.0)
        await run.turn(61.0)
        (letter,) = await run.dead()
    assert letter.reason == "expired"
    assert handled == []


async def test_drain_finishes_what_runs_and_gives_back_what_does_not() -> None:
    app = Conveyor("t", broker=(broker := MemoryBroker()))
    started = asyncio.Event()
    finish = asyncio.Event()
    finished: list[int] = []

    @app.worker(concurrency=1, prefetch=10)
    async def charge(order: Order) -> None:
        started.set()
        await finish.wait()
        finished.append(order.number)

    async with opened(broker), app:
        for number in range(5):
            await app.publish(Order(number))
        async with app.running() as runner:
            await started.wait()
            draining = asyncio.ensure_future(runner.drain(10.0))
            while runner.health().ready:
                await asyncio.sleep(0)
            finish.set()
            assert await draining
            assert "stopped" in runner.health().unready
        assert finished == [0]
        info = await queue_info(app, "charge")
        assert (info.ready, info.in_flight) == (4, 0)
        subscription = await broker.subscribe(app.workers["charge"].queue.name, 10)
        assert [delivery.deliveries for delivery in await subscription.fetch(10)] == [1, 1, 1, 1]


async def test_a_process_whose_handlers_are_quick_fetches_deeper_and_gives_back_what_waits_when_they_become_slow() -> (
    None
):
    app = Conveyor("t", broker=(broker := MemoryBroker()))
    quick, total, prefetch = 3_000, 6_000, 10
    slow = asyncio.Event()

    @app.worker(concurrency=5)
    async def charge(order: Order) -> None:
        if order.number >= quick:
            slow.set()
            await asyncio.Event().wait()

    async with opened(broker), app:
        for number in range(total):
            await app.publish(Order(number))
        async with app.running() as runner:
            async with asyncio.timeout(60):
                await slow.wait()
                charging = runner.consumers["charge"]
                assert app.workers["charge"].prefetch == prefetch
                assert prefetch < len(charging.held()) <= app.workers["charge"].deepest
                other = await broker.subscribe(app.workers["charge"].queue.name, total)
                taken: list[Delivery] = []
                while len(taken) < total - quick - prefetch - 5:  # all but what it may hold, and what it is at
                    taken += await other.fetch(total)
            assert {delivery.deliveries for delivery in taken} == {1}
            await runner.drain(0.0)


@pytest.mark.parametrize(("rate", "room"), [(0.0, 200), (3_999.0, 200), (20_000.0, 1_000), (1e9, 2_000)])
def test_a_process_holds_what_it_handles_in_a_twentieth_of_a_second_within_its_bounds(rate: float, room: int) -> None:
    assert room_for(200, 2_000, rate) == room


async def test_drain_releases_uncounted_what_does_not_finish_in_its_grace() -> None:
    app = Conveyor("t", broker=(broker := MemoryBroker()))
    started = asyncio.Event()

    @app.worker
    async def charge(order: Order) -> None:
        started.set()
        await asyncio.Event().wait()

    async with opened(broker), app:
        await app.publish(Order(1))
        async with app.running() as runner:
            await started.wait()
            assert not await runner.drain(0.05)
        subscription = await broker.subscribe(app.workers["charge"].queue.name, 10)
        (delivery,) = await subscription.fetch(10)
        assert (delivery.deliveries, delivery.attempts) == (1, 0)


@pytest.mark.parametrize("heeds", [True, False])
async def test_who_is_cancelled_again_while_he_drains_leaves_nothing_running(heeds: bool) -> None:
    app = Conveyor("t", broker=(broker := MemoryBroker()), journal=True)
    started, done = asyncio.Event(), asyncio.Event()

    @app.worker(concurrency=3)
    async def charge(order: Order) -> None:
        started.set()
        while not done.is_set():
            try:
                await done.wait()
            except asyncio.CancelledError:
                if heeds:
                    raise

    runners: list[Runner] = []

    async def run() -> None:
        async with app.running(grace_seconds=None) as runner:
            runners.append(runner)
            await asyncio.Event().wait()

    async with opened(broker):
        before = asyncio.all_tasks()
        running = asyncio.create_task(run())
        async with asyncio.timeout(60):
            while not runners:
                await asyncio.sleep(0)
            await app.publish(Order(1))
            await started.wait()
            running.cancel()
            while "draining" not in runners[0].health().unready:
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.sleep(0.01)
            running.cancel()  # and once more, in the midst of it
            with pytest.raises(asyncio.CancelledError):
                await running
        deaf = {task for task in asyncio.all_tasks() - before if task.get_name() == "charge lane"}
        assert asyncio.all_tasks() - before == deaf
        assert len(deaf) == (0 if heeds else 1)
        assert "stopped" in runners[0].health().unready
        if heeds:
            info = next(info for info in await broker.queues() if info.name == "t.charge")
            assert (info.ready, info.in_flight) == (1, 0)
        done.set()
        if deaf:
            await asyncio.wait(deaf)


async def test_a_message_that_processes_died_of_runs_alone_and_is_given_up_at_the_limit() -> None:
    store = MemoryStore()
    app = Conveyor("t", broker=(broker := MemoryBroker(store=store)))
    at_work: set[int] = set()
    together: dict[int, set[int]] = {}
    done = asyncio.Event()

    @app.worker(retry=RetryPolicy(crashes=3))
    async def charge(order: Order) -> None:
        at_work.add(order.number)
        await asyncio.sleep(0.001)
        together[order.number] = set(at_work)
        at_work.discard(order.number)
        if len(together) == 19:
            done.set()

    async with opened(broker), app:
        queue = app.workers["charge"].queue.name
        for number in (0, 1):  # number 0 kills two processes, number 1 three
            for _ in range(2 + number):
                victim = MemoryBroker(store=store)
                await victim.open()
                if _ == 0:
                    await app.publish(Order(number))
                await (await victim.subscribe(queue, 1)).fetch(1)
                await broker.reclaim(victim.owner, "killed by SIGKILL")
            if number == 0:  # out of the way of the next victim
                subscription = await broker.subscribe(queue, 1)
                (held,) = await subscription.fetch(1)
        await broker.settle([Settlement(held, Release())])
        for number in range(2, 20):
            await app.publish(Order(number))
        async with app.running():
            async with asyncio.timeout(60):
                await done.wait()
                while not (letters := await dead_letters(app)):
                    await asyncio.sleep(0)
    assert together[0] == {0}
    assert max(len(others) for others in together.values()) > 1
    assert [letter.reason for letter in letters] == ["crashed"]
    assert "killed by SIGKILL" in letters[0].error


@contextlib.asynccontextmanager
async def a_suspect_that_comes_later(
    broker: MemoryBroker, store: MemoryStore, queue: str
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Two processes die of the only message of a queue; it is held until the function is called that this gives."""
    for _ in range(2):
        victim = MemoryBroker(store=store)
        await victim.open()
        await (await victim.subscribe(queue, 1)).fetch(1)
        await broker.reclaim(victim.owner, "killed by SIGKILL")
    subscription = await broker.subscribe(queue, 1)
    (held,) = await subscription.fetch(1)

    async def come() -> None:
        await broker.settle([Settlement(held, Release())])
        await subscription.close()

    yield come


@pytest.mark.parametrize("told", ["cancelled", "paused"])
async def test_a_message_that_waits_to_run_alone_hears_that_it_is_cancelled_or_its_queue_paused(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "GIVEN_BACK", 0)
    store = MemoryStore()
    app = Conveyor("t", broker=(broker := MemoryBroker(store=store)))
    holding, go = asyncio.Event(), asyncio.Event()
    ran: list[int] = []

    @app.worker
    async def charge(order: Order) -> None:
        ran.append(order.number)

    @app.worker(name="hold", topic="hold")
    async def hold(_: dict[str, int]) -> None:
        holding.set()
        await go.wait()

    async with opened(broker), app:
        queue = app.workers["charge"].queue.name
        message = await app.publish(Order(0))
        async with (
            a_suspect_that_comes_later(broker, store, queue) as come,
            app.running() as runner,
            asyncio.timeout(60),
        ):
            await app.publish({}, topic="hold")
            await holding.wait()
            await come()
            while runner._waits_alone is None:
                await asyncio.sleep(0)
            if told == "cancelled":
                runner.cancel({message.id: 1.0})
            else:
                monkeypatch.setattr(runner, "_paused", lambda: frozenset({queue}))
                await runner._heed_pauses()
            go.set()
            while runner._alone_at_work:
                await asyncio.sleep(0)
        info = next(info for info in await broker.queues() if info.name == queue)
    assert ran == []
    assert info.ready == (1 if told == "paused" else 0)


async def test_a_suspect_is_not_charged_for_the_death_of_a_process_in_which_others_were_at_work_when_it_came() -> None:
    store = MemoryStore()
    app = Conveyor("t", broker=(broker := MemoryBroker(store=store)))
    holding, go, ran = asyncio.Event(), asyncio.Event(), asyncio.Event()
    beside: list[bool] = []

    @app.worker
    async def charge(_: Order) -> None:
        beside.append(not go.is_set())
        ran.set()

    @app.worker(name="hold", topic="hold")
    async def hold(_: dict[str, int]) -> None:
        holding.set()
        await go.wait()

    async with opened(broker), app:
        queue = app.workers["charge"].queue.name
        await app.publish(Order(0))
        async with (
            a_suspect_that_comes_later(broker, store, queue) as come,
            app.running() as runner,
            asyncio.timeout(60),
        ):
            await app.publish({}, topic="hold")
            await holding.wait()
            await come()
            while not runner.consumers["charge"].metrics.suspects or (await ready(broker, queue)) != 1:
                await asyncio.sleep(0)
            subscription = await broker.subscribe(queue, 1)
            (given_back,) = await subscription.fetch(1)  # by what would be the crash, nobody holds it
            assert given_back.crashes == 2
            await broker.settle([Settlement(given_back, Release())])
            await subscription.close()
            go.set()
            await ran.wait()
    assert beside == [False]


async def ready(broker: MemoryBroker, queue: str) -> int:
    [info] = [info for info in await broker.queues() if info.name == queue]
    return info.ready


async def test_a_cancelled_message_that_became_a_dead_letter_all_the_same_is_handled_when_it_is_redriven() -> None:
    app = Conveyor("t", broker=(broker := MemoryBroker()))
    begun, go = asyncio.Event(), asyncio.Event()
    handled: list[int] = []

    @app.worker(batch=2, retry=RetryPolicy(attempts=1))
    async def charge(orders: list[Order]) -> None:
        handled.extend(order.number for order in orders)
        begun.set()
        await go.wait()
        if len(handled) <= 4:  # together, and then one by one
            raise ValueError("no good")

    async with opened(broker), app:
        sent = [await app.publish(Order(number)) for number in range(2)]
        async with app.running() as runner, asyncio.timeout(60):
            await begun.wait()
            runner.cancel({sent[0].id: 1.0})  # a batch goes on
            go.set()
            while len(letters := await dead_letters(app)) < 2:
                await asyncio.sleep(0)
            await broker.redrive(letters)
            while len(handled) < 6:
                await asyncio.sleep(0)
    assert sorted(handled[4:]) == [0, 1]


async def test_a_lost_lease_stops_the_handler_and_settles_nothing() -> None:
    store = MemoryStore()
    app = Conveyor("t", broker=(broker := MemoryBroker(store=store)))
    started, stopped = asyncio.Event(), asyncio.Event()

    @app.worker(lease=0.15)
    async def charge(order: Order) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with opened(broker), opened(MemoryBroker(store=store)) as other, app.running():
        await app.publish(Order(1))
        await started.wait()
        await other.reclaim(broker.owner, "somebody thought it dead")
        subscription = await other.subscribe(app.workers["charge"].queue.name, 1)
        (taken,) = await subscription.fetch(1)
        async with asyncio.timeout(60):
            await stopped.wait()
        assert await other.extend([taken]) == []
        assert app.metrics.worker("charge").lost_leases == 1


class FlakyBroker(MemoryBroker):
    """Unreachable for settlements until it is mended."""

    def __init__(self) -> None:
        super().__init__()
        self.tried = asyncio.Event()
        self.mended = False

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        if not self.mended:
            self.tried.set()
            raise BrokerUnavailable("the cable is out")
        return await super().settle(settlements)


class DeafBroker(MemoryBroker):
    """Its first fetches fail: twice in a row, with nothing at work that could ask again."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0

    async def subscribe(self, queue: str, prefetch: int, *, early: bool = False) -> MemorySubscription:
        subscription = await super().subscribe(queue, prefetch, early=early)
        fetch = subscription.fetch

        async def failing(limit: int) -> list[Delivery]:
            if self.failures < 2:
                self.failures += 1
                raise BrokerUnavailable("the cable is out")
            return await fetch(limit)

        subscription.fetch = failing  # type: ignore[method-assign]
        return subscription


async def test_a_worker_at_rest_receives_again_after_its_broker_failed_twice_in_a_row() -> None:
    app = Conveyor("t", broker=(broker := DeafBroker()))
    handled = asyncio.Event()

    @app.worker
    async def charge(order: Order) -> None:
        handled.set()

    async with opened(broker), app.running():
        await app.publish(Order(1))
        async with asyncio.timeout(60):
            await handled.wait()
    assert broker.failures == 2


async def test_settlements_wait_for_a_broker_that_is_away_and_the_runner_says_so() -> None:
    app = Conveyor("t", broker=(broker := FlakyBroker()))
    handled: list[int] = []

    @app.worker
    async def charge(order: Order) -> None:
        handled.append(order.number)

    async with opened(broker), app.running() as runner:
        await app.publish(Order(1))
        await broker.tried.wait()
        assert any("the cable is out" in reason for reason in runner.health().unready)
        broker.mended = True
        async with asyncio.timeout(60):
            while (await queue_info(app, "charge")).in_flight:
                await asyncio.sleep(0.001)
        assert runner.health().ready
    assert handled == [1]


class ChoosyBroker(MemoryBroker):
    """Refuses to store the receipt of order 3."""

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        for each in settlements:
            for emitted in each.verdict.emits if isinstance(each.verdict, Done) else ():
                if emitted.key == "3":
                    raise PublishFailed({emitted.id: "there is no room for it"}, {})
        return await super().settle(settlements)


async def test_an_emitted_message_that_cannot_be_stored_makes_a_dead_letter_and_holds_up_nobody() -> None:
    app = Conveyor("t", broker=(broker := ChoosyBroker()))

    @app.worker
    async def charge(order: Order, context: Context) -> None:
        context.publish(Paid(order.number), key=str(order.number))

    paid: list[int] = []
    enough = asyncio.Event()

    @app.worker
    async def ship(receipt: Paid) -> None:
        paid.append(receipt.number)
        if len(paid) == 5:
            enough.set()

    async with opened(broker), app:
        for number in range(6):
            await app.publish(Order(number))
        async with app.running():
            async with asyncio.timeout(60):
                await enough.wait()
                while not (letters := await dead_letters(app)):
                    await asyncio.sleep(0.001)
    assert sorted(paid) == [0, 1, 2, 4, 5]
    assert "the broker refuses what its handler decided" in letters[0].error


async def test_middleware_wraps_every_handler_in_the_order_of_use() -> None:
    from conveyor import Call, Next

    app = Conveyor("t")
    heard: list[str] = []

    async def outer(call: Call, next: Next) -> object:
        heard.append(f"outer {call.worker}")
        return await next(call)

    async def inner(call: Call, next: Next) -> object:
        heard.append(f"inner {call.payload}")
        result = await next(call)
        heard.append(f"result {result}")
        return result

    app.use(outer)
    app.use(inner)

    @app.worker
    def charge(order: Order) -> Paid:
        return Paid(order.number)

    async with Harness(app) as run:
        await run.publish(Order(3))
        assert run.published(Paid) == [Paid(3)]
    assert heard == ["outer charge", "inner Order(number=3)", "result Paid(number=3)"]


async def test_an_event_of_an_undeclared_type_is_a_clear_failure() -> None:
    app = Conveyor("t")

    @app.worker(retry=RetryPolicy(attempts=1))
    async def charge(order: Order) -> Paid:
        return Order(1)  # type: ignore[return-value]

    async with Harness(app) as run:
        await run.publish(Order(1))
        (letter,) = await run.dead()
    assert "returned Order, but its return annotation says Paid" in letter.error


async def test_idle_lanes_hold_nothing_of_the_messages_they_have_handled(tmp_path: Path) -> None:
    app = Conveyor("t", broker=f"sqlite:///{tmp_path}/t.queue?durability=normal")
    all_there = asyncio.Barrier(20)

    @app.worker(topic="raw", concurrency=20, prefetch=20)
    async def look(body: bytes) -> None:
        await all_there.wait()  # each in a lane of its own

    async with app.running() as runner:
        await app.publish(b"warm", topic="raw")
        await asyncio.gather(*(app.publish(b"x", topic="raw") for _ in range(19)))
        await runner.consumers["look"].still()
        tracemalloc.start()
        try:
            for _ in range(20):
                await app.publish(b"x" * 500_000, topic="raw")
            async with asyncio.timeout(60):
                while app.metrics.worker("look").succeeded < 40 or runner.consumers["look"].held():
                    await asyncio.sleep(0.02)
                while tracemalloc.get_traced_memory()[0] > 2_000_000:  # of 10 MB
                    await asyncio.sleep(0.02)
        finally:
            tracemalloc.stop()
