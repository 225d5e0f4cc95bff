"""``conveyor top`` in a real terminal: what it shows of real runners, what its keys do, and how it bears an outage."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import apsw
import msgspec
import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor import brokers
from conveyor.broker import Queue, QueueInfo
from conveyor.brokers.memory import MemoryBroker
from conveyor.cli.figures import (
    ERRORS,
    QUEUES,
    RUNNERS,
    SHARES,
    Column,
    brief,
    brief_bytes,
    brief_rate,
    brief_span,
    heights,
    in_middle,
    widths,
)
from conveyor.cli.top import Rates, RunnerRow, Watcher, queue_rows
from conveyor.core.message import Message
from conveyor.runtime.control import Failure, Operator, Status, WorkerStatus
from conveyor.runtime.health import Health

if TYPE_CHECKING:
    from servers.redis import Redis
    from tests.cli.conftest import Program

PATIENCE_SECONDS: Final = 60.0
ENTER, TAB, DOWN, ESCAPE, CTRL_C = "\r", "\t", "\x1b[B", "\x1b", "\x03"

BANK: Final = """
import asyncio
from pathlib import Path

from conveyor import Conveyor, RetryPolicy

app = Conveyor("bank")


@app.task(retry=RetryPolicy(attempts=1))
async def charge(card: str) -> None:
    if Path("closed").exists():
        raise ConnectionError(f"the bank is closed, says the clerk to {card}; come back on Monday from nine o'clock on, please")
    with open("charged", "a") as charged:
        charged.write(card + "\\n")


@app.task
async def write_a_letter_to_the_holder_of_the_card(card: str) -> None: ...
"""


GUARD: Final = """
from conveyor import Conveyor, RetryPolicy

app = Conveyor("guard")


@app.task(retry=RetryPolicy(attempts=1))
async def check(card: str) -> None:
    raise ValueError(card)
"""


class Terminal:
    """A terminal in memory, with a program in it.

    Parameters:
        command: the program and its arguments.
    """

    def __init__(self, conveyor: Program, command: Sequence[str], columns: int = 80, rows: int = 24) -> None:
        self.display = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.display)
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.program = subprocess.Popen(
            command,
            cwd=conveyor.folder,
            # readline, once loaded, leaves a size of its own in the environment of whoever runs these tests.
            env={name: value for name, value in conveyor.environment.items() if name not in {"COLUMNS", "LINES"}}
            | {"TERM": "xterm-256color"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    @property
    def text(self) -> str:
        """What is on it."""
        return "\n".join(self.display.display)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            os.write(self._ours, key.encode())

    def until(self, true: Callable[[str], object], what: str = "") -> str:
        """Wait until what is on it is so; what is on it then."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not true(self.text):
            assert time.monotonic() < deadline, f"never saw {what}:\n{self.text}"
            assert self.read(0.2), f"it ended before there was {what}:\n{self.text}"
        return self.text

    def shows(self, *texts: str) -> str:
        """Wait until all of these are on it; what is on it then."""
        return self.until(lambda text: all(each in text for each in texts), " and ".join(texts))

    def read(self, seconds: float) -> bool:
        """Take in what the program draws within so many seconds; False where it has ended."""
        if not select.select([self._ours], [], [], seconds)[0]:
            return True
        try:
            drawn = os.read(self._ours, 65_536)
        except OSError:  # nobody holds the other end any more
            return False
        self._stream.feed(drawn)
        return bool(drawn)

    def ended(self) -> int:
        """Wait for the program's end; its exit code."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.read(0.2):
            assert time.monotonic() < deadline, self.text
        return self.program.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        """End it, however it is."""
        self.program.kill()
        self.program.wait()
        os.close(self._ours)

    def row(self, start: str) -> str:
        """The line that begins so."""
        return next(line for line in self.display.display if line.startswith(start))

    def errors(self) -> list[str]:
        """What stands below the head of the errors, the first one first."""
        lines = [line.rstrip() for line in self.display.display]
        head = next(place for place, line in enumerate(lines) if line.startswith("LATEST"))
        return [line.rpartition("ValueError: ")[2] for line in lines[head + 1 :] if "ValueError: " in line]


@pytest.fixture
def bank(conveyor: Program) -> Program:
    """The program, in a folder with the bank's app."""
    (conveyor.folder / "bank.py").write_text(BANK)

    async def make() -> None:
        broker = brokers.from_url(f"sqlite:///{conveyor.folder / 'bank.queue'}")
        await broker.open()
        await broker.close()

    asyncio.run(make())  # or conveyor top, started first, would say that there is none
    return conveyor


