"""The task queue: what is added is worked on once, what fails is tried again or kept, and nothing is stuck."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conveyor import NO_RETRY, BrokerUnavailable, ConfigurationError, PayloadError, RetryPolicy
from conveyor.broker import DeadLetter, Delivery, Settlement
from conveyor.core.settle import RetryAt
from examples.images import (
    AsyncWorker,
    FilterPipeline,
    QueueClosed,
    Refused,
    SimpleWorker,
    Task,
    TaskError,
    TaskLost,
    TaskQueue,
    tasks,
)
from tests.examples.beside import PATIENCE_SECONDS, wait_for
from tests.examples.images.odd import no_files

AT_ONCE = RetryPolicy(attempts=3, initial=0.0, maximum=0.0)
DATA = {"image_path": "in.jpg", "output_path": "out.jpg"}


def got(task: Task | None) -> Task:
    assert task is not None
    return task


def soon(look: Callable[[], object]) -> None:
    """RabbitMQ's figures follow a moment later."""
    wait_for(lambda: look() or None)


def test_a_task_goes_from_pending_to_processing_to_completed(url: str) -> None:
    with TaskQueue(url) as queue:
        task_id = queue.add_task(DATA)
        assert task_id.startswith("task-0001")
        second = queue.add_task({**DATA, "sizes": [1, 2.5, None]})
        soon(lambda: queue.get_stats() == {"pending": 2, "processing": 0, "completed": 0, "failed": 0, "total": 2})
        task = got(queue.get_task("worker-1", 30))
        assert task == Task(task_id, DATA, "worker-1", 1)
        assert queue.get_stats()["processing"] == 1
        assert got(queue.get_task("worker-2", 30)).data["sizes"] == [1, 2.5, None]
        assert queue.get_task("worker-1") is None
        queue.mark_completed(task_id, result={"width": 10})
        queue.mark_completed(second)
        soon(lambda: queue.get_stats() == {"pending": 0, "processing": 0, "completed": 2, "failed": 0, "total": 2})
        results = queue.results()
        assert {(each.task_id, each.worker_id) for each in results} == {(task_id, "worker-1"), (second, "worker-2")}
        assert {"width": 10} in [each.result for each in results]
        soon(lambda: queue.get_stats()["completed"] == 2)


def test_a_result_that_the_broker_did_not_hear_of_is_there_once_when_it_is_said_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def away(_: object) -> None:
        raise BrokerUnavailable("away")

    with TaskQueue() as queue:
        task_id = queue.add_task(DATA)
        got(queue.get_task("worker-1"))
        with monkeypatch.context() as patch:
            patch.setattr(queue._app.broker, "settle", away)
            with pytest.raises(BrokerUnavailable):
                queue.mark_completed(task_id, {"width": 10})
        queue.mark_completed(task_id, {"width": 10})
        assert [(each.task_id, each.result) for each in queue.results()] == [(task_id, {"width": 10})]
        assert queue.get_stats() == {"pending": 0, "processing": 0, "completed": 1, "failed": 0, "total": 1}


def test_a_failed_task_is_tried_again_and_then_kept_until_it_is_retried(url: str) -> None:
    with TaskQueue(url, retry=AT_ONCE) as queue:
        task_id = queue.add_task(DATA)
        for attempt in (1, 2, 3):
            assert got(queue.get_task("worker-1", 30)).attempt == attempt
            assert queue.mark_failed(task_id, error="no light") == (attempt == 3)
        soon(lambda: queue.get_stats() == {"pending": 0, "processing": 0, "completed": 0, "failed": 1, "total": 1})
        (dead,) = queue.dead_tasks()
        assert (dead.id, dead.data, dead.error, dead.attempts) == (task_id, DATA, "no light", 3)
        assert queue.retry_dead("task-9999") == 0
        assert queue.retry_dead(task_id) == 1
        assert queue.dead_tasks() == []
        assert got(queue.get_task("worker-1", 30)).attempt == 1
        queue.mark_completed(task_id)


def test_a_failed_task_waits_before_it_is_tried_again() -> None:
    with TaskQueue(retry=RetryPolicy(attempts=4, initial=100.0, jitter=0.0)) as queue:
        task_id = queue.add_task(DATA)
        got(queue.get_task("worker-1"))
        queue.mark_failed(task_id, "no light")
        assert queue.get_task("worker-1") is None
        assert queue.get_stats()["pending"] == 1


