"""A log line says what happened to which message, whatever the message holds."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor.runtime import logs
from conveyor.runtime.logs import Current, configure, current


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, known = root.handlers[:], root.level, logs.settings
    yield
    root.handlers[:], root.level, logs.settings = handlers, level, known
    logging.captureWarnings(False)


def record(text: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("conveyor.runner", logging.WARNING, __file__, 1, text, args, None)
    vars(made).update(extra)
    return made


def broken() -> logging.LogRecord:
    made = record("it failed")
    try:
        raise ValueError("bad\n00:00:00.000 INFO     1 runner forged\x1b[2J")
    except ValueError:
        made.exc_info = sys.exc_info()
    return made


def entry(made: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(logs.JsonLines("2").format(made))
    return found


def test_a_line_names_the_message_the_worker_and_the_attempt() -> None:
    stream = io.StringIO()
    configure("info", stream=stream, process="2")
    token = current.set(Current("m-1", "c-1", "charge", 3))
    logging.getLogger("conveyor.runner").warning("hello %s", "you", extra={"seconds": 1.5})
    current.reset(token)
    found = json.loads(stream.getvalue())
    assert found.pop("ts").endswith("Z")
    assert found == {
        "level": "warning",
        "logger": "conveyor.runner",
        "message": "hello you",
        "process": "2",
        "message_id": "m-1",
        "correlation_id": "c-1",
        "worker": "charge",
        "attempt": 3,
        "seconds": 1.5,
    }


async def test_concurrent_handlers_do_not_see_each_others_message() -> None:
    stream = io.StringIO()
    configure(logging.INFO, json=True, stream=stream)
    meeting = asyncio.Barrier(2)

    async def handle(id: str) -> None:
        current.set(Current(id, None, "charge", 1))
        await meeting.wait()
        await asyncio.to_thread(logging.getLogger("shop").info, id)

    await asyncio.gather(handle("a"), handle("b"))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert sorted((line["message"], line["message_id"]) for line in lines) == [("a", "a"), ("b", "b")]


@given(st.text(st.characters(codec=None, categories=None)))
def test_no_text_can_forge_a_line(text: str) -> None:
    assert "\n" not in logs.JsonLines("1").format(record("%s", text, detail=text))
    assert entry(record("%s", text))["message"] == text
    first, *others = logs.Human("1", colour=False).format(record("%s", text, detail=text)).split("\n")
    assert "WARNING" in first
    assert all(line.startswith("    │ ") for line in others)
    assert not any(logs.STEERING.search(line) for line in (first, *others))


def test_an_error_stays_inside_its_entry() -> None:
    assert "ValueError: bad\n00:00" in entry(broken())["exc"]
    lines = logs.Human("1", colour=False).format(broken()).split("\n")
    assert all(line.startswith("    │ ") for line in lines[1:])
    assert "\\x1b[2J" in lines[-1]


def test_a_traceback_has_lines_of_its_own_and_an_empty_one_none() -> None:
    human = logs.Human("1", colour=False)
    first, *others = human.format(
        record("gone", traceback="Traceback:\n  File x\x1b[2J\nValueError: no\n", queue="q")
    ).split("\n")
    assert first.endswith("gone  queue=q")
    assert others == ["    │ Traceback:", "    │   File x\\x1b[2J", "    │ ValueError: no"]
    assert "traceback" not in human.format(record("gone", traceback=""))
    assert "traceback" not in entry(record("gone", traceback=""))
    assert entry(record("gone", traceback="a\nb"))["traceback"] == "a\nb"


def test_a_value_that_has_no_text_does_not_cost_the_entry() -> None:
    class Rude:
        def __str__(self) -> str:
            raise RuntimeError("no")

    itself: list[object] = []
    itself.append(itself)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert entry(record("x", rude=Rude()))["rude"] == "(Rude without a text: RuntimeError)"
    assert entry(record("x", itself=itself))["message"] == "x"
    assert entry(record("x", deep=deep))["message"] == "x"
    assert "x" in logs.Human("1", colour=False).format(record("x", rude=Rude(), itself=itself, deep=deep))
    del deep[:]


def test_an_extra_cannot_pass_for_a_field() -> None:
    assert entry(record("x", level="forged", logger="forged"))["level"] == "warning"


def test_a_terminal_gets_short_coloured_lines_and_a_pipe_gets_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, pipe = Terminal(), io.StringIO()
    configure(stream=terminal, process="1")
    logging.getLogger("conveyor.runner").info("up")
    configure(stream=pipe, process="1")
    logging.getLogger("conveyor.runner").info("up")
    assert "\x1b[32m" in terminal.getvalue()
    assert len(terminal.getvalue().splitlines()) == 1
    assert json.loads(pipe.getvalue())["message"] == "up"


def test_colour_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    configure(stream=terminal)
    logging.getLogger("shop").info("up")
    assert "\x1b" not in terminal.getvalue()


def test_the_level_holds_for_every_logger() -> None:
    stream = io.StringIO()
    configure("warning", stream=stream)
    logging.getLogger("shop").info("quiet")
    logging.getLogger("shop").error("loud")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["loud"]
    with pytest.raises(ValueError, match="LOUDER"):
        configure("louder", stream=stream)


def test_a_settings_value_tells_another_process_how_to_log() -> None:
    configure("debug", json=True, process="3", stream=sys.stdout)
    assert logs.settings == logs.Settings(logging.DEBUG, True, "3", stdout=True)
    logs.settings.apply()
    assert logs.settings == logs.Settings(logging.DEBUG, True, "3", stdout=True)
