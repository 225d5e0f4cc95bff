"""The supervisor: keeps N processes alive, hands back what a dead one held, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import random
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from conveyor.core.pause import Switches, merged
from conveyor.core.retry import RetryPolicy
from conveyor.core.settle import describe
from conveyor.core.words import counted
from conveyor.runtime.channel import CHANNEL, CHILD, OWNER, PAUSED, Ask, Beat
from conveyor.runtime.health import STARTING, Health
from conveyor.runtime.loop import DEFAULT_GRACE_SECONDS
from conveyor.runtime.metrics import Snapshot, ended, merge, resident_bytes

log = logging.getLogger("conveyor.supervisor")

TICK_SECONDS: Final = 0.25
"""How often limits are looked at."""
CLOSE_SECONDS: Final = 5.0
"""Beyond its grace period a process gets so long to settle, say goodbye and close its connections."""
HURRY_SECONDS: Final = 2.0
"""After a second signal a process gets so long to release what it holds."""
ONE_REQUEST_SECONDS: Final = 1.0
"""Signals so soon after one that counted are the same request, told by several: timeout signals a whole group, and make its child."""
CALM_SECONDS: Final = 10.0
"""A process that lived so long is replaced at once, whatever happened to those before it."""
UNREADY_RESTARTS: Final = RetryPolicy(initial=0.1, maximum=30.0)
"""Processes that end before they were ready will most likely do so again."""
READY_RESTARTS: Final = RetryPolicy(initial=0.1, maximum=1.0)
"""Processes that worked and ended soon: a bad message, or somebody who kills. Its neighbours in the queue should not wait."""
RECLAIM_SECONDS: Final = 5.0
"""One try to hand back what a dead process held; and all the tries there are while shutting down."""
RECLAIM_RETRIES: Final = RetryPolicy(initial=0.1, maximum=5.0)
LAST_WORDS_SECONDS: Final = 1.0
"""How long the line of a dead process is read to its end."""
RSS_KILL: Final = 1.25
"""A process that grows so far over its limit while it drains is killed, before the machine has no memory left."""
JITTER: Final = 0.2
"""Share of a limit by which it is lowered at random, so that processes started together are not replaced together."""
LINE_LIMIT: Final = 16 * 1024 * 1024
"""Bytes of one sign of life, with the counters of every worker: far more than there can be."""
EXIT_CONFIGURATION: Final = 2
"""A child that ends with this code before any was ready is not set up to run: starting it again would not help."""
MB: Final = 1_000_000
KEEPER_SECONDS: Final = 5.0
"""The first processes wait so long for the keeper, which knows what was cancelled while nobody was there."""
KEEPER: Final = "keeper"
"""The name of the process that keeps the journal; the others have numbers."""

OnDeath = Callable[[str, str], Awaitable[object]]
"""Hands back what a dead owner held; given the owner and why it died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a process may do before it is replaced.

    Parameters:
        grace_seconds: how long it may take to finish what runs when it is asked to end.
        start_seconds: how long it may take until its first sign of life.
        hang_limit_seconds: without a sign of life for so long it is killed; unwell for so long it is replaced.
        max_rss_bytes: memory above which it is drained and replaced, and killed where draining does not help.
        max_messages: deliveries after which it is drained and replaced.
        max_age_seconds: age at which it is drained and replaced.
    """

    grace_seconds: float = DEFAULT_GRACE_SECONDS
    start_seconds: float = 300.0
    hang_limit_seconds: float = 30.0
    max_rss_bytes: int | None = None
    max_messages: int | None = None
    max_age_seconds: float | None = None


class State(msgspec.Struct, kw_only=True):
    """What is known about a process at one moment; seconds count only while the supervisor itself was awake.

    Parameters:
        jitter: 0 to JITTER, drawn once for each process.
        unwell: what it says about itself that calls for a replacement.
        asked: what it was last asked.
        patience_seconds: how long it may take to do that.
    """

    jitter: float = 0.0
    age_seconds: float = 0.0
    silent_seconds: float = 0.0
    started: bool = False
    stopped: bool = False
    resident_bytes: int = 0
    received: int = 0
    unwell: str = ""
    unwell_seconds: float = 0.0
    asked: Ask | None = None
    asked_seconds: float = 0.0
    patience_seconds: float = 0.0


class Kill(msgspec.Struct, frozen=True):
    """The decision to end a process at once.

    Parameters:
        stacks: it can still say where it stands (its event loop is blocked): let it.
    """

    why: str
    stacks: bool = False


def decide(state: State, limits: Limits) -> Kill | Ask | None:
    """What to do about a process: kill it, ask it to drain, or let it work."""
    if not state.started:
        if state.age_seconds >= limits.start_seconds:
            return Kill(f"gave no sign of life within {limits.start_seconds:g} s of its start", stacks=True)
    elif state.silent_seconds >= limits.hang_limit_seconds:
        what = "it is stopped" if state.stopped else "its event loop is blocked"
        return Kill(f"made no sign of life for {limits.hang_limit_seconds:g} s: {what}", stacks=not state.stopped)
    used, most = state.resident_bytes, limits.max_rss_bytes
    too_big = f"used {used / MB:.0f} MB, over --max-rss {(most or 0) / MB:.0f} MB"
    if most is not None and used > most * RSS_KILL:
        return Kill(too_big)
    if state.asked is not None:
        if state.asked_seconds < state.patience_seconds:
            return None
        return Kill(f"{state.asked.why}; did not drain within {state.patience_seconds:g} s")
    if most is not None and used > most:
        return Ask(too_big, None)
    if limits.max_messages is not None and state.received >= max(1, limits.max_messages * (1 - state.jitter)):
        return Ask(f"received {state.received} messages", limits.grace_seconds)
    if limits.max_age_seconds is not None and state.age_seconds >= limits.max_age_seconds * (1 - state.jitter):
        return Ask(f"is {state.age_seconds:.0f} s old", limits.grace_seconds)
    if state.unwell_seconds >= limits.hang_limit_seconds:
        return Ask(f"was unwell for {state.unwell_seconds:.0f} s: {state.unwell}", limits.grace_seconds)
    return None


class Child:
    """One incarnation of a process, and the supervisor's end of the line to it."""

    def __init__(self, name: str, owner: str, process: subprocess.Popen[bytes], line: socket.socket) -> None:
        self.name = name
        self.owner = owner
        self.process = process
        self.state = State(jitter=random.uniform(0, JITTER))
        self.beat: Beat | None = None
        self.was_ready = False
        self.killed_for = ""
        self.switches: Switches = {}
        """What it knows of paused queues."""
        self._line = line
        self._writer: asyncio.StreamWriter | None = None

    @classmethod
    def start(
        cls, command: Sequence[str], name: str, environment: Mapping[str, str], switches: Switches | None = None
    ) -> Child:
        """Start a process in a process group of its own: a terminal's Ctrl-C reaches only the supervisor.

        Takes a millisecond, and not in a thread: the kernel ends a child with the thread that started it.
        """
        ours, theirs = socket.socketpair()
        owner = uuid.uuid4().hex
        known = {OWNER: owner, CHANNEL: str(theirs.fileno()), CHILD: name}
        known[PAUSED] = msgspec.json.encode(switches or {}).decode()
        try:
            with theirs:
                process = subprocess.Popen(  # noqa: S603 - the command is the operator's own
                    command,
                    env={**environment, **known},
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    process_group=0,
                )
        except BaseException:
            ours.close()
            raise
        return cls(name, owner, process, ours)

    async def ended(self) -> int:
        """Hear what it says until it ends, then end what it left behind; gives its exit code."""
        reader, self._writer = await asyncio.open_connection(sock=self._line, limit=LINE_LIMIT)
        hearing = asyncio.create_task(self._listen(reader), name=f"hear process {self.name}")
        try:
            await _exited(self.process)
            self._kill_all()
            code = self.process.wait()
            # Its last words are still in the line; the limit is for a daemon that got away and holds the other end.
            await asyncio.wait({hearing}, timeout=LAST_WORDS_SECONDS)
            return code
        finally:
            hearing.cancel()
            self._writer.close()

    @property
    def health(self) -> Health:
        return STARTING if self.beat is None else self.beat.health

    @property
    def snapshot(self) -> Snapshot:
        known = Snapshot(process=self.name) if self.beat is None else self.beat.snapshot
        return msgspec.structs.replace(known, pid=self.process.pid, resident_bytes=self.state.resident_bytes)

    @property
    def left_in_order(self) -> bool:
        """It said goodbye, and ended with 0."""
        return self.beat is not None and self.beat.goodbye and not self.killed_for and self.process.returncode == 0

    def __str__(self) -> str:
        return f"process {self.name} (pid {self.process.pid})"

    def pass_time(self, seconds: float) -> None:
        """Bring the state up to date, so many seconds after the last time."""
        state = self.state
        state.age_seconds += seconds
        state.silent_seconds += seconds
        state.unwell_seconds = state.unwell_seconds + seconds if state.unwell else 0.0
        state.asked_seconds += seconds if state.asked else 0.0
        state.resident_bytes = resident_bytes(self.process.pid) or state.resident_bytes
        state.stopped = _is_stopped(self.process.pid)

    def ask(self, ask: Ask, *, patience_seconds: float) -> None:
        """Ask it to drain and end."""
        self._expect(ask, patience_seconds)
        if self._writer is not None:
            self._writer.write(msgspec.json.encode(ask) + b"\n")

    def terminate(self, why: str, *, grace_seconds: float, patience_seconds: float) -> None:
        """Send SIGTERM: drain and end."""
        self._expect(Ask(why, grace_seconds), patience_seconds)
        self._signal(signal.SIGTERM)

    def kill(self, why: str = "", *, stacks: bool = False) -> None:
        """End it now; where stacks is set the process writes its stacks first, and another call ends it."""
        again, self.killed_for = self.killed_for, self.killed_for or why
        if stacks and not again:
            self._signal(signal.SIGABRT)  # faulthandler writes all stacks, then the process dies
        else:
            self._kill_all()

    def kill_now(self) -> None:
        """End it and wait for that, without an event loop."""
        self.kill("was killed with its supervisor")
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal; until the process is reaped, nobody else can have its pid."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def _kill_all(self) -> None:
        """Kill it and what it started; until it is reaped, nobody else can have this process group."""
        self._signal(signal.SIGKILL)
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _expect(self, ask: Ask, patience_seconds: float) -> None:
        self.state.asked, self.state.asked_seconds, self.state.patience_seconds = ask, 0.0, patience_seconds

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._hear(msgspec.json.decode(line, type=Beat))
        except ConnectionError:
            pass
        except (ValueError, msgspec.MsgspecError) as error:
            self.kill(f"spoke nonsense on its line: {describe(error)}")

    def _hear(self, beat: Beat) -> None:
        self.beat = beat
        self.switches = merged(self.switches, beat.switches)
        self.was_ready = self.was_ready or beat.health.ready
        self.state.started = True
        self.state.silent_seconds = 0.0
        self.state.received = beat.snapshot.received
        self.state.unwell = "; ".join(beat.health.unhealthy)


