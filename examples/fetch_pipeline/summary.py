"""What the processing worker computes: a summary of readings."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC
from typing import Final

from examples.fetch_pipeline.messages import Reading, Summary

DAY_SECONDS: Final = 86_400.0
PLACES: Final = 6
"""More would be noise of the arithmetic."""


def summarise(readings: Sequence[Reading]) -> Summary:
    """Sum up readings, in any order.

    Raises:
        ValueError: none of them has a value.
    """
    measured = [(reading.at, reading.value) for reading in readings if reading.value is not None]
    if not measured:
        raise ValueError("there is no reading with a value in it")
    values = [value for _, value in measured]
    days: defaultdict[str, list[float]] = defaultdict(list)
    for at, value in measured:
        days[at.astimezone(UTC).date().isoformat()].append(value)
    several = len(values) > 1
    twentieths = statistics.quantiles(values, n=20, method="inclusive") if several else [values[0]] * 19
    return Summary(
        count=len(values),
        missing=len(readings) - len(values),
        least=min(values),
        most=max(values),
        mean=_rounded(statistics.fmean(values)),
        median=_rounded(statistics.median(values)),
        deviation=_rounded(statistics.stdev(values)) if several else 0.0,
        low=_rounded(twentieths[0]),
        high=_rounded(twentieths[-1]),
        trend=_rounded(_slope([at.timestamp() / DAY_SECONDS for at, _ in measured], values)),
        days={day: _rounded(statistics.fmean(found)) for day, found in sorted(days.items())},
    )


def _slope(at: Sequence[float], values: Sequence[float]) -> float:
    if len(set(at)) < 2:
        return 0.0  # at one moment there is no trend
    start = min(at)  # small numbers keep their digits
    return statistics.linear_regression([moment - start for moment in at], values).slope


def _rounded(value: float) -> float:
    return round(value, PLACES)