def test_the_waits_between_the_tries_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.time() - 10_000.0  # every wait is over at once
    waits: list[float] = []
    with TaskQueue(retry=RetryPolicy(attempts=5, initial=100.0, maximum=500.0, jitter=0.0)) as queue:
        settle = queue._app.broker.settle

        async def note(settlements: Sequence[Settlement]) -> list[Delivery]:
            waits.extend(each.verdict.due - begun for each in settlements if isinstance(each.verdict, RetryAt))
            return await settle(settlements)

        monkeypatch.setattr(queue._app._outgoing, "clock", lambda: begun)
        monkeypatch.setattr(queue._app.broker, "settle", note)
        task_id = queue.add_task(DATA)
        for _ in range(4):
            got(queue.get_task("worker-1", 30))
            queue.mark_failed(task_id, "no light")
    assert waits == pytest.approx([100.0, 200.0, 400.0, 500.0])


def test_who_has_as_many_tasks_in_hand_as_may_be_gets_no_other_one_until_one_is_marked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "IN_HAND", 2)
    with ThreadPoolExecutor(1) as threads, TaskQueue() as queue:
        first, _, third = (queue.add_task(DATA) for _ in range(3))
        for _ in range(2):
            got(queue.get_task("worker-1"))
        assert threads.submit(queue.get_task, "worker-1").result(PATIENCE_SECONDS) is None
        assert "[worker-1] gets no task: 2 are in hand here, and none of them was marked" in caplog.messages
        queue.mark_completed(first)
        assert got(queue.get_task("worker-1")).id == third


def test_a_broker_that_has_a_task_and_does_not_give_it_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "IN_HAND", 1)
    monkeypatch.setattr(tasks, "ANSWER_SECONDS", 0.2)
    with ThreadPoolExecutor(1) as threads, TaskQueue(lease=1000.0) as queue:
        for _ in range(2):
            queue.add_task(DATA)
        queue.let_go(got(queue.get_task("worker-1")).id)  # its lease goes on
        assert threads.submit(queue.get_task, "worker-1").result(PATIENCE_SECONDS) is None
        assert queue.get_stats()["pending"] == 1


def test_a_task_can_be_given_up_at_once() -> None:
    with TaskQueue() as queue:
        task_id = queue.add_task(DATA)
        got(queue.get_task("worker-1"))
        assert queue.mark_failed(task_id, "no image", retry=False)
        assert [dead.error for dead in queue.dead_tasks()] == ["no image"]


def test_all_that_was_given_up_can_be_retried() -> None:
    with TaskQueue(retry=NO_RETRY) as queue:
        for _ in range(5):
            task_id = queue.add_task(DATA)
            got(queue.get_task("worker-1"))
            queue.mark_failed(task_id, "no light")
        assert queue.retry_dead() == 5
        assert queue.get_stats() == {"pending": 5, "processing": 0, "completed": 0, "failed": 0, "total": 5}


def test_what_fails_again_while_all_are_retried_is_not_retried_for_ever(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "PAGE", 2)
    with TaskQueue(url, retry=NO_RETRY) as queue:
        for _ in range(5):
            queue.add_task(DATA)
            queue.mark_failed(got(queue.get_task("worker-1", 30)).id, "no light")
        soon(lambda: len(queue.dead_tasks()) == 5)
        redrive, rounds = queue._waiting.redrive, iter(range(3))

        async def redrive_and_fail(letters: Sequence[DeadLetter]) -> int:
            assert next(rounds, None) is not None, "for ever"
            count = await redrive(letters)
            for _ in letters:
                await queue._fail(got(await queue._get("worker-1", 30)).id, "no light", retry=True)
            return count

        monkeypatch.setattr(queue._waiting, "redrive", redrive_and_fail)
        assert queue.retry_dead() == 5
        soon(lambda: len(queue.dead_tasks()) == 5)


def test_what_is_not_in_our_hands_cannot_be_marked() -> None:
    with TaskQueue() as queue:
        task_id = queue.add_task(DATA)
        with pytest.raises(TaskLost, match=task_id):
            queue.mark_completed(task_id)
        got(queue.get_task("worker-1"))
        with pytest.raises(TaskError, match="the result of a task is a dict, not 'done'"):
            queue.mark_completed(task_id, "done")  # type: ignore[arg-type]
        queue.mark_completed(task_id)
        with pytest.raises(TaskLost):
            queue.mark_failed(task_id, "too late")
        assert queue.get_stats()["completed"] == 1


