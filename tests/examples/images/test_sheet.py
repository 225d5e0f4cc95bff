"""The contact sheet: its pictures, and names in any script."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageFont

from examples.images.pictures import make_photographs
from examples.images.sheet import contact_sheet, font_of, legible

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
