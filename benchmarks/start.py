"""Start: how long `import conveyor` takes in a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.subject import Load

TIMED = "import time; start = time.perf_counter(); import {}; print((time.perf_counter() - start) * 1000)"


def _import(module: str, times: int) -> dict[str, float]:
    command = [sys.executable, "-c", TIMED.format(module)]
    took = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(times)]
    return {"import": statistics.median(took)}


def conveyor(_: Path, load: Load) -> Mapping[str, float]:
    """The median of several interpreters."""
    return _import("conveyor", load.messages)


def huey(_: Path, load: Load) -> Mapping[str, float]:
    """The same for the peer."""
    return _import("huey", load.messages)
