"""The CPU pool: processes for ``cpu=True`` handlers; one that crashes, hangs or eats memory takes only its own job with it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from multiprocessing.resource_tracker import ensure_running
from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec

from conveyor.core.settle import describe
from conveyor.errors import HandlerCrashed, HandlerError, HandlerTimeout, RemoteTraceback
from conveyor.runtime import frames, logs
from conveyor.runtime.attempt import Ran, Unsendable
from conveyor.runtime.channel import die_with_parent
from conveyor.runtime.context import Tell
from conveyor.runtime.metrics import resident_bytes

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

START_SECONDS: Final = 300.0
"""How long a process may take to start and to import the module of its first job."""
DEATH_SECONDS: Final = 1.0
"""Between the end of a process' line and its own end."""
REAP_SECONDS: Final = 0.01
"""Between two looks whether a process that ends has ended."""
LOOK_SECONDS: Final = 0.5
"""How often a busy process is looked at: whether it lives, and how much memory it uses."""
NEWS_SECONDS: Final = 0.05
"""Between two reports of a job's progress: what it says in between is not worth a message, the latest always is."""
MB: Final = 1_000_000


Invocation = Callable[[Callable[..., Any]], Any]
"""Calls a function in a process of the pool, with what it takes; it travels there by pickle."""


class Job(msgspec.Struct, frozen=True):
    """What a process is to run.

    Parameters:
        target: "module:qualified name" of a function, from the application's own registration, never from a message.
        call: calls it.
        about: what its log records are about.
        number: tells it from the jobs that the process has run before.
    """

    target: str
    call: Invocation
    about: logs.Current | None
    number: int


class Started(msgspec.Struct, frozen=True):
    """The function was found; it begins to run."""


class Progressed(msgspec.Struct, frozen=True):
    """How far a job has come, as Context.progress was told.

    Parameters:
        number: the job's; what an earlier one has left behind may still tell of that.
    """

    number: int
    done: float
    total: float | None
    note: str


class Returned(msgspec.Struct, frozen=True):
    """What it returned."""

    value: Any


class Raised(msgspec.Struct, frozen=True):
    """What it raised, or why that, its result or the function itself could not be had."""

    error: Exception
    traceback: str


