"""A job of the CPU pool harms nobody but itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from conveyor.errors import HandlerCrashed, HandlerError, HandlerTimeout, Retry
from conveyor.runtime import logs
from conveyor.runtime import pool as pools
from conveyor.runtime.attempt import Attempt
from conveyor.runtime.frames import lent
from conveyor.runtime.logs import Current
from conveyor.runtime.pool import CpuPool
from tests.runtime import jobs
from tests.runtime.meeting import Meeting, gone

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _importable_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


async def run(
    pool: CpuPool,
    target: str,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    timeout_seconds: float | None = None,
) -> Any:
    """Call a function with its arguments."""
    named = {name: lent(value) for name, value in (kwargs or {}).items()}
    attempt = Attempt(None, args=tuple(lent(value) for value in args), kwargs=named)
    return await pool.call(target, attempt, timeout_seconds=timeout_seconds)


@pytest.fixture
async def pool() -> AsyncIterator[CpuPool]:
    pool = CpuPool(2)
    yield pool
    await pool.close()


async def test_a_job_runs_in_another_process_and_gives_its_result(pool: CpuPool) -> None:
    assert await run(pool, "jobs:add", (1,), {"other": 2}) == 3
    assert await run(pool, "jobs:where") != os.getpid()


async def test_a_process_is_kept_for_the_next_job(pool: CpuPool) -> None:
    assert await run(pool, "jobs:where") == await run(pool, "jobs:where")


async def test_no_process_is_started_before_it_is_needed() -> None:
    pool = CpuPool(4)
    assert not pool._all
    await pool.close()


async def test_two_jobs_run_at_the_same_time(pool: CpuPool, meeting: Meeting) -> None:
    async with asyncio.TaskGroup() as group:
        jobs = [group.create_task(run(pool, "jobs:meet", (meeting.path,))) for _ in range(2)]
        with await meeting.arrival() as one, await meeting.arrival() as other:  # both are there before either may go on
            one.send(b"one")
            other.send(b"other")
    assert {job.result() for job in jobs} == {"one", "other"}


async def test_more_jobs_than_processes_take_turns(pool: CpuPool) -> None:
    pids = await asyncio.gather(*(run(pool, "jobs:where") for _ in range(10)))
    assert 1 <= len(set(pids)) <= 2


async def test_a_generator_gives_a_list(pool: CpuPool) -> None:
    assert await run(pool, "jobs:count", (3,)) == [0, 1, 2]


async def test_a_task_is_unwrapped(pool: CpuPool) -> None:
    assert await run(pool, "jobs:wrapped") == "unwrapped"


async def test_a_large_result_arrives(pool: CpuPool) -> None:
    assert len(await run(pool, "jobs:give_much", (20_000_000,))) == 20_000_000


@pytest.mark.parametrize("size", [10, 3_000_000])
async def test_bytes_arrive_as_what_they_are_in_both_directions(pool: CpuPool, size: int) -> None:
    sent = os.urandom(size)
    assert await run(pool, "jobs:kinds", (sent, bytearray(sent)), {}) == [("bytes", size), ("bytearray", size)]
    assert await run(pool, "jobs:give_back", (), {"value": sent}) == sent
    assert await run(pool, "jobs:give_back", (bytearray(sent),)) == bytearray(sent)


async def test_a_process_that_dies_while_it_is_sent_much_fails_alone(pool: CpuPool) -> None:
    await asyncio.gather(*(run(pool, "jobs:add", (1, 1)) for _ in range(2)))
    stopped = next(iter(pool._all))._process.pid or 0
    os.kill(stopped, signal.SIGSTOP)
    both = [asyncio.create_task(run(pool, "jobs:kinds", (bytes(30_000_000),))) for _ in range(2)]
    done, pending = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    os.kill(stopped, signal.SIGKILL)
    assert [job.result() for job in done] == [[("bytes", 30_000_000)]]
    with pytest.raises(HandlerCrashed, match="killed by SIGKILL"):
        await pending.pop()


async def test_progress_is_seen_while_the_job_runs(pool: CpuPool, meeting: Meeting) -> None:
    said: asyncio.Queue[tuple[float, float | None, str]] = asyncio.Queue()
    job = asyncio.create_task(
        pool.call("jobs:report_and_meet", jobs.At(meeting.path), tell=lambda *news: said.put_nowait(news))
    )
    with await meeting.arrival() as line:
        assert await asyncio.wait_for(said.get(), 60) == (1, None, "half")
        line.send(b"on")
    assert await job == "on"


async def test_much_progress_is_told_in_few_words_and_the_last_one_always(pool: CpuPool) -> None:
    said: list[tuple[float, float | None, str]] = []
    result = await pool.call("jobs:report_often", jobs.Counting(), tell=lambda *news: said.append(news))
    assert result == "counted"
    assert said[-1][2] == "step 10000"
    assert len(said) < 1_000
    assert said == sorted(said)


async def test_a_thread_that_a_job_left_behind_harms_no_later_job() -> None:
    pool = CpuPool(1)
    await run(pool, "jobs:leave_a_thread_that_reports")
    for number in range(20):
        assert await run(pool, "jobs:add", (number, 1)) == number + 1
    await pool.close()


async def test_what_a_job_left_behind_says_is_not_said_of_the_next_one(meeting: Meeting) -> None:
    pool, said = CpuPool(1), list[tuple[float, float | None, str]]()
    await run(pool, "jobs:leave_a_thread_that_reports")
    for _ in range(3):
        job = asyncio.create_task(
            pool.call("jobs:report_and_meet", jobs.At(meeting.path), tell=lambda *news: said.append(news))
        )
        with await meeting.arrival() as line:
            async with asyncio.timeout(60):
                while not said:  # the thread goes on as before
                    await asyncio.sleep(0.01)
            line.send(b"on")
        assert await job == "on"
        assert set(said) == {(1, None, "half")}
        said.clear()
    await pool.close()


async def test_a_job_is_told_that_the_runner_stops(pool: CpuPool, meeting: Meeting) -> None:
    job = asyncio.create_task(run(pool, "jobs:await_the_nod", (meeting.path,)))
    with await meeting.arrival() as line:
        pool.drain()
        line.send(b"goodbye")
    assert await job == "goodbye"


async def test_a_job_that_waits_for_a_process_while_the_runner_stops_is_told_as_it_starts(meeting: Meeting) -> None:
    pool = CpuPool(1)
    first = asyncio.create_task(run(pool, "jobs:meet", (meeting.path,)))
    second = asyncio.create_task(run(pool, "jobs:await_the_nod", (meeting.path,)))
    with await meeting.arrival() as line:
        pool.drain()
        line.send(b"free")
    assert await first == "free"
    with await meeting.arrival() as line:
        line.send(b"goodbye")
    assert await second == "goodbye"
    await pool.close()


async def test_a_process_that_starts_while_the_runner_stops_is_told(pool: CpuPool, meeting: Meeting) -> None:
    pool.drain()
    job = asyncio.create_task(run(pool, "jobs:await_the_nod", (meeting.path,)))
    with await meeting.arrival() as line:
        line.send(b"goodbye")
    assert await job == "goodbye"


async def test_an_error_arrives_with_its_type_and_its_traceback(pool: CpuPool) -> None:
    with pytest.raises(ValueError, match="bad input") as caught:
        await run(pool, "jobs:fail", ("bad input",))
    assert "jobs.py" in "".join(traceback.format_exception(caught.value))
    with pytest.raises(Retry) as outcome:
        await run(pool, "jobs:ask_for_a_retry")
    assert outcome.value.after_seconds == 5.0


@pytest.mark.parametrize(
    ("target", "args", "why"),
    [
        ("jobs:leave", (7,), "exit code 7"),
        ("jobs:leave", (0,), "exit code 0"),
        ("jobs:fault", (), "killed by SIGSEGV"),
        ("jobs:exit_politely", (), "SystemExit"),
    ],
)
async def test_a_job_that_ends_its_process_fails_alone(
    pool: CpuPool, meeting: Meeting, target: str, args: tuple[object, ...], why: str
) -> None:
    neighbour = asyncio.create_task(run(pool, "jobs:meet", (meeting.path,)))
    with await meeting.arrival() as line:
        with pytest.raises(HandlerCrashed, match=why):
            await run(pool, target, args)
        assert await run(pool, "jobs:add", (1, 1)) == 2
        line.send(b"unharmed")
        assert await neighbour == "unharmed"


async def test_a_program_that_a_job_has_started_holds_nobody_up() -> None:
    pool = CpuPool(1)
    program = await run(pool, "jobs:start_a_program")
    await pool.close()
    assert runs(program)
    os.kill(program, signal.SIGKILL)


async def test_the_death_of_a_process_is_seen_where_another_one_holds_its_line(meeting: Meeting) -> None:
    pool = CpuPool(1)
    job = asyncio.create_task(run(pool, "jobs:leave_a_fork", (meeting.path,)))
    with await meeting.arrival():
        with pytest.raises(HandlerCrashed, match="exit code 3"):
            await job
        await pool.close()


async def test_a_job_that_comes_back_twice_has_one_result_and_the_next_one_its_own() -> None:
    pool = CpuPool(1)
    for number in range(5):
        assert await run(pool, "jobs:come_back_twice") == "twice"
        assert await run(pool, "jobs:add", (number, 1)) == number + 1
    await pool.close()


async def test_a_killed_process_is_replaced(pool: CpuPool, meeting: Meeting) -> None:
    job = asyncio.create_task(run(pool, "jobs:hang", (meeting.path,)))
    os.kill(await meeting.pid(), signal.SIGKILL)
    with pytest.raises(HandlerCrashed, match="killed by SIGKILL"):
        await job
    assert await run(pool, "jobs:add", (1, 1)) == 2


async def test_a_process_that_died_between_two_jobs_is_replaced(pool: CpuPool) -> None:
    pid = await run(pool, "jobs:where")
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while next(iter(pool._all)).alive:
            await asyncio.sleep(0.01)
    assert await run(pool, "jobs:where") != pid


async def test_a_job_that_closes_its_line_fails(pool: CpuPool) -> None:
    with pytest.raises(HandlerCrashed):
        await run(pool, "jobs:close_everything")
    assert await run(pool, "jobs:add", (1, 1)) == 2


async def test_a_job_that_runs_too_long_is_killed(pool: CpuPool, meeting: Meeting) -> None:
    job = asyncio.create_task(run(pool, "jobs:hang", (meeting.path,), timeout_seconds=0.2))
    pid = await meeting.pid()
    with pytest.raises(HandlerTimeout, match=r"jobs:hang ran too long.*0\.2 s"):
        await job
    await gone(pid)


async def test_a_cancelled_job_is_killed(pool: CpuPool, meeting: Meeting) -> None:
    job = asyncio.create_task(run(pool, "jobs:hang", (meeting.path,)))
    pid = await meeting.pid()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    await gone(pid)
    assert await run(pool, "jobs:add", (1, 1)) == 2


async def test_a_stopped_process_can_be_cancelled(pool: CpuPool, meeting: Meeting) -> None:
    job = asyncio.create_task(run(pool, "jobs:hang", (meeting.path,)))
    pid = await meeting.pid()
    os.kill(pid, signal.SIGSTOP)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    await gone(pid)


async def test_closing_the_pool_ends_its_jobs_and_processes(meeting: Meeting) -> None:
    pool = CpuPool(1)
    job = asyncio.create_task(run(pool, "jobs:hang", (meeting.path,)))
    pid = await meeting.pid()
    await pool.close()
    assert not os.path.exists(f"/proc/{pid}")  # noqa: PTH110, ASYNC240 - /proc does not block
    with pytest.raises(HandlerCrashed, match="the pool was closed"):
        await job


async def test_a_result_that_cannot_travel_is_a_clear_error(pool: CpuPool) -> None:
    with pytest.raises(HandlerError, match=r"what jobs:give_a_lock returned cannot be sent .*pickle"):
        await run(pool, "jobs:give_a_lock")


@pytest.mark.parametrize(
    ("target", "text"), [("jobs:fail_awkwardly", "Awkward: 1 and 2"), ("jobs:fail_with_a_lock", "ValueError: .*lock")]
)
async def test_an_error_that_cannot_travel_arrives_as_text(pool: CpuPool, target: str, text: str) -> None:
    with pytest.raises(HandlerError, match=text):
        await run(pool, target)


async def test_arguments_that_cannot_travel_are_a_clear_error(pool: CpuPool) -> None:
    with pytest.raises(HandlerError, match="the arguments of jobs:add cannot be sent"):
        await run(pool, "jobs:add", (threading.Lock(),))


@pytest.mark.parametrize("target", ["jobs:nothing", "no_such_module:add", "jobs:test.<locals>.inner", "jobs:HERE"])
async def test_a_function_that_cannot_be_found_is_a_clear_error(pool: CpuPool, target: str) -> None:
    with pytest.raises(HandlerError, match=f"{target} cannot be run in another process"):
        await run(pool, target)


async def test_a_process_that_dies_as_it_starts_says_so_and_where_to_look(
    pool: CpuPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deadly.py").write_text("import os; print('I am going', flush=True); os._exit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(HandlerCrashed, match=r"died before it could run deadly:work: exit code 3; .* stderr"):
        await run(pool, "deadly:work")
    assert "I am going" in capfd.readouterr().out


async def test_a_job_that_eats_memory_is_killed() -> None:
    pool = CpuPool(1, max_rss_bytes=200_000_000)
    with pytest.raises(HandlerCrashed, match=r"used \d+ MB, over 200 MB"):
        await run(pool, "jobs:eat")
    assert await run(pool, "jobs:add", (1, 1)) == 2
    await pool.close()


async def test_a_process_that_has_grown_too_large_is_replaced_after_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "LOOK_SECONDS", 3_600.0)  # nobody looks at it while it runs
    pool = CpuPool(1, max_rss_bytes=200_000_000)
    small = await run(pool, "jobs:where")
    assert await run(pool, "jobs:grow_in_an_instant") == small
    assert await run(pool, "jobs:where") != small
    await pool.close()


async def test_signals_from_the_terminal_are_left_to_the_owner_of_the_pool(pool: CpuPool, meeting: Meeting) -> None:
    job = asyncio.create_task(run(pool, "jobs:meet", (meeting.path,)))
    with await meeting.arrival() as line:
        process = next(iter(pool._all))._process
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid or 0, number)
        line.send(b"still here")
        assert await job == "still here"


async def test_a_program_started_by_a_job_can_be_terminated(pool: CpuPool) -> None:
    assert await run(pool, "jobs:terminate_a_program") == -signal.SIGTERM


async def test_a_job_logs_like_its_runner(
    pool: CpuPool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "settings", logs.Settings(20, True, "2"))
    token = logs.current.set(Current("m-1", None, "resize", 2))
    await run(pool, "jobs:log_a_line", ("hello",))
    logs.current.reset(token)
    line = json.loads(capfd.readouterr().err)
    assert (line["message"], line["message_id"], line["worker"], line["process"]) == ("hello", "m-1", "resize", "2")


SCRIPT = """
import asyncio, sys
from conveyor.runtime.attempt import Attempt
from conveyor.runtime.pool import CpuPool

