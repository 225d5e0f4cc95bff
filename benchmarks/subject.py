"""What is measured: subjects, each in a process of its own, gathered in measurements that are read side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

LEAST: Final = 5


@dataclass(frozen=True, slots=True)
class Load:
    """How much a subject has to do.

    Parameters:
        messages: so many are carried and timed.
        ready: so many wait in the queue before it begins.
        delayed: so many more wait there that are not due yet.
    """

    messages: int
    ready: int = 0
    delayed: int = 0

    def scaled(self, scale: float) -> Load:
        """The same load, larger or smaller; something is always left to measure."""
        least = max(LEAST, int(self.messages * scale))
        return Load(least, max(least, int(self.ready * scale)) if self.ready else 0, int(self.delayed * scale))


@dataclass(frozen=True, slots=True)
class Figure:
    """A kind of result.

    Parameters:
        unit: what the number counts.
        digits: so many behind the point.
    """

    unit: str
    digits: int = 0


FIGURES: Final[Mapping[str, Figure]] = {
    "rate": Figure("/s"),
    "cpu": Figure("µs CPU each", 1),
    "median": Figure("ms median", 2),
    "p99": Figure("ms 99th percentile", 2),
    "rss": Figure("MB RSS", 1),
    "pss": Figure("MB PSS", 1),
    "import": Figure("ms", 1),
}


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should reach, or what the measurement's first subject should reach beside it.

    Parameters:
        share: so much of the first subject's figure, or more.
        first_at_least: the first subject's figure is at least so many times this one.
        first_at_most: it is at most so many times this one.
    """

    at_least: float | None = None
    at_most: float | None = None
    share: float | None = None
    first_at_least: float | None = None
    first_at_most: float | None = None

    def met(self, value: float, first: float) -> bool:
        """Whether a value is good enough, beside the first subject's."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.share is None or value >= self.share * first)
            and (self.first_at_least is None or first >= self.first_at_least * value)
            and (self.first_at_most is None or first <= self.first_at_most * value)
        )

    def __str__(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:,.0f}"
        if self.first_at_least is not None:
            return f"first ≥ {self.first_at_least:g} × this"
        if self.first_at_most is not None:
            return f"first ≤ {self.first_at_most:g} × this"
        return f"< {self.at_most:,.0f}" if self.at_most is not None else f"≥ {self.share:.2f} ×"


@dataclass(frozen=True, slots=True)
class Subject:
    """One thing that is measured.

    Parameters:
        name: what it is, unique in its measurement.
        measure: ``module:function`` in this package, so that a process imports only what it measures. The function takes a folder
            of its own, or the URL of the measurement's server, and the load; it returns figures by the names in FIGURES.
        fill: the same, of a function that puts what has to wait into the folder, or onto the server. A folder is filled once, then
            copied for every round; a server is emptied and filled anew.
        goals: figure → what it should reach.
        environment: the peers' environment that it runs in (scripts/setup-peers); None: where Conveyor runs.
        packages: the distributions whose versions are shown.
        settings: how it is set up, in one line.
    """

    name: str
    measure: str
    load: Load
    fill: str | None = None
    goals: Mapping[str, Goal] = field(default_factory=dict)
    environment: str | None = None
    packages: tuple[str, ...] = ()
    settings: str = ""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Subjects that are compared; the first one is what the others are set against.

    Parameters:
        name: for --only.
        title: one sentence on what is done.
        server: what runs for it, by its name in SERVERS.
    """

    name: str
    title: str
    subjects: tuple[Subject, ...]
    server: str | None = None
