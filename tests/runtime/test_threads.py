"""A call in a thread can be given up at any moment, and nothing is left of it but the thread itself, as long as it runs."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
import weakref

import pytest

from conveyor.runtime import threads
from conveyor.runtime.threads import Threads

SECONDS = 60.0


class Payload: ...


async def nothing_stuck(pool: Threads) -> None:
    async with asyncio.timeout(SECONDS):
        while pool.stuck:
            await asyncio.sleep(0.01)


async def test_a_call_has_its_callers_context_variables_and_a_thread_is_kept_for_the_next_one() -> None:
    pool, said = Threads("t"), contextvars.ContextVar[str]("said")
    said.set("here")
    found = {await pool.run(lambda: (said.get(), threading.get_ident())) for _ in range(1_000)}
    assert [text for text, _ in found] == ["here"]
    pool.close()


async def test_a_thread_that_waits_for_the_next_call_holds_nothing_of_the_last_one() -> None:
    pool = Threads("t")
    payload = Payload()
    held = weakref.ref(payload)
    await pool.run(functools.partial(id, payload))
    del payload
    async with asyncio.timeout(SECONDS):
        while held() is not None:
            await asyncio.sleep(0.01)
    pool.close()


async def test_a_call_that_is_given_up_is_interrupted_and_its_thread_ends() -> None:
    pool, began, saw = Threads("t"), threading.Event(), list[str]()

    def hang() -> None:
        began.set()
        try:
            while True:
                time.sleep(0.001)
        except BaseException as error:
            saw.append(type(error).__name__)
            raise

    task = asyncio.create_task(pool.run(hang))
    await asyncio.to_thread(began.wait, SECONDS)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await nothing_stuck(pool)
    assert saw == ["CancelledError"]


async def test_an_interruption_in_the_moment_between_the_call_and_its_end_ends_the_thread_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, loop = Threads("t"), asyncio.get_running_loop()

    def wait_to_be_interrupted(_job: object) -> None:
        loop.call_soon_threadsafe(task.cancel)
        while True:
            time.sleep(0.001)

    monkeypatch.setattr(threads._Job, "_end", wait_to_be_interrupted)
    task = asyncio.create_task(pool.run(lambda: None))
    with pytest.raises(asyncio.CancelledError):
        await task
    await nothing_stuck(pool)


async def test_calls_that_are_given_up_at_any_moment_leave_no_thread_counted_as_stuck() -> None:
    pool = Threads("t")
    for steps in range(300):
        task = asyncio.create_task(pool.run(lambda: None))
        for _ in range(steps % 20):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    await nothing_stuck(pool)
    assert await pool.run(lambda: "still here") == "still here"
    pool.close()
