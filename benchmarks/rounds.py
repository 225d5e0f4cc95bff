"""Rounds: every subject in turn, in a process of its own, on a fresh copy of its files or an emptied server; then all of them again."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final

from benchmarks.servers import emptied, make
from benchmarks.subject import Measurement, Subject
from benchmarks.table import MEASUREMENTS
from servers.rabbitmq import RabbitMQ
from servers.redis import Redis

ROOT: Final = Path(__file__).parent.parent
ENVIRONMENTS: Final = ROOT / ".venv-peers"
PATIENCE_SECONDS: Final = 600.0
PEER_PATIENCE_SECONDS: Final = 120.0
KEPT_LINES: Final = 20


@dataclass(slots=True)
class Result:
    """What a subject showed, round by round; or why a peer could not."""

    measurement: Measurement
    subject: Subject
    samples: dict[str, list[float]] = field(default_factory=dict)
    left_out: str = ""

    def median(self, figure: str) -> float:
        """The middle of all rounds."""
        return statistics.median(self.samples[figure])

    @property
    def settings(self) -> str:
        """Versions and settings, in one line; of a peer that was left out, why."""
        if self.left_out:
            return f"left out: {self.left_out}"
        versions = ", ".join(f"{name} {_version(self.subject, name)}" for name in self.subject.packages)
        return "; ".join(filter(None, (versions, self.subject.settings)))


class SubjectFailed(Exception):
    """A subject did not come to its end; the text says which, and what it said."""


class Rounds:
    """Runs measurements.

    Parameters:
        folder: where the files go; on the disk that is to be measured.
        scale: how much of the full load is carried.
        peers: whether those run that have environments of their own.
    """

    def __init__(self, measurements: Sequence[Measurement], folder: Path, scale: float, *, peers: bool = True) -> None:
        self._folder = folder
        self._scale = scale
        self._templates: dict[str, Path] = {}
        self._servers: dict[str, RabbitMQ | Redis] = {}
        self._running = contextlib.ExitStack()
        self.results = [Result(m, subject) for m in measurements for subject in m.subjects]
        for result in self.results:
            result.left_out = absence(result.subject, peers=peers)

    @property
    def versions(self) -> dict[str, str]:
        """Of the servers that were started."""
        return {server.NAME: server.version for server in self._servers.values()}

    def run(self, rounds: int, say: Callable[[str], None]) -> list[Result]:
        """Measure everything so many times; say is told what is measured next."""
        with self._running:
            for number in range(1, rounds + 1):
                for result in self.results:
                    say(f"round {number}: {result.measurement.name}, {result.subject.name}")
                    if not result.left_out:
                        self._take_sample(result)
        return self.results

    def _take_sample(self, result: Result) -> None:
        try:
            figures = self._measure_on_server(result) if result.measurement.server else self._measure(result)
        except SubjectFailed as failure:
            if result.subject.environment is None:
                raise
            first, *others = str(failure).splitlines()
            result.left_out = " ".join([first, *others[-1:]])
            result.samples.clear()
            return
        for figure, value in figures.items():
            result.samples.setdefault(figure, []).append(value)

    def _measure(self, result: Result) -> dict[str, float]:
        work = self._folder / "work"
        template = self._template(result)
        if template is None:
            work.mkdir()
        else:
            shutil.copytree(template, work)
            _sync(work)  # what was copied must not be written to the disk while the clock runs
        try:
            return _in_own_process("measure", result, str(work), self._scale)
        finally:
            shutil.rmtree(work)

    def _measure_on_server(self, result: Result) -> dict[str, float]:
        url = emptied(self._server(str(result.measurement.server)))
        if result.subject.fill is not None:
            _in_own_process("fill", result, url, self._scale)
        return _in_own_process("measure", result, url, self._scale)

    def _server(self, name: str) -> RabbitMQ | Redis:
        if name not in self._servers:
            folder = self._folder / name
            folder.mkdir()
            self._servers[name] = self._running.enter_context(contextlib.closing(make(name, folder)))
        return self._servers[name]

    def _template(self, result: Result) -> Path | None:
        """The filled files that this subject begins with, made once for all that begin alike."""
        fill, load = result.subject.fill, result.subject.load.scaled(self._scale)
        if fill is None:
            return None
        name = f"{fill.replace(':', '-')}-{load.ready}-{load.delayed}"
        if name not in self._templates:
            folder = self._folder / name
            folder.mkdir()
            _in_own_process("fill", result, str(folder), self._scale)
            self._templates[name] = folder
        return self._templates[name]


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def absence(subject: Subject, *, peers: bool) -> str:
    """Why a subject cannot run here; empty if it can."""
    if subject.environment is None:
        return ""
    if not peers:
        return "--no-peers"
    if not (ENVIRONMENTS / subject.environment / ".installed").exists():
        return f"{ENVIRONMENTS.name}/{subject.environment} is not set up; scripts/setup-peers does it, or says why it cannot"
    return ""


def _version(subject: Subject, package: str) -> str:
    """The version that is installed where the subject runs."""
    paths = [str(each) for each in (ENVIRONMENTS / (subject.environment or "")).glob("lib/python*/site-packages")]
    found = metadata.distributions(name=package, path=paths if subject.environment else sys.path)
    return next(iter(found)).version


def _in_own_process(what: str, result: Result, where: str, scale: float) -> dict[str, float]:
    subject = result.subject
    names = result.measurement.name, subject.name
    python = str(ENVIRONMENTS / subject.environment / "bin" / "python") if subject.environment else sys.executable
    patience = PEER_PATIENCE_SECONDS if subject.environment else PATIENCE_SECONDS
    command = [python, "-m", "benchmarks.rounds", what, *names, where, str(scale)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        raise SubjectFailed(f"{', '.join(names)}: to {what} it took longer than {patience:g} seconds") from None
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-KEPT_LINES:])
        raise SubjectFailed(f"{', '.join(names)}: to {what} it failed with exit code {done.returncode}:\n{last}")
    figures = json.loads(done.stdout)
    assert isinstance(figures, dict)
    return figures


def _find(measurement: str, subject: str) -> tuple[Measurement, Subject]:
    [found] = [(m, s) for m in MEASUREMENTS if m.name == measurement for s in m.subjects if s.name == subject]
    return found


def _work(what: str, measurement: str, subject: str, where: str, scale: str) -> dict[str, float]:
    """In the process of its own."""
    beside, found = _find(measurement, subject)
    module, _, name = str(found.measure if what == "measure" else found.fill).partition(":")
    function = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    return dict(function(where if beside.server else Path(where), found.load.scaled(float(scale))) or {})


def beside_first(results: Sequence[Result]) -> Iterator[tuple[Result, Result]]:
    """Every result with that of the first subject of its measurement."""
    first: dict[str, Result] = {}
    for result in results:
        yield result, first.setdefault(result.measurement.name, result)


if __name__ == "__main__":
    to_caller = os.dup(1)
    os.dup2(2, 1)  # what a subject prints is no figure
    shown = _work(*sys.argv[1:])
    with os.fdopen(to_caller, "w") as out:
        json.dump(shown, out)
    os._exit(0)  # what a peer does when it ends is not measured, and may take for ever
