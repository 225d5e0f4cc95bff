"""What came of a folder, in numbers: bounded in size, however large the folder is."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any, Final

from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.images.files import Processed

SAMPLE: Final = 4_096
"""Durations of each step that are kept; the percentile is exact up to so many, and an estimate beyond."""
FAILURES: Final = 1_000
"""Failures that are kept with their reasons; beyond, they are counted."""
SHOWN: Final = 20
"""Failures that are printed."""
EXAMPLES: Final = 12
"""Images that are shown before and after."""


class StepTimes:
    """The durations of one step."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self._sample: list[float] = []
        self._dice = random.Random(0)

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self.seconds += seconds
        if len(self._sample) < SAMPLE:
            self._sample.append(seconds)
        elif (place := self._dice.randrange(self.count)) < SAMPLE:  # each of all is kept with the same chance
            self._sample[place] = seconds

    @property
    def mean(self) -> float:
        """Seconds."""
        return self.seconds / self.count if self.count else 0.0

    def percentile(self, share: float) -> float:
        """The seconds that this share of them does not exceed."""
        ordered = sorted(self._sample)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


class Failure(Struct, frozen=True):
    """An image that was given up, and why.

    Parameters:
        id: of its job, for ``conveyor trace``.
    """

    path: str
    reason: str
    id: str


class LeftOut(Struct):
    """What was left out for one reason: how much, and some of it."""

    count: int
    paths: list[str]


class Report:
    """What was done in one run of the command."""

    def __init__(self) -> None:
        self.processed = 0
        self.before = 0
        """Images that an earlier run had done."""
        self.failed = 0
        self.unseen = 0
        """Of those that were processed, the ones of whose steps nothing was heard."""
        self.repeated = 0
        """Images whose first attempt failed, and a later one succeeded."""
        self.left_out: dict[str, LeftOut] = {}
        """By reason."""
        self.pixels = 0
        self.seconds = 0.0
        self.interrupted = False
        self.steps: dict[str, StepTimes] = {}
        self.failures: list[Failure] = []
        self.examples: list[Path] = []
        """Some of the images that are done, as paths within the folder."""
        self._dice = random.Random(0)

    def add(self, path: Path, processed: Processed) -> None:
        """An image was processed."""
        self.processed += 1
        self.repeated += processed.attempt > 1
        self.pixels += processed.width * processed.height
        for step in processed.steps:
            self.steps.setdefault(step.name, StepTimes()).add(step.seconds)
        self._note_example(path)

    def add_before(self, path: Path) -> None:
        """An image had been done by an earlier run."""
        self.before += 1
        self._note_example(path)

    def add_unseen(self, path: Path, pixels: int) -> None:
        """An image was processed; how long that took was not heard any more."""
        self.processed += 1
        self.unseen += 1
        self.pixels += pixels
        self._note_example(path)

    def add_failure(self, path: Path, reason: str, id: str) -> None:
        """An image was given up."""
        self.failed += 1
        if len(self.failures) < FAILURES:
            self.failures.append(Failure(writable(str(path)), writable(reason), id))

    def add_left_out(self, path: Path, reason: str) -> None:
        """Something in the folder is nothing to process."""
        left_out = self.left_out.setdefault(reason, LeftOut(0, []))
        left_out.count += 1
        if len(left_out.paths) < SHOWN:
            left_out.paths.append(writable(str(path)))

    def _note_example(self, path: Path) -> None:
        if len(self.examples) < EXAMPLES:
            self.examples.append(path)
        elif (place := self._dice.randrange(self.processed + self.before)) < EXAMPLES:
            self.examples[place] = path

    def summary(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "processed": self.processed,
            "unseen": self.unseen,
            "before": self.before,
            "failed": self.failed,
            "repeated": self.repeated,
            "left_out": {reason: {"count": it.count, "paths": it.paths} for reason, it in self.left_out.items()},
            "interrupted": self.interrupted,
            "seconds": self.seconds,
            "megapixels": self.pixels / 1e6,
            "steps": {
                name: {
                    "count": times.count,
                    "mean": times.mean,
                    "p95": times.percentile(0.95),
                    "total": times.seconds,
                }
                for name, times in self.steps.items()
            },
            "failures": [
                {"path": failure.path, "reason": failure.reason, "id": failure.id} for failure in self.failures
            ],
        }

    def show(self, console: Console) -> None:
        """For people."""
        if self.steps:
            table = Table("step", title="time per step", title_justify="left")
            for column in ("count", "mean", "95 %", "total"):
                table.add_column(column, justify="right")
            for name, times in self.steps.items():
                p95 = times.percentile(0.95)
                table.add_row(
                    name,
                    str(times.count),
                    f"{times.mean * 1e3:.0f} ms",
                    f"{p95 * 1e3:.0f} ms",
                    f"{times.seconds:.1f} s",
                )
            console.print(table)
        rate = self.processed / self.seconds if self.seconds else 0.0
        whole = not console.is_terminal  # lines for programs are not broken
        console.print(
            f"{self.processed} processed in {self.seconds:.1f} s ({rate:.1f} images/s, {self.pixels / 1e6:.0f} megapixels)\n"
            f"{self.before} done before, {self.failed} failed, {self.repeated} not at the first attempt"
        )
        if self.unseen:
            console.print(
                f"how long {self.unseen} of the processed took was not heard: their steps are not in the table"
            )
        for reason, left_out in self.left_out.items():
            more = f" and {left_out.count - len(left_out.paths)} more" if left_out.count > len(left_out.paths) else ""
            console.print(f"  left out: {escape(', '.join(left_out.paths))}{more}: {escape(reason)}", soft_wrap=whole)
        for failure in self.failures[:SHOWN]:
            console.print(f"  [red]failed[/] {escape(failure.path)}: {escape(failure.reason)}", soft_wrap=whole)
            if failure.id:
                console.print(f"    id {failure.id}", soft_wrap=whole)
        if self.failed > SHOWN:
            console.print(f"  … and {self.failed - SHOWN} more failed (--json has the first {FAILURES:,})")


def writable(text: str) -> str:
    """A file's name may be no text at all: what no text has becomes question marks, what steers terminals is spelled out."""
    plain = text.encode("utf-8", "replace").decode()
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in plain)
