"""The control plane: orders reach every runner, a pause costs no message anything, and nobody pays who is not asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conveyor import Conveyor, Message, RetryPolicy
from conveyor.broker import Broker, Queue, QueueInfo
from conveyor.brokers.memory import MemoryBroker, MemoryStore
from conveyor.brokers.sqlite import SqliteBroker
from conveyor.core.pause import Switch
from conveyor.errors import BrokerUnavailable, QueueConflict
from conveyor.runtime import runner as runner_module
from conveyor.runtime.control import CONTROL, Control, Operator, Status, Turn, cancel, internal, tell
from conveyor.runtime.health import Health
from conveyor.runtime.runner import Runner

PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Order:
    number: int


@dataclass
class Work:
    """An application whose handler waits until it may go on."""

    app: Conveyor
    begun: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    may_end: asyncio.Event = field(default_factory=asyncio.Event)


def working(broker: Broker, *, concurrency: int = 1, lease: float = 30.0) -> Work:
    app = Conveyor("t", broker=broker)
    app.switches = {}
    work = Work(app)

    @app.worker(concurrency=concurrency, lease=lease)
    async def charge(order: Order) -> None:
        work.begun.append(order.number)
        await work.may_end.wait()
        work.done.append(order.number)

    return work


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not true():
            await asyncio.sleep(0.005)


async def info(broker: Broker, name: str = "t.charge") -> QueueInfo:
    return next(each for each in await broker.queues() if each.name == name)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@contextlib.asynccontextmanager
async def opened(broker: Broker) -> AsyncIterator[Broker]:
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


@contextlib.asynccontextmanager
async def operating(broker: Broker) -> AsyncIterator[Operator]:
    async with opened(broker), Operator(broker) as operator:
        yield operator


def paused(runner: Runner, name: str = "charge") -> bool:
    return runner.consumers[name].paused


async def test_a_pause_ends_fetching_finishes_what_runs_and_gives_back_the_rest_uncounted(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as broker, operating(MemoryBroker(store=store)) as operator:
        work = working(broker)
        async with work.app.running() as runner:
            for number in range(3):
                await work.app.publish(Order(number))
            await until(lambda: work.begun)
            await operator.turn("t.charge", paused=True)
            await until(lambda: paused(runner))
            work.may_end.set()
            await until(lambda: work.done)
            await until(lambda: not runner.consumers["charge"].held())
            now = await info(broker)
            assert (work.done, now.ready, now.in_flight, now.dead) == ([0], 2, 0, 0)
            counted = await broker.subscribe("t.charge", 2)
            assert [each.deliveries for each in await counted.fetch(2)] == [1, 1]


async def test_a_runner_that_ends_says_so_to_whoever_asked_it(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as broker, operating(MemoryBroker(store=store)) as operator:
        work, gone = working(broker), list[Status]()
        operator.on_gone = gone.append
        async with work.app.running():
            [known] = await operator.hear_all()
            assert not gone
        await until(lambda: not operator.statuses)
        assert gone == [known]


async def test_a_queue_that_goes_on_is_worked_off(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as broker, operating(MemoryBroker(store=store)) as operator:
        work = working(broker)
        work.may_end.set()
        async with work.app.running() as runner:
            await operator.turn("t.charge", paused=True)
            await until(lambda: paused(runner))
            for number in range(3):
                await work.app.publish(Order(number))
            await operator.hear_all()
            assert not work.begun
            await operator.turn("t.charge", paused=False)
            await until(lambda: work.done == [0, 1, 2])


async def test_an_answer_to_a_question_behind_a_pause_says_that_it_is_carried_out(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as broker, operating(MemoryBroker(store=store)) as operator:
        work = working(broker)
        async with work.app.running():
            await operator.turn("t.charge", paused=True)
            [status] = await operator.hear_all()
            assert [worker.paused for worker in status.workers] == [True]


async def test_a_pause_loses_no_lease_of_what_runs(tmp_path: Path) -> None:
    path = tmp_path / "t.queue"
    async with opened(SqliteBroker(path)) as broker, operating(SqliteBroker(path)) as operator:
        work = working(broker, lease=0.6)
        async with work.app.running() as runner:
            await work.app.publish(Order(1))
            await until(lambda: work.begun)
            await operator.turn("t.charge", paused=True)
            await until(lambda: paused(runner))
            await asyncio.sleep(1.5)  # longer than the lease, which has to be extended meanwhile
            work.may_end.set()
            await until(lambda: work.done)
            assert runner.consumers["charge"].metrics.lost_leases == 0
        assert (await info(broker)).ready == 0
    assert work.begun == [1]


async def test_other_queues_of_the_runner_go_on(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as broker, operating(MemoryBroker(store=store)) as operator:
        work = working(broker)
        shipped: list[int] = []

        @work.app.worker
        async def ship(order: Order) -> None:
            shipped.append(order.number)

        async with work.app.running() as runner:
            await operator.turn("t.charge", paused=True)
            await until(lambda: paused(runner))
            await work.app.publish(Order(1))
            await until(lambda: shipped)
            assert not work.begun


async def test_a_runner_that_starts_asks_the_others_what_is_paused(store: MemoryStore) -> None:
    async with (
        opened(MemoryBroker(store=store)) as one,
        opened(MemoryBroker(store=store)) as other,
        operating(MemoryBroker(store=store)) as operator,
        working(one).app.running() as first,
    ):
        await operator.turn("t.charge", paused=True)
        await until(lambda: paused(first))
        work = working(other)
        await work.app.connect()
        await work.app.publish(Order(1))
        async with work.app.running() as second:
            assert paused(second)
            assert not work.begun


async def test_a_process_tells_its_successor_what_is_paused(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as broker:
        work = working(broker)
        work.app.switches = {"t.charge": Switch(1, paused=True)}
        async with work.app.running() as runner:
            assert paused(runner)


async def test_what_one_of_two_runners_knows_when_they_start_at_once_the_other_learns(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as one, opened(MemoryBroker(store=store)) as other:
        knows, learns = working(one), working(other)
        knows.app.switches = {"t.charge": Switch(1, paused=True)}
        async with contextlib.AsyncExitStack() as stack:
            runners = await asyncio.gather(*(stack.enter_async_context(each.app.running()) for each in (learns, knows)))
            await until(lambda: all(map(paused, runners)))


async def test_a_runner_with_nobody_to_ask_does_not_wait(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conveyor.runtime.control.PEERS_SECONDS", 1e6)
    async with opened(MemoryBroker(store=store)) as broker:
        for _ in range(2):  # neither does the next one on this connection
            async with asyncio.timeout(PATIENCE_SECONDS), working(broker).app.running():
                pass


async def test_who_starts_is_informed_only_by_those_who_are_informed_themselves(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        silent, *brokers = [await stack.enter_async_context(opened(MemoryBroker(store=store))) for _ in range(4)]
        await silent.declare([Queue(name="conveyor.silent", topics=("conveyor.peers",), temporary=True)])
        first, second, knows = (Control(broker, "t") for broker in brokers)
        told: dict[str, float] = {}
        second.on_cancel = told.update
        for control in (first, second, knows):
            stack.push_async_callback(control.close)

        monkeypatch.setattr("conveyor.runtime.control.PEERS_SECONDS", 1e6)
        starting = []
        for number, control in enumerate((first, second), 2):
            starting.append(asyncio.create_task(control.start()))
            while sum("conveyor.peers" in each.topics for each in await silent.queues()) < number:
                await asyncio.sleep(0.005)
        # An order does not tell all that there is to know; behind these, what the first may have answered has come.
        for control, queue in ((first, "a"), (first, "b"), (second, "c")):
            await tell(silent, Turn({queue: Switch(1, paused=True)}))
            async with asyncio.timeout(PATIENCE_SECONDS):
                while queue not in control.paused:
                    await asyncio.sleep(0.005)
        assert not any(task.done() for task in starting)

        monkeypatch.setattr("conveyor.runtime.control.PEERS_SECONDS", 0.0)
        knows.switches = {"d": Switch(1, paused=True)}
        knows.wishes = lambda: ({"m": 1.0}, {})
        await knows.start()  # nobody who knows more has answered it
        monkeypatch.setattr("conveyor.runtime.control.PEERS_SECONDS", 1e6)
        for task in starting:
            task.cancel()
        await second.close()
        await second.start()
        assert "d" in second.paused
        assert told == {"m": 1.0}


async def test_who_pauses_by_a_clock_that_is_behind_is_obeyed(store: MemoryStore) -> None:
    async with (
        opened(MemoryBroker(store=store)) as broker,
        opened(MemoryBroker(store=store)) as far,
        working(broker).app.running() as runner,
    ):
        async with Operator(far, clock=lambda: time.time() + 3600) as ahead:
            await ahead.turn("t.charge", paused=True)
            await until(lambda: paused(runner))
        async with Operator(far) as behind:
            await behind.hear_all()
            await behind.turn("t.charge", paused=False)
            await until(lambda: not paused(runner))


async def test_a_runner_that_missed_an_order_learns_it_from_the_next_question(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as broker, operating(MemoryBroker(store=store)) as operator:
        await operator.turn("t.charge", paused=True)  # nobody hears it
        async with working(broker).app.running() as runner:
            assert not paused(runner)
            await operator.hear_all()
            await until(lambda: paused(runner))


async def test_a_paused_queue_is_no_stall_and_is_said_in_the_notes(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "STALL_SECONDS", 0.03)
    async with opened(MemoryBroker(store=store)) as broker, operating(MemoryBroker(store=store)) as operator:
        work = working(broker)
        looks = 0

        async def queues(of: MemoryBroker = broker) -> list[QueueInfo]:  # type: ignore[assignment]
            nonlocal looks
            looks += 1
            return await MemoryBroker.queues(of)

        monkeypatch.setattr(broker, "queues", queues)
        async with work.app.running() as runner:
            await operator.turn("t.charge", paused=True)
            await until(lambda: paused(runner))
            await work.app.publish(Order(1))
            looks = 0
            await until(lambda: looks > 20)
            health = runner.health()
            assert (health.ready, health.live) == (True, True)
            assert health.notes == ("worker charge: its queue t.charge is paused",)


async def test_the_status_tells_counts_health_and_failures_and_each_failure_once(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as broker, operating(MemoryBroker(store=store)) as operator:
        app = Conveyor("t", broker=broker)
        app.switches = {}

        @app.worker(retry=RetryPolicy(attempts=2, initial=0.0))
        async def charge(order: Order) -> None:
            if order.number == 13:
                raise ValueError("unlucky")

        async with app.running() as runner:
            await app.publish(Order(1))
            message = await app.publish(Order(13))
            metrics = runner.consumers["charge"].metrics
            await until(lambda: metrics.dead and metrics.succeeded)
            [status] = await operator.hear_all()
            [worker] = status.workers
            assert (status.app, status.health.ready, worker.name, worker.queue) == ("t", True, "charge", "t.charge")
            assert status.process == f"{socket.gethostname()}/{os.getpid()}"  # no supervisor has given it a number
            assert (worker.handled, worker.failed, worker.retried, worker.dead) == (1, 2, 1, 1)
            first, second = status.failures
            assert (first.message_id, first.attempt, first.dead) == (message.id, 1, False)
            assert (second.attempt, second.dead, second.error) == (2, True, "ValueError: unlucky")
            assert "in charge" in second.traceback
            heard: list[Status] = []
            operator.on_status = heard.append
            await operator.ask()
            await until(lambda: heard)
            assert [each.number for each in heard[0].failures] == [2]  # the last one is kept, and not sent again


class Counting(MemoryBroker):
    """Remembers what it published."""

    def __init__(self, *, store: MemoryStore) -> None:
        super().__init__(store=store)
        self.sent: list[str] = []

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        self.sent += [message.topic for message in messages]
        return await super().publish(messages, queue=queue)


async def test_nothing_is_sent_while_nobody_asks(store: MemoryStore) -> None:
    async with opened(Counting(store=store)) as broker:
        assert isinstance(broker, Counting)
        work = working(broker)
        work.may_end.set()
        async with work.app.running():
            assert [topic for topic in broker.sent if topic.startswith("conveyor.")] == ["conveyor.peers"]
            broker.sent.clear()
            for number in range(5):
                await work.app.publish(Order(number))
            await until(lambda: len(work.done) == 5)
            assert set(broker.sent) == {"order"}


async def test_who_asked_often_while_a_runner_stood_still_gets_one_answer(store: MemoryStore) -> None:
    async with opened(Counting(store=store)) as broker, opened(MemoryBroker(store=store)) as other:
        assert isinstance(broker, Counting)
        control = Control(broker, "t")
        control.status = lambda _: Status(
            runner=control.runner,
            app="t",
            process="1",
            host="h",
            pid=1,
            started=0.0,
            at=0.0,
            resident_bytes=0,
            health=Health(),
        )
        waits, goes_on = asyncio.Event(), asyncio.Event()

        async def stand_still() -> None:
            waits.set()
            await goes_on.wait()

        control.on_turn = stand_still
        await control.start()
        async with Operator(other) as operator:
            await operator.turn("t.charge", paused=True)
            await waits.wait()
            for _ in range(5):
                await operator.ask()
            broker.sent.clear()
            goes_on.set()
            await until(lambda: operator.statuses)
        assert len(broker.sent) == 1
        await control.close()


async def test_a_cancellation_reaches_every_runner_and_one_that_starts_later(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as broker, opened(MemoryBroker(store=store)) as other:
        one, two = Control(broker), Control(other)
        heard: dict[str, dict[str, float]] = {"one": {}, "two": {}}
        one.on_cancel, two.on_cancel = heard["one"].update, heard["two"].update
        assert not await cancel(broker, {"nobody-hears-it": 1.0})
        await one.start()
        assert await cancel(other, {"a": 1.0, "b": 2.0})
        await until(lambda: heard["one"] == {"a": 1.0, "b": 2.0})
        one.wishes = lambda: ({"a": 1.0}, {})
        await two.start()
        assert heard["two"] == {"a": 1.0}
        await two.close()
        await one.close()


async def test_what_cannot_be_read_is_left_out(store: MemoryStore) -> None:
    async with (
        opened(MemoryBroker(store=store)) as broker,
        operating(MemoryBroker(store=store)) as operator,
        working(broker).app.running() as runner,
    ):
        for body in (b"", b"{}", b'{"type": "of a later version"}', b'{"type": "turn", "switches": 7}'):
            await broker.publish([Message(id="x", topic=CONTROL, body=body)])
        await operator.turn("t.charge", paused=True)
        await until(lambda: paused(runner))


class Refusing(MemoryBroker):
    """Permits nobody a queue of Conveyor's own."""

    async def declare(self, queues: Sequence[Queue]) -> None:
        if any(internal(queue.name) for queue in queues):
            raise QueueConflict("403 ACCESS_REFUSED")
        await super().declare(queues)


