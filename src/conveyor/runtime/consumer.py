"""One worker at work: its messages come in, lanes handle them, verdicts go out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from conveyor.broker import Broker, Clock, Delivery, Subscription
from conveyor.core.handler import Mode
from conveyor.core.message import Message
from conveyor.core.settle import (
    CANCELLED,
    DONE,
    REPEATED,
    SUSPECT_AFTER_CRASHES,
    Dead,
    Done,
    Reason,
    Release,
    RetryAt,
    Verdict,
    describe,
    verdict_on_arrival,
    verdict_on_error,
)
from conveyor.core.wishes import Wishes
from conveyor.core.words import keepable
from conveyor.errors import (
    BrokerError,
    BrokerFull,
    BrokerUnavailable,
    HandlerTimeout,
    JobCancelled,
    LedgerUnavailable,
    PayloadError,
    PayloadTooLarge,
    Reject,
    is_outage,
)
from conveyor.runtime.attempt import Undecodable
from conveyor.runtime.call import AlreadyDone, Caller
from conveyor.runtime.carry import Carry, carried_on
from conveyor.runtime.journal import Journal, Running
from conveyor.runtime.logs import Current, current
from conveyor.runtime.metrics import WorkerMetrics
from conveyor.runtime.points import point
from conveyor.runtime.settler import AGAIN, Settler
from conveyor.runtime.worker import PREFETCH_SECONDS, Worker, room_for

log = logging.getLogger("conveyor.consumer")

STRIDE: Final = 64
"""Messages that a lane handles before it lets the rest of the loop run, where handlers never wait for anything."""
LONGEST_TRACEBACK: Final = 16_000
"""Characters of a traceback that are kept with a message, from its end."""
CANCELS: Final = 3
"""A handler that swallows so many cancellations is left behind, and its lane replaced."""

LAST_CANCEL_SECONDS: Final = 1.0
"""A handler that is cancelled, and swallows it, is cancelled again after so long; at the end it is waited for no longer."""

SURPLUS_SECONDS: Final = 1.0
"""What was fetched because handlers were quick, and waits for so long, is given back."""

TOLD_SECONDS: Final = 5.0
"""A handler in a thread that can see that it is cancelled has so long to end by itself; then it is interrupted."""

FOREVER: Final = float("inf")
TIMEOUT, LEASE_LOST, DRAINED, BY_WISH = "timeout", "lease lost", "drained", "cancelled"
HOW_STOPPED: Final = {
    Mode.ASYNC: "its handler is cancelled",
    Mode.THREAD: "its thread is interrupted",
    Mode.PROCESS: "its process, where it has one already, is killed",
}
"""What becomes of a running attempt that somebody cancels, for the log."""


class Lane:
    """One place where messages are handled, one (or one batch) after the other."""

    __slots__ = ("begun", "cancels", "deadline", "deliveries", "ended", "lost", "started", "task", "why")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.deliveries: tuple[Delivery, ...] = ()
        self.started = 0.0
        self.begun: Any = None
        """The receipt of what a process of the pool has begun with; elsewhere an attempt begins at once."""
        self.deadline = FOREVER
        self.why: str | None = None
        self.cancels = 0
        self.lost: set[Any] = set()
        """Receipts of deliveries that belong to somebody else by now."""
        self.ended: asyncio.Future[None] | None = None
        """Done when the attempt has ended, or was left behind; for a lane that runs a suspect."""

    def cancel(self, why: str) -> None:
        """Interrupt the attempt that runs here; it is looked at again LAST_CANCEL_SECONDS later."""
        assert self.task is not None
        self.why = why
        self.cancels += 1
        self.deadline = time.monotonic() + LAST_CANCEL_SECONDS
        self.task.cancel(why)


class Consumer:
    """Runs one worker in one process.

    The runner above it decides when: it opens and closes the gate, asks for a drain, and lets suspects run alone.

    Parameters:
        worker: what is run.
        broker: where its messages wait.
        caller: runs an attempt.
        settler: takes the verdicts.
        metrics: counts.
        clock: gives Unix seconds.
        suspect: called with a delivery that has to run alone.
        emitted: called with the worker's identity, what a handler has emitted, and the ids of those that no queue received; None
            where that is not known, because it goes out with a settlement. Notes them in the journal.
        failed: called with a delivery that ends with an error.
        carries: the headers that go on.
        journal: notes how messages end; None where it is off.
    """

    def __init__(
        self,
        worker: Worker,
        broker: Broker,
        caller: Caller,
        settler: Settler,
        metrics: WorkerMetrics,
        clock: Clock,
        suspect: Callable[[Consumer, Delivery], None],
        emitted: Callable[[str, Sequence[Message], frozenset[str] | None], None],
        failed: Callable[[Consumer, Delivery, RetryAt | Dead], None],
        carries: Sequence[Carry] = (),
        journal: Journal | None = None,
    ) -> None:
        self.worker = worker
        self.metrics = metrics
        self._broker = broker
        self._caller = caller
        self._settler = settler
        self._clock = clock
        self._suspect = suspect
        self._note_emits = emitted
        self._note_failure = failed
        self._carries = carries
        self._journal = journal
        self.wishes: Final = Wishes()
        self.cancelled: Final = self.wishes.cancelled
        """The ids of messages that are not to be handled."""
        self._is_job = worker.plan.fields is not None
        """Somebody may be waiting for its end."""
        self._ready: deque[Delivery] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._hungry = asyncio.Event()
        self._lanes: list[Lane] = []
        self._left_behind: set[asyncio.Task[None]] = set()
        self._subscription: Subscription | None = None
        self._anew = False
        """Before the next fetch, make sure that there is something to receive from: the last one failed, or the subscription is closed."""
        self._stillness: asyncio.Future[None] | None = None
        """Done when no lane is at work any more; there while somebody waits for that."""
        self._busy = 0
        self._room = worker.prefetch
        """How many messages are held at most now."""
        self._handled = 0
        """Messages handled since the room was measured."""
        self._surplus: asyncio.TimerHandle | None = None
        self.gate = asyncio.Event()
        """Open (set) while messages may be started."""
        self.progressed = time.monotonic()
        """When something was fetched or finished last."""
        self.paused = False
        """Nothing is fetched: its queue is paused."""
        self._closing = False
        self._decoders: dict[str, Callable[[bytes], Any]] = {
            topic: bytes if caller.takes_body else codec.decode for topic, codec in worker.codecs.items()
        }
        self._plain = caller.plain if worker.batch == 1 else None
        self._silent = worker.plan.silent
        # A process of the pool has its own clock, which starts when the attempt does and not while it waits for a free one.
        self._in_process = worker.plan.mode is Mode.PROCESS
        self._timeout_seconds = None if self._in_process else worker.timeout_seconds
        caller.on_begin = self._begin_in_process

    # --- what the runner sees -----------------------------------------------------------------------------------------

    @property
    def busy(self) -> int:
        """Lanes at work."""
        return self._busy

    @property
    def stuck(self) -> int:
        """Attempts that were given up and still run: they swallow cancellation, or hang in a thread."""
        return len(self._left_behind) + self._caller.stuck

    def held(self) -> list[Delivery]:
        """What is leased to this consumer, waits here or is handled."""
        return [*self._ready, *(delivery for lane in self._lanes for delivery in lane.deliveries)]

    def at_work(self) -> Iterator[Running]:
        """What runs now; what waits for a process of the pool does not."""
        for lane in self._lanes:
            if self._in_process and lane.deliveries and lane.begun != lane.deliveries[0].receipt:
                continue
            for delivery in lane.deliveries:
                yield Running(self.worker.identity, delivery, lane.started)

    def _begin_in_process(self, delivery: Delivery) -> None:
        for lane in self._lanes:
            if lane.deliveries and lane.deliveries[0].receipt == delivery.receipt:
                lane.started, lane.begun = time.monotonic(), delivery.receipt

    async def open(self) -> None:
        """Subscribe, and start the lanes."""
        self._subscription = await self._subscribed()
        for _ in range(self.worker.concurrency):
            self._add_lane()
        self.gate.set()
        self._hungry.set()

    async def close(self) -> None:
        """End the lanes (which are idle, or cancelled, by then) and the subscription."""
        self._closing = True
        if self._surplus is not None:
            self._surplus.cancel()
        tasks = [lane.task for lane in self._lanes if lane.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_CANCEL_SECONDS)
        self._caller.close()
        if self._subscription is not None:
            await self._subscription.close()

    async def fetch(self, well: Callable[[], None]) -> None:
        """The loop that keeps messages coming; after a failure it makes sure first that there is something to receive from.

        Parameters:
            well: called when that is so.
        """
        if self._anew:
            await self._begin_anew()
            self._anew = False
        well()
        try:
            await self._keep_coming()
        except Exception:
            self._anew = True
            raise

    async def unsubscribe(self) -> None:
        """Have nothing on its way to here until fetch() runs again; the caller has ended that before.

        A broker may send more than was fetched: that goes back now, and is not held, and counted, when this process dies.
        """
        assert self._subscription is not None
        self._anew = True
        with contextlib.suppress(BrokerError):  # then it has lost what was on its way
            await self._subscription.close()

    async def _begin_anew(self) -> None:
        """Somebody may have deleted the queue, or the server come back without it."""
        assert self._subscription is not None
        await self._broker.declare([self.worker.queue])
        await self._subscription.close()
        self._subscription = await self._subscribed()

    async def _subscribed(self) -> Subscription:
        # While one half is settled, the other is on its way: at the broker both count as held.
        return await self._broker.subscribe(self.worker.queue.name, 2 * self.worker.deepest)

    async def _keep_coming(self) -> None:
        """Ask for as many as there is room for, whenever half the room is free."""
        self._hungry.set()  # it may be started anew, after a failure, where nothing is at work that would say so
        measured = time.monotonic()
        while True:
            await self._hungry.wait()
            self._hungry.clear()
            await self.gate.wait()
            while (free := self._room - len(self._ready) - self._busy * self.worker.batch) >= max(
                1, self._room // 2
            ) or (free > 0 and not self._ready):
                assert self._subscription is not None
                arrived = await self._subscription.fetch(free)
                self.progressed = time.monotonic()
                elapsed = self.progressed - measured
                if elapsed > PREFETCH_SECONDS or (elapsed > 0 and 2 * self._handled >= self._room):
                    wanted = room_for(self.worker.prefetch, self.worker.deepest, self._handled / elapsed)
                    self._room, self._handled, measured = min(2 * self._room, wanted), 0, self.progressed
                self.metrics.received += len(arrived)
                point("received")
                self._accept(arrived)
                self._watch_surplus()
                if not self.gate.is_set():
                    break
                few = len(arrived) < free
                del arrived  # while it waits for more, it holds nothing of what has come
                if few:
                    # Nothing more is there: what has come is begun before anybody is asked for more.
                    await asyncio.sleep(0)

    def _watch_surplus(self) -> None:
        """Handlers may become slow: then others shall have what would wait here for long."""
        if self._surplus is not None:
            self._surplus.cancel()
            self._surplus = None
        if len(self._ready) > self.worker.prefetch:
            self._surplus = asyncio.get_running_loop().call_later(SURPLUS_SECONDS, self._release_surplus)

    def _release_surplus(self) -> None:
        self._surplus = None
        self._room = self.worker.prefetch
        while len(self._ready) > self._room:
            self._settle(self._ready.pop(), Release())

    def release_unstarted(self, *, due: float = 0.0) -> None:
        """Give back what no lane has begun."""
        while self._ready:
            self._settle(self._ready.popleft(), Release(due))
        self._hungry.set()

    async def still(self) -> None:
        """Wait until no lane is at work."""
        while self._busy:
            if self._stillness is None:
                self._stillness = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._stillness)

    def resume(self) -> None:
        """Open the gate again."""
        self.gate.set()
        self._hungry.set()

    async def run_alone(self, delivery: Delivery) -> None:
        """Handle one delivery while nothing else runs."""
        loop = asyncio.get_running_loop()
        lane = Lane()
        lane.ended = loop.create_future()
        lane.task = loop.create_task(self._handle(lane, (delivery,)), name=f"{self.worker.name} alone")
        self._lanes.append(lane)
        lane.task.add_done_callback(lambda _: self._lanes.remove(lane) if lane in self._lanes else None)
        await asyncio.shield(lane.ended)

    def lose(self, delivery: Delivery) -> None:
        """Somebody else has this delivery by now: stop working on it."""
        self.metrics.lost_leases += 1
        for lane in self._lanes:
            if any(held.receipt == delivery.receipt for held in lane.deliveries):
                lane.lost.add(delivery.receipt)
                lane.cancel(LEASE_LOST)
                return
        if any(held.receipt == delivery.receipt for held in self._ready):
            self._ready = deque(held for held in self._ready if held.receipt != delivery.receipt)
            self._hungry.set()

    def cancel(self, wished: Mapping[str, float]) -> None:
        """Let go of messages: of those that wait here, that are handled, and that arrive.

        A batch that is being handled goes on: the others in it are not to suffer.

        Parameters:
            wished: their ids → when somebody wished it (Unix seconds).
        """
        ids = self.wishes.add(wished)
        waiting, self._ready = self._ready, deque()
        for delivery in waiting:
            if delivery.message.id in ids:
                self.let_go(delivery)
            else:
                self._ready.append(delivery)
        self._hungry.set()
        for lane in self._lanes:
            if len(lane.deliveries) != 1 or lane.why is not None:
                continue
            [delivery] = lane.deliveries
            if delivery.message.id in ids and not self._caller.is_committing(delivery):
                self._stop(lane, delivery)

    def _stop(self, lane: Lane, delivery: Delivery) -> None:
        """Somebody has cancelled what runs here: from now on it ends as cancelled, whatever it does."""
        if self._caller.tell_cancelled(delivery):
            lane.why = BY_WISH
            lane.deadline = min(lane.deadline, time.monotonic() + TOLD_SECONDS)
            how = f"its thread is told, and interrupted unless it ends within {TOLD_SECONDS:g} s"
        else:
            lane.cancel(BY_WISH)
            how = HOW_STOPPED[self.worker.plan.mode]
        log.info("worker %s: message %s is cancelled while it runs: %s", self.worker.name, delivery.message.id, how)

    def let_go(self, delivery: Delivery) -> None:
        """Settle what somebody has cancelled before it began."""
        log.info("message %s in %s is cancelled, and not handled", delivery.message.id, delivery.queue)
        self._settle(delivery, CANCELLED)

    def cancel_overdue(self, now: float) -> None:
        """Cancel attempts past their deadline (again: for the same reason as before); now is on the monotonic clock."""
        for lane in tuple(self._lanes):
            if lane.deadline <= now and lane.deliveries:
                if lane.cancels >= CANCELS:
                    self._leave_behind(lane)
                else:
                    lane.cancel(lane.why or TIMEOUT)

    def cancel_all(self) -> None:
        """Cancel every attempt; the deliveries of those that were not to be stopped anyway are released."""
        for lane in self._lanes:
            if lane.deliveries:
                lane.cancel(lane.why or DRAINED)

    # --- the way of a message -----------------------------------------------------------------------------------------

    def _accept(self, arrived: list[Delivery]) -> None:
        ready = self._ready
        if self.cancelled:
            for delivery in arrived:
                if delivery.message.id in self.cancelled:
                    self.let_go(delivery)
            arrived = [delivery for delivery in arrived if delivery.message.id not in self.cancelled]
        for delivery in arrived:
            if delivery.deliveries <= SUSPECT_AFTER_CRASHES or delivery.crashes < SUSPECT_AFTER_CRASHES:
                ready.append(delivery)
            elif (end := self._verdict_on_arrival(delivery)) is not None:
                self._settle(delivery, end)
            else:
                self._suspect(self, delivery)
        if not self.gate.is_set():
            self.release_unstarted()
            return
        self._wake(len(ready))

    def _wake(self, messages: int) -> None:
        """Wake two idle lanes, each of which wakes two more: where handlers never wait, two do what a hundred would be woken for."""
        wanted = min(2, messages)
        while wanted > 0 and self._idle:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
                wanted -= 1

    def _add_lane(self) -> None:
        lane = Lane()
        lane.task = asyncio.get_running_loop().create_task(self._run(lane), name=f"{self.worker.name} lane")
        self._lanes.append(lane)

    async def _run(self, lane: Lane) -> None:
        batch = self.worker.batch
        loop = asyncio.get_running_loop()
        handled = 0
        while True:
            ready = self._ready
            self._wake(len(ready) - batch)
            while ready and self.gate.is_set():
                deliveries = (ready.popleft(),) if batch == 1 else self._next_batch()
                if len(ready) <= self._room // 2:
                    self._hungry.set()
                await self._handle(lane, deliveries)
                del deliveries  # an idle lane holds nothing of the last message
                if lane.task is None or self._closing:  # left behind, and replaced; or ended
                    return
                handled += 1
                if handled % STRIDE == 0:
                    await asyncio.sleep(0)
                ready = self._ready
            waiter = loop.create_future()
            self._idle.append(waiter)
            await waiter

    def _next_batch(self) -> tuple[Delivery, ...]:
        """Fresh messages together; one that failed before comes alone, so that it cannot take others down with it."""
        ready = self._ready
        first = ready.popleft()
        if first.attempts:
            return (first,)
        batch = [first]
        while ready and len(batch) < self.worker.batch and not ready[0].attempts:
            batch.append(ready.popleft())
        return tuple(batch)

    async def _handle(self, lane: Lane, deliveries: tuple[Delivery, ...]) -> None:
        self._busy += 1
        lane.deliveries = deliveries
        if lane.lost:
            lane.lost.clear()
        started = self._begin(lane)
        if (first := deliveries[0]).deliveries == 1:
            message = first.message
            # For every message, where max() costs twice as much.
            waited = self._clock() - (message.created if message.created > message.due else message.due)  # noqa: FURB136
            self.metrics.wait.observe(waited if waited > 0.0 else 0.0)  # noqa: FURB136
        ended = None
        try:
            if len(deliveries) == 1:
                verdict = await self._attempt(lane, first)
                ended = time.monotonic()
                self._settle_in(lane, first, verdict, ended)
            else:
                await self._attempt_batch(lane, deliveries)
        except Exception as error:  # not the handler's: those have become verdicts
            log.exception("Conveyor failed at a message of %s", self.worker.name)
            for delivery in lane.deliveries:
                self._settle_in(lane, delivery, Dead(Reason.REJECTED, f"Conveyor's own failure: {describe(error)}"))
        finally:
            if lane.task is not None:
                self._end(lane, started, ended)

    def _begin(self, lane: Lane) -> float:
        """An attempt begins now (monotonic seconds)."""
        lane.why = None
        lane.cancels = 0
        lane.started = started = time.monotonic()
        timeout = self._timeout_seconds
        lane.deadline = FOREVER if timeout is None else started + timeout
        return started

    def _end(self, lane: Lane, started: float, ended: float | None = None) -> None:
        self._handled += len(lane.deliveries)
        lane.deliveries = ()
        self.progressed = time.monotonic() if ended is None else ended
        self.metrics.duration.observe(self.progressed - started)
        self._busy -= 1
        if self._stillness is not None and self._busy == 0:
            self._stillness.set_result(None)
            self._stillness = None
        if not self._ready:
            self._hungry.set()
        if lane.ended is not None and not lane.ended.done():
            lane.ended.set_result(None)

    async def _attempt(self, lane: Lane, delivery: Delivery) -> Verdict | None:
        """One message, from its bytes to its verdict; None where there is nothing left to settle."""
        message = delivery.message
        if delivery.deliveries > 1 or message.expires is not None:
            end = self._verdict_on_arrival(delivery)
            if end is not None:
                return end
        self._speak_of(delivery)
        try:
            payload = self._payload(delivery)
        except Exception as error:
            return Dead(Reason.INVALID, self._explain(delivery, error))
        try:
            if self._plain is not None:
                result = await self._plain(payload)
                done = DONE if result is None and self._silent else self._caller.ended(delivery, result)
            else:
                done = await self._caller((delivery,), payload if self.worker.batch == 1 else [payload])
        except asyncio.CancelledError as stopped:
            return self._on_cancel(lane, delivery, stopped)
        except AlreadyDone:
            return REPEATED
        except Undecodable as error:
            return Dead(Reason.INVALID, keepable(str(error)))
        except BaseException as error:
            if lane.why is None:
                return self._on_error(delivery, error)
            if not isinstance(error, JobCancelled):
                failed = "worker %s: the handler of message %s was stopped (%s), and failed at that: %s"
                extra = {"traceback": trace_of(error)}
                log.warning(failed, self.worker.name, message.id, lane.why, describe(error), extra=extra)
            return self._on_cancel(lane, delivery, error)
        if lane.why is not None:  # it swallowed the cancellation
            return self._on_cancel(lane, delivery)
        return done

    async def _attempt_batch(self, lane: Lane, deliveries: tuple[Delivery, ...]) -> None:
        """Several messages by one call. If that fails, each is attempted alone, so that it is charged for itself only."""
        payloads, good = [], []
        for delivery in deliveries:
            end = self._verdict_on_arrival(delivery)
            try:
                payload = None if end else self._payload(delivery)
            except Exception as error:
                end = Dead(Reason.INVALID, self._explain(delivery, error))
            if end is not None:
                self._settle(delivery, end)
            else:
                payloads.append(payload)
                good.append(delivery)
        lane.deliveries = tuple(good)
        if not good:
            return
        first = good[0]
        self._speak_of(first)
        failure: BaseException | None = None
        try:
            # Each of them may lose its lease: what they emit together must not depend on a single settlement.
            await self._publish((await self._caller(tuple(good), payloads)).emits)
        except AlreadyDone:
            pass
        except BaseException as error:
            failure = error
        if failure is None and lane.why is None:
            for delivery in good:
                self._settle_in(lane, delivery, DONE)
        elif lane.why in (LEASE_LOST, DRAINED) or isinstance(
            failure, asyncio.CancelledError | BrokerError | LedgerUnavailable
        ):
            for delivery in good:
                on_cancel = lane.why is not None or isinstance(failure, asyncio.CancelledError)
                outcome = (
                    self._on_cancel(lane, delivery, failure)
                    if on_cancel or failure is None
                    else self._on_error(delivery, failure)
                )
                self._settle_in(lane, delivery, outcome)
        else:
            log.warning(
                "a batch of %d failed, trying its messages one by one: %s",
                len(good),
                describe(failure) if failure else lane.why,
            )
            await self._attempt_each(lane, good)

    async def _attempt_each(self, lane: Lane, deliveries: list[Delivery]) -> None:
        if lane.task is not None:
            _uncancel(lane.task)
        for position, delivery in enumerate(deliveries):
            if lane.task is None:  # left behind, and settled
                return
            if lane.why == DRAINED or self._closing:
                self._settle(delivery, Release())
                continue
            lane.deliveries = tuple(deliveries[position:])
            if delivery.receipt in lane.lost:
                continue
            self._begin(lane)
            self._settle_in(lane, delivery, await self._attempt(lane, delivery))

    async def _publish(self, emits: tuple[Message, ...]) -> None:
        failures = 0
        while emits:
            try:
                unrouted = await self._broker.publish(emits)
            except (BrokerUnavailable, BrokerFull) as error:
                failures += 1
                log.log(
                    logging.WARNING if failures == 1 else logging.DEBUG,
                    "cannot publish what a batch emitted, trying on: %s",
                    error,
                )
                await asyncio.sleep(AGAIN.wait_seconds(failures, 0.5))
            else:
                self._note_emits(self.worker.identity, emits, unrouted)
                return

    def _verdict_on_arrival(self, delivery: Delivery) -> Dead | None:
        return verdict_on_arrival(
            delivery.message,
            crashes=delivery.crashes,
            policy=self.worker.retry,
            now=self._clock(),
            last_error=delivery.error,
        )

    def _payload(self, delivery: Delivery) -> Any:
        decode = self._decoders.get(delivery.message.topic)
        if decode is None:
            known = ", ".join(self._decoders)
            raise PayloadError(f"its topic {delivery.message.topic!r} is none of those that the worker knows: {known}")
        return decode(delivery.message.body)

    def _explain(self, delivery: Delivery, error: Exception) -> str:
        codec = self.worker.codecs.get(delivery.message.topic)
        return keepable(str(error) if codec is None or isinstance(error, PayloadError) else codec.explain(error))

    # --- how it ends --------------------------------------------------------------------------------------------------

    def _on_error(self, delivery: Delivery, error: BaseException) -> Verdict:
        if is_outage(error):
            log.warning("given back until it works again, uncounted: %s", describe(error))
        verdict = verdict_on_error(
            error,
            attempts=delivery.attempts,
            policy=self.worker.retry,
            now=self._clock(),
            chance=random.random(),
            traceback=trace_of(error),
        )
        if isinstance(verdict, Done):
            log.info(
                "worker %s: the handler of message %s has it cancelled: %s",
                self.worker.name,
                delivery.message.id,
                error,
            )
        return verdict

    def _on_cancel(self, lane: Lane, delivery: Delivery, stopped: BaseException | None = None) -> Verdict | None:
        """What becomes of a delivery whose attempt ended because it was cancelled.

        Parameters:
            stopped: what was raised in the handler then; its traceback tells where it stood.
        """
        task = asyncio.current_task()
        if lane.why != BY_WISH and (self._closing or (lane.why is None and task is not None and task.cancelling())):
            return Release()  # the lane itself is ended
        if lane.why is None:
            return self._on_error(delivery, RuntimeError("the handler was cancelled from within"))
        if task is not None:
            _uncancel(task)
        return self._when_stopped(lane, delivery, stopped=stopped)

    def _when_stopped(
        self, lane: Lane, delivery: Delivery, but: str = "", stopped: BaseException | None = None
    ) -> Verdict | None:
        """What becomes of a delivery whose attempt was stopped; None where it is somebody else's by now."""
        if lane.why == BY_WISH:
            return CANCELLED
        if lane.why == TIMEOUT:
            text = f"no end after {self.worker.timeout_seconds:g} s (the worker's timeout){but}"
            error = HandlerTimeout(text)
            error.__cause__ = stopped
            return self._on_error(delivery, error)
        return None if delivery.receipt in lane.lost else Release()

    def _settle_in(self, lane: Lane, delivery: Delivery, verdict: Verdict | None, ended: float | None = None) -> None:
        """Settle what was handled in a lane, unless it was left behind and settled by then."""
        if verdict is not None and lane.task is not None:
            self._settle(delivery, verdict, lane.started, ended)

    def _settle(
        self, delivery: Delivery, verdict: Verdict, begun: float | None = None, ended: float | None = None
    ) -> None:
        """Let a delivery end.

        Parameters:
            begun: when the attempt began, on the monotonic clock; None where none was made.
            ended: when it ended; None is now.
        """
        if self._journal is not None:
            self._journal.settled(self.worker.identity, delivery, verdict, begun, ended, soon=self._is_job)
        metrics = self.metrics
        if isinstance(verdict, Done):
            if verdict.cancelled:
                metrics.cancelled += 1
            else:
                metrics.succeeded += 1
            if verdict.emits:
                self._note_emits(self.worker.identity, verdict.emits, None)
        elif isinstance(verdict, Release):
            metrics.released += 1
        else:
            metrics.failed += 1
            self._tell(delivery, verdict)
        self._settler.add(delivery, verdict)

    def note_refused(self, delivery: Delivery, decided: Verdict, dead: Dead) -> None:
        """The broker did not take what was decided on a delivery, and told: it is a dead letter instead."""
        if self._journal is not None:
            self._journal.settled(self.worker.identity, delivery, dead, None, soon=self._is_job)
        # What was counted stays so: counters do not go back.
        self.metrics.dead += 1
        if not isinstance(decided, RetryAt):
            self.metrics.failed += 1
        self._note_failure(self, delivery, dead)

    def _tell(self, delivery: Delivery, verdict: RetryAt | Dead) -> None:
        self._speak_of(delivery)
        self._note_failure(self, delivery, verdict)
        if isinstance(verdict, RetryAt):
            self.metrics.retried += 1
            wait = max(0.0, verdict.due - self._clock())
            log.warning("attempt %d failed, again in %.1f s: %s", delivery.attempts + 1, wait, verdict.error)
        else:
            self.metrics.dead += 1
            if (wished := self.cancelled.get(delivery.message.id)) is not None:
                self.wishes.end({delivery.message.id: wished})  # or it would be let go when it is redriven
            log.error("dead letter (%s): %s", verdict.reason, verdict.error, extra={"traceback": verdict.traceback})

    def _speak_of(self, delivery: Delivery) -> None:
        """From here on log lines are about this delivery, and what is published carries on what it carries."""
        message, carried, fields = delivery.message, None, None
        if self._carries:
            carried, fields = carried_on(self._carries, message)
        current.set(
            Current(message.id, message.correlation_id, self.worker.name, delivery.attempts + 1, carried, fields)
        )

    def _leave_behind(self, lane: Lane) -> None:
        """The handler swallows cancellation: settle without it, and give its place to a new lane."""
        assert lane.task is not None
        for delivery in lane.deliveries:
            self._settle_in(lane, delivery, self._when_stopped(lane, delivery, ", and it ignores being cancelled"))
        log.error("worker %s: a handler ignores cancellation and was left behind", self.worker.name)
        self._lanes.remove(lane)
        self._left_behind.add(lane.task)
        lane.task.add_done_callback(self._left_behind.discard)
        self._end(lane, lane.started)
        lane.task = None
        if lane.ended is None and not self._closing:
            self._add_lane()


def trace_of(error: BaseException) -> str:
    """Where an error was raised, bounded, in text that every store can keep.

    What a handler says on purpose (Reject, PayloadError) is no riddle: of it only the errors are told that it was raised from.
    """
    if isinstance(error, Reject | PayloadError) and not isinstance(error, PayloadTooLarge):
        text, seen, cause = "", {id(error)}, error.__cause__
        while cause is not None and id(cause) not in seen:
            text += f"caused by {describe(cause)}\n"
            seen.add(id(cause))
            cause = cause.__cause__
        return text[:LONGEST_TRACEBACK]
    try:
        return keepable("".join(traceback.format_exception(error)))[-LONGEST_TRACEBACK:]
    except Exception as broken:  # an exception may be of anybody's making
        return f"(its traceback cannot be had: {type(broken).__name__})"


def _uncancel(task: asyncio.Task[Any]) -> None:
    """The cancellation has been dealt with; the task goes on."""
    while task.cancelling():
        task.uncancel()
