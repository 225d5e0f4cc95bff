"""The report: right in its figures, and bounded in its size."""

from __future__ import annotations

import io
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from examples.images import Processed, Step
from examples.images.report import EXAMPLES, FAILURES, SAMPLE, Report, StepTimes


def times_of(seconds: list[float]) -> StepTimes:
    times = StepTimes()
    for each in seconds:
        times.add(each)
    return times


def processed(seconds: float) -> Processed:
    return Processed("a", "b", 4000, 3000, (Step("load", seconds), Step("blur", seconds)), 2 * seconds, 1)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_the_percentile_is_what_so_many_do_not_exceed(seconds: list[float]) -> None:
    times = times_of(seconds)
    p95 = times.percentile(0.95)
    assert p95 in seconds
    assert sum(each <= p95 for each in seconds) >= 0.95 * len(seconds)
    assert sum(each < p95 for each in seconds) < 0.95 * len(seconds)
    assert times.percentile(1.0) == max(seconds)


def test_the_percentile_of_hundred_is_the_ninety_fifth() -> None:
    times = times_of([float(number) for number in range(1, 101)])
    assert (times.count, times.mean, times.percentile(0.95)) == (100, 50.5, 95.0)


def test_a_report_of_very_many_images_does_not_grow_and_stays_about_right() -> None:
    report = Report()
    for number in range(5 * SAMPLE):
        report.add(Path(str(number)), processed(number % 1000 / 1000))
        report.add_failure(Path(str(number)), "broken", "1")
    load = report.steps["load"]
    assert load.count == 5 * SAMPLE
    assert abs(load.percentile(0.95) - 0.95) < 0.03
    assert len(load._sample) == SAMPLE
    assert (len(report.failures), report.failed) == (FAILURES, 5 * SAMPLE)
    assert len(report.examples) == EXAMPLES
    assert max(int(str(path)) for path in report.examples) > SAMPLE


def test_a_report_tells_people_what_they_want_to_know() -> None:
    report = Report()
    report.add(Path("a.jpg"), processed(0.1))
    report.add_before(Path("b.jpg"))
    report.add_unseen(Path("e.jpg"), 2_000_000)
    report.add_failure(Path("[c].jpg"), "c.jpg is [broken]", "id-1")
    report.add_failure(Path("d.jpg"), "d.jpg is broken", "id-2")
    for number in range(30):
        report.add_left_out(Path(f"{number}.txt"), "no image by its ending")
    report.add_left_out(Path("a\x1b[31m\n"), "holds the results of another run")
    report.seconds = 2.0
    out = io.StringIO()
    report.show(Console(file=out, width=200))
    said = out.getvalue()
    assert "blur" in said
    assert "100 ms" in said
    assert "2 processed in 2.0 s (1.0 images/s, 14 megapixels)\n1 done before, 2 failed" in said
    assert "how long 1 of the processed took was not heard: their steps are not in the table" in said
    assert "failed [c].jpg: c.jpg is [broken]\n    id id-1\n" in said
    assert "failed d.jpg: d.jpg is broken\n    id id-2\n" in said
    assert "left out: 0.txt, 1.txt" in said
    assert "19.txt and 10 more: no image by its ending" in said
    assert r"left out: a\x1b[31m\n: holds the results of another run" in said
    assert report.summary()["steps"]["blur"]["p95"] == 0.1
