"""The media worker as a command: its help, its settings, and what it says when they cannot work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from examples.media_worker.settings import Settings
from examples.settings import from_environment
from tests.examples.beside import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.media_worker", *arguments]
    env = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_help_shows_every_setting_with_its_environment_variable() -> None:
    said = run("--help", COLUMNS="500").stdout
    for field in msgspec.structs.fields(Settings):
        assert "--" + field.name.replace("_", "-") in said
    for variable in (
        "CONVEYOR_BROKER",
        "MEDIA_ROOT",
        "DATA_SERVICE_URL",
        "DATA_SERVICE_TIMEOUT",
        "DATA_SERVICE_RETRIES",
    ):
        assert f"${variable}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--service-timeout", "0"], "--service-timeout cannot be '0'"),
        (["--thumbnails", "big"], "--thumbnails cannot be 'big'"),
        (["--only", "worker", "--broker", "pigeon://loft"], "unknown broker scheme 'pigeon'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_words(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run("--media", str(tmp_path), *arguments)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    found = from_environment(
        Settings, {"MEDIA_ROOT": str(tmp_path), "MEDIA_THUMBNAILS": "300,50,300", "DATA_SERVICE_URL": "http://data"}
    )
    assert found.sizes == [50, 300]
    assert found.service == "http://data"
    assert found.output_folder == tmp_path / "processed"
