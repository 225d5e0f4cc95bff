"""The systemd unit: well formed, hardened, and in step with what the service promises."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.examples.order_processor.conftest import ROOT, StartService, wait_for

UNIT = ROOT / "examples" / "order_processor" / "order-processor.service"
MOST_EXPOSED = 25
"""Tenths, as systemd-analyze security counts: below that it says OK, and most services of a distribution are at 90 or more."""


def directives() -> dict[str, list[str]]:
    found = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[name].append(value)
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit as if the service were installed where it says."""
    text = UNIT.read_text().replace("/opt/order-processor/.venv/bin/python", sys.executable)
    environment = tmp_path / "order-processor.env"
    environment.touch()
    unit = tmp_path / UNIT.name
    unit.write_text(
        text.replace("/opt/order-processor", str(ROOT)).replace("/etc/order-processor.env", str(environment))
    )
    return unit


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    assert program is not None, "there is no systemd-analyze on this machine; run scripts/install-servers"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def test_systemd_finds_nothing_wrong_with_it(installed: Path) -> None:
    done = analyze("verify", "--man=no", installed)
    about_it = [line for line in (done.stdout + done.stderr).splitlines() if UNIT.stem in line]
    assert about_it == []
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_is_hardened(installed: Path) -> None:
    done = analyze("security", "--offline=yes", f"--threshold={MOST_EXPOSED}", "--no-pager", installed)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_always_comes_back_and_logs_to_the_journal() -> None:
    unit = directives()
    assert unit["Restart"] == ["always"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert unit["StandardOutput"] == unit["StandardError"] == ["journal"]
    assert unit["TimeoutStartSec"] == ["infinity"]  # RabbitMQ may be away for long


def test_systemd_waits_longer_than_the_service_takes_to_drain() -> None:
    unit = directives()
    grace = next(value for value in unit["Environment"] if value.startswith("CONVEYOR_GRACE_SECONDS="))
    assert float(unit["TimeoutStopSec"][0]) > float(grace.partition("=")[2]) + 10


def test_the_service_tells_systemd_when_it_is_ready_and_that_it_lives(
    make_service: StartService, tmp_path: Path
) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(str(address))
        line.settimeout(60)
        service = make_service(NOTIFY_SOCKET=str(address), WATCHDOG_USEC="60000000")
        service.start()
        told: set[bytes] = set()
        while not {b"READY=1", b"WATCHDOG=1"} <= told:
            told.add(line.recv(100))
        assert service.end() == 0
        wait_for(lambda: line.recv(100) == b"STOPPING=1", "it says that it stops")
