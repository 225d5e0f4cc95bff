"""One call of a handler: fill in its parameters, run it where it belongs, gather what it emits."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from conveyor.broker import Broker, Delivery
from conveyor.core.codec import Codec, result_codec_for
from conveyor.core.handler import Mode, Plan
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Done
from conveyor.errors import AlreadyHandled, HandlerError, JobCancelled, PayloadError
from conveyor.runtime.attempt import Attempt, Form, Ran, Unsendable, Wanted, portable, target_of
from conveyor.runtime.carry import Carry
from conveyor.runtime.context import Context, Tell, cancel, from_thread
from conveyor.runtime.frames import lent
from conveyor.runtime.metrics import WorkerMetrics
from conveyor.runtime.outgoing import NO_OPTIONS, Emitter, Outgoing, collected
from conveyor.runtime.threads import Threads
from conveyor.runtime.worker import Worker

if TYPE_CHECKING:
    from conveyor.runtime.journal import Journal
    from conveyor.runtime.ledger import Ledger
    from conveyor.runtime.pool import CpuPool
    from conveyor.runtime.relay import Relay


RESULT_LIMIT: Final = 256 * 1024
"""Bytes of a job's result, as JSON, that the journal keeps at most."""


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
        journal: where progress and results go; None where nobody keeps them.
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
    journal: Journal | None = None


