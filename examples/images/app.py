"""The image pipeline as a Conveyor application: one task, which runs on every core."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Final, NamedTuple, cast

import msgspec

from conveyor import Context, Conveyor, RetryPolicy, Task
from conveyor.errors import HandlerCrashed
from examples.images.files import Processed, Refused, is_made, process_file
from examples.images.filters import FilterPipeline, Step
from examples.images.settings import Settings
from examples.settings import from_environment

RETRY: Final = RetryPolicy(
    attempts=4,
    initial=0.5,
    maximum=30.0,
    # A refused image stays refused. A process that died was perhaps killed from outside, and so may be the next one.
    rules={Refused: None, HandlerCrashed: RetryPolicy(attempts=20, initial=0.1, maximum=5.0)},
)
LOAD_AND_SAVE: Final = 2
"""Steps beside the filters."""


class Recipe(msgspec.Struct, frozen=True):
    """What the images in an output folder are made with.

    Parameters:
        since: Unix seconds; an older image was made with another recipe.
        source: the folder of the originals.
    """

    filters: str
    since: float
    source: str = ""


class Outdated(Exception):
    """By now the output folder has another recipe, or is gone."""


def process_image(
    source: Path,
    target: Path,
    recipe: Recipe,
    largest_pixels: int,
    recipe_file: Path | None = None,
    context: Context | None = None,
) -> Processed | None:
    """Process one image, and say after each step how far it is; None where nothing is to be done. The task of what make_app makes.

    A message may come twice (its process died when the image was just finished), or long after its run was interrupted: so it
    looks first whether the image is there, and before it writes whether it is still wanted like this.

    Parameters:
        recipe_file: what holds for the output folder by now; an image of another recipe is not written, nor one for a folder
            that is gone. Left out, it is always wanted.

    Raises:
        Refused: this image will not do, now or later.
        OSError: another time it may.
    """
    if not wanted(recipe, recipe_file) or is_made(source, target, recipe.since):
        return None
    pipeline = FilterPipeline(recipe.filters)
    steps = itertools.count(1)
    of = len(pipeline.filters) + LOAD_AND_SAVE

    def tell(step: Step) -> None:
        if not wanted(recipe, recipe_file):
            raise Outdated
        if context is not None:
            context.progress(next(steps), of, step.name)

    try:
        processed = process_file(source, target, pipeline, largest_pixels=largest_pixels, on_step=tell)
    except Outdated:
        return None
    return processed if context is None else msgspec.structs.replace(processed, attempt=context.attempt)


def wanted(recipe: Recipe, recipe_file: Path | None) -> bool:
    """Whether the output folder is still there, and its recipe is still this one."""
    return recipe_file is None or recipe_by_now(recipe_file) == recipe


def recipe_by_now(file: Path) -> Recipe | None:
    """The recipe of an output folder; None where it has none."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Recipe)
    except FileNotFoundError:
        return None


ProcessImage = Task[[Path, Path, Recipe, int, Path], Processed | None]


class Images(NamedTuple):
    """An application, and its task."""

    app: Conveyor
    process: ProcessImage


def make_app(settings: Settings, broker: str | None = None, journal: bool | Path | None = None) -> Images:
    """An application with these settings.

    Parameters:
        broker: a URL; left out, $CONVEYOR_BROKER, else a SQLite file in this folder.
        journal: whether, or where, a journal is kept; left out, as $CONVEYOR_JOURNAL says.
    """
    app = Conveyor("images", broker=broker, journal=journal)
    task = app.task(cpu=True, concurrency=settings.processes, timeout=settings.timeout, retry=RETRY)(process_image)
    return Images(app, cast("ProcessImage", task))


app, process = make_app(from_environment(Settings), journal=True)
"""For ``conveyor run examples.images.app:app``, which also helps others who process a folder on the same broker."""
