"""Workers that take image tasks from a TaskQueue: one after the other, or several at once in an event loop."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Final, TypedDict, TypeVar

import msgspec

from conveyor import BrokerError
from examples.images.background import QueueClosed
from examples.images.files import LARGEST_PIXELS, Processed, Refused, process_file
from examples.images.filters import FilterPipeline
from examples.images.registry import BEAT_SECONDS
from examples.images.tasks import Stats, Task, TaskError, TaskLost, TaskQueue, paths_of

T = TypeVar("T")

POLL_SECONDS: Final = 0.5
"""How long a worker waits for a task before it looks whether it is to stop."""
AGAIN_SECONDS: Final = 1.0
"""After a broker could not be asked."""
MOST_FAILURES: Final = 0.5
"""A worker of whose tasks more fail is not healthy."""
BEATS_MISSED: Final = 3

log = logging.getLogger("examples.images.workers")


class WorkerStats(TypedDict):
    """What a worker has done.

    Parameters:
        tasks_failed: those that were given up; one that is tried again is not among them.
        success_rate: share of the tasks that did not fail, 0 to 1.
        total_processing_time: seconds.
    """

    tasks_completed: int
    tasks_failed: int
    success_rate: float
    total_processing_time: float


class Record:
    """What a worker has done so far, and whether it is alive. For any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.running = False
        self.completed = 0
        self.failed = 0
        self.seconds = 0.0
        self.last_beat: float | None = None
        self.at_work = 0
        self.most_at_once = 0

    def begins(self) -> None:
        with self._lock:
            self.at_work += 1
            self.most_at_once = max(self.most_at_once, self.at_work)

    def ends(self, seconds: float, *, completed: int = 0, failed: int = 0) -> None:
        with self._lock:
            self.at_work -= 1
            self.seconds += seconds
            self.completed += completed
            self.failed += failed

    def beat(self) -> None:
        self.last_beat = time.monotonic()

    def stats(self) -> WorkerStats:
        with self._lock:
            ended = self.completed + self.failed
            return WorkerStats(
                tasks_completed=self.completed,
                tasks_failed=self.failed,
                success_rate=self.completed / ended if ended else 1.0,
                total_processing_time=self.seconds,
            )

    def healthy(self, beat_seconds: float) -> bool:
        recent = self.last_beat is not None and time.monotonic() - self.last_beat <= BEATS_MISSED * beat_seconds
        return self.running and recent and 1 - self.stats()["success_rate"] <= MOST_FAILURES


class TaskLog(logging.LoggerAdapter[logging.Logger]):
    """Log lines that name the worker and the task."""

    def __init__(self, worker_id: str, task_id: str = "") -> None:
        names = {"worker": worker_id} | ({"task": task_id} if task_id else {})
        super().__init__(log, names)

    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[object, MutableMapping[str, Any]]:
        """See logging.LoggerAdapter."""
        return f"{' '.join(f'[{name}]' for name in (self.extra or {}).values())} {msg}", {**kwargs, "extra": self.extra}


class Outcome(msgspec.Struct, frozen=True):
    """What came of a task: what was done, or why it failed and whether another try makes sense."""

    processed: Processed | None = None
    error: str = ""
    retry: bool = True

    @property
    def result(self) -> dict[str, Any]:
        """For the queue."""
        return dict(msgspec.to_builtins(self.processed))


def attempt(task: Task, pipeline: FilterPipeline, largest_pixels: int = LARGEST_PIXELS) -> Outcome:
    """Do what a task says: process its image_path, and write its output_path. Never raises an Exception."""
    try:
        source, target = paths_of(task.data)
        return Outcome(process_file(source, target, pipeline, largest_pixels=largest_pixels))
    except (Refused, TaskError) as error:
        return Outcome(error=str(error), retry=False)
    except Exception as error:  # whatever a filter of somebody's making raises: it is this task's failure
        return Outcome(error=f"{type(error).__name__}: {error}")


