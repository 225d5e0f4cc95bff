"""``conveyor run`` does the work, says how it is, survives what kills a process, and ends in order."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from conveyor.cli.run import is_locked_out
from conveyor.errors import BrokerUnavailable

if TYPE_CHECKING:
    from tests.cli.conftest import Program

PATIENCE_SECONDS = 60.0


@contextmanager
def running(conveyor: Program, *arguments: str, codes: tuple[int, ...] = (0,)) -> Iterator[subprocess.Popen[str]]:
    """The program at work, ended by SIGTERM with one of these codes; its log is on stdout."""
    with subprocess.Popen(
        conveyor.command("run", *arguments, "--json"),
        cwd=conveyor.folder,
        env=conveyor.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as program:
        try:
            yield program
            program.send_signal(signal.SIGTERM)
            output, _ = program.communicate(timeout=PATIENCE_SECONDS)
            assert program.returncode in codes, output
        finally:
            program.kill()


def order(conveyor: Program, name: str) -> None:
    conveyor.ok("publish", "shop", "OrderCreated", "--data", json.dumps({"order_id": name, "total": "1"}))


async def shipped(conveyor: Program, number: int) -> list[str]:
    """Wait until so many orders are shipped."""
    file = conveyor.folder / "shipped"
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            lines = file.read_text().split() if file.exists() else []
            if len(lines) >= number:
                return lines
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_workers_of_all_processes_do_the_work_and_sigterm_ends_them_in_order(
    conveyor: Program, processes: str
) -> None:
    for name in ("A-1", "A-2"):
        order(conveyor, name)
    with running(conveyor, "shop", "--processes", processes):
        assert sorted(await shipped(conveyor, 2)) == ["A-1", "A-2"]
    assert {queue["in_flight"] for queue in conveyor.json("queues", "--app", "shop")["queues"]} == {0}


async def test_only_the_named_workers_run(conveyor: Program) -> None:
    order(conveyor, "A-1")
    with running(conveyor, "shop", "--workers", "charge"):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                listed = await asyncio.to_thread(conveyor.json, "queues", "--app", "shop")
                found = {queue["name"]: queue for queue in listed["queues"]}
                if found["shop.ship"]["ready"] == 1 and found["shop.charge"]["in_flight"] == 0:
                    break
    assert not (conveyor.folder / "shipped").exists()


async def test_health_and_metrics_are_served(conveyor: Program, free_port: int) -> None:
    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{free_port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    order(conveyor, "A-1")
    with running(conveyor, "shop", "--http", f"127.0.0.1:{free_port}"):
        await shipped(conveyor, 1)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while 'conveyor_messages_succeeded_total{worker="ship"} 1.0' not in (
                text := await asyncio.to_thread(get, "/metrics")
            ):
                await asyncio.sleep(0.1)
        assert "conveyor_queue" in text
        assert json.loads(await asyncio.to_thread(get, "/readyz"))["ready"] is True
        assert json.loads(await asyncio.to_thread(get, "/livez"))["live"] is True


async def test_a_message_that_kills_its_process_becomes_a_dead_letter_and_others_are_handled(conveyor: Program) -> None:
    (conveyor.folder / "poison.py").write_text(
        """
import os
from shop import OrderCreated, PaymentProcessed, app

@app.worker
def poison(order: OrderCreated) -> None:
    if order.order_id == "poison":
        os._exit(7)
"""
    )
    for name in ("poison", "A-1"):
        order(conveyor, name)
    conveyor.ok("publish", "poison", "OrderCreated", "--data", '{"order_id": "poison", "total": "1"}')
    conveyor.ok("publish", "poison", "OrderCreated", "--data", '{"order_id": "A-2", "total": "1"}')
    with running(conveyor, "poison"):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                listed = await asyncio.to_thread(conveyor.json, "queues", "--app", "poison")
                found = {queue["name"]: queue for queue in listed["queues"]}
                if found["shop.poison"]["dead"] == 1 and found["shop.poison"]["ready"] == 0:
                    break
        assert set(await shipped(conveyor, 4)) == {
            "A-1",
            "A-2",
            "poison",
        }  # what had not settled at a death is handled again
    [letter] = conveyor.json("dead", "list", "--app", "poison")["dead"]
    assert (letter["reason"], letter["queue"]) == ("crashed", "shop.poison")
    assert "exit code 7" in letter["error"]


async def test_a_second_signal_hurries_a_handler_that_takes_long(conveyor: Program) -> None:
    (conveyor.folder / "slow.py").write_text(
        """
import asyncio
from pathlib import Path
from shop import OrderCreated, app

@app.worker
async def slow(order: OrderCreated) -> None:
    Path("started").touch()
    await asyncio.sleep(3600)
