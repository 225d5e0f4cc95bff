"""A task queue to use directly, from any thread: in memory, or on any broker that Conveyor knows."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypedDict, TypeVar

from msgspec import Struct

from conveyor import BrokerError, ConfigurationError, Conveyor, Message, PayloadError, Pull, Pulled, Reject, RetryPolicy
from examples.images.background import Background
from examples.images.files import check_source, check_target
from examples.images.registry import DEAD_AFTER_SECONDS, WorkerBeat, WorkerRegistry

T = TypeVar("T")

RETRY: Final = RetryPolicy(attempts=3, initial=0.5, maximum=60.0)
LEASE_SECONDS: Final = 30.0
KEPT: Final = 100_000
"""Results that are kept, and therefore counted; beyond, the oldest are forgotten."""
IN_HAND: Final = 1_000
"""Tasks that all workers of one process may have in hand together."""
PAGE: Final = 500
"""Dead letters, or results, that are read at once."""
LOOK_SECONDS: Final = 0.05
"""How long a look for a task takes at least, before it is asked whether there is one at all."""
ANSWER_SECONDS: Final = 10.0
"""How long a broker may take to give what it has."""

log = logging.getLogger("examples.images.tasks")


class TaskError(ValueError):
    """What is to be added is no task; says what one looks like."""


class TaskLost(Exception):
    """The task is not in these hands any more: it is unknown here, has ended, or its lease has, and somebody else has it."""


class TaskFailed(Exception):
    """What a worker said about a task that failed."""


class Task(Struct, frozen=True):
    """A task in the hands of a worker.

    Parameters:
        attempt: 1 at the first try.
    """

    id: str
    data: dict[str, Any]
    worker_id: str
    attempt: int


class CompletedTask(Struct, frozen=True):
    """A task that is done, and what its worker said about it."""

    task_id: str
    worker_id: str
    result: dict[str, Any]


class DeadTask(Struct, frozen=True):
    """A task that was given up, and why.

    Parameters:
        died: Unix seconds.
    """

    id: str
    data: dict[str, Any]
    error: str
    attempts: int
    died: float


class Stats(TypedDict):
    """How many tasks are where."""

    pending: int
    processing: int
    completed: int
    failed: int
    total: int


class _Queued(Struct, frozen=True):
    """A task as it travels; its id is its message's."""

    data: dict[str, Any]


class _Held(Struct):
    """A task in our hands.

    Parameters:
        said: its result is published with its end, and must not be so again where the broker did not hear of it at first.
    """

    task: Task
    pulled: Pulled[_Queued]
    said: bool = False


class _Life(Struct):
    """A worker between its first sign of life and its last one; another one may have its name after it.

    Parameters:
        since: monotonic seconds.
        ended: tasks that it had completed or given up by its latest sign of life.
        running: false from its last one on.
    """

    since: float
    ended: int = 0
    running: bool = True


