"""The benchmarks run, and show what they promise to; how fast anything was is nobody's business here."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from benchmarks.rounds import absence
from benchmarks.subject import FIGURES, Goal, Load, Subject
from benchmarks.table import MEASUREMENTS
from servers.rabbitmq import RabbitMQ
from servers.redis import Redis

ROOT: Final = Path(__file__).parents[2]
NAMES: Final = {"rabbitmq": RabbitMQ.NAME, "redis": Redis.NAME}
LEAST: Final = ("--scale", "0.0005", "--rounds", "1")


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda each: each.name)
def test_each_measurement_runs_and_has_a_figure_for_every_goal(measurement: Any, tmp_path: Path) -> None:
    shown = json.loads(run(*LEAST, "--no-peers", "--json", "--only", measurement.name, "--folder", str(tmp_path)))
    assert [each["subject"] for each in shown["results"]] == [each.name for each in measurement.subjects]
    for result, subject in zip(shown["results"], measurement.subjects, strict=True):
        if subject.environment is not None:  # nothing that these need is installed for tests
            assert result["left_out"] == "--no-peers"
            continue
        assert result["samples"].keys() >= subject.goals.keys()
        assert result["samples"].keys() <= FIGURES.keys()
        assert all(len(values) == 1 and math.isfinite(values[0]) for values in result["samples"].values())
        assert all(value > 0 for values in result["samples"].values() for value in values)
    assert {"processor", "disk", "Python", "SQLite"} <= shown["machine"].keys()
    if measurement.server is not None:
        assert NAMES[measurement.server] in shown["machine"]
    assert not list(tmp_path.iterdir()), "what was measured on is removed"


def test_a_peer_that_cannot_run_is_shown_with_the_reason(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("<!-- figures -->\n<!-- end of figures -->\n")
    shown = run(*LEAST, "--no-peers", "--only", "redis-consume", "--write", str(document))
    for text in (shown, document.read_text()):
        assert re.search(r"Repid .*left out, see below", text)
        assert "Repid: left out: --no-peers" in text
        assert "bare redis-py: redis " in text, "versions and settings are beside the figures"


@pytest.mark.parametrize(
    "peer", [s for m in MEASUREMENTS for s in m.subjects if s.environment], ids=lambda each: each.measure
)
def test_each_peer_has_an_environment_with_locked_versions_of_what_it_shows(peer: Subject) -> None:
    lock = (ROOT / "requirements" / "peers" / f"{peer.environment}.txt").read_text()
    assert peer.packages
    assert peer.settings
    for package in peer.packages:
        assert re.search(rf"^{package}==", lock, flags=re.MULTILINE), package


def test_without_its_environment_a_peer_says_how_to_get_one() -> None:
    peer = Subject("Peer", "peers.none:consume", Load(5), environment="nowhere")
    assert "scripts/setup-peers" in absence(peer, peers=True)
    assert absence(peer, peers=False) == "--no-peers"
    assert not absence(Subject("Conveyor", "consume:conveyor", Load(5)), peers=False)


def test_the_figures_are_shown_and_put_into_a_document(tmp_path: Path) -> None:
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
    assert "old" not in written.split()


def test_measuring_one_thing_anew_leaves_the_others_figures_in_the_document(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("<!-- figures -->\n<!-- end of figures -->\n")
    run(*LEAST, "--only", "hand-over", "--write", str(document))
    first = document.read_text()
    run(*LEAST, "--only", "import", "--write", str(document))
    both = document.read_text()
    [kept] = re.findall(r"### Hand a message.*?\n(?=\n###)", first, flags=re.DOTALL)
    assert kept in both
    assert "### import conveyor" in both
    assert both.count("### The machine and the last run") == 1
    document.write_text(both)
    run(*LEAST, "--only", "import", "--write", str(document))
    assert document.read_text().count("### import conveyor") == 1


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
    assert Goal(first_at_least=5).met(20, 100)
    assert not Goal(first_at_least=5).met(21, 100)
    assert Goal(first_at_most=1.5).met(2, 3)
    assert not Goal(first_at_most=1.5).met(2, 3.1)


def test_a_smaller_load_keeps_its_shape() -> None:
    assert Load(100_000, ready=1_000_000, delayed=10_000).scaled(0.01) == Load(1_000, ready=10_000, delayed=100)
    assert Load(100_000).scaled(0.000001) == Load(5)
    assert Load(10, ready=10).scaled(0.000001).ready == 5
