"""Processes are kept alive, replaced for a reason, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor.runtime import supervisor as supervisor_module
from conveyor.runtime.channel import Ask
from conveyor.runtime.metrics import resident_bytes
from conveyor.runtime.supervisor import Kill, Limits, State, Supervisor, decide

STANDIN = Path(__file__).parent / "standin.py"
PATIENCE_SECONDS = 60.0
"""A condition that does not hold by then never will."""


async def until(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds; gives what it gave."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (found := condition()):
            await asyncio.sleep(0.02)
        return found


def runs(pid: int) -> bool:
    """Whether a process exists and is no zombie that waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


class World:
    """A supervisor with stand-ins for children, and all that they note."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.deaths: list[tuple[str, str]] = []
        self.supervisor: Supervisor
        self.running: asyncio.Task[int] | None = None

    def command(self, *manners: str) -> list[str]:
        return [sys.executable, str(STANDIN), str(self.folder), *manners]

    def start(self, *manners: str, processes: int = 1, **limits: Any) -> Supervisor:
        return self.start_command(self.command(*manners), processes=processes, **limits)

    def start_command(self, command: list[str], *, processes: int = 1, **limits: Any) -> Supervisor:
        self.supervisor = Supervisor(command, processes, on_death=self.on_death, limits=Limits(**limits))
        self.running = asyncio.create_task(self.supervisor.run())
        return self.supervisor

    async def on_death(self, owner: str, why: str) -> None:
        self.deaths.append((owner, why))

    def notes(self, kind: str) -> list[list[str]]:
        """What the children noted under this word."""
        log = self.folder / "log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [words for first, *words in lines if first == kind]

    def pids(self) -> list[int]:
        return [int(pid) for pid, _ in self.notes("up")]

    def owner(self, pid: int) -> str:
        return next(owner for up, owner in self.notes("up") if int(up) == pid)

    async def up(self, count: int = 1) -> list[int]:
        """The pids of the children so far, once there have been so many and the supervisor knows one to be ready."""
        await until(lambda: len(self.pids()) >= count)
        await until(lambda: self.supervisor.health().ready)
        return self.pids()

    async def lower_the_memory_limit(self) -> None:
        """Make the limit a little less than what the first process holds."""
        [pid] = await self.up()
        used = resident_bytes(pid)
        self.supervisor._limits = replace(self.supervisor._limits, max_rss_bytes=int(used / 1.1))

    async def stop(self) -> int:
        self.supervisor.stop("the test is over")
        return await self.exit_code()

    async def exit_code(self) -> int:
        assert self.running is not None
        return await asyncio.wait_for(asyncio.shield(self.running), PATIENCE_SECONDS)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    if world.running is not None and not world.running.done():
        world.running.cancel()
        await asyncio.gather(world.running, return_exceptions=True)
    assert not [pid for pid in world.pids() if runs(pid)]


# --- death and replacement ----------------------------------------------------------------------------------------------


async def test_a_killed_process_is_replaced_and_what_it_held_is_handed_back_at_once(world: World) -> None:
    world.start(processes=2)
    first, second = await world.up(2)
    os.kill(first, signal.SIGKILL)
    pids = await world.up(3)
    await until(lambda: world.deaths)
    [(owner, why)] = world.deaths
    assert owner == world.owner(first)
    assert "killed by SIGKILL" in why
    assert runs(second)
    assert len({owner for _, owner in world.notes("up")}) == 3
    assert pids[2] not in (first, second)
    assert world.supervisor.snapshots()[-1].deaths == 1


async def test_a_handing_back_that_fails_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[BaseException | None] = [OSError("no broker"), OSError("no broker"), None]
    asked = []

    async def on_death(owner: str, why: str) -> None:
        asked.append(owner)
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(world, "on_death", on_death)
    world.start()
    [pid] = await world.up()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not answers)
    assert asked == [world.owner(pid)] * 3


async def test_a_stopped_process_is_killed_and_replaced(world: World) -> None:
    world.start(hang_limit_seconds=3.0)
    [pid] = await world.up()
    os.kill(pid, signal.SIGSTOP)
    await world.up(2)
    await until(lambda: world.deaths)
    assert world.deaths[0] == (world.owner(pid), "made no sign of life for 3 s: it is stopped")
    assert not runs(pid)


async def test_a_process_whose_event_loop_is_blocked_shows_where_and_is_replaced(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    world.start("blocks", hang_limit_seconds=3.0)
    [pid] = await until(world.pids)
    await until(lambda: world.deaths)
    assert world.deaths[0] == (world.owner(pid), "made no sign of life for 3 s: its event loop is blocked")
    assert 'standin.py", line' in capfd.readouterr().err


async def test_exit_code_0_without_a_goodbye_is_a_death(world: World) -> None:
    world.start("leaves")
    await until(lambda: world.deaths)
    assert "exit code 0" in world.deaths[0][1]


async def test_a_process_that_drains_by_itself_is_replaced_and_is_no_death(world: World) -> None:
    world.start()
    [pid] = await world.up()
    os.kill(pid, signal.SIGTERM)
    await world.up(2)
    assert not world.deaths


async def test_what_a_dead_process_started_dies_with_it(world: World) -> None:
    world.start("spawns")
    [pid] = await world.up()
    [[helper]] = world.notes("helper")
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not runs(int(helper)))


async def test_a_process_that_cannot_start_is_started_ever_more_slowly(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def rest(seconds: float, over: asyncio.Event) -> None:
        waits.append(seconds)
        if len(waits) == 4:
            await over.wait()

    monkeypatch.setattr(supervisor_module, "_rest", rest)
    world.start("dies-early")
    await until(lambda: len(waits) == 4)
    assert waits == sorted(set(waits))
    [reason] = world.supervisor.health().unready
    assert reason.startswith("process 1: exit code 3")


def test_the_back_off_is_short_for_processes_that_worked_and_bounded_for_all() -> None:
    assert supervisor_module._wait_seconds(0, was_ready=False) == 0
    assert supervisor_module._wait_seconds(10_000, was_ready=True) <= 1
    assert 10 <= supervisor_module._wait_seconds(10_000, was_ready=False) <= 30


async def test_a_process_that_is_not_set_up_to_run_stops_the_supervisor(world: World) -> None:
    supervisor = world.start("misconfigured", processes=2)
    assert await world.exit_code() == 2
    assert "cannot run as it is set up (exit code 2)" in supervisor.problems[0]


async def test_a_command_that_does_not_exist_is_tried_again_until_stopped(world: World, tmp_path: Path) -> None:
    world.start_command([str(tmp_path / "nothing")])
    await until(lambda: any("cannot be started" in why for why in world.supervisor.health().unready))
    assert await world.stop() == 0


async def test_nonsense_on_the_line_ends_the_process(world: World) -> None:
    speak = "import os, time; os.write(int(os.environ['CONVEYOR_CHANNEL']), b'hello\\n'); time.sleep(3600)"
    world.start_command([sys.executable, "-c", speak])
    await until(lambda: world.deaths)
    assert "spoke nonsense" in world.deaths[0][1]


# --- recycling ----------------------------------------------------------------------------------------------------------


async def test_a_process_is_replaced_in_order_after_its_share_of_messages(world: World) -> None:
    world.start("busy", max_messages=100, grace_seconds=20.0)
    await world.up(2)
    assert world.notes("drain")[0] == ["received", "100", "messages", "grace=20.0"]
    assert not world.deaths
    snapshots = world.supervisor.snapshots()
    assert snapshots[-1].workers["charge"].received >= 100


async def test_a_process_that_grows_is_drained_without_releasing_what_it_runs(world: World) -> None:
    world.start(grace_seconds=60.0)
    await world.lower_the_memory_limit()
    await world.up(2)
    assert world.notes("drain")[0][-1] == "grace=None"
    assert world.owner(world.pids()[0]) not in dict(world.deaths)


async def test_a_process_that_grows_far_beyond_its_limit_is_killed_and_its_message_counts_a_crash(world: World) -> None:
    world.start("eats", "never-drains", max_rss_bytes=100_000_000, grace_seconds=60.0)
    await until(lambda: world.deaths)
    assert "over --max-rss 100 MB" in world.deaths[0][1]
    assert world.deaths[0][0] == world.notes("up")[0][1]


async def test_a_process_that_grows_and_does_not_drain_is_killed_for_its_memory(world: World) -> None:
    world.start("never-drains", grace_seconds=0.5)
    await world.lower_the_memory_limit()
    await until(lambda: world.deaths)
    assert "over --max-rss" in world.deaths[0][1]
    assert "did not drain within 0.5 s" in world.deaths[0][1]


async def test_a_process_that_stays_unwell_is_replaced(world: World) -> None:
    world.start("unwell", hang_limit_seconds=3.0)
    await until(lambda: len(world.pids()) >= 2)
    assert " ".join(world.notes("drain")[0]).startswith("was unwell for 3 s: shop.charge stalls")


# --- health and metrics -------------------------------------------------------------------------------------------------


async def test_health_names_the_process_and_the_reason(world: World) -> None:
    supervisor = world.start(processes=2)
    assert not supervisor.health().ready
    first, _ = await world.up(2)
    os.kill(first, signal.SIGSTOP)
    await until(lambda: not supervisor.health().notes)
    os.kill(first, signal.SIGKILL)
    notes = await until(lambda: supervisor.health().notes)
    assert supervisor.health().ready
    assert any("killed by SIGKILL" in note or "starting" in note for note in notes)


async def test_an_unwell_process_makes_the_supervisor_unwell(world: World) -> None:
    supervisor = world.start("unwell")
    unhealthy = await until(lambda: supervisor.health().unhealthy)
    assert unhealthy == ("process 1: shop.charge stalls",)


async def test_a_process_that_never_gets_ready_keeps_the_supervisor_unready(world: World) -> None:
    supervisor = world.start("never-ready")
    await until(world.pids)
    await until(lambda: supervisor.health().unready == ("process 1: starting",))


async def test_snapshots_come_from_every_process(world: World) -> None:
    supervisor = world.start("busy", processes=2)
    await until(lambda: sum(snapshot.received for snapshot in supervisor.snapshots()) == 200)
    await until(lambda: all(snapshot.resident_bytes > 0 for snapshot in supervisor.snapshots()[:2]))
    assert [snapshot.process for snapshot in supervisor.snapshots()] == ["1", "2", "ended"]


# --- the end ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_drains_every_process_and_ends_with_0(world: World, number: signal.Signals) -> None:
    supervisor = world.start(processes=2)
    await world.up(2)
    await until(lambda: all(child.was_ready for child in supervisor._children.values()))
    os.kill(os.getpid(), number)
    assert await world.exit_code() == 0
    assert world.notes("drain") == [["SIGTERM"], ["SIGTERM"]]
    assert not world.deaths
    assert supervisor.health().unready[0] == "draining"


async def test_a_process_that_does_not_drain_in_time_is_killed_and_named(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "CLOSE_SECONDS", 0.25)
    supervisor = world.start("never-drains", grace_seconds=0.25)
    [pid] = await world.up()
    assert await world.stop() == 1
    assert supervisor.problems == [
        f"process 1 (pid {pid}) was cut: the test is over; did not drain within 0.5 s; what it held comes back"
    ]
    assert [owner for owner, _ in world.deaths] == [world.owner(pid)]


async def test_a_process_that_had_to_cut_its_handlers_makes_the_exit_code_1(world: World) -> None:
    supervisor = world.start("cuts")
    await world.up()
    assert await world.stop() == 1
    assert "exit code 1" in supervisor.problems[0]


async def test_a_stopped_process_does_not_hold_up_the_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "CLOSE_SECONDS", 0.25)
    world.start(grace_seconds=0.25)
    [pid] = await world.up()
    os.kill(pid, signal.SIGSTOP)
    assert await world.stop() == 1


async def test_a_second_signal_does_not_wait_for_the_grace_period(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "HURRY_SECONDS", 0.25)
    monkeypatch.setattr(supervisor_module, "ONE_REQUEST_SECONDS", 0.0)
    supervisor = world.start("never-drains", grace_seconds=3600.0)
    await world.up()
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: world.notes("drain"))
    os.kill(os.getpid(), signal.SIGTERM)
    assert await world.exit_code() == 1
    assert "a second SIGTERM" in supervisor.problems[0]


@given(st.lists(st.floats(0, 0.99), max_size=5), st.floats(1.01, 100))
def test_signals_of_one_moment_are_one_request(moments: list[float], later: float) -> None:
    assert supervisor_module.is_a_request(1000.0, None)
    assert not any(supervisor_module.is_a_request(1000.0 + moment, 1000.0) for moment in moments)
    assert supervisor_module.is_a_request(1000.0 + later, 1000.0)


async def test_three_signals_at_once_leave_the_grace_period_as_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "ONE_REQUEST_SECONDS", 3600.0)
    supervisor = world.start()
    await world.up()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert await world.exit_code() == 0
    assert supervisor.problems == []


async def test_a_third_signal_ends_everything_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "ONE_REQUEST_SECONDS", 0.0)
    world.start("never-drains", grace_seconds=3600.0)
    [pid] = await world.up()
    os.kill(pid, signal.SIGSTOP)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.01)
    assert await world.exit_code() == 1


async def test_a_process_that_is_still_starting_does_not_hold_up_the_end(world: World) -> None:
    world.start_command([sys.executable, "-c", "import time; time.sleep(3600)"])
    await until(lambda: world.supervisor._children)
    assert await world.stop() == 0


async def test_a_cancelled_supervisor_leaves_nothing_behind(world: World) -> None:
    world.start(processes=2)
    pids = await world.up(2)
    assert world.running is not None
    world.running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await world.running
    assert not [pid for pid in pids if runs(pid)]


PROGRAM = """
import asyncio, sys
from conveyor.runtime.supervisor import Limits, Supervisor

