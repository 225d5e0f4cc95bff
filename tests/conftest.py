"""What all tests share: the rule that nothing is skipped, and the servers and the browser that they run against."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, settings

SERVER_START_SECONDS: Final = 60.0
"""A server that is not up by then will not come up, however crowded the machine."""
PORTS: Final = range(20_000, 32_000)
"""Below those that the kernel gives to outgoing connections, so that a port found free stays free until it is used."""

# How long an example takes says nothing on a machine that several test processes share.
settings.register_profile("conveyor", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("conveyor")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, and a skipped test fails the run. {reason}"


def pytest_configure() -> None:
    """A shell starts what it puts into the background deaf to Ctrl-C, and its children inherit that; the tests' programs must hear."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skipped test fails the run, with its reason."""
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that skips itself fails the run, with its reason."""
    report = yield
    _refuse_skip(report)
    return report


def find_free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"none of a hundred ports of {PORTS} is free")


@pytest.fixture
def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    return find_free_port()


class Postgres:
    """A private PostgreSQL cluster on loopback; it dies with the test process.

    Parameters:
        folder: an empty folder that the server's user can reach.
        binaries: where initdb and postgres are.
    """

    def __init__(self, folder: Path, binaries: Path) -> None:
        self.port: Final = find_free_port()
        self._folder = folder
        self._binaries = binaries
        self._log = folder / "log"
        # initdb and postgres refuse to run as root.
        self._user = "postgres" if os.getuid() == 0 else None
        self._server: subprocess.Popen[bytes] | None = None
        self._starter = ThreadPoolExecutor(1, "postgres-starter")
        if self._user is not None:
            shutil.chown(folder, self._user)
        self._run("initdb", "--pgdata=data", "--username=conveyor", "--auth=trust", "--encoding=UTF8", "--no-sync")

    def url(self, database_name: str = "test") -> str:
        """Start the server if it is down; the SQLAlchemy URL of a new, empty database, its name beginning as asked."""
        self.start()
        name = f"{database_name}_{uuid.uuid4().hex[:12]}"
        self._run("createdb", "--host=127.0.0.1", f"--port={self.port}", "--username=conveyor", name)
        return f"postgresql+asyncpg://conveyor@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it answers."""
        if self._server is not None and self._server.poll() is None:
            return
        # The kernel signals the death of the thread that started the server, so one thread lives just for this.
        self._server = server = self._starter.submit(self._spawn).result()
        deadline = time.monotonic() + SERVER_START_SECONDS
        ready: list[str | Path] = [self._binaries / "pg_isready", "--quiet", "--host=127.0.0.1", f"--port={self.port}"]
        while subprocess.run(ready, check=False).returncode != 0:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start:\n{self._log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Shut the server down in order; its clients are disconnected."""
        server, self._server = self._server, None
        if server is not None:
            server.send_signal(signal.SIGINT)
            server.wait(SERVER_START_SECONDS)

    def restart(self) -> None:
        """Shut the server down in order, and start it again: same port, same data."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """Let the server crash: all its processes die at once. start(), restart() or url() brings it back."""
        server, self._server = self._server, None
        if server is None or server.poll() is not None:
            return
        server.send_signal(signal.SIGSTOP)  # so that it starts no process while we list them
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        handles = [os.pidfd_open(int(pid)) for pid in children]
        server.kill()
        server.wait()
        for handle in handles:  # what outlives the server would hold its shared memory, and bar the next start
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [])
            os.close(handle)

    def close(self) -> None:
        """Stop it for good."""
        self.stop()
        self._starter.shutdown()

    def _spawn(self) -> subprocess.Popen[bytes]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "32MB",
            "fsync": "off",  # no test takes the machine's power away, and a killed server loses nothing by it
        }
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        # SIGINT is PostgreSQL's fast shutdown; the kernel sends it even when this process is killed.
        server: list[str | Path] = [self._binaries / "postgres", "-D", self._folder / "data", *flags]
        command = ["setpriv", "--pdeathsig", "INT", *server]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self._folder,
                user=self._user,
                group=self._user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _run(self, program: str, *arguments: str) -> None:
        command: list[str | Path] = [self._binaries / program, *arguments]
        done = subprocess.run(
            command, cwd=self._folder, user=self._user, group=self._user, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed:\n{done.stdout}{done.stderr}")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL cluster of this test process's own; isolate by `postgres.url()`, a new database each time."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda found: int(found.parent.name))
    if not installed:
        raise RuntimeError("PostgreSQL is not installed in /usr/lib/postgresql; run scripts/install-servers")
    # Not pytest's own folder: that one is closed to the user that the server runs as.
    folder = Path(tempfile.mkdtemp(prefix="conveyor-postgres-"))
    server = Postgres(folder, installed[-1])
    try:
        yield server
    finally:
        server.close()
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Chromium:
    """The system's browser.

    Parameters:
        path: its executable.
        flags: run it without a screen, without a sandbox (which root cannot have), and without calls to the internet.
    """

    path: str
    flags: tuple[str, ...] = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    )


@pytest.fixture(scope="session")
def chromium() -> Chromium:
    """The Chromium that scripts/install-servers made sure of."""
    names = (os.environ.get("CONVEYOR_CHROMIUM", ""), "chromium", "google-chrome", "google-chrome-stable")
    found = [path for path in map(shutil.which, names) if path is not None]
    found += map(str, sorted(Path.home().glob(".cache/ms-playwright/chromium-*/chrome-linux*/chrome")))
    if not found:
        raise RuntimeError("there is no Chromium on this machine; run scripts/install-servers")
    return Chromium(found[0])
