"""The writer: one thread for everything that a broker object does to its file; what has gathered goes into one commit.

While a commit is on its way to the disk, the next one gathers; the results of one reach the event loop by one call.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast
from weakref import WeakSet

import apsw

from conveyor.broker import Clock, Delivery, Settlement
from conveyor.brokers.sqlite.queue_file import BUSY_SECONDS, explain, why
from conveyor.brokers.sqlite.store import Claim, Store
from conveyor.brokers.sqlite.wake import WakeSockets
from conveyor.core.message import Message
from conveyor.core.settle import Done, Release
from conveyor.errors import BrokerError, BrokerFull, BrokerUnavailable, PublishFailed

POLL_SECONDS: Final = (0.05, 1.0)
"""A waiting fetch looks by itself, in case that nobody could wake it: soon after something happened, then ever more seldom."""
WITNESS_SECONDS: Final = 2.0
"""Who saw a process die can say more about it than a socket that does not answer, and has so long to say it (reclaim)."""
PYTHON_SWITCH_SECONDS, SWITCH_SECONDS = 0.005, 0.0002
"""How long a thread that wants the interpreter lets another one run on: as Python has it, and where this thread is.

It needs the interpreter for a moment after each call of SQLite, several times in a commit. Beside a busy event loop it would wait Python's
5 ms for each; with the shorter time a worker consumes a third more.
"""
FATAL: Final = (apsw.FullError, apsw.IOError, apsw.CorruptError)
"""No operation's fault: the whole transaction fails."""


@dataclass(eq=False, slots=True)
class Operation:
    """Something that the writer does inside a commit. The future belongs to the event loop."""

    future: asyncio.Future[Any] = field(init=False)


@dataclass(eq=False, slots=True)
class Publish(Operation):
    """Its result: the ids of those that no queue receives."""

    messages: Sequence[Message]
    queue: str | None = None
    """For this one alone."""


@dataclass(eq=False, slots=True)
class Settle(Operation):
    """Its result: the deliveries whose lease is lost."""

    settlements: Sequence[Settlement]


@dataclass(eq=False, slots=True)
class Fetch(Operation):
    """Its result: deliveries. It is parked while there are none."""

    queue: str
    limit: int
    early: bool = False
    """Also what is not ready."""


@dataclass(eq=False, slots=True)
class Call(Operation):
    """Anything that is rare. Its result: that of the function."""

    function: Callable[[Store], object]


_WAKE: Final = Operation()
"""Not an operation: somebody made something ready."""
_STOP: Final = Operation()
"""Not an operation: the last thing that the writer hears."""

_Outcome = tuple[Operation, object]
"""An operation with its result, or with the BrokerError that ended it."""


