"""One call of a handler: fill in its parameters, run it where it belongs, gather what it emits."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from conveyor.broker import Broker, Delivery
from conveyor.core.handler import Mode, Plan
from conveyor.core.message import Message
from conveyor.errors import AlreadyHandled, HandlerError
from conveyor.runtime.carry import Carry
from conveyor.runtime.context import Context
from conveyor.runtime.metrics import WorkerMetrics
from conveyor.runtime.outgoing import NO_OPTIONS, Emitter, Outgoing, collected
from conveyor.runtime.threads import Threads
from conveyor.runtime.worker import Worker

if TYPE_CHECKING:
    from conveyor.runtime.ledger import Ledger
    from conveyor.runtime.pool import CpuPool
    from conveyor.runtime.relay import Relay


@dataclass(frozen=True, slots=True)
class Call:
    """An attempt as middleware sees it.

    Parameters:
        worker: the worker's name.
        deliveries: what is handled; one, except for a batch.
        payload: what the handler receives: an event, a list of them (batch), or a job's parameters.
    """

    worker: str
    deliveries: tuple[Delivery, ...]
    payload: Any

    @property
    def message(self) -> Message:
        """The message being handled; a batch's first."""
        return self.deliveries[0].message


Next = Callable[[Call], Awaitable[Any]]
Middleware = Callable[[Call, Next], Awaitable[Any]]


class AlreadyDone(Exception):
    """The ledger knows that this worker has handled all of these messages."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the handlers of one runner share.

    Parameters:
        broker: open.
        provided: type → the object that parameters of this type receive.
        carries: the headers that go on.
        shutting_down: set when the runner drains.
    """

    outgoing: Outgoing
    broker: Broker
    provided: Mapping[Any, Any] = field(default_factory=dict)
    middleware: Sequence[Middleware] = ()
    carries: Sequence[Carry] = ()
    ledger: Ledger | None = None
    relay: Relay | None = None
    pool: CpuPool | None = None
    shutting_down: asyncio.Event = field(default_factory=asyncio.Event)