class TaskQueue:
    """Tasks that wait, are worked on, are done, or were given up. For any number of threads; and, on a broker that other
    processes can reach, for those too: each has a TaskQueue of its own on the same URL.

    A task that was got has to be marked within the lease, or its worker has to give signs of life (heartbeat); else it goes to
    another one. A worker's death therefore leaves nothing behind that is "processing" forever.

    Parameters:
        broker: a URL, such as ``sqlite:///images.queue``, ``redis://host`` or ``amqp://user:password@host``.
        name: begins the names of the queues on the broker.
        retry: how often, and after how long, a task that failed is tried again.
        lease: seconds that a worker may be silent while it has a task.
        dead_after: seconds of silence after which the registry calls a worker dead.
        keep: how many results are kept, the youngest ones.

    Raises:
        ValueError: the broker is "".
        ConveyorError: the broker or the lease makes no sense, or the broker cannot be reached.
    """

    def __init__(
        self,
        broker: str = "memory://",
        *,
        name: str = "images",
        retry: RetryPolicy = RETRY,
        lease: float = LEASE_SECONDS,
        dead_after: float = DEAD_AFTER_SECONDS,
        keep: int = KEPT,
    ) -> None:
        if not broker:
            raise ValueError("'' names no broker: leave it out for a queue in memory, or say sqlite:///images.queue")
        if broker.startswith("memory://") and broker != "memory://":
            raise ConfigurationError(
                "a task queue in memory is a queue of its own: say memory://, and share the object"
            )
        if not 0 < lease < math.inf:
            raise ConfigurationError(f"a lease is a number of seconds above 0, not {lease!r}")
        self.name: Final = name
        self.lease_seconds: Final = lease
        self.registry: Final = WorkerRegistry(dead_after=dead_after)
        self.process: Final = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
        self._in_memory = broker == "memory://"
        # Only this object can add to a queue in memory; elsewhere others may count, too.
        self._mark = "" if self._in_memory else f"-{self.process[-6:]}"
        self._numbers = itertools.count(1)
        self._app = Conveyor(name, broker=broker)
        self._topic = f"{name}.task"
        self._keep = keep
        self._completed = self._pull_completed()
        self._waiting = self._app.pull(
            _Queued, topic=self._topic, queue=f"{name}.tasks", retry=retry, lease=lease, prefetch=IN_HAND
        )
        self._held: dict[str, _Held] = {}
        self._lives: dict[str, _Life] = {}
        """By worker id."""
        self._stack = contextlib.AsyncExitStack()
        self._listening: asyncio.Task[None] | None = None
        self._background = Background(f"{name} tasks")
        try:
            self._background.run(self._open())
        except BaseException:
            self._background.close()
            raise

    # --- tasks --------------------------------------------------------------------------------------------------------

    def add_task(self, data: Mapping[str, Any], *, priority: int = 0, delay: float = 0.0) -> str:
        """Add a task; returns its id when the broker has it.

        Parameters:
            data: image_path, output_path, and what else the workers shall know, as JSON has it. The image may be missing yet,
                and so may the folders of output_path: the worker makes them.
            priority: 0 (ordinary) to 9 (first), where the broker knows priorities.
            delay: seconds before anybody gets it.

        Raises:
            TaskError: the data lack something, or something is of the wrong type.
            Refused: image_path is no file here, but a named pipe, for example; or output_path cannot be written.
            QueueClosed: so it is.
        """
        source, target = paths_of(data)
        if os.path.lexists(source):  # else it may come, or be where the workers are
            check_source(source)
        check_target(source, target)
        task = {**data, "image_path": str(source), "output_path": str(target)}
        return self._background.run(self._add(task, priority, delay))

    def get_task(self, worker_id: str, timeout: float = 0.0) -> Task | None:
        """A task for a worker; None where there is none now, nor in the next timeout seconds.

        A broker that has tasks may take 10 s longer to give one. None is given, too, where this process has 1,000 in hand.
        """
        return self._background.run(self._get(worker_id, timeout))

    def mark_completed(self, task_id: str, result: Mapping[str, Any] | None = None) -> None:
        """A task is done.

        Raises:
            TaskLost: it is not in our hands any more.
            TaskError: the result is no dict.
        """
        self._background.run(self._complete(task_id, result))

    def mark_failed(self, task_id: str, error: str, *, retry: bool = True) -> bool:
        """A task failed; it is tried again later, or given up. Returns whether it is given up.

        Parameters:
            retry: false gives it up at once.

        Raises:
            TaskLost: it is not in our hands any more.
        """
        return self._background.run(self._fail(task_id, error, retry=retry))

    def let_go(self, task_id: str) -> None:
        """Nobody here works on a task any more: no sign of life keeps it, and another worker has it when its lease ends."""
        self._background.run(self._forget(task_id))

    def get_stats(self) -> Stats:
        """How many tasks wait (also for their next try), are worked on, are done, and were given up.

        RabbitMQ tells nobody what others have in hand: there, what is processing is what this very object handed out.
        """
        return self._background.run(self._stats())

    def results(self) -> list[CompletedTask]:
        """The oldest results that are kept, at most 500; they stay where they are."""
        return self._background.run(self._results())

    # --- what was given up --------------------------------------------------------------------------------------------

    def dead_tasks(self) -> list[DeadTask]:
        """The tasks that were given up, oldest first."""
        return self._background.run(self._dead())

    def retry_dead(self, task_id: str | None = None) -> int:
        """Try a task that was given up again, as if it were new; left out, all of them. Returns how many there were.

        What fails again meanwhile stays where it is.
        """
        return self._background.run(self._retry_dead(task_id))

    # --- workers ------------------------------------------------------------------------------------------------------

    def heartbeat(self, worker_id: str, *, running: bool = True, completed: int = 0, failed: int = 0) -> None:
        """A worker's sign of life: its tasks stay its own for another lease, and every registry hears of it."""
        self._background.run(self._beat(worker_id, running, completed, failed))

    def recover_stuck_tasks(self) -> list[str]:
        """Take tasks from workers of this process that died, at once and not only when their leases end; gives the tasks' ids.

        It counts as a failed attempt: a task that kills its workers shall not do so forever.
        """
        return self._background.run(self._recover())

    # --- the same, for event loops ------------------------------------------------------------------------------------

    async def get_task_async(self, worker_id: str, timeout: float = 0.0) -> Task | None:
        """See get_task."""
        return await self._background.run_async(self._get(worker_id, timeout))

    async def mark_completed_async(self, task_id: str, result: Mapping[str, Any] | None = None) -> None:
        """See mark_completed."""
        await self._background.run_async(self._complete(task_id, result))

    async def mark_failed_async(self, task_id: str, error: str, *, retry: bool = True) -> bool:
        """See mark_failed."""
        return await self._background.run_async(self._fail(task_id, error, retry=retry))

    async def get_stats_async(self) -> Stats:
        """See get_stats."""
        return await self._background.run_async(self._stats())

    async def heartbeat_async(
        self, worker_id: str, *, running: bool = True, completed: int = 0, failed: int = 0
    ) -> None:
        """See heartbeat."""
        await self._background.run_async(self._beat(worker_id, running, completed, failed))

    # --- opening and closing ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back what is in our hands, and let go of the broker. Any number of times."""
        self._background.close(self._close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _open(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._app)
            await stack.enter_async_context(self._waiting)
            await stack.enter_async_context(self._completed)
            watch = self._app.watch(WorkerBeat, topic=f"{self.name}.worker")
            await stack.enter_async_context(watch)

            async def listen() -> None:
                async for beat in watch:
                    if beat.process != self.process:  # ours were heard already, and would be late now
                        self.registry.heard(beat)

            self._listening = asyncio.create_task(listen(), name="heartbeats")
            self._stack = stack.pop_all()

    async def _close(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        while self._held:
            _, held = self._held.popitem()
            with contextlib.suppress(BrokerError):
                await held.pulled.give_back()
        if self._in_memory:  # nobody else can read the results, and nobody shall be warned that they are there
            await self._app.broker.purge(self._completed.queue.name)
        await self._stack.aclose()

    # --- in the event loop: nothing here needs a lock -----------------------------------------------------------------

    def _pull_completed(self) -> Pull[CompletedTask]:
        name = f"{self.name}.completed"
        return self._app.pull(CompletedTask, topic=name, queue=name, max_length=self._keep, prefetch=PAGE)

    async def _add(self, data: dict[str, Any], priority: int, delay: float) -> str:
        task_id = f"task-{next(self._numbers):04d}{self._mark}"
        await self._app.publish(
            _Queued(data),
            topic=self._topic,
            id=task_id,
            priority=priority,
            delay=delay or None,
            require_subscriber=True,
        )
        return task_id

    async def _get(self, worker_id: str, timeout: float) -> Task | None:
        pulled = await self._waiting.take(max(LOOK_SECONDS, timeout))
        if pulled is None and len(self._held) >= IN_HAND:
            log.warning(
                "[%s] gets no task: %d are in hand here, and none of them was marked", worker_id, len(self._held)
            )
            return None
        if pulled is None and (await self._waiting.info()).ready:  # it is on its way, or somebody else's by now
            pulled = await self._waiting.take(ANSWER_SECONDS)
        if pulled is None:
            return None
        task = Task(pulled.message.id, pulled.payload.data, worker_id, pulled.attempt)
        self._held[task.id] = _Held(task, pulled)
        return task

    async def _complete(self, task_id: str, result: Mapping[str, Any] | None) -> None:
        if not isinstance(result, Mapping | None):
            raise TaskError(f"the result of a task is a dict, not {result!r:.100}")
        held = self._holding(task_id)
        completed = CompletedTask(task_id, held.task.worker_id, dict(result or {}))
        if not held.said:
            held.pulled.publish(completed, topic=f"{self.name}.completed")
            held.said = True
        await self._end(held, held.pulled.done())

    async def _fail(self, task_id: str, text: str, *, retry: bool) -> bool:
        held = self._holding(task_id)
        error: Exception = TaskFailed(text) if retry else Reject(text)
        final = held.pulled.final(error)
        await self._end(held, held.pulled.failed(error))
        return final

    def _holding(self, task_id: str) -> _Held:
        held = self._held.get(task_id)
        if held is None:
            raise TaskLost(f"{task_id} is not in our hands: get_task gave it to nobody here, or it has ended")
        return held

    async def _end(self, held: _Held, ending: Coroutine[Any, Any, bool]) -> None:
        """Settle a task; where the broker fails to hear of it, it stays in our hands and can be marked again."""
        was_ours = await ending
        self._let_go(held)
        if not was_ours:
            raise TaskLost(f"the lease of {held.task.id} had ended: somebody else has it")

    async def _forget(self, task_id: str) -> None:
        self._held.pop(task_id, None)

    def _let_go(self, held: _Held) -> None:
        if self._is_held(held):
            del self._held[held.task.id]

    def _is_held(self, held: _Held) -> bool:
        return self._held.get(held.task.id) is held  # else it was lost, and came back to another worker here

    async def _stats(self) -> Stats:
        waiting, results = await self._waiting.info(), await self._completed.info()
        pending, processing, failed = waiting.ready + waiting.delayed, waiting.in_flight, waiting.dead
        completed = results.ready + results.in_flight  # somebody may be reading them
        return Stats(
            pending=pending,
            processing=processing,
            completed=completed,
            failed=failed,
            total=pending + processing + completed + failed,
        )

    async def _results(self) -> list[CompletedTask]:
        found: list[Pulled[CompletedTask]] = []
        kept = (await self._completed.info()).ready
        async with self._pull_completed() as completed:
            while len(found) < min(PAGE, kept):
                pulled = await completed.take(ANSWER_SECONDS)
                if pulled is None:  # somebody else reads them
                    break
                found.append(pulled)
            for pulled in found:
                await pulled.give_back()
        return [pulled.payload for pulled in found]

    async def _dead(self) -> list[DeadTask]:
        found: list[DeadTask] = []
        after = None
        while letters := await self._waiting.dead_letters(limit=PAGE, after=after):
            after = letters[-1].position
            found += [
                DeadTask(
                    letter.message.id,
                    self._data_of(letter.message),
                    _reason(letter.error),
                    letter.attempts + 1,
                    letter.died,
                )
                for letter in letters
            ]
        return found

    def _data_of(self, message: Message) -> dict[str, Any]:
        try:
            return self._waiting.decode(message).data
        except PayloadError:  # something else put it there: it was given up for being no task
            return {}

    async def _retry_dead(self, task_id: str | None) -> int:
        there, after = 0, None
        while letters := await self._waiting.dead_letters(id=task_id, limit=PAGE, after=after):
            there, after = there + len(letters), letters[-1].position
        count, after = 0, None
        while there and (letters := await self._waiting.dead_letters(id=task_id, limit=min(PAGE, there), after=after)):
            count += await self._waiting.redrive(letters)
            there, after = there - len(letters), letters[-1].position
        return count

    async def _beat(self, worker_id: str, running: bool, completed: int, failed: int) -> None:
        mine = [held for held in self._held.values() if held.task.worker_id == worker_id]
        for held in mine:
            if not await held.pulled.extend():
                log.warning("[%s] [%s] its lease has ended: somebody else has it", worker_id, held.task.id)
                self._let_go(held)
        now, ended = time.monotonic(), completed + failed
        life = self._lives.get(worker_id)
        if life is None or (running and not life.running) or ended < life.ended:  # those that die say nothing at last
            life = self._lives[worker_id] = _Life(now)
        life.ended, life.running = ended, running
        task_ids = tuple(held.task.id for held in mine)
        beat = WorkerBeat(worker_id, self.process, running, completed, failed, task_ids, now - life.since)
        self.registry.heard(beat)
        await self._app.publish(beat, topic=f"{self.name}.worker")

    async def _recover(self) -> list[str]:
        dead = {status.beat.worker_id for status in self.registry.dead() if status.beat.process == self.process}
        recovered = []
        for task_id, held in list(self._held.items()):
            if held.task.worker_id in dead and self._is_held(held):  # it may have been marked while another was settled
                log.warning("[%s] [%s] the worker is dead; the task goes to another one", held.task.worker_id, task_id)
                self._let_go(held)
                if await held.pulled.failed(TaskFailed(f"{held.task.worker_id} died while it had the task")):
                    recovered.append(task_id)
        return recovered


def paths_of(data: object) -> tuple[Path, Path]:
    """Where the image of a task is, and where its result goes.

    Raises:
        TaskError: the data do not say so.
    """
    like = "a task is a dict such as {'image_path': 'in.jpg', 'output_path': 'out.jpg'}"
    if not isinstance(data, Mapping):
        raise TaskError(f"{like}, not {data!r:.100}")
    source, target = (data.get(name) for name in ("image_path", "output_path"))
    for name, path in (("image_path", source), ("output_path", target)):
        if name not in data:
            raise TaskError(f"{like}; there is no {name} in {data!r:.200}")
        if not isinstance(path, str | Path) or not str(path).strip() or "\0" in str(path):
            raise TaskError(f"{like}; {name} cannot be {path!r:.100}")
    return Path(str(source)), Path(str(target))


def _reason(error: str) -> str:
    """What a worker said, without the name of the error that carried it."""
    return error.removeprefix("Reject: ").removeprefix("TaskFailed: ")
