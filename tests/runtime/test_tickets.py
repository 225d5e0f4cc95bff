"""Whoever sent a job can ask how it is, have its result, and cancel it."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from conveyor import (
    NO_RETRY,
    ConfigurationError,
    Context,
    Conveyor,
    ConveyorError,
    Job,
    JobCancelled,
    JobFailed,
    JobTimeout,
    PayloadError,
    ResultNotKept,
    Retry,
    RetryPolicy,
    Ticket,
)
from conveyor.broker import DeadFilter, Delivery, Queue, Settlement
from conveyor.brokers.memory import MemoryBroker
from conveyor.core.handler import Mode
from conveyor.core.questions import Answer
from conveyor.core.settle import Done
from conveyor.errors import (
    BrokerError,
    BrokerFull,
    BrokerUnavailable,
    JobUnknown,
    NoKeeper,
    PublishFailed,
    RemoteTraceback,
)
from conveyor.runtime import ask as asks
from conveyor.runtime import ticket as tickets
from conveyor.runtime.ask import Asker
from conveyor.runtime.call import RESULT_LIMIT
from conveyor.runtime.control import cancel
from conveyor.runtime.journal import ASK, keeper_topic
from conveyor.runtime.pool import CpuPool
from conveyor.runtime.worker import DEFAULT_CONCURRENCY
from tests.runtime import jobs
from tests.runtime.meeting import Meeting

SECONDS = 60.0
"""For what takes milliseconds, unless the machine is busy."""
INJECTED: Any = None
"""Type checkers see a parameter with a default, which nobody has to give; the runner fills it in."""
TWICE = RetryPolicy(attempts=2, initial=0.0)


@dataclass(frozen=True)
class Size:
    path: Path
    price: Decimal


class Thumb(msgspec.Struct, frozen=True):
    sizes: list[Size]
    data: bytes


def make(name: str = "t") -> Conveyor:
    return Conveyor(name, broker="memory://", journal=True)


async def until(ticket: Ticket[Any], status: str) -> Job:
    """Wait until a job is somewhere."""
    async with asyncio.timeout(SECONDS):
        while (job := await ticket.status()).status != status:
            await asyncio.sleep(0.02)
    return job


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_the_result_is_what_the_job_returned_with_its_type(kind: str) -> None:
    app = make()
    thumb = Thumb([Size(Path("a/b.jpg"), Decimal("1.10"))], b"\0\xff")

    @app.task
    async def in_loop(number: int) -> Thumb:
        return thumb

    @app.task
    def in_thread(number: int) -> Thumb:
        return thumb

    async with app.running():
        ticket = await (in_loop if kind == "async" else in_thread).send(1)
        assert await ticket.result(SECONDS) == thumb
        assert await ticket.result(timedelta(seconds=SECONDS)) == thumb


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_the_traceback_of_a_timeout_says_where_the_handler_stood(kind: str) -> None:
    app = make()

    async def wait_for_the_bank() -> None:
        await asyncio.Event().wait()

    def wait_for_the_post() -> None:
        while True:
            time.sleep(0.001)

    @app.task(retry=NO_RETRY, timeout=0.05)
    async def in_loop() -> None:
        await wait_for_the_bank()

    @app.task(retry=NO_RETRY, timeout=0.05)
    def in_thread() -> None:
        wait_for_the_post()

    async with app.running():
        ticket = await (in_loop if kind == "async" else in_thread).send()
        with pytest.raises(JobFailed, match="the worker's timeout") as failed:
            await ticket.result(SECONDS)
    assert ("in wait_for_the_bank" if kind == "async" else "in wait_for_the_post") in failed.value.traceback


async def test_the_traceback_of_a_timeout_says_where_a_handler_stood_that_made_an_error_of_its_own_of_it() -> None:
    app = make()

    async def wait_for_the_bank() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            raise ConnectionError("the bank hung up") from error

    @app.task(retry=NO_RETRY, timeout=0.05)
    async def pay() -> None:
        await wait_for_the_bank()

    async with app.running():
        ticket = await pay.send()
        with pytest.raises(JobFailed, match="the worker's timeout") as failed:
            await ticket.result(SECONDS)
    assert "in wait_for_the_bank" in failed.value.traceback
    assert "the bank hung up" in failed.value.traceback


async def test_the_traceback_of_a_timeout_says_where_a_handler_of_batches_stood() -> None:
    app = make()

    async def wait_for_the_bank() -> None:
        await asyncio.Event().wait()

    @app.worker(batch=2, retry=NO_RETRY, timeout=0.05)
    async def pay(sizes: list[Size]) -> None:
        await wait_for_the_bank()

    async with app, asyncio.timeout(SECONDS):
        await app.broker.declare([app.workers["pay"].queue])
        for number in range(2):  # before anybody receives, so that they come together
            await app.publish(Size(Path("a"), Decimal(number)))
        async with app.running():
            while len(letters := await app.broker.dead_letters(DeadFilter(), limit=10)) < 2:
                await asyncio.sleep(0.02)
    assert all("in wait_for_the_bank" in letter.traceback for letter in letters)


async def test_results_of_every_plain_type_come_back_as_what_they_are() -> None:
    app = make()

    @app.task
    async def give_bytes() -> bytes:
        return b"\0\xff"

    @app.task
    async def give_maybe(there: bool) -> Size | None:
        return Size(Path("x"), Decimal("2.0")) if there else None

    @app.task
    async def give_nothing() -> None:
        return None

    @app.task
    async def give_anything(number: int):  # type: ignore[no-untyped-def]  # noqa: ANN202 - without one is what it is about
        return {"number": number, "path": Path("x")}

    async with app.running():
        assert await (await give_bytes.send()).result(SECONDS) == b"\0\xff"
        assert await (await give_maybe.send(there=True)).result(SECONDS) == Size(Path("x"), Decimal("2.0"))
        assert await (await give_maybe.send(there=False)).result(SECONDS) is None
        await (await give_nothing.send()).result(SECONDS)
        untyped: Ticket[Any] = await give_anything.send(3)
        assert await untyped.result(SECONDS) == {"number": 3, "path": "x"}


async def test_a_result_that_is_too_large_is_a_clear_error_and_the_job_is_done() -> None:
    app = make()

    @app.task
    async def give(size: int) -> str:
        return "x" * size

    async with app.running():
        just = await give.send(RESULT_LIMIT - 2)
        assert len(await just.result(SECONDS)) == RESULT_LIMIT - 2
        ticket = await give.send(RESULT_LIMIT)
        with pytest.raises(ResultNotKept, match=r"262,146 bytes as JSON, and 262,144 are kept at most"):
            await ticket.result(SECONDS)
        assert (await ticket.status()).status == "done"
        assert app.metrics.worker("give").dead == 0


async def test_a_result_without_a_form_in_json_is_a_clear_error_and_the_job_is_done() -> None:
    app = make()

    @app.task
    async def give() -> threading.Event:
        return threading.Event()

    @app.task
    async def lie() -> int:
        return "no number"  # type: ignore[return-value]

    @app.task
    async def divide() -> float:
        return float("nan")

    @app.task
    async def any_one() -> object:
        return object()

    async with app.running():
        for task, why in (
            (give, "Event"),
            (lie, "Expected `int`"),
            (divide, "nan is no number"),
            (any_one, "object"),
        ):
            with pytest.raises(ResultNotKept, match=f"no form in JSON.*{why}"):
                await (await task.send()).result(SECONDS)
        assert {task: app.metrics.worker(task).dead for task in app.workers} == dict.fromkeys(app.workers, 0)


async def test_a_result_of_another_type_than_the_task_says_here_is_a_clear_error() -> None:
    app, elsewhere = make(), make()

    @app.task(name="give")
    async def give() -> int:
        return 3

    @elsewhere.task(name="give")
    async def give_text() -> str:
        return ""

    async with app.running():
        ticket = await give.send()
        await ticket.result(SECONDS)
        with elsewhere.replaced(broker=app.broker, clock=time.time):
            async with elsewhere:
                with pytest.raises(PayloadError, match=r"the result of job .* is not what t\.give says here"):
                    await give_text.ticket(ticket.id).result(SECONDS)


async def test_what_a_task_returns_is_its_result_and_no_event() -> None:
    app = make()
    seen: list[Size] = []

    @app.worker
    async def look(size: Size) -> None:
        seen.append(size)

    @app.task
    async def give(context: Context = INJECTED) -> Size:
        context.publish(Size(Path("published"), Decimal(1)))
        return Size(Path("returned"), Decimal(1))

    async with app.running():
        assert (await (await give.send()).result(SECONDS)).path == Path("returned")
        async with asyncio.timeout(SECONDS):
            while not seen:
                await asyncio.sleep(0.01)
    assert [size.path for size in seen] == [Path("published")]


# --- how it is --------------------------------------------------------------------------------------------------------


async def test_the_status_is_known_before_while_and_after() -> None:
    app = make()
    go = asyncio.Event()

    @app.task
    async def wait() -> str:
        await go.wait()
        return "gone"

    async with app:
        ticket = await wait.send()
        async with app.running():
            job = await until(ticket, "running")
            assert (job.worker, job.attempts) == ("t.wait", 1)
            assert job.created is not None
            assert job.started is not None
            assert job.created <= job.started
            go.set()
            await ticket.result(SECONDS)
            job = await ticket.status()
            assert (job.status, job.error) == ("done", "")
            assert job.started is not None
            assert job.ended is not None
            assert job.started <= job.ended


async def test_a_job_that_nobody_runs_yet_is_waiting() -> None:
    app = make()

    @app.task
    async def idle() -> None: ...

    @app.worker
    async def other(size: Size) -> None: ...

    async with app.running(["other"]):
        ticket = await idle.send()
        assert (await ticket.status()).status == "waiting"
        with pytest.raises(JobTimeout, match=r"has not ended after 0\.1 s: it waits") as caught:
            await ticket.result(0.1)
        assert (caught.value.status, caught.value.id) == ("waiting", ticket.id)
        assert isinstance(caught.value, TimeoutError)


async def test_a_job_between_two_attempts_shows_its_error() -> None:
    app = make()

    @app.task(retry=RetryPolicy(attempts=2, initial=200.0))
    async def fail() -> None:
        raise ValueError("no good")

    async with app.running():
        ticket = await fail.send()
        job = await until(ticket, "retrying")
        assert (job.attempts, job.error) == (1, "ValueError: no good")
        with pytest.raises(
            JobTimeout, match="1 attempt failed, and it waits for the next one; last error: ValueError: no good"
        ):
            await ticket.result(0.0)


async def test_a_job_that_is_tried_again_has_its_result_in_the_end() -> None:
    app = make()

    @app.task(retry=TWICE)
    async def try_twice(context: Context = INJECTED) -> int:
        if context.attempt == 1:
            raise ValueError("not yet")
        return context.attempt

    async with app.running():
        ticket = await try_twice.send()
        assert await ticket.result(SECONDS) == 2
        job = await ticket.status()
        assert (job.status, job.attempts, job.error) == ("done", 2, "")


async def test_the_result_of_a_dead_job_is_its_error_with_the_remote_traceback() -> None:
    app = make()

    def guilty() -> None:
        raise ValueError("no good")

    @app.task(retry=TWICE)
    async def fail() -> None:
        guilty()

    async with app.running():
        ticket = await fail.send()
        with pytest.raises(
            JobFailed, match=r"t\.fail was given up after 2 attempts \(exhausted\): ValueError: no good"
        ) as caught:
            await ticket.result(SECONDS)
        assert (caught.value.error, caught.value.attempts) == ("ValueError: no good", 2)
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "in guilty" in "".join(traceback.format_exception(caught.value))
        assert (await ticket.status()).status == "dead"


async def test_a_job_whose_end_the_broker_refuses_is_a_dead_letter_for_everybody() -> None:
    class Picky(MemoryBroker):
        async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
            if any(isinstance(each.verdict, Done) and each.delivery.queue == "t.give" for each in settlements):
                raise BrokerError("it cannot be told apart")
            return await super().settle(settlements)

    broker = Picky()
    await broker.open()
    app = Conveyor("t", broker=broker, journal=True)

    @app.task
    async def give() -> int:
        return 3

    async with app.running() as runner:
        ticket = await give.send()
        job = await until(ticket, "failed")
        assert (job.reason, job.result) == ("rejected", None)
        assert job.error == "the broker refuses what its handler decided: BrokerError: it cannot be told apart"
        with pytest.raises(JobFailed, match="cannot be told apart"):
            await ticket.result(SECONDS)
        metrics = app.metrics.worker("give")
        assert (metrics.dead, metrics.failed) == (1, 1)
        (failure,) = runner.status().failures
        assert (failure.dead, failure.message_id) == (True, ticket.id)
        (letter,) = await broker.dead_letters(DeadFilter(), limit=9)
        assert letter.error == job.error
    await broker.close()


async def test_progress_is_seen_while_the_job_runs() -> None:
    app = make()
    go = threading.Event()

    @app.task
    async def in_loop(context: Context = INJECTED) -> None:
        context.progress(1, 4, "loop")
        await asyncio.to_thread(go.wait, SECONDS)

    @app.task
    def in_thread(context: Context = INJECTED) -> None:
        for done in range(1000):
            context.progress(done, note="thread")
        go.wait(SECONDS)

    async with app.running():
        one, other = await in_loop.send(), await in_thread.send()
        async with asyncio.timeout(SECONDS):
            while (first := await one.status()).done is None or (second := await other.status()).done != 999:
                await asyncio.sleep(0.02)
        assert (first.done, first.total, first.note) == (1, 4, "loop")
        assert (second.total, second.note) == (None, "thread")
        with pytest.raises(JobTimeout, match="attempt 1 runs in .*: 1 of 4, loop"):
            await one.result(0.0)
        go.set()
        await app.gather([one, other], timeout=SECONDS)


async def test_a_handler_that_was_left_behind_does_not_make_its_dead_job_run_again() -> None:
    app = make()
    go, ended = threading.Event(), threading.Event()

    @app.task(timeout=0.2, retry=RetryPolicy(attempts=1))
    def deaf(context: Context = INJECTED) -> None:
        while not go.is_set():
            try:
                context.progress(1, 2)
                time.sleep(0.01)
            except asyncio.CancelledError:
                pass
        context.progress(2, 2, "I am still here")
        ended.set()

    async with app.running():
        ticket = await deaf.send()
        with pytest.raises(JobFailed, match="the worker's timeout"):
            await ticket.result(SECONDS)
        go.set()
        await asyncio.to_thread(ended.wait, SECONDS)
        connection = await app.connect()
        assert connection.journal is not None
        await connection.journal.flush()
        job = await ticket.status()
        assert (job.status, job.note) == ("dead", "")


@pytest.mark.parametrize(("done", "total"), [("half", 1.0), ("5", None), (None, 1), (1, "2"), (1j, None), ([1], 2)])
async def test_what_is_no_number_is_no_progress(done: Any, total: Any) -> None:
    app = make()

    @app.task(retry=TWICE)
    async def wrong(context: Context = INJECTED) -> None:
        context.progress(done, total)

    async with app.running():
        with pytest.raises(JobFailed, match=r"TypeError: progress\(.*\): both are numbers"):
            await (await wrong.send()).result(SECONDS)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ((5, 3), (5.0, 3.0)),
        ((-1, 0), (0.0, None)),
        ((2, -3), (2.0, None)),
        ((float("nan"), 4), (0.0, 4.0)),
        ((1.0, float("inf")), (1.0, None)),
        ((float("inf"), float("nan")), (0.0, None)),
        ((10**400, 10**400), (0.0, None)),
        ((Decimal("sNaN"), Decimal("NaN")), (0.0, None)),
    ],
)
@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_no_number_that_is_told_as_progress_harms_a_job(kind: str, said: Any, told: Any) -> None:
    app = make()

    @app.task(retry=NO_RETRY)
    async def in_loop(context: Context = INJECTED) -> str:
        context.progress(said[0], said[1], "so far")
        return "done"

    @app.task(retry=NO_RETRY)
    def in_thread(context: Context = INJECTED) -> str:
        context.progress(said[0], said[1], "so far")
        return "done"

    async with app.running():
        ticket = await (in_loop if kind == "async" else in_thread).send()
        assert await ticket.result(SECONDS) == "done"
        job = await ticket.status()
        assert (job.done, job.total, job.note) == (*told, "so far")


async def test_whatever_counts_as_a_number_is_told_as_progress_and_harms_nobody() -> None:
    app = make()

    @app.task
    async def count(context: Context = INJECTED) -> str:
        context.progress(True, 2)
        context.progress(Fraction(1, 2), Decimal(1))  # type: ignore[arg-type]
        context.progress(2**70, 2**80, Path("a"))  # type: ignore[arg-type]
        await asyncio.Event().wait()
        return "never"

    @app.task
    async def double(number: int) -> int:
        return 2 * number

    async with app.running():
        counting = await count.send()
        job = await until(counting, "running")
        async with asyncio.timeout(SECONDS):
            while (job := await counting.status()).done is None:
                await asyncio.sleep(0.02)
        assert (job.done, job.total, job.note) == (2.0**70, 2.0**80, "a")
        assert await (await double.send(2)).result(SECONDS) == 4
        await counting.cancel()
    assert app.metrics.journal_dropped == 0


# --- several ----------------------------------------------------------------------------------------------------------


async def test_gather_gives_the_results_in_the_order_of_the_tickets_and_tells_of_each_end() -> None:
    app = make()
    go: dict[int, asyncio.Event] = {number: asyncio.Event() for number in range(3)}

    @app.task
    async def wait(number: int) -> int:
        await go[number].wait()
        return number

    told: list[tuple[int, int]] = []

    def on_progress(done: int, total: int) -> None:
        told.append((done, total))
        if done < 3:
            go[2 - done].set()

    async with app.running():
        tickets = [await wait.send(number) for number in range(3)]
        assert await app.gather(tickets, timeout=SECONDS, on_progress=on_progress) == [0, 1, 2]
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


async def test_gather_raises_the_first_error_or_puts_it_in_its_place() -> None:
    app = make()

    @app.task(retry=RetryPolicy(attempts=1))
    async def halve(number: int) -> int:
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number // 2

    async with app.running():
        tickets = [await halve.send(number) for number in (4, 3, 2)]
        with pytest.raises(JobFailed, match="3 is odd"):
            await app.gather(tickets, timeout=SECONDS)
        first, error, last = await app.gather(tickets, timeout=SECONDS, return_errors=True)
        assert (first, last) == (2, 1)
        assert isinstance(error, JobFailed)


async def test_gather_says_what_has_not_ended_in_time_or_puts_that_in_the_place_of_its_result() -> None:
    app = make()

    @app.task
    async def quick() -> int:
        return 1

    @app.task
    async def never() -> int:
        await asyncio.Event().wait()
        return 2

    async with app.running(grace_seconds=0.0):
        tickets = [await quick.send(), await never.send()]
        await tickets[0].result(SECONDS)
        with pytest.raises(JobTimeout, match=f"1 job has not ended after 0.2 s, such as {tickets[1].id}"):
            await app.gather(tickets, timeout=0.2)
        first, late = await app.gather(tickets, timeout=0.2, return_errors=True)
        assert first == 1
        assert isinstance(late, JobTimeout)
        assert late.id == tickets[1].id


async def test_gather_of_more_jobs_than_fit_into_a_question() -> None:
    app = make()

    @app.task
    async def double(number: int) -> int:
        return 2 * number

    async with app.running():
        tickets = [await double.send(number) for number in range(1_100)]
        assert await app.gather(tickets, timeout=2 * SECONDS) == [2 * number for number in range(1_100)]


# --- cancelling -------------------------------------------------------------------------------------------------------


async def test_a_job_cancelled_before_it_starts_never_runs() -> None:
    app = make()
    ran: list[int] = []

    @app.task(concurrency=1, prefetch=1)
    async def run(number: int) -> None:
        ran.append(number)
        if number == 0:
            await go.wait()

    go = asyncio.Event()
    async with app.running():
        first, second, third = [await run.send(number) for number in range(3)]
        await until(first, "running")
        await second.cancel()
        with pytest.raises(JobCancelled, match=r"t\.run was cancelled"):
            await second.result(SECONDS)
        go.set()
        await app.gather([first, third], timeout=SECONDS)
        assert (await second.status()).status == "cancelled"
    assert ran == [0, 2]


async def test_whoever_waits_for_a_delayed_job_hears_at_once_that_it_is_cancelled() -> None:
    app = make()

    @app.task
    async def later() -> None: ...

    async with app.running():
        ticket = await later.options(delay=3600.0).send()
        waiting = asyncio.create_task(ticket.result(SECONDS))
        await asyncio.sleep(0)
        await ticket.cancel()
        with pytest.raises(JobCancelled):
            await waiting


async def test_a_job_that_swallows_its_cancellation_ends_as_cancelled_all_the_same() -> None:
    app = make()
    go = asyncio.Event()

    @app.task(timeout=None)
    async def stubborn() -> None:
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                pass

    async with app.running():
        ticket = await stubborn.send()
        await until(ticket, "running")
        await ticket.cancel()
        with pytest.raises(JobCancelled):
            await ticket.result(SECONDS)
        go.set()


async def test_a_job_between_two_attempts_can_be_cancelled() -> None:
    app = make()

    @app.task(retry=RetryPolicy(attempts=5, initial=0.0))
    async def fail(context: Context = INJECTED) -> None:
        ran.append(context.attempt)
        raise Retry("again", after=1.0)

    ran: list[int] = []
    async with app.running():
        ticket = await fail.send()
        await until(ticket, "retrying")
        await ticket.cancel()
        with pytest.raises(JobCancelled):
            await ticket.result(SECONDS)
        async with asyncio.timeout(SECONDS):
            while not app.metrics.worker("fail").cancelled:
                await asyncio.sleep(0.02)
    assert ran == [1]


async def test_a_job_that_is_done_stays_done() -> None:
    app = make()

    @app.task
    async def give() -> int:
        return 3

    async with app.running():
        ticket = await give.send()
        await ticket.result(SECONDS)
        await ticket.cancel()
        assert await ticket.result(SECONDS) == 3
        assert (await ticket.status()).status == "done"


@pytest.mark.parametrize("known_by", ["message", "id"])
async def test_a_dead_job_that_was_cancelled_runs_when_it_is_redriven(known_by: str) -> None:
    app = make()
    well = False

    @app.task(retry=RetryPolicy(attempts=1))
    async def give() -> int:
        if not well:
            raise ValueError("not yet")
        return 3

    async with app.running():
        ticket = await give.send()
        with pytest.raises(JobFailed):
            await ticket.result(SECONDS)
        await (ticket if known_by == "message" else give.ticket(ticket.id)).cancel()
        well = True
        assert await app.broker.redrive(await app.broker.dead_letters(DeadFilter(), limit=10)) == 1
        await until(ticket, "done")
        assert await ticket.result(SECONDS) == 3


async def test_a_job_that_died_before_its_cancellation_was_heard_runs_when_it_is_redriven() -> None:
    app = make()
    well = False

    @app.task(retry=RetryPolicy(attempts=1))
    async def give() -> int:
        if not well:
            raise ValueError("not yet")
        return 3

    async with app.running() as runner:
        ticket = await give.send()
        with pytest.raises(JobFailed):
            await ticket.result(SECONDS)
        connection, consumer = await app.connect(), runner.consumers["give"]
        assert connection.journal is not None
        assert ticket.message is not None
        heard = set[str]()
        assert runner.control is not None
        on_cancel = runner.control.on_cancel
        # What cancel() does when the news of the end has not come yet.
        wished = connection.journal.clock()
        await cancel(app.broker, {ticket.id: wished})
        async with asyncio.timeout(SECONDS):
            while ticket.id not in consumer.cancelled:
                await asyncio.sleep(0.005)
            connection.journal.cancelling(ticket.id, ticket.message.topic, None, at=wished)
            await connection.journal.flush()
            while consumer.cancelled:
                await asyncio.sleep(0.005)
            # A runner that has missed its end tells of the wish again.
            runner.control.on_cancel = lambda ids: (on_cancel(ids), heard.add(*ids))  # type: ignore[func-returns-value]
            await cancel(app.broker, {ticket.id: wished})
            while ticket.id not in heard:
                await asyncio.sleep(0.005)
        well = True
        assert await app.broker.redrive(await app.broker.dead_letters(DeadFilter(), limit=10)) == 1
        await until(ticket, "done")


async def test_a_job_cancelled_while_no_worker_was_there_is_let_go_by_the_next_one(tmp_path: Path) -> None:
    def sender() -> Conveyor:
        return Conveyor("t", broker=f"sqlite:///{tmp_path}/t.queue", journal=True)

    ran: list[int] = []

    def declared(app: Conveyor) -> Any:
        @app.task
        async def run(number: int) -> None:
            ran.append(number)

        return run

    first = sender()
    send = declared(first).send
    async with first:
        ticket = await send(1)
        await ticket.cancel()
    second = sender()
    task = declared(second)
    async with second.running():
        with pytest.raises(JobCancelled):
            await task.ticket(ticket.id).result(SECONDS)
        last = await task.send(3)
        await last.result(SECONDS)
    assert ran == [3]


# --- from elsewhere ---------------------------------------------------------------------------------------------------


async def test_a_ticket_is_found_by_its_id() -> None:
    app = make()

    @app.task
    async def give(number: int) -> Size:
        return Size(Path(str(number)), Decimal(number))

    async with app.running():
        sent = await give.send(3)
        assert await give.ticket(sent.id).result(SECONDS) == Size(Path("3"), Decimal(3))
        assert await app.ticket(sent.id).result(SECONDS) == Size(Path("3"), Decimal(3))
        assert (await app.ticket(sent.id).status()).topic == "t.give"


async def test_a_job_that_nobody_knows_is_a_clear_error() -> None:
    app = make()
    async with app.running():
        with pytest.raises(JobUnknown, match="the journal knows no job nonsense"):
            await app.ticket("nonsense").status()
        with pytest.raises(JobTimeout, match="the journal knows nothing about it"):
            await app.ticket("nonsense").result(0.1)
        with pytest.raises(JobUnknown):
            await app.ticket("nonsense").cancel()


async def test_without_a_journal_tickets_say_how_to_turn_it_on() -> None:
    app = Conveyor("t", broker="memory://")

    @app.task
    async def give() -> int:
        return 3

    async with app.running():
        ticket = await give.send()
        assert ticket.message is not None
        for ask in (ticket.result, ticket.status, ticket.cancel):
            with pytest.raises(ConfigurationError, match=r"journal=True"):
                await ask()


async def test_without_a_keeper_the_wait_for_a_result_says_so() -> None:
    app = make()

    @app.task
    async def give() -> int:
        return 3

    async with app.running(keeper=False):
        ticket = await give.send()
        with pytest.raises(NoKeeper, match="nobody keeps a journal"):
            await ticket.result(0.1)


async def test_whoever_asks_how_a_job_is_while_the_keeper_starts_again_is_answered_by_the_next_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    app = Conveyor("t", broker="memory://", journal=tmp_path / "t.journal")
    nobody = asyncio.Event()
    jobs = Asker.jobs

    async def seen(self: Asker, *arguments: Any, **more: Any) -> list[Job]:
        try:
            return await jobs(self, *arguments, **more)
        except NoKeeper:
            nobody.set()
            raise

    @app.task
    async def give() -> int:
        return 3

    monkeypatch.setattr(Asker, "jobs", seen)
    async with app.running(keeper=False):
        ticket = await give.send()
        with pytest.raises(NoKeeper, match="nobody keeps a journal"):
            await ticket.status(0)
        for asking in (ticket.status(SECONDS), app.ticket(ticket.id).cancel()):
            nobody.clear()
            asked = asyncio.create_task(asking)
            async with asyncio.timeout(SECONDS):
                await nobody.wait()
                async with app.keeper(app.broker):
                    await asked


@pytest.mark.parametrize(
    "outage",
    [BrokerUnavailable("it is away"), BrokerFull("it is away"), PublishFailed({}, {"m": "it is away"})],
    ids=["unavailable", "full", "unknown"],
)
async def test_the_wait_for_a_result_outlives_an_outage_of_the_broker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, outage: BrokerError
) -> None:
    app = make()
    go, failed = asyncio.Event(), 0
    wait = Asker.wait

    @app.task
    async def give() -> int:
        await go.wait()
        return 3

    async def away_at_first(self: Asker, ids: Collection[str], *, timeout_seconds: float) -> dict[str, Job]:
        nonlocal failed
        if failed < 2:
            failed += 1
            raise outage
        go.set()
        return await wait(self, ids, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(Asker, "wait", away_at_first)
    monkeypatch.setattr(tickets, "OUTAGE_SECONDS", 0.0)
    async with app.running():
        assert await (await give.send()).result(SECONDS) == 3
        assert [record.message for record in caplog.records if "it is away" in record.message] == [
            f"waiting on for the end of a job: {outage}"
        ]
        go.clear()
        failed = 0
        assert await app.gather([await give.send(), await give.send()], timeout=SECONDS) == [3, 3]


async def test_an_outage_of_the_broker_is_no_end_of_the_wait_for_how_a_job_is_but_a_refusal_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = make()
    errors: list[BrokerError] = [PublishFailed({}, {"m": "nobody knows"}), BrokerFull("no room")]
    jobs = Asker.jobs

    async def away_at_first(self: Asker, *arguments: Any, **more: Any) -> list[Job]:
        if errors:
            raise errors.pop(0)
        return await jobs(self, *arguments, **more)

    @app.task
    async def give() -> int:
        return 3

    monkeypatch.setattr(Asker, "jobs", away_at_first)
    monkeypatch.setattr(tickets, "OUTAGE_SECONDS", 0.0)
    async with app.running():
        ticket = await give.send()
        assert (await ticket.status()).id == ticket.id
        errors.append(PublishFailed({"m": "refused"}))
        with pytest.raises(PublishFailed, match="refused"):
            await ticket.status()


async def test_the_wait_for_a_result_asks_at_its_leisure_whatever_it_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make()
    asked: list[float] = []

    @app.task
    async def give() -> int:
        return 3

    async def at_once(self: Asker, ids: Collection[str], *, timeout_seconds: float) -> dict[str, Job]:
        asked.append(time.monotonic())
        return {}

    monkeypatch.setattr(Asker, "wait", at_once)
    async with app.running():
        with pytest.raises(JobTimeout):
            await (await give.send()).result(0.3)
    assert len(asked) <= 2 + 0.3 / tickets.GATHER_SECONDS


# --- without an event loop ----------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of a broker on which an application runs in another thread."""
    url = f"sqlite:///{tmp_path}/t.queue"
    app = Conveyor("t", broker=url, journal=True)

    @app.task
    async def double(number: int) -> int:
        return 2 * number

    ready, stop = threading.Event(), threading.Event()

    async def main() -> None:
        async with app.running():
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(SECONDS)
    yield url
    stop.set()
    thread.join()


