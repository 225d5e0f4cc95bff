"""The contact sheet: some images before and after, side by side, on one PNG."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from examples.images.files import Refused, load_image, save_image

CELL: Final = (320, 240)
GAP: Final = 16
LINE: Final = 26
PAIRS_ACROSS: Final = 2
GROUND: Final = (250, 250, 250)
INK: Final = (40, 40, 40)
NAME_LENGTH: Final = 60
FONTS: Final = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf")
"""The first of these that the machine has; the one in Pillow knows only ASCII."""
NOT_A_CHARACTER: Final = "\uffff"


def contact_sheet(
    pairs: Sequence[tuple[Path, Path]],
    names: Sequence[str],
    sheet: Path,
    title: str,
    on_missing: Callable[[str, Exception], object] = lambda _, __: None,
    *,
    of: int | None = None,
) -> int:
    """Write the sheet; gives how many pairs are on it. Without any, nothing is written.

    Parameters:
        pairs: each image before and after.
        names: what is written below each pair.
        on_missing: called with the name of a pair that cannot be shown, and why.
        of: how many pairs there are in all; left out, those that are given. The title says it where not all are shown.
    """
    shown = []
    for (source, made), name in zip(pairs, names, strict=True):
        try:
            shown.append((_preview(source), _preview(made), name))
        except (Refused, OSError) as error:  # removed meanwhile, perhaps; the others are worth seeing
            on_missing(name, error)
    if not shown:
        return 0
    across = min(PAIRS_ACROSS, len(shown))
    down = -(-len(shown) // across)
    pair_width, pair_height = 2 * CELL[0] + GAP // 2, CELL[1] + LINE
    size = (GAP + across * (pair_width + GAP), GAP + LINE + down * (pair_height + GAP))
    page = Image.new("RGB", size, GROUND)
    draw, font, title_font = ImageDraw.Draw(page), font_of(14), font_of(17)
    share = share_of(len(shown), len(pairs) if of is None else of)
    draw.text((GAP, GAP // 2), legible(f"{title}{share}", title_font), INK, title_font)
    for place, (before, after, name) in enumerate(shown):
        x = GAP + place % across * (pair_width + GAP)
        y = GAP + LINE + place // across * (pair_height + GAP)
        _centred(page, before, x, y)
        _centred(page, after, x + CELL[0] + GAP // 2, y)
        draw.text((x, y + CELL[1] + 4), _short(legible(name, font)), INK, font)
    save_image(page, sheet)
    return len(shown)


def share_of(shown: int, of: int) -> str:
    """How many of how many are shown, to be said behind a title; nothing where that is all of them."""
    return f", {shown} of {of} images" if shown < of else ""


def font_of(size: int) -> ImageFont.FreeTypeFont:
    """A font for names.

    Parameters:
        size: pixels.
    """
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow is built without FreeType"
    return font


def legible(text: str, font: ImageFont.FreeTypeFont) -> str:
    """A text in the characters that a font has: else without its accents, else as Python would spell it."""

    def shape(letter: str) -> bytes:
        return bytes(font.getmask(letter))

    unknown = shape(NOT_A_CHARACTER)

    def known(letter: str) -> bool:
        return letter.isprintable() and shape(letter) != unknown

    def spelled(letter: str) -> str:
        if known(letter):
            return letter
        plain = "".join(each for each in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(each))
        return plain if plain and all(map(known, plain)) else letter.encode("unicode_escape").decode()

    return "".join(spelled(letter) for letter in unicodedata.normalize("NFC", text))


def _preview(path: Path) -> Image.Image:
    image = load_image(path, preview=CELL)
    image.thumbnail(CELL)
    return image.convert("RGBA")


def _centred(page: Image.Image, image: Image.Image, x: int, y: int) -> None:
    page.paste(image, (x + (CELL[0] - image.width) // 2, y + (CELL[1] - image.height) // 2), image)


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else "…" + name[1 - NAME_LENGTH :]
