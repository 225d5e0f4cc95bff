"""The application: what users declare their workers on, publish with, and run."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import logging
import math
import os
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, Self, TypeVar, Unpack, overload

from conveyor import brokers
from conveyor.broker import DEFAULT_BODY_LIMIT, DEFAULT_LEASE_SECONDS, Broker, Clock, Queue
from conveyor.core.codec import codec_for, struct_for
from conveyor.core.events import EventType, check_topic, event_type
from conveyor.core.handler import Mode, Plan, plan_task, plan_worker
from conveyor.core.jobs import Job
from conveyor.core.message import Message
from conveyor.core.pause import Switches
from conveyor.core.retry import RetryPolicy
from conveyor.errors import (
    ConfigurationError,
    ConveyorError,
    HandlerError,
    JobError,
    JournalError,
    NoSubscriber,
    PayloadError,
)
from conveyor.runtime.background import Background
from conveyor.runtime.call import Middleware, Surroundings, is_transaction
from conveyor.runtime.carry import Carry
from conveyor.runtime.connection import Connection
from conveyor.runtime.context import Context
from conveyor.runtime.journal import IN_MEMORY, LAST_FLUSH_SECONDS
from conveyor.runtime.loop import DEFAULT_GRACE_SECONDS
from conveyor.runtime.metrics import Metrics
from conveyor.runtime.outgoing import NO_OPTIONS, Options, Outgoing, Publishing
from conveyor.runtime.providers import Provider, open_all, provider_of
from conveyor.runtime.pull import HELD, Pull
from conveyor.runtime.task import Task
from conveyor.runtime.ticket import Ticket, gather
from conveyor.runtime.watch import BUFFER, Watch
from conveyor.runtime.worker import (
    DEEPEST_PREFETCH,
    DEFAULT_CONCURRENCY,
    DEFAULT_TIMEOUT_SECONDS,
    PREFETCH_PER_SLOT,
    Native,
    Worker,
)

if TYPE_CHECKING:
    from conveyor.runtime.keeper import Keeper
    from conveyor.runtime.ledger import Ledger
    from conveyor.runtime.runner import Runner
    from conveyor.runtime.transaction import Transaction

log = logging.getLogger("conveyor.app")

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Seconds = float | timedelta

BATCHES_AT_ONCE: Final = 1
"""A batch is made to be large; two at once would each be half of it."""
PORTABLE: Final = (Context, Message)
"""What the runner can also hand to a handler in another process."""


class Conveyor:
    """An application: a name, its workers, and the broker that carries its messages.

    Parameters:
        name: begins the names of its queues.
        broker: a URL or a Broker; left out, $CONVEYOR_BROKER, else a SQLite file named after the application.
        database: the SQLAlchemy URL (async driver) of the database that handlers' transactions are in; left out, $CONVEYOR_DATABASE.
        body_limit: bytes that no payload may exceed.
        journal: whether what happens to every message is kept, for ``conveyor trace``, ``conveyor jobs`` and the tickets of tasks; or
            the file where. True leaves it to $CONVEYOR_JOURNAL to name another file than the usual one; left out, $CONVEYOR_JOURNAL also
            says whether.
        migrate: whether opening creates Conveyor's tables in the database; left out, on SQLite only (`conveyor migrate` does it elsewhere).
        clock: gives Unix seconds; tests turn it.

    Raises:
        ConfigurationError: the name is no valid name.
    """

    def __init__(
        self,
        name: str,
        *,
        broker: str | Broker | None = None,
        database: str | None = None,
        body_limit: int = DEFAULT_BODY_LIMIT,
        journal: bool | str | Path | None = None,
        migrate: bool | None = None,
        clock: Clock = time.time,
    ) -> None:
        self.name: Final = check_topic(name)
        self.broker_url: str | None = None
        self.database_url: str | None = database
        self.owner: str | None = None
        """The identity under which its broker holds leases; a supervisor sets it, so that it can reclaim them."""
        self.max_rss_bytes: int | None = None
        """How large a process of the pool for cpu=True may grow before its attempt is ended; `conveyor run --max-rss` sets it."""
        self.switches: Switches | None = None
        """What is known of paused queues: given (if only empty) its runners listen to orders; `conveyor run` sets it."""
        self.number: str | None = None
        """The number of this process below its supervisor; `conveyor run` sets it."""
        self.metrics: Metrics = Metrics(name, clock=clock)
        self._given_broker: Broker | None = None
        if isinstance(broker, str):
            self.broker_url = broker
        else:
            self._given_broker = broker
        self._journal: bool | str | Path | None = journal
        self._migrate = migrate
        self._clock = clock
        self._outgoing = Outgoing(clock, body_limit)
        self._workers: dict[str, Callable[[], Worker]] = {}
        self._built: dict[str, Worker] = {}
        self._providers: dict[Any, Provider] = {}
        self._middleware: list[Middleware] = []
        self._carries: list[Carry] = []
        self._replaced: dict[Any, Any] = {}
        self._connections: dict[asyncio.AbstractEventLoop, Connection] = {}
        self._connecting: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._entered = 0
        self._unrouted: set[str] = set()
        self._background: Background | None = None

    # --- declaring ----------------------------------------------------------------------------------------------------

    @overload
    def worker(self, function: F, /) -> F: ...
    @overload
    def worker(
        self,
        /,
        *,
        name: str | None = None,
        queue: str | None = None,
        topic: str | None = None,
        retry: RetryPolicy | None = None,
        concurrency: int | None = None,
        prefetch: int | None = None,
        timeout: Seconds | None = DEFAULT_TIMEOUT_SECONDS,
        batch: int | None = None,
        cpu: bool = False,
        ordered: bool = False,
        lease: Seconds = DEFAULT_LEASE_SECONDS,
        max_length: int | None = None,
        **native: Unpack[Native],
    ) -> Callable[[F], F]: ...
    def worker(
        self,
        function: F | None = None,
        /,
        *,
        name: str | None = None,
        queue: str | None = None,
        topic: str | None = None,
        retry: RetryPolicy | None = None,
        concurrency: int | None = None,
        prefetch: int | None = None,
        timeout: Seconds | None = DEFAULT_TIMEOUT_SECONDS,
        batch: int | None = None,
        cpu: bool = False,
        ordered: bool = False,
        lease: Seconds = DEFAULT_LEASE_SECONDS,
        max_length: int | None = None,
        **native: Unpack[Native],
    ) -> F | Callable[[F], F]:
        """Declare a worker: it receives its first parameter's type and publishes what it returns. The function stays what it was.

        Parameters:
            name: instead of the function's; unique in the application.
            queue: instead of ``<application>.<worker>``.
            topic: instead of the payload type's own; needed where the payload is dict or bytes.
            retry: when a failed attempt is repeated; left out, RetryPolicy().
            concurrency: messages handled at once in one process; left out, 100 (async), 10 (threads), one per core (cpu=True), and 1 with
                batch.
            prefetch: messages one process holds at most; left out, twice the concurrency (times batch), and up to ten times that while
                its handlers are so quick that none waits for long.
            timeout: seconds (or timedelta) one attempt may take; None for as long as it likes.
            batch: handle up to so many messages in one call; the first parameter is a list then.
            cpu: run it in a pool of processes.
            ordered: messages with the same key one after the other, in the order of publishing.
            lease: seconds (or timedelta) after which the messages of a process without a sign of life go to others.
            max_length: how many messages may wait; beyond, the oldest are dropped.
            native: exchange, exchange_type, routing_key, dead_queue, queue_type and passive, for a queue or an exchange on RabbitMQ that
                other programs share; see conveyor.runtime.worker.Native.

        Raises:
            HandlerError: the signature or an option cannot work; says what to change.
        """
        frame = sys._getframe(1)
        names = frame.f_locals if frame.f_locals is not frame.f_globals else None

        def register(function: F) -> F:
            plan = plan_worker(function, topic=topic, batch=batch is not None, cpu=cpu, portable=PORTABLE, names=names)
            known_as = check_topic(name or function.__name__)
            self._check_batch(plan, batch)
            lanes = self._concurrency(
                function, plan.mode, BATCHES_AT_ONCE if concurrency is None and batch else concurrency
            )
            _at_least_one(function, prefetch=prefetch, batch=batch, max_length=max_length)
            _positive(function, lease=lease, timeout=timeout)
            _check_retry(function, retry)
            if plan.mode is not Mode.ASYNC and any(is_transaction(p.type) for p in plan.injected):
                raise HandlerError(
                    f"handler {function.__qualname__} takes a Transaction, which can only be awaited: make it async def"
                )
            held = prefetch or lanes * PREFETCH_PER_SLOT * (batch or 1)
            declared = Queue(
                name=check_topic(queue or f"{self.name}.{known_as}"),
                topics=tuple(event.topic for event in plan.receives),
                ordered=ordered,
                max_length=max_length,
                lease_seconds=_seconds(lease),
                native=_native(function, native),
            )
            codecs = {event.topic: codec_for(event.type) for event in plan.receives}
            for event in plan.emits:
                codec_for(event.type)
            built = Worker(
                known_as,
                f"{self.name}.{known_as}",
                plan,
                declared,
                codecs,
                retry or RetryPolicy(),
                lanes,
                held,
                prefetch or held * DEEPEST_PREFETCH,
                None if timeout is None else _seconds(timeout),
                batch or 1,
            )
            self._add(known_as, lambda: built)
            return function

        return register if function is None else register(function)

    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
        queue: str | None = None,
        retry: RetryPolicy | None = None,
        concurrency: int | None = None,
        prefetch: int | None = None,
        timeout: Seconds | None = DEFAULT_TIMEOUT_SECONDS,
        cpu: bool = False,
        lease: Seconds = DEFAULT_LEASE_SECONDS,
        max_length: int | None = None,
        **native: Unpack[Native],
    ) -> Callable[[Callable[P, R]], Task[P, R]]: ...
    def task(
        self,
        function: Callable[P, R] | None = None,
        /,
        *,
        name: str | None = None,
        queue: str | None = None,
        retry: RetryPolicy | None = None,
        concurrency: int | None = None,
        prefetch: int | None = None,
        timeout: Seconds | None = DEFAULT_TIMEOUT_SECONDS,
        cpu: bool = False,
        lease: Seconds = DEFAULT_LEASE_SECONDS,
        max_length: int | None = None,
        **native: Unpack[Native],
    ) -> Task[P, R] | Callable[[Callable[P, R]], Task[P, R]]:
        """Declare a job: the function's own parameters, except injected ones, are the payload. The options are those of worker().

        Raises:
            HandlerError: the signature or an option cannot work; says what to change.
        """
        frame = sys._getframe(1)
        names = frame.f_locals if frame.f_locals is not frame.f_globals else None

        def register(function: Callable[P, R]) -> Task[P, R]:
            _at_least_one(function, prefetch=prefetch, max_length=max_length)
            _positive(function, lease=lease, timeout=timeout)
            _check_retry(function, retry)
            plan_task(function, injectable=_Injectable(self._providers), cpu=cpu, portable=PORTABLE, names=names)
            known_as = check_topic(name or function.__name__)
            own = check_topic(queue or f"{self.name}.{known_as}")

            def build() -> Worker:  # only when it is used: a provider may be declared below the task
                plan = plan_task(
                    function, injectable=_Injectable(self._providers), cpu=cpu, portable=PORTABLE, names=names
                )
                struct = struct_for(known_as, [(p.name, p.type, p.default) for p in plan.fields or ()])
                lanes = self._concurrency(function, plan.mode, concurrency)
                held = prefetch or lanes * PREFETCH_PER_SLOT
                declared = Queue(
                    name=own,
                    topics=(f"{self.name}.{known_as}",),
                    max_length=max_length,
                    lease_seconds=_seconds(lease),
                    native=_native(function, native),
                )
                return Worker(
                    known_as,
                    f"{self.name}.{known_as}",
                    plan,
                    declared,
                    {declared.topics[0]: codec_for(struct)},
                    retry or RetryPolicy(),
                    lanes,
                    held,
                    prefetch or held * DEEPEST_PREFETCH,
                    None if timeout is None else _seconds(timeout),
                    1,
                )

            self._add(known_as, build)
            return Task(self, known_as, function, lambda: self.workers[known_as])

        return register if function is None else register(function)

    def provide(self, function: F) -> F:
        """Declare what handlers may ask for by type: a function, or a generator that cleans up behind its one yield.

        Raises:
            HandlerError: the annotations do not say what it provides or needs.
        """
        frame = sys._getframe(1)
        provider = provider_of(function, frame.f_locals)
        self._providers[provider.type] = provider
        self._built.clear()
        return function

    def use(self, middleware: Middleware) -> None:
        """Wrap every handler: ``async def middleware(call, next)``, which awaits ``next(call)``. The first one is the outermost.

        Raises:
            HandlerError: it is not async, or does not take these two.
        """
        called = middleware if inspect.isroutine(middleware) else getattr(middleware, "__call__", None)  # noqa: B004 - the method
        if not inspect.iscoroutinefunction(called) or len(inspect.signature(middleware).parameters) != 2:
            raise HandlerError(
                f"{middleware!r} is no middleware; write: async def middleware(call: Call, next: Next) -> object"
            )
        self._middleware.append(middleware)

    def carry(self, header: str, *, log: str | None = None, make: Callable[[Message], str] | None = None) -> None:
        """Carry a header on: from the message being handled to everything that its handler publishes.

        ``conveyor.carried()`` gives a handler what is carried, for its calls to other services.

        Parameters:
            header: its name, such as X-Request-ID; of messages that arrive, in any case.
            log: what its value is called in the log lines about the message; left out, it is not in them.
            make: makes up the value for a message that comes without one, the same for every delivery of the message
                (``lambda message: message.id``); left out, nothing is carried then.
        """
        self._carries.append(Carry(header, log, make))

    @property
    def workers(self) -> Mapping[str, Worker]:
        """Workers and tasks by name."""
        for name, build in self._workers.items():
            if name not in self._built:
                self._built[name] = build()
        return MappingProxyType(self._built)

    @property
    def providers(self) -> Mapping[Any, Provider]:
        """What handlers may ask for, by type."""
        return MappingProxyType(self._providers)

    # --- publishing ---------------------------------------------------------------------------------------------------

    async def publish(
        self, event: object, *, require_subscriber: bool = False, **options: Unpack[Publishing]
    ) -> Message:
        """Publish an event; returns when the broker durably has it.

        Parameters:
            event: a dataclass, Struct, model or TypedDict; or dict or bytes with topic=.
            require_subscriber: an event that no queue receives is an error.
            options: topic, key, delay, at, priority, id, expires, headers; see conveyor.runtime.outgoing.Options.

        Raises:
            PayloadError: the event does not fit its own type, is too large, or has no topic.
            NoSubscriber: no queue receives it, and require_subscriber.
            BrokerError: the broker does not have it.
        """
        connection = await self.connect()
        message = self._outgoing.fresh(event, Options(**options) if options else NO_OPTIONS)
        unrouted = await connection.broker.publish((message,))
        self.metrics.published += 1
        if connection.journal is not None:
            connection.journal.published(message, nowhere=bool(unrouted))
        if unrouted:
            self._note_unrouted(message, required=require_subscriber)
        return message

    def publish_sync(
        self, event: object, *, require_subscriber: bool = False, **options: Unpack[Publishing]
    ) -> Message:
        """publish() for code without an event loop: scripts, threads, synchronous frameworks.

        Raises:
            ConveyorError: it is called in a thread with a running loop, which it would block; await publish() there.
        """
        work = self.publish(event, require_subscriber=require_subscriber, **options)
        return self.wait_here(work, "publish_sync", "app.publish(…)")

    def wait_here(self, work: Coroutine[Any, Any, T], called: str, instead: str) -> T:
        """Run work of this application to its end, for code without an event loop.

        Parameters:
            called, instead: what the caller was, and what to await where there is an event loop.

        Raises:
            ConveyorError: it is called in a thread with a running loop, which it would block.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            work.close()
            raise ConveyorError(f"{called} would block the event loop that runs here; use: await {instead}")
        begins = False
        with self._lock:
            self._forget_others()
            running = next((loop for loop in self._connections if loop.is_running()), None)
            if running is None and self._background is None:
                self._background = Background(f"{self.name} publishing")
                begins = True
        if running is not None:
            return asyncio.run_coroutine_threadsafe(work, running).result()
        assert self._background is not None
        try:
            return self._background.run(work)
        finally:
            if begins:  # only now, so that it comes before what the broker does at the end
                atexit.register(self._note_the_last)

    def _note_the_last(self) -> None:
        """A program that ends lets the journal know what it has published in its last moments."""
        connection = next(iter(self._connections.values()), None)
        if (
            self._process == os.getpid()
            and self._background
            and connection is not None
            and connection.journal is not None
        ):
            with contextlib.suppress(Exception):  # the program has done what it wanted, and ends
                self._background.run(asyncio.wait_for(connection.journal.flush(), LAST_FLUSH_SECONDS))

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def ticket(self, id: str) -> Ticket[Any]:
        """The ticket of a job that was sent before, perhaps by another program; Task.ticket() knows its result's type, too.

        Parameters:
            id: the job's: Ticket.id.
        """
        return Ticket(self, id)

    @overload
    async def gather(
        self,
        tickets: Sequence[Ticket[T]],
        *,
        timeout: Seconds | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        return_errors: Literal[False] = False,
    ) -> list[T]: ...
    @overload
    async def gather(
        self,
        tickets: Sequence[Ticket[T]],
        *,
        timeout: Seconds | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        return_errors: Literal[True],
    ) -> list[T | JobError | PayloadError]: ...
    async def gather(
        self,
        tickets: Sequence[Ticket[T]],
        *,
        timeout: Seconds | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        return_errors: bool = False,
    ) -> list[Any]:
        """The results of several jobs, in the order of their tickets, as soon as all have ended.

        Parameters:
            timeout: seconds (or timedelta) to wait; None is as long as it takes.
            on_progress: called with how many have ended and how many there are, at first and each time that one ends.
            return_errors: put the error in the place of a result that cannot be had; else the first one is raised at once.

        Raises:
            JobError: as Ticket.result() raises it.
            ConfigurationError: the journal is off.
        """
        return await gather(self, tickets, timeout=timeout, on_progress=on_progress, return_errors=return_errors)

    @overload
    def gather_sync(
        self,
        tickets: Sequence[Ticket[T]],
        *,
        timeout: Seconds | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        return_errors: Literal[False] = False,
    ) -> list[T]: ...
    @overload
    def gather_sync(
        self,
        tickets: Sequence[Ticket[T]],
        *,
        timeout: Seconds | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        return_errors: Literal[True],
    ) -> list[T | JobError | PayloadError]: ...
    def gather_sync(
        self,
        tickets: Sequence[Ticket[T]],
        *,
        timeout: Seconds | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        return_errors: bool = False,
    ) -> list[Any]:
        """gather() for code without an event loop; on_progress is called in another thread."""
        work = gather(self, tickets, timeout=timeout, on_progress=on_progress, return_errors=return_errors)
        return self.wait_here(work, "gather_sync", "app.gather(…)")

    async def connect_journal(self) -> Connection:
        """The open connection, with its journal.

        Raises:
            ConfigurationError: the journal is off.
        """
        connection = await self.connect()
        if connection.journal is None:
            raise ConfigurationError(self._lacks_journal)
        return connection

    def result_type(self, job: Job) -> Any:
        """The type of what a job returns, where this application declares it; else Any, which is plain JSON."""
        by_identity = {worker.identity: worker for worker in self.workers.values()}
        worker = by_identity.get(job.worker or job.topic)
        return Any if worker is None else worker.plan.returns

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """A transaction of the application's database: rows and events together, or not at all.

        Raises:
            ConfigurationError: the application has no database.
        """
        connection = await self.connect()
        ledger, relay = connection.ledger, connection.relay
        if ledger is None or relay is None:
            raise ConfigurationError(self._lacks_database)
        async with ledger.transaction(inbox=None, make=self._outgoing.fresh_now) as transaction:
            yield transaction
        relay.hand_off(transaction.committed)

    def watch(
        self,
        event: type[T],
        *,
        topic: str | None = None,
        where: Callable[[T], bool] | None = None,
        buffer: int = BUFFER,
    ) -> Watch[T]:
        """A live tail: the events of a type as they are published, from now on. Needs a connected application.

        Parameters:
            where: events for which it is false are left out.
            buffer: how many events a slow reader may be behind before it misses the oldest.
        """
        payload: Any = event
        kind = EventType(payload, topic) if topic is not None else event_type(payload)
        return self._connected.watches.watch(kind.topic, codec_for(kind.type), where, buffer)

    def pull(
        self,
        event: type[T],
        *,
        topic: str | None = None,
        queue: str | None = None,
        retry: RetryPolicy | None = None,
        lease: Seconds = DEFAULT_LEASE_SECONDS,
        max_length: int | None = None,
        prefetch: int = HELD,
    ) -> Pull[T]:
        """A queue of its own for the events of a type, for code that takes them one by one: ``async with app.pull(Order) as orders``.

        Parameters:
            topic: instead of the type's own.
            queue: instead of ``<application>.<topic>``.
            retry: when a failed attempt is repeated; left out, RetryPolicy().
            lease: seconds (or timedelta) that a message may be held without a sign of life (Pulled.extend).
            max_length: how many messages may wait; beyond, the oldest are dropped.
            prefetch: messages that may be held at once and are not settled.
        """
        payload: Any = event
        kind = EventType(payload, topic) if topic is not None else event_type(payload)
        declared = Queue(
            name=check_topic(queue or f"{self.name}.{kind.topic}"),
            topics=(kind.topic,),
            max_length=max_length,
            lease_seconds=_seconds(lease),
        )

        return Pull(self.connect, declared, codec_for(kind.type), retry or RetryPolicy(), self._outgoing, prefetch)

    # --- running ------------------------------------------------------------------------------------------------------

    @property
    def broker(self) -> Broker:
        """The open broker.

        Raises:
            ConfigurationError: the application is not connected.
        """
        return self._connected.broker

    @property
    def ledger(self) -> Ledger:
        """The open ledger.

        Raises:
            ConfigurationError: the application is not connected, or has no database.
        """
        ledger = self._connected.ledger
        if ledger is None:
            raise ConfigurationError(self._lacks_database)
        return ledger

    async def __aenter__(self) -> Self:
        await self.connect()
        self._entered += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            await self.close()

    async def connect(self) -> Connection:
        """Open broker and database, and declare all queues. ``async with app`` does it, and closes them again."""
        loop = asyncio.get_running_loop()
        self._forget_others()
        if (connection := self._connections.get(loop)) is not None:
            return connection
        async with self._connecting.setdefault(loop, asyncio.Lock()):
            if loop not in self._connections:
                # What a supervisor knows is the first loop's: one identity is one broker object's, and no other one's.
                broker = self.new_broker(self.owner if next(iter(self._connecting), loop) is loop else None)
                self._connections[loop] = await Connection.open(
                    self.name,
                    broker,
                    [worker.queue for worker in self.workers.values()],
                    self.new_ledger(broker.owner),
                    owns_broker=broker is not self._given_broker,
                    migrate=self._migrate,
                    metrics=self.metrics,
                    clock=self._clock,
                    journal=self.journal_place(broker) is not None,
                    number=self.number,
                )
        return self._connections[loop]

    async def close(self) -> None:
        """Let go of broker and database."""
        loop = asyncio.get_running_loop()
        connection = self._connections.pop(loop, None)
        self._connecting.pop(loop, None)
        if connection is not None:
            await connection.close()

    @contextlib.asynccontextmanager
    async def running(
        self,
        workers: Collection[str] | None = None,
        *,
        grace_seconds: float | None = DEFAULT_GRACE_SECONDS,
        keeper: bool = True,
    ) -> AsyncIterator[Runner]:
        """Run the workers in this event loop while the block lasts, then drain.

        Parameters:
            workers: names of those to run; None is all.
            grace_seconds: how long handlers may take to finish at the end; None is as long as they take.
            keeper: keep the journal in this process, where it is on; False where another one does (`conveyor journal`).

        Raises:
            ConfigurationError: a name is unknown, or a handler asks for what nobody provides.
        """
        async with self:
            connection = await self.connect()
            async with contextlib.AsyncExitStack() as stack:
                if keeper and connection.journal is not None:
                    try:
                        await stack.enter_async_context(self.keeper(connection.broker))
                    except JournalError as error:  # work does not depend on it
                        log.error("no journal is kept here: %s", error)
                runner = await self._runner(connection, self._chosen(workers), stack)
                await runner.start()
                try:
                    yield runner
                finally:
                    await runner.drain(grace_seconds)
                    if connection.journal is not None:
                        await connection.journal.flush()

    def keeper(self, broker: Broker) -> Keeper:
        """What keeps the journal while it is entered (``async with``).

        Parameters:
            broker: open.

        Raises:
            ConfigurationError: the journal is off.
        """
        from conveyor import config
        from conveyor.runtime.archive import Archive
        from conveyor.runtime.keeper import Keeper

        place = self.journal_place(broker)
        if place is None:
            raise ConfigurationError(self._lacks_journal)
        age_seconds, size_bytes = config.journal_limits()
        archive = Archive(place, age_seconds=age_seconds, size_bytes=size_bytes, clock=self._clock)
        return Keeper(self.name, broker, archive, self._clock)

    def journal_place(self, broker: Broker) -> Path | str | None:
        """Where the journal of this application is kept, on this broker; None where it is off.

        The code says whether, the environment may say where: a path in $CONVEYOR_JOURNAL counts unless the code names one itself.

        Raises:
            ConfigurationError: the settings make no sense.
        """
        from conveyor import config
        from conveyor.runtime.journal import place

        said = config.journal(self._journal)
        if not said:
            return None
        url = None if self._given_broker is not None else config.broker_url(self.name, self.broker_url)
        return place(self.name, said, broker, url)

    async def migrate(self) -> list[str]:
        """Create or bring up to date Conveyor's tables in the application's database; returns what was done.

        Raises:
            ConfigurationError: the application has no database.
        """
        ledger = self.new_ledger(uuid.uuid4().hex)
        if ledger is None:
            raise ConfigurationError(self._lacks_database)
        try:
            return await ledger.migrate()
        finally:
            await ledger.close()

    async def handing_off(self) -> bool:
        """Whether events of finished transactions are still on their way to the broker."""
        ledger = self._connected.ledger
        if ledger is None:
            return False
        pending = await ledger.pending()
        return pending.rows > pending.parked

    @contextlib.contextmanager
    def replaced(
        self, *, broker: Broker, clock: Clock, provide: Mapping[Any, Any] | None = None, database: str | None = None
    ) -> Iterator[None]:
        """For tests: another (open) broker, clock, database and other provided objects, while the block lasts.

        Raises:
            ConfigurationError: the application is connected.
        """
        if self._connections:
            raise ConfigurationError(f"{self.name} is connected; replace things before it is")
        before = self._given_broker, self._clock, self._outgoing.clock, self.database_url, self._replaced, self.metrics
        journal = self._journal
        self._given_broker, self._clock, self._outgoing.clock = broker, clock, clock
        self.database_url = database or self.database_url
        self._replaced = dict(provide or {})
        self._journal = self.journal_place(broker) is not None and IN_MEMORY  # not where the real one is
        self.metrics = Metrics(self.name, clock=clock)
        try:
            yield
        finally:
            self._given_broker, self._clock, self._outgoing.clock, self.database_url, self._replaced, self.metrics = (
                before
            )
            self._journal = journal

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _connected(self) -> Connection:
        """The connection of the event loop that runs here; outside of any, the only one there is."""
        try:
            found = self._connections.get(asyncio.get_running_loop())
        except RuntimeError:
            found = next(iter(self._connections.values())) if len(self._connections) == 1 else None
        if found is None:
            raise ConfigurationError(f"{self.name} is not connected here: async with app: … (or app.running())")
        return found

    def _forget_others(self) -> None:
        """Let go of what cannot be used any more: connections of event loops that have ended, and of the process before a fork."""
        if self._process != os.getpid():
            self._process, self._background = os.getpid(), None
            self._connections, self._connecting, self.owner, self.number = {}, {}, None, None
        for loop in [loop for loop in self._connections if loop.is_closed()]:
            del self._connections[loop]
            self._connecting.pop(loop, None)

    def _add(self, name: str, build: Callable[[], Worker]) -> None:
        if name in self._workers:
            raise HandlerError(f"{self.name} has a worker named {name!r} already; give one of them another name=")
        self._workers[name] = build

    def _chosen(self, names: Collection[str] | None) -> list[Worker]:
        if names is None:
            return list(self.workers.values())
        unknown = [name for name in names if name not in self.workers]
        if unknown:
            raise ConfigurationError(
                f"{self.name} has no worker named {unknown[0]!r}; it has: {', '.join(self.workers) or 'none'}"
            )
        return [self.workers[name] for name in names]

    async def _runner(self, connection: Connection, workers: list[Worker], stack: contextlib.AsyncExitStack) -> Runner:
        """A runner for these workers; stack closes what their handlers are given."""
        from conveyor.runtime.control import Control  # here: a program that only publishes needs neither
        from conveyor.runtime.runner import Runner

        for worker in workers:
            if connection.ledger is None and any(is_transaction(p.type) for p in worker.plan.injected):
                raise ConfigurationError(f"worker {worker.name} takes a Transaction, but {self._lacks_database}")
        wanted = [p.type for worker in workers for p in worker.plan.injected if p.type not in _Injectable(())]
        provided = await open_all(self._providers, wanted, stack, self._replaced)
        pool = None
        if on_cores := [worker for worker in workers if worker.plan.mode is Mode.PROCESS]:
            from conveyor.runtime.pool import CpuPool

            pool = CpuPool(_processes([worker.concurrency for worker in on_cores]), max_rss_bytes=self.max_rss_bytes)
            stack.push_async_callback(pool.close)
        around = Surroundings(
            self._outgoing,
            connection.broker,
            provided,
            tuple(self._middleware),
            tuple(self._carries),
            connection.ledger,
            connection.relay,
            pool,
            journal=connection.journal,
        )
        control = None
        if self.switches is not None or connection.journal is not None:
            control = Control(connection.broker, self.name, self.number, switches=self.switches)
        return Runner(workers, connection.broker, around, self.metrics, self._clock, control)

    @property
    def _lacks_journal(self) -> str:
        return f"{self.name} keeps no journal; say Conveyor({self.name!r}, journal=True) or set CONVEYOR_JOURNAL=1"

    @property
    def _lacks_database(self) -> str:
        return f'{self.name} has no database; say Conveyor({self.name!r}, database="…") or set CONVEYOR_DATABASE'

    def _concurrency(self, function: Callable[..., Any], mode: Mode, asked: int | None) -> int:
        lanes = DEFAULT_CONCURRENCY[mode] if asked is None else asked
        _at_least_one(function, concurrency=lanes)
        return lanes

    @staticmethod
    def _check_batch(plan: Plan, batch: int | None) -> None:
        single = next((p for p in plan.injected if p.type is Message or p.type is Context), None)
        if batch is not None and single is not None:
            raise HandlerError(
                f"handler {plan.function.__qualname__} has batch=…, so {single.name!r} would tell of one message of many; leave it out"
            )

    def _note_unrouted(self, message: Message, *, required: bool) -> None:
        self.metrics.unrouted += 1
        if required:
            raise NoSubscriber(
                f"no queue receives {message.topic!r}; run a worker for it once, so that its queue exists"
            )
        if message.topic not in self._unrouted:
            self._unrouted.add(message.topic)
            log.info("no queue receives %r: such events go nowhere (said once)", message.topic)

    def new_broker(self, owner: str | None = None) -> Broker:
        """The broker that this application is on, not opened here; for tools that look at it from outside.

        Parameters:
            owner: the identity under which it holds leases; made up where None.
        """
        if self._given_broker is not None:
            return self._given_broker
        from conveyor import config

        url, database = config.broker_url(self.name, self.broker_url), config.database_url(self.database_url)
        tables = f"; its database is {config.place(database)}" if database else ""
        log.info("the messages of %s are in %s%s", self.name, config.place(url), tables)
        return brokers.from_url(url, owner=owner, clock=self._clock)

    def new_ledger(self, owner: str) -> Ledger | None:
        """The ledger in the application's database, not opened; None where it has no database."""
        from conveyor import config

        url = config.database_url(self.database_url)
        if not url:
            return None
        from conveyor.runtime.ledger import Ledger

        # Without a clock of ours, PostgreSQL's own decides, which all processes share.
        return Ledger(url, app=self.name, owner=owner, clock=None if self._clock is time.time else self._clock)