def test_scripts_use_tickets_without_an_event_loop(served: str) -> None:
    app = Conveyor("t", broker=served, journal=True)

    @app.task
    async def double(number: int) -> int:
        raise AssertionError("it runs elsewhere")

    ticket = double.send_sync(4)
    assert ticket.result_sync(SECONDS) == 8
    assert ticket.status_sync().status == "done"
    told: list[int] = []
    tickets = [double.send_sync(number) for number in range(3)]
    assert app.gather_sync(tickets, timeout=SECONDS, on_progress=lambda done, _: told.append(done)) == [0, 2, 4]
    assert told[-1] == 3
    late = double.options(delay=600.0).send_sync(1)
    late.cancel_sync()
    with pytest.raises(JobCancelled):
        late.result_sync(SECONDS)


async def test_the_sync_twins_refuse_to_block_an_event_loop() -> None:
    app = make()

    @app.task
    async def give() -> int:
        return 3

    async with app.running():
        ticket = await give.send()
        for call, instead in (
            (ticket.result_sync, r"await ticket\.result"),
            (ticket.status_sync, r"await ticket\.status"),
            (ticket.cancel_sync, r"await ticket\.cancel"),
            (lambda: app.gather_sync([ticket]), r"await app\.gather"),
        ):
            with pytest.raises(ConveyorError, match=instead):
                call()


