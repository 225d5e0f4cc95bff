"""The machine that the figures are of: without these facts they mean little."""

from __future__ import annotations

import os
import platform
import statistics
import time
from pathlib import Path
from typing import Final

import apsw

WRITES: Final = 100
PAGE_BYTES: Final = 4096


def facts(folder: Path) -> dict[str, str]:
    """What tells one machine's figures from another's."""
    system = platform.uname()
    return {
        "processor": f"{_processor() or system.machine}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB",
        "system": f"{system.system} {system.release}",
        "disk": f"a page written and synced in {_sync_milliseconds(folder):.2f} ms",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "SQLite": apsw.sqlite_lib_version(),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def _processor() -> str | None:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return None


def _sync_milliseconds(folder: Path) -> float:
    """The median time that the disk takes to make one page durable: what a commit cannot undercut."""
    path, times = folder / "sync", []
    with path.open("wb", buffering=0) as file:
        for _ in range(WRITES):
            started = time.perf_counter()
            file.write(bytes(PAGE_BYTES))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - started)
    path.unlink()
    return statistics.median(times) * 1000
