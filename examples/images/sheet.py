"""The contact sheet: some images before and after, side by side, on one PNG."""

from __future__ import annotations

from collections.abc import Sequence
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


def contact_sheet(pairs: Sequence[tuple[Path, Path]], names: Sequence[str], sheet: Path, title: str) -> bool:
    """Write the sheet; gives whether there was anything to show.

    Parameters:
        pairs: each image before and after.
        names: what is written below each pair.
    """
    shown = []
    for (source, made), name in zip(pairs, names, strict=True):
        try:
            shown.append((_preview(source), _preview(made), name))
        except (Refused, OSError):
            continue  # removed meanwhile, perhaps; the others are worth seeing
    if not shown:
        return False
    across = min(PAIRS_ACROSS, len(shown))
    down = -(-len(shown) // across)
    pair_width, pair_height = 2 * CELL[0] + GAP // 2, CELL[1] + LINE
    size = (GAP + across * (pair_width + GAP), GAP + LINE + down * (pair_height + GAP))
    page = Image.new("RGB", size, GROUND)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    draw.text((GAP, GAP // 2), title, INK, ImageFont.load_default(18))
    for place, (before, after, name) in enumerate(shown):
        x = GAP + place % across * (pair_width + GAP)
        y = GAP + LINE + place // across * (pair_height + GAP)
        _centred(page, before, x, y)
        _centred(page, after, x + CELL[0] + GAP // 2, y)
        draw.text((x, y + CELL[1] + 4), _short(name), INK, font)
    save_image(page, sheet)
    return True


def _preview(path: Path) -> Image.Image:
    image = load_image(path, preview=CELL)
    image.thumbnail(CELL)
    return image.convert("RGBA")


def _centred(page: Image.Image, image: Image.Image, x: int, y: int) -> None:
    page.paste(image, (x + (CELL[0] - image.width) // 2, y + (CELL[1] - image.height) // 2), image)


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else "…" + name[1 - NAME_LENGTH :]
