"""``conveyor run`` as the first process of a container: of a process namespace of its own, where nobody else reaps or hears signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

PATIENCE_SECONDS: Final = 60.0

APP: Final = """
import subprocess, time
from pathlib import Path
from conveyor import Conveyor

app = Conveyor("first", broker="sqlite:///first.queue")


@app.task
def leave_orphans() -> None:
    # Each is left by its parent at once, in a session of its own: nobody but the first process is there to reap it.
    for _ in range(5):
        subprocess.run(["sh", "-c", "setsid sh -c 'sleep 0.1; touch orphan-$$' & exit 0"], check=True)


@app.task
def take_long() -> None:
    Path("begun").touch()
    while not Path("go-on").exists():
        time.sleep(0.02)
    Path("done").touch()
"""
AWAY: Final = """
from conveyor.brokers.sqlite import SqliteBroker
from conveyor.errors import BrokerUnavailable
from first import app


async def open(self):
    raise BrokerUnavailable("it is away")


SqliteBroker.open = open
"""


def wait_for(what: Callable[[], object], why: str) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := what()):
        assert time.monotonic() < deadline, f"in vain: {why}"
        time.sleep(0.02)
    return found


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def state(pid: int) -> str:
    """R, S, Z …; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


class Container:
    """A process namespace whose first process is ``conveyor run``.

    Parameters:
        folder: holds the app.
    """

    def __init__(self, folder: Path, outside: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self.outside = outside
        self.first: int = wait_for(lambda: children(outside.pid), "it begins")[0]
        """The number that the first process has out here; in there it is 1."""

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def says(self, text: str) -> None:
        wait_for(lambda: text in self.said(), f"it says {text!r}")

    def stop(self) -> int:
        """What an orchestrator does: SIGTERM for the first process; its exit code."""
        os.kill(self.first, signal.SIGTERM)
        return self.outside.wait(PATIENCE_SECONDS)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CONVEYOR_")}


@contextmanager
def container(folder: Path, app: str) -> Iterator[Container]:
    unshare = shutil.which("unshare")
    assert unshare is not None, "there is no unshare (util-linux) on this machine"
    rights = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = [
        unshare,
        *rights,
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        sys.executable,
        "-m",
        "conveyor",
        "run",
        app,
    ]
    with (folder / "log").open("wb") as log:
        outside = subprocess.Popen(
            command, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield Container(folder, outside)
    finally:
        outside.kill()
        outside.wait()


def send(folder: Path, task: str) -> None:
    subprocess.run(
        [sys.executable, "-c", f"import first; first.{task}.send_sync()"],
        cwd=folder,
        env=environment(),
        check=True,
        timeout=PATIENCE_SECONDS,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "first.py").write_text(APP)
    (tmp_path / "away.py").write_text(AWAY)
    return tmp_path


def test_sigterm_drains_and_ends_with_0(folder: Path) -> None:
    with container(folder, "first:app") as box:
        box.says("first is ready")
        send(folder, "take_long")
        wait_for((folder / "begun").exists, "the work begins")
        os.kill(box.first, signal.SIGTERM)
        box.says("stopping: SIGTERM")
        (folder / "go-on").touch()
        assert box.outside.wait(PATIENCE_SECONDS) == 0, box.said()
    assert (folder / "done").exists()


def test_orphans_are_reaped(folder: Path) -> None:
    with container(folder, "first:app") as box:
        box.says("first is ready")
        assert Path(f"/proc/{box.first}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink()
        send(folder, "leave_orphans")
        wait_for(lambda: len(list(folder.glob("orphan-*"))) == 5, "the orphans come to their ends")
        wait_for(
            lambda: len(children(box.first)) == 1 and state(children(box.first)[0]) != "Z",
            "only the process that works is left",
        )
        assert box.stop() == 0, box.said()


def test_sigterm_ends_it_while_it_still_waits_for_its_broker(folder: Path) -> None:
    with container(folder, "away:app") as box:
        box.says("it is away; trying again in")
        assert box.stop() == 0, box.said()


def test_a_worker_that_is_killed_is_replaced(folder: Path) -> None:
    with container(folder, "first:app") as box:
        box.says("first is ready")
        (worker,) = children(box.first)
        os.kill(worker, signal.SIGKILL)
        wait_for(
            lambda: [pid for pid in children(box.first) if pid != worker and state(pid) != "Z"], "another one comes"
        )
        assert box.stop() == 0, box.said()