def test_the_task_of_a_silent_worker_goes_to_another_one_after_its_lease(url: str) -> None:
    with TaskQueue(url, lease=1.0) as queue:
        task_id = queue.add_task(DATA)
        got(queue.get_task("worker-1", 30))
        assert got(queue.get_task("worker-2", 60)).id == task_id
        queue.mark_completed(task_id)
        soon(lambda: queue.get_stats() == {"pending": 0, "processing": 0, "completed": 1, "failed": 0, "total": 1})


def test_a_heartbeat_keeps_a_task_for_its_worker() -> None:
    with TaskQueue(lease=2.0) as queue:
        queue.add_task(DATA)
        task = got(queue.get_task("worker-1"))
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(0.2):
                queue.heartbeat("worker-1")

        heart = threading.Thread(target=beat)
        heart.start()
        try:
            assert queue.get_task("worker-2", 4.0) is None
        finally:
            stop.set()
            heart.join()
        queue.mark_completed(task.id)


def test_the_tasks_of_a_dead_worker_are_recovered_at_once_when_asked_for() -> None:
    with TaskQueue(lease=1000.0, dead_after=0.5, retry=AT_ONCE) as queue:
        task_id = queue.add_task(DATA)
        got(queue.get_task("worker-1"))
        queue.heartbeat("worker-1")
        assert queue.recover_stuck_tasks() == []
        wait_for(queue.registry.dead)
        assert queue.recover_stuck_tasks() == [task_id]
        task = got(queue.get_task("worker-2", 30))
        assert (task.id, task.attempt) == (task_id, 2)


def test_a_task_that_is_marked_while_others_are_recovered_stays_as_it_was_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with TaskQueue(lease=1000.0, dead_after=0.5, retry=AT_ONCE) as queue:
        first, second = queue.add_task(DATA), queue.add_task(DATA)
        for _ in range(2):
            got(queue.get_task("worker-1"))
        pulled = queue._held[first].pulled
        fail = pulled.failed

        async def failed(error: Exception) -> bool:
            await queue._complete(second, {})
            return await fail(error)

        monkeypatch.setattr(pulled, "failed", failed)
        queue.heartbeat("worker-1")
        wait_for(queue.registry.dead)
        assert queue.recover_stuck_tasks() == [first]
        assert queue.get_stats() == {"pending": 1, "processing": 0, "completed": 1, "failed": 0, "total": 2}


async def test_those_who_ask_at_once_get_a_task_each(url: str) -> None:
    with TaskQueue(url, retry=AT_ONCE) as queue:
        waiting = [asyncio.create_task(queue.get_task_async(f"worker-{number % 2}", 60)) for number in range(4)]
        ids = {await asyncio.to_thread(queue.add_task, DATA) for _ in range(4)}
        tasks = [got(task) for task in await asyncio.gather(*waiting)]
        assert {task.id for task in tasks} == ids
        assert not await queue.mark_failed_async(tasks[0].id, "no light")
        for task in tasks[1:]:
            await queue.mark_completed_async(task.id)
        assert got(await queue.get_task_async("worker-1", 60)).id == tasks[0].id


def test_a_result_that_somebody_reads_is_still_counted() -> None:
    with TaskQueue() as queue:
        queue.add_task(DATA)
        queue.mark_completed(got(queue.get_task("worker-1")).id)

        async def count_while_reading() -> int:
            async with queue._pull_completed() as results:
                assert await results.take(30) is not None
                return (await queue._stats())["completed"]

        assert queue._background.run(count_while_reading()) == 1


def test_what_a_closed_queue_had_in_hand_is_given_back(shared_url: str) -> None:
    with TaskQueue(shared_url) as queue:
        queue.add_task(DATA)
        got(queue.get_task("worker-1", 30))
    with TaskQueue(shared_url) as queue:
        assert got(queue.get_task("worker-1", 30)).attempt == 1


def test_several_queues_on_one_broker_share_their_tasks_and_never_their_ids(shared_url: str) -> None:
    with TaskQueue(shared_url) as one, TaskQueue(shared_url) as other:
        ids = {queue.add_task(DATA) for queue in (one, other) for _ in range(5)}
        assert len(ids) == 10
        taken = [got(queue.get_task("worker", 30)) for _ in range(5) for queue in (one, other)]
        assert {task.id for task in taken} == ids
        for place, task in enumerate(taken):
            (one, other)[place % 2].mark_completed(task.id)
        soon(lambda: one.get_stats()["completed"] == other.get_stats()["completed"] == 10)


