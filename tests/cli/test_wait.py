"""``conveyor wait``: jobs are waited for, and what they returned is printed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Collection, Iterator
from math import inf
from typing import TYPE_CHECKING

import pytest

from conveyor.broker import Queue
from conveyor.brokers.memory import MemoryBroker
from conveyor.cli import wait
from conveyor.cli.terminal import Output
from conveyor.core.jobs import Job, Status
from conveyor.errors import BrokerFull, BrokerUnavailable, ConveyorError, NoKeeper, PublishFailed
from conveyor.runtime.ask import Asker

if TYPE_CHECKING:
    from tests.cli.conftest import Program

JOBS = """
import asyncio
from conveyor import Context, Conveyor, NO_RETRY

app = Conveyor("jobs", broker="sqlite:///jobs.queue", journal=True)

@app.task(retry=NO_RETRY)
async def halve(number: int, context: Context | None = None) -> dict[str, int]:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return {"half": number // 2}

@app.task
async def hang() -> None:
    await asyncio.Event().wait()
"""
SEND = """
import asyncio, sys, jobs

async def send() -> None:
    async with jobs.app:
        for argument in sys.argv[1:]:
            print((await (jobs.hang.send() if argument == "hang" else jobs.halve.send(int(argument)))).id)

asyncio.run(send())
"""


@pytest.fixture
def served(conveyor: Program) -> Iterator[Program]:
    """The program in a folder where jobs are run."""
    (conveyor.folder / "jobs.py").write_text(JOBS)
    (conveyor.folder / "send.py").write_text(SEND)
    with (conveyor.folder / "log").open("ab") as log:
        command = conveyor.command("run", "jobs:app", "--grace", "0")
        runner = subprocess.Popen(command, cwd=conveyor.folder, env=conveyor.environment, stdout=log, stderr=log)
        try:
            yield conveyor
        finally:
            runner.send_signal(signal.SIGTERM)
            try:
                runner.wait(60)
            finally:
                runner.kill()
                runner.wait()


def send(program: Program, *jobs: str) -> list[str]:
    done = subprocess.run(
        [program.command()[0], "send.py", *jobs],
        cwd=program.folder,
        env=program.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_what_jobs_returned_is_printed_as_they_end(served: Program) -> None:
    one, other = send(served, "4", "6")
    shown = served.ok("wait", one, other, "--broker", "sqlite:///jobs.queue", "--timeout", "90s")
    assert sorted(shown.splitlines()) == sorted([f'{one} done {{"half":2}}', f'{other} done {{"half":3}}'])
    again = served.run("wait", "-", "--app", "jobs:app", "--json", stdin=f"{one}\n{other}\n")
    assert again.returncode == 0, again.stderr
    results = [json.loads(line) for line in again.stdout.splitlines()]
    assert {each["id"]: each["result"] for each in results} == {one: {"half": 2}, other: {"half": 3}}


def test_where_nothing_says_which_broker_the_keeper_of_the_queue_file_here_is_asked(served: Program) -> None:
    [one] = send(served, "4")
    assert served.ok("wait", one, "--app", "jobs:app", "--timeout", "90s") == f'{one} done {{"half":2}}\n'
    done = served.run("wait", one, "--timeout", "90s")
    assert (done.returncode, done.stdout) == (0, f'{one} done {{"half":2}}\n'), done.stderr
    assert "asking whoever keeps jobs.queue.journal" in done.stderr
    for name in ("other.queue", "other.queue.journal", "alone.journal"):
        (served.folder / name).touch()
    said = served.refused("wait", one)
    assert "which broker?" in said
    assert "several are here: jobs.queue.journal, other.queue.journal" in said


def test_a_job_that_was_given_up_or_has_not_ended_is_told_and_is_no_success(served: Program) -> None:
    odd, hanging = send(served, "3", "hang")
    done = served.run("wait", odd, "--app", "jobs:app", "--timeout", "90s")
    assert (done.returncode, done.stdout) == (1, f"{odd} dead ValueError: 3 is odd\n")
    late = served.run("wait", odd, hanging, "--app", "jobs:app", "--timeout", "2s")
    assert late.returncode == 1
    assert f"{hanging} has not ended after 2 s: " in late.stderr
    assert "0 of 2 jobs done" in late.stderr


def test_the_beginning_of_an_id_is_enough_where_only_one_job_begins_so(served: Program) -> None:
    one, other = send(served, "4", "6")
    assert served.ok("wait", one, other, "--app", "jobs:app", "--timeout", "90s")
    both = one[: next(place for place in range(len(one)) if one[place] != other[place])]
    assert served.ok("wait", one[: len(both) + 1], "--app", "jobs:app") == f'{one} done {{"half":2}}\n'
    unclear = served.run("wait", both, one, "--app", "jobs:app")
    assert (unclear.returncode, unclear.stdout) == (1, "")
    assert f"{both} may mean several" in unclear.stderr
    assert one in unclear.stderr
    assert other in unclear.stderr


def test_a_job_that_nobody_knows_yet_is_said_at_once_and_waited_for(served: Program) -> None:
    send(served, "2")  # from here on there is a broker
    command = served.command("wait", "later", "--app", "jobs:app")
    with subprocess.Popen(
        command, cwd=served.folder, env=served.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stderr is not None
        said = waiting.stderr.readline()
        while "no job later is known yet" not in said:  # the keeper may be about to start
            assert "waiting" in said or "nobody keeps" in said
            said = waiting.stderr.readline()
        served.ok("publish", "jobs:app", "halve", "--data", '{"number": 8}', "--id", "later")
        told, _ = waiting.communicate(timeout=120)
    assert (waiting.returncode, told) == (0, 'later done {"half":4}\n')
    late = served.run("wait", "never", "--app", "jobs:app", "--timeout", "1s")
    assert late.returncode == 1
    assert "no job never is known yet" in late.stderr
    assert "never has not ended after 1 s: the journal knows nothing about it" in late.stderr


def test_where_no_journal_is_kept_it_refuses_with_what_to_do(served: Program) -> None:
    served.declare(Queue(name="shop.resize"))
    assert "shop keeps no journal" in served.refused("wait", "x", "--app", "shop", CONVEYOR_BROKER=served.queue_url)
    said = served.refused("wait", "x", "--broker", served.queue_url)
    assert "no journal was ever kept on this broker" in said
    assert "CONVEYOR_JOURNAL=1" in said


def test_while_nobody_keeps_the_journal_that_is_said_and_somebody_is_waited_for(conveyor: Program) -> None:
    (conveyor.folder / "jobs.py").write_text(JOBS)
    (conveyor.folder / "send.py").write_text(SEND)
    [id] = send(conveyor, "4")
    done = conveyor.run("wait", id, "--app", "jobs:app", "--timeout", "1s")
    assert done.returncode == 1
    assert "nobody keeps a journal on this broker now" in done.stderr
    assert "waiting for somebody who does" in done.stderr
    assert "nobody came who keeps the journal" in done.stderr
    assert "knows nothing" not in done.stderr
    assert "nobody keeps a journal on this broker now" in conveyor.refused(
        "wait", id, "--app", "jobs:app", "--timeout", "0s", code=1
    )


def test_without_ids_it_says_what_is_missing(conveyor: Program) -> None:
    assert "wait for which jobs?" in conveyor.refused("wait", "--broker", "sqlite:///jobs.queue")


async def test_the_wait_outlives_every_outage_of_the_broker_but_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    done = Job(id="m", topic="t", status=Status.DONE)
    news: list[dict[str, Job] | ConveyorError] = [
        NoKeeper("nobody"),
        BrokerUnavailable("away"),
        BrokerFull("no room"),
        PublishFailed({}, {"q": "who knows?"}),
        {"m": done},
    ]

    class Stub(Asker):
        async def wait(self, ids: Collection[str], *, timeout_seconds: float) -> dict[str, Job]:
            if isinstance(said := news.pop(0), ConveyorError):
                raise said
            return said

    monkeypatch.setattr(wait, "LOOK_SECONDS", 0.0)
    asker = Stub(MemoryBroker(), time.time)
    ended = [job async for _, jobs in wait._looks(asker, ["m"], inf, Output()) for job in jobs]
    assert (ended, news) == ([done], [])
    news.append(PublishFailed({"q": "refused"}))
    with pytest.raises(PublishFailed):
        await anext(aiter(wait._looks(asker, ["m"], inf, Output())))