async def test_a_runner_that_may_have_no_queue_for_orders_works_and_says_so(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(Refusing(store=store)) as broker:
        work = working(broker)
        work.may_end.set()
        async with work.app.running() as runner:
            await work.app.publish(Order(1))
            await until(lambda: work.done)
            health = runner.health()
            assert health.ready
            assert "hears no orders: QueueConflict: 403 ACCESS_REFUSED" in health.notes
    assert "403 ACCESS_REFUSED" in caplog.text


class Flaky(MemoryBroker):
    """Is away, for the control plane, as long as it is told so."""

    away = False

    async def declare(self, queues: Sequence[Queue]) -> None:
        if self.away and any(internal(queue.name) for queue in queues):
            raise BrokerUnavailable("gone fishing")
        await super().declare(queues)


async def test_a_runner_hears_orders_as_soon_as_the_broker_is_back(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conveyor.runtime.control.PEERS_SECONDS", 0.05)
    async with opened(Flaky(store=store)) as broker, operating(MemoryBroker(store=store)) as operator:
        assert isinstance(broker, Flaky)
        broker.away = True
        async with working(broker).app.running() as runner:
            assert runner.control is not None
            await until(lambda: runner.control and runner.control.problem)
            assert not await operator.turn("t.charge", paused=True)
            broker.away = False
            await until(lambda: not runner.health().notes)
            await operator.hear_all()
            await until(lambda: paused(runner))


async def test_a_pause_while_a_message_runs_alone_holds_afterwards(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as broker, operating(MemoryBroker(store=store)) as operator:
        work = working(broker)
        await work.app.connect()
        await work.app.publish(Order(1))
        for _ in range(2):  # two processes die of it
            async with opened(MemoryBroker(store=store)) as dying:
                subscription = await dying.subscribe("t.charge", 1)
                await subscription.fetch(1)
                await broker.reclaim(dying.owner, "killed")
        async with work.app.running() as runner:
            await until(lambda: work.begun)
            assert "runs alone" in runner.health().notes[0]
            await work.app.publish(Order(2))
            await operator.turn("t.charge", paused=True)
            await until(lambda: paused(runner))
            work.may_end.set()
            await until(lambda: work.done)
            await operator.hear_all()
            assert (work.begun, (await info(broker)).ready) == ([1], 1)
            await operator.turn("t.charge", paused=False)
            await until(lambda: work.done == [1, 2])


async def test_the_queues_of_the_control_plane_go_with_it(store: MemoryStore) -> None:
    async with opened(MemoryBroker(store=store)) as broker, opened(MemoryBroker(store=store)) as other:
        async with working(broker).app.running(), Operator(other):
            assert sum(internal(each.name) for each in await broker.queues()) == 2
        assert [each.name for each in await broker.queues()] == ["t.charge"]
