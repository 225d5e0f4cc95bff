"""Workers: each task is done once, failures stay with their task, and a worker that dies leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from conveyor import RetryPolicy
from conveyor.errors import BrokerUnavailable
from examples.images import (
    AsyncWorker,
    FilterPipeline,
    SimpleWorker,
    TaskQueue,
    WorkerBeat,
    WorkerRegistry,
    workers,
)
from tests.examples.beside import PATIENCE_SECONDS, Program, wait_for

PIPELINE = FilterPipeline("blur:2,brightness:1.3")
AT_ONCE = RetryPolicy(attempts=2, initial=0.0, maximum=0.0)


def add(queue: TaskQueue, photos: Sequence[Path], out: Path) -> list[str]:
    return [queue.add_task({"image_path": str(path), "output_path": str(out / path.name)}) for path in photos]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Gate:
    """A filter that waits until it is let go on."""

    name: ClassVar[str] = "gate"

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def apply(self, image: Image.Image) -> Image.Image:
        self.reached.set()
        assert self.open.wait(PATIENCE_SECONDS)
        return image


class Deadly:
    """A filter that ends the thread of its worker, the first time."""

    name: ClassVar[str] = "deadly"

    def __init__(self) -> None:
        self.deaths = 0

    def apply(self, image: Image.Image) -> Image.Image:
        if not self.deaths:
            self.deaths = 1
            raise SystemExit  # ends a thread without a word, and with it the worker
        return image


def test_a_simple_worker_works_a_queue_off(photos: Sequence[Path], tmp_path: Path, url: str) -> None:
    with TaskQueue(url) as queue:
        add(queue, photos, tmp_path / "out")
        worker = SimpleWorker("worker-1", PIPELINE, queue)
        worker.start()
        stats = worker.get_stats()
        assert (stats["tasks_completed"], stats["tasks_failed"], stats["success_rate"]) == (6, 0, 1.0)
        assert stats["total_processing_time"] > 0
        wait_for(lambda: queue.get_stats()["completed"] == 6)
        result = queue.results()[0].result
        assert [step["name"] for step in result["steps"]] == ["load", "blur", "brightness", "save"]
    assert names(tmp_path / "out") == names(tmp_path / "in")


def test_several_workers_in_threads_do_each_task_once(photos: Sequence[Path], tmp_path: Path) -> None:
    with TaskQueue() as queue:
        ids = add(queue, photos, tmp_path / "out")
        workers = [SimpleWorker(f"worker-{number}", PIPELINE, queue) for number in range(3)]
        threads = [threading.Thread(target=worker.start) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(worker.get_stats()["tasks_completed"] for worker in workers) == 6
        assert sorted(result.task_id for result in queue.results()) == sorted(ids)


async def test_an_async_worker_has_no_more_in_hand_than_it_may(photos: Sequence[Path], tmp_path: Path) -> None:
    gate = Gate()
    with TaskQueue() as queue:
        add(queue, photos, tmp_path / "out")
        worker = AsyncWorker("worker-1", FilterPipeline([gate]), queue, max_concurrent=3)
        working = asyncio.create_task(worker.start())
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await queue.get_stats_async())["processing"] < 3:
                await asyncio.sleep(0.02)
        assert (await queue.get_stats_async())["pending"] == 3
        assert worker.is_healthy()
        gate.open.set()
        await working
        assert worker.get_stats()["tasks_completed"] == 6
        assert worker.most_at_once == 3
        assert not worker.is_healthy()


async def test_an_async_worker_works_a_queue_off_on_every_broker(
    photos: Sequence[Path], tmp_path: Path, url: str
) -> None:
    with TaskQueue(url) as queue:
        add(queue, photos, tmp_path / "out")
        await AsyncWorker("worker-1", PIPELINE, queue, max_concurrent=2).start()
    assert names(tmp_path / "out") == names(tmp_path / "in")


class Away:
    """A broker that does not hear, for so many calls, how a task ended."""

    def __init__(self, queue: TaskQueue, calls: float) -> None:
        self.calls = calls
        self.asked = threading.Event()
        self._complete = queue._complete

    async def complete(self, task_id: str, result: dict[str, Any]) -> None:
        self.asked.set()
        if self.calls > 0:
            self.calls -= 1
            raise BrokerUnavailable("away")
        await self._complete(task_id, result)


@pytest.mark.parametrize("kind", [SimpleWorker, AsyncWorker])
async def test_a_worker_says_again_how_a_task_ended_when_the_broker_was_away(
    photos: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[SimpleWorker | AsyncWorker]
) -> None:
    monkeypatch.setattr(workers, "AGAIN_SECONDS", 0.01)
    with TaskQueue() as queue:
        add(queue, photos[:1], tmp_path / "out")
        monkeypatch.setattr(queue, "_complete", Away(queue, 2).complete)
        worker = kind("worker-1", PIPELINE, queue)
        async with asyncio.timeout(PATIENCE_SECONDS):
            if isinstance(worker, AsyncWorker):
                await worker.start()
            else:
                await asyncio.to_thread(worker.start)
        assert worker.get_stats()["tasks_completed"] == 1
        assert queue.get_stats() == {"pending": 0, "processing": 0, "completed": 1, "failed": 0, "total": 1}


def test_what_nobody_heard_of_is_not_counted_and_is_done_again(
    photos: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TaskQueue(lease=1.0) as queue:
        add(queue, photos[:1], tmp_path / "out")
        away = Away(queue, float("inf"))
        monkeypatch.setattr(queue, "_complete", away.complete)
        worker = SimpleWorker("worker-1", PIPELINE, queue)
        thread = threading.Thread(target=worker.start)
        thread.start()
        assert away.asked.wait(PATIENCE_SECONDS)
        worker.stop()
        thread.join(PATIENCE_SECONDS)
        assert (worker.get_stats()["tasks_completed"], worker.get_stats()["tasks_failed"]) == (0, 0)
        away.calls = 0
        worker.start()  # its signs of life do not keep what it let go
        assert worker.get_stats()["tasks_completed"] == 1


async def test_a_cancelled_async_worker_does_not_wait_for_a_broker_that_is_away(
    photos: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TaskQueue() as queue:
        add(queue, photos[:1], tmp_path / "out")
        away = Away(queue, float("inf"))
        monkeypatch.setattr(queue, "_complete", away.complete)
        working = asyncio.create_task(AsyncWorker("worker-1", PIPELINE, queue).start())
        assert await asyncio.to_thread(away.asked.wait, PATIENCE_SECONDS)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working


def test_a_bad_image_is_given_up_at_once_and_the_others_are_done(photos: Sequence[Path], tmp_path: Path) -> None:
    bad = tmp_path / "in" / "bad.jpg"
    bad.write_bytes(photos[0].read_bytes()[:500])
    with TaskQueue() as queue:
        add(queue, [*photos[:2], bad, tmp_path / "missing.jpg", *photos[2:]], tmp_path / "out")
        queue._background.run(queue._add({"image": "no path"}, 0, 0.0))  # as another program might
        worker = SimpleWorker("worker-1", PIPELINE, queue)
        worker.start()
        stats = worker.get_stats()
        assert (stats["tasks_completed"], stats["tasks_failed"]) == (6, 3)
        assert stats["success_rate"] == pytest.approx(6 / 9)
        reasons = {Path(str(dead.data.get("image_path"))).name: dead.error for dead in queue.dead_tasks()}
        assert "bad.jpg is broken" in reasons["bad.jpg"]
        assert "there is no file" in reasons["missing.jpg"]
        assert "there is no image_path in {'image': 'no path'}" in reasons["None"]
        assert {dead.attempts for dead in queue.dead_tasks()} == {1}


def test_a_file_that_becomes_a_named_pipe_while_its_task_waits_holds_up_no_worker(tmp_path: Path) -> None:
    with TaskQueue() as queue:
        add(queue, [tmp_path / "in.jpg"], tmp_path / "out")
        os.mkfifo(tmp_path / "in.jpg")
        SimpleWorker("worker-1", PIPELINE, queue).start()
        assert ["is a named pipe, no file" in dead.error for dead in queue.dead_tasks()] == [True]


def test_a_worker_refuses_what_is_larger_than_it_may_be(photos: Sequence[Path], tmp_path: Path) -> None:
    with TaskQueue() as queue:
        add(queue, photos[:1], tmp_path / "out")
        SimpleWorker("worker-1", PIPELINE, queue, largest_pixels=120 * 90 - 1).start()
        assert ["largest_pixels= " in dead.error.replace(",", " ") for dead in queue.dead_tasks()] == [True]


def test_what_a_filter_raises_is_tried_again_and_then_kept(photos: Sequence[Path], tmp_path: Path) -> None:
    class Broken:
        name: ClassVar[str] = "broken"

        def apply(self, image: Image.Image) -> Image.Image:
            raise ArithmeticError("out of colours")

    with TaskQueue(retry=AT_ONCE) as queue:
        add(queue, photos[:1], tmp_path / "out")
        worker = SimpleWorker("worker-1", FilterPipeline([Broken()]), queue)
        worker.start()
        assert worker.get_stats()["tasks_failed"] == 1
        (dead,) = queue.dead_tasks()
        assert (dead.error, dead.attempts) == ("ArithmeticError: out of colours", 2)


def test_stopping_finishes_the_task_in_hand_and_takes_no_other(photos: Sequence[Path], tmp_path: Path) -> None:
    gate = Gate()
    with TaskQueue() as queue:
        add(queue, photos, tmp_path / "out")
        worker = SimpleWorker("worker-1", FilterPipeline([gate]), queue)
        thread = threading.Thread(target=worker.start)
        thread.start()
        assert gate.reached.wait(PATIENCE_SECONDS)
        wait_for(worker.is_healthy)
        worker.stop()
        gate.open.set()
        thread.join(PATIENCE_SECONDS)
        assert queue.get_stats() == {"pending": 5, "processing": 0, "completed": 1, "failed": 0, "total": 6}
        assert not worker.is_healthy()
        assert [status.health for status in queue.registry.workers()] == ["stopped"]
        worker.start()
        assert worker.get_stats()["tasks_completed"] == 6


def test_a_worker_of_whose_tasks_most_fail_is_not_healthy(photos: Sequence[Path], tmp_path: Path) -> None:
    with TaskQueue() as queue:
        add(queue, [tmp_path / "missing.jpg"], tmp_path / "out")
        worker = SimpleWorker("worker-1", PIPELINE, queue)
        thread = threading.Thread(target=worker.start, kwargs={"forever": True})
        thread.start()
        try:
            wait_for(lambda: worker.get_stats()["tasks_failed"])
            assert not worker.is_healthy()
            add(queue, photos[:1], tmp_path / "out")
            wait_for(worker.is_healthy)
        finally:
            worker.stop()
            thread.join()


def test_the_task_of_a_worker_that_died_is_done_by_another_one(photos: Sequence[Path], tmp_path: Path) -> None:
    pipeline = FilterPipeline([Deadly()])
    with TaskQueue(lease=1.0, dead_after=0.5) as queue:
        add(queue, photos[:1], tmp_path / "out")
        died = SimpleWorker("worker-1", pipeline, queue)
        with pytest.raises(SystemExit):
            died.start()
        assert not died.is_healthy()
        wait_for(queue.registry.dead)
        survivor = SimpleWorker("worker-2", pipeline, queue)
        survivor.start()
        assert survivor.get_stats()["tasks_completed"] == 1
        assert queue.get_stats() == {"pending": 0, "processing": 0, "completed": 1, "failed": 0, "total": 1}


def test_every_line_of_the_log_names_the_worker_and_the_task(
    photos: Sequence[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "examples.images.workers")
    with TaskQueue() as queue:
        add(queue, [photos[0], tmp_path / "missing.jpg"], tmp_path / "out")
        SimpleWorker("worker-1", PIPELINE, queue).start()
    lines = [record.getMessage() for record in caplog.records if record.name == "examples.images.workers"]
    assert "[worker-1] [task-0001] started, attempt 1" in lines
    assert any(line.startswith("[worker-1] [task-0001] completed in") for line in lines)
    assert any(line.startswith("[worker-1] [task-0002] failed: there is no file") for line in lines)
    assert all(line.startswith("[worker-1] ") for line in lines)


def test_workers_in_processes_share_a_queue_and_survive_the_death_of_one(
    photos: Sequence[Path], tmp_path: Path, shared_url: str
) -> None:
    command = ("examples.images", "--log-level", "info", "work", "--broker", shared_url, "--lease", "2")
    with TaskQueue(shared_url, lease=2.0) as queue:
        add(queue, photos, tmp_path / "out")
        # The first one is stopped with a task in hand, and then killed.
        victim = Program(tmp_path, {}, *command, "--worker", "victim", "--filters", "blur:900,resize:6000x6000")
        others = []
        try:
            victim.until("[victim] [task-")
            os.kill(victim.process.pid, signal.SIGKILL)
            victim.process.wait()
            others = [Program(tmp_path, {}, *command, "--worker", name, "--until-empty") for name in ("one", "two")]
            wait_for(lambda: queue.get_stats()["completed"] == 6, lambda: [other.said() for other in others])
            for other in others:
                assert other.process.wait(PATIENCE_SECONDS) == 0
        finally:
            for program in (victim, *others):
                program.close()
        assert queue.dead_tasks() == []
    assert names(tmp_path / "out") == names(tmp_path / "in")


def test_the_registry_knows_who_works_who_stopped_and_who_died() -> None:
    now = 100.0
    registry = WorkerRegistry(dead_after=15.0, clock=lambda: now)
    registry.heard(WorkerBeat("a", "host:1"))
    registry.heard(WorkerBeat("b", "host:1"))
    registry.heard(WorkerBeat("a", "host:2"))
    now += 10.0
    registry.heard(WorkerBeat("a", "host:1", completed=20, failed=5, seconds=10.0))
    registry.heard(WorkerBeat("a", "host:2", running=False))
    now += 10.0
    first, second, third = registry.workers()
    assert (first.health, first.rate, first.seconds_ago) == ("running", 2.5, 10.0)
    assert (second.beat.process, second.health) == ("host:2", "stopped")
    assert (third.beat.worker_id, third.health) == ("b", "dead")
    assert registry.dead() == [third]
    registry.heard(WorkerBeat("b", "host:1", completed=1, failed=2))
    assert [status.health for status in registry.workers()][2] == "failing"
    now += 10_000.0
    registry.heard(WorkerBeat("c", "host:1"))
    assert [status.beat.worker_id for status in registry.workers()] == ["c"]


def test_a_rate_is_by_the_worker_s_own_clock_and_right_for_whoever_comes_late() -> None:
    now = 0.0
    registry = WorkerRegistry(clock=lambda: now)

    def heard(ended: int, seconds: float) -> float:
        registry.heard(WorkerBeat("a", "host:1", completed=ended, seconds=seconds))
        return registry.workers()[0].rate

    assert heard(1000, 500.0) == 2.0  # what it did before anybody listened took its time, too
    now += 0.1  # and what was heard late was not done late
    assert heard(1010, 510.0) == 1.0
    now += 30.0
    assert heard(1010, 520.0) == 0.5
    for second in range(530, 1000, 10):
        heard(1010, float(second))
    assert heard(1016, 1000.0) == pytest.approx(6 / 60)  # of the last minute
    assert heard(1016, 1000.0) == pytest.approx(6 / 60)


def test_the_rate_of_a_worker_at_work_is_what_it_does(photos: Sequence[Path], tmp_path: Path) -> None:
    with TaskQueue() as queue:
        add(queue, photos, tmp_path / "out")
        worker = SimpleWorker("worker-1", PIPELINE, queue)
        worker.start()
        (status,) = queue.registry.workers()
        assert status.beat.ended == 6
        assert status.rate == pytest.approx(6 / status.beat.seconds)


def test_the_folders_of_a_result_are_made(photos: Sequence[Path], tmp_path: Path) -> None:
    result = tmp_path / "out" / "of" / "many" / "a.jpg"
    with TaskQueue() as queue:
        queue.add_task({"image_path": str(photos[0]), "output_path": str(result)})
        assert not (tmp_path / "out").exists()
        SimpleWorker("worker-1", PIPELINE, queue).start()
    assert result.is_file()


def test_a_worker_is_healthy_only_while_start_works(photos: Sequence[Path], tmp_path: Path) -> None:
    gate = Gate()
    with TaskQueue() as queue:
        add(queue, photos[:1], tmp_path / "out")
        worker = SimpleWorker("worker-1", FilterPipeline([gate]), queue)
        assert not worker.is_healthy()
        thread = threading.Thread(target=worker.start)
        thread.start()
        assert gate.reached.wait(PATIENCE_SECONDS)
        wait_for(worker.is_healthy)
        gate.open.set()
        thread.join(PATIENCE_SECONDS)
        assert not worker.is_healthy()
        assert worker.get_stats()["tasks_completed"] == 1
