"""What the processing worker computes."""

from __future__ import annotations

import statistics
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.fetch_pipeline.messages import Reading
from examples.fetch_pipeline.summary import summarise

START = datetime(2026, 10, 1, tzinfo=UTC)


def hourly(*values: float | None) -> list[Reading]:
    return [Reading(START + timedelta(hours=hour), value) for hour, value in enumerate(values)]


def test_a_summary_of_two_days() -> None:
    found = summarise(hourly(*[10.0] * 24, *[22.0] * 24, None))
    assert (found.count, found.missing) == (48, 1)
    assert (found.least, found.most, found.mean, found.median) == (10.0, 22.0, 16.0, 16.0)
    assert (found.low, found.high) == (10.0, 22.0)
    assert found.deviation == round(statistics.stdev([10.0] * 24 + [22.0] * 24), 6)
    assert found.days == {"2026-10-01": 10.0, "2026-10-02": 22.0}


def test_the_trend_is_what_the_values_gain_in_a_day() -> None:
    assert summarise(hourly(*[hour / 24 for hour in range(72)])).trend == 1.0
    assert summarise(hourly(5.0, 5.0, 5.0)).trend == 0.0
    assert summarise([Reading(START, 1.0), Reading(START, 2.0)]).trend == 0.0


def test_one_reading_is_enough_and_none_is_not() -> None:
    found = summarise(hourly(7.5))
    assert (found.mean, found.deviation, found.low, found.high, found.trend) == (7.5, 0.0, 7.5, 7.5, 0.0)
    for nothing in (hourly(), hourly(None, None)):
        with pytest.raises(ValueError, match="no reading with a value"):
            summarise(nothing)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_the_figures_are_in_order_and_the_order_of_the_readings_does_not_matter(values: list[float]) -> None:
    readings = hourly(*values)
    found = summarise(readings)
    near = 1e-5
    assert found.least - near <= found.low <= found.median + near
    assert found.median - near <= found.high <= found.most + near
    assert found.least - near <= found.mean <= found.most + near
    other = summarise(readings[::-1])
    assert (other.count, other.median, other.days.keys()) == (found.count, found.median, found.days.keys())
