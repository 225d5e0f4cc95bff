"""The programs that an example consists of, started and stopped together."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Final

DRAIN_SECONDS: Final = 45.0
"""What workers may need to finish what they hold, with some to spare."""


@contextlib.contextmanager
def running(*commands: Sequence[str]) -> Iterator[None]:
    """Have programs run (each the arguments of ``python -m``) while the block lasts; SIGTERM asks them to end, last started first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # whenever the web server is not the one who listens to it
    with contextlib.ExitStack() as stack:
        for command in commands:
            # In a session of its own: Ctrl-C reaches this process only, which asks each of them once.
            process = subprocess.Popen([sys.executable, "-m", *command], start_new_session=True)  # noqa: S603 - our own programs
            stack.callback(_stop, process)
        yield


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
