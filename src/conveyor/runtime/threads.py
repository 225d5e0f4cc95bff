"""Threads for plain ``def`` handlers: an attempt that is cancelled is interrupted where Python allows it, and never awaited."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any


def _raise_in(thread_id: int, error: type[BaseException] | None) -> None:
    """Have an error raised in a thread at its next Python instruction; None takes back one that has not been raised yet."""
    import ctypes  # here, because most programs never interrupt a thread

    wanted = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), wanted)


class _Job:
    """One call, and the thread that runs it."""

    __slots__ = ("call", "ended", "error", "future", "interrupted", "lock", "loop", "result", "thread_id")

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.lock = threading.Lock()
        self.thread_id: int | None = None
        self.interrupted = False
        self.ended = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> bool:
        """Run the call in this thread, and say whether it came to its end without having been given up."""
        try:
            if not self._begin():
                return False
            self.result, self.error = self._called()
            self._end()
        except asyncio.CancelledError:  # interrupted on the threshold, where nobody waits any more
            return False
        return not self.interrupted

    def tell(self) -> None:
        """Tell the loop how the call ended."""
        with contextlib.suppress(RuntimeError):  # the loop has ended before the handler did
            self.loop.call_soon_threadsafe(self._finish, self.result, self.error)

    def _begin(self) -> bool:
        with self.lock:
            self.thread_id = threading.get_ident()
            return not self.interrupted

    def _called(self) -> tuple[Any, BaseException | None]:
        try:
            return self.call(), None
        except BaseException as error:  # SystemExit in a handler ends the handler, not the thread
            return None, error

    def _end(self) -> None:
        with self.lock:
            self.ended = True
            if self.interrupted:
                _raise_in(threading.get_ident(), None)

    def stack(self) -> str:
        """Where the call is now, as in a traceback; "" where it has not begun, or has ended."""
        frame = sys._current_frames().get(self.thread_id or 0)
        if self.ended or frame is None:
            return ""
        stack = traceback.extract_stack(frame)
        own = next((place for place, each in enumerate(stack) if each.name == _Job._called.__name__), -1)
        # Behind it comes the one line that takes the context along.
        return "" if own < 0 else "".join(traceback.format_list(stack[own + 2 :])).rstrip()

    def interrupt(self) -> bool:
        """Raise CancelledError in the thread, at its next Python instruction; a call into C is not reached.

        Returns:
            Whether the thread was still at it.
        """
        with self.lock:
            if self.ended:
                return False
            self.interrupted = True
            if self.thread_id is not None:
                _raise_in(self.thread_id, asyncio.CancelledError)
            return True

    def _finish(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        elif isinstance(error, StopIteration) or not isinstance(error, Exception):
            # These mean something to asyncio and to coroutines; in a handler they are a failure like any other.
            wrapped = RuntimeError(f"the handler raised {type(error).__name__}({error})")
            wrapped.__cause__ = error
            self.future.set_exception(wrapped)
        else:
            self.future.set_exception(error)


class Threads:
    """Daemon threads, started when needed and kept; a thread whose job was interrupted takes no further one.

    Daemons, because a handler that hangs in C must not keep the process from ending.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._started = 0
        self.stuck = 0
        """Threads that still run an attempt which was given up."""

    async def run(self, call: Callable[[], Any]) -> Any:
        """Run call in a thread with the caller's context variables, and give its result; cancelling interrupts it there."""
        context = contextvars.copy_context()
        job = _Job(lambda: context.run(call))
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                self._started += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()
        self._jobs.put(job)
        try:
            return await job.future
        except asyncio.CancelledError as stopped:
            if where := job.stack():
                stopped.add_note(f"its thread was at:\n{where}")
            if job.interrupt():
                with self._lock:
                    self.stuck += 1
            raise

    def close(self) -> None:
        """Let idle threads end."""
        with self._lock:
            for _ in range(self._started):
                self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            free = job.run()
            with self._lock:
                if not free:
                    self.stuck -= 1
                    self._started -= 1
                    return
                self._idle += 1  # before its caller knows, so that the caller's next call finds it
            job.tell()
            del job  # while it waits for the next one, it holds nothing of this one
