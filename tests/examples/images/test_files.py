"""Image files: which are handled and how, which are refused and why, and that each appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from examples.images import FilterPipeline, GrayscaleFilter, Refused, load_image, process_file, save_image
from examples.images.files import check_source, is_made
from examples.images.pictures import make_photographs, photograph
from tests.examples.images.odd import HANDLED, REFUSED, SIZE, encoded, no_files, photo, rotated, sixteen_bits, write

PIPELINE = FilterPipeline("blur:1,brightness:1.2")


@pytest.mark.parametrize(("name", "make"), HANDLED.values(), ids=HANDLED)
def test_an_unusual_image_is_processed(tmp_path: Path, name: str, make: Callable[[], bytes]) -> None:
    done = process_file(write(tmp_path, name, make()), tmp_path / "out" / name, PIPELINE)
    with Image.open(tmp_path / "out" / name) as image:
        image.load()
        assert image.size == (done.width, done.height)
    assert [step.name for step in done.steps] == ["load", "blur", "brightness", "save"]
    assert sum(step.seconds for step in done.steps) <= done.seconds
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize(("name", "make", "reason"), REFUSED.values(), ids=REFUSED)
def test_an_impossible_image_is_refused_with_its_reason_and_leaves_nothing_behind(
    tmp_path: Path, name: str, make: Callable[[], bytes], reason: str
) -> None:
    with pytest.raises(Refused, match=reason):
        process_file(write(tmp_path, name, make()), tmp_path / "out" / name, PIPELINE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_image_is_refused_wherever_it_ends(tmp_path: Path, kind: str, keep: float) -> None:
    content = encoded(photograph(2, (200, 150)), kind)
    name = f"a.{kind.lower()}"
    with pytest.raises(Refused, match="a."):
        load_image(write(tmp_path, name, content[: int(len(content) * keep)]))


@pytest.mark.parametrize(
    ("name", "width", "most"), [("a.jpg", 65_501, "65,500"), ("a.webp", 16_384, "16,383"), ("a.gif", 65_536, "65,535")]
)
def test_an_image_too_large_for_its_format_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, width: int, most: str
) -> None:
    source = write(tmp_path, name, encoded(Image.new("L", (width, 1)), "PNG"))
    with pytest.raises(Refused, match=f"{width} × 1 pixels; .* holds at most {most} a side"):
        save_image(Image.new("L", (width, 1)), tmp_path / "b" / name)
    with monkeypatch.context() as patched:
        patched.setattr(GrayscaleFilter, "apply", lambda *_: pytest.fail("it was worked on"))
        with pytest.raises(Refused, match=f"at most {most} a side"):
            process_file(source, tmp_path / "out" / name, FilterPipeline("grayscale"))
    assert not (tmp_path / "out").exists()
    assert process_file(source, tmp_path / "out" / name, FilterPipeline("grayscale,thumbnail:100")).width == 100
    save_image(Image.new("L", (int(most.replace(",", "")), 1)), tmp_path / "b" / name)


def test_what_is_no_file_is_refused_in_words_and_never_waited_for(tmp_path: Path) -> None:
    for name, reason in no_files(tmp_path).items():
        with pytest.raises(Refused, match=f"{name}.*{reason}|{reason}.*{name}"):
            load_image(tmp_path / name)
        with pytest.raises(Refused, match=reason):
            check_source(tmp_path / name)


def test_a_file_that_becomes_a_named_pipe_after_it_was_looked_at_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, really_open = write(tmp_path, "a.jpg", photo()), os.open

    def open_late(name: str, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return really_open(name, flags)

    monkeypatch.setattr(os, "open", open_late)
    with pytest.raises(Refused, match="a.jpg is a named pipe, no file"):
        process_file(path, tmp_path / "b.jpg", PIPELINE)


def test_neither_the_original_nor_what_is_no_file_is_written_over(tmp_path: Path) -> None:
    content = photo()
    source = write(tmp_path, "a.jpg", content)
    (tmp_path / "link.jpg").symlink_to(source)
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in {
        "a.jpg": "is the original itself",
        "link.jpg": "is the original itself",
        "folder.jpg": "is a folder, no file",
        "pipe.jpg": "is a named pipe, no file",
    }.items():
        with pytest.raises(Refused, match=f"{name} {reason}"):
            process_file(source, tmp_path / name, PIPELINE)
    assert not is_made(source, tmp_path / "folder.jpg", 0.0)
    assert source.read_bytes() == content


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jpg", photo())
    assert load_image(path, largest_pixels=SIZE[0] * SIZE[1]).size == SIZE
    with pytest.raises(Refused, match="60 × 40 pixels, more than 0.002399 megapixels.*--largest-megapixels"):
        load_image(path, largest_pixels=SIZE[0] * SIZE[1] - 1)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    image = load_image(write(tmp_path, "a.png", sixteen_bits()))
    assert image.mode == "L"
    assert [image.getpixel((x, 0)) for x in (0, 64, 128, 255)] == [0, 64, 128, 255]


def test_an_image_that_lies_on_its_side_is_turned_and_says_so_no_more(tmp_path: Path) -> None:
    target = tmp_path / "out.jpg"
    process_file(write(tmp_path, "a.jpg", rotated()), target, PIPELINE)
    with Image.open(target) as image:
        assert image.size == SIZE[::-1]
        assert 0x0112 not in image.getexif()


def test_cmyk_becomes_red_green_and_blue(tmp_path: Path) -> None:
    red = Image.new("RGB", SIZE, (200, 30, 30)).convert("CMYK")
    image = load_image(write(tmp_path, "a.jpg", encoded(red, "JPEG", quality=95)))
    assert image.mode == "RGB"
    colour = image.getpixel((10, 10))
    assert isinstance(colour, tuple)
    assert abs(colour[0] - 200) < 10 > abs(colour[1] - 30)


def test_the_format_of_the_output_is_what_its_name_says(tmp_path: Path) -> None:
    process_file(write(tmp_path, "a.jpg", photo("PNG")), tmp_path / "out.webp", FilterPipeline([]))
    with Image.open(tmp_path / "out.webp") as image:
        assert image.format == "WEBP"
    with pytest.raises(Refused, match="its ending says no known format"):
        process_file(write(tmp_path, "b.jpg", photo()), tmp_path / "out.txt", FilterPipeline([]))


def test_transparency_becomes_white_where_a_format_has_none(tmp_path: Path) -> None:
    save_image(Image.new("RGBA", SIZE, (0, 0, 0, 0)), tmp_path / "a.bmp")
    with Image.open(tmp_path / "a.bmp") as image:
        assert image.convert("RGB").getpixel((5, 5)) == (255, 255, 255)


def test_a_colour_profile_goes_with_the_colours(tmp_path: Path) -> None:
    content = encoded(photograph(3, SIZE), "JPEG", icc_profile=b"a profile")
    source = write(tmp_path, "a.jpg", content)
    process_file(source, tmp_path / "same.jpg", PIPELINE)
    process_file(source, tmp_path / "grey.png", FilterPipeline([GrayscaleFilter()]))
    with Image.open(tmp_path / "same.jpg") as same, Image.open(tmp_path / "grey.png") as grey:
        assert same.info["icc_profile"] == b"a profile"
        assert "icc_profile" not in grey.info


def test_an_image_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write(tmp_path, "a.jpg", photo()), tmp_path / "out" / "a.jpg"
    process_file(source, target, PIPELINE)
    first = target.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        process_file(source, target, FilterPipeline("blur:9"))
    assert target.read_bytes() == first
    assert [path.name for path in target.parent.iterdir()] == ["a.jpg"]


def test_an_image_that_is_there_is_on_the_disk_with_its_name_and_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        done.append("image" if path.is_file() else str(path.relative_to(tmp_path)))
        fsync(handle)

    def note_rename(path: Path, target: Path) -> Path:
        done.append("renamed")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    source = write(tmp_path, "a.jpg", photo())
    process_file(source, tmp_path / "out" / "within" / "a.jpg", PIPELINE)
    assert done == [".", "out", "image", "renamed", "out/within"]


@pytest.mark.parametrize(("number", "refused"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced_is_an_error_only_where_it_should_be_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, refused: bool
) -> None:
    fsync = os.fsync

    def sync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync)
    source = write(tmp_path, "a.jpg", photo())
    with pytest.raises(OSError, match="error") if refused else contextlib.nullcontext():
        process_file(source, tmp_path / "b.jpg", PIPELINE)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_an_image_gets_the_permissions_that_the_user_gives_to_new_files(tmp_path: Path, mask: int) -> None:
    source = write(tmp_path, "a.jpg", photo())
    before = os.umask(mask)
    try:
        process_file(source, tmp_path / "b.jpg", PIPELINE)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "b.jpg").stat().st_mode) == 0o666 & ~mask


def test_an_image_is_made_where_it_is_younger_than_its_original_and_its_recipe(tmp_path: Path) -> None:
    source, target = write(tmp_path, "a.jpg", photo()), tmp_path / "b.jpg"
    assert not is_made(source, target, 0.0)
    os.utime(source, (1000.0, 1000.0))
    write(tmp_path, "b.jpg", photo())
    os.utime(target, (2000.0, 2000.0))
    assert is_made(source, target, 1500.0)
    assert not is_made(source, target, 2500.0)
    os.utime(source, (2001.0, 2001.0))
    assert not is_made(source, target, 1500.0)


def test_what_is_made_of_an_original_from_the_future_is_no_older(tmp_path: Path) -> None:
    source, target = write(tmp_path, "a.jpg", photo()), tmp_path / "b.jpg"
    os.utime(source, (9e9, 9e9))
    process_file(source, target, PIPELINE)
    assert is_made(source, target, 0.0)


def test_a_preview_is_small_and_looks_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jpg", encoded(photograph(4, (1600, 1200)), "JPEG"))
    preview = load_image(path, preview=(100, 75))
    assert preview.width < 1600
    assert preview.width / preview.height == pytest.approx(4 / 3, rel=0.05)


def test_the_same_number_makes_the_same_picture_and_another_one_another(tmp_path: Path) -> None:
    first, second = make_photographs(tmp_path, 2, (80, 60))
    assert first.name == "photo-0001.jpg"
    assert first.read_bytes() != second.read_bytes()
