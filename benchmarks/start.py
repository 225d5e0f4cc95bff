"""Start: how long `import conveyor` takes in a fresh interpreter."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.subject import Load

TIMED = "import time; start = time.perf_counter(); import {}; print((time.perf_counter() - start) * 1000)"


def _import(module: str, times: int) -> dict[str, float]:
    command = [sys.executable, "-c", TIMED.format(module)]
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=compiled).stdout
        for _ in range(times + 1)
    ]
    return {"import": statistics.median(map(float, outputs[1:]))}  # the first one compiled


def conveyor(_: Path, load: Load) -> Mapping[str, float]:
    """The median of several interpreters."""
    return _import("conveyor", load.messages)


def huey(_: Path, load: Load) -> Mapping[str, float]:
    """The same for the peer."""
    return _import("huey", load.messages)
