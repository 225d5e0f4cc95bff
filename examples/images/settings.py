"""The settings of the application that processes folders."""

from __future__ import annotations

import os
from typing import Annotated, Final

import msgspec

from examples.settings import setting

CORES: Final = os.cpu_count() or 1


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How images are processed; ``python -m examples.images process --help`` shows it."""

    processes: Annotated[
        int,
        setting("images processed at once, each in a process of its own", variable="IMAGES_PROCESSES", ge=1, le=256),
    ] = CORES
    timeout: Annotated[
        float, setting("seconds that one image may take", variable="IMAGES_TIMEOUT", gt=0, le=86_400)
    ] = 300.0
    largest_megapixels: Annotated[
        int,
        setting(
            "larger images are refused: they could be decompression bombs",
            variable="IMAGES_LARGEST_MEGAPIXELS",
            ge=1,
            le=170,
        ),
    ] = 80