@contextlib.contextmanager
def running(conveyor: Program, *arguments: str, app: str = "bank:app") -> Iterator[subprocess.Popen[bytes]]:
    """The bank's workers at work."""
    log = (conveyor.folder / "log").open("ab")
    command = conveyor.command("run", app, *arguments)
    with log, subprocess.Popen(command, cwd=conveyor.folder, env=conveyor.environment, stderr=log) as program:
        try:
            yield program
        finally:
            program.terminate()
            try:
                program.wait(PATIENCE_SECONDS)
            finally:
                program.kill()


@contextlib.contextmanager
def top(conveyor: Program, *arguments: str, columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
    """conveyor top in a terminal."""
    terminal = Terminal(conveyor, conveyor.command("top", *arguments), columns, rows)
    try:
        yield terminal
    finally:
        terminal.close()


def in_shell(command: Sequence[str], redirected: str) -> list[str]:
    """The same, with something of it redirected."""
    return ["sh", "-c", f'exec "$@" {redirected}', "sh", *command]


def charge(conveyor: Program, card: str, *arguments: str) -> None:
    conveyor.ok("publish", "bank", "charge", "--data", f'{{"card": "{card}"}}', *arguments)


def charged(conveyor: Program) -> list[str]:
    file = conveyor.folder / "charged"
    return file.read_text().split() if file.exists() else []


def ready_runners(text: str) -> int:
    return len(re.findall(r"[MG]B ready", text))


def stop(process: int, queue_file: Path) -> None:
    """Stop a process while it does not hold the write lock of the queue file, or all others would wait for it, too."""
    lock = apsw.Connection(str(queue_file))
    lock.set_busy_timeout(int(PATIENCE_SECONDS * 1000))
    lock.execute("BEGIN IMMEDIATE")
    os.kill(process, signal.SIGSTOP)
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)
    lock.execute("ROLLBACK")
    lock.close()


def figures(row: str) -> list[str]:
    """The columns of a queue's row, without its name."""
    return row.split()[1:]


def test_it_shows_queues_runners_and_errors_and_leaves_nothing_behind(bank: Program) -> None:
    (bank.folder / "closed").touch()
    with running(bank, "--processes", "2"), top(bank, "bank:app") as terminal:
        terminal.shows("2 runners")
        charge(bank, "4711")
        terminal.shows("dead ConnectionError: the bank is closed")
        terminal.until(lambda _: figures(terminal.row("bank.charge"))[3] == "1", "the dead letter")
        ready, in_flight, delayed, dead, oldest, _, failed, retried = figures(terminal.row("bank.charge"))
        assert (ready, in_flight, delayed, dead, oldest, failed, retried) == ("0", "0", "0", "1", "-", "1", "0")
        terminal.until(lambda text: ready_runners(text) == 2, "both runners")
        assert "bank.wri…the_card " in terminal.text  # a name that does not fit is cut where one sees it
        terminal.press(TAB, TAB, ENTER)
        terminal.shows("it became a dead letter", "on Monday from nine o'clock", "Traceback")
        terminal.press(ESCAPE)
        terminal.until(lambda text: "became a dead letter" not in text)
        terminal.press("q")
        assert terminal.ended() == 0
    assert [each["name"] for each in bank.json("queues", "--app", "bank", "--all")["queues"]] == [
        "bank.charge",
        "bank.write_a_letter_to_the_holder_of_the_card",
    ]