class Supervisor:
    """Keeps processes of one command alive until it is told to stop.

    Each child finds its line to the supervisor with ChildLink.from_environment(). A child that dies is replaced: at once
    where it lived long, else after a back-off. What it held is handed back at once. SIGTERM, SIGINT and SIGHUP drain all; a
    second one gives them two seconds, a third none.

    Parameters:
        command: the children's program and arguments.
        processes: how many.
        on_death: called with the owner of a child that did not leave in order, and why it ended, until it succeeds.
        keeper: the program and arguments of one more process, which keeps the journal; it ends behind all others, and where it fails
            they work on. None is without.
        environment: the children's environment; this process' own where None.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        *,
        on_death: OnDeath,
        keeper: Sequence[str] | None = None,
        limits: Limits = Limits(),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.problems: list[str] = []
        """What did not end in order after the supervisor was told to stop; or why it stopped by itself."""
        self._command = command
        self._names = [str(number + 1) for number in range(processes)]
        self._keeper = keeper
        self._last = asyncio.Event()
        """All others have ended, so that the keeper may."""
        self._on_death = on_death
        self._limits = limits
        self._environment = dict(os.environ if environment is None else environment)
        self._environment.pop("NOTIFY_SOCKET", None)
        self._children: dict[str, Child] = {}
        self._absent: dict[str, str] = {}
        self._gone = Snapshot(process="ended")
        self._switches: Switches = {}
        """What the processes that ended knew of paused queues."""
        self._ever_ready = False
        self._exit_code = 0
        self._signals = 0
        self._last_signal: float | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Keep the processes alive until stop(), a signal, or a child that is not set up to run.

        Returns:
            The exit code: 0 where all drained in time, 1 where something was cut (see problems), 2 where a child could
            not be started for its configuration.
        """
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch(), name="limits")
                keeping = None
                if self._keeper is not None:
                    keeping = group.create_task(self._keep(KEEPER, group), name=f"keep {KEEPER}")
                    await self._until_kept()
                slots = [group.create_task(self._keep(name, group), name=f"keep {name}") for name in self._names]
                await asyncio.wait(slots)
                if keeping is not None:
                    self._end_keeper()
                    await keeping
                watch.cancel()
        finally:
            for child in self._children.values():
                child.kill_now()
            for number in signals:
                loop.remove_signal_handler(number)
        for problem in self.problems:
            log.error(problem)
        return self._exit_code or (1 if self.problems else 0)

    def stop(self, why: str) -> None:
        """Drain every process, and end when all have ended."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        _notify("STOPPING=1")
        grace = self._limits.grace_seconds
        waiting = counted(len(self._workers()), "process", "processes")
        log.info("stopping: %s; %s may take %g s to finish what runs", why, waiting, grace)
        for child in self._workers().values():
            if child.state.asked is None:
                child.terminate(why, grace_seconds=grace, patience_seconds=grace + CLOSE_SECONDS)

    def health(self) -> Health:
        """How the processes are, each reason with its process: ready where at least one is and none is asked to stop."""
        parts = {name: child.health for name, child in sorted(self._workers().items())}
        unready = [f"process {name}: {why}" for name, health in parts.items() for why in health.unready]
        unready += [f"process {name}: {why}" for name, why in self._absent.items() if name != KEEPER]
        unhealthy = tuple(f"process {name}: {why}" for name, health in parts.items() for why in health.unhealthy)
        notes = [f"process {name}: {note}" for name, health in parts.items() for note in health.notes]
        keeper = self._children.get(KEEPER)
        without = self._absent.get(KEEPER) if keeper is None else "; ".join(keeper.health.unready)
        if without:
            notes.append(f"no journal is kept now: {without}")
        if self._stopping.is_set():
            return Health(("draining", *unready), unhealthy, tuple(notes))
        if any(health.ready for health in parts.values()):
            return Health((), unhealthy, (*notes, *unready))
        return Health(tuple(unready) or STARTING.unready, unhealthy, tuple(notes))

    def snapshots(self) -> list[Snapshot]:
        """One for each live process, and the sum of those that have ended."""
        return [*(child.snapshot for _, child in sorted(self._children.items())), self._gone]

    # --- one process after the other -------------------------------------------------------------------------------------

    async def _keep(self, name: str, group: asyncio.TaskGroup) -> None:
        failures = 0
        command, over = (self._command, self._stopping)
        if name == KEEPER and self._keeper is not None:
            command, over = self._keeper, self._last
        while not over.is_set():
            try:
                child = Child.start(command, name, self._environment, self._known_switches())
            except OSError as error:
                failures += 1
                wait, why = _wait_seconds(failures, was_ready=False), f"cannot be started: {describe(error)}"
                log.error("process %s %s; trying again in %.1f s", name, why, wait)
            else:
                self._children[name] = child
                self._absent.pop(name, None)
                code = await child.ended()
                del self._children[name]
                why = self._part_with(child, code, group)
                failures = 0 if child.state.age_seconds >= CALM_SECONDS else failures + 1
                wait = _wait_seconds(failures, was_ready=child.was_ready)
            self._absent[name] = why
            await _rest(wait, over)

    async def _until_kept(self) -> None:
        """Wait until the keeper is ready, or will not be so soon."""
        until = time.monotonic() + KEEPER_SECONDS
        while time.monotonic() < until and not self._stopping.is_set() and KEEPER not in self._absent:
            if (keeper := self._children.get(KEEPER)) is not None and keeper.was_ready:
                return
            await _rest(0.05, self._stopping)

    def _part_with(self, child: Child, code: int, group: asyncio.TaskGroup) -> str:
        """Do what the end of a child calls for; say why it ended."""
        self._ever_ready = self._ever_ready or (child.was_ready and child.name != KEEPER)
        self._gone = merge([self._gone, ended(child.snapshot)], process="ended")
        self._switches = merged(self._switches, child.switches)
        if child.left_in_order:
            why = child.state.asked.why if child.state.asked else "it drained by itself"
            log.info("%s ended in order: %s", child, why)
            return why
        why = child.killed_for or _describe_end(code, child.state.resident_bytes)
        group.create_task(self._hand_back(child.owner, why), name=f"hand back {child.owner}")
        if code == EXIT_CONFIGURATION and child.name != KEEPER and not self._ever_ready and not self._stopping.is_set():
            self._exit_code = EXIT_CONFIGURATION
            self.problems.append(f"{child} cannot run as it is set up (exit code {code}); its own message says why")
            self.stop("a process cannot run as it is set up")
        elif not self._stopping.is_set():
            self._gone = msgspec.structs.replace(self._gone, deaths=self._gone.deaths + 1)
            log.warning("%s died after %.1f s: %s", child, child.state.age_seconds, why)
        elif child.name == KEEPER:
            log.warning("%s was cut: %s; what it had not kept waits for the next one", child, why)
        elif child.beat is not None:  # one that had not begun held nothing
            self.problems.append(f"{child} was cut: {why}; what it held comes back")
        return why

    def _known_switches(self) -> Switches:
        """What any of the processes knows, or knew, of paused queues."""
        return functools.reduce(merged, (child.switches for child in self._children.values()), self._switches)

    async def _hand_back(self, owner: str, why: str) -> None:
        tries = 0
        while True:
            try:
                async with asyncio.timeout(RECLAIM_SECONDS):
                    await self._on_death(owner, why)
                return
            except Exception as error:
                tries += 1
                log.warning("cannot hand back what a dead process held: %s", describe(error))
            wait = RECLAIM_RETRIES.wait_seconds(tries, random.random())
            if self._stopping.is_set():
                log.error("what a dead process held comes back when its leases end")
                return
            await _rest(wait, self._stopping)

    def _workers(self) -> dict[str, Child]:
        return {name: child for name, child in self._children.items() if name != KEEPER}

    def _end_keeper(self) -> None:
        """All entries that there will be are with the broker: it takes in what is there, and ends."""
        self._last.set()
        if (child := self._children.get(KEEPER)) is not None and child.state.asked is None:
            child.terminate("all others have ended", grace_seconds=0.0, patience_seconds=CLOSE_SECONDS)

    # --- limits and signals ----------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        said_ready = False
        before = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            # Where the supervisor itself stood still, its children's signs of life are unread, not missing.
            passed, before = min(time.monotonic() - before, 2 * TICK_SECONDS), time.monotonic()
            for child in self._children.values():
                child.pass_time(passed)
                self._look_after(child)
            if os.getpid() == 1:
                reap_orphans({child.process.pid for child in self._children.values()})
            if not said_ready and self.health().ready:
                said_ready = _notify("READY=1")
            if "WATCHDOG_USEC" in os.environ:
                _notify("WATCHDOG=1")

    def _look_after(self, child: Child) -> None:
        if child.killed_for:
            child.kill()
            return
        match decide(child.state, self._limits):
            case Kill(why, stacks):
                log.error("killing %s: it %s", child, why)
                child.kill(why, stacks=stacks)
            case Ask(why) as ask:
                log.info("replacing %s: it %s", child, why)
                patience = self._limits.grace_seconds + (CLOSE_SECONDS if ask.grace_seconds is not None else 0.0)
                child.ask(ask, patience_seconds=patience)
            case None:
                pass

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if not is_a_request(now, self._last_signal):
            return
        self._last_signal = now
        self._signals += 1
        name = signal.Signals(number).name
        if self._signals == 1:
            self.stop(name)
        elif self._signals == 2:
            log.warning("a second signal: %g s remain to release what is held", HURRY_SECONDS)
            for child in self._workers().values():
                child.ask(Ask(f"a second {name}", 0.0), patience_seconds=HURRY_SECONDS)
        else:
            for child in self._children.values():
                child.kill(f"a third {name}")


def is_a_request(now: float, last: float | None) -> bool:
    """Whether a signal asks once more, and does not only repeat one that counted; both in seconds, None where there was none."""
    return last is None or now - last >= ONE_REQUEST_SECONDS


def reap_orphans(ours: set[int]) -> int:
    """Let go of processes that ended and were nobody's but this process', as PID 1 has to; ours are reaped by their owner.

    Returns:
        How many.
    """
    count = 0
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and found.si_pid not in ours:
            os.waitpid(found.si_pid, 0)
            count += 1
    return count


async def _rest(seconds: float, over: asyncio.Event) -> None:
    """Sleep, or until it is over."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), seconds)


