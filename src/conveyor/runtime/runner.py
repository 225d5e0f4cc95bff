"""The runner: one process that runs an application's workers, from the first fetch to the last settlement."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from conveyor.broker import Broker, Clock, Delivery
from conveyor.core.settle import Dead, Release, RetryAt, Verdict, describe
from conveyor.core.wishes import latest
from conveyor.core.words import counted
from conveyor.errors import BrokerError
from conveyor.runtime.call import Caller, Surroundings
from conveyor.runtime.consumer import Consumer
from conveyor.runtime.control import Control, Failure, Status, WorkerStatus
from conveyor.runtime.emitted import Emitted
from conveyor.runtime.health import Health
from conveyor.runtime.journal import Running
from conveyor.runtime.loop import DEFAULT_GRACE_SECONDS, Loops, to_its_end
from conveyor.runtime.metrics import Metrics, Snapshot, resident_bytes
from conveyor.runtime.settler import Settler
from conveyor.runtime.worker import Worker

log = logging.getLogger("conveyor.runner")

BEATS_PER_LEASE: Final = 3
"""Two heartbeats may fail before a lease ends."""
STALL_SECONDS: Final = 30.0
"""A queue with ready messages of which nothing was fetched for so long is a stall."""
QUIET_SECONDS: Final = 10.0
"""How long the runner waits for other handlers to finish before a suspect has to wait for a better moment."""
GIVEN_BACK: Final = 5
"""So often a suspect that comes while others are at work is given back; the next time it is held until they have finished."""
HEAD_START_SECONDS: Final = 0.25
"""So much sooner than all others the worker of a suspect fetches, when they have finished: to get it while nothing is at work."""
MOST_GIVEN_BACK: Final = 10_000
"""Suspects that are remembered for having been given back."""
LONGEST_FLUSH_SECONDS: Final = 5.0
"""At the end, settlements wait so long (or for the grace) for a broker that is away; then their leases end by themselves."""
CUT_FLUSH_SECONDS: Final = 2.0
"""So long, where handlers were cut because the time was over."""
CANCEL_SECONDS: Final = 1.0
"""How soon a cancelled handler has to end."""
LONGEST_TICK_SECONDS: Final = 0.5
"""Deadlines are looked at so often, or more often where a timeout is short."""
RECENT_FAILURES: Final = 20
"""Failures that are kept for whoever asks how this runner is."""
LONGEST_TRACE: Final = 4_000
"""Characters of a traceback that are kept of each, from its end."""


class Runner:
    """Runs workers on a broker until it is drained.

    Parameters:
        workers: what to run; their queues are declared already.
        broker: open.
        around: what the handlers share.
        metrics: counts.
        clock: gives Unix seconds.
        control: what it is told and asked by; None where nobody can. It is started and closed here.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        broker: Broker,
        around: Surroundings,
        metrics: Metrics,
        clock: Clock = time.time,
        control: Control | None = None,
    ) -> None:
        self._broker = broker
        self._around = around
        self._metrics = metrics
        self._loops = Loops()
        self._settler = Settler(broker, self._lose, self._note_refused)
        self._emitted = Emitted(broker, self._settler, metrics, around.journal)
        self._suspects: deque[tuple[Consumer, Delivery]] = deque()
        self._suspected = asyncio.Event()
        self._waits_alone: Delivery | None = None
        self._alone: str | None = None
        self._given_back: Counter[str] = Counter()
        """How often each suspect, by its id, came while others were at work."""
        self._noisy_until = 0.0
        """Until then (Unix seconds) no suspect is waited for: the others took too long just now."""
        self._stalled: dict[str, str] = {}
        self._state = "starting"
        self._patience: asyncio.Timeout | None = None
        self.was_cut = False
        """Handlers were cancelled because they did not finish in time."""
        self._clock = clock
        self._alone_at_work = False
        """No worker may fetch, because a suspect is about to run, or runs."""
        self._failures: deque[Failure] = deque(maxlen=RECENT_FAILURES)
        self.control = control
        if control is not None:
            control.status = self.status
            control.on_cancel = self.cancel
            control.on_over = self.forget_cancelled
            control.wishes = self._wishes
            control.on_turn = self._heed_pauses
        self.consumers = {worker.name: self._consumer(worker) for worker in workers}

    def _consumer(self, worker: Worker) -> Consumer:
        metrics = self._metrics.worker(worker.name)
        caller = Caller(worker, self._around, metrics)
        return Consumer(
            worker,
            self._broker,
            caller,
            self._settler,
            metrics,
            self._clock,
            self._suspect,
            self._emitted.note,
            self._note_failure,
            self._around.carries,
            self._around.journal,
        )

    async def start(self) -> None:
        """Subscribe and begin."""
        self._emitted.look_at(await self._broker.queues())
        try:
            if self.control is not None:
                await self.control.start()
            for consumer in self.consumers.values():
                await consumer.open()
        except BaseException:
            for consumer in self.consumers.values():
                await consumer.close()
            if self.control is not None:
                await self.control.close()
            raise
        self._loops.start("settle", self._settler.run)
        self._loops.start("heartbeat", self._beat)
        self._loops.start("deadlines", self._watch_deadlines)
        self._loops.start("suspects", self._run_suspects)
        self._loops.start("stalls", self._watch_stalls)
        self._loops.start("doubts", partial(self._emitted.watch, lambda: self._loops.well("doubts")))
        if self._around.journal is not None:
            self._around.journal.at_work.append(self._at_work)
        self._state = "running"
        paused = self._paused()
        for consumer in self.consumers.values():
            consumer.paused = consumer.worker.queue.name in paused
            if consumer.paused:
                consumer.gate.clear()
            self._go_on(consumer)

    async def drain(self, grace_seconds: float | None = DEFAULT_GRACE_SECONDS) -> bool:
        """Stop in order: not ready, fetch no more, give back what has not started, finish what runs, settle, close.

        Parameters:
            grace_seconds: how long handlers may take to finish; what still runs then is cancelled and released, uncounted.
                None waits for as long as they take.

        Returns:
            Whether every handler finished by itself.
        """
        self._state = "draining"
        self._around.shutting_down.set()
        if self._around.pool is not None:
            self._around.pool.drain()
        try:
            await self._finish(grace_seconds)
            await self._flush(max(CUT_FLUSH_SECONDS if self.was_cut else LONGEST_FLUSH_SECONDS, grace_seconds or 0.0))
        except (Exception, asyncio.CancelledError):  # whoever drains it wants to wait no longer
            await to_its_end(self._give_up())
            raise
        await to_its_end(self._close())
        return not self.was_cut

    async def _finish(self, grace_seconds: float | None) -> None:
        """Fetch no more, give back what has not started, and wait for what runs."""
        self._begin_nothing()
        await self._loops.stop("stalls", "suspects", *(f"fetch {name}" for name in self.consumers))
        for consumer in self.consumers.values():
            consumer.gate.clear()
        while self._suspects:
            self._settler.add(self._suspects.popleft()[1], Release())
        if not await self._all_still(grace_seconds):
            was_cut = self.was_cut
            self.cut()
            if was_cut or not await self._all_still(CANCEL_SECONDS):
                log.error("some handlers ignore being cancelled; they are left behind")

    async def _flush(self, seconds: float) -> None:
        """Settle what has ended; wait no longer for the broker."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._settler.flush()

    async def _give_up(self) -> None:
        """Cancel and release what runs, and close all the same."""
        self.cut()
        await self._all_still(CANCEL_SECONDS)
        await self._flush(CANCEL_SECONDS)
        await self._close()

    async def _close(self) -> None:
        """Let go of everything; a broker that is silent holds nothing up for long, because nobody can interrupt this."""
        await self._loops.stop("doubts")
        await self._emitted.end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_FLUSH_SECONDS):
                await asyncio.gather(*map(_closed, self.consumers.values()))
        if self.control is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LONGEST_FLUSH_SECONDS):
                    await self.control.close()
        await self._loops.stop()
        if self._around.journal is not None and self._at_work in self._around.journal.at_work:
            self._around.journal.at_work.remove(self._at_work)
        self._state = "stopped"

    def cut(self) -> None:
        """Cancel what still runs, and release it; a drain that is under way ends with it, or soon gives up waiting."""
        if self._patience is not None and self._state == "draining":
            self._patience.reschedule(asyncio.get_running_loop().time() + CANCEL_SECONDS)
        for consumer in self.consumers.values():
            self.was_cut = self.was_cut or consumer.busy > 0
            consumer.cancel_all()

    def cancel(self, wished: Mapping[str, float]) -> None:
        """Let go of messages, now and whenever one of them arrives.

        Parameters:
            wished: their ids → when somebody wished it (Unix seconds).
        """
        for consumer in self.consumers.values():
            consumer.cancel(wished)
        suspects, self._suspects = self._suspects, deque()
        for consumer, delivery in suspects:
            if delivery.message.id in consumer.cancelled:
                consumer.let_go(delivery)
            else:
                self._suspects.append((consumer, delivery))

    def forget_cancelled(self, of: Mapping[str, Mapping[str, float]]) -> None:
        """Handle messages again that somebody had cancelled.

        Parameters:
            of: the identity of a worker → their ids → the time of the last wish that means nothing any more.
        """
        for consumer in self.consumers.values():
            consumer.wishes.end(of.get(consumer.worker.identity, {}))

    def _wishes(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """What whoever starts has to be told."""
        consumers = self.consumers.values()
        over = {each.worker.identity: dict(each.wishes.over) for each in consumers if each.wishes.over}
        return latest(*(each.cancelled for each in consumers)), over

    # --- health -------------------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """How it is: unready says why it should get no work now, unhealthy why it should be replaced."""
        unhealthy = list(self._stalled.values())
        for name, consumer in self.consumers.items():
            if consumer.stuck >= consumer.worker.concurrency:
                unhealthy.append(f"worker {name}: {consumer.stuck} attempts hang and cannot be stopped")
        unready = list(unhealthy)
        if self._state != "running":
            unready.append(self._state)
        if self._settler.problem:
            unready.append(self._settler.problem)
        if self._around.relay is not None and self._around.relay.problem:
            unready.append(f"outbox: {self._around.relay.problem}")
        unready.extend(f"{name}: {problem}" for name, problem in self._loops.problems.items())
        notes = [] if self._alone is None else [self._alone]
        notes.extend(
            f"worker {name}: its queue {consumer.worker.queue.name} is paused"
            for name, consumer in self.consumers.items()
            if consumer.paused
        )
        if self.control is not None and self.control.problem:
            notes.append(f"hears no orders: {self.control.problem}")
        if self._around.ledger is not None and self._metrics.outbox_parked:
            notes.append(
                f"outbox: {self._metrics.outbox_parked} parked; see: conveyor outbox list {self._around.ledger.app}"
            )
        return Health(unready=tuple(unready), unhealthy=tuple(unhealthy), notes=tuple(notes))

    def snapshot(self) -> Snapshot:
        """What it has done so far, in numbers."""
        for consumer in self.consumers.values():
            consumer.metrics.in_flight = len(consumer.held())
        return self._metrics.snapshot()

    def status(self, seen: int = 0) -> Status:
        """How it is, for whoever asks over the control plane.

        Parameters:
            seen: the number of its failures that are known already.
        """
        workers = [
            WorkerStatus(
                name=name,
                queue=consumer.worker.queue.name,
                concurrency=consumer.worker.concurrency,
                in_flight=len(consumer.held()),
                handled=consumer.metrics.succeeded,
                failed=consumer.metrics.failed,
                retried=consumer.metrics.retried,
                dead=consumer.metrics.dead,
                paused=consumer.paused,
            )
            for name, consumer in self.consumers.items()
        ]
        return Status(
            runner="" if self.control is None else self.control.runner,
            app="" if self.control is None else self.control.app,
            process="" if self.control is None else self.control.process,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=self._metrics.started,
            at=time.monotonic(),
            resident_bytes=resident_bytes(),
            health=self.health(),
            workers=tuple(workers),
            switches={} if self.control is None else dict(self.control.switches),
            failures=tuple(failure for failure in self._failures if failure.number > seen),
        )

    # --- pauses -------------------------------------------------------------------------------------------------------

    def _paused(self) -> frozenset[str]:
        return frozenset() if self.control is None else self.control.paused

    def _go_on(self, consumer: Consumer) -> None:
        """Let a worker fetch, unless something else is against it."""
        if self._state != "running" or self._alone_at_work or consumer.paused:
            return
        consumer.resume()
        if (loop := f"fetch {consumer.worker.name}") not in self._loops:
            self._loops.start(loop, partial(consumer.fetch, partial(self._loops.well, loop)))

    async def _heed_pauses(self) -> None:
        """Workers of a paused queue fetch nothing, give back what they have not begun, and finish what they have."""
        if self._state != "running":
            return
        paused = self._paused()
        for name, consumer in self.consumers.items():
            if consumer.paused == (consumer.worker.queue.name in paused):
                continue
            consumer.paused = not consumer.paused
            if not consumer.paused:
                self._go_on(consumer)
                continue
            consumer.gate.clear()
            consumer.release_unstarted()
            await self._loops.stop(f"fetch {name}")  # what it claims in this moment goes back, too
            self._release_suspects(consumer)

    def _release_suspects(self, of: Consumer) -> None:
        kept = [(consumer, delivery) for consumer, delivery in self._suspects if consumer is not of]
        for consumer, delivery in self._suspects:
            if consumer is of:
                self._settler.add(delivery, Release())
        self._suspects = deque(kept)

    def _note_refused(self, delivery: Delivery, decided: Verdict, dead: Dead) -> None:
        for consumer in self.consumers.values():
            if consumer.worker.queue.name == delivery.queue:
                consumer.note_refused(delivery, decided, dead)

    def _note_failure(self, consumer: Consumer, delivery: Delivery, verdict: RetryAt | Dead) -> None:
        failure = Failure(
            number=self._failures[-1].number + 1 if self._failures else 1,
            at=self._clock(),
            worker=consumer.worker.name,
            queue=delivery.queue,
            message_id=delivery.message.id,
            attempt=delivery.attempts + 1,
            error=verdict.error,
            traceback=verdict.traceback[-LONGEST_TRACE:],
            dead=isinstance(verdict, Dead),
        )
        self._failures.append(failure)

    # --- loops --------------------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Extend the leases of everything that is held."""
        if not self.consumers:
            return
        lease = min(consumer.worker.queue.lease_seconds for consumer in self.consumers.values())
        while True:
            await asyncio.sleep(lease / BEATS_PER_LEASE)
            held = [delivery for consumer in self.consumers.values() for delivery in consumer.held()]
            held.extend(delivery for _, delivery in self._suspects)
            if self._waits_alone is not None:
                held.append(self._waits_alone)
            if held:
                try:
                    lost = await self._broker.extend(held)
                    for delivery in lost:
                        if self._holds(delivery):  # it may have been settled meanwhile
                            self._lose(delivery)
                except BrokerError as error:
                    log.warning("cannot extend %d leases: %s", len(held), describe(error))

    async def _watch_deadlines(self) -> None:
        timeouts = [c.worker.timeout_seconds for c in self.consumers.values() if c.worker.timeout_seconds is not None]
        tick = min(LONGEST_TICK_SECONDS, max(0.01, min(timeouts, default=LONGEST_TICK_SECONDS * 20) / 20))
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            for consumer in self.consumers.values():
                consumer.cancel_overdue(now)

    async def _watch_stalls(self) -> None:
        """A queue with messages and a worker that gets none: say so, with the reason."""
        waiting_since: dict[str, float] = {}
        while True:
            if "stalls" not in self._loops.problems:  # after a failure it looks at once whether that is over
                await asyncio.sleep(STALL_SECONDS / 3)
            if self._around.ledger is not None:
                outbox = await self._around.ledger.pending()
                self._metrics.outbox_pending, self._metrics.outbox_parked = outbox.rows, outbox.parked
            infos = await self._broker.queues()
            self._loops.well("stalls")
            self._emitted.look_at(infos)
            now = time.monotonic()
            alone = self._alone is not None  # then the others wait on purpose
            idle = [
                c
                for c in self.consumers.values()
                if not (alone or c.busy or c.paused) and now - c.progressed > STALL_SECONDS / 3
            ]
            ready = {info.name: info.ready for info in infos}
            hungry = [c for c in idle if ready.get(c.worker.queue.name)]
            waiting_since = {c.worker.name: waiting_since.get(c.worker.name, now) for c in hungry}
            self._stalled = {
                c.worker.name: f"worker {c.worker.name}: {ready[c.worker.queue.name]} messages are ready in {c.worker.queue.name}, "
                f"and none was fetched for {now - c.progressed:.0f} s"
                for c in hungry
                if now - waiting_since[c.worker.name] >= STALL_SECONDS
            }

    def _at_work(self) -> Iterator[Running]:
        """What runs now, for the journal."""
        for consumer in self.consumers.values():
            yield from consumer.at_work()

    def _holds(self, delivery: Delivery) -> bool:
        return any(held.receipt == delivery.receipt for consumer in self.consumers.values() for held in consumer.held())

    # --- suspects -----------------------------------------------------------------------------------------------------

    def _suspect(self, consumer: Consumer, delivery: Delivery) -> None:
        consumer.metrics.suspects += 1
        if self._noisy_until > self._clock() and self._at_work_now:
            self._settler.add(delivery, Release(self._noisy_until))
            return
        self._suspects.append((consumer, delivery))
        self._suspected.set()
        for other in self.consumers.values():  # what has come with it, or comes now, is not begun
            other.gate.clear()

    @property
    def _at_work_now(self) -> bool:
        return any(consumer.busy for consumer in self.consumers.values())

    async def _run_suspects(self) -> None:
        """Run messages that processes died of one by one, with nothing else in this process that could be hurt."""
        while True:
            await self._suspected.wait()
            self._alone_at_work = True
            given_back: set[Consumer] = set()
            try:
                try:
                    # A fetch that waits in the broker would take back at once what is released now, and hold it at the crash.
                    await self._loops.stop(*(f"fetch {name}" for name in self.consumers))
                    self._suspected.clear()
                    given_back = self._give_back_suspects()
                    await asyncio.gather(*(other.unsubscribe() for other in self.consumers.values()))
                    if given_back:
                        await self._wait_for_quiet()
                    elif self._suspects:
                        await self._run_alone(*self._suspects.popleft())
                finally:
                    self._alone_at_work = False
                if given_back:
                    await self._go_on_first(given_back)
            finally:
                if not self._suspected.is_set():
                    for other in self.consumers.values():
                        self._go_on(other)

    def _give_back_suspects(self) -> set[Consumer]:
        """Where others are at work, give back the suspects: one of the others may be the end of this process.

        A suspect that waited here would be charged for that, and what is given back is not. But not for ever: a broker that puts
        it behind all others may bring it only when some are at work again.

        Returns:
            Whose suspects were given back; none where the first of them is to run as soon as the others have finished.
        """
        if not self._at_work_now:
            return set()
        for position, (_, delivery) in enumerate(self._suspects):
            if self._given_back[delivery.message.id] >= GIVEN_BACK:
                self._suspects.rotate(-position)
                return set()
        if len(self._given_back) > MOST_GIVEN_BACK:
            self._given_back.clear()
        consumers: set[Consumer] = set()
        while self._suspects:
            consumer, delivery = self._suspects.popleft()
            self._given_back[delivery.message.id] += 1
            self._settler.add(delivery, Release())
            consumers.add(consumer)
        return consumers

    def _begin_nothing(self) -> None:
        """Close all gates, and give back what waits behind them."""
        for consumer in self.consumers.values():
            consumer.gate.clear()
            consumer.release_unstarted()

    async def _wait_for_quiet(self) -> None:
        """Begin nothing until what runs has finished, or takes too long."""
        self._begin_nothing()
        if not await self._all_still(QUIET_SECONDS):
            self._noisy_until = self._clock() + QUIET_SECONDS
            log.info("messages have to run alone, but others take long: they are given back for %g s", QUIET_SECONDS)
        await self._settler.flush()

    async def _go_on_first(self, consumers: set[Consumer]) -> None:
        """Let these fetch a moment before all others, unless something else is at work again."""
        for consumer in consumers:
            self._go_on(consumer)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEAD_START_SECONDS):
                await self._suspected.wait()

    async def _run_alone(self, consumer: Consumer, delivery: Delivery) -> None:
        self._begin_nothing()
        # Nothing but this one may be in the hands of this process when it is run.
        waiting, self._suspects = self._suspects, deque()
        for _, other_suspect in waiting:
            self._settler.add(other_suspect, Release())
        self._waits_alone = delivery
        try:
            quiet = await self._all_still(QUIET_SECONDS)
            await self._settler.flush()
        except asyncio.CancelledError:
            self._settler.add(delivery, Release())
            raise
        finally:
            self._waits_alone = None
        if not quiet:
            log.info("message %s has to run alone, but others take long: given back for later", delivery.message.id)
            self._noisy_until = self._clock() + QUIET_SECONDS
            self._settler.add(delivery, Release(self._noisy_until))
            return
        self._given_back.pop(delivery.message.id, None)
        if delivery.message.id in consumer.cancelled:  # somebody told while it waited
            consumer.let_go(delivery)
            return
        if consumer.paused:
            self._settler.add(delivery, Release())
            return
        log.warning(
            "message %s of %s is run alone: %s of it ended without a word",
            delivery.message.id,
            delivery.queue,
            counted(delivery.crashes, "delivery", "deliveries"),
        )
        self._alone = f"message {delivery.message.id} of {delivery.queue} runs alone; all else waits for it"
        try:
            await consumer.run_alone(delivery)
            await self._settler.flush()
        finally:
            self._alone = None

    async def _all_still(self, seconds: float | None) -> bool:
        try:
            async with asyncio.timeout(seconds) as self._patience:
                for consumer in self.consumers.values():
                    await consumer.still()
                return True
        except TimeoutError:
            pass  # somebody may have finished in this very moment
        finally:
            self._patience = None
        return all(not consumer.busy for consumer in self.consumers.values())

    def _lose(self, delivery: Delivery) -> None:
        log.warning("lost the lease of message %s in %s: somebody else has it", delivery.message.id, delivery.queue)
        for consumer in self.consumers.values():
            if consumer.worker.queue.name == delivery.queue:
                consumer.lose(delivery)


async def _closed(consumer: Consumer) -> None:
    with contextlib.suppress(BrokerError):
        await consumer.close()