def test_a_queue_is_paused_and_goes_on_by_a_key(bank: Program) -> None:
    with running(bank), top(bank, "bank:app") as terminal:
        terminal.shows("1 runner", "bank.charge")
        terminal.press("p")
        terminal.until(lambda _: "paused" in terminal.row("bank.charge"), "the pause")
        charge(bank, "4711")
        terminal.until(lambda _: figures(terminal.row("bank.charge"))[0] == "1", "the message that waits")
        assert charged(bank) == []
        terminal.press("p")
        terminal.until(lambda _: charged(bank), "the work")
        terminal.until(lambda _: "paused" not in terminal.row("bank.charge"), "the end of the pause")


def test_dead_letters_are_put_back_after_a_question(bank: Program) -> None:
    (bank.folder / "closed").touch()
    with running(bank), top(bank, "bank:app") as terminal:
        terminal.shows("1 runner", "bank.charge")
        terminal.press("r")
        terminal.shows("has no dead letters")
        for card in ("4711", "4712"):
            charge(bank, card)
        terminal.until(lambda _: figures(terminal.row("bank.charge"))[3] == "2", "the dead letters")
        (bank.folder / "closed").unlink()
        terminal.press("r")
        terminal.shows("Put 2 dead letters back into bank.charge?")
        terminal.press("n")
        terminal.until(lambda text: "Put 2" not in text)
        assert figures(terminal.row("bank.charge"))[3] == "2"
        terminal.press("r")
        terminal.shows("Put 2 dead letters back into bank.charge?")
        terminal.press("y")
        terminal.shows("2 dead letters put back")
        terminal.until(lambda _: sorted(charged(bank)) == ["4711", "4712"], "the work")
        terminal.until(lambda _: figures(terminal.row("bank.charge"))[3] == "0", "no dead letter")


def test_a_runner_that_stands_still_is_said_to_be_silent(bank: Program) -> None:
    with running(bank, "--hang-limit", "1000"), top(bank, "bank:app", columns=120) as terminal:
        text = terminal.until(lambda text: ready_runners(text) == 1, "the runner")
        row = next(line for line in text.split("\n") if line.startswith(f"{socket.gethostname()}/1 "))
        runner = int(row.split()[1])
        stop(runner, bank.folder / "bank.queue")
        try:
            terminal.shows("silent ")
        finally:
            os.kill(runner, signal.SIGCONT)
        terminal.until(lambda text: "silent " not in text and ready_runners(text) == 1)


def test_a_killed_process_is_replaced_on_the_screen_too_and_what_it_did_stays_counted(bank: Program) -> None:
    (bank.folder / "closed").touch()
    with running(bank, "--processes", "2"), top(bank, "bank:app", columns=120) as terminal:
        for number in range(10):
            charge(bank, str(number))
        counted: list[int] = []

        def look() -> str:
            assert "silent" not in terminal.text
            if len(figures(terminal.row("bank.charge"))) >= 8:
                counted.append(int(figures(terminal.row("bank.charge"))[6]))
            return terminal.text

        terminal.until(lambda text: ready_runners(text) == 2 and look() and counted[-1:] == [10], "ten failures")
        row = next(line for line in terminal.text.split("\n") if line.startswith(f"{socket.gethostname()}/1 "))
        killed = row.split()[1]
        os.kill(int(killed), signal.SIGKILL)
        terminal.until(lambda _: f" {killed} " not in look(), "its row gone")
        terminal.until(lambda _: ready_runners(look()) == 2, "another in its place")
        assert set(counted[counted.index(10) :]) == {10}


def test_it_says_that_the_broker_is_away_and_goes_on_when_it_is_back(bank: Program, redis: Redis) -> None:
    url = redis.url()
    with running(bank, "--broker", url), top(bank, "--broker", url) as terminal:
        terminal.shows("1 runner", "bank.charge")
        redis.stop()
        try:
            terminal.shows("AWAY for", "bank.charge")  # what was known stays
            terminal.press("p")
            terminal.shows("the broker is away")
        finally:
            redis.start()
        terminal.until(lambda text: "AWAY" not in text and "1 runner" in text, "its return")
        terminal.press("p")
        terminal.until(lambda _: "paused" in terminal.row("bank.charge"), "the pause")
        terminal.press(CTRL_C)
        assert terminal.ended() == 0


