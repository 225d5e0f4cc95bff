"""``conveyor run``: an app's workers in supervised processes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import logging
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypedDict

from cyclopts import App

from conveyor import config
from conveyor.app import Conveyor
from conveyor.broker import Broker, Feature, QueueInfo
from conveyor.cli import EXIT_CODES
from conveyor.cli.application import broker_url, load_app
from conveyor.cli.check import unprovided
from conveyor.cli.terminal import FAILED, OK, Output
from conveyor.config import Config, LogFormat, LogLevel, place
from conveyor.core.pause import Switches
from conveyor.core.retry import RetryPolicy
from conveyor.core.settle import describe
from conveyor.core.words import counted
from conveyor.errors import BrokerError, BrokerUnavailable, ConfigurationError, LedgerUnavailable
from conveyor.runtime import logs
from conveyor.runtime.channel import Ask, ChildLink
from conveyor.runtime.control import runner_of, tell_left
from conveyor.runtime.health import STARTING, Health, HealthServer
from conveyor.runtime.metrics import Metrics, Snapshot, prometheus_text
from conveyor.runtime.runner import Runner
from conveyor.runtime.supervisor import CLOSE_SECONDS, MB, Limits, Supervisor

log = logging.getLogger("conveyor.run")

GIVEN: Final = {"broker": "CONVEYOR_GIVEN_BROKER", "database": "CONVEYOR_GIVEN_DATABASE"}
"""Flags that may hold passwords, and the variables in which a child gets them: everybody can read a command line."""
LEFTOVERS_SECONDS: Final = 1.0
"""How long, after the drain, a process waits for what its handlers left running."""
LEAVE_SECONDS: Final = 4.0
"""Beyond its grace period, a process waits so long for its broker; then it leaves by itself, before its supervisor kills it."""
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
KNOCKING: Final = RetryPolicy(initial=0.5, maximum=5.0)
"""How often a broker or database that is away is tried while nothing else can be done."""
LOCKED_OUT: Final = (
    "this is no outage, and waiting alone will not mend it: check user, password and virtual host in the broker's URL, "
    "and what the server permits that user"
)
PLAIN = Output()

command = App(
    name="run",
    help_epilogue=f"""Examples:
  conveyor run shop:app
  conveyor run shop:app --processes 4 --http :9000
  conveyor run shop:app --workers charge,ship --broker sqlite:///shop.queue
  conveyor run shop:app --max-rss 500 --max-messages 100000

A supervisor keeps the processes alive, hands back what a dead one held, and
replaces one that hangs or grows. A broker that is away is waited for, at the
start as well. SIGTERM (or Ctrl-C) drains: what runs gets the grace period,
everything else goes back to its queue. A second one hurries.
Logs are for people on a terminal, else one JSON object a line, on stderr; with
--json on stdout.

