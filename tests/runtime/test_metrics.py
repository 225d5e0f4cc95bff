"""What is counted arrives in Prometheus as it was counted."""

from __future__ import annotations

import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from conveyor.broker import Queue, QueueInfo
from conveyor.errors import MissingExtra
from conveyor.runtime.metrics import (
    BOUNDS,
    COUNTERS,
    Histogram,
    Metrics,
    Snapshot,
    WorkerMetrics,
    ended,
    merge,
    prometheus_text,
)


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def queue(name: str, **values: float) -> QueueInfo:
    counts = {"ready": 0, "in_flight": 0, "delayed": 0, "dead": 0, "oldest_seconds": None, "consumers": None} | values
    declared = Queue(name=name)
    return QueueInfo(
        name=name,
        topics=(),
        ordered=declared.ordered,
        max_length=declared.max_length,
        temporary=declared.temporary,
        lease_seconds=declared.lease_seconds,
        **counts,  # type: ignore[arg-type] # test data
    )


@given(st.floats(min_value=0, max_value=1e6))
def test_an_observation_counts_in_the_first_bucket_that_holds_it(seconds: float) -> None:
    histogram = Histogram()
    histogram.observe(seconds)
    assert sum(histogram.counts) == 1
    place = histogram.counts.index(1)
    assert place == len(BOUNDS) or seconds <= BOUNDS[place]
    assert place == 0 or seconds > BOUNDS[place - 1]


counts = st.builds(
    WorkerMetrics,
    **{name: st.integers(0, 10**9) for name in (*COUNTERS, "in_flight")},
    duration=st.builds(
        Histogram, counts=st.lists(st.integers(0, 10**6), min_size=len(BOUNDS) + 1, max_size=len(BOUNDS) + 1)
    ),
)
snapshots = st.lists(
    st.builds(
        Snapshot,
        process=st.text(max_size=3),
        pid=st.integers(0, 9),
        resident_bytes=st.integers(0, 10**9),
        workers=st.dictionaries(st.sampled_from("abc"), counts),
        outbox_pending=st.none() | st.integers(0, 99),
        outbox_parked=st.none() | st.integers(0, 99),
        deaths=st.integers(0, 9),
        journal_dropped=st.integers(0, 9),
    ),
    max_size=4,
)


@given(snapshots, snapshots)
def test_a_sum_of_sums_is_the_sum_of_all(some: list[Snapshot], others: list[Snapshot]) -> None:
    assert merge([merge(some), merge(others)]) == merge([*some, *others])


@given(snapshots)
def test_a_snapshot_survives_the_wire_and_is_not_changed_by_a_sum(some: list[Snapshot]) -> None:
    sent = msgspec.json.encode(some)
    merge(some)
    assert msgspec.json.encode(some) == sent
    assert msgspec.json.decode(sent, type=list[Snapshot]) == some


def test_a_snapshot_stands_still_while_counting_goes_on() -> None:
    metrics = Metrics("1", clock=lambda: 5.0)
    metrics.worker("charge").received += 1
    taken = metrics.snapshot()
    metrics.worker("charge").received += 1
    metrics.worker("charge").duration.observe(0.1)
    assert taken.received == 1
    assert sum(taken.workers["charge"].duration.counts) == 0
    assert taken.started == 5.0
    assert taken.resident_bytes > 1_000_000


