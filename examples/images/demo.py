"""The demonstrations: 3 images in sequence, 6 in an event loop, 12 on 3 workers. They make their own pictures when given none."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from examples.images.files import FORMATS
from examples.images.filters import FilterPipeline
from examples.images.folder import FolderError
from examples.images.pictures import make_photographs
from examples.images.sheet import contact_sheet
from examples.images.tasks import TaskQueue
from examples.images.workers import AsyncWorker, SimpleWorker

FILTERS: Final = "blur:6,contrast:1.6,brightness:1.3"
SIZE: Final = (2400, 1800)
"""Large enough that the filters are what takes the time."""
AT_ONCE: Final = 3
WORKERS: Final = 3
FASTER: Final = 1.2
"""Times as fast; less is within what two runs of the same differ by."""


class Timed(Struct, frozen=True):
    """How long something took.

    Parameters:
        seconds: on the clock.
        busy: seconds that this process' threads computed in meanwhile, all together.
    """

    seconds: float
    busy: float

    @property
    def cores(self) -> float:
        """How many cores it kept busy."""
        return self.busy / self.seconds


class Demonstrations:
    """Three ways to work off a task queue.

    Parameters:
        folder: where pictures are made, and results go.
        images: the user's own pictures; where there are none, some are made.
    """

    def __init__(self, folder: Path, images: Sequence[Path] = ()) -> None:
        self._folder = folder
        self._images = list(images)
        self._pipeline = FilterPipeline(FILTERS)

    def sequence(self) -> None:
        """3 images, one worker, one after the other."""
        with TaskQueue() as queue:
            print(f"{self._add(queue, 3, 'sequence')} images in sequence: one SimpleWorker")
            worker = SimpleWorker("worker-1", self._pipeline, queue)
            took = timed(worker.start)
            print(f"  {queue.get_stats()}\n  {worker.get_stats()}\n  {took.seconds:.2f} s\n")

    def concurrent(self) -> None:
        """6 images, one worker in an event loop, at most 3 at once."""
        with TaskQueue() as queue:
            count = self._add(queue, 6, "async")
            print(f"{count} images in an event loop: one AsyncWorker, at most {AT_ONCE} at once")
            worker = AsyncWorker("worker-1", self._pipeline, queue, max_concurrent=AT_ONCE)
            took = timed(lambda: asyncio.run(worker.start()))
            print(f"  {queue.get_stats()}\n  {worker.get_stats()}")
            print(f"  {took.seconds:.2f} s, {worker.most_at_once} at once\n")

    def workers(self) -> None:
        """12 images on 3 workers in threads, and how much faster that is than one."""
        alone, together = self._work_off("one", 1), self._work_off("three", WORKERS)
        print(f"  {compared(alone, together, len(os.sched_getaffinity(0)))}\n")

    def _work_off(self, name: str, count: int) -> Timed:
        with TaskQueue() as queue:
            print(f"{self._add(queue, 12, name)} images on {count} worker{'s' if count > 1 else ''} in threads")
            workers = [SimpleWorker(f"worker-{number}", self._pipeline, queue) for number in range(1, count + 1)]
            threads = [threading.Thread(target=worker.start) for worker in workers]

            def work() -> None:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

            took = timed(work)
            for worker in workers:
                print(f"  {worker.worker_id}: {worker.get_stats()}")
            print(f"  {queue.get_stats()}")
        return took

    def sheet(self) -> Path | None:
        """Every picture that was processed, before and after."""
        made = [path for name in ("sequence", "async", "three") for path in sorted((self._folder / name).glob("*"))]
        originals = {path.name: path for path in self._images or (self._folder / "pictures").glob("*")}
        pairs = {path.name: (originals[path.name], path) for path in made if path.name in originals}
        sheet = self._folder / "contact-sheet.png"
        return sheet if contact_sheet(list(pairs.values()), list(pairs), sheet, f"before and after {FILTERS}") else None

    def _add(self, queue: TaskQueue, count: int, name: str) -> int:
        """Add so many tasks, or as many as there are images; gives how many."""
        pictures = self._pictures(count)
        for picture in pictures:
            queue.add_task({"image_path": str(picture), "output_path": str(self._folder / name / picture.name)})
        return len(pictures)

    def _pictures(self, count: int) -> Sequence[Path]:
        return self._images[:count] if self._images else make_photographs(self._folder / "pictures", count, SIZE)


def images_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        FolderError: it has none.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in FORMATS and path.is_file())
    if not found:
        raise FolderError(f"there are no images in {folder}")
    return found


def timed(work: Callable[[], object]) -> Timed:
    """How long it takes."""
    started, computed = time.perf_counter(), time.process_time()
    work()
    return Timed(time.perf_counter() - started, time.process_time() - computed)


def compared(alone: Timed, together: Timed, cores: int) -> str:
    """How much faster several workers were than one, and, as far as it was measured, why.

    Parameters:
        cores: that this process may use.
    """
    faster = alone.seconds / together.seconds
    at_once = together.cores >= FASTER  # threads of one Python do that only where they have let go of its lock
    if faster >= FASTER and at_once:
        why = "they computed at the same time, because Pillow lets go of Python's lock in its filters"
    elif faster >= FASTER:
        why = "hardly at the same time; but other programs use the cores, and leave more of them to several threads"
    elif cores == 1:
        why = "there is one core, so they took turns"
    elif not at_once:
        why = "hardly at the same time: the cores were not theirs, or the images too small"
    else:
        why = f"at the same time, but it took {together.busy:.1f} s of computing instead of {alone.busy:.1f}: they were held up"
    return (
        f"one worker {alone.seconds:.2f} s, {WORKERS} workers {together.seconds:.2f} s: {faster:.2f} times as fast\n"
        f"  one kept {alone.cores:.1f} of {cores} cores busy, {WORKERS} kept {together.cores:.1f}: {why}"
    )
