"""Filters: what each does to an image, how expressions name them, and what a pipeline says about its steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageStat

import examples.images
from examples.images import (
    BlurFilter,
    BrightnessFilter,
    ContrastFilter,
    EdgesFilter,
    Filter,
    FilterError,
    FilterPipeline,
    GrayscaleFilter,
    ResizeFilter,
    SharpenFilter,
    ThumbnailFilter,
    parse_filters,
)
from examples.images.filters import EXAMPLES, FILTERS

EVERY: list[Filter] = [
    BlurFilter(),
    BrightnessFilter(),
    ContrastFilter(),
    EdgesFilter(),
    GrayscaleFilter(),
    ResizeFilter(30, 20),
    SharpenFilter(),
    ThumbnailFilter(16),
]


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.effect_noise(size, 80).convert(mode)


def spread(image: Image.Image) -> float:
    return ImageStat.Stat(image.convert("L")).stddev[0]


def brightness(image: Image.Image) -> float:
    return ImageStat.Stat(image.convert("L")).mean[0]


def test_every_public_name_is_there() -> None:
    for name in examples.images.__all__:
        assert getattr(examples.images, name)


def test_each_filter_does_what_its_name_says() -> None:
    image = noise()
    assert spread(BlurFilter(radius=3).apply(image)) < spread(image) / 2
    assert brightness(BrightnessFilter(factor=1.3).apply(image)) > brightness(image) > 0
    assert brightness(BrightnessFilter(factor=0).apply(image)) == 0
    assert spread(ContrastFilter(factor=0.5).apply(image)) < spread(image)
    assert GrayscaleFilter().apply(image).mode == "L"
    assert spread(SharpenFilter(factor=3).apply(image)) > spread(image)
    assert ResizeFilter(30, 20).apply(image).size == (30, 20)
    assert ThumbnailFilter(16).apply(image).size == (16, 12)
    assert ThumbnailFilter(1000).apply(image).size == image.size


def test_edges_are_bright_where_something_changes_and_black_where_nothing_does() -> None:
    image = Image.new("L", (40, 40), 0)
    image.paste(255, (20, 0, 40, 40))
    edges = EdgesFilter().apply(image)
    assert edges.getpixel((20, 20)) == 255
    assert edges.getpixel((5, 20)) == 0


@pytest.mark.parametrize("each", EVERY, ids=lambda each: each.name)
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_every_filter_takes_every_plain_mode_and_leaves_the_original_alone(each: Filter, mode: str) -> None:
    image = noise(mode)
    before = image.tobytes()
    filtered = each.apply(image)
    assert filtered.mode in {"L", "LA", "RGB", "RGBA"}
    assert filtered.mode.endswith("A") == mode.endswith("A")
    assert image.tobytes() == before


@pytest.mark.parametrize("each", [EdgesFilter(), SharpenFilter(), ContrastFilter(), BrightnessFilter()])
def test_what_is_transparent_stays_transparent(each: Filter) -> None:
    image = noise("RGBA")
    alpha = Image.linear_gradient("L").resize(image.size)
    image.putalpha(alpha)
    assert each.apply(image).getchannel("A").tobytes() == alpha.tobytes()


def test_an_expression_names_filters_and_their_parameters() -> None:
    pair: list[Filter] = [BlurFilter(3), BrightnessFilter(1.3)]
    assert parse_filters("blur:3,brightness:1.3") == pair
    three: list[Filter] = [GrayscaleFilter(), ResizeFilter(800, 600), ThumbnailFilter()]
    assert parse_filters(" Grayscale , resize: 800X600,thumbnail ") == three


def test_every_filter_can_be_named_and_its_example_works() -> None:
    assert set(EXAMPLES) == set(FILTERS) == {each.name for each in EVERY}
    assert [each.name for each in parse_filters(",".join(EXAMPLES.values()))] == list(EXAMPLES)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "'' lacks a filter; say some such as blur:3, brightness:1.3"),
        (" , ", "lacks a filter"),
        ("blur:3,", "'blur:3,' lacks a filter"),
        (":3", "lacks a filter"),
        ("blurr:3", "there is no filter 'blurr'; there are: blur,"),
        ("blur:much", "'much' is not what blur takes, such as blur:3"),
        ("blur:", "its parameter is missing"),
        ("blur:-1", "radius is a number from 0 to 1000, not -1"),
        ("blur:nan", "radius is a number"),
        ("brightness:inf", "factor is a number"),
        ("grayscale:2", "'2' is not what grayscale takes, such as grayscale"),
        ("resize:800", "such as resize:800x600"),
        ("resize", "such as resize:800x600"),
        ("resize:0x10", "width is a number from 1 to 20000, not 0"),
        ("thumbnail:1e3", "such as thumbnail:256"),
    ],
)
def test_an_expression_that_makes_no_sense_is_refused_in_words(expression: str, said: str) -> None:
    with pytest.raises(FilterError, match=said):
        parse_filters(expression)


@given(st.text(max_size=30))
def test_whatever_the_expression_it_is_filters_or_an_error_in_words(expression: str) -> None:
    try:
        assert all(each.name in FILTERS for each in parse_filters(expression))
    except FilterError as error:
        assert str(error)


@pytest.mark.parametrize("radius", [-1, math.nan, math.inf, 5000])
def test_a_filter_with_an_impossible_parameter_cannot_be_made(radius: float) -> None:
    with pytest.raises(FilterError):
        BlurFilter(radius)


def test_a_pipeline_applies_its_filters_in_order_and_reports_the_time_of_each_step() -> None:
    pipeline = FilterPipeline([BlurFilter(radius=3), BrightnessFilter(factor=1.3), ThumbnailFilter(10)])
    filtered = pipeline.apply(noise())
    assert [step.name for step in filtered.steps] == ["blur", "brightness", "thumbnail"]
    assert all(step.seconds >= 0 for step in filtered.steps)
    assert filtered.image.size == (10, 8)
    assert FilterPipeline("blur:3,brightness:1.3,thumbnail:10").filters == pipeline.filters


def test_a_filter_of_ones_own_is_as_good_as_any() -> None:
    class Invert:
        name = "invert"

        def apply(self, image: Image.Image) -> Image.Image:
            return image.point(lambda value: 255 - value)

    own: Any = Invert()
    filtered = FilterPipeline([own, own]).apply(noise("L"))
    assert [step.name for step in filtered.steps] == ["invert", "invert"]
