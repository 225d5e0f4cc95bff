"""Filters over Pillow, what they are called in an expression such as ``blur:3,brightness:1.3``, and a pipeline of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Final, Protocol

from msgspec import Struct
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

LARGEST_SIDE: Final = 20_000
"""Pixels; what a filter makes shall fit into memory."""
LARGEST_RADIUS: Final = 1_000.0
LARGEST_FACTOR: Final = 100.0


class FilterError(ValueError):
    """A filter that cannot be: its name is unknown, or its parameter makes no sense; says what would."""


class Filter(Protocol):
    """Makes an image of an image, and leaves the one that it is given alone."""

    name: ClassVar[str]

    def apply(self, image: Image.Image) -> Image.Image:
        """The filtered image. It is given L, LA, RGB or RGBA, and gives one of these."""
        ...


class BlurFilter(Struct, frozen=True):
    """Gaussian blur.

    Parameters:
        radius: pixels.
    """

    name: ClassVar[str] = "blur"
    radius: float = 3.0

    def __post_init__(self) -> None:
        _within("blur", "radius", self.radius, 0, LARGEST_RADIUS)

    def apply(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(self.radius))


class BrightnessFilter(Struct, frozen=True):
    """Brighter (a factor above 1) or darker (below 1; 0 is black)."""

    name: ClassVar[str] = "brightness"
    factor: float = 1.3

    def __post_init__(self) -> None:
        _within("brightness", "factor", self.factor, 0, LARGEST_FACTOR)

    def apply(self, image: Image.Image) -> Image.Image:
        return ImageEnhance.Brightness(image).enhance(self.factor)


class ContrastFilter(Struct, frozen=True):
    """More contrast (a factor above 1) or less (below 1; 0 is grey)."""

    name: ClassVar[str] = "contrast"
    factor: float = 1.3

    def __post_init__(self) -> None:
        _within("contrast", "factor", self.factor, 0, LARGEST_FACTOR)

    def apply(self, image: Image.Image) -> Image.Image:
        return _colours_only(image, lambda colours: ImageEnhance.Contrast(colours).enhance(self.factor))


class GrayscaleFilter(Struct, frozen=True):
    """Shades of grey."""

    name: ClassVar[str] = "grayscale"

    def apply(self, image: Image.Image) -> Image.Image:
        return _colours_only(image, ImageOps.grayscale)


class EdgesFilter(Struct, frozen=True):
    """Bright edges on black."""

    name: ClassVar[str] = "edges"

    def apply(self, image: Image.Image) -> Image.Image:
        return _colours_only(image, lambda colours: colours.filter(ImageFilter.FIND_EDGES))


class SharpenFilter(Struct, frozen=True):
    """Sharper (a factor above 1), or softer (below 1)."""

    name: ClassVar[str] = "sharpen"
    factor: float = 2.0

    def __post_init__(self) -> None:
        _within("sharpen", "factor", self.factor, 0, LARGEST_FACTOR)

    def apply(self, image: Image.Image) -> Image.Image:
        return _colours_only(image, lambda colours: ImageEnhance.Sharpness(colours).enhance(self.factor))


class ResizeFilter(Struct, frozen=True):
    """Exactly this size, whatever the proportions were.

    Parameters:
        width: pixels.
        height: pixels.
    """

    name: ClassVar[str] = "resize"
    width: int
    height: int

    def __post_init__(self) -> None:
        _within("resize", "width", self.width, 1, LARGEST_SIDE)
        _within("resize", "height", self.height, 1, LARGEST_SIDE)

    def apply(self, image: Image.Image) -> Image.Image:
        return image.resize((self.width, self.height), Image.Resampling.LANCZOS)


class ThumbnailFilter(Struct, frozen=True):
    """Small enough for a square, in its own proportions; what is small already stays as it is.

    Parameters:
        size: the square's side, in pixels.
    """

    name: ClassVar[str] = "thumbnail"
    size: int = 256

    def __post_init__(self) -> None:
        _within("thumbnail", "size", self.size, 1, LARGEST_SIDE)

    def apply(self, image: Image.Image) -> Image.Image:
        small = image.copy()
        small.thumbnail((self.size, self.size), Image.Resampling.LANCZOS)
        return small


SAME_SIZE: Final = (BlurFilter, BrightnessFilter, ContrastFilter, GrayscaleFilter, EdgesFilter, SharpenFilter)


# --- expressions --------------------------------------------------------------------------------------------------------


def parse_filters(expression: str) -> list[Filter]:
    """The filters of an expression: names with commas between, each with its parameter behind a colon.

    Such as ``blur:3,brightness:1.3`` or ``grayscale,resize:800x600``; a parameter that is left out has its default.

    Raises:
        FilterError: there is none, a name is unknown, or a parameter makes no sense.
    """
    return [_parse_filter(part.strip(), expression) for part in expression.split(",")]


def _parse_filter(text: str, expression: str) -> Filter:
    name, colon, parameter = (part.strip() for part in text.partition(":"))
    if not name:
        raise FilterError(f"{expression!r} lacks a filter; say some such as {', '.join(EXAMPLES.values())}")
    build = FILTERS.get(name.lower())
    if build is None:
        raise FilterError(f"there is no filter {name!r}; there are: {', '.join(FILTERS)}")
    if colon and not parameter:
        raise FilterError(f"{text!r}: its parameter is missing behind the colon")
    try:
        return build(parameter)
    except FilterError:
        raise
    except ValueError as error:
        raise FilterError(
            f"{text!r}: {parameter!r} is not what {name} takes, such as {EXAMPLES[name.lower()]}"
        ) from error


def _resize(parameter: str) -> Filter:
    width, height = parameter.lower().split("x")
    return ResizeFilter(int(width), int(height))


def _plain(kind: Callable[[], Filter]) -> Callable[[str], Filter]:
    def build(parameter: str) -> Filter:
        if parameter:
            raise ValueError(parameter)
        return kind()

    return build


FILTERS: Final[dict[str, Callable[[str], Filter]]] = {
    "blur": lambda radius: BlurFilter(float(radius)) if radius else BlurFilter(),
    "brightness": lambda factor: BrightnessFilter(float(factor)) if factor else BrightnessFilter(),
    "contrast": lambda factor: ContrastFilter(float(factor)) if factor else ContrastFilter(),
    "grayscale": _plain(GrayscaleFilter),
    "edges": _plain(EdgesFilter),
    "sharpen": lambda factor: SharpenFilter(float(factor)) if factor else SharpenFilter(),
    "resize": _resize,
    "thumbnail": lambda size: ThumbnailFilter(int(size)) if size else ThumbnailFilter(),
}
"""What a filter is called in an expression, and how it is built from its parameter ("" where there is none)."""

EXAMPLES: Final = {
    "blur": "blur:3",
    "brightness": "brightness:1.3",
    "contrast": "contrast:1.3",
    "grayscale": "grayscale",
    "edges": "edges",
    "sharpen": "sharpen:2",
    "resize": "resize:800x600",
    "thumbnail": "thumbnail:256",
}


# --- a pipeline ---------------------------------------------------------------------------------------------------------


class Step(Struct, frozen=True):
    """One step of a pipeline, and the seconds that it took."""

    name: str
    seconds: float


class Filtered(Struct, frozen=True):
    """What a pipeline made of an image, and the time of each step."""

    image: Image.Image
    steps: tuple[Step, ...]


class FilterPipeline:
    """Filters that are applied in order; it is the same for any number of images and threads.

    Parameters:
        filters: a list of filters, or an expression such as ``blur:3,brightness:1.3``.

    Raises:
        FilterError: the expression makes no sense.
    """

    def __init__(self, filters: Sequence[Filter] | str) -> None:
        self.filters: Final = tuple(parse_filters(filters) if isinstance(filters, str) else filters)

    def apply(self, image: Image.Image, on_step: Callable[[Step], object] = lambda _: None) -> Filtered:
        """Apply every filter, and time it.

        Parameters:
            on_step: called after each filter.
        """
        steps = []
        for each in self.filters:
            started = time.perf_counter()
            image = each.apply(image)
            steps.append(Step(each.name, time.perf_counter() - started))
            on_step(steps[-1])
        return Filtered(image, tuple(steps))

    def size_of(self, width: int, height: int) -> tuple[int, int] | None:
        """How large what it makes of an image of this size is, in pixels; None where a filter of somebody's making decides."""
        for each in self.filters:
            if isinstance(each, ResizeFilter):
                width, height = each.width, each.height
            elif isinstance(each, ThumbnailFilter):
                scale = min(1.0, each.size / max(width, height))
                width, height = round(width * scale), round(height * scale)
            elif not isinstance(each, SAME_SIZE):
                return None
        return width, height

    def __repr__(self) -> str:
        return f"FilterPipeline({list(self.filters)!r})"


def _colours_only(image: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Change what is seen, not how transparent it is."""
    if not image.mode.endswith("A"):
        return change(image)
    changed = change(image.convert(image.mode[:-1]))
    changed.putalpha(image.getchannel("A"))
    return changed


def _within(filter_name: str, parameter: str, value: float, least: float, most: float) -> None:
    if not (least <= value <= most):  # said so that NaN is refused
        raise FilterError(f"{filter_name}: {parameter} is a number from {least:g} to {most:g}, not {value!r}")