class CpuPool:
    """Runs functions in processes of their own, one job each at a time. Processes are started when needed, and kept.

    They are spawned, not forked: a fork of a process with threads and connections inherits their locks and sockets.

    Parameters:
        size: processes at most.
        max_rss_bytes: memory over which a process is killed at its job, or replaced after it.

    Raises:
        HandlerError: this is a process of a pool itself, which imports the program that began to run workers.
    """

    def __init__(self, size: int, *, max_rss_bytes: int | None = None) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself knows it
            raise HandlerError(
                "workers with cpu=True are run while one of their processes imports the program; "
                'put what runs it below: if __name__ == "__main__":'
            )
        self._free = asyncio.Semaphore(size)
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._reaping: set[asyncio.Task[None]] = set()
        self._max_rss_bytes = max_rss_bytes
        self._draining = False
        self._numbers = itertools.count(1)

    async def call(
        self,
        target: str,
        call: Invocation,
        *,
        timeout_seconds: float | None = None,
        tell: Tell | None = None,
        began: Callable[[], object] | None = None,
    ) -> Any:
        """Run a function in a process and give its result. Cancelling kills the process.

        Parameters:
            target: "module:qualified name" of the function, or of what keeps it as its ``function`` (a task).
            call: called with the function in the process; what it returns is the result.
            timeout_seconds: for the run itself: not for the wait for a free process, nor for its start.
            tell: called with the progress that the function reports by ``inside.tell()``.
            began: called when a process begins to run it.

        Raises:
            HandlerTimeout: it ran too long, and was killed.
            HandlerCrashed: its process died, or used too much memory.
            HandlerError: the function cannot be found, or its arguments, result or error cannot be sent between processes.
            Exception: what the function raised.
        """
        async with self._free:
            number = next(self._numbers)
            try:
                job = frames.pack(Job(target, call, logs.current.get(), number))
            except Exception as error:
                raise HandlerError(
                    f"the arguments of {target} cannot be sent to another process: {describe(error)}"
                ) from error
            del call
            process = self._take()
            try:
                reply = await process.run(job, number, target, timeout_seconds, self._max_rss_bytes, tell, began)
            except BaseException:
                self._discard(process, "it was given up")
                raise
            self._put_back(process)
        if isinstance(reply, Raised):
            raise reply.error from RemoteTraceback(reply.traceback)
        return reply.value

    def drain(self) -> None:
        """Tell what runs, and what is yet to run, that the runner stops: ``inside.shutting_down``."""
        self._draining = True
        for process in self._all:
            process.nod()

    async def close(self) -> None:
        """Kill every process, with what it runs, and wait until they have ended."""
        atexit.unregister(self._kill_all)
        for process in tuple(self._all):
            self._discard(process, "the pool was closed")
        self._idle.clear()
        await asyncio.gather(*self._reaping)

    def _take(self) -> _Process:
        while self._idle:
            process = self._idle.pop()
            if process.alive:
                return process
            self._discard(process, "it died between two jobs")
        # multiprocessing's own clean-up at exit would wait for processes that ignore SIGTERM; this one runs before it.
        atexit.unregister(self._kill_all)
        atexit.register(self._kill_all)
        process = _Process.start()
        if self._draining:
            process.nod()
        self._all.add(process)
        return process

    def _put_back(self, process: _Process) -> None:
        if self._max_rss_bytes is not None and process.resident_bytes > self._max_rss_bytes:
            self._discard(process, "it was replaced")
        elif process in self._all:  # else the pool was closed meanwhile
            self._idle.append(process)

    def _discard(self, process: _Process, why: str) -> None:
        """Kill a process, and reap it in the background."""
        process.kill(why)
        if process in self._all:
            self._all.remove(process)
            task = asyncio.create_task(process.ended(), name="reap a process of the pool")
            self._reaping.add(task)
            task.add_done_callback(self._reaping.discard)

    def _kill_all(self) -> None:
        for process in self._all:
            process.kill("the interpreter ends")


