"""Runs the shop: ``python -m examples.orders``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Final

from examples.orders.settings import SETTINGS, SettingError, Settings, read, shown

WORKERS: Final = "examples.orders.app:app"
DRAIN_SECONDS: Final = 45.0
"""What the workers may need to finish what they hold, with some to spare."""


def parser() -> argparse.ArgumentParser:
    """A flag for every setting, with its environment variable beside it."""
    found = argparse.ArgumentParser(
        prog="python -m examples.orders",
        description="An online shop: a page, and the workers that carry its orders from creation to shipment.",
        epilog=f"""examples:
  python -m examples.orders                               everything in one process, on http://127.0.0.1:8000
  python -m examples.orders --processes 4                 the web process, and four processes of workers
  python -m examples.orders --web-only                    only the web process; the workers elsewhere, with
  conveyor run {WORKERS}            (set the same environment variables for it)
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = {field.name: field.default for field in fields(Settings)}
    for name, setting in SETTINGS.items():
        default = defaults[name]
        what = f"{setting.what} (${setting.variables[0]}"
        what += f"; default {default})" if str(default) not in ("", "False") else ")"
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            found.add_argument(flag, action="store_const", const="1", help=what)
        else:
            found.add_argument(flag, metavar=name.split("_")[-1].upper(), help=what)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the shop until it is told to stop; gives the exit code."""
    flags = {name: value for name, value in vars(parser().parse_args(arguments)).items() if value is not None}
    try:
        for name, value in flags.items():
            read("--" + name.replace("_", "-"), SETTINGS[name], value)
            os.environ[SETTINGS[name].variables[0]] = value  # where the web process and the workers look
        settings = Settings.from_environment()
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings.data.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # whenever the web server is not the one who listens to it

    from conveyor import ConveyorError
    from examples.orders.web import prepare

    try:
        asyncio.run(prepare())
    except ConveyorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"the shop's broker is {shown(settings.broker)}, its database {shown(settings.database)}",
        file=sys.stderr,
        flush=True,
    )
    with workers(0 if settings.web_only else settings.processes):
        serve(settings)
    return 0


def serve(settings: Settings) -> None:
    """Serve the page until SIGINT or SIGTERM."""
    import uvicorn

    from examples.orders.web import web

    uvicorn.run(
        web,
        host=settings.host,
        port=settings.port,
        access_log=False,
        ws_max_size=4096,  # bytes; a watcher has nothing to say
        timeout_graceful_shutdown=5,
    )


@contextlib.contextmanager
def workers(processes: int) -> Iterator[None]:
    """Have so many processes of workers running."""
    if processes == 0:
        yield
        return
    command = [sys.executable, "-m", "conveyor", "run", WORKERS, "--processes", str(processes)]
    # In a session of its own: Ctrl-C reaches this process only, which asks the supervisor once.
    with subprocess.Popen(command, start_new_session=True) as supervisor:  # noqa: S603 - our own program
        try:
            yield
        finally:
            supervisor.terminate()
            try:
                supervisor.wait(DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                supervisor.kill()


if __name__ == "__main__":
    sys.exit(main())
