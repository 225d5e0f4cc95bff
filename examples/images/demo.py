"""The demonstrations: 3 images in sequence, 6 in an event loop, 12 on 3 workers. They make their own pictures when given none."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

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
        print("3 images in sequence: one SimpleWorker")
        with TaskQueue() as queue:
            self._add(queue, 3, "sequence")
            worker = SimpleWorker("worker-1", self._pipeline, queue)
            seconds = timed(worker.start)
            print(f"  {queue.get_stats()}\n  {worker.get_stats()}\n  {seconds:.2f} s\n")

    def concurrent(self) -> None:
        """6 images, one worker in an event loop, at most 3 at once."""
        print(f"6 images in an event loop: one AsyncWorker, at most {AT_ONCE} at once")
        with TaskQueue() as queue:
            self._add(queue, 6, "async")
            worker = AsyncWorker("worker-1", self._pipeline, queue, max_concurrent=AT_ONCE)
            seconds = timed(lambda: asyncio.run(worker.start()))
            print(f"  {queue.get_stats()}\n  {worker.get_stats()}")
            print(f"  {seconds:.2f} s, {worker.most_at_once} at once\n")

    def workers(self) -> None:
        """12 images on 3 workers in threads, and how much faster that is than one."""
        print(f"12 images on {WORKERS} workers, after the same on one")
        alone, together = self._work_off("one", 1), self._work_off("three", WORKERS)
        print(f"  one worker {alone:.2f} s, {WORKERS} workers {together:.2f} s: {alone / together:.2f} times as fast\n")

    def _work_off(self, name: str, count: int) -> float:
        with TaskQueue() as queue:
            self._add(queue, 12, name)
            workers = [SimpleWorker(f"worker-{number}", self._pipeline, queue) for number in range(1, count + 1)]
            threads = [threading.Thread(target=worker.start) for worker in workers]

            def work() -> None:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

            seconds = timed(work)
            for worker in workers:
                print(f"  {worker.worker_id}: {worker.get_stats()}")
            print(f"  {queue.get_stats()}")
        return seconds

    def sheet(self) -> Path | None:
        """Every picture that was processed, before and after."""
        made = [path for name in ("sequence", "async", "three") for path in sorted((self._folder / name).glob("*"))]
        originals = {path.name: path for path in self._images or (self._folder / "pictures").glob("*")}
        pairs = {path.name: (originals[path.name], path) for path in made if path.name in originals}
        sheet = self._folder / "contact-sheet.png"
        return sheet if contact_sheet(list(pairs.values()), list(pairs), sheet, f"before and after {FILTERS}") else None

    def _add(self, queue: TaskQueue, count: int, name: str) -> None:
        for picture in self._pictures(count):
            queue.add_task({"image_path": str(picture), "output_path": str(self._folder / name / picture.name)})

    def _pictures(self, count: int) -> Sequence[Path]:
        return self._images[:count] if self._images else make_photographs(self._folder / "pictures", count, SIZE)


def images_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        FolderError: it has none.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in FORMATS)
    if not found:
        raise FolderError(f"there are no images in {folder}")
    return found


def timed(work: Callable[[], object]) -> float:
    """The seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