{EXIT_CODES}""",
)


class _Flags(TypedDict):
    """What the command line may set."""

    broker: str | None
    database: str | None
    processes: int | None
    http: str | None
    grace_seconds: float | None
    max_rss_mb: int | None
    max_messages: int | None
    hang_limit_seconds: float | None
    log_level: str | None
    log_format: str | None


@command.default
def run(
    app: str,
    /,
    *,
    processes: int | None = None,
    workers: str | None = None,
    broker: str | None = None,
    database: str | None = None,
    http: str | None = None,
    grace: float | None = None,
    max_rss: int | None = None,
    max_messages: int | None = None,
    hang_limit: float | None = None,
    log_level: LogLevel | None = None,
    log_format: LogFormat | None = None,
    no_keeper: bool = False,
    output: Output = PLAIN,
) -> int:
    """Run an app's workers.

    Parameters:
        app: The app, as module:attribute.
        processes: So many processes. Default: 1.
        workers: Only these, with commas between. Default: all.
        broker: The broker's URL. Default: the app's, else $CONVEYOR_BROKER, else a SQLite file.
        database: The ledger's SQLAlchemy URL. Default: the app's, else $CONVEYOR_DATABASE.
        http: Serve /livez, /readyz and /metrics here, for example :9000.
        grace: Seconds that running handlers may take to finish at the end. Default: 25.
        max_rss: Replace a process that uses more megabytes of memory.
            One of cpu=True handlers is killed at once, also in the
            middle of an attempt, which has failed then, and counts.
        max_messages: Replace a process after so many messages.
        hang_limit: Kill a process that stood still for so many seconds. Default: 30.
        log_level: The least severe entries that are written. Default: info.
        log_format: human, json, or auto: human on a terminal, else json. Default: auto.
        no_keeper: Keep no journal here: another machine does.
    """
    link = ChildLink.from_environment()  # first of all: from here on this process ends with its supervisor
    if link is not None:
        broker, database = (os.environ.pop(variable, None) for variable in GIVEN.values())
    flags = _Flags(
        broker=broker,
        database=database,
        processes=processes,
        http=http,
        grace_seconds=grace,
        max_rss_mb=max_rss,
        max_messages=max_messages,
        hang_limit_seconds=hang_limit,
        log_level=log_level,
        log_format="json" if output.json else log_format,
    )
    settings = config.load(Path.cwd(), os.environ, flags)
    as_json = {"auto": None, "human": False, "json": True}[settings.log_format]
    stream = sys.stdout if output.json else sys.stderr
    logs.configure(settings.log_level, as_json, process="run" if link is None else link.process, stream=stream)
    loaded = load_app(app, broker=broker, database=database)
    chosen = _chosen(loaded, workers)
    if link is None:
        _refuse_unprovided(loaded, chosen)
        child = _command(app, chosen, flags, json=output.json)
        keeper = None if no_keeper else _keeper_command(app, flags, json=output.json)
        given = {GIVEN["broker"]: broker, GIVEN["database"]: database}
        environment = os.environ | {variable: value for variable, value in given.items() if value is not None}
        return asyncio.run(_supervise(loaded, chosen, settings, child, keeper, environment))
    loaded.owner, loaded.switches = link.owner, link.switches
    loaded.number, loaded.metrics = link.process, Metrics(link.process)
    return _work(loaded, chosen, settings, link)


def _chosen(app: Conveyor, workers: str | None) -> list[str]:
    if not app.workers:
        raise ConfigurationError(f"{app.name} has no workers; decorate functions with @app.worker or @app.task")
    if workers is None:
        return list(app.workers)
    names = [name.strip() for name in workers.split(",") if name.strip()]
    for name in names:
        if name not in app.workers:
            near = difflib.get_close_matches(name, app.workers, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(app.workers)}"
            raise ConfigurationError(f"{app.name} has no worker {name!r}; {hint}")
    if not names:
        raise ConfigurationError("--workers names none; leave it out for all")
    return names


def _refuse_unprovided(app: Conveyor, workers: Sequence[str]) -> None:
    """Say once, before any process is started, what every one of them would fail for."""
    found = unprovided(app, [app.workers[name] for name in workers])
    if said := [f"{finding.subject} {finding.text}" for finding in found]:
        raise ConfigurationError("\n".join(said))


# --- the supervisor -----------------------------------------------------------------------------------------------------


async def _supervise(
    app: Conveyor,
    workers: Sequence[str],
    settings: Config,
    child: Sequence[str],
    keeper: Sequence[str] | None,
    environment: Mapping[str, str],
) -> int:
    broker = app.new_broker()
    shared = Feature.DURABLE not in broker.missing
    if not shared and settings.processes > 1:
        raise ConfigurationError(
            f"the broker of {app.name} lives inside one process, so {settings.processes} could not share it; "
            "leave --processes out, or use sqlite:///NAME.queue"
        )
    started = time.time()
    asked = asyncio.Event()
    knocking = Knocking(asked)

    async def hand_back(owner: str, why: str) -> None:
        if shared and (count := await broker.reclaim(owner, why)):
            log.info("handed back %s of a dead process", counted(count, "message"))
        await _free_outbox(app, owner)
        if shared:
            await tell_left(broker, runner_of(owner))

    supervisor = Supervisor(
        child,
        settings.processes,
        on_death=hand_back,
        # A broker that lives inside one process has its journal kept there, too.
        keeper=keeper if shared and app.journal_place(broker) is not None else None,
        limits=limits(settings),
        environment=environment,
    )
    async with contextlib.AsyncExitStack() as stack:
        if settings.http_address is not None:
            server = HealthServer(
                settings.http_address,
                health=lambda: supervisor.health() if knocking.at is None else knocking.health,
                metrics=lambda: _metrics(supervisor, broker if shared and knocking.at is None else None, started),
            )
            await stack.enter_async_context(server)
            log.info("health and metrics on port %d: /livez /readyz /metrics", server.port)
        log.info(
            "running %s: %s; %s; broker %s",
            app.name,
            ", ".join(workers),
            counted(settings.processes, "process", "processes"),
            _shown(app),
        )
        if shared:
            loop = asyncio.get_running_loop()
            for number in (*SIGNALS, signal.SIGHUP):
                loop.add_signal_handler(number, asked.set)  # until the supervisor hears them
            stack.push_async_callback(_let_go, broker)
            await knocking.until_done(broker.open)
            await knocking.until_done(lambda: broker.declare([worker.queue for worker in app.workers.values()]))
            if asked.is_set():
                return OK
        return await supervisor.run()


class Knocking:
    """Waits for a broker or a database that is away, until it is there or the process is asked to end.

    Parameters:
        asked: set when the process has to end.
    """

    def __init__(self, asked: asyncio.Event) -> None:
        self.at: str | None = None
        """What is being waited for, in words."""
        self._asked = asked

    @property
    def health(self) -> Health:
        """How a process is that has not begun."""
        return STARTING if self.at is None else Health(unready=(self.at,))

    async def until_done(self, what: Callable[[], Awaitable[object]]) -> None:
        """Do what needs it, however long that takes; returns early where the process is asked to end.

        Raises:
            ConveyorError: it is there, and cannot be used.
        """
        tries = 0
        while not self._asked.is_set():
            try:
                await self._unless_asked(what())
            except (BrokerUnavailable, LedgerUnavailable) as error:
                tries += 1
                wait = KNOCKING.wait_seconds(tries, random.random())
                self.at = f"waiting for it to be back: {describe(error)}"
                if is_locked_out(error):
                    log.error("%s; %s; trying again in %.1f s", describe(error), LOCKED_OUT, wait)
                else:
                    log.warning("%s; trying again in %.1f s", describe(error), wait)
                await self._unless_asked(asyncio.sleep(wait))
            else:
                break
        if tries and not self._asked.is_set():
            log.info("connected after %d tries", tries + 1)
        self.at = None

    async def _unless_asked(self, work: Awaitable[object]) -> None:
        doing, asking = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait((doing, asking), return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                doing.result()
        finally:
            for task in (doing, asking):
                task.cancel()
            await asyncio.gather(doing, asking, return_exceptions=True)


async def _let_go(broker: Broker) -> None:
    """Close the supervisor's own connection; it holds nothing, so a broker that is silent need not hold up the end."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await broker.close()
    except TimeoutError:
        log.warning("the broker did not let go of the supervisor within %g s; left without a word", CLOSE_SECONDS)