def test_a_worker_is_heard_of_in_every_process_that_has_the_queue(shared_url: str) -> None:
    with TaskQueue(shared_url) as one, TaskQueue(shared_url) as other:
        one.heartbeat("worker-1", completed=3)
        wait_for(other.registry.workers)
        (status,) = other.registry.workers()
        assert (status.beat.worker_id, status.beat.process, status.beat.completed) == ("worker-1", one.process, 3)


def test_a_second_worker_of_a_name_begins_at_nothing_and_its_rate_is_its_own(shared_url: str) -> None:
    with TaskQueue(shared_url) as one, TaskQueue(shared_url) as other:
        for running in (True, False):
            one.heartbeat("said goodbye", completed=100, running=running)
        one.heartbeat("died", completed=100)
        for completed in (0, 1):
            for name in ("said goodbye", "died"):
                one.heartbeat(name, completed=completed)
        wait_for(lambda: [status.beat.completed for status in other.registry.workers()] == [1, 1])
        for registry in (one.registry, other.registry):
            for status in registry.workers():
                assert status.rate == pytest.approx(1 / status.beat.seconds)


def test_any_number_of_threads_may_use_one_queue() -> None:
    with TaskQueue() as queue, ThreadPoolExecutor(8) as threads:
        ids = set(threads.map(lambda _: queue.add_task(DATA), range(100)))
        assert len(ids) == 100

        def work_off(number: int) -> list[str]:
            done = []
            while (task := queue.get_task(f"worker-{number}")) is not None:
                queue.mark_completed(task.id)
                done.append(task.id)
            return done

        worked = [task_id for done in threads.map(work_off, range(8)) for task_id in done]
        assert sorted(worked) == sorted(ids)
        assert queue.get_stats() == {"pending": 0, "processing": 0, "completed": 100, "failed": 0, "total": 100}


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["add", "get", "complete", "fail", "give up", "retry"]), max_size=25))
def test_whatever_is_done_every_task_is_at_exactly_one_place(steps: list[str]) -> None:
    waiting, held, completed, failed = 0, list[Task](), 0, 0
    with TaskQueue(retry=RetryPolicy(attempts=1000, initial=0.0, maximum=0.0)) as queue:
        for step in steps:
            if step == "add":
                queue.add_task(DATA)
                waiting += 1
            elif step == "get":
                task = queue.get_task("worker-1")
                assert (task is None) == (waiting == 0)
                if task is not None:
                    waiting -= 1
                    held.append(task)
            elif step == "retry":
                assert queue.retry_dead() == failed
                waiting, failed = waiting + failed, 0
            elif held:
                task = held.pop(0)
                if step == "complete":
                    queue.mark_completed(task.id)
                    completed += 1
                else:
                    assert queue.mark_failed(task.id, "no light", retry=step == "fail") == (step == "give up")
                    waiting, failed = waiting + (step == "fail"), failed + (step == "give up")
            assert queue.get_stats() == {
                "pending": waiting,
                "processing": len(held),
                "completed": completed,
                "failed": failed,
                "total": waiting + len(held) + completed + failed,
            }


def test_urgent_tasks_go_first_and_delayed_ones_later() -> None:
    with TaskQueue() as queue:
        queue.add_task({**DATA, "name": "later"}, delay=1000.0)
        queue.add_task({**DATA, "name": "ordinary"})
        queue.add_task({**DATA, "name": "urgent"}, priority=9)
        names = [got(queue.get_task("worker-1")).data["name"] for _ in range(2)]
        assert names == ["urgent", "ordinary"]
        assert queue.get_task("worker-1") is None


def test_a_queue_may_be_closed_twice_and_then_says_that_it_is_closed() -> None:
    with TaskQueue() as queue:
        queue.add_task(DATA)
        queue.close()
    calls: list[Callable[[], object]] = [
        lambda: queue.add_task(DATA),
        lambda: queue.get_task("worker-1"),
        queue.get_stats,
        queue.dead_tasks,
        lambda: queue.heartbeat("worker-1"),
        SimpleWorker("worker-1", FilterPipeline([]), queue).start,
        lambda: asyncio.run(AsyncWorker("worker-1", FilterPipeline([]), queue).start()),
    ]
    for call in calls:
        with pytest.raises(QueueClosed, match="the task queue is closed; open another one"):
            call()


