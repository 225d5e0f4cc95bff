"""Who works: what is known of workers by their heartbeats, and which of them are dead."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from msgspec import Struct

BEAT_SECONDS: Final = 5.0
"""Between two heartbeats of a worker."""
DEAD_AFTER_SECONDS: Final = 3 * BEAT_SECONDS
"""A worker that has not been heard of for so long is dead: two of its heartbeats may be lost or late."""
RATE_SECONDS: Final = 60.0
"""A rate is that of so long a time at least, once it is known: between two heartbeats there may be no end of a task."""
FORGET_SECONDS: Final = 3600.0
"""What has ended, or died, is shown for so long."""


class WorkerBeat(Struct, frozen=True):
    """A worker's sign of life.

    Parameters:
        process: the process that it is in, unmistakably.
        running: false at the very last one.
        task_ids: what it has in hand.
        seconds: since its first one, by its own clock: what it did in a time is not what others heard of in that time.
    """

    worker_id: str
    process: str
    running: bool = True
    completed: int = 0
    failed: int = 0
    task_ids: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ended(self) -> int:
        """Tasks that it completed or gave up."""
        return self.completed + self.failed


class WorkerStatus(Struct, frozen=True):
    """What is known of a worker.

    Parameters:
        seconds_ago: when it was heard of last.
        rate: tasks per second that it ended in the last minute, or in its life as long as it was heard of only once.
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
    beats: deque[WorkerBeat]
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
            known = self._known.setdefault(key, _Known(deque(), now))
            if known.beats and (beat.seconds < known.beats[-1].seconds or beat.ended < known.beats[-1].ended):
                known.beats.clear()  # it is another worker of that name, or the same one that began again
            known.beats.append(beat)
            while len(known.beats) > 2 and beat.seconds - known.beats[1].seconds >= RATE_SECONDS:
                known.beats.popleft()
            known.heard = now
            for old in [key for key, known in self._known.items() if now - known.heard > FORGET_SECONDS]:
                del self._known[old]

    def workers(self) -> list[WorkerStatus]:
        """All workers, by name."""
        now = self._clock()
        with self._lock:
            found = [self._status(each, now) for each in self._known.values()]
        return sorted(found, key=lambda status: (status.beat.worker_id, status.beat.process))

    def dead(self) -> list[WorkerStatus]:
        """The workers that went silent without having stopped."""
        return [status for status in self.workers() if status.dead]

    def _status(self, known: _Known, now: float) -> WorkerStatus:
        silence, last = now - known.heard, known.beats[-1]
        return WorkerStatus(last, silence, rate_of(known.beats), last.running and silence > self.dead_after)


def rate_of(beats: Sequence[WorkerBeat]) -> float:
    """Tasks per second between the first and the last of a worker's heartbeats, or until the only one."""
    first, last = beats[0], beats[-1]
    if len(beats) == 1:
        return last.ended / last.seconds if last.seconds > 0 else 0.0
    seconds = last.seconds - first.seconds
    return (last.ended - first.ended) / seconds if seconds > 0 else 0.0
