"""A handler with cpu=True is given what it asks for, in its own process, and its payload is decoded there."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conveyor import Call, Conveyor, HandlerError, Message, Next, RetryPolicy
from conveyor.core.settle import Reason
from conveyor.runtime import attempt
from conveyor.runtime.attempt import Form, target_of
from conveyor.testing.harness import Harness
from tests.runtime import jobs
from tests.runtime.jobs import Picture, Seen
from tests.runtime.meeting import Meeting

ONCE = RetryPolicy(attempts=1)
MUCH = 300_000


@pytest.mark.parametrize("middleware", [False, True])
async def test_a_worker_has_its_context_and_message_and_publishes(middleware: bool) -> None:
    app = Conveyor("t")
    app.worker(cpu=True)(jobs.look)
    payloads: list[object] = []

    async def watch(call: Call, step: Next) -> Any:
        payloads.append(call.payload)
        return await step(call)

    if middleware:
        app.use(watch)
    async with Harness(app) as run:
        sent = await run.publish(Picture("a.png", b"x" * MUCH))
        published, returned = run.published(Seen)
        assert published.name == "published on attempt 1"
        assert published.where == len(sent.body)
        assert returned == Seen("a.png", MUCH)
        first, second = run.messages(Seen)
        assert first.id != second.id
        assert first.correlation_id == second.correlation_id == sent.id
    assert payloads == ([Picture("a.png", b"x" * MUCH)] if middleware else [])


async def test_the_payload_of_a_handler_in_a_process_is_decoded_there(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Conveyor("t")
    app.worker(cpu=True)(jobs.look)
    decoded: list[object] = []
    monkeypatch.setattr(attempt, "_decoded", lambda *given: decoded.append(given))
    async with Harness(app) as run:
        await run.publish(Picture("a.png", b"x"))
        assert run.published(Seen)[-1] == Seen("a.png", 1)
    assert decoded == []


@pytest.mark.parametrize("size", [3, MUCH])
async def test_raw_bytes_arrive_as_bytes(size: int) -> None:
    app = Conveyor("t")
    app.worker(cpu=True, topic="raw")(jobs.look_at_raw)
    async with Harness(app) as run:
        await run.publish(b"x" * size, topic="raw")
        assert run.published(Seen) == [Seen("bytes", size)]


async def test_what_does_not_decode_is_a_dead_letter_as_it_is_elsewhere() -> None:
    app = Conveyor("t")
    app.worker(cpu=True)(jobs.look)

    @app.worker(topic="jobs.picture")
    async def beside(picture: Picture) -> None: ...

    topic = next(iter(app.workers["look"].codecs))

    @app.worker(topic=topic)
    async def here(picture: Picture) -> None: ...

    async with Harness(app) as run:
        await app.broker.publish([Message(id="m", topic=topic, body=b'{"name": 3}', created=run.clock())])
        await run.run_to_end()
        (there,), (dead,) = await run.dead("look"), await run.dead("here")
    assert there.reason == dead.reason == Reason.INVALID
    assert there.error == dead.error
    assert "at `$.name`" in there.error


async def test_a_payload_whose_type_has_no_place_in_a_module_is_decoded_here() -> None:
    app = Conveyor("t")

    class Hidden: ...

    assert Form(Hidden).pickled() is None
    assert Form(Picture).pickled() is not None
    scale = app.task(cpu=True)(jobs.scale)
    async with Harness(app):
        assert scale(Picture("a", b"1")).data == b"11"


async def test_a_process_has_nobody_to_publish_with_at_once() -> None:
    app = Conveyor("t")
    task = app.task(cpu=True, retry=ONCE)(jobs.try_to_publish_now)
    async with Harness(app) as run:
        await task.send()
        await run.run_to_end()
        (dead,) = await run.dead("try_to_publish_now")
    assert "use context.publish" in dead.error


async def test_a_handler_in_a_process_is_told_that_its_runner_stops(meeting: Meeting) -> None:
    app = Conveyor("t", broker="memory://", journal=True)
    task = app.task(cpu=True)(jobs.await_the_drain)
    async with app:
        async with app.running() as runner:
            ticket = await task.send(meeting.path)
            with await meeting.arrival() as line:
                line.send(b"goodbye")
                async with asyncio.timeout(60):
                    await runner.drain(60.0)
        assert runner.was_cut is False
        assert app.metrics.worker("await_the_drain").succeeded == 1
        assert ticket.id


def shadowed() -> str:
    return "the first one of this name"


first_of_this_name = shadowed


def shadowed() -> str:  # type: ignore[no-redef]  # people do this
    return "the second one"


async def test_a_handler_that_its_processes_would_not_find_is_refused_before_anything_runs() -> None:
    app = Conveyor("t")
    app.task(cpu=True)(first_of_this_name)
    with pytest.raises(HandlerError, match=r"test_attempt:shadowed .* what has it is another function; give it a name"):
        async with Harness(app):
            raise AssertionError("nothing may run")
    assert target_of(jobs.look) == "tests.runtime.jobs:look"
    assert target_of(app.task(jobs.scale).function) == "tests.runtime.jobs:scale"


PROGRAM = """
import asyncio
from conveyor import Conveyor, NO_RETRY

app = Conveyor("t", broker="memory://", journal=True)

@app.task(cpu=True, retry=NO_RETRY)
def double(number: int) -> int:
    return 2 * number

async def main():
    async with app.running():
        print(await (await double.send(4)).result(60))

"""
GUARDED = PROGRAM + 'if __name__ == "__main__":\n    asyncio.run(main())\n'
UNGUARDED = PROGRAM + "asyncio.run(main())\n"


def ran(*command: str, text: str = "", cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], input=text, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_program_without_a_file_cannot_have_handlers_in_processes_and_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(GUARDED)
    for done in (ran("program.py", cwd=tmp_path), ran("-m", "program", cwd=tmp_path)):
        assert (done.stdout, done.stderr, done.returncode) == ("8\n", "", 0)
    for done in (ran("-c", GUARDED, cwd=tmp_path), ran("-", text=GUARDED, cwd=tmp_path)):
        assert "handler __main__:double has cpu=True, but the program that defines it is no file" in done.stderr
        assert done.returncode == 1


def test_a_program_that_its_own_processes_would_run_again_is_told_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(UNGUARDED)
    done = ran("program.py", cwd=tmp_path)
    assert 'put what runs it below: if __name__ == "__main__":' in done.stderr
    assert "JobFailed" in done.stderr
    assert "a process died before it could run __main__:double: exit code 1" in done.stderr
    assert done.returncode == 1


async def test_what_cannot_be_handed_into_a_process_is_refused() -> None:
    app = Conveyor("t")
    with pytest.raises(
        HandlerError, match="'other' cannot be handed in; take the payload, the Message and the Context only"
    ):

        @app.worker(cpu=True)
        def wrong(picture: Picture, other: Conveyor) -> None: ...
