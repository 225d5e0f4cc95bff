"""Runs the media worker: ``python -m examples.media_worker``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

from examples.media_worker.settings import Settings
from examples.programs import running
from examples.settings import SettingError, from_flags, parser

APP: Final = "examples.media_worker.app:app"
SERVICE: Final = ("examples.media_worker", "--only", "service")
FLAGS: Final = parser(
    Settings,
    "python -m examples.media_worker",
    "Processes users' files that messages on the queue media.process name, and tells a data service.",
    f"""examples:
  python -m examples.media_worker                              the worker, and a small data service
  python -m examples.media_worker --service-url http://data:80 the worker with a data service of your own
  python -m examples.media_worker --only service               only the small data service
  conveyor run {APP} --processes 4          only the worker (the same environment variables)
""",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker, the data service, or both, until told to stop; gives the exit code."""
    try:
        settings = from_flags(Settings, FLAGS, arguments)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if settings.only == "service":
        return serve(settings)
    settings.root.mkdir(parents=True, exist_ok=True)
    command = ["conveyor", "run", APP, "--processes", str(settings.processes)]
    if settings.only == "worker" or settings.service_url:
        os.execv(sys.executable, [sys.executable, "-m", *command])  # noqa: S606 - this process becomes our own program
    # The service was started first, so that it is there until the worker has drained.
    with running(SERVICE, command) as programs:
        try:
            signal.pause()
        except (KeyboardInterrupt, SystemExit):
            pass  # asked to stop
    return int(programs.failed)


def serve(settings: Settings) -> int:
    """Serve the small data service until SIGINT or SIGTERM."""
    import uvicorn

    os.environ["DATA_SERVICE_FILE"] = settings.service_data
    uvicorn.run("examples.media_worker.service:service", host="127.0.0.1", port=settings.service_port, access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
