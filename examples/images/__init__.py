"""Image processing: filters over Pillow, a task queue to use directly, workers of four kinds, and a command for folders."""

from __future__ import annotations

from examples.images.background import QueueClosed
from examples.images.files import Processed, Refused, load_image, process_file, save_image
from examples.images.filters import (
    BlurFilter,
    BrightnessFilter,
    ContrastFilter,
    EdgesFilter,
    Filter,
    Filtered,
    FilterError,
    FilterPipeline,
    GrayscaleFilter,
    ResizeFilter,
    SharpenFilter,
    Step,
    ThumbnailFilter,
    parse_filters,
)
from examples.images.registry import WorkerBeat, WorkerRegistry, WorkerStatus
from examples.images.tasks import CompletedTask, DeadTask, Stats, Task, TaskError, TaskLost, TaskQueue
from examples.images.workers import AsyncWorker, SimpleWorker, WorkerStats

__all__ = [  # noqa: RUF022 - by concept
    # filters
    "Filter",
    "BlurFilter",
    "BrightnessFilter",
    "ContrastFilter",
    "EdgesFilter",
    "GrayscaleFilter",
    "ResizeFilter",
    "SharpenFilter",
    "ThumbnailFilter",
    "FilterError",
    "parse_filters",
    # pipelines of them
    "FilterPipeline",
    "Filtered",
    "Step",
    # files
    "Processed",
    "Refused",
    "load_image",
    "save_image",
    "process_file",
    # a task queue
    "TaskQueue",
    "Task",
    "CompletedTask",
    "DeadTask",
    "Stats",
    "TaskError",
    "TaskLost",
    "QueueClosed",
    # workers
    "SimpleWorker",
    "AsyncWorker",
    "WorkerStats",
    "WorkerRegistry",
    "WorkerStatus",
    "WorkerBeat",
]
