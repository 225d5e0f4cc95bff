"""The command line: which commands there are, and how every one of them ends."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

from cyclopts import App, CycloptsError, Parameter

from conveyor.cli.terminal import FAILED, INTERRUPTED, OK, USAGE, complain
from conveyor.errors import ConfigurationError, ConveyorError, PayloadError

COMMANDS: Final = {
    "run": "Run an app's workers, supervised, until SIGTERM or Ctrl-C.",
    "check": "Look for mistakes in an app's wiring, without running it.",
    "graph": "Draw which events an app's workers receive and publish.",
    "publish": "Publish one message.",
    "queues": "Show what waits in a broker's queues, what is at work, what is dead.",
    "top": "Watch queues, runners and errors live, pause queues, retry dead letters.",
    "dead": "List, show, redrive or discard dead letters.",
    "move": "Move everything from one broker into another: queues, delayed messages, dead letters.",
    "outbox": "List, retry or discard events that the broker refuses to take out of an app's database.",
    "trace": "Show the journey of a message: every hop, every attempt, every error.",
    "jobs": "List jobs: where they are, how far, and how they ended.",
    "wait": "Wait for jobs, see how far they are, and have what they returned.",
    "journal": "Keep an app's journal, and nothing else.",
    "migrate": "Create or update Conveyor's tables in an app's database.",
    "doctor": "Prove on a broker of yours that it keeps Conveyor's promises.",
}
"""Name → what it is for. Each is a file of this folder, which is imported when its command is used."""

EXIT_CODES: Final = "Exit codes: 0 fine, 1 found problems or failed, 2 wrong usage, 130 interrupted"

EPILOGUE: Final = f"""Examples:
  conveyor run shop:app --processes 4
  conveyor check shop:app
  conveyor queues --broker sqlite:///shop.queue --watch
  conveyor dead redrive --queue shop.charge --dry-run

Settings come from conveyor.toml (or pyproject.toml, [tool.conveyor]), then from
variables such as CONVEYOR_BROKER, then from flags. Every command but top has
--json for programs, and every one --debug for tracebacks.

{EXIT_CODES}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters:
        arguments: what follows the program's name; None takes those of this process.

    Returns:
        The exit code.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(tokens)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (conveyor … | head). Nothing is left to say, and nowhere; do not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _run(tokens: list[str]) -> int:
    try:
        ended = _app()(tokens)
        return ended if isinstance(ended, int) else OK
    except CycloptsError as error:
        command = next((token for token in tokens if token in COMMANDS), None)
        complain(f"{error}\nSee: conveyor {command + ' ' if command else ''}--help")
        return USAGE
    except ConveyorError as error:
        if "--debug" in tokens:
            complain(traceback.format_exc())
        complain(str(error))
        return USAGE if isinstance(error, ConfigurationError | PayloadError) else FAILED
    except BrokenPipeError:
        raise
    except Exception as error:
        complain(traceback.format_exc())
        complain(f"This is a fault in Conveyor, or in code that it called: {type(error).__name__}: {error}")
        return FAILED


def _app() -> App:
    app = App(
        name="conveyor",
        help="Event-driven workers that lose nothing and repeat nothing.",
        help_format="plaintext",
        help_epilogue=EPILOGUE,
        version=_version,
        default_parameter=Parameter(negative=(), show_default=False),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        exit_on_error=False,
        print_error=False,
    )
    for place, (name, summary) in enumerate(COMMANDS.items()):
        app.command(f"conveyor.cli.{name}:command", name=name, help=summary, sort_key=place)
    return app


def _version() -> str:
    from importlib.metadata import version

    return f"conveyor {version('conveyor')}"
