"""The programs that an example consists of, started and stopped together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Final

PR_SET_PDEATHSIG: Final = 1
DRAIN_SECONDS: Final = 45.0
"""What workers may need to finish what they hold, with some to spare."""


class Programs:
    """Programs beside this one; when one of them ends by itself, all end."""

    def __init__(self) -> None:
        self.failed = False
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> None:
        """Start one: the arguments of ``python -m``."""
        # In a session of its own: Ctrl-C reaches this process only, which asks each of them once. Whatever ends this one ends them.
        process = subprocess.Popen(  # noqa: S603 - our own programs
            [sys.executable, "-m", *command],
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - no threads are there yet
        )
        self._processes.append(process)

    def look(self, _signal: int, _frame: FrameType | None) -> None:
        """One of them has perhaps ended."""
        ended = [process for process in self._processes if process.poll() is not None]
        if ended and not self.failed:
            self.failed = True
            print(f"error: {' '.join(map(str, ended[0].args))} has ended by itself", file=sys.stderr, flush=True)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(self) -> None:
        """Ask them to end, the last one first; each has time to finish what it does."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a request that comes again must not leave some of them behind
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def running(*commands: Sequence[str]) -> Iterator[Programs]:
    """Have programs run while the block lasts."""
    signal.signal(signal.SIGTERM, _end)  # whenever the web server is not the one who listens to it
    programs = Programs()
    signal.signal(signal.SIGCHLD, programs.look)
    try:
        for command in commands:
            programs.start(*command)
        yield programs
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        programs.stop()


def _end(_signal: int, _frame: FrameType | None) -> None:
    """Leave the block, once: a second request would be raised in the midst of the stopping."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def _die_with_parent() -> None:
    """Let the kernel end this process with the one that started it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
