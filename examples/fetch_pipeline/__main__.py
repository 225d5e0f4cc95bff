"""Runs the pipeline: ``python -m examples.fetch_pipeline``."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from examples.fetch_pipeline.settings import Settings
from examples.programs import running
from examples.settings import SettingError, from_flags, parser

WORKERS: Final = "examples.fetch_pipeline.app:app"
SOURCE: Final = ("examples.fetch_pipeline", "--only", "source")
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 5.0
FLAGS: Final = parser(
    Settings,
    "python -m examples.fetch_pipeline",
    "Jobs that pass from worker to worker through the queues of RabbitMQ, and an API that starts them and shows where they are.",
    f"""examples:
  python -m examples.fetch_pipeline                       the API on http://127.0.0.1:8000, the workers, a simulated source
  python -m examples.fetch_pipeline --only api            one part; then the others elsewhere:
  python -m examples.fetch_pipeline --only fetch --processes 2
  conveyor run {WORKERS} --workers processing,storage
  (the parts share the RABBITMQ_… variables, and the database)
""",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pipeline, or the part that is asked for, until it is told to stop; gives the exit code."""
    try:
        settings = from_flags(Settings, FLAGS, arguments)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(settings.data).mkdir(parents=True, exist_ok=True)
    if settings.only == "source":
        serve("examples.fetch_pipeline.source:source", "127.0.0.1", settings.source_port)
        return 0
    from conveyor import ConveyorError

    try:
        asyncio.run(prepare())
    except KeyboardInterrupt:
        return 130
    except ConveyorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if settings.only not in ("all", "api"):
        command = worker_command(settings.only, settings.processes)
        os.execv(sys.executable, [sys.executable, "-m", *command])  # noqa: S606 - this process becomes our own program
    programs: list[Sequence[str]] = []
    if settings.only == "all":
        programs += [] if settings.source_url else [SOURCE]
        programs += [worker_command("workers", settings.processes)]
    with running(*programs) as others:
        serve("examples.fetch_pipeline.web:web", settings.host, settings.port)
    return int(others.failed)


def worker_command(which: str, processes: int) -> list[str]:
    """What runs all workers, or one."""
    chosen = [] if which == "workers" else ["--workers", which]
    return ["conveyor", "run", WORKERS, "--processes", str(processes), *chosen]


async def prepare() -> None:
    """Wait for RabbitMQ, and create what is missing there and in the database.

    Raises:
        ConveyorError: waiting will not help; says what is wrong, and what to do.
    """
    from conveyor import BrokerUnavailable
    from examples.fetch_pipeline.app import app
    from examples.fetch_pipeline.tables import create_tables

    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            async with app:
                await create_tables(app)
                return
        except BrokerUnavailable as error:
            print(f"waiting for the broker: {error}", file=sys.stderr, flush=True)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def serve(what: str, host: str, port: int) -> None:
    """Serve a web application until SIGINT or SIGTERM."""
    import uvicorn

    uvicorn.run(what, host=host, port=port, access_log=False, timeout_graceful_shutdown=5)


if __name__ == "__main__":
    sys.exit(main())