async def on_death(owner, why):
    print("dead", owner, why, flush=True)

sys.exit(asyncio.run(Supervisor(sys.argv[1:], 2, on_death=on_death, limits=Limits(grace_seconds=20.0)).run()))
"""


async def test_nobody_survives_a_supervisor_that_is_killed(world: World) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, *world.command("pool")], stdout=subprocess.DEVNULL)
    try:
        await until(lambda: len(world.notes("up")) == 2 and len(world.notes("pool")) == 4)
        pids = [*world.pids(), *(int(pid) for [pid] in world.notes("pool"))]
        assert all(runs(pid) for pid in pids)
    finally:
        program.kill()
        program.wait()
    await until(lambda: not [pid for pid in pids if runs(pid)])


async def test_a_blocked_process_does_not_survive_a_supervisor_that_is_killed(world: World) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, *world.command("blocks")], stdout=subprocess.DEVNULL)
    try:
        await until(lambda: len(world.pids()) == 2)
    finally:
        program.kill()
        program.wait()
    await until(lambda: not [pid for pid in world.pids() if runs(pid)])


async def test_a_whole_program_drains_on_sigterm_with_pools_and_all(world: World) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, *world.command("pool")], stdout=subprocess.PIPE)
    await until(lambda: len(world.notes("up")) == 2 and len(world.notes("pool")) == 4)
    pids = [*world.pids(), *(int(pid) for [pid] in world.notes("pool"))]
    program.terminate()
    out, _ = await asyncio.to_thread(program.communicate, timeout=PATIENCE_SECONDS)
    assert (program.returncode, out) == (0, b"")
    assert not [pid for pid in pids if runs(pid)]


# --- around it ----------------------------------------------------------------------------------------------------------


async def test_systemd_is_told(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "10000000")
        loop = asyncio.get_running_loop()
        told: list[bytes] = []

        async def hear(word: bytes) -> None:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while word not in told:
                    told.append(await loop.sock_recv(systemd, 100))

        world.start()
        await hear(b"READY=1")
        await hear(b"WATCHDOG=1")
        assert await world.stop() == 0
        await hear(b"STOPPING=1")


def test_orphans_are_reaped_and_children_are_left_to_their_owner() -> None:
    script = """