# --- in processes of the pool -----------------------------------------------------------------------------------------


async def test_progress_of_a_job_in_a_process_is_seen_while_it_runs(meeting: Meeting) -> None:
    app = make()
    report = app.task(cpu=True)(jobs.report_half)
    async with app.running():
        ticket = await report.send(meeting.path)
        with await meeting.arrival() as line:
            async with asyncio.timeout(SECONDS):
                while (job := await ticket.status()).done is None:
                    await asyncio.sleep(0.02)
            assert (job.status, job.done, job.total, job.note) == ("running", 1, 2, "half")
            line.send(b"on")
        assert await ticket.result(SECONDS) == "on"


async def test_a_job_that_waits_for_a_process_does_not_run_yet(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cast("dict[Mode, int]", DEFAULT_CONCURRENCY), Mode.PROCESS, 1)
    app = make()
    meet, report = app.task(cpu=True)(jobs.meet), app.task(cpu=True)(jobs.report_half)
    async with app.running() as runner, asyncio.timeout(SECONDS):
        first = await meet.send(meeting.path)
        with await meeting.arrival() as line:
            second = await report.send(meeting.path)
            while not runner.consumers["report_half"].busy:
                await asyncio.sleep(0.005)
            await until(first, "running")
            assert [each.delivery.message.id for each in runner._at_work()] == [first.id]
            assert (await second.status()).status == "waiting"
            line.send(b"on")
        with await meeting.arrival() as line:
            while not (found := list(runner._at_work())) or found[0].delivery.message.id != second.id:
                await asyncio.sleep(0.005)
            line.send(b"on")
        assert await second.result(SECONDS) == "on"


