"""Who works: what is known of workers by their heartbeats, and which of them are dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from msgspec import Struct

BEAT_SECONDS: Final = 5.0
"""Between two heartbeats of a worker."""
DEAD_AFTER_SECONDS: Final = 3 * BEAT_SECONDS
"""A worker that has not been heard of for so long is dead: two of its heartbeats may be lost or late."""
FORGET_SECONDS: Final = 3600.0
"""What has ended, or died, is shown for so long."""


class WorkerBeat(Struct, frozen=True):
    """A worker's sign of life.

    Parameters:
        process: the process that it is in, unmistakably.
        running: false at the very last one.
        task_ids: what it has in hand.
    """

    worker_id: str
    process: str
    running: bool = True
    completed: int = 0
    failed: int = 0
    task_ids: tuple[str, ...] = ()


class WorkerStatus(Struct, frozen=True):
    """What is known of a worker.

    Parameters:
        seconds_ago: when it was heard of last.
        rate: tasks per second that it ended since it was heard of first.
    """

    beat: WorkerBeat
    seconds_ago: float
    rate: float
    dead: bool

    @property
    def health(self) -> str:
        """In a word: running, stopped, dead, or failing where more than half of its tasks fail."""
        if self.dead:
            return "dead"
        if not self.beat.running:
            return "stopped"
        return "failing" if self.beat.failed > self.beat.completed else "running"


class _Known(Struct):
    beat: WorkerBeat
    first_heard: float
    heard: float


class WorkerRegistry:
    """The workers that were heard of, in this process and in others. For any number of threads.

    Parameters:
        dead_after: seconds of silence that a living worker never keeps.
        clock: gives seconds; tests turn it.
    """

    def __init__(self, *, dead_after: float = DEAD_AFTER_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.dead_after: Final = dead_after
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], _Known] = {}

    def heard(self, beat: WorkerBeat) -> None:
        """A worker gave a sign of life."""
        now, key = self._clock(), (beat.process, beat.worker_id)
        with self._lock:
            first = self._known[key].first_heard if key in self._known else now
            self._known[key] = _Known(beat, first, now)
            for old in [key for key, known in self._known.items() if now - known.heard > FORGET_SECONDS]:
                del self._known[old]

    def workers(self) -> list[WorkerStatus]:
        """All workers, by name."""
        now = self._clock()
        with self._lock:
            known = list(self._known.values())
        return sorted((self._status(each, now) for each in known), key=lambda status: status.beat.worker_id)

    def dead(self) -> list[WorkerStatus]:
        """The workers that went silent without having stopped."""
        return [status for status in self.workers() if status.dead]

    def _status(self, known: _Known, now: float) -> WorkerStatus:
        silence = now - known.heard
        lifetime = known.heard - known.first_heard
        rate = (known.beat.completed + known.beat.failed) / lifetime if lifetime > 0 else 0.0
        return WorkerStatus(known.beat, silence, rate, known.beat.running and silence > self.dead_after)
