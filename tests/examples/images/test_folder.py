"""Processing a folder: every image once, whatever is killed or interrupted, and bad ones only for themselves."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples.images import __main__
from examples.images import folder as images_folder
from examples.images.app import Images, make_app, recipe_by_now
from examples.images.files import LARGEST_PIXELS, TEMPORARY, pixels_of
from examples.images.folder import AHEAD, JOURNAL, RECIPE, STATE, FolderError, Found, Run, no_room, process_folder, walk
from examples.images.pictures import make_photographs
from examples.images.report import Report, StepTimes
from examples.images.settings import Settings
from tests.examples.beside import Program, wait_for
from tests.examples.images.odd import HANDLED, REFUSED, no_files, write

ONE = Settings(processes=1)
SLOW = "blur:60,sharpen:3"
"""Slow enough that one can interfere."""


class Folder:
    """A folder of images, the command that processes it, and what comes out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source, self.out = path / "in", path / "out"
        self.programs: list[Program] = []

    def start(self, *flags: str, filters: str = SLOW, processes: int = 2) -> Program:
        command = ["examples.images", "process", str(self.source), str(self.out), "--filters", filters, "--json"]
        program = Program(self.path, {}, *command, "--processes", str(processes), *flags)
        self.programs.append(program)
        return program

    def run(self, *flags: str, filters: str = SLOW) -> tuple[int, dict[str, Any]]:
        """Run the command to its end: exit code and report."""
        program = self.start(*flags, filters=filters)
        code = program.process.wait(150)
        return code, self.report(program)

    @staticmethod
    def report(program: Program) -> dict[str, Any]:
        said = program.said()
        assert "{" in said, said
        report: dict[str, Any] = json.JSONDecoder().raw_decode(said[said.index("{\n") :])[0]
        return report

    def made(self) -> dict[str, Path]:
        """The images that are there, each of which can be read to its end."""
        found = {}
        for path in self.out.rglob("*"):
            if path.is_file() and STATE not in path.parts and not path.name.startswith(TEMPORARY):
                with Image.open(path) as image:
                    image.load()
                found[str(path.relative_to(self.out))] = path
        found.pop("contact-sheet.png", None)
        return found

    def half_written(self) -> list[Path]:
        return [path for path in self.out.rglob(f"{TEMPORARY}*") if path.name != STATE]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """With a dozen photographs in it, some of them in a folder within."""
    found = Folder(tmp_path)
    make_photographs(found.source, 8, (900, 675))
    make_photographs(found.source / "within", 4, (900, 675))
    yield found
    for program in found.programs:
        program.close()


def wait_for_some(folder: Folder, program: Program, number: int) -> None:
    wait_for(lambda: (folder.out.exists() and len(folder.made()) >= number) or None, program.said)


def progressed(folder: Folder, made: int, ended: Callable[[], bool]) -> bool:
    return ended() or len(folder.made()) > made