@pytest.mark.parametrize(("concurrency", "processes"), [((1, 1), 2), ((1, 1, 1, 1), 3), ((3, 3), 3), ((8, 1), 8)])
async def test_workers_on_cores_share_as_many_processes_as_they_need_within_the_cores(
    concurrency: tuple[int, ...], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cast("dict[Mode, int]", DEFAULT_CONCURRENCY), Mode.PROCESS, 3)
    sizes: list[int] = []

    def noted(size: int, **options: Any) -> CpuPool:
        sizes.append(size)
        return CpuPool(size, **options)

    monkeypatch.setattr("conveyor.runtime.pool.CpuPool", noted)
    app = make()
    for number, lanes in enumerate(concurrency):
        app.worker(name=f"w{number}", topic=f"t{number}", cpu=True, concurrency=lanes)(jobs.look_at_raw)
    async with app.running():
        assert sizes == [processes]


async def test_a_job_whose_process_dies_fails_with_what_is_known() -> None:
    app = make()
    fault, add = app.task(cpu=True, retry=TWICE)(jobs.fault), app.task(cpu=True)(jobs.add)
    async with app.running():
        ticket = await fault.send()
        with pytest.raises(JobFailed, match=r"after 2 attempts .*killed by SIGSEGV"):
            await ticket.result(SECONDS)
        assert await (await add.send(1, 2)).result(SECONDS) == 3


