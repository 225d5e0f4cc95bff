"""The command line: its help, its demonstrations, its monitor, and what it says when it cannot do what it is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from examples.images.pictures import make_photographs
from tests.examples.beside import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.images", *arguments]
    env = {"PATH": "/usr/bin:/bin", "COLUMNS": "200", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=150)


def test_help_names_every_command_and_its_flags() -> None:
    said = run("--help").stdout
    for command in ("process", "demo", "bench", "add", "work", "monitor"):
        assert command in said
        assert run(command, "--help").returncode == 0
    for flag in ("--filters", "--processes", "--again", "--sheet", "$IMAGES_PROCESSES", "$CONVEYOR_BROKER"):
        assert flag in run("process", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["process", "nowhere", "out"], "there is no folder"),
        (["process", ".", "."], "another folder than the input"),
        (["process", "in", "out", "--filters", "blurr"], "there is no filter 'blurr'"),
        (["process", "in", "out", "--processes", "0"], "--processes cannot be '0'"),
        (["process", "in", "out", "--broker", "pigeon://loft"], "unknown broker scheme 'pigeon'"),
        (["demo", "--images", "in"], "there are no images in in"),
        (["work", "--broker", "pigeon://loft"], "unknown broker scheme 'pigeon'"),
    ],
)
def test_what_cannot_be_done_is_said_in_words(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "in").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "examples.images", *arguments],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_demonstration_makes_its_own_pictures_and_shows_what_was_done(tmp_path: Path) -> None:
    done = run("demo", "sequence", "--folder", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stderr
    assert "'completed': 3" in done.stdout
    assert len(list((tmp_path / "demo" / "pictures").iterdir())) == 3
    with Image.open(tmp_path / "demo" / "contact-sheet.png") as sheet:
        assert sheet.format == "PNG"


def test_the_demonstrations_take_pictures_of_ones_own(tmp_path: Path) -> None:
    make_photographs(tmp_path / "mine", 12, (90, 60))
    done = run("demo", "--images", str(tmp_path / "mine"), "--folder", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stderr
    for said in ("3 images in sequence", "3 at once", "12 images on 3 workers", "times as fast", "'completed': 12"):
        assert said in done.stdout
    assert len(list((tmp_path / "demo" / "async").iterdir())) == 6
    assert not (tmp_path / "demo" / "pictures").exists()


def test_the_benchmark_compares_numbers_of_processes() -> None:
    done = run("bench", "--images", "2", "--megapixels", "0.1")
    assert done.returncode == 0, done.stderr
    assert "1 process: 2 images in" in done.stdout
    assert "2 processes: 2 images in" in done.stdout


def test_the_monitor_shows_who_works_and_how_well(tmp_path: Path) -> None:
    make_photographs(tmp_path / "in", 3, (90, 60))
    url = f"sqlite:///{tmp_path / 'images.queue'}"
    assert run("add", str(tmp_path / "in"), str(tmp_path / "out"), "--broker", url).stdout.count("task-000") == 3
    with subprocess.Popen(
        [sys.executable, "-m", "examples.images", "monitor", "--broker", url, "--seconds", "8"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        text=True,
    ) as monitor:
        worked = run("work", "--broker", url, "--worker", "ann", "--until-empty", "--filters", "blur:1")
        assert worked.returncode == 0, worked.stderr
        assert "'tasks_completed': 3" in worked.stdout
        said = monitor.communicate(timeout=60)[0]
    assert "3 completed" in said
    assert len(list((tmp_path / "out").iterdir())) == 3