def test_counters_of_several_processes_arrive_as_one_sum() -> None:
    one, two = Metrics("1"), Metrics("2")
    one.worker("charge").received = 3
    two.worker("charge").received = 4
    two.worker("charge").in_flight = 2
    two.worker("charge").wait.observe(0.02)
    two.worker("charge").wait.observe(7000.0)
    one.journal_dropped, two.journal_dropped = 5, 6
    found = samples(prometheus_text([one.snapshot(), two.snapshot()], []))
    charge = ("worker", "charge")
    assert found["conveyor_messages_received_total", (charge,)] == 7
    assert found["conveyor_messages_in_flight", (charge,)] == 2
    assert found["conveyor_wait_seconds_bucket", (("le", "0.01"), charge)] == 0
    assert found["conveyor_wait_seconds_bucket", (("le", "0.025"), charge)] == 1
    assert found["conveyor_wait_seconds_bucket", (("le", "+Inf"), charge)] == 2
    assert found["conveyor_wait_seconds_count", (charge,)] == 2
    assert found["conveyor_wait_seconds_sum", (charge,)] == pytest.approx(7000.02)
    assert found["conveyor_process_resident_bytes", (("process", "2"),)] > 0
    assert found["conveyor_journal_dropped_total", ()] == 11


def test_counters_do_not_run_backwards_when_a_process_ends() -> None:
    metrics = Metrics("1")
    metrics.worker("charge").received = 3
    metrics.worker("charge").in_flight = 2
    metrics.outbox_pending, metrics.outbox_parked = 4, 1
    gone = merge([ended(metrics.snapshot())], process="ended")
    found = samples(prometheus_text([gone], []))
    assert found["conveyor_messages_received_total", (("worker", "charge"),)] == 3
    assert found["conveyor_messages_in_flight", (("worker", "charge"),)] == 0
    assert not [
        name
        for name, _ in found
        if name in {"conveyor_process_resident_bytes", "conveyor_outbox_pending", "conveyor_outbox_parked"}
    ]


def test_queues_show_their_depth_and_age() -> None:
    found = samples(
        prometheus_text(
            [], [queue("shop.charge", ready=7, in_flight=1, delayed=2, dead=3, oldest_seconds=1.5), queue("idle")]
        )
    )
    charge = (("queue", "shop.charge"),)
    assert [
        found[f"conveyor_queue_{name}", charge] for name in ("ready", "in_flight", "delayed", "dead", "oldest_seconds")
    ] == [7, 1, 2, 3, 1.5]
    assert found["conveyor_queue_oldest_seconds", (("queue", "idle"),)] == 0


def test_consumers_are_shown_where_the_broker_can_tell() -> None:
    found = samples(prometheus_text([], [queue("shop.charge", consumers=3), queue("unknown")]))
    assert {labels: value for (name, labels), value in found.items() if name == "conveyor_queue_consumers"} == {
        (("queue", "shop.charge"),): 3
    }


def test_the_time_since_the_start_is_shown_where_somebody_knows_it() -> None:
    assert samples(prometheus_text([], [], uptime_seconds=12.5))["conveyor_uptime_seconds", ()] == 12.5
    assert ("conveyor_uptime_seconds", ()) not in samples(prometheus_text([], []))


def test_the_outbox_is_counted_once_however_many_see_it() -> None:
    found = samples(
        prometheus_text(
            [Snapshot(process="1", outbox_pending=5, outbox_parked=2), Snapshot(process="2", outbox_pending=6)], []
        )
    )
    assert found["conveyor_outbox_pending", ()] == 6
    assert found["conveyor_outbox_parked", ()] == 2


@pytest.mark.parametrize("name", ['a"} 1\nconveyor_forged 1\n#', "a\\", "\ud800", "x\r\ny", "\0", "日本"])
def test_a_name_cannot_forge_a_metric(name: str) -> None:
    found = samples(prometheus_text([], [queue(name, ready=1)]))
    assert not [metric for metric, _ in found if "forged" in metric]
    assert sum(value for (metric, _), value in found.items() if metric == "conveyor_queue_ready") == 1


def test_every_metric_is_explained() -> None:
    metrics = Metrics("1")
    metrics.worker("charge")
    for family in text_string_to_metric_families(prometheus_text([metrics.snapshot()], [queue("q")]).decode()):
        assert family.documentation, family.name
        assert family.name.startswith("conveyor_")


def test_without_the_client_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtra, match=r"conveyor\[metrics\]"):
        prometheus_text([], [])