async def test_a_job_in_a_process_has_a_typed_result() -> None:
    app = make()
    scale = app.task(cpu=True)(jobs.scale)
    async with app.running():
        ticket = await scale.send(jobs.Picture("a", b"12"), by=3)
        assert await ticket.result(SECONDS) == jobs.Picture("a", b"121212")


async def test_a_result_that_cannot_leave_its_process_is_not_kept_and_its_job_is_done_once() -> None:
    app = make()
    keep = app.task(cpu=True, retry=TWICE)(jobs.keep_to_itself)
    seen: asyncio.Queue[jobs.Picture] = asyncio.Queue()

    @app.worker
    async def look(picture: jobs.Picture) -> None:
        seen.put_nowait(picture)

    async with app.running():
        ticket = await keep.send()
        with pytest.raises(ResultNotKept, match="cannot be sent to another process"):
            await ticket.result(SECONDS)
        job = await ticket.status()
        assert (job.status, job.attempts) == ("done", 1)
        async with asyncio.timeout(SECONDS):
            assert await seen.get() == jobs.Picture("kept", b"")  # what it published besides


async def test_the_ticket_of_one_task_is_not_for_the_job_of_another() -> None:
    app = make()

    @app.task
    async def number() -> int:
        return 1

    @app.task
    async def name() -> str:
        return "one"

    async with app.running():
        ticket = await name.send()
        assert await ticket.result(SECONDS) == "one"
        wrong = number.ticket(ticket.id)
        said = rf"is one of {app.name}\.name, not of {app.name}\.number"
        for asked in (wrong.result(SECONDS), wrong.status(), wrong.cancel(), app.gather([wrong], timeout=SECONDS)):
            with pytest.raises(JobUnknown, match=said):
                await asked
        (error,) = await app.gather([wrong], timeout=SECONDS, return_errors=True)
        assert isinstance(error, JobUnknown)
        assert await app.ticket(ticket.id).result(SECONDS) == await name.ticket(ticket.id).result(SECONDS) == "one"


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), "soon", timedelta(seconds=-1)])
async def test_what_is_no_time_to_wait_is_refused_at_once(timeout: Any) -> None:
    app = make()
    async with app.running():
        ticket = app.ticket("some id")
        for asked in (ticket.result(timeout), ticket.status(timeout), app.gather([ticket], timeout=timeout)):
            with pytest.raises(ValueError, match="is no time to wait"):
                await asked