def pool(program: Program) -> list[int]:
    """The processes that do the work."""
    return [pid for pid in program.children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def almost_full(path: Path) -> os.statvfs_result:
    """A disk with room for a queue, and not for a journal."""
    block, free = 4096, 100 * 2**20 // 4096
    return os.statvfs_result((block, block, 2**24, free, free, 10**6, 10**6, 10**6, 0, 255))


def nothing_free(disk: os.statvfs_result) -> os.statvfs_result:
    return os.statvfs_result((*disk[:3], 0, 0, *disk[5:]))


def peak_megabytes(program: Program) -> dict[str, float]:
    """The most memory that was resident in the program until its end, and in any process of its pool."""
    peaks = {"main": 0.0, "pool": 0.0}
    while program.process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            for name, pids in {"main": [program.process.pid], "pool": pool(program)}.items():
                for pid in pids:
                    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
                    peaks[name] = max(peaks[name], int(found[1]) / 1024 if found else 0.0)
        time.sleep(0.02)
    return peaks


def test_every_image_is_processed_and_reported_and_looked_at(folder: Folder) -> None:
    code, report = folder.run(filters="blur:2,brightness:1.2")
    assert code == 0
    assert (report["processed"], report["failed"], report["left_out"]) == (12, 0, {})
    assert list(report["steps"]) == ["load", "blur", "brightness", "save"]
    for step in report["steps"].values():
        assert step["count"] == 12
        assert 0 < step["mean"] < step["p95"]  # of a dozen, the slowest one
        assert step["total"] == pytest.approx(step["count"] * step["mean"])
    # Two processes have no more time than that.
    assert sum(step["total"] for step in report["steps"].values()) < 2 * report["seconds"]
    assert len(folder.made()) == 12
    with Image.open(folder.out / "contact-sheet.png") as sheet:
        assert sheet.size[0] > 1000


def test_what_is_done_is_not_done_again_unless_its_original_is_newer(folder: Folder) -> None:
    assert folder.run(filters="blur:1")[1]["processed"] == 12
    before = {name: path.stat().st_mtime_ns for name, path in folder.made().items()}
    os.utime(folder.source / "photo-0003.jpg")
    code, report = folder.run(filters="blur:1")
    assert (code, report["processed"], report["before"]) == (0, 1, 11)
    after = {name: path.stat().st_mtime_ns for name, path in folder.made().items()}
    assert [name for name in before if before[name] != after[name]] == ["photo-0003.jpg"]


def test_what_failed_is_tried_again_by_the_next_run(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    _, bad = make_photographs(source, 2, (90, 60))
    whole = bad.read_bytes()
    bad.write_bytes(whole[:100])
    assert process_folder(source, out, "edges", ONE).failed == 1
    again = process_folder(source, out, "edges", ONE)
    assert (again.processed, again.before, again.failed) == (0, 1, 1)
    bad.write_bytes(whole)
    mended = process_folder(source, out, "edges", ONE)
    assert (mended.processed, mended.before, mended.failed) == (1, 1, 0)


def test_an_original_that_gave_way_to_an_older_one_is_processed_again(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    first, _ = make_photographs(source, 2, (90, 60))
    assert process_folder(source, out, "edges", ONE).processed == 2
    (other,) = make_photographs(tmp_path / "other", 1, (60, 40))
    os.utime(other, (1_000_000_000, 1_000_000_000))
    other.replace(first)
    again = process_folder(source, out, "edges", ONE)
    assert (again.processed, again.before) == (1, 1)
    with Image.open(out / first.name) as image:
        assert image.size == (60, 40)
    assert process_folder(source, out, "edges", ONE).before == 2
    (out / STATE / "originals").write_bytes(b"this is no database" * 100)
    assert process_folder(source, out, "edges", ONE).processed == 2


def test_a_contact_sheet_is_not_taken_for_a_result(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (photo,) = make_photographs(source, 1, (90, 60))
    command = ["process", str(source), str(out), "--filters", "edges", "--processes", "1"]
    assert __main__.main(command) == 0
    assert (out / "contact-sheet.png").exists()
    photo.with_name("contact-sheet.png").write_bytes(photo.read_bytes())
    old = photo.stat().st_mtime
    os.utime(photo.with_name("contact-sheet.png"), (old, old))
    assert __main__.main(command) == 0
    with Image.open(out / "contact-sheet.png") as image:
        assert image.size == (90, 60)
    assert (out / STATE / "contact-sheet.png").exists()


def test_results_of_other_filters_are_not_mixed_in(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    make_photographs(folder.source, 2, (90, 60))
    assert folder.run(filters="blur:1")[0] == 0
    with pytest.raises(FolderError, match="holds images made with 'blur:1'; use another folder, or --again"):
        process_folder(folder.source, folder.out, "blur:2", Settings())
    code, report = folder.run("--again", filters="blur:2")
    assert (code, report["processed"], report["before"]) == (0, 2, 0)


async def leave_again(photos: Sequence[Path], out: Path, url: str) -> None:
    """Leave on a broker what is to be made once more, by the recipe of the folder, as an interrupted run would."""
    recipe = recipe_by_now(out / STATE / RECIPE)
    assert recipe is not None
    images = make_app(ONE, url)
    async with images.app:
        for photo in photos:
            (out / photo.name).unlink()
            await images.process.send(photo, out / photo.name, recipe, LARGEST_PIXELS, out / STATE / RECIPE)


def test_what_an_interrupted_run_left_on_a_broker_does_not_spoil_the_next_one_s_results(tmp_path: Path) -> None:
    source, out, url = tmp_path / "in", tmp_path / "out", f"sqlite:///{tmp_path / 'images.queue'}"
    photos = make_photographs(source, 3, (90, 60))
    process_folder(source, out, "grayscale", ONE, broker=url)
    asyncio.run(leave_again(photos, out, url))
    report = process_folder(source, out, "blur:1", ONE, broker=url, again=True)
    assert (report.processed, report.before) == (3, 0)
    for photo in photos:
        with Image.open(out / photo.name) as image:
            assert image.mode == "RGB"


def test_what_an_interrupted_run_left_on_a_broker_is_counted_by_the_run_that_does_it(tmp_path: Path) -> None:
    source, out, url = tmp_path / "in", tmp_path / "out", f"sqlite:///{tmp_path / 'images.queue'}"
    photos = make_photographs(source, 3, (90, 60))
    process_folder(source, out, "grayscale", ONE, broker=url)
    asyncio.run(leave_again(photos, out, url))
    report = process_folder(source, out, "grayscale", ONE, broker=url)
    assert (report.processed, report.before, report.failed) == (3, 0, 0)
    assert report.steps.get("save", StepTimes()).count + report.unseen == 3


def test_only_the_bad_images_fail_each_with_its_reason(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    make_photographs(folder.source, 2, (90, 60))
    for kind, (name, make) in HANDLED.items():
        (folder.source / kind).mkdir()
        write(folder.source / kind, name, make())
    for kind, (name, make, _) in REFUSED.items():
        (folder.source / kind).mkdir()
        write(folder.source / kind, name, make())
    code, report = folder.run(filters="blur:1")
    assert code == 1
    assert (report["processed"], report["failed"], report["repeated"]) == (2 + len(HANDLED), len(REFUSED), 0)
    assert {Path(failure["path"]).parts[0] for failure in report["failures"]} == set(REFUSED)
    assert all(Path(failure["path"]).name in failure["reason"] for failure in report["failures"])
    assert len(folder.made()) == 2 + len(HANDLED)
    again, report = folder.run(filters="blur:1")
    assert (again, report["processed"], report["before"]) == (1, 0, 2 + len(HANDLED))
    assert report["failed"] == len(REFUSED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_same_command_again_does_what_an_interruption_left_and_nothing_twice(
    folder: Folder, number: signal.Signals
) -> None:
    program = folder.start()
    wait_for_some(folder, program, 2)
    program.process.send_signal(number)
    assert program.process.wait(60) == 130, program.said()
    first = folder.report(program)
    assert first["interrupted"]
    assert 2 <= first["processed"] == len(folder.made())
    assert first["steps"]["save"]["count"] + first["unseen"] == first["processed"]
    assert first["megapixels"] == pytest.approx(first["processed"] * 900 * 675 / 1e6)
    assert folder.half_written() == []
    code, second = folder.run()
    assert code == 0
    assert second["before"] == first["processed"]
    assert second["processed"] == 12 - first["processed"]
    assert len(folder.made()) == 12


def test_a_second_interruption_waits_no_longer_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder, endless = Folder(tmp_path), ",".join(["blur:900"] * 10_000)
    make_photographs(folder.source, 3, (900, 675))
    program = folder.start(filters=endless)
    try:
        wait_for(lambda: pool(program) and (folder.out / STATE / RECIPE).exists(), program.said)
        while program.process.poll() is None:
            program.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert program.process.returncode == 130, program.said()
        assert folder.report(program)["interrupted"]
        assert "Traceback" not in program.said()
        assert (folder.made(), folder.half_written()) == ({}, [])
    finally:
        program.close()


def test_processes_that_are_killed_again_and_again_cost_no_image(folder: Folder) -> None:
    program = folder.start()
    killed: set[int] = set()

    def ended() -> bool:
        return program.process.poll() is not None

    def victim() -> int | None:
        return next((pid for pid in pool(program) if pid not in killed), None)

    for _ in range(6):
        made = len(folder.made())
        wait_for(lambda: victim() or ended() or None, program.said)
        if (pid := victim()) is None:
            break
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
        # Some progress between two deaths, else all of them would fall on the same image.
        wait_for(functools.partial(progressed, folder, made, ended), program.said)
    assert program.process.wait(150) == 0, program.said()
    report = folder.report(program)
    assert len(killed) >= 3
    assert (report["processed"], report["failed"]) == (12, 0)
    assert report["repeated"] >= 1
    assert len(folder.made()) == 12
    assert folder.half_written() == []


def test_after_the_command_itself_is_killed_every_image_is_whole_and_the_next_run_does_the_rest(folder: Folder) -> None:
    program = folder.start()
    wait_for_some(folder, program, 3)
    program.kill_all()
    there = folder.made()
    assert 3 <= len(there) < 12
    code, report = folder.run()
    assert (code, report["processed"] + report["before"], report["failed"]) == (0, 12, 0)
    assert report["before"] >= len(there)
    assert len(folder.made()) == 12
    assert folder.half_written() == []


def test_the_output_may_be_a_folder_within_the_input(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.out = folder.source / "out"
    make_photographs(folder.source, 3, (90, 60))
    for _ in range(2):
        code, report = folder.run(filters="blur:1")
        assert (code, report["processed"] + report["before"], report["left_out"]) == (0, 3, {})


def test_what_is_no_image_is_named_and_what_only_seems_to_be_one_fails(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    make_photographs(folder.source, 2, (90, 60))
    (folder.source / "notes.txt").write_text("no image")
    (folder.source / "album").symlink_to(tmp_path)
    reasons = no_files(folder.source)
    code, report = folder.run(filters="blur:1")
    assert (code, report["processed"]) == (1, 2)
    assert report["left_out"] == {
        "no image by its ending": {"count": 1, "paths": ["notes.txt"]},
        "links to a folder, which is not followed": {"count": 1, "paths": ["album"]},
    }
    failed = {failure["path"]: failure["reason"] for failure in report["failures"]}
    assert sorted(failed) == ["circle.jpg", "device.jpg", "nothing.jpg", "pipe.jpg", "socket.jpg"]
    assert all(reasons[path] in reason for path, reason in failed.items())


def test_results_are_not_processed_again_wherever_they_are(tmp_path: Path) -> None:
    source = tmp_path / "in"
    make_photographs(source, 2, (90, 60))
    for name in ("first", "second", "deeper/third"):
        report = process_folder(source, source / name, "blur:1", ONE)
        assert (report.processed, report.failed) == (2, 0)
    (left_out,) = report.left_out.values()
    assert sorted(left_out.paths) == ["first", "second"]
    # The results of one run may be the originals of another one, of course.
    assert process_folder(source / "first", tmp_path / "out", "edges", ONE).processed == 2


def test_originals_and_other_people_s_images_are_not_written_over(tmp_path: Path) -> None:
    source, out = tmp_path / "out" / "in", tmp_path / "out"
    make_photographs(source, 1, (90, 60))
    with pytest.raises(FolderError, match="is within the output .* could be written over originals"):
        process_folder(source, out, "blur:1", ONE)
    (theirs,) = make_photographs(tmp_path / "theirs", 1, (60, 40))
    before = theirs.read_bytes()
    with pytest.raises(
        FolderError, match="theirs holds images that were not made here; use another folder, or --again"
    ):
        process_folder(source, tmp_path / "theirs", "blur:1", ONE)
    assert theirs.read_bytes() == before
    assert process_folder(source, tmp_path / "theirs", "blur:1", ONE, again=True).processed == 1


def test_the_results_of_two_folders_are_not_taken_for_each_other_s(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_photographs(tmp_path / name, 1, (90, 60))
    assert process_folder(tmp_path / "one", tmp_path / "out", "blur:1", ONE).processed == 1
    with pytest.raises(FolderError, match="out holds images made of those in .*one; use another folder, or --again"):
        process_folder(tmp_path / "two", tmp_path / "out", "blur:1", ONE)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_photographs(tmp_path / "in" / "open", 1, (90, 60))
    (tmp_path / "in" / "shut").mkdir()
    scandir = os.scandir

    def look(path: Path) -> Any:
        if path.name == "shut":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", look)
    assert sorted(walk(tmp_path / "in", tmp_path / "out")) == [
        Found(tmp_path / "in" / "open" / "photo-0001.jpg"),
        Found(tmp_path / "in" / "shut", "cannot be read: Permission denied"),
    ]


def test_what_cannot_be_looked_at_is_left_out_and_the_others_are_processed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    make_photographs(source, 2, (90, 60))
    (source / "shut").mkdir()
    (source / "long.jpg").symlink_to("x" * 300 + ".jpg")
    (source / "into.jpg").symlink_to("shut/a.jpg")
    really = Path.stat

    def look(path: Path, **how: bool) -> os.stat_result:  # root may enter every folder
        if "shut" in path.relative_to(tmp_path).parts[:-1] or path.name == "into.jpg":
            raise PermissionError(13, "Permission denied")
        return really(path, **how)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", look)
        left_out = {path.name: reason for path, reason in walk(source, out) if reason}
    assert left_out == {
        "shut": "cannot be read: Permission denied",
        "into.jpg": "cannot be read: Permission denied",
        "long.jpg": "cannot be read: File name too long",
    }
    report = process_folder(source, out, "edges", ONE)
    assert (report.processed, list(report.left_out)) == (2, ["cannot be read: File name too long"])


def test_what_a_run_left_among_the_originals_and_names_that_are_no_text_are_left_out_by_name(tmp_path: Path) -> None:
    (photo,) = make_photographs(tmp_path, 1, (90, 60))
    (tmp_path / STATE).mkdir()
    for name in (f"{STATE}/lost.jpg", f"{TEMPORARY}x.jpg", os.fsdecode(b"caf\xe9.jpg")):
        (tmp_path / name).write_bytes(photo.read_bytes())
    assert {path.name: reason for path, reason in walk(tmp_path, tmp_path / "out")} == {
        photo.name: "",
        STATE: "holds what a run remembers",
        f"{TEMPORARY}x.jpg": "its name begins with .conveyor-, as those of half-written images",
        os.fsdecode(b"caf\xe9.jpg"): "its name is no UTF-8; rename it",
    }


def test_results_too_large_for_the_contact_sheet_are_counted_and_their_absence_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photo,) = make_photographs(tmp_path / "in", 1, (90, 60))
    command = [
        "process",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--filters",
        "resize:200x200",
        "--processes",
        "1",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        assert pixels_of(photo) == 5_400
        assert __main__.main(command) == 0
        assert pixels_of(tmp_path / "out" / photo.name) == 40_000
    said = capsys.readouterr().out
    assert f"not on the contact sheet: {photo.name}: {photo.name} is a decompression bomb" in said
    assert not (tmp_path / "out" / "contact-sheet.png").exists()


def test_what_took_too_long_and_what_was_too_large_name_the_option_that_allows_more(tmp_path: Path) -> None:
    folder, slow = Folder(tmp_path), ",".join(["blur:60"] * 40)
    make_photographs(folder.source, 1, (1200, 900))
    for flag, few in (("--timeout", "0.1"), ("--largest-megapixels", "1")):
        code, report = folder.run(flag, few, filters=slow)
        assert code == 1
        assert flag in report["failures"][0]["reason"]


def test_an_interruption_while_the_contact_sheet_is_made_ends_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_photographs(tmp_path / "in", 1, (90, 60))

    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "contact_sheet", interrupted)
    code = __main__.main(["process", str(tmp_path / "in"), str(tmp_path / "out"), "--filters", "blur:1"])
    assert code == 130
    assert "interrupted; the images are done, and the contact sheet is not" in capsys.readouterr().out


def test_a_contact_sheet_that_would_take_the_place_of_an_image_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (photo,) = make_photographs(source, 1, (90, 60))
    original = photo.read_bytes()
    (tmp_path / "link").symlink_to(source)
    command = ["process", str(source), str(out), "--filters", "edges", "--processes", "1", "--sheet"]
    for sheet, said in (
        (photo, "is among the originals"),
        (tmp_path / "link" / photo.name, "is among the originals"),
        (out / photo.name, "is the result of an image"),
    ):
        assert __main__.main([*command, str(sheet)]) == 2
        assert said in capsys.readouterr().err
        assert photo.read_bytes() == original
        assert not out.exists()
    for _ in range(2):
        assert __main__.main([*command, str(out / "sheet.jpg")]) == 0


def test_files_from_the_future_and_files_whose_names_are_no_text_disturb_nobody(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    first, *_ = make_photographs(folder.source, 2, (90, 60))
    soon = time.time() + 86_400
    os.utime(first, (soon, soon))
    first.with_name(os.fsdecode(b"caf\xe9.jpg")).write_bytes(first.read_bytes())
    code, report = folder.run(filters="blur:1")
    assert (code, report["processed"], report["failed"]) == (0, 2, 0)
    assert report["left_out"] == {"its name is no UTF-8; rename it": {"count": 1, "paths": ["caf?.jpg"]}}
    code, report = folder.run(filters="blur:1")
    assert (code, report["processed"], report["before"]) == (0, 0, 2)


def test_a_damaged_recipe_is_named_and_made_anew_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_photographs(tmp_path / "in", 1, (90, 60))
    recipe = tmp_path / "out" / STATE / RECIPE
    recipe.parent.mkdir(parents=True)
    command = ["process", str(tmp_path / "in"), str(tmp_path / "out"), "--filters", "edges", "--processes", "1"]
    for content in (b"", b'{"filters": "ed', b"\xff\xfe", b'{"filters": 7}'):
        recipe.write_bytes(content)
        assert __main__.main(command) == 2
        assert f"{recipe} is damaged" in (said := capsys.readouterr().err)
        assert "--again" in said
    assert __main__.main([*command, "--again"]) == 0
    assert __main__.main(command) == 0


def test_an_interrupted_run_names_the_command_that_does_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> Report:
        report = Report()
        report.interrupted = True
        return report

    monkeypatch.setattr(__main__, "process_folder", interrupted)
    for flags, said in (([], "the same command again does the rest"), (["--again"], "without --again does the rest")):
        assert __main__.main(["process", str(tmp_path), str(tmp_path / "out"), *flags]) == 130
        assert said in capsys.readouterr().out


def test_two_runs_at_once_in_one_folder_are_refused(folder: Folder) -> None:
    program = folder.start()
    wait_for_some(folder, program, 1)
    program.process.send_signal(signal.SIGSTOP)  # or it might be done before the second one has begun
    second = folder.start()
    assert second.process.wait(60) == 2
    assert "another run is at work" in second.said()
    program.process.send_signal(signal.SIGCONT)
    assert program.process.wait(150) == 0
    assert len(folder.made()) == 12


def test_the_journal_tells_every_attempt_at_a_failed_image(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    make_photographs(folder.source, 1, (90, 60))
    write(folder.source, "bad.jpg", b"no image")
    code, report = folder.run(filters="blur:1")
    assert code == 1
    (failure,) = report["failures"]
    trace = subprocess.run(
        [sys.executable, "-m", "conveyor", "trace", failure["id"], "--file", folder.out / STATE / JOURNAL],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "Refused: bad.jpg is no image that can be read" in trace.stdout
    assert f"conveyor trace ID --file {folder.out / STATE / JOURNAL}" in folder.programs[0].said()


def test_no_more_images_are_under_way_than_a_few_for_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_photographs(tmp_path / "in", 30, (90, 60))
    runs: list[Run] = []
    under_way: list[int] = []

    class Counted:
        """The task, with those who send to it counted."""

        def __init__(self, images: Images) -> None:
            self._send = images.process.send

        async def send(self, *args: Any) -> Any:
            under_way.append(len(under_way) + 1 - runs[0].ended)
            return await self._send(*args)

    def make(*args: Any) -> Any:
        images = make_app(*args)
        return images._replace(process=Counted(images))  # type: ignore[arg-type]

    monkeypatch.setattr(images_folder, "make_app", make)
    report = process_folder(tmp_path / "in", tmp_path / "out", "blur:1", ONE, on_start=runs.append)
    assert (report.processed, len(under_way)) == (30, 30)
    assert max(under_way) == AHEAD


def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    """Each of 180 further images takes 1.8 MB: a process that kept one in ten of them would be seen."""
    peaks = []
    for number in (20, 200):
        folder = Folder(tmp_path / str(number))
        (photo,) = make_photographs(folder.source, 1, (900, 675))
        for other in range(1, number):
            (folder.source / f"copy-{other:03}.jpg").hardlink_to(photo)
        program = folder.start(filters="blur:1", processes=1)
        peaks.append(peak_megabytes(program))
        assert program.process.returncode == 0, program.said()
        assert folder.report(program)["processed"] == number
    few, many = peaks
    assert few["main"] > 20 < few["pool"]  # it was measured
    assert many["main"] - few["main"] < 16
    assert many["pool"] - few["pool"] < 16


@pytest.mark.parametrize("content", [b"this is no journal", b"\0" * 8192])
def test_a_journal_that_cannot_be_read_is_moved_aside_and_a_new_one_begins(tmp_path: Path, content: bytes) -> None:
    folder = Folder(tmp_path)
    make_photographs(folder.source, 2, (90, 60))
    journal = folder.out / STATE / JOURNAL
    journal.parent.mkdir(parents=True)
    journal.write_bytes(content)
    code, report = folder.run(filters="blur:1")
    assert (code, report["processed"]) == (0, 2)
    aside = journal.with_name("images.unusable-1")
    assert aside.read_bytes() == content
    assert f"it is {aside} now, and a new journal has begun" in folder.programs[0].said()
    assert journal.read_bytes().startswith(b"SQLite format 3")


def test_a_file_of_somebody_else_is_not_taken_for_the_journal(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    make_photographs(folder.source, 1, (90, 60))
    theirs = write(tmp_path, "notes.txt", b"buy milk")
    program = folder.start("--journal", str(theirs), filters="blur:1")
    assert program.process.wait(60) == 2, program.said()
    assert f"{theirs} is no journal" in program.said()
    assert theirs.read_bytes() == b"buy milk"
    code, report = folder.run("--journal", str(tmp_path / "other.journal"), filters="blur:1")
    assert (code, report["processed"]) == (0, 1)
    assert (tmp_path / "other.journal").exists()
    assert not (folder.out / STATE / JOURNAL).exists()


def test_a_run_whose_journal_cannot_be_kept_ends_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_photographs(tmp_path / "in", 12, (90, 60))
    monkeypatch.setattr(images_folder, "JOURNAL_SECONDS", 1.0)
    monkeypatch.setattr(os, "statvfs", almost_full)
    command = ["process", str(tmp_path / "in"), str(tmp_path / "out"), "--filters", "blur:1", "--processes", "1"]
    assert __main__.main(command) == 2
    assert "almost full" in capsys.readouterr().err
    monkeypatch.undo()
    assert __main__.main(command) == 0


def test_a_run_whose_queue_has_no_room_ends_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_photographs(tmp_path / "in", 12, (90, 60))
    monkeypatch.setattr(images_folder, "JOURNAL_SECONDS", 1.0)
    monkeypatch.setattr(images_folder, "LAST_SECONDS", 0.2)
    command = ["process", str(tmp_path / "in"), str(tmp_path / "out"), "--filters", "blur:1", "--processes", "1"]
    command += ["--journal", str(tmp_path / "images.journal")]
    statvfs = os.statvfs

    def full(path: Path | str) -> os.statvfs_result:  # for the queue alone
        return nothing_free(statvfs(path)) if "queue" in str(path) else statvfs(path)

    monkeypatch.setattr(os, "statvfs", full)
    assert __main__.main(command) == 2
    assert "is almost full" in capsys.readouterr().err
    monkeypatch.undo()
    assert __main__.main(command) == 0


def test_the_room_of_a_queue_is_looked_at_where_it_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert no_room(tmp_path) is None
    disk = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: nothing_free(disk))
    assert "no image is done any more: free some space" in (no_room(tmp_path) or "")
    assert no_room(None) is None


def test_the_queue_may_be_on_any_broker(tmp_path: Path, shared_url: str) -> None:
    folder = Folder(tmp_path)
    make_photographs(folder.source, 4, (90, 60))
    write(folder.source, "bad.jpg", b"no image")
    code, report = folder.run("--broker", shared_url, filters="blur:1")
    assert (code, report["processed"], report["failed"]) == (1, 4, 1)
