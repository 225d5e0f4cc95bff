"""``conveyor wait``: jobs are waited for, and what they returned is printed."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

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


def test_a_job_that_was_given_up_or_has_not_ended_is_told_and_is_no_success(served: Program) -> None:
    odd, hanging = send(served, "3", "hang")
    done = served.run("wait", odd, "--app", "jobs:app", "--timeout", "90s")
    assert (done.returncode, done.stdout) == (1, f"{odd} dead ValueError: 3 is odd\n")
    late = served.run("wait", odd, hanging, "--app", "jobs:app", "--timeout", "2s")
    assert late.returncode == 1
    assert f"{hanging} has not ended after 2 s: " in late.stderr
    assert "0 of 2 jobs done" in late.stderr


def test_without_ids_it_says_what_is_missing(conveyor: Program) -> None:
    assert "wait for which jobs?" in conveyor.refused("wait", "--broker", "sqlite:///jobs.queue")
