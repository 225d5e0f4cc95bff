"""The programs of an example end with it, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.beside import ROOT, wait_for

PARENT = """
import signal
from examples.programs import running

with running(["slow"], ["slow"]):
    signal.pause()
"""
SLOW = """
import os, signal, sys, time

signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(0)))
with open("pids", "a") as file:
    print(os.getpid(), file=file)
time.sleep(600)
"""


@pytest.mark.parametrize("numbers", [[signal.SIGKILL], [signal.SIGTERM] * 20])
def test_no_program_is_left_behind(tmp_path: Path, numbers: list[signal.Signals]) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, env=environment)
    pids = tmp_path / "pids"
    wait_for(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2)
    children = [int(pid) for pid in pids.read_text().split()]
    for number in numbers:
        parent.send_signal(number)
    assert parent.wait(60) == (-signal.SIGKILL if numbers[0] == signal.SIGKILL else 0)
    wait_for(lambda: not any(is_running(pid) for pid in children))


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
