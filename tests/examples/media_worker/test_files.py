"""What is done with files: which ones are taken, what is found out about them, and how their thumbnails come into being."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from examples.media_worker import files
from examples.media_worker.files import Limits, Refused

LIMITS = Limits(file_bytes=10_000_000, image_pixels=1_000_000)


def image(path: Path, size: tuple[int, int] = (400, 300), mode: str = "RGB", **options: Any) -> Path:
    Image.effect_noise(size, 60).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize(
    "path",
    ["../secret", "a/../../secret", "/etc/passwd", "..", "a/b/../../../secret", "a\\..\\secret", "a\0b", "link/secret"],
)
def test_a_path_that_leads_out_is_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "media"
    (root / "a" / "b").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(Refused):
        files.find(root, path)


@given(st.text(max_size=40))
def test_whatever_the_path_nothing_outside_is_found(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    root = tmp_path_factory.getbasetemp() / "inside"
    root.mkdir(exist_ok=True)
    (root / "a.txt").write_text("a")
    try:
        found = files.find(root, path)
    except (Refused, OSError):
        return
    assert found.is_relative_to(root.resolve())
    assert found.is_file()


def test_what_is_no_plain_file_is_refused_and_what_is_missing_may_come(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe", "."):
        with pytest.raises(Refused, match="is no file"):
            files.find(tmp_path, name)
    with pytest.raises(FileNotFoundError):
        files.find(tmp_path, "later.jpg")


@pytest.mark.parametrize(
    ("name", "content", "media_type"),
    [
        ("report.pdf", b"%PDF-1.7 and so on", "application/pdf"),
        ("a.bin", b"PK\x03\x04...", "application/zip"),
        ("notes.txt", b"hello", "text/plain"),
        ("film.mp4", b"....ftyp", "video/mp4"),
        ("unknown", b"\x00\x01", "application/octet-stream"),
        ("empty.txt", b"", "text/plain"),
    ],
)
def test_type_size_and_checksum_are_found_out(tmp_path: Path, name: str, content: bytes, media_type: str) -> None:
    (tmp_path / name).write_bytes(content)
    facts = files.examine(tmp_path / name, LIMITS)
    assert facts == files.Facts(media_type, len(content), hashlib.sha256(content).hexdigest())


def test_an_image_is_known_by_its_content_whatever_its_name_says(tmp_path: Path) -> None:
    assert files.examine(image(tmp_path / "a.txt", format="PNG"), LIMITS).media_type == "image/png"


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 2_000_000)
    with pytest.raises(Refused, match="larger than 1,000,000 bytes"):
        files.examine(tmp_path / "large", Limits(1_000_000, 1))


@pytest.mark.parametrize(
    ("name", "mode", "kind"),
    [("a.jpg", "RGB", "JPEG"), ("a.png", "RGBA", "PNG"), ("a.gif", "P", "JPEG"), ("a.webp", "L", "JPEG")],
)
def test_thumbnails_fit_their_size_and_keep_proportions(tmp_path: Path, name: str, mode: str, kind: str) -> None:
    made = files.thumbnails(image(tmp_path / name, (400, 200), mode), tmp_path / "out", [50, 100], LIMITS)
    for side, path in made.items():
        with Image.open(path) as thumbnail:
            assert thumbnail.size == (side, side // 2)
            assert thumbnail.format == kind
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in made.values())


def test_a_small_image_is_not_blown_up_and_a_turned_one_stands_upright_without_its_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    exif[0x010E] = "taken at home"
    made = files.thumbnails(image(tmp_path / "a.jpg", (80, 40), exif=exif), tmp_path / "out", [512], LIMITS)
    with Image.open(made[512]) as thumbnail:
        assert thumbnail.size == (40, 80)
        assert not thumbnail.getexif()


def bomb() -> bytes:
    """A small PNG that claims 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = (60_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    body = zlib.compress(b"\0" * 60_001 * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb())
    with pytest.raises(Refused, match="bomb|pixels"):
        files.examine(tmp_path / "bomb.png", LIMITS)
    with pytest.raises(Refused, match="more than 1,000,000 in all"):
        files.thumbnails(image(tmp_path / "large.png", (1500, 1000)), tmp_path / "out", [100], LIMITS)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp", "tiff"])
def test_a_truncated_image_is_refused_and_leaves_nothing_behind(tmp_path: Path, kind: str, keep: float) -> None:
    whole = image(tmp_path / f"whole.{kind}").read_bytes()
    broken = tmp_path / f"broken.{kind}"
    broken.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(Refused):
        files.thumbnails(broken, tmp_path / "out", [100], LIMITS)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_thumbnail_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = image(tmp_path / "a.jpg")
    first = files.thumbnails(picture, tmp_path / "out", [100], LIMITS)[100].read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        files.thumbnails(picture, tmp_path / "out", [100, 200], LIMITS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["100.jpg"]
    assert (tmp_path / "out" / "100.jpg").read_bytes() == first