async def _exited(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process, and leave it unreaped where the kernel allows that (Linux, pidfd_open(2))."""
    try:
        handle = os.pidfd_open(process.pid)
    except (AttributeError, OSError):
        while process.poll() is None:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(TICK_SECONDS)
        return
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(handle, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


def _wait_seconds(failures: int, *, was_ready: bool) -> float:
    """How long to wait before a process is replaced, after so many that did not live long."""
    if failures == 0:
        return 0.0
    policy = READY_RESTARTS if was_ready else UNREADY_RESTARTS
    return policy.wait_seconds(failures, random.random())


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (proc_pid_stat(5); its name in brackets may hold anything)."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def _describe_end(code: int, rss: int) -> str:
    held = f", last seen with {rss / MB:.0f} MB" if rss else ""
    if code >= 0:
        return f"exit code {code}" + held
    name = signal.Signals(-code).name
    hint = " (somebody's kill -9, or the kernel for want of memory)" if -code == signal.SIGKILL else ""
    return f"killed by {name}{hint}{held}"


def _notify(state: str) -> bool:
    """Tell systemd, where it listens (sd_notify(3)); False where it has to be told again, because it is behind with reading."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return True
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.setblocking(False)
        try:
            line.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)
        except BlockingIOError:
            return False
    return True