class _Process:
    """One process, seen from the pool."""

    def __init__(self, process: SpawnProcess, line: socket.socket) -> None:
        self._process = process
        self._line = line
        self._busy = False
        self._listens = False
        self._nod_due = False
        self._next_look: asyncio.TimerHandle | None = None
        self._killed_for = ""

    @classmethod
    def start(cls) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs:
            ensure_running()  # first, because it changes the signal mask that is set below
            process = multiprocessing.get_context("spawn").Process(
                target=_serve, args=(theirs, logs.settings), name="conveyor-cpu", daemon=True
            )
            # A Ctrl-C in its first moments waits until the process has said that it does not want it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.setblocking(False)
        return cls(process, ours)

    @property
    def alive(self) -> bool:
        return not self._has_hung_up() and self._process.is_alive()

    def _has_hung_up(self) -> bool:
        try:
            return not self._line.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    @property
    def resident_bytes(self) -> int:
        return resident_bytes(self._process.pid)

    async def run(
        self,
        job: list[frames.Part],
        number: int,
        target: str,
        timeout_seconds: float | None,
        max_rss_bytes: int | None,
        tell: Tell | None,
        on_begin: Callable[[], object] | None,
    ) -> Returned | Raised:
        """Run one job; after an error the process is of no more use."""
        self._busy = True
        began = False
        self._look_soon(max_rss_bytes)
        try:
            async with _within(START_SECONDS, f"{target} did not start"):
                await frames.send_soon(self._line, job)
                self._listens = True
                if self._nod_due:
                    self.nod()
                while isinstance(first := await self._receive(), Progressed):
                    pass  # by a thread that an earlier job has left behind
            if not isinstance(first, Started):
                return first
            began = True
            if on_begin is not None:
                on_begin()
            async with _within(timeout_seconds, f"{target} ran too long"):
                while isinstance(reply := await self._receive(), Progressed):
                    if tell is not None and reply.number == number:
                        tell(reply.done, reply.total, reply.note)
            assert not isinstance(reply, Started)
            return reply
        except OSError:
            why = await self._why_it_ended()
            if began:
                raise HandlerCrashed(f"the process that ran {target} died: {why}") from None
            raise HandlerCrashed(
                f"a process died before it could run {target}: {why}; if that was its own doing, it said more on stderr"
            ) from None
        finally:
            if self._next_look is not None:
                self._next_look.cancel()
            self._busy = self._listens = False
            if self._killed_for:
                self._line.close()

    def nod(self) -> None:
        """Tell the job that runs here, or the next one, that the runner stops."""
        self._nod_due = not self._listens
        if self._listens:  # else a job may be on its way, and no place for anything between its parts
            with contextlib.suppress(OSError):
                self._line.send(frames.SIGNAL)

    def kill(self, why: str) -> None:
        """End it at once."""
        self._killed_for = self._killed_for or why
        self._process.kill()
        if self._busy:
            self._hang_up()
        else:
            self._line.close()

    async def ended(self) -> None:
        """Wait for the end of the process, and reap it."""
        # Not for the end of its sentinel or line: programs that it has started may hold these open.
        while self._process.is_alive():  # noqa: ASYNC110 - there is no event that all systems have
            await asyncio.sleep(REAP_SECONDS)

    async def _receive(self) -> Started | Progressed | Returned | Raised:
        frame = await frames.receive_soon(self._line)
        try:
            found: Started | Progressed | Returned | Raised = frame.value()
        except Exception as error:
            return Raised(HandlerError(f"the result cannot be read in this process: {describe(error)}"), "")
        return found

    def _look_soon(self, max_rss_bytes: int | None) -> None:
        self._next_look = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look, max_rss_bytes)

    def _look(self, max_rss_bytes: int | None) -> None:
        """Wake who waits for a process that has died, and kill one that uses too much memory."""
        if not self._process.is_alive():
            self._hang_up()  # a program that it has started may hold the other end
        elif max_rss_bytes is not None and (used := self.resident_bytes) > max_rss_bytes:
            self.kill(f"used {used / MB:.0f} MB, over {max_rss_bytes / MB:.0f} MB")
        else:
            self._look_soon(max_rss_bytes)

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):  # who waits for it is woken, and closes it
            self._line.shutdown(socket.SHUT_RDWR)

    async def _why_it_ended(self) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEATH_SECONDS):
                await self.ended()
        if self._killed_for:
            return self._killed_for
        code = self._process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


