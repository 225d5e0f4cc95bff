"""An event loop in a thread of its own: how plain, blocking calls from any thread reach what lives in an event loop.

Conveyor has one like it for its own blocking calls, but no public one, and an example uses nothing else. Yours can copy this.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class QueueClosed(RuntimeError):
    """The task queue is closed: it takes no calls, and whoever waited for one of its answers gets none."""


class Background:
    """Runs coroutines in another thread's event loop; that thread ends with close(), or with the interpreter."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run work over there, and wait for its result in this thread; an interruption of the wait (Ctrl-C) ends the work.

        Raises:
            QueueClosed: by close(), before or meanwhile.
        """
        call = self._begin(work)
        try:
            return call.result()
        except concurrent.futures.CancelledError:
            raise QueueClosed("the task queue was closed meanwhile") from None
        except KeyboardInterrupt:
            call.cancel()
            raise

    async def run_async(self, work: Coroutine[Any, Any, T]) -> T:
        """Run work over there, and await its result in this thread's own event loop. Raises what run() does."""
        call = self._begin(work)
        try:
            return await asyncio.wrap_future(call)
        except asyncio.CancelledError:
            here = asyncio.current_task()
            if self._closed and not (here and here.cancelling()):
                raise QueueClosed("the task queue was closed meanwhile") from None
            raise

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel what has not ended, run the last work, and end the loop and its thread. Any number of times."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            calls = list(self._calls)
        for call in calls:
            call.cancel()
        try:
            if last is not None:
                asyncio.run_coroutine_threadsafe(last(), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._lock:
            if self._closed:
                work.close()
                raise QueueClosed("the task queue is closed; open another one: TaskQueue(…)")
            call = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call