def double(number):
    return 2 * number

class Point:
    def __init__(self, x):
        self.x = x

def move(point):
    point.x += 1
    return point

async def main():
    pool = CpuPool(1)
    print(await pool.call(f"{double.__module__}:{double.__qualname__}", Attempt(None, args=(21,))))
    print((await pool.call("__main__:move", Attempt(None, args=(Point(6),)))).x)
    if "close" in sys.argv:
        await pool.close()

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("ending", ["close", "forget"])
def test_an_application_that_is_the_main_program_can_use_it_and_ends(tmp_path: Path, ending: str) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, ending], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["42", "7"], "")


OWNER = """
import asyncio, sys
from conveyor.runtime.attempt import Attempt
from conveyor.runtime.pool import CpuPool

async def main():
    pool = CpuPool(2)
    await asyncio.gather(*(pool.call(f"jobs:{name}", Attempt(None, args=(sys.argv[1],))) for name in ("hang", "hang_on")))

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_no_process_outlives_an_owner_that_is_killed_whatever_it_does(tmp_path: Path, meeting: Meeting) -> None:
    (tmp_path / "owner.py").write_text(OWNER)
    places = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    owner = await asyncio.create_subprocess_exec(
        sys.executable, tmp_path / "owner.py", meeting.path, env=os.environ | {"PYTHONPATH": places}
    )
    pids = [await meeting.pid(), await meeting.pid()]
    owner.kill()
    await owner.wait()
    async with asyncio.timeout(60):
        while any(runs(pid) for pid in pids):
            await asyncio.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process has not ended; one that only waits to be reaped has."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
