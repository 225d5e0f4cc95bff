"""The application: its task does an image once, says how far it is, and tells what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from conveyor import JobFailed
from examples.images.app import Recipe, make_app, process_image
from examples.images.files import LARGEST_PIXELS
from examples.images.filters import BlurFilter
from examples.images.pictures import make_photographs
from examples.images.settings import Settings
from tests.examples.beside import PATIENCE_SECONDS

ONE = Settings(processes=1)
BLUR = Recipe("blur:1", 0.0)


def test_an_image_that_is_there_is_not_made_again(photos: Sequence[Path], tmp_path: Path) -> None:
    target = tmp_path / "out.jpg"
    first = process_image(photos[0], target, BLUR, LARGEST_PIXELS)
    assert first is not None
    assert [step.name for step in first.steps] == ["load", "blur", "save"]
    made = target.stat().st_mtime_ns
    assert process_image(photos[0], target, BLUR, LARGEST_PIXELS) is None
    assert target.stat().st_mtime_ns == made


def test_a_task_of_an_earlier_run_writes_nothing_once_its_folder_has_another_recipe(
    photos: Sequence[Path], tmp_path: Path
) -> None:
    target, file = tmp_path / "out.jpg", tmp_path / "recipe.json"
    file.write_bytes(msgspec.json.encode(Recipe("edges", 1.0)))
    assert process_image(photos[0], target, BLUR, LARGEST_PIXELS, file) is None
    assert process_image(photos[0], target, Recipe("edges", 0.0), LARGEST_PIXELS, file) is None
    assert not target.exists()
    assert process_image(photos[0], target, Recipe("edges", 1.0), LARGEST_PIXELS, file) is not None


def test_a_task_of_an_earlier_run_does_not_bring_back_a_folder_that_is_gone(
    photos: Sequence[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert process_image(photos[0], out / "a.jpg", BLUR, LARGEST_PIXELS, out / ".conveyor" / "recipe.json") is None
    assert not out.exists()


def test_an_image_in_hand_is_not_written_when_its_folder_gets_another_recipe_meanwhile(
    photos: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, file = tmp_path / "out.jpg", tmp_path / "recipe.json"
    file.write_bytes(msgspec.json.encode(BLUR))

    def blur(_: BlurFilter, image: Image.Image) -> Image.Image:
        file.write_bytes(msgspec.json.encode(Recipe("edges", 1.0)))
        return image

    monkeypatch.setattr(BlurFilter, "apply", blur)
    assert process_image(photos[0], target, BLUR, LARGEST_PIXELS, file) is None
    assert not target.exists()


async def test_a_ticket_tells_how_far_a_long_image_is_and_what_came_of_it(tmp_path: Path) -> None:
    (photo,) = make_photographs(tmp_path / "in", 1, (1600, 1200))
    images = make_app(ONE, f"sqlite:///{tmp_path / 'images.queue'}", tmp_path / "images.journal")
    recipe, file = Recipe(",".join(["blur:3"] * 30), 0.0), tmp_path / "recipe.json"
    file.write_bytes(msgspec.json.encode(recipe))
    async with images.app.running(), asyncio.timeout(PATIENCE_SECONDS):
        ticket = await images.process.send(photo, tmp_path / "out.jpg", recipe, LARGEST_PIXELS, file)
        while (job := await ticket.status()).note != "blur":
            assert not job.status.ended
            await asyncio.sleep(0.05)
        assert job.total == 32
        processed = await ticket.result()
        assert processed is not None
        assert (processed.width, processed.height, len(processed.steps)) == (1600, 1200, 32)


async def test_a_ticket_tells_why_an_image_was_refused(tmp_path: Path) -> None:
    images, file = make_app(ONE, "memory://", journal=True), tmp_path / "recipe.json"
    file.write_bytes(msgspec.json.encode(BLUR))
    async with images.app.running():
        ticket = await images.process.send(tmp_path / "a.jpg", tmp_path / "b.jpg", BLUR, LARGEST_PIXELS, file)
        with pytest.raises(JobFailed, match="there is no file") as failed:
            await ticket.result(PATIENCE_SECONDS)
        assert failed.value.attempts == 1
