"""A private server for tests, benchmarks and examples: on loopback, in a folder of its own; it dies with whoever started it."""

from __future__ import annotations

import abc
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

SERVER_START_SECONDS: Final = 60.0
"""A server that is not up by then will not come up, however crowded the machine."""
PORTS: Final = range(20_000, 32_000)
"""Below those that the kernel gives to outgoing connections, so that a port found free stays free until it is used."""


class ServerMissing(Exception):
    """A server's program is not on this machine, or does not come up; the text says what to do."""


_given: Final[set[int]] = set()


def find_free_port() -> int:
    """A TCP port of loopback that nobody listens on, and that this process was not given before."""
    for port in random.sample(PORTS, 100):
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise ServerMissing(f"none of a hundred ports of {PORTS} is free")


class Server(abc.ABC):
    """One server process, which may be stopped, killed, paused and started again: same port, same data.

    Parameters:
        folder: an empty folder that the server's user can reach.
    """

    NAME: str
    STOP: signal.Signals = signal.SIGTERM
    """Asks for an orderly end."""
    DEATH: str = "KILL"
    """What the kernel sends to the server when the process that started it dies, even by kill -9."""
    USER: str | None = None

    def __init__(self, folder: Path) -> None:
        self.port: Final = find_free_port()
        self.folder: Final = folder
        self._log = folder / "log"
        self._server: subprocess.Popen[bytes] | None = None
        # The kernel signals the death of the thread that started a process, so one thread lives just for this.
        self._starter = ThreadPoolExecutor(1, f"{self.NAME}-starter")

    @property
    def pid(self) -> int:
        """The process that serves."""
        assert self._server is not None, f"{self.NAME} is down"
        return self._server.pid

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it answers."""
        if self._server is not None and self._server.poll() is None:
            return
        self._server = server = self._serve()
        deadline = time.monotonic() + SERVER_START_SECONDS
        while not self._answers():
            if server.poll() is not None or time.monotonic() > deadline:
                raise ServerMissing(f"{self.NAME} does not start:\n{self._log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Shut the server down in order; its clients are disconnected."""
        server, self._server = self._server, None
        if server is not None:
            server.send_signal(signal.SIGCONT)
            server.send_signal(self.STOP)
            server.wait(SERVER_START_SECONDS)

    def restart(self) -> None:
        """Shut the server down in order, and start it again."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """Let the server crash. start(), restart() or url() brings it back."""
        server, self._server = self._server, None
        if server is not None:
            server.kill()
            server.wait()

    def pause(self) -> None:
        """Let the server fall silent: it keeps its connections, and does nothing until resume()."""
        assert self._server is not None, f"{self.NAME} is down"
        self._server.send_signal(signal.SIGSTOP)
        # Until every thread of it has stopped: a busy machine lets them answer a little longer.
        os.waitid(os.P_PID, self._server.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """End a pause."""
        assert self._server is not None, f"{self.NAME} is down"
        self._server.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop it for good."""
        self.stop()
        self._starter.shutdown()

    @abc.abstractmethod
    def _serve(self) -> subprocess.Popen[bytes]:
        """Start the process."""

    @abc.abstractmethod
    def _answers(self) -> bool:
        """Whether it is up by now."""

    def _spawn(self, *command: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a process that ends with this one."""
        return self._starter.submit(self._open, ["setpriv", "--pdeathsig", self.DEATH, *command], environment).result()

    def _open(self, command: Sequence[str | Path], environment: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                user=self.USER,
                group=self.USER,
                process_group=0,  # Ctrl-C is for whoever started it, and stops it in order
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _run(self, *command: str | Path, environment: Mapping[str, str] | None = None, said: str = "") -> str:
        """Run a program to its end; what it prints.

        Parameters:
            said: goes to its input.
        """
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            user=self.USER,
            group=self.USER,
            input=said,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stdout}{done.stderr}")
        return done.stdout
