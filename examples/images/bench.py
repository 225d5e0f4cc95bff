"""How much faster more processes are: the command itself, on the same generated photographs, with each number of processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from examples.images.pictures import make_photograph

ASPECT: Final = 4 / 3
MEGAPIXEL: Final = 1_000_000


class Measured(Struct, frozen=True):
    """One run of the command.

    Parameters:
        seconds: from the first image to the last one, without the start of Python.
    """

    processes: int
    images: int
    seconds: float


def make_large_photographs(folder: Path, count: int, megapixels: float) -> None:
    """Make so many photographs of so many megapixels, on every core."""
    height = round(math.sqrt(megapixels * MEGAPIXEL / ASPECT))
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(make_photograph, folder, (round(height * ASPECT), height)), range(1, count + 1)))


def measure(source: Path, filters: str, processes: int) -> Measured:
    """Run the command, into an empty folder beside the images."""
    command = [sys.executable, "-m", "examples.images", "process", str(source), "--filters", filters]
    with tempfile.TemporaryDirectory(prefix="bench-", dir=source.parent) as target:
        done = subprocess.run(  # noqa: S603 - our own program
            [*command, target, "--processes", str(processes), "--json"], check=True, capture_output=True, text=True
        )
    report: dict[str, Any] = json.loads(done.stdout)
    return Measured(processes, report["processed"], report["seconds"])


def compare(measured: Sequence[Measured]) -> list[str]:
    """The figures in words, each beside the first."""
    first = measured[0]
    return [
        f"{run.processes} process{'es' if run.processes > 1 else ''}: {run.images} images in {run.seconds:.1f} s, "
        f"{run.images / run.seconds:.2f} images/s, {first.seconds / run.seconds:.2f} times as fast as {first.processes}"
        for run in measured
    ]