class _Injectable:
    """The types that the runner fills in."""

    def __init__(self, provided: Collection[Any] | Mapping[Any, Any]) -> None:
        self._provided = provided

    def __contains__(self, kind: object) -> bool:
        return kind is Message or kind is Context or is_transaction(kind) or kind in self._provided


def _seconds(value: Seconds) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else float(value)


def _native(function: Callable[..., Any], native: Native) -> dict[str, str]:
    """As the seam has it: text."""
    for name, value in native.items():
        if name not in Native.__annotations__:
            import difflib  # what is only needed for a mistake costs no start-up

            known = [*inspect.signature(Conveyor.worker).parameters, *Native.__annotations__]
            meant = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {meant[0]}?" if meant else ""
            raise HandlerError(f"handler {getattr(function, '__qualname__', function)}: no option {name!r}{hint}")
        if not isinstance(value, bool if name == "passive" else str) or value == "":
            raise HandlerError(f"handler {getattr(function, '__qualname__', function)}: {name} cannot be {value!r}")
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in native.items()}


def _processes(concurrency: Sequence[int]) -> int:
    """How many processes these cpu=True workers need together: one for each that may run, within the cores, or as one of them says."""
    return max(*concurrency, min(sum(concurrency), DEFAULT_CONCURRENCY[Mode.PROCESS]), 1)


def _at_least_one(function: Callable[..., Any], **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise HandlerError(
                f"handler {getattr(function, '__qualname__', function)}: {name} is at least 1, not {value}"
            )


def _check_retry(function: Callable[..., Any], retry: Any) -> None:
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise HandlerError(
            f"handler {getattr(function, '__qualname__', function)}: retry is a RetryPolicy, such as RetryPolicy(attempts=3), not {retry!r}"
        )


def _positive(function: Callable[..., Any], **values: Seconds | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < _seconds(value) < math.inf:
            raise HandlerError(
                f"handler {getattr(function, '__qualname__', function)}: {name} is a time above 0 seconds, not {value!r}"
            )