class _Worker:
    """What both kinds of worker do alike.

    Parameters:
        worker_id: names it, in the log and to others.
        beat_seconds: between two signs of life; left out, often enough for the queue's lease.
        largest_pixels: larger images are refused.
    """

    def __init__(
        self,
        worker_id: str,
        pipeline: FilterPipeline,
        queue: TaskQueue,
        *,
        beat_seconds: float | None = None,
        largest_pixels: int = LARGEST_PIXELS,
    ) -> None:
        self.worker_id: Final = worker_id
        self.pipeline: Final = pipeline
        self.queue: Final = queue
        self.beat_seconds: Final = beat_seconds or min(BEAT_SECONDS, queue.lease_seconds / 4)
        self._largest_pixels = largest_pixels
        self._record = Record()
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Have start() finish what is in hand, and then return."""
        self._stopping.set()

    def get_stats(self) -> WorkerStats:
        """What it has done so far."""
        return self._record.stats()

    def is_healthy(self) -> bool:
        """Whether it runs, gave a sign of life lately, and at most half of its tasks fail."""
        return self._record.healthy(self.beat_seconds)

    def _handle(self, task: Task) -> None:
        lines, started = TaskLog(self.worker_id, task.id), time.perf_counter()
        lines.info("started, attempt %d", task.attempt)
        self._record.begins()
        outcome, completed, failed = None, False, False
        try:
            outcome = attempt(task, self.pipeline, self._largest_pixels)
            if outcome.processed is not None:
                self._patiently(functools.partial(self.queue.mark_completed, task.id, outcome.result))
                completed = True
            else:
                mark = functools.partial(self.queue.mark_failed, task.id, outcome.error, retry=outcome.retry)
                failed = self._patiently(mark)
        except TaskLost as error:
            lines.warning("%s", error)
        except BrokerError as error:
            lines.warning("nobody heard how it ended, and it will be done again: %s", error)
            self.queue.let_go(task.id)
        finally:
            seconds = time.perf_counter() - started
            self._record.ends(seconds, completed=completed, failed=failed)
        tell(lines, outcome, seconds, completed=completed, failed=failed)

    def _patiently(self, call: Callable[[], T]) -> T:
        """Ask the queue, as often as it takes while its broker is away.

        Raises:
            BrokerError: it is away, and the worker is to stop.
        """
        while True:
            try:
                return call()
            except BrokerError as error:
                TaskLog(self.worker_id).warning("the queue cannot be asked, trying on: %s", error)
                if self._stopping.wait(AGAIN_SECONDS):
                    raise

    def _beat(self) -> None:
        record = self._record
        self.queue.heartbeat(self.worker_id, running=record.running, completed=record.completed, failed=record.failed)
        record.beat()

    def _try_to_beat(self) -> None:
        try:
            self._beat()
        except (BrokerError, QueueClosed) as error:
            TaskLog(self.worker_id).warning("no sign of life could be given: %s", error)

    def _say_goodbye(self) -> None:
        with suppress(BrokerError):
            self._patiently(self._beat)
        TaskLog(self.worker_id).info("stopped; %s", self.get_stats())


class SimpleWorker(_Worker):
    """Takes one task after the other, in the thread that calls start().

    Parameters:
        worker_id: names it, in the log and to others.
        beat_seconds: between two signs of life; left out, often enough for the queue's lease.
    """

    def start(self, *, forever: bool = False) -> None:
        """Work until the queue is worked off: nothing waits, and nobody has anything in hand that may come back. Or until stop().

        Parameters:
            forever: go on waiting for tasks, until stop().
        """
        with self._alive(), suppress(BrokerError):  # it is away, and the worker is to stop
            self._work(forever=forever)
        self._stopping.clear()

    def _work(self, *, forever: bool) -> None:
        wait = 0.0
        while not self._stopping.is_set():
            task = self._patiently(functools.partial(self.queue.get_task, self.worker_id, wait))
            if task is not None:
                self._handle(task)
            elif not forever and worked_off(self._patiently(self.queue.get_stats)):
                return
            wait = POLL_SECONDS if task is None else 0.0

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Give signs of life while the block lasts, from a thread of their own: an image may take long."""
        ended = threading.Event()

        def beat() -> None:
            self._try_to_beat()
            while not ended.wait(self.beat_seconds):
                self._try_to_beat()

        heart = threading.Thread(target=beat, name=f"{self.worker_id} heart", daemon=True)
        self._record.running = True
        heart.start()
        TaskLog(self.worker_id).info("running")
        stopped = False
        try:
            yield
            stopped = True
        finally:
            self._record.running = False
            ended.set()
            heart.join()
            if stopped:  # else it died: it is for the registry to find out
                self._say_goodbye()


