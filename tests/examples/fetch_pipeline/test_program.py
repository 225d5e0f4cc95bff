"""The pipeline as a command: its help, its settings, what it says when it cannot work, and how it starts and ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from examples.fetch_pipeline.settings import Settings
from examples.settings import SettingError, from_environment
from tests.examples.beside import ROOT, Program, wait_for

if TYPE_CHECKING:
    from servers.postgres import Postgres
    from tests.examples.fetch_pipeline.conftest import StartPipeline


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.fetch_pipeline", *arguments]
    env = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_help_shows_every_setting_with_its_environment_variable() -> None:
    said = run("--help", COLUMNS="500").stdout
    for field in msgspec.structs.fields(Settings):
        assert ("--" + field.name.replace("_", "-") in said) == (field.name != "rabbitmq_password")
    for variable in ("RABBITMQ_HOST", "RABBITMQ_USER", "RABBITMQ_PASSWORD", "CONVEYOR_BROKER", "CONVEYOR_DATABASE"):
        assert f"${variable}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "99999"], "--port cannot be '99999'"),
        (["--fetch-timeout", "soon"], "--fetch-timeout cannot be 'soon'"),
        (["--only", "everything"], "--only cannot be 'everything'"),
        (["--broker", "pigeon://loft"], "unknown broker scheme 'pigeon'"),
        (["--broker", "memory://", "--database", "nonsense"], "this is no database URL"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_words(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run("--data", str(tmp_path), *arguments)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_rabbitmq_is_where_the_environment_says() -> None:
    found = from_environment(
        Settings,
        {"RABBITMQ_HOST": "a,b:5673", "RABBITMQ_USER": "u@x", "RABBITMQ_PASSWORD": "p/w", "RABBITMQ_VHOST": "jobs"},
    )
    assert found.broker_url == "amqp://u%40x:p%2Fw@a:5672,b:5673/jobs"
    assert from_environment(Settings, {}).broker_url == "amqp://guest:guest@localhost:5672/%2F"
    assert from_environment(Settings, {"CONVEYOR_BROKER": "memory://"}).broker_url == "memory://"
    with pytest.raises(SettingError, match="API_PORT cannot be 'x'"):
        from_environment(Settings, {"API_PORT": "x"})


def test_one_command_runs_all_of_it_and_ends_it_in_order(start_pipeline: StartPipeline) -> None:
    pipeline = start_pipeline(SOURCE_URL="")
    program = pipeline.start("all")
    wait_for(lambda: "fetch-pipeline is ready" in program.said(), program.said)
    pipeline.when(pipeline.post("berlin"), "completed")
    assert program.stop(signal.SIGINT) == 0
    assert "ended in order" in program.said()


def test_it_waits_for_a_rabbitmq_that_is_away_and_says_so(tmp_path: Path, free_port: int) -> None:
    environment = {"RABBITMQ_HOST": f"127.0.0.1:{free_port}", "PIPELINE_DATA": str(tmp_path)}
    program = Program(tmp_path, environment, "examples.fetch_pipeline", "--only", "api")
    try:
        program.until("waiting for the broker: cannot reach RabbitMQ")
        assert "Traceback" not in program.said()
    finally:
        program.kill_all()


def test_the_database_may_be_postgresql(start_pipeline: StartPipeline, postgres: Postgres) -> None:
    pipeline = start_pipeline("source", CONVEYOR_DATABASE=postgres.url("jobs"))
    for part in ("workers", "api"):
        pipeline.start(part)
    jobs = [pipeline.post("berlin~fail:1", days=1) for _ in range(10)]
    for job_id in jobs:
        job = pipeline.when(job_id, "completed")
        assert job["hops"][0]["attempts"] == 2
    assert len(pipeline.http.get("/jobs").json()["jobs"]) == 10
