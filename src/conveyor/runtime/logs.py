"""How log records are written: for people on a terminal, else one JSON object a line, each with its message's id."""

from __future__ import annotations

import json as jsonlib
import logging
import os
import re
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import msgspec


class Current(msgspec.Struct, frozen=True, gc=False):
    """The attempt that is being worked on.

    Parameters:
        attempt: 1 on the first run.
        carried: headers that go on to what the handler publishes and calls.
        fields: what the application wants in every line.
    """

    message_id: str
    correlation_id: str | None
    worker: str
    attempt: int
    carried: dict[str, str] | None = None
    fields: dict[str, str] | None = None

    def in_words(self) -> dict[str, Any]:
        """What a line says about the attempt."""
        said: dict[str, Any] = {
            "message_id": self.message_id,
            "correlation_id": self.correlation_id,
            "worker": self.worker,
            "attempt": self.attempt,
        }
        return {**self.fields, **said} if self.fields else said


current: ContextVar[Current | None] = ContextVar("conveyor_current", default=None)
"""What log records are about; set by the runner for each delivery, seen by whatever its handler calls."""


class Settings(msgspec.Struct, frozen=True):
    """What configure() was told; the processes of a pool are told the same."""

    level: int
    json: bool
    process: str
    stdout: bool = False

    def apply(self) -> None:
        """Log in this process as the settings say."""
        configure(self.level, self.json, process=self.process, stream=sys.stdout if self.stdout else None)


settings: Settings | None = None
"""How this process logs; None where the application set up logging by itself."""


def configure(
    level: int | str = logging.INFO,
    json: bool | None = None,
    *,
    process: str | None = None,
    stream: TextIO | None = None,
) -> None:
    """Set up logging for this process: everything at or above a level goes to a stream.

    What an earlier call set up is replaced; handlers that others gave to the root logger stay.

    Parameters:
        level: as logging knows it, or its name in any case.
        json: one JSON object a line; None decides for it wherever the stream is no terminal.
        process: this process' name among its siblings; its pid where None.
        stream: stderr where None.

    Raises:
        ValueError: logging knows no such level.
    """
    global settings  # noqa: PLW0603 - like the logging it describes, it is one for the process
    stream = stream or sys.stderr
    level = level.upper() if isinstance(level, str) else level
    json = not stream.isatty() if json is None else json
    handler = _Handler(stream)
    handler.setLevel(level)
    process = process or str(os.getpid())
    handler.setFormatter(
        JsonLines(process) if json else Human(process, colour=stream.isatty() and "NO_COLOR" not in os.environ)
    )
    root = logging.getLogger()
    for old in [known for known in root.handlers if isinstance(known, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    settings = Settings(handler.level, json, process, stream is sys.stdout)


class _Handler(logging.StreamHandler[TextIO]):
    """The handler that configure() installs, known by its type."""


class JsonLines(logging.Formatter):
    """One JSON object a line: ts (ISO 8601, UTC), level, logger, message, process, exc, Current, and extras.

    Plain ASCII: nothing in a message can end a line or steer a terminal.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": self._process,
        }
        if (about := current.get()) is not None:
            entry |= about.in_words()
        if text := _exception(record):
            entry["exc"] = text
        for name, value in _extras(record).items():
            entry.setdefault(name, value)
        try:
            return jsonlib.dumps(entry, default=_described, skipkeys=True)
        except (ValueError, RecursionError):  # an extra that contains itself, or too deep
            return jsonlib.dumps(
                {name: value if isinstance(value, int) else _described(value) for name, value in entry.items()}
            )


class Human(logging.Formatter):
    """Short, aligned lines for people; an entry's further lines are indented behind a bar."""

    COLOURS: Final = {
        logging.DEBUG: "\x1b[2m",
        logging.INFO: "\x1b[32m",
        logging.WARNING: "\x1b[33m",
        logging.ERROR: "\x1b[31m",
        logging.CRITICAL: "\x1b[1;31m",
    }
    DIM: Final = "\x1b[2m"
    PLAIN: Final = "\x1b[0m"

    def __init__(self, process: str, *, colour: bool) -> None:
        super().__init__()
        self._process = process
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        level = self._in(self.COLOURS.get(record.levelno, ""), f"{record.levelname:<8}")
        part = printable(record.name.removeprefix("conveyor."))
        first, *others = record.getMessage().splitlines() or [""]
        about: dict[str, Any] = {}
        if (now := current.get()) is not None:
            about = {"worker": now.worker, "message": now.message_id, "attempt": now.attempt}
            if now.correlation_id not in (None, now.message_id):
                about["correlation"] = now.correlation_id
            about |= now.fields or {}
        extras = _extras(record)
        trace = extras.pop(TRACEBACK, "")
        about |= extras
        details = "".join(f" {name}={_word(value)}" for name, value in about.items())
        head = f"{self._in(self.DIM, time)} {level} {self._process:>3} {part:<12} {printable(first)}"
        more = [*others, *_described(trace).splitlines(), *_exception(record).splitlines()]
        return "\n".join(
            [
                head + self._in(self.DIM, f" {details}" if details else ""),
                *(f"    │ {printable(line)}" for line in more),
            ]
        )

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{self.PLAIN}" if self._colour and text else text


STEERING: Final = re.compile(
    r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters, line separators, marks that reorder text (Unicode TR 36, bidirectional spoofing), surrogates."""


def printable(text: str) -> str:
    """A text that takes one line and steers no terminal: what would do either is written as an escape."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_KNOWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


TRACEBACK: Final = "traceback"
"""The extra that holds where an error was raised: lines of its own for people, and nothing where it is empty."""


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(record).items()
        if name not in _KNOWN and not (name == TRACEBACK and value == "")
    }


def _exception(record: logging.LogRecord) -> str:
    parts = [record.exc_text or ""]
    if not parts[0] and record.exc_info and record.exc_info[1] is not None:
        try:
            parts[0] = "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n")
        except Exception as broken:  # an exception whose text cannot be had must not cost the entry
            parts[0] = f"{type(record.exc_info[1]).__name__} (its traceback cannot be written: {type(broken).__name__})"
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(part for part in parts if part)


def _word(value: object) -> str:
    text = printable(value if isinstance(value, str) else _described(value))
    return text if text and " " not in text else jsonlib.dumps(text, ensure_ascii=False)


def _described(value: object) -> str:
    try:
        return str(value)
    except Exception as broken:  # an extra of anybody's type
        return f"({type(value).__name__} without a text: {type(broken).__name__})"