class AsyncWorker(_Worker):
    """Takes several tasks at once, in the event loop that awaits start(); the images are processed in threads.

    Parameters:
        worker_id: names it, in the log and to others.
        max_concurrent: how many tasks it has in hand at most.
        beat_seconds: between two signs of life; left out, often enough for the queue's lease.
    """

    def __init__(
        self,
        worker_id: str,
        pipeline: FilterPipeline,
        queue: TaskQueue,
        max_concurrent: int = 3,
        *,
        beat_seconds: float | None = None,
        largest_pixels: int = LARGEST_PIXELS,
    ) -> None:
        if max_concurrent < 1:
            raise ValueError(f"max_concurrent is at least 1, not {max_concurrent}")
        super().__init__(worker_id, pipeline, queue, beat_seconds=beat_seconds, largest_pixels=largest_pixels)
        self.max_concurrent: Final = max_concurrent

    async def start(self, *, forever: bool = False) -> None:
        """See SimpleWorker.start."""
        self._record.running = True
        TaskLog(self.worker_id).info("running, %d at once", self.max_concurrent)
        ended = asyncio.Event()
        threads = ThreadPoolExecutor(self.max_concurrent, self.worker_id)
        beating = asyncio.create_task(self._beat_until(ended), name=f"{self.worker_id} heart")
        try:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.max_concurrent):
                        group.create_task(self._work(threads, forever=forever))
            except BaseException as error:
                self.stop()  # no thread waits any longer for a broker that is away
                if isinstance(error, ExceptionGroup):
                    raise error.exceptions[0] from error
                raise
            finally:
                await asyncio.to_thread(threads.shutdown)  # the images in hand are finished
                self._record.running = False
                ended.set()
                await beating
            await asyncio.to_thread(self._say_goodbye)
        finally:
            self._stopping.clear()

    @property
    def most_at_once(self) -> int:
        """How many tasks it had in hand at most."""
        return self._record.most_at_once

    async def _work(self, threads: ThreadPoolExecutor, *, forever: bool) -> None:
        wait, loop = 0.0, asyncio.get_running_loop()
        while not self._stopping.is_set():
            try:
                task = await self.queue.get_task_async(self.worker_id, wait)
                wait = POLL_SECONDS if task is None else 0.0
                if task is not None:
                    await loop.run_in_executor(threads, self._handle, task)
                elif not forever and worked_off(await self.queue.get_stats_async()):
                    return
            except BrokerError as error:
                TaskLog(self.worker_id).warning("the queue cannot be asked, trying on: %s", error)
                await asyncio.sleep(AGAIN_SECONDS)

    async def _beat_until(self, ended: asyncio.Event) -> None:
        while not ended.is_set():
            await asyncio.to_thread(self._try_to_beat)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.beat_seconds):
                    await ended.wait()


def worked_off(stats: Stats) -> bool:
    """Whether nothing waits, and nobody has anything in hand that may come back."""
    return not (stats["pending"] or stats["processing"])


def tell(lines: TaskLog, outcome: Outcome | None, seconds: float, *, completed: bool, failed: bool) -> None:
    """Log how a task ended."""
    if completed:
        lines.info("completed in %.2f s", seconds)
    elif outcome is not None and outcome.error:
        lines.warning("failed%s: %s", "" if failed else ", to be tried again", outcome.error)
