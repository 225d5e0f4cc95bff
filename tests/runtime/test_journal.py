"""The journal: what happens to messages is noted, shipped, kept and told, and work never waits for it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import pytest

from conveyor import Context, Conveyor, Reject, RetryPolicy, Transaction
from conveyor.broker import Broker, Delivery, Queue
from conveyor.brokers import from_url
from conveyor.brokers.memory import MemoryBroker
from conveyor.core.jobs import Job, JobFilter, Status
from conveyor.core.journal import Entry, Kind, in_order, stops
from conveyor.core.message import Message
from conveyor.core.questions import Answer, JobsOf, JourneyOf
from conveyor.core.settle import DONE, Dead
from conveyor.errors import (
    BrokerError,
    BrokerFull,
    BrokerUnavailable,
    ConfigurationError,
    JournalError,
    NoKeeper,
    PublishFailed,
)
from conveyor.runtime import batches
from conveyor.runtime import journal as journals
from conveyor.runtime import keeper as keepers
from conveyor.runtime.archive import Archive
from conveyor.runtime.ask import ANSWERS, Asker
from conveyor.runtime.batches import told_by
from conveyor.runtime.control import CONTROL, Control
from conveyor.runtime.journal import ASK, IN_MEMORY, Journal, journal_queue
from conveyor.runtime.keeper import Keeper
from conveyor.runtime.metrics import Metrics
from conveyor.testing.clock import TurnableClock
from conveyor.testing.harness import Harness

PATIENCE_SECONDS = 60.0
AT_ONCE = RetryPolicy(attempts=3, initial=0.01)


@dataclasses.dataclass(frozen=True)
class Placed:
    number: int


@dataclasses.dataclass(frozen=True)
class Charged:
    number: int


def shop(broker: str | Broker, journal: bool | Path = True) -> Conveyor:
    """An application whose first hop fails once, and for ever where the number is below 0."""
    app = Conveyor("shop", broker=broker, journal=journal)

    @app.worker(retry=AT_ONCE)
    async def charge(order: Placed, context: Context) -> Charged:
        if order.number < 0 or context.attempt == 1:
            raise RuntimeError(f"no money for {order.number}")
        return Charged(order.number)

    @app.worker
    async def ship(_: Charged) -> None:
        pass

    @app.task
    async def double(number: int) -> int:
        return 2 * number

    return app


async def ended(asker: Asker, *ids: str) -> dict[str, Job]:
    """Wait until all of these have ended."""
    known: dict[str, Job] = {}
    async with asyncio.timeout(PATIENCE_SECONDS):
        while waiting := [id for id in ids if id not in known or not known[id].status.ended]:
            known |= await asker.wait(waiting, timeout_seconds=5.0)
    return known


async def found(asker: Asker, id: str, number: int) -> Answer:
    """The journey, when so many of its messages have ended."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            answer = await asker.journey(id)
            jobs = await asker.jobs(JobFilter(ids=tuple({entry.message_id for entry in answer.entries})))
            if sum(job.status.ended for job in jobs) >= number:
                return answer
            await asyncio.sleep(0.05)


