"""The image pipeline as a Conveyor application: one task, which runs on every core."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from conveyor import Conveyor, RetryPolicy, Task
from conveyor.errors import HandlerCrashed
from examples.images.files import Processed, Refused, process_file
from examples.images.filters import FilterPipeline
from examples.images.settings import Settings
from examples.settings import from_environment

RETRY: Final = RetryPolicy(
    attempts=4,
    initial=0.5,
    maximum=30.0,
    # A refused image stays refused. A process that died was perhaps killed from outside, and so may be the next one.
    rules={Refused: None, HandlerCrashed: RetryPolicy(attempts=20, initial=0.1, maximum=5.0)},
)


def process_image(source: Path, target: Path, filters: str, largest_pixels: int) -> Processed:
    """Process one image; it is a task of the applications that make_app makes.

    Raises:
        Refused: this image will not do, now or later.
        OSError: another time it may.
    """
    return process_file(source, target, FilterPipeline(filters), largest_pixels=largest_pixels)


def make_app(settings: Settings, broker: str | None = None) -> tuple[Conveyor, Task[[Path, Path, str, int], Processed]]:
    """An application, and its task.

    Parameters:
        broker: a URL; left out, $CONVEYOR_BROKER, else a SQLite file in this folder.
    """
    app = Conveyor("images", broker=broker)
    task = app.task(cpu=True, concurrency=settings.processes, timeout=settings.timeout, retry=RETRY)(process_image)
    return app, task


app, process = make_app(from_environment(Settings))
"""For ``conveyor run examples.images.app:app``."""