@contextlib.asynccontextmanager
async def _within(seconds: float | None, problem: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise HandlerTimeout(f"{problem}: its process was killed after {seconds:g} s") from None


# --- in the other process -----------------------------------------------------------------------------------------------

SHIELDED: Final = (signal.SIGINT, signal.SIGTERM)
"""Meant for the process that owns the pool: it decides what becomes of the jobs."""


class Inside:
    """The pool, seen from one of its processes.

    Parameters:
        line: to the process that owns the pool.
    """

    def __init__(self, line: socket.socket) -> None:
        self.shutting_down: Final = threading.Event()
        """Set when the runner drains."""
        self.jobs: Final[queue.SimpleQueue[frames.Frame]] = queue.SimpleQueue()
        self._line = line
        self._pid = os.getpid()
        self._sending = threading.Lock()
        self._latest: deque[Progressed] = deque(maxlen=1)
        self._told = threading.Event()
        self._teller: threading.Thread | None = None
        self.number = 0
        """The job that runs."""

    def listen(self) -> NoReturn:
        """Take jobs from the line; in a thread, so that the end of the pool ends the process whatever it is doing."""
        with contextlib.suppress(OSError):
            while True:
                frame = frames.receive(self._line)
                if frame.pickled:
                    self.jobs.put(frame)
                else:
                    self.shutting_down.set()
                del frame
        os._exit(0)

    def tell(self) -> Tell:
        """What reports how far the job has come that runs now; for nobody any more once another one runs.

        The first word goes at once, then the latest every NEWS_SECONDS. It never waits.
        """
        return functools.partial(self._progress, self.number)

    def _progress(self, number: int, done: float, total: float | None, note: str) -> None:
        if number != self.number:
            return
        self._latest.append(Progressed(number, done, total, note))
        if self._teller is None:
            self._teller = threading.Thread(target=self._tell, name="progress", daemon=True)
            self._teller.start()
        self._told.set()

    def reply(self, word: Started | Returned | Raised) -> None:
        """Say what has become of the job, behind the last of its progress."""
        if os.getpid() != self._pid:  # the job has forked, and this one has come back as well
            os._exit(0)
        parts = frames.pack(word)
        with self._sending:
            self._send_latest()
            frames.send(self._line, parts)

    def _tell(self) -> NoReturn:
        while True:
            self._told.wait()
            self._told.clear()
            with self._sending, contextlib.suppress(OSError):
                self._send_latest()
            time.sleep(NEWS_SECONDS)

    def _send_latest(self) -> None:
        with contextlib.suppress(IndexError):
            frames.send(self._line, frames.pack(self._latest.pop()))


inside: Inside | None = None
"""In a process of the pool: the way to its owner. None in any other process."""


def _serve(line: socket.socket, settings: logs.Settings | None) -> NoReturn:
    """Run jobs until the line ends."""
    global inside  # noqa: PLW0603 - a process is in one pool, if in any
    die_with_parent()
    for number in SHIELDED:
        signal.signal(number, _ignore)  # not SIG_IGN, which programs started by a handler would inherit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED)
    if settings is not None:
        settings.apply()
    inside = Inside(line)
    threading.Thread(target=inside.listen, name="pool", daemon=True).start()
    while True:
        _do(inside.jobs.get(), inside)


def _ignore(_number: int, _frame: object) -> None:
    pass


def _do(frame: frames.Frame, inside: Inside) -> None:
    target, send = "?", inside.reply
    try:
        job: Job = frame.value()
        target = job.target
        function = _find(target)
    except BaseException as error:  # an import may do anything, sys.exit() too
        send(Raised(HandlerError(f"{target} cannot be run in another process: {describe(error)}"), _trace_of(error)))
        return
    inside.number = job.number
    send(Started())
    logs.current.set(job.about)
    try:
        result = job.call(function)
    except Exception as error:
        send(Raised(_portable(error), _trace_of(error)))
        return
    except BaseException as error:  # sys.exit() ends the job, not the process, and not the runner either
        send(Raised(HandlerCrashed(f"{target} raised {describe(error)}"), _trace_of(error)))
        return
    try:
        send(Returned(frames.lent(result)))
    except Exception as error:
        unsendable = Unsendable(f"what {target} returned cannot be sent to another process: {describe(error)}")
        if isinstance(result, Ran):
            send(Returned(Ran(unsendable, result.emits)))
        else:
            send(Raised(unsendable, _trace_of(error)))


@functools.cache
def _find(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    function = getattr(found, "function", found)
    if not callable(function):
        raise HandlerError("it is no function")
    return function  # type: ignore[no-any-return] # what the application registered


def _portable(error: Exception) -> Exception:
    """The error, if it survives the way to the other process; else one with its text."""
    try:
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception as broken:
        return HandlerError(f"{describe(error)} (of a type that cannot be sent between processes: {describe(broken)})")
    return error if type(again) is type(error) else HandlerError(describe(error))


def _trace_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except Exception as broken:
        return f"{type(error).__name__} (its traceback cannot be written: {type(broken).__name__})"
