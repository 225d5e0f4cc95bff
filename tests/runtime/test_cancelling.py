"""A job that is cancelled while it runs ends as cancelled, once and soon, in every kind of handler."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import event, text

from conveyor import Context, Conveyor, Job, JobCancelled, JobFailed, Message, Retry, RetryPolicy, Ticket, Transaction
from conveyor.runtime import consumer
from conveyor.runtime.runner import Runner
from tests.runtime import jobs
from tests.runtime.jobs import INJECTED
from tests.runtime.meeting import Meeting, gone

SECONDS = 60.0
"""For what takes milliseconds, unless the machine is busy."""


class Half(msgspec.Struct):
    text: str


def make(**options: Any) -> Conveyor:
    return Conveyor("t", broker="memory://", journal=True, **options)


async def until(ticket: Ticket[Any], status: str) -> Job:
    async with asyncio.timeout(SECONDS):
        while (job := await ticket.status()).status != status:
            await asyncio.sleep(0.02)
    return job


async def cancel_running(ticket: Ticket[Any]) -> Job:
    """Cancel a job as soon as it runs; what is known of it when it has ended."""
    await until(ticket, "running")
    await ticket.cancel()
    with pytest.raises(JobCancelled):
        await ticket.result(SECONDS)
    return await ticket.status()


# --- seeing it ----------------------------------------------------------------------------------------------------------


async def test_a_thread_sees_that_its_job_is_cancelled_and_ends_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "conveyor")
    app, saw, published = make(), list[object](), list[str]()

    @app.task
    def export(context: Context = INJECTED) -> int:
        context.publish(Half("never to be seen"))
        step = 0
        saw.append(context.cancelled)
        while not context.cancelled:
            context.progress(step := step + 1)
            time.sleep(0.001)
        saw.append(context.cancelled)
        return step

    @app.worker
    async def hear(half: Half) -> None:
        published.append(half.text)

    async with app.running():
        ticket = await export.send()
        job = await cancel_running(ticket)
        assert (job.status, job.attempts) == ("cancelled", 1)
        assert job.done
        assert app.metrics.worker("export").cancelled == 1
    assert saw == [False, True]
    assert published == []
    told = f"worker export: message {ticket.id} is cancelled while it runs: its thread is told"
    assert told in caplog.text


@pytest.mark.parametrize("threaded", [False, True], ids=["async", "thread"])
async def test_a_handler_that_fails_as_it_is_stopped_ends_as_cancelled_and_is_told_of(
    threaded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app = make()

    @app.task
    def in_thread(context: Context = INJECTED) -> None:
        while not context.cancelled:
            time.sleep(0.001)
        raise OSError("cannot clean up")

    @app.task
    async def in_loop() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("cannot clean up")

    async with app.running():
        job = await cancel_running(await (in_thread if threaded else in_loop).send())
        assert (job.status, job.attempts) == ("cancelled", 1)
    assert "was stopped (cancelled), and failed at that: OSError: cannot clean up" in caplog.text


async def test_a_thread_that_does_not_look_is_interrupted_when_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consumer, "TOLD_SECONDS", 0.05)
    app, saw, ended = make(), list[tuple[str, bool]](), threading.Event()

    @app.task
    def hang(context: Context = INJECTED) -> None:
        try:
            while True:
                time.sleep(0.01)
        except BaseException as error:
            saw.append((type(error).__name__, context.cancelled))
            raise
        finally:
            ended.set()

    async with app.running():
        await cancel_running(await hang.send())
        assert await asyncio.to_thread(ended.wait, SECONDS)
    assert saw == [("CancelledError", True)]


async def test_a_thread_that_cannot_look_is_interrupted_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(consumer, "TOLD_SECONDS", 10 * SECONDS)
    caplog.set_level(logging.INFO, "conveyor")
    app = make()

    @app.task
    def hang() -> None:
        while True:
            time.sleep(0.01)

    async with app.running():
        await cancel_running(await hang.send())
    assert "its thread is interrupted" in caplog.text


async def test_a_thread_that_heeds_nothing_is_left_behind_and_its_job_runs_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consumer, "TOLD_SECONDS", 0.05)
    app, ran, go, ended = make(), list[str](), threading.Event(), threading.Event()

    @app.task(concurrency=1)
    def work(name: str, context: Context = INJECTED) -> str:
        ran.append(name)
        while name == "deaf" and not go.is_set():
            with contextlib.suppress(BaseException):
                go.wait(0.01)
        if name == "deaf":
            ended.set()
        return name

    async with app.running(grace_seconds=0.0) as runner:
        ticket = await work.send("deaf")
        await cancel_running(ticket)
        assert await (await work.send("next")).result(SECONDS) == "next"
        assert runner.consumers["work"].stuck == 1
        assert runner.health().unhealthy == ("worker work: 1 attempts hang and cannot be stopped",)
    assert runner.was_cut is False  # nobody waits for it at the end
    assert not ended.is_set()
    go.set()
    assert await asyncio.to_thread(ended.wait, SECONDS)
    assert ran == ["deaf", "next"]


async def test_a_handler_that_heeds_nothing_after_its_lease_was_lost_is_left_behind_and_settles_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consumer, "LAST_CANCEL_SECONDS", 0.05)
    app, go, began = make(), asyncio.Event(), list[str]()

    @app.task(concurrency=1, timeout=None)
    async def work(name: str) -> str:
        began.append(name)
        while name == "deaf" and not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()
        return name

    async with app.running() as runner:
        ticket = await work.send("deaf")
        await until(ticket, "running")
        lane = runner.consumers["work"]
        [delivery] = lane.held()
        lane.lose(delivery)
        assert await (await work.send("next")).result(SECONDS) == "next"
        assert lane.stuck == 1
        metrics = app.metrics.worker("work")
        assert (metrics.lost_leases, metrics.succeeded, metrics.failed, metrics.released) == (1, 1, 0, 0)
        assert (await ticket.status()).status == "running"  # for whoever has it now
        go.set()
    assert began == ["deaf", "next"]


async def test_an_end_of_the_runner_in_between_leaves_a_cancelled_job_cancelled() -> None:
    app, ended = make(), threading.Event()

    @app.task
    def hang(context: Context = INJECTED) -> None:
        try:
            while True:
                time.sleep(0.01)
        finally:
            ended.set()

    async with app:
        async with app.running(grace_seconds=0.0) as runner:
            ticket = await hang.send()
            await until(ticket, "running")
            runner.cancel({ticket.id: time.time()})
        assert await asyncio.to_thread(ended.wait, SECONDS)
        metrics = app.metrics.worker("hang")
        assert (metrics.cancelled, metrics.released) == (1, 0)


async def test_a_handler_that_is_left_behind_while_its_worker_closes_leaves_no_lane() -> None:
    app, go, begun = make(), asyncio.Event(), asyncio.Event()

    @app.task(concurrency=1, timeout=None)
    async def deaf() -> None:
        begun.set()
        while not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()

    async with app.running(grace_seconds=0.0) as runner:
        await deaf.send()
        await begun.wait()
        at_work = runner.consumers["deaf"]
        at_work.gate.clear()
        closing = asyncio.create_task(at_work.close())
        await asyncio.sleep(0)
        for _ in range(consumer.CANCELS):
            at_work.cancel_all()
        at_work.cancel_overdue(float("inf"))
        assert at_work.stuck == 1
        await closing
        go.set()
        async with asyncio.timeout(SECONDS):
            while at_work.stuck:
                await asyncio.sleep(0.005)
        assert "deaf lane" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_an_async_handler_is_cancelled_and_sees_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "conveyor")
    app, saw = make(), list[bool]()

    @app.task
    async def hang(context: Context = INJECTED) -> None:
        saw.append(context.cancelled)
        try:
            await asyncio.Event().wait()
        finally:
            saw.append(context.cancelled)

    async with app.running():
        await cancel_running(await hang.send())
    assert saw == [False, True]
    assert "is cancelled while it runs: its handler is cancelled" in caplog.text


async def test_a_timeout_is_no_cancellation() -> None:
    app, saw = make(), list[bool]()

    @app.task(timeout=0.05, retry=RetryPolicy(attempts=1))
    async def hang(context: Context = INJECTED) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            saw.append(context.cancelled)

    async with app.running():
        with pytest.raises(JobFailed, match="the worker's timeout"):
            await (await hang.send()).result(SECONDS)
    assert saw == [False]


async def test_a_process_is_killed(meeting: Meeting, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "conveyor")
    app = make()
    hang = app.task(cpu=True)(jobs.hang)
    async with app.running():
        ticket: Ticket[Any] = await hang.send(meeting.path)
        pid = await meeting.pid()
        await cancel_running(ticket)
        await gone(pid)
    assert (
        f"message {ticket.id} is cancelled while it runs: its process, where it has one already, is killed"
        in caplog.text
    )


async def test_nothing_that_a_cancelled_handler_did_in_its_transaction_stays(tmp_path: Path) -> None:
    app = make(database=f"sqlite+aiosqlite:///{tmp_path}/t.db")

    @app.task
    async def book(tx: Transaction = INJECTED, context: Context = INJECTED) -> None:
        await tx.session.execute(text("INSERT INTO booked VALUES (1)"))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    async with app.running():
        async with app.transaction() as tx:
            await tx.session.execute(text("CREATE TABLE booked (n INTEGER)"))
        await cancel_running(await book.send())
        async with app.ledger.session() as session:
            assert (await session.execute(text("SELECT count(*) FROM booked"))).scalar_one() == 0


async def test_nothing_stays_of_a_transaction_whose_handler_swallows_its_cancellation_and_takes_no_context(
    tmp_path: Path,
) -> None:
    app, published = make(database=f"sqlite+aiosqlite:///{tmp_path}/t.db"), list[str]()

    @app.task
    async def book(tx: Transaction = INJECTED) -> None:
        await tx.session.execute(text("INSERT INTO booked VALUES (1)"))
        await tx.publish(Half("never to be seen"))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    @app.worker
    async def hear(half: Half) -> None:
        published.append(half.text)

    async with app.running():
        async with app.transaction() as tx:
            await tx.session.execute(text("CREATE TABLE booked (n INTEGER)"))
        job = await cancel_running(await book.send())
        assert job.status == "cancelled"
        async with app.ledger.session() as session:
            assert (await session.execute(text("SELECT count(*) FROM booked"))).scalar_one() == 0
        assert not await app.handing_off()
    assert published == []


async def test_a_wish_that_comes_while_the_transaction_is_committed_comes_too_late(tmp_path: Path) -> None:
    app, runners = make(database=f"sqlite+aiosqlite:///{tmp_path}/t.db"), list[Runner]()

    @app.task
    async def book(tx: Transaction = INJECTED, message: Message = INJECTED) -> str:
        await tx.session.execute(text("INSERT INTO booked VALUES (1)"))
        wish = {message.id: time.time()}
        event.listen(tx.session.sync_session, "before_commit", lambda _: runners[0].cancel(wish))
        return "booked"

    async with app.running() as runner:
        runners.append(runner)
        async with app.transaction() as tx:
            await tx.session.execute(text("CREATE TABLE booked (n INTEGER)"))
        assert await (await book.send()).result(SECONDS) == "booked"
        async with app.ledger.session() as session:
            assert (await session.execute(text("SELECT count(*) FROM booked"))).scalar_one() == 1
        metrics = app.metrics.worker("book")
        assert (metrics.succeeded, metrics.cancelled) == (1, 0)


# --- a handler that cancels its own job ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["async", "thread", "process"])
async def test_a_handler_may_end_its_job_as_cancelled(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "conveyor")
    app = make()

    @app.task
    async def in_loop() -> None:
        raise JobCancelled("nobody wants it any more")

    @app.task
    def in_thread() -> None:
        raise JobCancelled("nobody wants it any more")

    in_process = app.task(cpu=True)(jobs.give_itself_up)
    tasks: dict[str, Any] = {"async": in_loop, "thread": in_thread, "process": in_process}
    async with app.running():
        ticket = await tasks[kind].send()
        with pytest.raises(JobCancelled, match="was cancelled; last error: JobCancelled: nobody wants it") as caught:
            await ticket.result(SECONDS)
        assert caught.value.id == ticket.id
        job = await ticket.status()
        assert (job.status, job.attempts, job.error) == ("cancelled", 1, "JobCancelled: nobody wants it any more")
    assert f"the handler of message {ticket.id} has it cancelled: nobody wants it any more" in caplog.text


async def test_the_cancellation_of_another_job_is_a_failure_of_the_one_that_waits_for_it() -> None:
    app = make()

    @app.task
    async def part() -> None:
        raise JobCancelled

    @app.task(retry=RetryPolicy(attempts=1))
    async def whole() -> None:
        await (await part.send()).result(SECONDS)

    async with app.running():
        with pytest.raises(JobFailed, match=r"JobCancelled: job .* was cancelled"):
            await (await whole.send()).result(SECONDS)


async def test_a_retried_job_may_be_cancelled_by_its_handler_in_the_end() -> None:
    app = make()

    @app.task(retry=RetryPolicy(attempts=5, initial=0.0))
    async def fickle(context: Context = INJECTED) -> None:
        if context.attempt == 1:
            raise Retry("once more", after=0)
        raise JobCancelled("enough")

    async with app.running():
        ticket = await fickle.send()
        with pytest.raises(JobCancelled):
            await ticket.result(SECONDS)
        assert (await ticket.status()).attempts == 2