class Caller:
    """Calls one worker's handler. Compiled once, so that a plain handler costs one await.

    Parameters:
        worker: whose handler.
        around: what it shares with the others.
        metrics: counts duplicates.
    """

    def __init__(self, worker: Worker, around: Surroundings, metrics: WorkerMetrics) -> None:
        self._worker = worker
        self._metrics = metrics
        self._around = around
        self._plan = plan = worker.plan
        self._threads = Threads(worker.name) if plan.mode is Mode.THREAD else None
        self._run = self._runner()
        self._emits: dict[Any, Any] = {event.type: None for event in plan.emits}
        typed_dicts = [
            event.type for event in plan.emits if isinstance(event.type, type) and issubclass(event.type, dict)
        ]
        if typed_dicts:
            self._emits[dict] = typed_dicts[0]
        self._transactional = any(is_transaction(p.type) for p in plan.injected)
        self._plain = (
            not plan.injected
            and not around.middleware
            and plan.mode is Mode.ASYNC
            and not plan.yields
            and plan.fields is None
        )

    async def __call__(self, deliveries: tuple[Delivery, ...], payload: Any) -> tuple[Message, ...]:
        """Run one attempt.

        Returns:
            What it emits, to be published with the settlement.

        Raises:
            AlreadyDone: nothing was run, or what was run has been rolled back: it had been done before.
            Exception: whatever the handler raises.
        """
        if self._plain:
            result = await self._plan.function(payload)
            if result is None and self._plan.silent:
                return ()
            emitter = Emitter(self._around.outgoing, deliveries[0].message, self._worker.identity)
            self._collect(result, emitter)
            return tuple(emitter.messages)
        if self._transactional:
            await self._in_transaction(deliveries, payload)
            return ()
        emitter = Emitter(self._around.outgoing, deliveries[0].message, self._worker.identity)
        self._collect(await self._handle(deliveries, payload, emitter, None), emitter)
        return tuple(emitter.messages)

    @property
    def stuck(self) -> int:
        """Threads that were given up and still run."""
        return self._threads.stuck if self._threads else 0

    def close(self) -> None:
        """Let go of the threads."""
        if self._threads:
            self._threads.close()

    async def _in_transaction(self, deliveries: tuple[Delivery, ...], payload: Any) -> None:
        """Run the handler in the ledger's transaction, which holds its writes, what it emits, and the note that it did this."""
        ledger, relay = self._around.ledger, self._around.relay
        if ledger is None or relay is None:
            raise HandlerError(f"worker {self._worker.name} takes a Transaction, but the application has no database")
        name, batch = self._worker.identity, self._worker.batch > 1
        if not batch and await ledger.seen(name, deliveries[0].message.id):
            self._metrics.duplicates += 1
            raise AlreadyDone
        while True:
            emitter = Emitter(self._around.outgoing, deliveries[0].message, name)
            ids = tuple(delivery.message.id for delivery in deliveries)
            try:
                async with ledger.transaction(inbox=(name, ids), make=emitter.make_now) as transaction:
                    self._collect(await self._handle(deliveries, payload, emitter, transaction), emitter)
                    transaction.add(emitter.take())
            except AlreadyHandled as repeat:
                self._metrics.duplicates += len(repeat.message_ids)
                fresh = [i for i, id in enumerate(ids) if id not in repeat.message_ids]
                if not fresh:
                    raise AlreadyDone from repeat
                deliveries, payload = tuple(deliveries[i] for i in fresh), [payload[i] for i in fresh]
            else:
                relay.hand_off(transaction.committed)
                return

    async def _handle(self, deliveries: tuple[Delivery, ...], payload: Any, emitter: Emitter, transaction: Any) -> Any:
        arguments: dict[str, Any] = {}
        for parameter in self._plan.injected:
            if parameter.type is Context:
                arguments[parameter.name] = Context(
                    deliveries[0],
                    self._worker.name,
                    self._worker.identity,
                    emitter,
                    self._around.broker,
                    self._around.shutting_down,
                )
            elif parameter.type is Message:
                arguments[parameter.name] = deliveries[0].message
            elif is_transaction(parameter.type):
                arguments[parameter.name] = transaction
            else:
                arguments[parameter.name] = self._around.provided[parameter.type]
        step: Next = functools.partial(self._run, arguments)
        for middleware in reversed(self._around.middleware):
            step = functools.partial(_around, middleware, step)
        return await step(Call(self._worker.name, deliveries, payload))

    def _runner(self) -> Callable[[dict[str, Any], Call], Awaitable[Any]]:
        plan, function, threads = self._plan, self._plan.function, self._threads
        unpack = functools.partial(_unpack, plan)

        async def in_loop(arguments: dict[str, Any], call: Call) -> Any:
            positional, named = unpack(call.payload)
            if plan.yields:
                return [event async for event in function(*positional, **named, **arguments)]
            return await function(*positional, **named, **arguments)

        async def in_thread(arguments: dict[str, Any], call: Call) -> Any:
            positional, named = unpack(call.payload)
            assert threads is not None
            bound = functools.partial(function, *positional, **named, **arguments)
            return await threads.run((lambda: list(bound())) if plan.yields else bound)

        async def in_process(arguments: dict[str, Any], call: Call) -> Any:
            positional, named = unpack(call.payload)
            pool = self._around.pool
            assert pool is not None
            return await pool.run(
                f"{function.__module__}:{function.__qualname__}",
                positional,
                {**named, **arguments},
                timeout_seconds=self._worker.timeout_seconds,
            )

        return {Mode.ASYNC: in_loop, Mode.THREAD: in_thread, Mode.PROCESS: in_process}[plan.mode]

    def _collect(self, result: Any, emitter: Emitter) -> None:
        if self._plan.fields is not None:
            return  # what a job returns is its result, not an event
        if result is None and not self._plan.silent:
            raise HandlerError(
                f"handler {self._plan.function.__qualname__} returned None, but its return annotation promises an event; "
                "write -> … | None where there may be none"
            )
        for event in collected(result):
            kind = type(event)
            if kind not in self._emits:
                named = ", ".join(getattr(k, "__name__", str(k)) for k in self._emits) or "nothing"
                raise HandlerError(
                    f"handler {self._plan.function.__qualname__} returned {kind.__name__}, but its return annotation says {named}"
                )
            emitter.add(event, NO_OPTIONS, self._emits[kind])


def _unpack(plan: Plan, payload: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if plan.fields is None:
        return (payload,), {}
    return (), {parameter.name: getattr(payload, parameter.name) for parameter in plan.fields}


async def _around(middleware: Middleware, step: Next, call: Call) -> Any:
    return await middleware(call, step)


def is_transaction(kind: object) -> bool:
    """Whether a type is the ledger's Transaction, without importing the ledger, which needs SQLAlchemy."""
    return inspect.isclass(kind) and kind.__module__ == "conveyor.runtime.ledger" and kind.__name__ == "Transaction"