async def test_what_is_no_id_and_what_is_no_ticket_is_refused_at_once() -> None:
    app = make()
    async with app.running():
        with pytest.raises(TypeError, match="the id of a job is a text, not 5"):
            app.ticket(5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="takes tickets, not 'some id'"):
            await app.gather(cast("list[Ticket[Any]]", ["some id"]))


async def test_where_a_keeper_is_silent_a_question_ends_with_its_time_and_an_order_goes_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[float] = []

    class Answers(asks._Answers):
        def __init__(self, arriving: asyncio.Queue[Answer], until: float) -> None:
            super().__init__(arriving, until)
            given.append(until - asyncio.get_running_loop().time())

    monkeypatch.setattr(asks, "_Answers", Answers)
    app = make()
    began, stopped = asyncio.Event(), asyncio.Event()

    @app.task
    async def hang() -> int:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return 1

    async with app.running(keeper=False):
        # Somebody hears the questions, and never says a word.
        await (await app.connect()).broker.declare([Queue(name="mute", topics=(ASK, keeper_topic(app.name)))])
        ticket = await hang.send()
        await began.wait()
        for asked in (ticket.status(0.1), ticket.result(0.1), app.gather([ticket], timeout=0.1)):
            with pytest.raises(NoKeeper, match="answered in time"):
                await asked
        assert given
        assert max(given) <= asks.LOOK_SECONDS
        given.clear()
        await ticket.cancel()
        assert given
        assert max(given) <= tickets.SOON_SECONDS
        async with asyncio.timeout(SECONDS):
            await stopped.wait()
