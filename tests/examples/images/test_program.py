"""The command line: its help, its demonstrations, its monitor, and what it says when it cannot do what it is asked."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console, RenderableType

from examples.images.__main__ import QUEUES
from examples.images.demo import Timed, compared
from examples.images.display import PlainProgress, RunDisplay, Said, is_due, workers_table
from examples.images.files import HOST, Processed
from examples.images.folder import Run
from examples.images.pictures import make_photographs
from examples.images.registry import WorkerBeat, WorkerRegistry
from tests.examples.beside import ROOT
from tests.examples.images.odd import no_files


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


def test_help_says_the_exit_codes_and_each_command_its_log_level() -> None:
    said = run("--help").stdout
    for code in ("0  ", "1  ", "2  ", "130  "):
        assert f"\n  {code}" in said
    assert "default info" in run("work", "--help").stdout
    assert "default warning" in run("process", "--help").stdout


@pytest.mark.parametrize(
    ("before", "after", "logged"),
    [
        ([], [], True),
        ([], ["--log-level", "warning"], False),
        (["--log-level", "warning"], [], False),
        (["--log-level", "warning"], ["--log-level", "info"], True),
    ],
)
def test_work_logs_its_worker_and_tasks_unless_told_otherwise_on_either_side_of_the_command(
    tmp_path: Path, before: list[str], after: list[str], logged: bool
) -> None:
    make_photographs(tmp_path / "in", 1, (90, 60))
    url = f"sqlite:///{tmp_path / 'images.queue'}"
    (task_id, _) = run("add", str(tmp_path / "in"), str(tmp_path / "out"), "--broker", url).stdout.split()
    flags = ["--broker", url, "--worker", "ann", "--until-empty", "--filters", "blur:1"]
    done = run(*before, "work", *flags, *after)
    assert done.returncode == 0, done.stderr
    assert (f"[ann] [{task_id}] completed in" in done.stderr) == logged


def test_without_a_terminal_a_run_says_what_it_begins_and_how_far_it_is(tmp_path: Path) -> None:
    make_photographs(tmp_path / "in", 12, (900, 675))
    source, out = str(tmp_path / "in"), str(tmp_path / "out")
    done = run("process", source, out, "--filters", "blur:60,sharpen:3", "--processes", "1")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stderr.splitlines()
    assert first == f"12 images of {source} through blur:60,sharpen:3 to {out}, 1 at once"
    assert lines
    assert all(re.fullmatch(r"\d+ of 12 images", line) for line in lines), lines
    assert "of 12 images" not in done.stdout


@pytest.mark.parametrize(
    ("last", "now", "total", "due"),
    [
        (Said(0, 0.0), Said(0, 9.9), 100, False),
        (Said(0, 0.0), Said(0, 10.0), 100, True),  # it is alive
        (Said(0, 0.0), Said(9, 1.0), 100, False),
        (Said(0, 0.0), Said(10, 1.0), 100, True),
        (Said(10, 1.0), Said(19, 2.0), 100, False),
        (Said(0, 0.0), Said(1, 0.1), 3, True),
        (Said(0, 0.0), Said(0, 0.1), 0, False),
    ],
)
def test_progress_is_due_at_each_tenth_and_every_ten_seconds(last: Said, now: Said, total: int, due: bool) -> None:
    assert is_due(last, now, total) == due


def test_plain_progress_counts_the_failed_ones_and_repeats_itself_only_when_due() -> None:
    said: list[str] = []
    now = [0.0]
    plain, run_ = PlainProgress(said.append, clock=lambda: now[0]), Run(4)
    plain.look(run_)
    run_.report.add_failure(Path("a.jpg"), "broken", "1")
    for _ in range(3):
        plain.look(run_)
    now[0] = 10.0
    plain.look(run_)
    assert said == ["1 of 4 images, 1 failed"] * 2


def test_what_stays_on_a_broker_is_said_at_last_and_goes_as_it_is_said(tmp_path: Path) -> None:
    make_photographs(tmp_path / "in", 2, (90, 60))
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    url = f"sqlite:///{tmp_path / 'images.queue'}"
    source, out = str(tmp_path / "in"), str(tmp_path / "out")
    done = run("process", source, out, "--filters", "blur:1", "--processes", "1", "--broker", url)
    assert done.returncode == 1, done.stderr
    told = shlex.split(done.stdout.splitlines()[-1].partition("nobody uses them: ")[2].replace("URL", url))
    assert told[0] == "conveyor"

    def conveyor(*arguments: str) -> str:
        command = [sys.executable, "-m", "conveyor", *arguments]
        finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
        return finished.stdout + finished.stderr

    queues = ["queues", "--all", "--json", "--broker", url]
    assert all(queue in conveyor(*queues) for queue in QUEUES)
    assert "2 queues with 0 messages and 1 dead letter removed" in conveyor(*told[1:])
    assert not any(queue in conveyor(*queues) for queue in QUEUES)


def test_a_run_with_a_queue_of_its_own_says_nothing_of_brokers(tmp_path: Path) -> None:
    make_photographs(tmp_path / "in", 1, (90, 60))
    done = run("process", str(tmp_path / "in"), str(tmp_path / "out"), "--filters", "blur:1", "--processes", "1")
    assert done.returncode == 0, done.stderr
    assert "conveyor queues remove" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["process", "nowhere", "out"], "there is no folder"),
        (["process", ".", "."], "another folder than the input"),
        (["process", "in", "out", "--filters", "blurr"], "there is no filter 'blurr'"),
        (["process", "in", "out", "--processes", "0"], "--processes cannot be '0'"),
        (["process", "in", "out", "--broker", "pigeon://loft"], "unknown broker scheme 'pigeon'"),
        (["process", "in", "out", "--filters", ""], "'' lacks a filter; say some such as blur:3"),
        (["process", "in/within", "in"], "is within the output"),
        (["process", "in", "in.txt"], "in.txt is no folder"),
        (["work", "--broker", "memory://"], "memory:// ends with this process; name one that others reach"),
        (["process", "in", "out", "--sheet", "sheet.txt"], "its ending says no known format"),
        (["bench", "--filters", "blurr"], "there is no filter 'blurr'"),
        (["bench", "--processes", "1,0"], "argument --processes: it is a whole number from 1 on, not '0'"),
        (["add", "nowhere", "out", "--broker", "sqlite:///images.queue"], "there is no folder"),
        (["work", "--broker", "sqlite:///images.queue", "--filters", ","], "',' lacks a filter"),
        (["demo", "--images", "in"], "there are no images in in"),
        (["work", "--broker", ""], "argument --broker: '' names no broker"),
        (["work", "--broker", "pigeon://loft"], "unknown broker scheme 'pigeon'"),
    ],
)
def test_what_cannot_be_done_is_said_in_words(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "in" / "within").mkdir(parents=True)
    (tmp_path / "in.txt").touch()
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
    for said in ("3 images in sequence", "3 at once", "12 images on 3 workers", "times as fast", "cores busy"):
        assert said in done.stdout
    assert "'completed': 12" in done.stdout
    assert len(list((tmp_path / "demo" / "async").iterdir())) == 6
    assert not (tmp_path / "demo" / "pictures").exists()


@pytest.mark.parametrize(
    ("alone", "together", "cores", "said"),
    [
        (Timed(4.0, 4.0), Timed(2.0, 4.0), 2, "2.00 times as fast\n  one kept 1.0 of 2 cores busy, 3 kept 2.0: they"),
        (Timed(4.0, 4.0), Timed(2.0, 4.0), 2, "computed at the same time, because Pillow lets go of Python's lock"),
        (Timed(4.0, 2.0), Timed(2.0, 2.0), 2, "hardly at the same time; but other programs use the cores"),
        (Timed(4.0, 4.0), Timed(4.0, 4.0), 1, "there is one core, so they took turns"),
        (Timed(4.0, 4.0), Timed(3.9, 4.0), 2, "hardly at the same time: the cores were not theirs"),
        (Timed(4.0, 4.0), Timed(3.9, 7.6), 2, "it took 7.6 s of computing instead of 4.0: they were held up"),
    ],
)
def test_the_speed_up_is_explained_by_what_was_measured(alone: Timed, together: Timed, cores: int, said: str) -> None:
    assert said in compared(alone, together, cores)


def test_the_benchmark_compares_numbers_of_processes_and_keeps_the_photographs_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = run("bench", "--images", "2", "--megapixels", "1", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "1 process: 2 images in" in done.stdout
    assert "2 processes: 2 images in" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photographs"]


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
    assert "stopped" in said
    assert said.endswith("total\n")
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_worker_that_is_told_to_stop_again_and_again_stops(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'images.queue'}"
    with subprocess.Popen(
        [sys.executable, "-m", "examples.images", "--log-level", "info", "work", "--broker", url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stderr is not None
        while "running" not in worker.stderr.readline():
            assert worker.poll() is None
        for _ in range(50):
            worker.send_signal(signal.SIGTERM)
            worker.send_signal(signal.SIGINT)
        said, _ = worker.communicate(timeout=60)
    assert worker.returncode == 0
    assert "'tasks_completed': 0" in said


def lines_of(what: RenderableType, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(what)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_monitor_gives_a_worker_one_line_of_eighty_columns() -> None:
    registry = WorkerRegistry()
    tasks = tuple(f"task-{number:04d}-3f9ac2" for number in range(3))
    process = "a-machine-with-a-long-name.example:123456:3f9ac2"
    registry.heard(WorkerBeat("a-worker-with-a-long-name", process, True, 123_456, 1_234, tasks, 1000.0))
    registry.heard(WorkerBeat("ann", "host:7:3f9ac2", True, 3, 0, ("task-0001",), 2.0))
    registry.heard(WorkerBeat("bob", "host:8:3f9ac2", running=False))
    title, *rows = lines_of(workers_table(registry))
    assert title.split() == ["worker", "process", "health", "done", "failed", "rate", "heard", "at", "work", "on"]
    assert len(rows) == 3
    assert all(len(row) <= 80 for row in rows)
    for said in ("running", "123456", "1234", "124.69/s", "0 s ago"):
        assert said in rows[0]
    for said in ("ann", "host:7", "running", "1.50/s"):
        assert said in rows[1]
    wide = lines_of(workers_table(registry), 200)
    assert all(task in wide[1] for task in tasks)


def test_the_monitor_says_that_it_heard_of_no_worker() -> None:
    (line,) = lines_of(workers_table(WorkerRegistry()))
    assert line.startswith("no worker was heard of yet")


def test_the_monitor_shows_a_worker_as_stopped_for_an_hour() -> None:
    now = [0.0]
    registry = WorkerRegistry(clock=lambda: now[0])
    registry.heard(WorkerBeat("ann", "vm:1:a", running=False, completed=3))
    now[0] = 3_600.0
    assert "stopped" in lines_of(workers_table(registry))[1]
    now[0] = 3_601.0
    registry.heard(WorkerBeat("bob", "vm:2:b", running=True, completed=0))
    assert [status.beat.worker_id for status in registry.workers()] == ["bob"]


def test_the_progress_of_a_folder_fits_into_eighty_columns() -> None:
    run, display = Run(20_000), RunDisplay()
    display.watch(run)
    for number in range(2):
        run.note(Path("a.jpg"), Processed("a.jpg", "b.jpg", 10, 10, (), 0.1, os.getpid() + number))
    for _ in range(1_234):
        run.report.add_failure(Path("b.jpg"), "broken", "")
    bar, head, *processes, last = lines_of(display)
    assert "1236/20000" in bar
    assert "1234 failed" in bar
    assert head.split()[:2] == ["process", "health"]
    assert (len(processes), last) == (2, "")
    run.stopping = True
    assert lines_of(display)[-1] == "finishing the images in hand; Ctrl-C again leaves them to the next run"


def test_a_process_is_said_to_have_ended_only_where_that_can_be_seen() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run, display = Run(10), RunDisplay()
    display.watch(run)
    for host in (HOST, "elsewhere"):
        run.note(Path("a.jpg"), Processed("a.jpg", "b.jpg", 10, 10, (), 0.1, gone.pid, host))
    run.note(Path("a.jpg"), Processed("a.jpg", "b.jpg", 10, 10, (), 0.1, os.getpid(), HOST))
    shown = {row.split()[0]: row.split()[1] for row in lines_of(display)[2:] if row}
    assert shown == {str(gone.pid): "ended", f"elsewhere:{gone.pid}": "running", str(os.getpid()): "running"}


def test_adding_a_folder_names_what_is_not_added(tmp_path: Path) -> None:
    make_photographs(tmp_path / "in" / "within", 2, (90, 60))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    reasons = no_files(tmp_path / "in")
    done = run("add", str(tmp_path / "in"), str(tmp_path / "out"), "--broker", f"sqlite:///{tmp_path / 'images.queue'}")
    assert done.returncode == 1
    assert done.stdout.count("task-000") == 2
    assert "notes.txt: no image by its ending" in done.stderr
    for name in ("pipe.jpg", "nothing.jpg", "socket.jpg"):
        assert f"{name} {reasons[name]}" in done.stderr