def is_locked_out(error: Exception) -> bool:
    """Whether the server is there and refuses us, as by AMQP's 403 (a wrong password) or 530 (no such virtual host)."""
    return re.search(r"\b(403 ACCESS_REFUSED|530 NOT_ALLOWED)\b", str(error)) is not None


async def _free_outbox(app: Conveyor, owner: str) -> None:
    """Let other relays send at once what a dead process had committed and not sent; else they do after its claims end."""
    ledger = app.new_ledger(owner)
    if ledger is None:
        return
    try:
        await ledger.reclaim(owner)
    except Exception as error:  # the database may be down, or not migrated yet; nothing is lost by waiting
        log.info("what a dead process left in the outbox goes out a little later: %s", describe(error))
    finally:
        await ledger.close()


def _command(app: str, workers: Sequence[str], flags: _Flags, *, json: bool) -> list[str]:
    """What starts a process that works: this very command, with what the command line said about it (but see GIVEN)."""
    said = {
        "--workers": ",".join(workers),
        "--grace": flags["grace_seconds"],
        "--max-rss": flags["max_rss_mb"],
        "--log-level": flags["log_level"],
        "--log-format": flags["log_format"],
    }
    given = [f"{flag}={value}" for flag, value in said.items() if value is not None]
    return [sys.executable, "-m", "conveyor", "run", *given, *(["--json"] if json else []), "--", app]


def _keeper_command(app: str, flags: _Flags, *, json: bool) -> list[str]:
    """What starts the process that keeps the journal."""
    said = {"--log-level": flags["log_level"], "--log-format": flags["log_format"]}
    given = [f"{flag}={value}" for flag, value in said.items() if value is not None]
    return [sys.executable, "-m", "conveyor", "journal", *given, *(["--json"] if json else []), "--", app]


def limits(settings: Config) -> Limits:
    """What the settings say about the processes."""
    said: dict[str, Any] = {
        "grace_seconds": settings.grace_seconds,
        "max_rss_bytes": None if settings.max_rss_mb is None else settings.max_rss_mb * MB,
        "max_messages": settings.max_messages,
        "hang_limit_seconds": settings.hang_limit_seconds,
    }
    return dataclasses.replace(Limits(), **{name: value for name, value in said.items() if value is not None})


