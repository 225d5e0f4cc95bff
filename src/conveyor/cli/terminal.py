"""What commands print: data on stdout, words about it on stderr, and nothing in either that could steer a terminal."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from cyclopts import Parameter

from conveyor.config import masked
from conveyor.runtime.logs import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

OK: Final = 0
FAILED: Final = 1
"""It found problems, or could not do what was asked."""
USAGE: Final = 2
"""The command line or the configuration makes no sense."""
INTERRUPTED: Final = 130
"""128 + SIGINT, as shells report it."""

PIPE_COLUMNS: Final = 500
"""Tables in a pipe are for programs: not cut off at the 80 columns that nobody looks at."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Output:
    """How a command prints; every command has these flags.

    Parameters:
        json: Print JSON on stdout, for programs; words go to stderr.
        debug: Show the traceback of an error.
    """

    json: bool = False
    debug: bool = False

    def document(self, value: object) -> None:
        """Print one JSON document."""
        print(jsonlib.dumps(value, indent=2))

    def line(self, value: object) -> None:
        """Print one JSON document as one line of a stream."""
        print(jsonlib.dumps(value), flush=True)

    def say(self, text: str, style: str = "") -> None:
        """Print words that are the result; where JSON is the result, they go to stderr."""
        (errors() if self.json else out()).print(safe(text, style), soft_wrap=True)

    def note(self, text: str, style: str = "") -> None:
        """Print words beside the result."""
        errors().print(safe(text, style), soft_wrap=True)

    def progress(self) -> Progress:
        """A progress bar on stderr, for anything long; silent where nobody looks."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        return Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=errors(), transient=True, disable=not sys.stderr.isatty(),
        )  # fmt: skip


def out() -> Console:
    """The terminal or pipe of data, as it is now."""
    return _console(stderr=False)


def errors() -> Console:
    """The terminal or pipe of words, as it is now."""
    return _console(stderr=True)


def complain(text: str) -> None:
    """Say on stderr what went wrong."""
    console = errors()
    console.print(safe(masked(text), "red" if console.is_terminal else ""), soft_wrap=True)


def confirmed(question: str) -> bool:
    """Whether somebody at the terminal says yes."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, right: Sequence[str] = ()) -> Table:
    """A table of untrusted texts; the first column is never cut, those named in right hold numbers."""
    from rich import box  # slow
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for place, column in enumerate(columns):
        whole = place == 0 or column in right
        made.add_column(column, justify="right" if column in right else "left", no_wrap=whole, overflow="fold")
    for row in rows:
        made.add_row(*(safe(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def safe(text: str, style: str = "") -> Text:
    """A text for a terminal, never read as markup; line ends stay."""
    from rich.text import Text

    return Text("\n".join(printable(line) for line in text.split("\n")), style=style)


def shortened(text: str, columns: int) -> str:
    """A text on one line, cut to so many characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= columns else line[: columns - 1] + "…"


def payload_text(body: bytes) -> str:
    """A payload as text; bytes that are no UTF-8 are escaped."""
    return body.decode("utf-8", "backslashreplace")


def span(seconds: float | None) -> str:
    """A duration in words: 850 ms, 1.9 s, 12 s, 3 min 5 s, 2 h 5 min, 4 d 3 h; - for None."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    whole = round(seconds)
    for unit, size, smaller, less in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // less
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def moment(unix_seconds: float, timespec: str = "seconds") -> str:
    """A moment as ISO 8601 in UTC.

    Parameters:
        timespec: how exactly; see datetime.isoformat.
    """
    try:
        return datetime.fromtimestamp(unix_seconds, UTC).isoformat(timespec=timespec).replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):  # another program may have written anything there
        return str(unix_seconds)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream: Any = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_COLUMNS
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)