class Writer:
    """The thread that does everything to the file, in as few commits as there can be."""

    def __init__(self, store: Store, sockets: WakeSockets, clock: Clock) -> None:
        self._store = store
        self._file = store.file
        self._sockets = sockets
        self._clock = clock
        self._heard: queue.SimpleQueue[Operation] = queue.SimpleQueue()
        self._parked: dict[str, list[Fetch]] = {}
        self._times: dict[str, float] = {}
        """Queue of a parked fetch → when there will be something, as far as is known."""
        self._poll_seconds = POLL_SECONDS[0]
        self._untidy = True
        self._sweep: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Open the file; it raises here what is wrong with it."""
        if sys.getswitchinterval() == PYTHON_SWITCH_SECONDS:  # nobody has chosen another one
            sys.setswitchinterval(SWITCH_SECONDS)
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="conveyor-sqlite", daemon=True)
        self._thread.start()
        await opened
        _writers.add(self)

    async def stop(self) -> None:
        """Do what was asked until now, then close the file. Fetches that wait are told."""
        if self._sweep is not None:
            self._sweep.cancel()
        self._heard.put(_STOP)
        await asyncio.shield(self._ended)

    def stop_at_exit(self) -> None:
        """The program ends without closing the broker: its thread must not be inside SQLite when the interpreter goes."""
        self._heard.put(_STOP)
        self._thread.join(BUSY_SECONDS)

    def ask(self, operation: Operation) -> asyncio.Future[Any]:
        """Have an operation done; its result or error will be in the future."""
        operation.future = self._loop.create_future()
        self._heard.put(operation)
        return operation.future

    def wake(self) -> None:
        """Look whether there is something for the fetches that wait."""
        self._heard.put(_WAKE)

    def release(self, deliveries: Iterable[Delivery]) -> None:
        """Give back what was claimed for a caller who has gone."""
        self.ask(Settle([Settlement(each, Release()) for each in deliveries])).add_done_callback(_ignore)

    def sweep_soon(self) -> None:
        """Somebody is dead, or may be: give back what it held, unless its supervisor does."""
        if self._sweep is None:
            self._sweep = self._loop.call_later(WITNESS_SECONDS, self._do_sweep)

    def _do_sweep(self) -> None:
        self._sweep = None
        self.ask(Call(Store.sweep)).add_done_callback(_ignore)

    # What follows runs in the thread

    def _run(self, opened: asyncio.Future[None]) -> None:
        try:
            self._file.open()
        except Exception as error:  # told to whoever opens
            self._tell(resolve, opened, explain(error, self._file.path))
            return
        self._tell(resolve, opened, None)
        try:
            while self._step():
                pass
        finally:
            for fetches in self._parked.values():
                for fetch in fetches:
                    self._tell(resolve, fetch.future, BrokerUnavailable("the broker is closed"))
            self._file.close()
            self._tell(resolve, self._ended, None)

    def _tell(self, function: Callable[..., None], *values: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *values)
        except RuntimeError:  # the event loop is closed, without closing the broker: nobody is left to hear it
            self._heard.put(_STOP)

    def _step(self) -> bool:
        """Do what has gathered, or what time brings; False at the end."""
        operations: list[Operation] = []
        with contextlib.suppress(queue.Empty):
            operations.append(self._heard.get(timeout=self._patience()))
            while True:
                operations.append(self._heard.get_nowait())
        quiet = not operations
        going_on = _STOP not in operations
        asked = [each for each in operations if each not in (_WAKE, _STOP)]
        if quiet or _WAKE in operations:
            asked += self._timely()
        if asked:
            self._commit(asked)
            self._untidy = True
        elif quiet and self._untidy and self._poll_seconds >= POLL_SECONDS[1]:
            self._untidy = self._file.tidy()
        self._poll_seconds = min(2 * self._poll_seconds, POLL_SECONDS[1]) if quiet and not asked else POLL_SECONDS[0]
        return going_on

    def _patience(self) -> float | None:
        """Seconds until something is to be done unasked; None is never."""
        if self._parked:
            return max(0.0, min(self._poll_seconds, min(self._times.values(), default=math.inf) - self._clock()))
        return self._poll_seconds if self._untidy else None

    def _timely(self) -> list[Fetch]:
        """The fetches that wait, of those queues where there may be something by now."""
        found: list[Fetch] = []
        now = self._clock()
        for name, fetches in list(self._parked.items()):
            waiting = [each for each in fetches if not each.future.done()]
            self._unpark(name)
            if waiting and self._next_at(name, waiting) <= now:
                found += waiting
            else:
                self._park(waiting)
        return found

    def _next_at(self, name: str, fetches: Iterable[Fetch]) -> float:
        try:
            at = self._store.next_at(name, early=any(each.early for each in fetches))
        except apsw.Error:
            return 0.0  # the claim will say what is wrong
        return math.inf if at is None else at

    def _park(self, fetches: list[Fetch]) -> None:
        for fetch in fetches:
            parked = self._parked.setdefault(fetch.queue, [])
            parked.append(fetch)
            self._times[fetch.queue] = self._next_at(fetch.queue, parked)

    def _unpark(self, name: str) -> list[Fetch]:
        self._times.pop(name, None)
        return self._parked.pop(name, [])

    def _commit(self, operations: list[Operation]) -> None:
        """Do all of these in one transaction, and tell. On a full disk only those that end something are done."""
        beginning: list[Operation] = [each for each in operations if isinstance(each, Publish | Fetch)]
        ending = [each for each in operations if not isinstance(each, Publish | Fetch)]
        outcomes: list[_Outcome] = []
        try:
            self._file.check_same()
            if full := self._file.low_disk():
                outcomes = [(each, BrokerFull(full)) for each in beginning]
                beginning = []
            if ending or beginning:
                outcomes += self._transact(ending + beginning)
        except Exception as error:  # whatever it is, they must hear it, and the thread must live
            explained = explain(error, self._file.path)
            outcomes += [(each, explained) for each in beginning]
            if ending:
                outcomes += self._end_on_ballast(ending, explained)
        self._tell(_report, self, outcomes)

    def _end_on_ballast(self, operations: list[Operation], error: BrokerError) -> list[_Outcome]:
        """What is at work must be able to end, on a full disk too: it gets the space that was held for it."""
        try:
            if isinstance(error, BrokerFull) and self._file.drop_ballast():
                return self._transact(operations)
        except Exception as again:
            error = explain(again, self._file.path)
        return [(each, error) for each in operations]

    def _transact(self, operations: list[Operation]) -> list[_Outcome]:
        store = self._store
        fetches = [each for each in operations if isinstance(each, Fetch)]
        others = [each for each in operations if not isinstance(each, Fetch)]
        woken: list[Fetch] = []
        try:
            store.begin()
            outcomes = self._do(others)
            woken = [each for name in store.touched for each in self._unpark(name)]
            outcomes += self._claim(woken + fetches)
            store.commit()
        except BaseException:
            store.roll_back()
            self._park(woken)
            raise
        if store.touched:
            store.touched.clear()
            if not self._sockets.wake_others():
                self._tell(self.sweep_soon)
        return [(each, value.deliveries() if isinstance(value, Claim) else value) for each, value in outcomes]

    def _do(self, operations: list[Operation]) -> list[_Outcome]:
        try:
            return self._together(operations)
        except FATAL:
            raise
        except Exception:  # whatever it is, only the operation that caused it shall see it
            self._store.roll_back()
            self._store.begin()
            return [(each, self._alone(each)) for each in operations]

    def _together(self, operations: list[Operation]) -> list[_Outcome]:
        """The fast way: each kind as one batch. Anything unexpected raises."""
        publishes = [each for each in operations if isinstance(each, Publish)]
        settles = [each for each in operations if isinstance(each, Settle)]
        outcomes: list[_Outcome] = []
        if publishes:
            for each in publishes:
                if each.queue is not None:
                    self._store.insert(each.messages, each.queue)
            topical = [message for each in publishes if each.queue is None for message in each.messages]
            unheard = frozenset(self._store.insert(topical))
            outcomes += [
                (
                    each,
                    unheard.intersection([m.id for m in each.messages])
                    if unheard and each.queue is None
                    else frozenset[str](),
                )
                for each in publishes
            ]
        if settles:
            self._store.settle([settlement for each in settles for settlement in each.settlements])
            outcomes += [(each, []) for each in settles]
        outcomes += [(each, each.function(self._store)) for each in operations if isinstance(each, Call)]
        return outcomes

    def _alone(self, operation: Operation) -> object:
        """The careful way: an operation that fails fails for itself, and its error is the result."""
        store = self._store
        result: object
        store.begin_part()
        try:
            if isinstance(operation, Publish):
                result = self._publish_each(operation.messages, operation.queue)
            elif isinstance(operation, Settle):
                result = store.settle_with_care(operation.settlements)
            else:
                result = cast("Call", operation).function(store)
        except FATAL:
            raise
        except Exception as error:  # told to whoever asked for it
            store.undo_part()
            result = explain(error, self._file.path)
            if isinstance(operation, Settle):
                result = self._refusal(operation) or result
        store.end_part()
        return result

    def _refusal(self, settle: Settle) -> PublishFailed | None:
        """The likely cause of a settlement that fails: a message that it emits cannot be stored."""
        emits = [m for each in settle.settlements if isinstance(each.verdict, Done) for m in each.verdict.emits]
        refused = self._publish_each(emits)
        self._store.undo_part()
        return refused if isinstance(refused, PublishFailed) else None

    def _publish_each(self, messages: Sequence[Message], queue: str | None = None) -> frozenset[str] | PublishFailed:
        unheard: list[str] = []
        refused: dict[str, str] = {}
        for message in messages:
            try:
                unheard += self._store.insert([message], queue)
            except (*FATAL, BrokerError):
                raise
            except Exception as error:  # a value that cannot be stored: a statement that fails leaves nothing behind
                refused[str(message.id)] = why(error)
        return PublishFailed(refused) if refused else frozenset(unheard)

    def _claim(self, fetches: list[Fetch]) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        for fetch in fetches:
            if fetch.future.done():  # its caller has gone
                continue
            try:
                claim = self._store.claim(fetch.queue, fetch.limit, early=fetch.early)
            except BrokerError as error:
                outcomes.append((fetch, error))
                continue
            if claim is not None:
                outcomes.append((fetch, claim))
            else:
                self._park([fetch])
        return outcomes


def resolve(future: asyncio.Future[Any], value: object) -> None:
    """Its result, or the error that it raises, unless it has one already."""
    if future.done():
        return
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)


def _ignore(future: asyncio.Future[Any]) -> None:
    """Whatever came of it: where it failed, the leases end by themselves."""
    if not future.cancelled():
        future.exception()


def _report(writer: Writer, outcomes: list[_Outcome]) -> None:
    """On the event loop: everybody learns what came of it. What was claimed for a caller who has gone is released."""
    for operation, value in outcomes:
        if operation.future.done() and isinstance(operation, Fetch) and isinstance(value, list):
            writer.release(value)
        else:
            resolve(operation.future, value)


_writers: Final[WeakSet[Writer]] = WeakSet()


@atexit.register
def _stop_writers() -> None:
    for writer in tuple(_writers):
        writer.stop_at_exit()


os.register_at_fork(after_in_child=_writers.clear)