async def _metrics(supervisor: Supervisor, broker: Broker | None, started: float) -> bytes:
    queues: list[QueueInfo] = []
    if broker is not None:
        try:
            # Temporary ones are nobody's work, and each of their names would be a series of its own for ever.
            queues = [queue for queue in await broker.queues() if not queue.temporary]
        except BrokerError as error:  # what the processes did is worth knowing all the more
            log.warning("the metrics are without queues: %s", describe(error))
    return prometheus_text(supervisor.snapshots(), queues, uptime_seconds=time.time() - started)


def _shown(app: Conveyor) -> str:
    try:
        return place(broker_url(app))
    except ConfigurationError:
        return "made in code"


# --- a process that works -----------------------------------------------------------------------------------------------


def _work(app: Conveyor, workers: Sequence[str], settings: Config, link: ChildLink) -> int:
    app.max_rss_bytes = limits(settings).max_rss_bytes
    return asyncio.run(_drained(app, workers, settings, link))


def end_soon(code: int) -> None:
    """All is settled and closed: what handlers left running (a task that swallows cancellation, a thread) ends with the process."""

    def end() -> None:
        log.warning("handlers left something running that does not end; this process ends without it")
        sys.stdout.flush()
        os._exit(code)

    timer = threading.Timer(LEFTOVERS_SECONDS, end)
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def heard_signals(hear: Callable[[str], object]) -> Iterator[None]:
    """Hear the signals to end in this event loop while the block lasts; one that comes later does not make an end a crash."""
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        signal.signal(number, lambda number, _: loop.call_soon_threadsafe(hear, signal.Signals(number).name))
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _announce(app: Conveyor, workers: Sequence[str]) -> None:
    for name in workers:
        worker = app.workers[name]
        log.info("%s listens on %s, %d at once", name, worker.queue.name, worker.concurrency)
    log.info("%s is ready", app.name)


def _switches(link: ChildLink, runner: Runner | None) -> Switches:
    return link.switches if runner is None or runner.control is None else runner.control.switches


async def _drained(app: Conveyor, workers: Sequence[str], settings: Config, link: ChildLink) -> int:
    """Run the workers until a signal or the supervisor asks to end, then until they have drained; gives the exit code."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    knocking = Knocking(asked)
    runner: Runner | None = None
    deadlines = contextlib.ExitStack()

    def health() -> Health:
        return knocking.health if runner is None else runner.health()

    def snapshot() -> Snapshot:
        return app.metrics.snapshot() if runner is None else runner.snapshot()

    def cut() -> None:
        if runner is not None:
            runner.cut()

    def code() -> int:
        return FAILED if runner is not None and runner.was_cut else OK

    def leave() -> None:
        log.warning(
            "settling and closing take too long (is the broker silent?): left without a word; what was held comes back"
        )
        link.goodbye(health(), app.metrics.snapshot())
        sys.stdout.flush()
        os._exit(code())

    def drain(ask: Ask) -> None:
        deadlines.close()
        if ask.grace_seconds is not None:
            deadlines.callback(loop.call_later(ask.grace_seconds, cut).cancel)
            deadlines.callback(loop.call_later(ask.grace_seconds + LEAVE_SECONDS, leave).cancel)
        asked.set()

    def on_signal(name: str) -> None:
        # One shutdown may bring several: systemd signals the supervisor and every process, and the supervisor passes its
        # own on. So a second one means nothing here; to hurry is asked over the line.
        if not asked.is_set():
            drain(Ask(name, limits(settings).grace_seconds))

    beats = asyncio.create_task(
        link.run(health, snapshot, drain, lambda: _switches(link, runner)), name="signs of life"
    )
    try:
        with heard_signals(on_signal):
            log.info("starting %s: connecting to %s", app.name, _shown(app))
            await knocking.until_done(app.connect)
            if not asked.is_set():
                log.info("connected to %s", _shown(app))
                # Whoever asks for the drain says when it is enough: see cut().
                inside = Feature.DURABLE in app.broker.missing
                async with app.running(workers, grace_seconds=None, keeper=inside) as runner:
                    _announce(app, workers)
                    await asked.wait()
            await app.close()
    finally:
        deadlines.close()
        beats.cancel()
    link.goodbye(health(), app.metrics.snapshot())
    end_soon(code())
    return code()