async def test_whoever_waits_for_a_task_hears_that_the_queue_is_closed() -> None:
    with TaskQueue() as queue, ThreadPoolExecutor(1) as threads:
        in_a_thread = threads.submit(queue.get_task, "worker-1", 1000)
        here = asyncio.create_task(queue.get_task_async("worker-2", 1000))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(queue._background._calls) < 2:
                await asyncio.sleep(0.02)
        await asyncio.to_thread(queue.close)
        with pytest.raises(QueueClosed, match="closed meanwhile"):
            in_a_thread.result(PATIENCE_SECONDS)
        with pytest.raises(QueueClosed, match="closed meanwhile"):
            await here


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("in.jpg", "a task is a dict such as .*, not 'in.jpg'"),
        (None, "not None"),
        ([("image_path", "in.jpg")], r"not \[\("),
        ({}, "there is no image_path in {}"),
        ({"image_path": "in.jpg"}, "there is no output_path in {'image_path'"),
        ({**DATA, "image_path": 7}, "image_path cannot be 7"),
        ({**DATA, "output_path": None}, "output_path cannot be None"),
        ({**DATA, "output_path": " "}, "output_path cannot be ' '"),
        ({**DATA, "output_path": "a\0.jpg"}, "output_path cannot be 'a"),
    ],
)
def test_what_is_no_task_is_not_added_and_the_error_says_what_one_is(data: Any, said: str) -> None:
    with TaskQueue() as queue:
        with pytest.raises(TaskError, match=said):
            queue.add_task(data)
        assert queue.get_stats()["total"] == 0


def test_what_no_json_can_say_is_not_added() -> None:
    with TaskQueue() as queue, pytest.raises(PayloadError, match="object"):
        queue.add_task({**DATA, "other": object()})


def test_an_image_that_is_no_file_is_not_added_and_a_missing_one_is(tmp_path: Path) -> None:
    with TaskQueue() as queue:
        reasons = no_files(tmp_path)
        for name in ("pipe.jpg", "folder.jpg", "nothing.jpg", "circle.jpg", "device.jpg", "socket.jpg"):
            with pytest.raises(Refused, match=reasons[name]):
                queue.add_task({"image_path": tmp_path / name, "output_path": tmp_path / "out.jpg"})
        with pytest.raises(Refused, match="its ending says no known format"):
            queue.add_task({"image_path": "in.jpg", "output_path": "out.txt"})
        with pytest.raises(Refused, match="is the original itself"):
            queue.add_task({"image_path": "in.jpg", "output_path": "in.jpg"})
        with pytest.raises(Refused, match="is a folder, no file"):
            queue.add_task({"image_path": "in.jpg", "output_path": tmp_path / "folder.jpg"})
        queue.add_task({"image_path": tmp_path / "missing.jpg", "output_path": tmp_path / "out.jpg"})
        task = got(queue.get_task("worker-1"))
        assert task.data == {"image_path": str(tmp_path / "missing.jpg"), "output_path": str(tmp_path / "out.jpg")}


def test_what_another_program_put_there_and_is_no_task_does_not_hide_the_others_that_were_given_up() -> None:
    with TaskQueue(retry=NO_RETRY) as queue:
        stranger = queue._app.publish({"data": "no dict"}, topic=queue._topic, id="stranger")
        queue._background.run(stranger)
        task_id = queue.add_task(DATA)
        assert got(queue.get_task("worker-1")).id == task_id
        queue.mark_failed(task_id, "no light")
        assert [(dead.id, dead.data) for dead in queue.dead_tasks()] == [("stranger", {}), (task_id, DATA)]


def test_a_queue_in_memory_is_one_object() -> None:
    with pytest.raises(ConfigurationError, match="share the object"):
        TaskQueue("memory://name")


def test_a_broker_without_a_name_is_refused_and_makes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'' names no broker: leave it out for a queue in memory"):
        TaskQueue("")
    assert list(tmp_path.iterdir()) == []
    with TaskQueue() as queue:
        assert queue.get_stats()["total"] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lease", [0.0, -1.0, math.nan, math.inf])
def test_a_lease_that_could_not_end_or_begin_is_refused(lease: float) -> None:
    with pytest.raises(ConfigurationError, match="a lease is a number of seconds above 0"):
        TaskQueue(lease=lease)
