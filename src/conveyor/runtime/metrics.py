"""What a process has done, in numbers: counted inline, sent as a snapshot, summed, and written for Prometheus."""

from __future__ import annotations

import copy
import os
import resource
import socket
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from conveyor.broker import QueueInfo
from conveyor.errors import MissingExtra

if TYPE_CHECKING:
    from prometheus_client.core import Metric

BOUNDS: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
    1800.0,
    3600.0,
)
"""Upper bounds (inclusive, seconds) of the histograms: from a handler that does next to nothing to a job of an hour."""
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""The media type of prometheus_text()."""


class Histogram(msgspec.Struct, omit_defaults=True):
    """How long something took, by BOUNDS; the last count is for what took longer."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total_seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total_seconds += seconds


class WorkerMetrics(msgspec.Struct, omit_defaults=True):
    """One worker's counters in one process. The runner changes them inline: ``metrics.received += 1``.

    Parameters:
        received: deliveries fetched.
        succeeded: settled as done, after the handler ran.
        failed: attempts that ended with an error, whatever became of the message.
        retried: settled for another attempt.
        dead: settled as a dead letter.
        duplicates: settled as done without an effect, because the ledger knew the message.
        released: handed back uncounted.
        cancelled: settled as done because somebody cancelled them, before they began or while they ran.
        lost_leases: settlements and heartbeats refused because the delivery belonged to somebody else by then.
        suspects: messages run alone because processes died while handling them.
        in_flight: received and not settled yet.
        duration: seconds that handlers ran.
        wait: seconds from when a message was due until its handler started.
    """

    received: int = 0
    succeeded: int = 0
    failed: int = 0
    retried: int = 0
    dead: int = 0
    duplicates: int = 0
    released: int = 0
    cancelled: int = 0
    lost_leases: int = 0
    suspects: int = 0
    in_flight: int = 0
    duration: Histogram = msgspec.field(default_factory=Histogram)
    wait: Histogram = msgspec.field(default_factory=Histogram)


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a process had done at one moment; nobody changes what it holds.

    Parameters:
        process: its name among its siblings.
        pid: 0 for a sum over processes.
        started: Unix seconds.
        resident_bytes: memory held now; 0 for processes that have ended.
        workers: counters by worker.
        published: messages published, emitted ones included.
        unrouted: published messages whose topic no queue receives.
        outbox_pending: outbox rows not handed to the broker yet; None where there is no ledger.
        outbox_parked: those of them that the broker refuses for good.
        deaths: processes that ended otherwise than asked.
        journal_dropped: entries of the journal that there was no room for.
    """

    process: str
    pid: int = 0
    started: float = 0.0
    resident_bytes: int = 0
    workers: dict[str, WorkerMetrics] = {}
    published: int = 0
    unrouted: int = 0
    outbox_pending: int | None = None
    outbox_parked: int | None = None
    deaths: int = 0
    journal_dropped: int = 0

    @property
    def received(self) -> int:
        """Deliveries fetched, over all workers."""
        return sum(worker.received for worker in self.workers.values())


def process_name(number: str | None = None) -> str:
    """What this process is called where several machines may take part: its host, and its number or, without one, its pid.

    Parameters:
        number: its number below its supervisor.
    """
    return f"{socket.gethostname()}/{number or os.getpid()}"


class Metrics:
    """The counters of this process.

    Parameters:
        process: its name among its siblings.
        clock: gives Unix seconds.
    """

    def __init__(self, process: str, *, clock: Callable[[], float] = time.time) -> None:
        self.process = process
        self.started = clock()
        self.workers: dict[str, WorkerMetrics] = {}
        self.published = 0
        self.unrouted = 0
        self.outbox_pending: int | None = None
        self.outbox_parked: int | None = None
        self.journal_dropped = 0

    def worker(self, name: str) -> WorkerMetrics:
        """The counters of one worker, always the same object."""
        return self.workers.setdefault(name, WorkerMetrics())

    def snapshot(self) -> Snapshot:
        """The state of now, for others to read."""
        return Snapshot(
            process=self.process,
            pid=os.getpid(),
            started=self.started,
            resident_bytes=resident_bytes(),
            workers=copy.deepcopy(self.workers),
            published=self.published,
            unrouted=self.unrouted,
            outbox_pending=self.outbox_pending,
            outbox_parked=self.outbox_parked,
            journal_dropped=self.journal_dropped,
        )


def resident_bytes(pid: int | None = None) -> int:
    """Memory that a process (this one, where pid is None) holds now; 0 where that cannot be known.

    Outside Linux: the most that this process ever held, 0 for others.
    """
    try:
        with open(f"/proc/{pid or 'self'}/statm", "rb") as statm:  # noqa: PTH123 - four times a second for every process: no Path
            return int(statm.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        if pid is not None:
            return 0
        unit = 1 if sys.platform == "darwin" else 1024  # what getrusage(2) counts in
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def ended(snapshot: Snapshot) -> Snapshot:
    """What remains to be counted of a process that has ended: what it did, not what it held."""
    workers = {name: msgspec.structs.replace(worker, in_flight=0) for name, worker in snapshot.workers.items()}
    held = {"outbox_pending": None, "outbox_parked": None}
    return msgspec.structs.replace(snapshot, pid=0, resident_bytes=0, workers=workers, **held)


def merge(snapshots: Iterable[Snapshot], *, process: str = "all") -> Snapshot:
    """The sum of some processes.

    The outbox is one table that each of them sees: the largest count stands.
    """
    snapshots = list(snapshots)
    workers: dict[str, WorkerMetrics] = {}
    for snapshot in snapshots:
        for name, worker in snapshot.workers.items():
            workers[name] = _add(workers.get(name, WorkerMetrics()), worker)
    return Snapshot(
        process=process,
        started=min((s.started for s in snapshots if s.started), default=0.0),
        resident_bytes=sum(s.resident_bytes for s in snapshots),
        workers=workers,
        published=sum(s.published for s in snapshots),
        unrouted=sum(s.unrouted for s in snapshots),
        outbox_pending=max((s.outbox_pending for s in snapshots if s.outbox_pending is not None), default=None),
        outbox_parked=max((s.outbox_parked for s in snapshots if s.outbox_parked is not None), default=None),
        deaths=sum(s.deaths for s in snapshots),
        journal_dropped=sum(s.journal_dropped for s in snapshots),
    )


def _add(one: WorkerMetrics, other: WorkerMetrics) -> WorkerMetrics:
    counts = {name: getattr(one, name) + getattr(other, name) for name in (*COUNTERS, "in_flight")}
    return WorkerMetrics(
        **counts, duration=_add_times(one.duration, other.duration), wait=_add_times(one.wait, other.wait)
    )


def _add_times(one: Histogram, other: Histogram) -> Histogram:
    return Histogram(
        [a + b for a, b in zip(one.counts, other.counts, strict=True)], one.total_seconds + other.total_seconds
    )


COUNTERS: Final = {
    "received": "Deliveries fetched from the broker.",
    "succeeded": "Messages whose handler succeeded.",
    "failed": "Attempts that ended with an error.",
    "retried": "Messages given back for another attempt.",
    "dead": "Messages that became dead letters.",
    "duplicates": "Messages that the ledger knew already; they had no effect.",
    "released": "Messages handed back uncounted.",
    "cancelled": "Messages let go because somebody cancelled them.",
    "lost_leases": "Settlements and heartbeats refused because the delivery belonged to somebody else.",
    "suspects": "Messages run alone because processes died while handling them.",
}
DEPTHS: Final = {
    "ready": "Messages that a worker could have now.",
    "in_flight": "Messages delivered and not settled.",
    "delayed": "Messages that are not due yet.",
    "dead": "Dead letters.",
}


def prometheus_text(
    snapshots: Sequence[Snapshot], queues: Sequence[QueueInfo], *, uptime_seconds: float | None = None
) -> bytes:
    """Everything in Prometheus' text format; its media type is CONTENT_TYPE.

    Parameters:
        snapshots: one for each live process, and the sum of those that ended (or counters would seem to run backwards).
        queues: as the broker tells; they may have been named by anyone.
        uptime_seconds: how long the application has been running, whatever became of its processes; None where nobody knows.

    Raises:
        MissingExtra: prometheus-client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.core import GaugeMetricFamily
    except ModuleNotFoundError as error:
        raise MissingExtra("/metrics", "metrics") from error

    class Collector:
        def collect(self) -> Iterator[Metric]:
            total = merge(snapshots)
            yield from _of_workers(total)
            yield from _of_queues(queues)
            yield from _of_processes(snapshots, total)
            if uptime_seconds is not None:
                yield GaugeMetricFamily(
                    "conveyor_uptime_seconds", "How long the application has been running.", value=uptime_seconds
                )

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return generate_latest(registry)


