"""The contact sheet: its pictures, and names in any script."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageFont

from examples.images.pictures import make_photographs
from examples.images.sheet import contact_sheet, font_of, legible, share_of

ASCII: ImageFont.FreeTypeFont | ImageFont.ImageFont = ImageFont.load_default(14)
"""What is in Pillow knows nothing else."""


def test_a_name_is_legible_whatever_the_font_has() -> None:
    assert isinstance(ASCII, ImageFont.FreeTypeFont)
    assert legible("holiday-1.jpg", ASCII) == "holiday-1.jpg"
    assert legible("Münster über Åland.jpg", ASCII) == "Munster uber Aland.jpg"
    assert legible("u\u0308.jpg", ASCII) == "u.jpg"  # as macOS writes it
    assert legible("日本 Ж.jpg", ASCII) == r"\u65e5\u672c \u0416.jpg"
    assert legible("a\nb\udcff.jpg", ASCII) == r"a\nb\udcff.jpg"


def test_names_are_written_below_their_pictures(tmp_path: Path) -> None:
    pair = (make_photographs(tmp_path, 1, (90, 60))[0],) * 2

    def sheet_of(*names: str) -> Image.Image:
        assert contact_sheet([pair] * len(names), names, tmp_path / "sheet.png", "über")
        with Image.open(tmp_path / "sheet.png") as sheet:
            sheet.load()
            return sheet

    assert sheet_of("ü.jpg").tobytes() == sheet_of(legible("ü.jpg", font_of(14))).tobytes()
    assert sheet_of("ü.jpg").tobytes() != sheet_of("x.jpg").tobytes()
    assert sheet_of("a.jpg", "日本.jpg", "c.jpg").width > sheet_of("a.jpg").width


def test_without_pictures_there_is_no_sheet(tmp_path: Path) -> None:
    missing = (tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert not contact_sheet([missing], ["a.jpg"], tmp_path / "sheet.png", "nothing")
    assert not (tmp_path / "sheet.png").exists()


def test_a_sheet_with_some_of_the_images_says_how_many_of_how_many(tmp_path: Path) -> None:
    pair = (make_photographs(tmp_path, 1, (90, 60))[0],) * 2

    def title_of(title: str, of: int | None = None) -> bytes:
        assert contact_sheet([pair] * 2, ["a.jpg", "b.jpg"], tmp_path / "sheet.png", title, of=of) == 2
        with Image.open(tmp_path / "sheet.png") as sheet:
            return sheet.crop((0, 0, sheet.width, 40)).tobytes()

    assert title_of("before and after", of=24) == title_of("before and after, 2 of 24 images")
    assert title_of("before and after", of=2) == title_of("before and after")
    assert (share_of(12, 24), share_of(24, 24)) == (", 12 of 24 images", "")


def test_a_pair_that_cannot_be_shown_is_not_counted_on_the_sheet(tmp_path: Path) -> None:
    pair = (make_photographs(tmp_path, 1, (90, 60))[0],) * 2
    missing = (tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert contact_sheet([pair, missing], ["a.jpg", "b.jpg"], tmp_path / "sheet.png", "before and after") == 1
