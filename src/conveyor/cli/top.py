"""``conveyor top``: the queues, the runners and the latest errors of a broker, live in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from cyclopts import App, Parameter, validators

from conveyor.broker import Broker, DeadFilter, QueueInfo
from conveyor.cli import EXIT_CODES
from conveyor.cli.connection import Where, connected
from conveyor.cli.dead import redrive_all
from conveyor.cli.terminal import OK
from conveyor.config import masked
from conveyor.core.settle import describe
from conveyor.core.words import counted
from conveyor.errors import BrokerError, BrokerUnavailable, ConfigurationError, MissingExtra
from conveyor.runtime.control import Failure, Operator, Status, WorkerStatus, internal

if TYPE_CHECKING:
    from conveyor.cli.screen import Top

WINDOW_SECONDS: Final = 10.0
"""A rate is that of so many seconds."""
LOOK_SECONDS: Final = 10.0
"""A look at the broker that takes longer has failed."""
SILENT_LOOKS: Final = 3
"""A runner that leaves so many questions unanswered is said to be silent."""
GONE_SECONDS: Final = 30.0
"""A runner that has been silent for so long is forgotten: it could not say that it ended, nor had it a supervisor to do so."""
AGAIN_SECONDS: Final = 1.0
"""Between two tries while the broker is away."""
FAILURES: Final = 200
"""Errors that are kept."""
GONE: Final = 100
"""Runners that are remembered by name after they are gone: one that was only silent comes back."""

command = App(
    name="top",
    help_epilogue=f"""Examples:
  conveyor top shop:app
  conveyor top --broker sqlite:///shop.queue
  conveyor top --broker redis://localhost --interval 5

With APP it shows that app's queues and runners, with --broker all that there
are. Runners are asked while this runs, and only then. Keys: p pauses or
resumes the selected queue, r puts its dead letters back, Enter shows the
whole of what is selected, ? helps, q quits. For programs: conveyor queues
--watch --json.

{EXIT_CODES}""",
)


@command.default
def top(
    app: str | None = None,
    /,
    *,
    broker: str | None = None,
    interval: Annotated[float, Parameter(validator=validators.Number(gte=0.2))] = 1.0,
    debug: bool = False,
) -> int:
    """Watch queues, runners and errors, live.

    Parameters:
        app: The app that is meant, as module:attribute.
        broker: The broker's URL. Default: the app's, else $CONVEYOR_BROKER, else conveyor.toml's.
        interval: Seconds from one look to the next. Default: 1.
        debug: Show the traceback of an error.
    """
    del debug  # the command line itself looks for it
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigurationError(
            "conveyor top needs a terminal as its stdin and stdout; for programs there is: conveyor queues --watch --json"
        )
    name, queues = None, None
    if app is not None:
        from conveyor.cli.application import load_app

        found = load_app(app)
        name, queues = found.name, frozenset(worker.queue.name for worker in found.workers.values())
    watcher = Watcher(Where(broker=broker, app=app).url(), interval, name, queues)
    try:
        from conveyor.cli.screen import Top
    except ModuleNotFoundError as error:
        raise MissingExtra("conveyor top", "top") from error
    with _quiet():
        asyncio.run(_show(watcher, Top(watcher)))
    return OK


async def _show(watcher: Watcher, screen: Top) -> None:
    with contextlib.suppress(BrokerUnavailable):  # then the screen says so, and waits
        async with connected(watcher.url):  # a wrong address is said before the screen is taken
            pass
    watching = asyncio.create_task(watcher.run(screen.show), name="watch the broker")
    watching.add_done_callback(lambda _: screen.exit())
    try:
        await screen.run_async()
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Log lines would run over the screen; what matters of them is shown on it."""
    logger = logging.getLogger("conveyor")
    nowhere, propagates = logging.NullHandler(), logger.propagate
    logger.addHandler(nowhere)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(nowhere)
        logger.propagate = propagates


# --- what there is to see -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QueueRow:
    """A queue, and what the runners do with it.

    Parameters:
        in_flight: as the broker tells, or the runners, who may know of more.
        oldest_seconds: how long the oldest ready message has been ready; None where none is, or nobody can tell.
        rate: messages handled in a second, whatever came of them.
        failed: attempts that ended with an error.
        retried: of those, the ones to be tried again.
        workers: names of the workers that receive from it.
    """

    name: str
    ready: int
    in_flight: int
    delayed: int
    dead: int
    oldest_seconds: float | None
    rate: float
    failed: int
    retried: int
    paused: bool
    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunnerRow:
    """A runner.

    Parameters:
        silent_seconds: how long it has left questions unanswered; 0 where it has not.
    """

    status: Status
    rate: float
    silent_seconds: float

    @property
    def health(self) -> str:
        """How it is, the most important first."""
        if self.silent_seconds:
            return f"silent {self.silent_seconds:.0f} s"
        health = self.status.health
        return "; ".join(dict.fromkeys((*health.unhealthy, *health.unready))) or "ready"

    @property
    def well(self) -> bool:
        """Nothing is wrong with it."""
        return self.health == "ready"


