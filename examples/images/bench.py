"""How much faster more processes are: the command itself, on the same generated photographs, with each number of processes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from examples.images.pictures import photograph

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


def make_pictures(folder: Path, count: int, megapixels: float) -> None:
    """Make so many photographs of so many megapixels, those that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    height = round(math.sqrt(megapixels * MEGAPIXEL / ASPECT))
    with ProcessPoolExecutor() as pool:
        list(pool.map(_make, [(folder, number, (round(height * ASPECT), height)) for number in range(1, count + 1)]))


def measure(source: Path, target: Path, filters: str, processes: int) -> Measured:
    """Run the command, into an empty folder."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "examples.images", "process", str(source), str(target), "--filters", filters]
    done = subprocess.run(  # noqa: S603 - our own program
        [*command, "--processes", str(processes), "--json"], check=True, capture_output=True, text=True
    )
    report: dict[str, Any] = json.loads(done.stdout)
    shutil.rmtree(target)
    return Measured(processes, report["processed"], report["seconds"])


def compare(measured: Sequence[Measured]) -> list[str]:
    """The figures in words, each beside the first."""
    first = measured[0]
    return [
        f"{run.processes} process{'es' if run.processes > 1 else ''}: {run.images} images in {run.seconds:.1f} s, "
        f"{run.images / run.seconds:.2f} images/s, {first.seconds / run.seconds:.2f} times as fast as {first.processes}"
        for run in measured
    ]


def _make(what: tuple[Path, int, tuple[int, int]]) -> None:
    folder, number, size = what
    path = folder / f"photo-{number:04d}.jpg"
    if not path.exists():
        photograph(number, size).save(path, quality=90)