class Caller:
    """Calls one worker's handler. Compiled once, so that a plain handler costs one await.

    Parameters:
        worker: whose handler.
        around: what it shares with the others.
        metrics: counts duplicates.

    Raises:
        HandlerError: its handler has cpu=True, and the processes of the pool could not find it.
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
        self._contexts: dict[Any, Context] = {}
        """By receipt: of the attempts that run now and have one."""
        self._committing: set[Any] = set()
        """The receipts of attempts whose handlers have ended, and whose transactions are being committed."""
        self.on_begin: Callable[[Delivery], object] = lambda _: None
        """Called where a process of the pool begins with an attempt that has waited for it, with its (first) delivery."""
        self._forms = self._portable_forms()
        self.takes_body: Final = bool(self._forms)
        """Its payload is the message's body as it came: a process of the pool decodes it."""
        plain = not plan.injected and not around.middleware and plan.mode is Mode.ASYNC and not plan.yields
        self.plain: Final = plan.function if plain and plan.fields is None else None
        """The handler, where an attempt is nothing but to await it with the payload, and to give what it returns to ended()."""

    async def __call__(self, deliveries: tuple[Delivery, ...], payload: Any) -> Done:
        """Run one attempt.

        Returns:
            The settlement, with what it emits and, of a job, what it returned.

        Raises:
            AlreadyDone: nothing was run, or what was run has been rolled back: it had been done before.
            Exception: whatever the handler raises.
        """
        if self._transactional:
            return self._done((), await self._in_transaction(deliveries, payload))
        emitter = Emitter(self._around.outgoing, deliveries[0].message, self._worker.identity)
        result = await self._handle(deliveries, payload, emitter, None)
        self._collect(result, emitter)
        return self._done(tuple(emitter.messages), result)

    def ended(self, delivery: Delivery, result: Any) -> Done:
        """The settlement of an attempt that was made by awaiting the plain handler."""
        emitter = Emitter(self._around.outgoing, delivery.message, self._worker.identity)
        self._collect(result, emitter)
        return Done(tuple(emitter.messages))

    def tell_cancelled(self, delivery: Delivery) -> bool:
        """Let the attempt that runs on it see that it is cancelled: nothing of it counts any more, however it ends.

        Returns:
            Whether it should be given time to see it: it runs in a thread, where it has to be looked for.
        """
        if (context := self._contexts.get(delivery.receipt)) is None:
            return False
        cancel(context)
        return self._plan.mode is Mode.THREAD

    def is_committing(self, delivery: Delivery) -> bool:
        """Whether it is too late to cancel the attempt that runs on it: its handler is done, and its transaction is being committed."""
        return delivery.receipt in self._committing

    @property
    def stuck(self) -> int:
        """Threads that were given up and still run."""
        return self._threads.stuck if self._threads else 0

    def close(self) -> None:
        """Let go of the threads."""
        if self._threads:
            self._threads.close()

    async def _in_transaction(self, deliveries: tuple[Delivery, ...], payload: Any) -> Any:
        """Run the handler in the ledger's transaction, which holds its writes, what it emits, and the note that it did this.

        Returns:
            What the handler returned.
        """
        ledger, relay = self._around.ledger, self._around.relay
        if ledger is None or relay is None:
            raise HandlerError(f"worker {self._worker.name} takes a Transaction, but the application has no database")
        name, batch = self._worker.identity, self._worker.batch > 1
        if not batch and await ledger.seen(name, deliveries[0].message.id):
            self._metrics.duplicates += 1
            raise AlreadyDone
        while True:
            emitter = Emitter(self._around.outgoing, deliveries[0].message, name)
            receipt = deliveries[0].receipt
            ids = tuple(delivery.message.id for delivery in deliveries)
            try:
                async with ledger.transaction(inbox=(name, ids), make=emitter.make_now) as transaction:
                    result = await self._handle(deliveries, payload, emitter, transaction)
                    self._collect(result, emitter)
                    transaction.add(emitter.take())
                    self._committing.add(receipt)
            except AlreadyHandled as repeat:
                self._metrics.duplicates += len(repeat.message_ids)
                fresh = [i for i, id in enumerate(ids) if id not in repeat.message_ids]
                if not fresh:
                    raise AlreadyDone from repeat
                deliveries, payload = tuple(deliveries[i] for i in fresh), [payload[i] for i in fresh]
            else:
                relay.hand_off(transaction.committed)
                return result
            finally:
                self._committing.discard(receipt)

    async def _handle(self, deliveries: tuple[Delivery, ...], payload: Any, emitter: Emitter, transaction: Any) -> Any:
        arguments: dict[str, Any] = {}
        first, context = deliveries[0], None
        for parameter in self._plan.injected:
            if parameter.type is Context:
                arguments[parameter.name] = context = context or self._context(first, emitter)
            elif parameter.type is Message:
                arguments[parameter.name] = first.message
            elif is_transaction(parameter.type):
                arguments[parameter.name] = transaction
            else:
                arguments[parameter.name] = self._around.provided[parameter.type]
        step: Next = functools.partial(self._run, arguments, emitter)
        for middleware in reversed(self._around.middleware):
            step = functools.partial(_around, middleware, step)
        call = Call(self._worker.name, deliveries, payload)
        if context is None:
            if transaction is None:
                return await step(call)
            context = self._context(first, emitter)  # to know whether the transaction may be committed
        self._contexts[first.receipt] = context
        try:
            result = await step(call)
        finally:
            del self._contexts[first.receipt]
        if context.cancelled:  # it saw it, or was stopped and did not heed that: a transaction around it is rolled back
            raise JobCancelled
        return result

    def _context(self, delivery: Delivery, emitter: Emitter) -> Context:
        tell: Tell | None = None
        if self._around.journal is not None:
            tell = functools.partial(self._progressed, self._around.journal, delivery)
            if self._plan.mode is Mode.THREAD:
                tell = from_thread(tell)
        return Context(
            delivery.message,
            delivery.attempts + 1,
            self._worker.name,
            self._worker.identity,
            emitter,
            self._around.shutting_down.is_set,
            tell,
            self._publish_now,
        )

    async def _publish_now(self, message: Message) -> bool:
        unrouted = await self._around.broker.publish((message,))
        if self._around.journal is not None:
            self._around.journal.published(message, self._worker.identity, nowhere=bool(unrouted))
        return not unrouted

    def _progressed(self, journal: Journal, delivery: Delivery, done: float, total: float | None, note: str) -> None:
        if delivery.receipt in self._contexts:  # else it was left behind: it runs for itself, and is nobody's attempt
            journal.progressed(self._worker.identity, delivery, done, total, note)

    def _runner(self) -> Callable[[dict[str, Any], Emitter, Call], Awaitable[Any]]:
        plan, function, threads = self._plan, self._plan.function, self._threads
        unpack = functools.partial(_unpack, plan)

        async def in_loop(arguments: dict[str, Any], _: Emitter, call: Call) -> Any:
            positional, named = unpack(call.payload)
            if plan.yields:
                return [event async for event in function(*positional, **named, **arguments)]
            return await function(*positional, **named, **arguments)

        async def in_thread(arguments: dict[str, Any], _: Emitter, call: Call) -> Any:
            positional, named = unpack(call.payload)
            assert threads is not None
            bound = functools.partial(function, *positional, **named, **arguments)
            return await threads.run((lambda: list(bound())) if plan.yields else bound)

        target = target_of(function) if plan.mode is Mode.PROCESS else ""

        async def in_process(arguments: dict[str, Any], emitter: Emitter, call: Call) -> Any:
            pool = self._around.pool
            assert pool is not None
            context = next((each for each in arguments.values() if isinstance(each, Context)), None)
            try:
                result = await pool.call(
                    target,
                    self._attempt(arguments, call),
                    timeout_seconds=self._worker.timeout_seconds,
                    tell=None if context is None else context.progress,
                    began=functools.partial(self.on_begin, call.deliveries[0]),
                )
            except Unsendable as error:
                result = error
            if isinstance(result, Ran):
                emitter.adopt(result.emits)
                result = result.result
            if isinstance(result, Unsendable) and plan.fields is None:  # an event that nobody would get
                raise result
            return result

        return {Mode.ASYNC: in_loop, Mode.THREAD: in_thread, Mode.PROCESS: in_process}[plan.mode]

    def _attempt(self, arguments: dict[str, Any], call: Call) -> Attempt:
        """What a process of the pool is to do."""
        message, wanted, body = None, None, None
        if arguments:
            message = portable(call.message, body=b"")
            named = {kind: tuple(p.name for p in self._plan.injected if p.type is kind) for kind in (Context, Message)}
            outgoing = self._around.outgoing
            wanted = Wanted(
                named[Context],
                named[Message],
                self._worker.name,
                self._worker.identity,
                call.deliveries[0].attempts + 1,
                outgoing.clock() - time.time(),
                outgoing.body_limit,
            )
        if self.takes_body or arguments:
            body = lent(call.message.body)
        if self.takes_body:
            return Attempt(self._forms[call.message.topic], body, message=message, wanted=wanted)
        positional, parameters = _unpack(self._plan, call.payload)
        lent_here = {name: lent(value) for name, value in parameters.items()}
        return Attempt(None, body, tuple(lent(value) for value in positional), lent_here, message, wanted)

    def _portable_forms(self) -> dict[str, bytes]:
        """By topic: how a process of the pool is told to decode; empty where it is done here."""
        plan, worker = self._plan, self._worker
        if plan.mode is not Mode.PROCESS or self._around.middleware or worker.batch > 1:
            return {}
        forms = {
            topic: (Form(codec.type) if plan.fields is None else Form(name=worker.name, fields=plan.fields)).pickled()
            for topic, codec in worker.codecs.items()
        }
        found = {topic: form for topic, form in forms.items() if form is not None}
        return found if len(found) == len(forms) else {}

    def _done(self, emits: tuple[Message, ...], result: Any) -> Done:
        """The settlement of an attempt, with what a job returned where somebody keeps it."""
        if result is None or self._plan.fields is None or self._around.journal is None:
            return Done(emits) if emits else DONE
        if isinstance(result, Unsendable):
            return Done(emits, unkept=str(result))
        try:
            text = self._result_codec.encode(result)
        except (HandlerError, PayloadError) as error:
            return Done(
                emits, unkept=f"its result has no form in JSON: {error}; return what JSON can hold, or where it is"
            )
        if len(text) > RESULT_LIMIT:
            return Done(
                emits,
                unkept=f"its result has {len(text):,} bytes as JSON, and {RESULT_LIMIT:,} are kept at most; "
                "return where it is (a path, a key), not what it is",
            )
        return Done(emits, text.decode())

    @functools.cached_property
    def _result_codec(self) -> Codec:
        return result_codec_for(self._plan.returns)

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
    return (
        inspect.isclass(kind) and kind.__module__ == "conveyor.runtime.transaction" and kind.__name__ == "Transaction"
    )