"""
    )
    conveyor.ok("publish", "slow", "OrderCreated", "--data", '{"order_id": "A-1", "total": "1"}')
    # On a busy machine two seconds may be too few to leave in order: then the process is cut, and what it held comes back.
    with running(conveyor, "slow", "--grace", "1000", codes=(0, 1)) as program:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (conveyor.folder / "started").exists():
                await asyncio.sleep(0.02)
        program.send_signal(signal.SIGINT)
        await asyncio.to_thread(read_until, program, "stopping: SIGINT")
        hurried = asyncio.create_task(asyncio.to_thread(read_until, program, "a second signal"))
        while not hurried.done():  # those of the same moment are not a second one
            program.send_signal(signal.SIGTERM)
            await asyncio.wait([hurried], timeout=0.2)
        await hurried
    [queue] = [each for each in conveyor.json("queues", "--app", "slow")["queues"] if each["name"] == "shop.slow"]
    assert (queue["ready"], queue["in_flight"], queue["dead"]) == (1, 0, 0)


def read_until(program: subprocess.Popen[str], text: str) -> str:
    """Read the log until it says so; all that was read."""
    assert program.stdout is not None
    said = ""
    for line in program.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"the log ended without {text!r}")


def test_what_every_process_would_fail_for_is_said_once_before_any_is_started(conveyor: Program) -> None:
    (conveyor.folder / "needy.py").write_text(
        "from shop import OrderCreated, app\nclass Gateway: ...\n\n"
        "@app.worker\nasync def needy(order: OrderCreated, gateway: Gateway) -> None: ...\n"
    )
    said = conveyor.refused("run", "needy", "--processes", "4")
    assert said.count("needy needs Gateway, which nobody provides") == 1
    assert "stopping" not in said


def test_the_program_runs_as_a_module_and_as_a_script(conveyor: Program) -> None:
    script = Path(sys.executable).with_name("conveyor")
    done = subprocess.run([script, "--version"], capture_output=True, check=True, cwd=os.fspath(conveyor.folder))
    assert done.stdout.decode() == conveyor.ok("--version")


def test_migrate_creates_the_tables_once(conveyor: Program) -> None:
    url = "sqlite+aiosqlite:///shop.db"
    assert conveyor.json("migrate", "--database", url)["statements"]
    assert conveyor.json("migrate", "shop", CONVEYOR_DATABASE=url) == {"database": url, "statements": []}
    assert "was up to date already" in conveyor.ok("migrate", "--database", url)


async def test_the_database_of_the_command_line_is_the_one_of_the_workers(conveyor: Program) -> None:
    (conveyor.folder / "ledger.py").write_text(
        """
from conveyor import Transaction
from shop import OrderCreated, PaymentProcessed, app

@app.worker
async def book(order: OrderCreated, tx: Transaction) -> None:
    await tx.publish(PaymentProcessed("booked"))
"""
    )
    url = "sqlite+aiosqlite:///shop.db"
    assert "there is no database" in conveyor.refused("run", "ledger")
    conveyor.ok("publish", "ledger", "OrderCreated", "--data", '{"order_id": "A-1", "total": "1"}')
    with running(conveyor, "ledger", "--workers", "book,ship", "--database", url):
        assert await shipped(conveyor, 1) == ["booked"]
    assert (conveyor.folder / "shop.db").exists()


SLOW = """
import asyncio
from pathlib import Path
from shop import OrderCreated, app

@app.worker
async def slow(order: OrderCreated) -> None:
    Path("started").touch()
    await asyncio.sleep(1.5)
    Path("finished").touch()
"""


async def test_a_signal_that_reaches_every_process_at_once_gives_handlers_their_grace(conveyor: Program) -> None:
    """What `systemctl stop` does by default, so that processes get SIGTERM twice: once more from their supervisor."""
    (conveyor.folder / "slow.py").write_text(SLOW)
    conveyor.ok("publish", "slow", "OrderCreated", "--data", '{"order_id": "A-1", "total": "1"}')
    with running(conveyor, "slow", "--processes", "2") as program:
        await appears(conveyor.folder / "started")
        for pid in [*children(program.pid), program.pid]:
            os.kill(pid, signal.SIGTERM)
        await asyncio.to_thread(read_until, program, "stopping: SIGTERM")
        for pid in children(program.pid):
            os.kill(pid, signal.SIGTERM)
        assert await asyncio.to_thread(program.wait, PATIENCE_SECONDS) == 0
    assert (conveyor.folder / "finished").exists()


async def test_urls_with_passwords_stand_in_no_command_line_of_a_process_that_works(conveyor: Program) -> None:
    (conveyor.folder / "environment.py").write_text(
        "import os\nfrom pathlib import Path\nfrom shop import app\n"
        "Path(f'seen-{os.getpid()}').write_text(repr([text for text in os.environ.values() if 'chosen' in text]))\n"
    )
    conveyor.ok("migrate", "--database", "sqlite+aiosqlite:///chosen.db")
    chosen = ("--broker", "sqlite:///chosen.queue", "--database", "sqlite+aiosqlite:///chosen.db")
    with running(conveyor, "environment", *chosen) as program:
        await asyncio.to_thread(read_until, program, "the messages of shop are in")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (pids := children(program.pid)) or not (conveyor.folder / f"seen-{pids[0]}").exists():
                await asyncio.sleep(0.02)
        await asyncio.to_thread(
            read_until, program, "chosen.queue; its database is"
        )  # the process uses them all the same
        [pid] = children(program.pid)
        assert "chosen" not in command_line(pid)
    # Nor do programs that a handler starts get them.
    assert (conveyor.folder / f"seen-{pid}").read_text() == "[]"


async def test_a_broker_that_is_away_at_the_end_does_not_use_up_the_grace_period(conveyor: Program) -> None:
    (conveyor.folder / "away.py").write_text(
        """
