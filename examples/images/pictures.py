"""Pictures made here, for demonstrations, benchmarks and tests: each looks different, and none is taken from anybody."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from examples.images.files import whole

TWELVE_MEGAPIXELS: Final = (4000, 3000)
SMALL: Final = (1200, 900)
SHAPES: Final = 24


def photograph(seed: int, size: tuple[int, int] = SMALL) -> Image.Image:
    """A landscape of sorts: a sky, shapes, soft and hard edges, and the grain of a sensor.

    Parameters:
        seed: the same number makes the same picture.
        size: width and height, in pixels.
    """
    dice = random.Random(seed)
    width, height = size
    small = (max(1, width // 4), max(1, height // 4))
    sky = Image.linear_gradient("L").resize(small)
    tops = [dice.randrange(60, 256) / 255 for _ in "RGB"]
    picture = Image.merge("RGB", [sky.point([int(value * top) for value in range(256)]) for top in tops])
    draw = ImageDraw.Draw(picture)
    for _ in range(SHAPES):
        x, y = dice.randrange(small[0]), dice.randrange(small[1])
        radius = dice.randrange(max(2, small[0] // 40), max(4, small[0] // 6))
        colour = tuple(dice.randrange(256) for _ in "RGB")
        box = (x - radius, y - radius // 2, x + radius, y + radius // 2)
        (draw.ellipse if dice.random() < 0.5 else draw.rectangle)(box, fill=colour)
    picture = picture.filter(ImageFilter.GaussianBlur(1)).resize(size, Image.Resampling.BICUBIC)
    grain = Image.effect_noise((256, 256), 24)
    tiled = Image.new("L", size)
    for x in range(0, width, 256):
        for y in range(0, height, 256):
            tiled.paste(grain, (x, y))
    return ImageChops.add(picture, Image.merge("RGB", [tiled] * 3), scale=1, offset=-128)


def make_photograph(folder: Path, size: tuple[int, int], number: int) -> Path:
    """Write a photograph as a JPEG file; one that is there already is left as it is."""
    path = folder / f"photo-{number:04d}.jpg"
    if not path.exists():
        with whole(path) as temporary:
            photograph(number, size).save(temporary, quality=90)
    return path


def make_photographs(folder: Path, count: int, size: tuple[int, int] = SMALL) -> Sequence[Path]:
    """Write so many photographs."""
    return [make_photograph(folder, size, number) for number in range(1, count + 1)]
