"""What the CPU pool runs in its tests: good jobs and bad ones. Imported by the pool's processes."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from conveyor import Context, JobCancelled, Message
from conveyor.errors import Retry
from conveyor.runtime import pool


def add(one: int, other: int = 0) -> int:
    return one + other


def where() -> int:
    return os.getpid()


def count(most: int) -> Iterator[int]:
    yield from range(most)


def meet(path: str) -> str:
    """Come back only when the test has let both sides go."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        return line.recv(100).decode()


def hang(path: str) -> NoReturn:
    """Tell the test who hangs here; then never end."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        line.sendall(str(os.getpid()).encode())
    while True:
        time.sleep(60)


def hang_on(path: str) -> NoReturn:
    """The same in one instruction that no other thread of the process comes between."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        line.sendall(str(os.getpid()).encode())
    max(itertools.repeat(1))
    raise AssertionError("there is no end to that")


def leave(code: int) -> NoReturn:
    os._exit(code)


def start_a_program() -> int:
    """One that holds what this process has open and lets programs inherit."""
    return os.posix_spawn("/bin/sleep", ["sleep", "3600"], os.environ)


def leave_a_fork(path: str) -> NoReturn:
    """Die, and leave a copy of this process that holds what it had open until the test hangs up."""
    if os.fork() == 0:
        with contextlib.suppress(OSError):
            meet(path)
        os._exit(0)
    os._exit(3)


def come_back_twice() -> str:
    os.fork()
    return "twice"


def exit_politely() -> NoReturn:
    sys.exit(3)


def fault() -> None:
    ctypes.string_at(0)


def close_everything() -> None:
    """What programs do that turn themselves into daemons."""
    os.closerange(3, 100)


def eat() -> int:
    memory = [bytearray(os.urandom(1024) * 1024) for _ in range(300)]
    while True:
        memory.append(bytearray(1))
        time.sleep(0.1)


def grow_in_an_instant() -> int:
    """Grow between two looks, and stay large."""
    grown.extend(bytearray(os.urandom(1024) * 1024) for _ in range(300))
    return os.getpid()


grown: list[bytearray] = []


def fail(text: str) -> NoReturn:
    raise ValueError(text)


def ask_for_a_retry() -> NoReturn:
    raise Retry("later", after=5.0)


class Awkward(Exception):
    """Survives pickling, but not unpickling."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def fail_awkwardly() -> NoReturn:
    raise Awkward(1, 2)


def fail_with_a_lock() -> NoReturn:
    raise ValueError(threading.Lock())


def give_a_lock() -> Any:
    return threading.Lock()


def give_much(size: int) -> bytes:
    return b"x" * size


def log_a_line(text: str) -> None:
    logging.getLogger("shop").warning(text)


def terminate_a_program() -> int:
    """Whether a program started by a job can be told to end."""
    program = subprocess.Popen(["sleep", "3600"])
    program.terminate()
    return program.wait()


class Registered:
    """A function wrapped as a task."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self) -> NoReturn:
        raise AssertionError("the wrapper is not what the pool runs")


@Registered
def wrapped() -> str:
    return "unwrapped"


class Counting:
    """Calls a function with a way to report progress."""

    def __call__(self, function: Callable[..., Any]) -> Any:
        assert pool.inside is not None
        return function(pool.inside.tell())


def report_often(progress: Callable[[float, float | None, str], None]) -> str:
    for done in range(10_000):
        progress(done + 1, 10_000, f"step {done + 1}")
    return "counted"


class At(msgspec.Struct, frozen=True):
    """Calls a function with a way to report progress, and where to meet the test."""

    path: str

    def __call__(self, function: Callable[..., Any]) -> Any:
        return function(self.path)


def report_and_meet(path: str) -> str:
    assert pool.inside is not None
    pool.inside.tell()(1, None, "half")
    return meet(path)


def await_the_nod(path: str) -> str:
    assert pool.inside is not None
    said = meet(path)
    deadline = time.monotonic() + 60
    while not pool.inside.shutting_down.is_set() and time.monotonic() < deadline:
        time.sleep(0.01)
    return said if pool.inside.shutting_down.is_set() else "nobody nodded"


def leave_a_thread_that_reports() -> None:
    """Such as a handler that does not wait for the threads it has started."""

    assert pool.inside is not None
    tell = pool.inside.tell()

    def report() -> None:
        while True:
            tell(99, 100, "I am still here")
            time.sleep(0.001)

    threading.Thread(target=report, daemon=True).start()


def kinds(*values: object) -> list[tuple[str, int]]:
    return [(type(value).__name__, len(value)) for value in values]  # type: ignore[arg-type]


def give_back(value: Any) -> Any:
    return value


# --- handlers -----------------------------------------------------------------------------------------------------------


INJECTED: Any = None
"""The runner fills it in."""


@dataclass(frozen=True)
class Picture:
    name: str
    data: bytes


@dataclass(frozen=True)
class Seen:
    name: str
    where: int


def report_half(path: str, context: Context = INJECTED) -> str:
    context.progress(1, 2, "half")
    return meet(path)


def look(picture: Picture, context: Context = INJECTED, message: Message = INJECTED) -> Seen:
    """What a worker in a process of the pool is given, and may say."""
    context.publish(Seen(f"published on attempt {context.attempt}", len(message.body)))
    assert context.message == message
    assert context.idempotency_key
    context.log.info("looked")
    return Seen(picture.name, len(picture.data))


def look_at_raw(body: bytes) -> Seen:
    return Seen(type(body).__name__, len(body))


def scale(picture: Picture, by: int = 2) -> Picture:
    return Picture(picture.name, picture.data * by)


def keep_to_itself(context: Context = INJECTED) -> Callable[[], int]:
    context.publish(Picture("kept", b""))
    return lambda: context.attempt


def give_itself_up() -> NoReturn:
    raise JobCancelled("nobody wants it any more")


async def publish_now_there(context: Context) -> None:
    await context.publish_now(Seen("x", 1))


def try_to_publish_now(context: Context = INJECTED) -> None:
    asyncio.run(publish_now_there(context))


def await_the_drain(path: str, context: Context = INJECTED) -> str:
    said = meet(path)
    deadline = time.monotonic() + 60
    while not context.shutting_down and time.monotonic() < deadline:
        time.sleep(0.01)
    return said