from pathlib import Path
from conveyor.brokers.sqlite import SqliteBroker
from conveyor.errors import BrokerUnavailable
from shop import app

async def settle(self, settlements):
    Path("settling").touch()
    raise BrokerUnavailable("it is away")

SqliteBroker.settle = settle
"""
    )
    order(conveyor, "A-1")
    with running(conveyor, "away", "--grace", "3600"):
        await appears(conveyor.folder / "settling")


AWAY = """
from pathlib import Path
from conveyor.brokers.sqlite import SqliteBroker
from conveyor.errors import BrokerUnavailable
from shop import app

opened = SqliteBroker.open

async def open(self):
    if Path("away-now").exists():
        with Path("tried").open("a") as tried:
            tried.write("x")
        raise BrokerUnavailable("it is away")
    await opened(self)

SqliteBroker.open = open
"""


async def test_a_broker_that_is_away_at_the_start_is_waited_for(conveyor: Program, free_port: int) -> None:
    (conveyor.folder / "away.py").write_text(AWAY)
    order(conveyor, "A-1")
    away = conveyor.folder / "away-now"
    away.touch()
    with running(conveyor, "away", "--http", f"127.0.0.1:{free_port}") as program:
        said = await asyncio.to_thread(read_until, program, "it is away; trying again in")
        assert "Traceback" not in said
        with pytest.raises(urllib.error.HTTPError) as refused:
            await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{free_port}/readyz", timeout=10)
        assert "waiting for it to be back" in refused.value.read().decode()
        away.unlink()
        assert await shipped(conveyor, 1) == ["A-1"]


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("cannot reach RabbitMQ at amqp://h (virtual host '/'): 403 ACCESS_REFUSED - Login was refused", True),
        ("cannot reach RabbitMQ at amqp://h (virtual host 'x'): 530 NOT_ALLOWED - vhost x not found", True),
        ("cannot reach RabbitMQ at amqp://h:1403 (virtual host '/'): Connection refused", False),
    ],
)
def test_a_wrong_password_is_told_from_an_outage(said: str, refused: bool) -> None:
    assert is_locked_out(BrokerUnavailable(said)) is refused


def test_a_wrong_password_is_said_to_be_one_that_waiting_does_not_mend(conveyor: Program) -> None:
    refused = AWAY.replace("it is away", "403 ACCESS_REFUSED - Login was refused")
    (conveyor.folder / "away.py").write_text(refused)
    (conveyor.folder / "away-now").touch()
    with running(conveyor, "away") as program:
        said = read_until(program, "trying again in").splitlines()[-1]
    assert json.loads(said)["level"] == "error"
    assert "check user, password and virtual host" in said


async def test_a_program_that_waits_for_its_broker_ends_at_once_when_it_is_asked_to(conveyor: Program) -> None:
    (conveyor.folder / "away.py").write_text(AWAY)
    (conveyor.folder / "away-now").touch()
    with running(conveyor, "away"):
        await appears(conveyor.folder / "tried")


async def test_it_says_what_it_listens_on_and_when_it_is_ready(conveyor: Program) -> None:
    with running(conveyor, "shop") as program:
        said = await asyncio.to_thread(read_until, program, "shop is ready")
    lines = [json.loads(line)["message"] for line in said.splitlines()]
    story = ["running shop", "starting shop", "connected to", "charge listens on shop.charge, 100 at once"]
    places = [next(i for i, line in enumerate(lines) if line.startswith(part)) for part in story]
    assert places == sorted(places)


async def appears(file: Path) -> None:
    """Wait until a file exists."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not os.access(file, os.F_OK):
            await asyncio.sleep(0.02)


def command_line(pid: int) -> str:
    """What everybody on the machine can see of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text()


def children(pid: int) -> list[int]:
    """The processes that a process' main thread has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