@dataclass(frozen=True, slots=True)
class Picture:
    """All that is to be seen at one moment.

    Parameters:
        outage: why the broker cannot be looked at; the rest is from before then.
        failures: the latest errors, newest first.
    """

    queues: tuple[QueueRow, ...] = ()
    runners: tuple[RunnerRow, ...] = ()
    failures: tuple[tuple[str, Failure], ...] = ()
    outage: str | None = None
    outage_seconds: float = 0.0
    looked: bool = False

    @property
    def rate(self) -> float:
        """Messages handled in a second, over all runners."""
        return sum(row.rate for row in self.runners)


def handled(worker: WorkerStatus) -> int:
    """Attempts that have ended, well or not."""
    return worker.handled + worker.failed


@dataclass(slots=True)
class Rates:
    """How fast counters grow."""

    _seen: dict[tuple[str, str], deque[tuple[float, int]]] = field(default_factory=dict)

    def note(self, status: Status) -> None:
        """Take in what a runner has done by now."""
        for worker in status.workers:
            points = self._seen.setdefault((status.runner, worker.name), deque())
            if not points or points[-1][0] < status.at:
                points.append((status.at, handled(worker)))
            while len(points) > 2 and points[1][0] <= status.at - WINDOW_SECONDS:
                points.popleft()

    def of(self, runner: str, worker: str) -> float:
        """Messages in a second; 0.0 where too little is known."""
        points = self._seen.get((runner, worker))
        if points is None or len(points) < 2:
            return 0.0
        (began, before), (ended, now) = points[0], points[-1]
        return max(0, now - before) / (ended - began)

    def forget(self, runner: str) -> None:
        """A runner is gone."""
        for key in [key for key in self._seen if key[0] == runner]:
            del self._seen[key]


def queue_rows(
    infos: Sequence[QueueInfo],
    statuses: Sequence[Status],
    rates: Rates,
    paused: frozenset[str],
    others: Sequence[WorkerStatus],
) -> tuple[QueueRow, ...]:
    """What is known of each queue.

    Parameters:
        statuses: of the runners that answer.
        others: what the workers of runners did that are silent, or gone.
    """
    rows = []
    for info in infos:
        working = [(s, worker) for s in statuses for worker in s.workers if worker.queue == info.name]
        counting = [*(worker for _, worker in working), *(worker for worker in others if worker.queue == info.name)]
        rows.append(
            QueueRow(
                name=info.name,
                ready=info.ready,
                in_flight=max(info.in_flight, sum(worker.in_flight for _, worker in working)),
                delayed=info.delayed,
                dead=info.dead,
                oldest_seconds=info.oldest_seconds,
                rate=sum(rates.of(status.runner, worker.name) for status, worker in working),
                failed=sum(worker.failed for worker in counting),
                retried=sum(worker.retried for worker in counting),
                paused=info.name in paused,
                workers=tuple(dict.fromkeys(worker.name for _, worker in working)),
            )
        )
    return tuple(rows)


def _together(one: WorkerStatus | None, other: WorkerStatus) -> WorkerStatus:
    """What two that are gone have done."""
    if one is None:
        return other
    return msgspec.structs.replace(
        other,
        handled=one.handled + other.handled,
        failed=one.failed + other.failed,
        retried=one.retried + other.retried,
        dead=one.dead + other.dead,
    )


