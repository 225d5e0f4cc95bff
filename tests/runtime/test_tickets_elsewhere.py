"""A ticket made in one program is worth the same in another one, on every broker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conveyor import Conveyor, JobCancelled
from conveyor.brokers.memory import MemoryBroker, MemoryStore

APP = """
import asyncio
import os
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from conveyor import Context, Conveyor, RetryPolicy

app = Conveyor("shop", broker=os.environ["BROKER"], journal=os.environ["JOURNAL"])

@dataclass
class Thumb:
    path: Path
    price: Decimal

@app.task
async def resize(path: Path, width: int) -> Thumb:
    return Thumb(path, Decimal(width))

@app.task(cpu=True)
def crunch(number: int, context: Context = None) -> int:
    context.progress(1, 1, "crunched")
    return number * number

@app.task(retry=RetryPolicy(attempts=2, initial=0.1))
def fail() -> None:
    raise ValueError("no good")

@app.task
async def hang() -> None:
    await asyncio.Event().wait()
"""
NOTES = """
import os
from conveyor import Conveyor

app = Conveyor("notes", broker=os.environ["BROKER"], journal=os.environ["JOURNAL"])

@app.task(concurrency=1)
async def note(name: str) -> None:
    with open("notes", "a") as notes:
        notes.write(name + "\\n")
"""
SEND = """
import asyncio
from pathlib import Path
import shop

async def declare():  # as the runner is about to do
    async with shop.app:
        pass

asyncio.run(declare())
tickets = [
    shop.resize.send_sync(Path("a.jpg"), 3), shop.crunch.send_sync(7), shop.fail.send_sync(), shop.hang.send_sync(),
    shop.resize.options(delay=600.0).send_sync(Path("b.jpg"), 4),
]
print(*[ticket.id for ticket in tickets])
"""
ASK = """
import sys
import time
from decimal import Decimal
from pathlib import Path
import shop
from conveyor import JobCancelled, JobFailed
SECONDS = 120.0
resized, crunched, failed, hung, late = map(shop.app.ticket, sys.argv[1:])
assert resized.result_sync(SECONDS) == shop.Thumb(Path("a.jpg"), Decimal(3))
assert crunched.result_sync(SECONDS) == 49
assert crunched.status_sync().note == "crunched"
try:
    failed.result_sync(SECONDS)
except JobFailed as error:
    assert (error.error, error.attempts) == ("ValueError: no good", 2)
    assert "in fail" in str(error.__cause__)
while hung.status_sync().status != "running":
    time.sleep(0.1)
for ticket in (hung, late):
    ticket.cancel_sync()
    try:
        ticket.result_sync(SECONDS)
    except JobCancelled:
        pass
statuses = [str(ticket.status_sync().status) for ticket in (resized, crunched, failed, hung, late)]
assert statuses == ["done", "done", "dead", "cancelled", "cancelled"], statuses
print("all well")
"""


@pytest.fixture(params=["sqlite", "redis", "rabbitmq"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/shop.queue"
    server = request.getfixturevalue(request.param)
    return str(server.url())


@pytest.fixture
def programs(url: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of programs, while `conveyor run` serves them."""
    (tmp_path / "shop.py").write_text(APP)
    environment = {**os.environ, "BROKER": url, "JOURNAL": str(tmp_path / "shop.journal"), "PYTHONPATH": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        runner = subprocess.Popen(
            [sys.executable, "-m", "conveyor", "run", "shop:app"], cwd=tmp_path, env=environment, stderr=log, stdout=log
        )
        try:
            yield environment
        finally:
            runner.terminate()
            code = runner.wait(60)
    assert code == 0, (tmp_path / "log").read_text()


def run(program: str, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_program_sends_and_another_one_asks_by_id(programs: dict[str, str]) -> None:
    ids = run(SEND, programs)
    assert run(ASK, programs, *ids.split()) == "all well\n"


async def test_jobs_that_were_cancelled_while_no_worker_was_there_do_not_run_when_workers_come(tmp_path: Path) -> None:
    (tmp_path / "notes.py").write_text(NOTES)
    broker, journal = f"sqlite:///{tmp_path}/notes.queue", str(tmp_path / "notes.journal")
    environment = {**os.environ, "BROKER": broker, "JOURNAL": journal, "PYTHONPATH": str(tmp_path)}
    app = Conveyor("notes", broker=broker, journal=journal)

    @app.task(name="note")
    async def note(name: str) -> None: ...

    async with app:
        tickets = [await note.send(f"cancelled {number}") for number in range(5)]
        for ticket in tickets:
            await ticket.cancel()
        last = await note.send("the last")
        command = [sys.executable, "-m", "conveyor", "run", "notes:app"]
        with (
            (tmp_path / "log").open("wb") as log,
            subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=log, stdout=log) as runner,
        ):
            try:
                await last.result(120.0)
                for ticket in tickets:
                    with pytest.raises(JobCancelled):
                        await ticket.result(120.0)
            finally:
                runner.terminate()
    assert (tmp_path / "notes").read_text() == "the last\n"


async def test_two_applications_share_jobs_in_memory() -> None:
    store = MemoryStore()
    brokers = MemoryBroker(store=store), MemoryBroker(store=store)
    one, other = (Conveyor("shop", broker=broker, journal=True) for broker in brokers)

    @one.task
    async def double(number: int) -> int:
        return 2 * number

    @one.task
    async def hang() -> None:
        await asyncio.Event().wait()

    async with contextlib.AsyncExitStack() as stack:
        for broker in brokers:
            await broker.open()
            stack.push_async_callback(broker.close)
        await stack.enter_async_context(one.running())
        await stack.enter_async_context(other)
        doubled, hung = await double.send(4), await hang.send()
        assert await other.ticket(doubled.id).result(60.0) == 8
        await other.ticket(hung.id).cancel()
        with pytest.raises(JobCancelled):
            await other.ticket(hung.id).result(60.0)
