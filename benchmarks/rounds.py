"""Rounds: every subject in turn, in a process of its own and on a fresh copy of its files; then all of them again."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.subject import FIGURES, Measurement, Subject
from benchmarks.table import MEASUREMENTS

ROOT: Final = Path(__file__).parent.parent
PATIENCE_SECONDS: Final = 600.0
KEPT_LINES: Final = 20


@dataclass(frozen=True, slots=True)
class Result:
    """What a subject showed, round by round."""

    measurement: Measurement
    subject: Subject
    samples: dict[str, list[float]] = field(default_factory=dict)

    def median(self, figure: str) -> float:
        """The middle of all rounds."""
        return statistics.median(self.samples[figure])


class SubjectFailed(Exception):
    """A subject did not come to its end; the text says which, and what it said."""


class Rounds:
    """Runs measurements.

    Parameters:
        folder: where the files go; on the disk that is to be measured.
        scale: how much of the full load is carried.
    """

    def __init__(self, measurements: Sequence[Measurement], folder: Path, scale: float) -> None:
        self._folder = folder
        self._scale = scale
        self._templates: dict[str, Path] = {}
        self.results = [Result(m, subject) for m in measurements for subject in m.subjects]

    def run(self, rounds: int, say: Callable[[str], None]) -> list[Result]:
        """Measure everything so many times; say is told what is measured next."""
        for number in range(1, rounds + 1):
            for result in self.results:
                say(f"round {number}: {result.measurement.name}, {result.subject.name}")
                for figure, value in self._measure(result).items():
                    result.samples.setdefault(figure, []).append(value)
        return self.results

    def _measure(self, result: Result) -> dict[str, float]:
        work = self._folder / "work"
        template = self._template(result)
        if template is None:
            work.mkdir()
        else:
            shutil.copytree(template, work)
            _sync(work)  # what was copied must not be written to the disk while the clock runs
        try:
            return _in_own_process("measure", result, work, self._scale)
        finally:
            shutil.rmtree(work)

    def _template(self, result: Result) -> Path | None:
        """The filled files that this subject begins with, made once for all that begin alike."""
        fill, load = result.subject.fill, result.subject.load.scaled(self._scale)
        if fill is None:
            return None
        name = f"{fill.replace(':', '-')}-{load.ready}-{load.delayed}"
        if name not in self._templates:
            folder = self._folder / name
            folder.mkdir()
            _in_own_process("fill", result, folder, self._scale)
            self._templates[name] = folder
        return self._templates[name]


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _in_own_process(what: str, result: Result, folder: Path, scale: float) -> dict[str, float]:
    names = result.measurement.name, result.subject.name
    command = [sys.executable, "-m", "benchmarks.rounds", what, *names, str(folder), str(scale)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-KEPT_LINES:])
        raise SubjectFailed(f"{', '.join(names)}: to {what} it failed with exit code {done.returncode}:\n{last}")
    figures = json.loads(done.stdout)
    assert isinstance(figures, dict)
    return figures


def _find(measurement: str, subject: str) -> Subject:
    [found] = [s for m in MEASUREMENTS if m.name == measurement for s in m.subjects if s.name == subject]
    return found


def _work(what: str, measurement: str, subject: str, folder: str, scale: str) -> dict[str, float]:
    """In the process of its own."""
    found = _find(measurement, subject)
    module, _, name = str(found.measure if what == "measure" else found.fill).partition(":")
    function = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    return dict(function(Path(folder), found.load.scaled(float(scale))) or {})


def rows(results: Sequence[Result]) -> Iterator[tuple[Result, str, float, float]]:
    """Result, figure, its median, and the first subject's median: what a table shows, in the order of FIGURES."""
    first: dict[str, Result] = {}
    for result in results:
        beside = first.setdefault(result.measurement.name, result)
        for figure in FIGURES:
            if figure in result.samples:
                yield result, figure, result.median(figure), beside.median(figure)


if __name__ == "__main__":
    print(json.dumps(_work(*sys.argv[1:])))
