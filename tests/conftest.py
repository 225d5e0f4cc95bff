"""What all tests share: the rule that nothing is skipped, and the servers and the browser that they run against."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings

from servers.postgres import Postgres
from servers.rabbitmq import SMALL, RabbitMQ
from servers.redis import Redis
from servers.server import Server, find_free_port

ServerT = TypeVar("ServerT", bound=Server)

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


@pytest.fixture
def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    return find_free_port()


def _in_folder(name: str, make: Callable[[Path], ServerT]) -> Iterator[ServerT]:
    # Not pytest's own folder: that one is closed to the user that PostgreSQL runs as.
    folder = Path(tempfile.mkdtemp(prefix=f"conveyor-{name}-"))
    server = make(folder)
    try:
        yield server
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL cluster of this test process's own; isolate by `postgres.url()`, a new database each time."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda found: int(found.parent.name))
    if not installed:
        raise RuntimeError("PostgreSQL is not installed in /usr/lib/postgresql; run scripts/install-servers")
    yield from _in_folder("postgres", lambda folder: Postgres(folder, installed[-1]))


@pytest.fixture
def rabbitmq(one_rabbitmq: RabbitMQ) -> Iterator[RabbitMQ]:
    """A RabbitMQ node of this test process's own; isolate by `rabbitmq.url()`, a new virtual host each time, which goes with the test."""
    there = set(one_rabbitmq.hosts)
    yield one_rabbitmq
    one_rabbitmq.forget(one_rabbitmq.hosts - there)


@pytest.fixture(scope="session")
def one_rabbitmq() -> Iterator[RabbitMQ]:
    """The node behind all of them."""
    yield from _in_folder("rabbitmq", lambda folder: RabbitMQ(folder, SMALL))


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    """A Redis of this test process's own; isolate by `redis.url()`, a new namespace each time."""
    yield from _in_folder("redis", Redis)


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