def test_a_wide_terminal_is_used_and_a_change_of_its_size_is_followed(bank: Program) -> None:
    with running(bank), top(bank, "bank:app", columns=160, rows=40) as terminal:
        terminal.shows("1 runner", "bank.write_a_letter_to_the_holder_of_the_card", "workers")
        fcntl.ioctl(terminal._ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        terminal.display.resize(24, 80)
        os.killpg(terminal.program.pid, signal.SIGWINCH)
        text = terminal.until(lambda text: "bank.wri…the_card" in text, "the narrow one")
        assert "workers" not in text


@pytest.mark.parametrize(("columns", "rows"), [(60, 15), (80, 24)])
def test_the_newest_errors_are_in_sight_until_somebody_moves_the_cursor(bank: Program, columns: int, rows: int) -> None:
    (bank.folder / "guard.py").write_text(GUARD)

    def check(*cards: str) -> None:
        async def go() -> None:
            broker = brokers.from_url(f"sqlite:///{bank.folder / 'guard.queue'}")
            await broker.open()
            await broker.declare([Queue(name="guard.check", topics=("guard.check",))])
            bodies = [f'{{"card": "{card}"}}'.encode() for card in cards]
            await broker.publish([Message(card, "guard.check", body) for card, body in zip(cards, bodies, strict=True)])
            await broker.close()

        asyncio.run(go())

    def dead_letters(terminal: Terminal) -> str:
        labels = terminal.row("QUEUE").replace("in flight", "in_flight").split()
        return terminal.row("guard.check").split()[labels.index("dead")]

    check()
    with running(bank, app="guard:app"), top(bank, "guard:app", columns=columns, rows=rows) as terminal:
        terminal.until(lambda text: re.search(r"^\S+/1 .* ready", text, re.MULTILINE), "the runner")
        terminal.shows("⇥ Next", "p Pause/resume", "q Quit")
        check(*(f"early-{number}" for number in range(30)))
        terminal.until(lambda _: dead_letters(terminal) == "30", "the dead letters")
        terminal.until(lambda _: len(terminal.errors()) > 2, "the errors")
        check("late-1")
        terminal.until(lambda _: terminal.errors()[0] == "late-1", "the newest error")
        check("late-2")
        terminal.until(lambda _: terminal.errors()[:2] == ["late-2", "late-1"], "the next one")
        terminal.press(TAB, TAB, DOWN, ENTER)
        terminal.shows("message     late-1")
        terminal.press(ESCAPE)
        terminal.until(lambda text: "message     late-1" not in text)
        check("late-3")
        terminal.until(lambda _: dead_letters(terminal) == "33", "the dead letters")
        terminal.press(ENTER)
        terminal.shows("message     late-1")


def test_what_enter_shows_is_followed_until_a_key_closes_it(bank: Program) -> None:
    (bank.folder / "closed").touch()
    with running(bank), top(bank, "bank:app") as terminal:
        terminal.shows("1 runner", "bank.charge")
        for number, close in enumerate((ESCAPE, ENTER, "q")):
            terminal.press(ENTER)
            terminal.shows(f"dead        {number}", "Scroll", "esc ⏎ q Close")
            charge(bank, "4711")
            terminal.shows(f"dead        {number + 1}", f"failed      {number + 1}")
            terminal.press(close)
            terminal.until(lambda text: "esc ⏎ q Close" not in text and "q Quit" in text, "the tables")
        terminal.press(ENTER)
        terminal.shows("dead        3")
        terminal.press(CTRL_C)
        assert terminal.ended() == 0


def test_what_enter_shows_stays_when_it_is_no_longer_there(bank: Program) -> None:
    where = ("--broker", "sqlite:///bank.queue")

    async def declare() -> None:
        broker = brokers.from_url(f"sqlite:///{bank.folder / 'bank.queue'}")
        await broker.open()
        await broker.declare([Queue(name="bank.old")])
        await broker.close()

    asyncio.run(declare())
    with top(bank, *where) as terminal:
        terminal.shows("bank.old")
        terminal.press(ENTER)
        assert "no longer there" not in terminal.shows("workers     none is running")
        bank.ok("queues", "remove", "bank.old", "--yes", *where)
        terminal.shows("no longer there", "queue       bank.old")
        terminal.press("q")
        terminal.shows("no queue yet")


def test_without_a_terminal_it_says_what_there_is_for_programs(bank: Program) -> None:
    assert "conveyor queues --watch --json" in bank.refused("top", "bank:app")


@pytest.mark.parametrize("redirected", [">out", "<log"])
def test_half_a_terminal_is_refused(bank: Program, redirected: str) -> None:
    (bank.folder / "log").touch()
    terminal = Terminal(bank, in_shell(bank.command("top", "bank:app"), redirected))
    with contextlib.closing(terminal):
        assert terminal.ended() == 2
        assert "needs a terminal as its stdin and stdout" in " ".join(terminal.text.split())


def test_errors_may_go_into_a_file_while_the_screen_is_drawn(bank: Program) -> None:
    terminal = Terminal(bank, in_shell(bank.command("top", "--broker", "sqlite:///bank.queue"), "2>errors"))
    with contextlib.closing(terminal):
        terminal.shows("0 runners", "q Quit")
        terminal.press("q")
        assert terminal.ended() == 0
    assert (bank.folder / "errors").read_bytes() == b""


def test_a_broker_that_was_never_seen_is_not_said_to_be_empty(bank: Program, free_port: int) -> None:
    with top(bank, "--broker", f"redis://127.0.0.1:{free_port}") as terminal:
        text = terminal.shows("AWAY for", "not known yet")
        assert "no queue yet" not in text


def test_a_wrong_address_is_said_before_the_screen_is_taken(bank: Program) -> None:
    with top(bank, "--broker", "sqlite:///none.queue") as terminal:
        assert terminal.ended() == 1
        assert "there is no queue file none.queue" in " ".join(terminal.text.split())


# --- what it reckons ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**15))
def test_a_count_takes_six_characters_at_most(number: int) -> None:
    assert len(brief(number)) <= 6


@given(st.floats(0, 1e12), st.integers(0, 10**11))
def test_rates_and_sizes_and_durations_take_the_room_of_their_columns_at_most(some: float, size: int) -> None:
    assert len(brief_rate(some)) <= 6
    assert len(brief_span(min(some, 86_400 * 9_999))) <= 6
    assert len(brief_bytes(size)) <= 7


@given(st.text(), st.integers(1, 40))
def test_what_does_not_fit_is_cut_with_a_sign(text: str, columns: int) -> None:
    cut = in_middle(text, columns)
    assert len(cut) <= columns
    assert "…" in cut or len(cut) == len(in_middle(text, 10_000))


@given(
    st.sampled_from([QUEUES, RUNNERS, ERRORS]),
    st.lists(st.text(max_size=100), min_size=1, max_size=5),
    st.integers(40, 300),
)
def test_the_columns_fill_the_room_and_never_more(columns: Sequence[Column], names: list[str], room: int) -> None:
    shown = [column for column in columns if column.least <= room]
    found = widths(shown, [[name] * len(shown) for name in names], room)
    assert sum(found) + len(found) <= room
    assert all(width >= len(column.label) or not column.width for width, column in zip(found, shown, strict=True))


@given(st.integers(0, 60), st.tuples(st.integers(2, 99), st.integers(2, 99), st.integers(2, 99)))
def test_the_tables_share_all_lines_and_none_has_less_than_its_share_unless_it_wants_less(
    room: int, wanted: tuple[int, int, int]
) -> None:
    found = heights(room, wanted)
    assert sum(found) == room
    assert all(lines >= min(want, room * share // 10) for lines, want, share in zip(found, wanted, SHARES, strict=True))
    assert all(lines <= want for lines, want in zip(found[:-1], wanted[:-1], strict=True))


def status(at: float, *, handled: int = 0, failed: int = 0, unready: tuple[str, ...] = ()) -> Status:
    worker = WorkerStatus(
        name="charge", queue="bank.charge", concurrency=1, in_flight=3, handled=handled, failed=failed
    )
    return Status(
        runner="r",
        app="bank",
        process="1",
        host="h",
        pid=1,
        started=0.0,
        at=at,
        resident_bytes=1,
        health=Health(unready=unready),
        workers=(worker,),
    )


def test_a_rate_is_that_of_the_last_ten_seconds() -> None:
    rates = Rates()
    assert rates.of("r", "charge") == 0.0
    rates.note(status(100.0))
    assert rates.of("r", "charge") == 0.0
    rates.note(status(102.0, handled=10, failed=10))
    assert rates.of("r", "charge") == 10.0
    for second in range(103, 123):
        rates.note(status(float(second), handled=10, failed=10))
    assert rates.of("r", "charge") == 0.0


def test_a_queue_s_row_knows_what_only_runners_see() -> None:
    info = QueueInfo(
        name="bank.charge",
        topics=(),
        ordered=False,
        max_length=None,
        temporary=False,
        lease_seconds=30.0,
        ready=1,
        in_flight=0,
        delayed=0,
        dead=0,
        oldest_seconds=None,
        consumers=1,
    )
    gone = WorkerStatus(name="charge", queue="bank.charge", concurrency=1, failed=5, retried=4)
    [row] = queue_rows([info], [status(1.0, failed=2)], Rates(), frozenset(["bank.charge"]), [gone])
    assert (row.in_flight, row.failed, row.retried, row.paused, row.workers) == (3, 7, 4, True, ("charge",))


async def test_a_runner_that_is_silent_or_comes_back_is_counted_once() -> None:
    broker, watcher = MemoryBroker(), Watcher("memory://", 1.0)
    await broker.open()
    try:
        await broker.declare([Queue(name="bank.charge")])
        async with Operator(broker) as operator:
            operator.on_gone = watcher._note_gone

            async def failed(seen: Status, seconds_ago: float) -> int:
                operator.statuses[seen.runner] = seen
                operator.heard[seen.runner] = time.monotonic() - seconds_ago
                if not seconds_ago:
                    watcher._note(seen)
                picture = await watcher._look(broker, operator)
                return picture.queues[0].failed

            assert await failed(status(1.0, failed=2), 0.0) == 2
            assert await failed(status(1.0, failed=2), 10.0) == 2  # silent
            assert await failed(status(1.0, failed=2), 1000.0) == 2  # forgotten
            assert await failed(status(1000.0, failed=3), 0.0) == 3
    finally:
        await broker.close()


async def test_what_runners_that_are_gone_have_done_stays_counted_and_takes_little_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("conveyor.cli.top.GONE", 3)
    broker, watcher = MemoryBroker(), Watcher("memory://", 1.0)
    await broker.open()
    try:
        await broker.declare([Queue(name="bank.charge")])
        async with Operator(broker) as operator:
            operator.on_gone = watcher._note_gone
            for number in range(20):
                failure = Failure(
                    number=1, at=1.0, worker="charge", queue="bank.charge", message_id="m", attempt=1, error="e"
                )
                seen = msgspec.structs.replace(status(1.0, failed=2), runner=f"r{number}", failures=(failure,))
                operator.statuses[seen.runner] = seen
                operator.heard[seen.runner] = time.monotonic() - 1000.0
                watcher._note(seen)
                picture = await watcher._look(broker, operator)
                assert picture.queues[0].failed == 2 * (number + 1)
        assert len(watcher._gone) == len(watcher._known) == 3
        assert len(watcher._gone_before) == 1
    finally:
        await broker.close()


def test_a_runner_s_health_says_what_is_most_important() -> None:
    assert RunnerRow(status(1.0), 0.0, 0.0).health == "ready"
    assert RunnerRow(status(1.0, unready=("draining",)), 0.0, 0.0).health == "draining"
    assert RunnerRow(status(1.0, unready=("draining",)), 0.0, 7.0).health == "silent 7 s"