def _of_workers(total: Snapshot) -> Iterator[Metric]:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    for name, text in COUNTERS.items():
        counter = CounterMetricFamily(f"conveyor_messages_{name}", text, labels=["worker"])
        for worker, counts in total.workers.items():
            counter.add_metric([_label(worker)], getattr(counts, name))
        yield counter
    in_flight = GaugeMetricFamily(
        "conveyor_messages_in_flight", "Messages received and not settled.", labels=["worker"]
    )
    seconds = HistogramMetricFamily("conveyor_handler_seconds", "Time that handlers ran.", labels=["worker"])
    wait = HistogramMetricFamily(
        "conveyor_wait_seconds", "Time from when a message was due until its handler started.", labels=["worker"]
    )
    for worker, counts in total.workers.items():
        in_flight.add_metric([_label(worker)], counts.in_flight)
        seconds.add_metric([_label(worker)], _cumulative(counts.duration), counts.duration.total_seconds)
        wait.add_metric([_label(worker)], _cumulative(counts.wait), counts.wait.total_seconds)
    yield from (in_flight, seconds, wait)


def _of_queues(queues: Sequence[QueueInfo]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    for name, text in DEPTHS.items():
        depth = GaugeMetricFamily(f"conveyor_queue_{name}", text, labels=["queue"])
        for queue in queues:
            depth.add_metric([_label(queue.name)], getattr(queue, name))
        yield depth
    oldest = GaugeMetricFamily(
        "conveyor_queue_oldest_seconds", "How long the oldest ready message has been ready.", labels=["queue"]
    )
    for queue in queues:
        oldest.add_metric([_label(queue.name)], queue.oldest_seconds or 0.0)
    yield oldest
    consumers = GaugeMetricFamily(
        "conveyor_queue_consumers", "Live subscriptions, over all processes and machines.", labels=["queue"]
    )
    for queue in queues:
        if queue.consumers is not None:
            consumers.add_metric([_label(queue.name)], queue.consumers)
    yield consumers


def _of_processes(snapshots: Sequence[Snapshot], total: Snapshot) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    resident = GaugeMetricFamily("conveyor_process_resident_bytes", "Memory held by a process.", labels=["process"])
    started = GaugeMetricFamily(
        "conveyor_process_start_time_seconds", "When a process started, in Unix seconds.", labels=["process"]
    )
    for snapshot in snapshots:
        if snapshot.pid:
            resident.add_metric([_label(snapshot.process)], snapshot.resident_bytes)
            started.add_metric([_label(snapshot.process)], snapshot.started)
    yield from (resident, started)
    yield CounterMetricFamily(
        "conveyor_process_deaths", "Processes that ended otherwise than asked.", value=total.deaths
    )
    yield CounterMetricFamily(
        "conveyor_messages_published", "Messages published, emitted ones included.", value=total.published
    )
    yield CounterMetricFamily(
        "conveyor_messages_unrouted", "Published messages whose topic no queue receives.", value=total.unrouted
    )
    yield CounterMetricFamily(
        "conveyor_journal_dropped", "Entries of the journal that there was no room for.", value=total.journal_dropped
    )
    if total.outbox_pending is not None:
        yield GaugeMetricFamily(
            "conveyor_outbox_pending", "Outbox rows not handed to the broker yet.", value=total.outbox_pending
        )
    if total.outbox_parked is not None:
        yield GaugeMetricFamily(
            "conveyor_outbox_parked",
            "Outbox rows that the broker refuses for good; each holds up the later ones of its key.",
            value=total.outbox_parked,
        )


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    buckets: list[tuple[str, float]] = []
    so_far = 0
    for bound, count in zip((*BOUNDS, float("inf")), histogram.counts, strict=True):
        so_far += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), so_far))
    return buckets


def _label(text: str) -> str:
    """A name that anyone may have chosen, as UTF-8 can carry it; the client escapes what the format reserves."""
    return text.encode("utf-8", "backslashreplace").decode()
