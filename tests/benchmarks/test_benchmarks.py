"""The benchmarks run, and show what they promise to; how fast anything was is nobody's business here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from benchmarks.subject import FIGURES, Goal, Load
from benchmarks.table import MEASUREMENTS

ROOT: Final = Path(__file__).parents[2]
LEAST: Final = ("--scale", "0.0005", "--rounds", "1")


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda each: each.name)
def test_each_measurement_runs_and_has_a_figure_for_every_goal(measurement: Any, tmp_path: Path) -> None:
    shown = json.loads(run(*LEAST, "--json", "--only", measurement.name, "--folder", str(tmp_path)))
    assert [each["subject"] for each in shown["results"]] == [each.name for each in measurement.subjects]
    for result, subject in zip(shown["results"], measurement.subjects, strict=True):
        assert result["samples"].keys() >= subject.goals.keys()
        assert result["samples"].keys() <= FIGURES.keys()
        assert all(len(values) == 1 and math.isfinite(values[0]) for values in result["samples"].values())
        assert all(value > 0 for values in result["samples"].values() for value in values)
    assert {"processor", "disk", "Python", "SQLite"} <= shown["machine"].keys()
    assert not list(tmp_path.iterdir()), "what was measured on is removed"


def test_the_table_is_shown_and_put_into_a_document(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("Before.\n<!-- figures -->\nold\n<!-- end of figures -->\nAfter.\n")
    shown = run(*LEAST, "--only", "import", "--write", str(document))
    written = document.read_text()
    for text in (shown, written):
        assert "import conveyor" in text
        assert "< 150" in text
        assert "processor: " in text
    assert written.startswith("Before.\n<!-- figures -->\n")
    assert written.endswith("<!-- end of figures -->\nAfter.\n")
    assert "old" not in written


def test_names_of_measurements_and_subjects_are_unique() -> None:
    names = [(m.name, subject.name) for m in MEASUREMENTS for subject in m.subjects]
    assert len(set(names)) == len(names)


def test_a_goal_is_met_or_missed() -> None:
    assert Goal(at_least=10).met(10, 99)
    assert not Goal(at_least=10).met(9, 99)
    assert Goal(at_most=10).met(10, 0)
    assert not Goal(at_most=10).met(11, 0)
    assert Goal(share=0.5).met(50, 100)
    assert not Goal(share=0.5).met(49, 100)


def test_a_smaller_load_keeps_its_shape() -> None:
    assert Load(100_000, ready=1_000_000, delayed=10_000).scaled(0.01) == Load(1_000, ready=10_000, delayed=100)
    assert Load(100_000).scaled(0.000001) == Load(5)
    assert Load(10, ready=10).scaled(0.000001).ready == 5