@pytest.fixture(params=["memory", "sqlite", "redis", "rabbitmq"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every broker there is."""
    if request.param in ("redis", "rabbitmq"):
        address: str = request.getfixturevalue(request.param).url()
        return address
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'shop.queue'}"


async def test_on_every_broker_the_whole_journey_is_told_with_every_attempt_and_the_result_of_a_job(
    url: str, tmp_path: Path
) -> None:
    app = shop(url, tmp_path / "shop.journal")
    async with app.running():
        asker = (await app.connect()).asker
        good = await app.publish(Placed(1))
        bad = await app.publish(Placed(-1))
        job = await app.publish({"number": 21}, topic="shop.double")
        known = await ended(asker, bad.id, job.id)
        assert (known[job.id].status, known[job.id].result) == (Status.DONE, "42")
        assert (known[bad.id].status, known[bad.id].attempts) == (Status.DEAD, 3)
        assert known[bad.id].error == "RuntimeError: no money for -1"

        (stop,) = stops((await found(asker, good.id, 2)).entries)
        assert [entry.kind for entry in stop.entries] == [Kind.PUBLISHED, Kind.RETRIED, Kind.SUCCEEDED]
        assert [entry.error for entry in stop.entries] == ["", "RuntimeError: no money for 1", ""]
        (child,) = stop.leads_to
        assert (child.topic, [entry.kind for entry in child.entries]) == ("charged", [Kind.PUBLISHED, Kind.SUCCEEDED])
        assert child.entries[0].worker == "shop.charge"
        assert (await asker.journey(child.message_id)).entries == (await asker.journey(good.id)).entries

        assert {j.status for j in await asker.jobs(JobFilter(worker="charge"))} == {Status.DONE, Status.DEAD}

    # What it knew is there when everything has ended.
    archive = Archive(tmp_path / "shop.journal").open(create=False)
    assert {job.status for job in archive.jobs(JobFilter(), 100).jobs} == {Status.DONE, Status.DEAD}
    assert len(archive.journey(good.id).entries) == 5
    archive.close()


async def test_on_every_broker_whoever_ships_can_tell_whether_anybody_keeps_the_journal(
    url: str, tmp_path: Path
) -> None:
    app = shop(url, tmp_path / "shop.journal")
    for keeper in (True, False):
        async with app.running(keeper=keeper):
            journal = (await app.connect()).journal
            assert journal is not None
            assert await journal._is_kept() is keeper


async def test_where_it_is_off_there_is_no_queue_and_nobody_to_ask(tmp_path: Path) -> None:
    app = shop(f"sqlite:///{tmp_path / 'shop.queue'}", journal=False)
    async with app.running():
        connection = await app.connect()
        assert connection.journal is None
        assert not [queue.name for queue in await app.broker.queues() if "journal" in queue.name]
        with pytest.raises(NoKeeper, match="nobody keeps a journal"):
            await connection.asker.jobs()
    assert not (tmp_path / "shop.queue.journal").exists()
    async with app:
        with pytest.raises(ConfigurationError, match=r"journal=True\) or set CONVEYOR_JOURNAL"):
            app.keeper(app.broker)


@pytest.mark.parametrize(
    ("said", "on"), [("1", True), ("on", True), ("0", False), ("off", False), ("x.journal", True), (None, False)]
)
def test_the_environment_turns_it_on_and_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, on: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if said is not None:
        monkeypatch.setenv("CONVEYOR_JOURNAL", said)
    app = Conveyor("shop", broker="redis://localhost")
    place = app.journal_place(app.new_broker())
    assert place == (None if not on else Path(said or "") if said == "x.journal" else Path("shop.journal"))
    assert Conveyor("shop", journal=False).journal_place(app.new_broker()) is None  # the code has the last word


@pytest.mark.parametrize(
    ("code", "said", "place"),
    [
        (True, "/x/elsewhere.journal", "/x/elsewhere.journal"),
        (True, "0", "shop.journal"),
        (True, "1", "shop.journal"),
        (True, None, "shop.journal"),
        ("on", "./x.journal", "x.journal"),
        ("y.journal", "/x/elsewhere.journal", "y.journal"),
        (Path("y"), "/x/elsewhere.journal", "y"),
        (False, "/x/elsewhere.journal", None),
    ],
)
def test_the_code_says_whether_and_the_environment_may_say_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: bool | str | Path, said: str | None, place: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if said is not None:
        monkeypatch.setenv("CONVEYOR_JOURNAL", said)
    app = Conveyor("shop", broker="redis://localhost", journal=code)
    assert app.journal_place(app.new_broker()) == (None if place is None else Path(place))


def test_where_an_app_is_tested_its_journal_is_in_memory_whatever_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CONVEYOR_JOURNAL", str(tmp_path / "real.journal"))
    app = Conveyor("shop", broker="redis://localhost", journal=True)
    with app.replaced(broker=MemoryBroker(), clock=lambda: 0.0):
        assert app.journal_place(MemoryBroker()) == IN_MEMORY


def test_what_is_neither_yes_nor_no_nor_a_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = Conveyor("shop", broker="memory://", journal="ture")
    with pytest.raises(ConfigurationError, match=r"Conveyor\(journal=…\): journal cannot be 'ture': say yes or no"):
        wrong.journal_place(wrong.new_broker())
    monkeypatch.setenv("CONVEYOR_JOURNAL", "ture")
    for journal in (True, None):
        with pytest.raises(ConfigurationError, match=r"CONVEYOR_JOURNAL: .*'ture': .* such as \./shop\.journal"):
            Conveyor("shop", broker="memory://", journal=journal).journal_place(MemoryBroker())
    monkeypatch.setenv("CONVEYOR_JOURNAL", IN_MEMORY)
    assert Conveyor("shop", broker="redis://localhost").journal_place(MemoryBroker()) == IN_MEMORY


def test_it_lies_beside_a_queue_file_and_in_memory_where_the_messages_are(tmp_path: Path) -> None:
    for url, place in {
        f"sqlite:///{tmp_path / 'x.queue'}": tmp_path / "x.queue.journal",
        "memory://": IN_MEMORY,
        "redis://localhost": Path("shop.journal"),
    }.items():
        app = Conveyor("shop", broker=url, journal=True)
        assert app.journal_place(app.new_broker()) == place
    inside = Conveyor("shop", broker=MemoryBroker(), journal=True)
    assert inside.journal_place(MemoryBroker()) == IN_MEMORY


async def test_what_a_program_publishes_is_in_the_journal_of_those_who_handle_it_later(tmp_path: Path) -> None:
    app = shop(f"sqlite:///{tmp_path / 'shop.queue'}")
    async with app:
        message = await app.publish(Placed(1))
    async with app.running():
        asker = (await app.connect()).asker
        answer = await found(asker, message.id, 2)
    assert answer.entries[0].kind is Kind.PUBLISHED


async def test_what_runs_is_told_while_it_runs_with_its_progress() -> None:
    app = Conveyor("shop", broker="memory://", journal=True)
    go_on = asyncio.Event()

    @app.task
    async def slow(context: Context) -> None:
        context.progress(3, 10, "halfway")
        await go_on.wait()

    async with app.running():
        asker = (await app.connect()).asker
        message = await app.publish({}, topic="shop.slow")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                (job,) = await asker.jobs(JobFilter(ids=(message.id,))) or [Job(id="", topic="")]
                if job.status is Status.RUNNING and job.done is not None:
                    break
        assert (job.done, job.total, job.note, job.worker) == (3.0, 10.0, "halfway", "shop.slow")
        assert job.started is not None
        assert (await asker.wait([message.id], timeout_seconds=0.1))[message.id].status is Status.RUNNING
        go_on.set()
        assert (await ended(asker, message.id))[message.id].status is Status.DONE


async def test_a_rejected_message_a_batch_and_a_handler_in_a_thread_are_told_too() -> None:
    app = Conveyor("shop", broker="memory://", journal=True)

    @app.worker(name="refuse", topic="a")
    async def refuse(_: dict[str, int]) -> None:
        raise Reject("not mine")

    @app.worker(name="many", topic="b", batch=10)
    async def many(_: list[dict[str, int]]) -> None: ...

    @app.worker(name="aside", topic="c")
    def aside(_: dict[str, int]) -> None: ...

    async with app.running():
        sent = [await app.publish({"n": n}, topic=topic) for n, topic in enumerate("abbc")]
        known = await ended((await app.connect()).asker, *(message.id for message in sent))
    first, *others = (known[message.id] for message in sent)
    assert (first.status, first.reason, first.error) == (Status.FAILED, "rejected", "Reject: not mine")
    assert {job.status for job in others} == {Status.DONE}


async def test_what_is_published_at_once_and_what_the_ledger_sends_is_told_with_its_cause(tmp_path: Path) -> None:
    app = Conveyor(
        "shop", broker="memory://", journal=True, database=f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}", migrate=True
    )

    @app.worker
    async def first(_: Placed, context: Context, tx: Transaction) -> None:
        await context.publish_now({}, topic="now")
        await tx.publish(Charged(1))

    @app.worker
    async def second(_: Charged) -> None: ...

    async with app.running():
        sent = await app.publish(Placed(1))
        asker = (await app.connect()).asker
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                (stop,) = stops((await found(asker, sent.id, 2)).entries)
                if len(stop.leads_to) == 2:
                    break
    assert {each.topic: each.entries[0].kind for each in stop.leads_to} == {
        "now": Kind.PUBLISHED,
        "charged": Kind.PUBLISHED,
    }


async def test_what_no_queue_receives_is_on_the_journey_and_no_job_that_waits() -> None:
    app = Conveyor("shop", broker="memory://", journal=True)

    @app.worker(name="first", topic="a")
    async def first(_: dict[str, int], context: Context) -> None:
        await context.publish_now({}, topic="now")
        context.publish({}, topic="then")

    async with app.running():
        sent = await app.publish({}, topic="a")
        alone = await app.publish({}, topic="nobody")
        asker = (await app.connect()).asker
        async with asyncio.timeout(PATIENCE_SECONDS):
            answer = await found(asker, sent.id, 1)
            while len({entry.topic for entry in answer.entries}) < 3:
                answer = await asker.journey(sent.id)
            while not (await asker.journey(alone.id)).entries:
                await asyncio.sleep(0.02)
        assert {e.topic: e.reason for e in answer.entries if e.kind is Kind.PUBLISHED} == {
            "a": "",
            "now": "unrouted",
            "then": "unrouted",
        }
        assert {job.id for job in await asker.jobs()} == {sent.id}


async def test_what_the_ledger_knew_already_is_told_as_a_duplicate(tmp_path: Path) -> None:
    app = Conveyor(
        "shop", broker="memory://", journal=True, database=f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}", migrate=True
    )

    @app.worker
    async def once(_: Placed, tx: Transaction) -> None:
        await tx.publish(Charged(1))

    async with app.running():
        asker = (await app.connect()).asker
        for _ in range(2):
            sent = await app.publish(Placed(1), id="the-same")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                kinds = [entry.kind for entry in (await found(asker, sent.id, 1)).entries]
                if Kind.DUPLICATE in kinds:
                    break
    assert kinds.count(Kind.SUCCEEDED) == 1


async def test_under_the_harness_it_is_kept_in_memory_and_is_not_among_what_was_published(tmp_path: Path) -> None:
    app = shop("memory://", journal=tmp_path / "shop.journal")
    async with Harness(app) as harness:
        sent = await harness.publish(Placed(1))
        assert [message.topic for message in harness.messages()] == ["placed", "charged"]
        answer = await found((await app.connect()).asker, sent.id, 2)
        assert len(answer.entries) == 5
    assert not (tmp_path / "shop.journal").exists()


# --- shipping ---------------------------------------------------------------------------------------------------------


class Away(MemoryBroker):
    """A broker that takes nothing while it is away."""

    why: BrokerError | None = None

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        if self.why is not None and queue is not None and queue.startswith("conveyor.journal"):
            raise self.why
        return await super().publish(messages, queue=queue)


@asynccontextmanager
async def opened(*, make: Callable[[], MemoryBroker] = MemoryBroker) -> AsyncIterator[MemoryBroker]:
    broker = make()
    await broker.open()
    await broker.declare([journal_queue("shop")])
    try:
        yield broker
    finally:
        await broker.close()


def message(id: str) -> Message:
    return Message(id=id, topic="placed", body=b"", created=1.0)


async def left(broker: Broker) -> int:
    """Batches that wait for a keeper."""
    return next(info.ready for info in await broker.queues() if info.name == journal_queue("shop").name)


@pytest.mark.parametrize(
    "outage",
    [BrokerUnavailable("away"), BrokerFull("no room"), PublishFailed({"other": "no"}, {"m": "who knows?"})],
    ids=["unavailable", "full", "unknown"],
)
async def test_an_outage_of_the_broker_loses_nothing_that_there_is_room_for(outage: BrokerError) -> None:
    async with opened(make=Away) as broker:
        assert isinstance(broker, Away)
        metrics = Metrics("1")
        journal = Journal("shop", broker, metrics, TurnableClock())
        broker.why = outage
        for number in range(3):
            journal.published(message(str(number)))
            await journal.flush()
        assert await left(broker) == 0
        broker.why = None
        await journal.close()
        assert await left(broker) == 2  # the first one alone, which was under way; then all others
        assert metrics.journal_dropped == 0


async def test_what_there_is_no_room_for_is_dropped_counted_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journals, "CAPACITY", 5)
    async with opened() as broker:
        metrics = Metrics("1")
        journal = Journal("shop", broker, metrics, TurnableClock())
        for number in range(11):
            journal.published(message(str(number)))
        assert metrics.journal_dropped == 6
        await journal.close()
        assert metrics.snapshot().journal_dropped == 6
    assert [record.message for record in caplog.records if "dropped" in record.message].__len__() == 1


async def test_a_broker_that_stays_away_costs_the_end_no_time_and_the_rest_is_counted() -> None:
    async with opened(make=Away) as broker:
        assert isinstance(broker, Away)
        metrics = Metrics("1")
        journal = Journal("shop", broker, metrics, TurnableClock())
        broker.why = BrokerUnavailable("away")
        journal.published(message("a"))
        await journal.flush()
        journal.published(message("b"))
        await journal.close()
        assert metrics.journal_dropped == 2


async def test_work_goes_on_while_the_journal_cannot_be_shipped() -> None:
    broker = Away()
    await broker.open()
    app = shop(broker)
    handled = asyncio.Event()

    @app.worker(name="see", topic="seen")
    async def see(_: dict[str, int]) -> None:
        handled.set()

    broker.why = BrokerError("refused for good")
    async with app.running():
        await app.publish({}, topic="seen")
        async with asyncio.timeout(PATIENCE_SECONDS):
            await handled.wait()
    assert app.metrics.journal_dropped > 0
    await broker.close()


async def test_a_queue_that_somebody_removed_is_there_again_and_nothing_is_lost() -> None:
    async with opened() as broker:
        metrics = Metrics("1")
        journal = Journal("shop", broker, metrics, TurnableClock())
        await broker.remove(journal_queue("shop").name)
        journal.published(message("a"))
        await journal.flush()
        assert await left(broker) == 1
        assert metrics.journal_dropped == 0


async def test_what_the_broker_refuses_for_good_is_dropped_alone_and_counted() -> None:
    class Picky(MemoryBroker):
        async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
            first, *others = messages
            await super().publish(others, queue=queue)
            raise PublishFailed({first.id: "too large"})

    async with opened(make=Picky) as broker:
        metrics = Metrics("1")
        journal = Journal("shop", broker, metrics, TurnableClock())
        for number in range(2):
            journal.note(Entry(Kind.SUCCEEDED, 1.0, str(number), "t", result="x" * batches.LARGEST_BATCH_BYTES))
        await journal.flush()
        assert metrics.journal_dropped == 1
        journal.published(message("later"))
        await journal.flush()
        assert metrics.journal_dropped == 2


async def test_a_batch_of_which_nobody_knows_whether_it_arrived_is_kept_once(kept: Kept) -> None:
    class Unsure(MemoryBroker):
        is_sure = False

        async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
            unrouted = await super().publish(messages, queue=queue)
            if queue is not None and not self.is_sure:
                self.is_sure = True
                raise PublishFailed({}, {message.id: "the connection was lost" for message in messages})
            return unrouted

    async with opened(make=Unsure) as broker:
        journal = Journal("shop", broker, Metrics("1"), kept.clock)
        journal.published(message("m"))
        await journal.flush()
        await journal.flush()
        assert await left(broker) == 2
        archive = Archive(kept.path, clock=kept.clock)
        async with Keeper("shop", broker, archive, kept.clock):
            pass
    archive = Archive(kept.path).open(create=False)
    assert len(archive.of(["m"])) == 1
    archive.close()


async def test_ends_are_told_at_once_while_somebody_keeps_them_and_else_in_larger_batches(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "HURRIES", 3)
    monkeypatch.setattr(journals, "FLUSH_SECONDS", 3_600.0)
    shipped: asyncio.Queue[int] = asyncio.Queue()
    publish, looked = MemoryBroker.publish, asyncio.Event()

    async def seen(self: MemoryBroker, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        unrouted = await publish(self, messages, queue=queue)
        if messages[0].topic == journals.keeper_topic("shop"):
            looked.set()
        elif queue is not None:
            shipped.put_nowait(len(messages))
        return unrouted

    def end(id: str) -> None:
        kept.journal.note(Entry(Kind.SUCCEEDED, 1.0, id, "t", "shop.charge"), soon=True)

    monkeypatch.setattr(MemoryBroker, "publish", seen)
    kept.journal.start()
    async with asyncio.timeout(PATIENCE_SECONDS):
        async with kept.keeper():
            for number in range(7):
                end(f"kept {number}")
                await shipped.get()
            await looked.wait()
        looked.clear()
        for number in range(3):
            end(f"nobody's {number}")
            if number < 2:  # at the latest then it has looked, and knows that nobody is there
                await shipped.get()
        await looked.wait()
        while not shipped.empty():
            shipped.get_nowait()
        end("waits")
        end("waits with it")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(shipped.get(), 20 * journals.SOON_SECONDS)
        await kept.journal.close()
    assert shipped.get_nowait() == 1


async def test_large_results_travel_in_several_batches() -> None:
    async with opened() as broker:
        journal = Journal("shop", broker, Metrics("1"), TurnableClock())
        for number in range(6):
            journal.note(Entry(Kind.SUCCEEDED, 1.0, str(number), "t", result="x" * 100_000))
        await journal.flush()
        assert await left(broker) == 2


async def test_the_queue_is_bounded_and_drops_the_oldest() -> None:
    assert journal_queue("shop").max_length == journals.QUEUE_LENGTH


# --- keeping ----------------------------------------------------------------------------------------------------------


class Kept:
    """A journal, its keeper, and somebody who asks."""

    def __init__(self, broker: Broker, path: Path, clock: TurnableClock) -> None:
        self.broker = broker
        self.path = path
        self.clock = clock
        self.journal = Journal("shop", broker, Metrics("1"), clock)
        self.asker = Asker(broker, clock)

    def keeper(self) -> Keeper:
        return Keeper("shop", self.broker, Archive(self.path, clock=self.clock), self.clock)

    async def until_known(self, id: str) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (await self.asker.journey(id)).entries:
                await asyncio.sleep(0.02)


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(opened())
        kept = Kept(broker, tmp_path / "shop.journal", TurnableClock())
        stack.push_async_callback(kept.asker.close)
        yield kept


async def test_a_batch_that_makes_no_sense_is_dropped_with_a_word_and_holds_up_nothing(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    name = journal_queue("shop").name
    await kept.broker.publish([Message(id="1", topic=name, body=b"\xff nonsense")], queue=name)
    await kept.broker.publish([Message(id="2", topic=name, body=b"\x93\x01\x02\x03")], queue=name)
    kept.journal.published(message("m"))
    await kept.journal.flush()
    async with kept.keeper():
        await kept.until_known("m")
    assert await left(kept.broker) == 0
    assert len([record for record in caplog.records if "sense" in record.message]) == 2


async def test_an_entry_that_cannot_be_encoded_or_read_is_lost_alone(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics("1")
    kept.journal = Journal("shop", kept.broker, metrics, kept.clock)
    kept.journal.published(message("before"))
    for strange in (2**70, Decimal(1), object()):
        kept.journal.note(Entry(Kind.PROGRESSED, 2.0, "strange", "t", "w", done=strange))  # type: ignore[arg-type]
    kept.journal.note(Entry(Kind.PROGRESSED, 2.0, "strange", "t", "w", done=True))
    kept.journal.note(Entry(Kind.RETRIED, 2.0, "half", "t", "w", error="half a character: \ud800"))
    kept.journal.published(message("behind"))
    await kept.journal.flush()
    async with kept.keeper():
        await kept.until_known("behind")
        assert {job.id for job in await kept.asker.jobs()} == {"before", "half", "behind"}
    assert metrics.journal_dropped == 2  # the Decimal is a text there
    assert "2 entries of the journal dropped: they cannot be encoded" in caplog.text
    assert "left 2 parts of a batch out of the journal" in caplog.text


NESTED = b"\x92\x91" + b"\x91" * 100_000 + b"\xc0\x90"


STRANGE: dict[str, tuple[list[Any], list[Any]]] = {
    "count": ([["succeeded", 2.0, "strange", "t", "w", "p", "q", 2**63]], []),
    "no time": ([["cancelling", float("nan"), "strange", "t"]], []),
    "due never": ([["published", 2.0, "strange", "t", "", "", "", 0, 0, None, None, None, float("inf")]], []),
    "times": ([], [["t", "w", "p", "q", 1, 0, [["strange", float("nan"), None, None, None]] * 5]]),
    "counts": ([], [["t", "w", "p", "q", 2**63, 0, [["strange", 1.0, None, None, None]] * 5]]),
}


@pytest.mark.parametrize(
    "garbage",
    [NESTED, b"\xc1", *map(msgspec.msgpack.encode, STRANGE.values())],
    ids=["nested", "nothing", *STRANGE],
)
async def test_what_nobody_can_keep_takes_no_other_batch_with_it(kept: Kept, garbage: bytes) -> None:
    queue = journal_queue("shop")
    await kept.broker.declare([queue])
    good = msgspec.msgpack.encode(([Entry(Kind.DEAD, 1.0, "good", "t", "w")], []))
    bodies = [good, garbage, good]
    messages = [Message(f"batch {n}", queue.name, body) for n, body in enumerate(bodies)]
    await kept.broker.publish(messages, queue=queue.name)
    async with kept.keeper():
        await kept.until_known("good")
        assert {job.id for job in await kept.asker.jobs()} == {"good"}
        while any(info.ready + info.in_flight for info in await kept.broker.queues() if info.name == queue.name):
            await asyncio.sleep(0.01)
    async with kept.keeper():  # it starts again
        assert len((await kept.asker.journey("good")).entries) == 1


def test_of_a_batch_of_another_version_what_can_be_read_is_kept() -> None:
    understood = Entry(Kind.DEAD, 1.0, "m", "t", "w")
    strange = ("t", "w", "p", "q", [("id", 1.0, None, 1, 0, None, None)])
    assert told_by(msgspec.msgpack.encode(([understood], [strange]))) == [understood]


async def test_successes_that_share_a_batch_are_kept_each_with_what_is_its_own(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "LARGEST_BATCH", 4)
    told = []
    for number in range(30):
        worker, topic = f"shop.worker{number % 3}", f"topic{number % 2}"
        made = Message(id=str(number), topic=topic, body=b"{}", correlation_id=f"c{number}", causation_id=f"a{number}")
        kept.journal.settled(worker, Delivery(made, f"{worker}.queue", number, number + 3, number), DONE, monotonic())
        told.append((f"c{number}", worker, topic, f"{worker}.queue", number + 1, 2, f"a{number}"))
    await kept.journal.flush()
    assert await left(kept.broker) == 8  # six full ones, and what is left of them
    async with kept.keeper():
        await kept.until_known("29")
        found = [(await kept.asker.journey(f"c{number}")).entries for number in range(30)]
    assert all(entry.kind is Kind.SUCCEEDED and entry.started == pytest.approx(entry.at) for [entry] in found)
    assert told == [
        (e.correlation_id, e.worker, e.topic, e.queue, e.attempt, e.crashes, e.causation_id) for [e] in found
    ]


async def test_an_attempt_is_told_with_when_it_began_and_ended_however_the_clock_was_turned_before(kept: Kept) -> None:
    now = monotonic()
    for id, verdict in ("good", DONE), ("bad", Dead("rejected", "no")):
        kept.clock.turn(3600.0)
        await kept.journal.flush()  # looks at the clock
        kept.journal.settled("shop.w", Delivery(message(id), "shop.w", id, 1, 0), verdict, now - 7.0, now - 2.0)
    await kept.journal.flush()
    async with kept.keeper():
        for id, hours in ("good", 1), ("bad", 2):
            await kept.until_known(id)
            [entry] = (await kept.asker.journey(id)).entries
            assert entry.started is not None
            assert entry.at - entry.started == pytest.approx(5.0)
            assert entry.at == pytest.approx(kept.clock() - (2 - hours) * 3600.0 - 2.0, abs=600.0)


async def test_a_keeper_does_not_wait_for_more_while_there_is_more(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepers, "LINGER_SECONDS", 3600.0)
    for number in range(2 * keepers.FETCH + 1):
        kept.journal.published(message(str(number)))
        await kept.journal.flush()
    async with kept.keeper():
        await kept.until_known(str(2 * keepers.FETCH))
        assert len(await kept.asker.jobs(limit=1000)) == 2 * keepers.FETCH + 1


async def test_attempts_are_told_by_the_right_clock_also_while_the_broker_is_away(kept: Kept) -> None:
    await kept.broker.close()
    kept.journal.published(message("early"))
    await kept.journal.flush()  # in vain
    kept.clock.turn(3600.0)
    await kept.journal.flush()
    kept.journal.settled("shop.w", Delivery(message("late"), "shop.w", "late", 1, 0), DONE, monotonic(), monotonic())
    await kept.broker.open()
    await kept.journal.flush()
    await kept.journal.flush()
    async with kept.keeper():
        await kept.until_known("late")
        [entry] = (await kept.asker.journey("late")).entries
        assert entry.at == pytest.approx(kept.clock(), abs=600.0)


async def test_a_success_that_cannot_be_encoded_takes_none_of_its_batch_along(kept: Kept) -> None:
    for id in ("before", "half \ud800", "behind"):
        kept.journal.settled("shop.w", Delivery(message(id), "shop.w", id, 1, 0), DONE, monotonic())
    await kept.journal.flush()
    async with kept.keeper():
        await kept.until_known("behind")
        assert {job.id for job in await kept.asker.jobs()} == {"before", "half ?", "behind"}


async def test_what_no_store_can_keep_as_it_is_is_kept_all_the_same(kept: Kept) -> None:
    kept.journal.published(message("m"))
    kept.journal.note(
        Entry(Kind.PROGRESSED, 2.0, "m", "t", "w", done=1.0, note="half a character: \ud800, and none: \0")
    )
    await kept.journal.flush()
    async with kept.keeper():
        await kept.until_known("m")
        assert (await kept.asker.journey("m")).entries[1].note == "half a character: ?, and none: \0"


async def test_a_batch_that_its_keepers_die_of_is_dropped(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepers, "SPOILT_DELIVERIES", 0)
    kept.journal.published(message("m"))
    await kept.journal.flush()
    async with kept.keeper():
        pass
    assert await left(kept.broker) == 0
    archive = Archive(kept.path).open(create=False)
    assert archive.of(["m"]) == []
    archive.close()


async def test_an_archive_that_cannot_be_written_is_waited_for_and_loses_nothing(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(keepers, "AGAIN_SECONDS", 0.01)
    failed = asyncio.Event()
    loop = asyncio.get_running_loop()
    write, full = Archive.write, True

    def fails(archive: Archive, batches: Sequence[tuple[str, Sequence[Entry]]]) -> None:
        if full:
            loop.call_soon_threadsafe(failed.set)
            raise JournalError("the disk is full")
        write(archive, batches)

    monkeypatch.setattr(Archive, "write", fails)
    async with kept.keeper() as keeper:
        kept.journal.published(message("m"))
        await kept.journal.flush()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await failed.wait()
            while keeper.health().ready:
                await asyncio.sleep(0)
        assert keeper.health().unready == ("journal: the disk is full",)
        assert (
            await kept.asker.journey("m")
        ).behind == "the disk is full"  # whoever asks now is told what he does not see
        await kept.asker.wait(["m"], timeout_seconds=0.0)
        await kept.asker.jobs()
        full = False
        await kept.until_known("m")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not keeper.health().ready:
                await asyncio.sleep(0.01)
    said = [record.message for record in caplog.records if record.name == "conveyor.keeper"]
    assert said.count("the disk is full") == 1
    told = [record.message for record in caplog.records if record.name == "conveyor.ask"]
    assert told == ["jobs may have ended without the journal knowing: the disk is full"]
    assert "the journal is kept again" in said


async def test_what_waits_for_an_end_is_answered_by_whichever_keeper_is_there_by_then(kept: Kept) -> None:
    waiting = asyncio.create_task(kept.asker.wait(["m"], timeout_seconds=PATIENCE_SECONDS))
    await asyncio.sleep(0)
    kept.journal.note(Entry(Kind.SUCCEEDED, 1.0, "m", "t", "shop.charge", result="7"))
    await kept.journal.flush()
    async with kept.keeper(), asyncio.timeout(PATIENCE_SECONDS):
        assert (await waiting)["m"].result == "7"


async def test_a_wait_ends_when_the_first_of_several_has_ended(kept: Kept) -> None:
    async with kept.keeper():
        kept.journal.note(Entry(Kind.STARTED, 1.0, "slow", "t", "shop.charge", started=1.0))
        await kept.journal.flush()
        await kept.until_known("slow")
        waiting = asyncio.create_task(kept.asker.wait(["slow", "quick"], timeout_seconds=PATIENCE_SECONDS))
        async with asyncio.timeout(PATIENCE_SECONDS):
            kept.journal.note(Entry(Kind.DEAD, 2.0, "quick", "t", "shop.charge", reason="exhausted"))
            await kept.journal.flush()
            known = await waiting
    assert known["quick"].status is Status.DEAD


async def test_an_end_is_told_also_where_there_is_no_room_for_its_result_and_its_traceback(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "CAPACITY_BYTES", 100)
    for id in ("heavy", "too heavy"):
        kept.journal.note(Entry(Kind.SUCCEEDED, 1.0, id, "t", "shop.charge", result="x" * 60))
    kept.journal.note(Entry(Kind.DEAD, 1.0, "dead", "t", "shop.charge", error="boom", traceback="y" * 60))
    await kept.journal.flush()
    async with kept.keeper():
        known = await ended(kept.asker, "heavy", "too heavy", "dead")
    heavy, too_heavy, dead = known["heavy"], known["too heavy"], known["dead"]
    assert (heavy.result, heavy.unkept) == ("x" * 60, "")
    assert (too_heavy.status, too_heavy.result, too_heavy.unkept) == (Status.DONE, None, journals.NO_ROOM)
    assert (dead.status, dead.error, dead.traceback, dead.unkept) == (Status.DEAD, "boom", "", "")


async def test_of_a_message_that_two_workers_have_the_end_that_came_is_told_whatever_the_other_does(kept: Kept) -> None:
    async with kept.keeper():
        kept.journal.note(Entry(Kind.STARTED, 1.0, "m", "t", "shop.slow", started=1.0))
        kept.journal.note(Entry(Kind.SUCCEEDED, 2.0, "m", "t", "shop.quick", started=1.5, result="7"))
        kept.journal.note(Entry(Kind.STARTED, 1.0, "n", "t", "shop.quick", started=1.0))
        kept.journal.note(Entry(Kind.SUCCEEDED, 2.0, "n", "t", "shop.slow", started=0.5, result="8"))
        await kept.journal.flush()
        known = await ended(kept.asker, "m", "n")
    assert (known["m"].result, known["n"].result) == ("7", "8")


async def test_two_workers_of_one_message_have_each_its_own_progress(kept: Kept) -> None:
    delivery = Delivery(queue="q", receipt="r", message=message("m"), deliveries=1, attempts=0)
    async with kept.keeper():
        kept.journal.progressed("shop.charge", delivery, 1.0)
        kept.journal.progressed("shop.mail", delivery, 2.0)
        kept.journal.progressed("shop.mail", delivery, 3.0)
        await kept.journal.flush()
        await kept.until_known("m")
        assert {job.worker: job.done for job in await kept.asker.jobs()} == {"shop.charge": 1.0, "shop.mail": 3.0}


async def test_of_many_large_results_only_as_many_are_read_as_an_answer_holds(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "RESULTS_AT_ONCE", 10)
    ids = [f"m{number}" for number in range(100)]
    for id in ids:
        kept.journal.note(Entry(Kind.SUCCEEDED, 1.0, id, "t", "shop.charge", result="x" * 150_000))
    await kept.journal.flush()
    with_results = 0
    of = Archive.of

    def counted(self: Archive, ids: Collection[str], *, results: bool = True) -> list[Entry]:
        nonlocal with_results
        with_results += len(ids) * results
        return of(self, ids, results=results)

    async with kept.keeper():
        await kept.until_known(ids[-1])
        monkeypatch.setattr(Archive, "of", counted)
        known = await kept.asker.wait(ids, timeout_seconds=PATIENCE_SECONDS)
        assert 0 < len(known) <= with_results <= 20
        assert all(job.result for job in known.values())
        await ended(kept.asker, *ids)


async def test_a_wait_that_cannot_be_answered_from_the_archive_is_over(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(self: Archive, ids: object, *, results: bool = True) -> list[Entry]:
        raise JournalError("the disk is broken")

    async with kept.keeper() as keeper:
        monkeypatch.setattr(Archive, "of", unreadable)
        with pytest.raises(NoKeeper):
            await kept.asker.wait(["m"], timeout_seconds=0.2)
        assert keeper._waits == {}


async def test_runners_are_told_of_no_cancellation_that_came_behind_the_end(kept: Kept) -> None:
    cancelled: list[str] = []
    told = asyncio.Event()

    def hear(wished: Mapping[str, float]) -> None:
        cancelled.extend(wished)
        told.set()

    control = Control(kept.broker)
    control.on_cancel = hear
    await control.start()
    async with kept.keeper() as keeper:
        kept.journal.note(Entry(Kind.DEAD, 1.0, "dead", "shop.charge", "shop.charge", reason="exhausted"))
        await kept.journal.flush()
        await kept.until_known("dead")
        kept.journal.cancelling("dead", "shop.charge", None)
        kept.journal.cancelling("waits", "t", None)
        await kept.journal.flush()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await told.wait()
        assert list(keeper._cancelled) == cancelled == ["waits"]
    await control.close()


async def test_a_runner_that_starts_is_told_that_an_event_is_cancelled_also_when_another_worker_has_ended_it(
    kept: Kept,
) -> None:
    async def starting() -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        control, wishes, over = Control(kept.broker), dict[str, float](), dict[str, dict[str, float]]()
        control.on_cancel = wishes.update
        control.on_over = lambda of: over.update({worker: dict(ids) for worker, ids in of.items()})
        await control.start()
        await control.close()
        return wishes, over

    async with kept.keeper() as keeper, asyncio.timeout(PATIENCE_SECONDS):
        kept.journal.cancelling("event", "placed", None, at=1.0)
        kept.journal.cancelling("job", "shop.charge", None, at=1.0)
        await kept.journal.flush()
        while len(keeper._cancelled) < 2:
            await asyncio.sleep(0.005)
        assert await starting() == ({"event": 1.0, "job": 1.0}, {})
        kept.journal.note(Entry(Kind.CANCELLED, 2.0, "event", "placed", "shop.charge"))
        kept.journal.note(Entry(Kind.DEAD, 2.0, "event", "placed", "shop.mail"))
        kept.journal.note(Entry(Kind.CANCELLED, 2.0, "job", "shop.charge", "shop.charge"))
        await kept.journal.flush()
        while "job" in keeper._cancelled:
            await asyncio.sleep(0.005)
        told = {"event": 1.0}, {"shop.mail": {"event": 1.0}}
        assert await starting() == told
    async with kept.keeper():
        assert await starting() == told


@pytest.mark.parametrize("seconds_ahead", [-3_600.0, 3_600.0])
async def test_whoever_waits_waits_as_long_as_he_says_whatever_his_clock_says(kept: Kept, seconds_ahead: float) -> None:
    clock = TurnableClock()
    clock.turn(seconds_ahead)
    asker = Asker(kept.broker, clock)
    async with kept.keeper() as keeper:
        kept.journal.note(Entry(Kind.STARTED, 1.0, "m", "t", "shop.charge", started=1.0))
        await kept.journal.flush()
        await kept.until_known("m")
        assert (await asker.wait(["m"], timeout_seconds=0.1))["m"].status is Status.RUNNING
        waiting = asyncio.create_task(asker.wait(["m"], timeout_seconds=PATIENCE_SECONDS))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not keeper._waits:
                await asyncio.sleep(0.005)
            kept.journal.note(Entry(Kind.SUCCEEDED, 2.0, "m", "t", "shop.charge", result="7"))
            await kept.journal.flush()
            assert (await waiting)["m"].result == "7"
    await asker.close()


async def test_an_answer_that_takes_long_to_get_out_holds_up_no_entry(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go = asyncio.Event(), asyncio.Event()
    publish = MemoryBroker.publish

    async def slow(self: MemoryBroker, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        if messages[0].topic.startswith(ANSWERS):
            begun.set()
            await may_go.wait()
        return await publish(self, messages, queue=queue)

    async with kept.keeper() as keeper, asyncio.timeout(PATIENCE_SECONDS):
        waiting = asyncio.create_task(kept.asker.wait(["m"], timeout_seconds=PATIENCE_SECONDS))
        while not keeper._waits:
            await asyncio.sleep(0.005)
        monkeypatch.setattr(MemoryBroker, "publish", slow)
        for number, id in enumerate(("m", "n")):
            kept.journal.note(Entry(Kind.SUCCEEDED, number, id, "t", "shop.charge", result="7"))
            await kept.journal.flush()
            await begun.wait()
        archive = Archive(kept.path).open(create=False)
        while not archive.of(["n"]):
            await asyncio.sleep(0.005)
        archive.close()
        assert not waiting.done()
        may_go.set()
        assert (await waiting)["m"].result == "7"


async def test_a_listing_that_takes_long_holds_up_nobody_who_waits_for_a_job(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go = asyncio.Event(), threading.Event()
    loop, answer = asyncio.get_running_loop(), Archive.answer

    def slow(self: Archive, to: str, request: JourneyOf | JobsOf) -> Answer:
        if request == JobsOf(JobFilter()):
            loop.call_soon_threadsafe(begun.set)
            may_go.wait(PATIENCE_SECONDS)
        return answer(self, to, request)

    kept.journal.note(Entry(Kind.SUCCEEDED, 1.0, "m", "t", "shop.charge", result="7"))
    await kept.journal.flush()
    async with kept.keeper(), asyncio.timeout(PATIENCE_SECONDS):
        await kept.until_known("m")
        monkeypatch.setattr(Archive, "answer", slow)
        listing = asyncio.create_task(kept.asker.jobs(limit=100, timeout_seconds=PATIENCE_SECONDS))
        try:
            await begun.wait()
            assert (await kept.asker.wait(["m"], timeout_seconds=PATIENCE_SECONDS))["m"].result == "7"
            assert [job.id for job in await kept.asker.jobs(JobFilter(ids=("m",)))] == ["m"]
            assert not listing.done()
        finally:
            may_go.set()
        assert [job.id for job in await listing] == ["m"]


async def test_an_order_for_runners_that_meets_an_outage_is_given_when_it_is_over(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: asyncio.Queue[str] = asyncio.Queue()
    publish, failed = MemoryBroker.publish, asyncio.Event()

    async def away_once(self: MemoryBroker, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        if messages[0].topic == CONTROL and not failed.is_set():
            failed.set()
            raise BrokerUnavailable("it is away")
        return await publish(self, messages, queue=queue)

    control = Control(kept.broker)
    control.on_cancel = lambda ids: cancelled.put_nowait(*ids)
    await control.start()
    async with kept.keeper():
        monkeypatch.setattr(MemoryBroker, "publish", away_once)
        kept.journal.cancelling("m", "t", None)
        await kept.journal.flush()
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await cancelled.get() == "m"
        assert failed.is_set()
    await control.close()


async def test_who_waits_where_nobody_keeps_a_journal_is_told_so(kept: Kept) -> None:
    with pytest.raises(NoKeeper):
        await kept.asker.wait(["m"], timeout_seconds=0.0)


async def test_several_keepers_know_together_what_each_knows(kept: Kept, tmp_path: Path) -> None:
    await kept.broker.declare([journal_queue("mail")])
    other = Keeper("mail", kept.broker, Archive(tmp_path / "mail.journal", clock=kept.clock), kept.clock)
    elsewhere = Journal("mail", kept.broker, Metrics("1"), kept.clock)
    async with kept.keeper(), other:
        kept.journal.published(message("m"))
        await kept.journal.flush()
        elsewhere.note(Entry(Kind.SUCCEEDED, 2.0, "m", "placed", "mail.send"))
        await elsewhere.flush()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len((await kept.asker.journey("m")).entries) < 2:
                await asyncio.sleep(0.02)
        (job,) = await kept.asker.jobs()
        assert (job.worker, job.status) == ("mail.send", Status.DONE)


async def test_a_question_that_makes_no_sense_harms_nobody(kept: Kept) -> None:
    async with kept.keeper():
        await kept.broker.publish([Message(id="q", topic=ASK, body=b"what?")])
        assert (await kept.asker.journey("m")).entries == ()


async def test_a_keeper_that_ends_leaves_nothing_behind(kept: Kept) -> None:
    async with kept.keeper():
        kept.journal.published(message("m"))
        await kept.journal.flush()
    assert await left(kept.broker) == 0
    archive = Archive(kept.path).open(create=False)
    assert len(archive.answer("", JourneyOf("m")).entries) == 1
    archive.close()
    await kept.asker.close()
    assert [info.name for info in await kept.broker.queues()] == [journal_queue("shop").name]


async def test_an_archive_that_cannot_be_opened_is_an_error_in_words(kept: Kept, tmp_path: Path) -> None:
    keeper = Keeper("shop", kept.broker, Archive(tmp_path / "nowhere" / "x"), kept.clock)
    with pytest.raises(JournalError, match="does not exist"):
        async with keeper:
            raise AssertionError("it cannot be open")
    app = shop("memory://", journal=tmp_path / "nowhere" / "x")
    async with app.running():  # work does not depend on it
        await app.publish(Placed(1))


async def test_retention_goes_by_the_clock(kept: Kept) -> None:
    kept.journal.published(message("old"))
    await kept.journal.flush()
    async with kept.keeper():
        await kept.until_known("old")
    kept.clock.turn(8 * 86_400)
    kept.journal.published(message("new"))
    await kept.journal.flush()
    async with kept.keeper():
        await kept.until_known("new")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await kept.asker.journey("old")).entries:
                await asyncio.sleep(0.02)


def test_what_is_not_ended_by_the_ledger_is_told_as_a_duplicate() -> None:
    known = in_order([Entry(Kind.DUPLICATE, 2.0, "m", "t", "w"), Entry(Kind.SUCCEEDED, 1.0, "m", "t", "w")])
    assert [entry.kind for entry in known] == [Kind.SUCCEEDED, Kind.DUPLICATE]


def test_the_queue_of_each_application_is_its_own() -> None:
    assert isinstance(journal_queue("a"), Queue)
    assert journal_queue("a").name != journal_queue("b").name


# --- programs without an event loop ---------------------------------------------------------------------------------------


SCRIPT = """
from conveyor import Conveyor

app = Conveyor("shop", broker="sqlite:///shop.queue", journal=True)

@app.task
async def bake(loaves: int) -> None: ...

bake.send_sync(3)
"""


async def test_a_script_that_sends_a_job_and_ends_has_it_in_the_journal(tmp_path: Path) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "never retrieved" in done.stderr, "destroyed" in done.stderr) == (0, False, False), (
        done.stderr
    )
    broker = from_url(f"sqlite:///{tmp_path / 'shop.queue'}")
    await broker.open()
    assert {info.name: info.ready for info in await broker.queues()} == {"shop.bake": 1, "conveyor.journal.shop": 1}
    await broker.close()
