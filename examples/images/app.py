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


def process_image(
    source: Path, target: Path, filters: str, since: float, largest_pixels: int, context: Context | None = None
) -> Processed | None:
    """Process one image, and say after each step how far it is; None where that was done before. The task of what make_app makes.

    A message may come twice (its process died when the image was just finished): so it looks first.

    Parameters:
        since: Unix seconds; an older target was made with other filters.

    Raises:
        Refused: this image will not do, now or later.
        OSError: another time it may.
    """
    if is_made(source, target, since):
        return None
    pipeline = FilterPipeline(filters)
    if context is None:
        return process_file(source, target, pipeline, largest_pixels=largest_pixels)
    steps = itertools.count(1)
    of = len(pipeline.filters) + LOAD_AND_SAVE

    def tell(step: Step) -> None:
        context.progress(next(steps), of, step.name)

    processed = process_file(source, target, pipeline, largest_pixels=largest_pixels, on_step=tell)
    return msgspec.structs.replace(processed, attempt=context.attempt)


ProcessImage = Task[[Path, Path, str, float, int], Processed | None]


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