class Watcher:
    """Looks at a broker and its runners again and again, and does what its operator wants.

    Parameters:
        url: the broker's.
        interval_seconds: from one look to the next.
        app: only the runners of this application; None is all.
        queues: only these queues; None is all but Conveyor's own.
    """

    def __init__(
        self, url: str, interval_seconds: float, app: str | None = None, queues: frozenset[str] | None = None
    ) -> None:
        self.url: Final = url
        self.title: Final = masked(url)
        self.picture = Picture()
        self._interval_seconds = interval_seconds
        self._app = app
        self._queues = queues
        self._rates = Rates()
        self._failures: deque[tuple[str, Failure]] = deque(maxlen=FAILURES)
        self._gone: dict[str, tuple[WorkerStatus, ...]] = {}
        """Runner → what its workers had done when it was forgotten; of the latest ones."""
        self._gone_before: dict[tuple[str, str], WorkerStatus] = {}
        """Queue and worker → what those had done that were forgotten before these."""
        self._known: dict[str, int] = {}
        """Runner → the number of its latest failure that is known."""
        self._at: tuple[Broker, Operator] | None = None
        self._look_now = asyncio.Event()
        self._away_since: float | None = None

    async def run(self, show: Callable[[Picture], object]) -> None:
        """Look, and show, until cancelled. While the broker is away, it is tried again and again."""
        while True:
            try:
                async with connected(self.url) as broker, Operator(broker) as operator:
                    operator.on_status, operator.on_gone = self._note, self._note_gone
                    self._at = broker, operator
                    try:
                        await self._follow(broker, operator, show)
                    finally:
                        self._at = None
            except BrokerError as error:
                self._darken(error, show)
            await asyncio.sleep(AGAIN_SECONDS)

    async def _follow(self, broker: Broker, operator: Operator, show: Callable[[Picture], object]) -> None:
        """Look until that fails; it is shown at once, because to let go of a broker that is away may take a while."""
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    self.picture = await self._look(broker, operator)
            except (BrokerError, TimeoutError) as error:
                self._darken(error, show)
                return
            self._away_since = None
            show(self.picture)
            await self._rest()

    def _darken(self, error: Exception, show: Callable[[Picture], object]) -> None:
        now = time.monotonic()
        self._away_since = self._away_since or now
        why = describe(error) if isinstance(error, BrokerError) else f"no answer for {LOOK_SECONDS:.0f} s"
        seconds = now - self._away_since
        self.picture = dataclasses.replace(self.picture, outage=masked(why), outage_seconds=seconds)
        show(self.picture)

    async def _rest(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._interval_seconds):
                await self._look_now.wait()
        self._look_now.clear()

    async def _look(self, broker: Broker, operator: Operator) -> Picture:
        await operator.ask()
        infos = [info for info in await broker.queues() if self._is_meant(info)]
        now = time.monotonic()
        runners = []
        for runner, status in list(operator.statuses.items()):
            silent = now - operator.heard[runner]
            silent = silent if silent > SILENT_LOOKS * self._interval_seconds + 1 else 0.0
            if silent > GONE_SECONDS:
                operator.forget(runner)
            elif self._app in (None, status.app):
                rate = 0.0 if silent else sum(self._rates.of(runner, worker.name) for worker in status.workers)
                runners.append(RunnerRow(status, rate, silent))
        runners.sort(key=lambda row: (row.status.app, len(row.status.process), row.status.process, row.status.pid))
        answering = [row.status for row in runners if not row.silent_seconds]
        silent_ones = [worker for row in runners if row.silent_seconds for worker in row.status.workers]
        return Picture(
            queue_rows(infos, answering, self._rates, operator.paused, [*silent_ones, *self._done_by_the_gone()]),
            tuple(runners),
            tuple(sorted(self._failures, key=lambda each: each[1].at, reverse=True)),
            looked=True,
        )

    def _is_meant(self, info: QueueInfo) -> bool:
        if self._queues is not None:
            return info.name in self._queues
        return not info.temporary and not internal(info.name)

    def _note(self, status: Status) -> None:
        self._rates.note(status)
        self._gone.pop(status.runner, None)  # it was only silent, and counts for itself again
        if self._app not in (None, status.app):
            return
        known = self._known.get(status.runner, 0)
        for failure in status.failures:
            if failure.number > known:
                self._failures.append((status.runner, failure))
                self._known[status.runner] = failure.number

    def _note_gone(self, status: Status) -> None:
        """A runner is gone; what it counted stays counted."""
        self._rates.forget(status.runner)
        if self._app not in (None, status.app):
            return
        self._gone[status.runner] = status.workers
        while len(self._gone) > GONE:
            oldest = next(iter(self._gone))
            for worker in self._gone.pop(oldest):
                key = worker.queue, worker.name
                self._gone_before[key] = _together(self._gone_before.get(key), worker)
            self._known.pop(oldest, None)

    def _done_by_the_gone(self) -> list[WorkerStatus]:
        return [*self._gone_before.values(), *itertools.chain(*self._gone.values())]

    # --- what its operator wants ------------------------------------------------------------------------------------------

    async def turn(self, queue: str) -> str:
        """Pause a queue, or let a paused one go on; says what came of it.

        Raises:
            BrokerError: the broker is away.
        """
        _, operator = self._there()
        paused = queue not in operator.paused
        if not operator.statuses or not await operator.turn(queue, paused=paused):
            return "no runner is there, and only runners keep a pause: nothing was changed"
        self._look_now.set()
        return f"{queue} is {'paused' if paused else 'going on'}"

    async def redrive(self, queue: str) -> str:
        """Put all dead letters of a queue back into it; says how many.

        Raises:
            BrokerError: the broker is away.
        """
        broker, _ = self._there()
        total = sum(row.dead for row in self.picture.queues if row.name == queue)
        done = await redrive_all(broker, DeadFilter(queue=queue), total)
        self._look_now.set()
        return f"{counted(done, 'dead letter')} put back into {queue}"

    def _there(self) -> tuple[Broker, Operator]:
        if self._at is None:
            raise BrokerUnavailable("the broker is away")
        return self._at