import ctypes, os, signal, subprocess, sys
from conveyor.runtime.supervisor import reap_orphans
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come here, as they come to PID 1
parent = subprocess.Popen(["sh", "-c", "sleep 3600 > /dev/null & echo $!"], stdout=subprocess.PIPE, text=True)
orphan = int(parent.stdout.readline())
os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
os.kill(orphan, signal.SIGKILL)
os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
reaped = 0
while os.path.exists(f"/proc/{orphan}"):
    reaped += reap_orphans({parent.pid} if parent.poll() is None else set())
assert (reaped, parent.wait()) == (1, 0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE_SECONDS)


# --- the decision -------------------------------------------------------------------------------------------------------

LIMITS = Limits(
    grace_seconds=20, hang_limit_seconds=30, max_rss_bytes=100_000_000, max_messages=1000, max_age_seconds=3600
)


@pytest.mark.parametrize(
    ("state", "decision"),
    [
        (State(started=True), None),
        (State(started=True, silent_seconds=29.9), None),
        (State(started=False, silent_seconds=100.0), None),
        (State(started=False, age_seconds=300.0), Kill("gave no sign of life within 300 s of its start", stacks=True)),
        (State(started=True, silent_seconds=30.0, stopped=True), Kill("made no sign of life for 30 s: it is stopped")),
        (State(started=True, resident_bytes=100_000_001), Ask("used 100 MB, over --max-rss 100 MB", None)),
        (State(started=True, resident_bytes=126_000_000), Kill("used 126 MB, over --max-rss 100 MB")),
        (State(started=True, received=1000), Ask("received 1000 messages", 20)),
        (State(started=True, received=800, jitter=0.2), Ask("received 800 messages", 20)),
        (State(started=True, received=800, jitter=0.1), None),
        (State(started=True, age_seconds=3600.0), Ask("is 3600 s old", 20)),
        (State(started=True, unwell="stall", unwell_seconds=30.0), Ask("was unwell for 30 s: stall", 20)),
        (State(started=True, received=1000, asked=Ask("x", 20), patience_seconds=25.0), None),
        (
            State(started=True, asked=Ask("x", 20), asked_seconds=25.0, patience_seconds=25.0),
            Kill("x; did not drain within 25 s"),
        ),
    ],
)
def test_what_becomes_of_a_process_follows_from_its_state(state: State, decision: Kill | Ask | None) -> None:
    assert decide(state, LIMITS) == decision


@given(
    st.builds(
        State,
        **{name: st.floats(0, 1e6) for name in ("age_seconds", "silent_seconds", "asked_seconds", "patience_seconds")},
        started=st.booleans(),
        resident_bytes=st.integers(0, 10**12),
        received=st.integers(0, 10**12),
        asked=st.none() | st.just(Ask("x", None)),
    )
)
def test_a_process_that_drains_is_never_asked_again(state: State) -> None:
    decision = decide(state, LIMITS)
    assert decision is None or isinstance(decision, Kill) or state.asked is None
