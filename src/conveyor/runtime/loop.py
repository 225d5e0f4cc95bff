"""Background loops: the only code that starts, restarts, stops and cancels them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

from conveyor.core.retry import RetryPolicy
from conveyor.core.settle import describe
from conveyor.errors import BrokerUnavailable, LedgerUnavailable

log = logging.getLogger("conveyor.loop")
T = TypeVar("T")

DEFAULT_GRACE_SECONDS: Final = 25.0
"""Less than the 30 seconds after which Kubernetes kills, and the 90 of systemd."""
RESTARTS: Final = RetryPolicy(initial=0.05, maximum=5.0, jitter=0.0)
"""A loop that fails is started again, soon at first, and at most five seconds later."""
CALM_SECONDS: Final = 30.0
"""A loop that ran so long before it failed starts with a fresh back-off."""


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Do work that no cancellation interrupts: who is cancelled meanwhile, is so when it has ended."""
    task = asyncio.get_running_loop().create_task(work, name="what is not interrupted")
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.warning("what was to be done at the end failed: %s", describe(failure))
        raise cancelled
    return task.result()


class Loops:
    """The background loops of one owner: every one is known by name, restarted when it fails, and ended by stop().

    A loop is a coroutine function; it runs until it returns. When it raises, the error is logged, shown in ``problems`` until the
    loop has been calm again or says that all is well(), and the loop is started anew after a back-off.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.problems: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        """Whether a loop of this name runs."""
        return name in self._tasks

    def start(self, name: str, body: Callable[[], Awaitable[None]]) -> None:
        """Run body in the background under a name that is not in use."""
        if name in self._tasks:
            raise ValueError(f"a loop named {name!r} runs already")
        task = asyncio.get_running_loop().create_task(self._run(name, body), name=name)
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._ended(name))

    def well(self, name: str) -> None:
        """What the named loop failed at works again."""
        self.problems.pop(name, None)

    def _ended(self, name: str) -> None:
        self._tasks.pop(name, None)
        self.problems.pop(name, None)

    async def stop(self, *names: str) -> None:
        """Cancel the named loops (all, where none is named) and wait until they have ended."""
        tasks = [self._tasks[name] for name in (names or tuple(self._tasks)) if name in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, name: str, body: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            started = loop.time()
            calm = loop.call_later(CALM_SECONDS, self.well, name)
            try:
                await body()
                return
            except Exception as error:
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    return  # it was stopped, and its broker could not even be told so
                failures = 1 if loop.time() - started > CALM_SECONDS else failures + 1
                self.problems[name] = describe(error)
                wait = RESTARTS.wait_seconds(failures, 0.0)
                if isinstance(error, (BrokerUnavailable, LedgerUnavailable)):  # no riddle: its words are enough
                    log.warning("%s (the loop %r tries again in %.2f s)", describe(error), name, wait)
                else:
                    said = describe(error)
                    log.warning(
                        "the loop %r failed, and starts again in %.2f s: %s", name, wait, said, exc_info=failures == 1
                    )
            finally:
                calm.cancel()
            await asyncio.sleep(wait)
