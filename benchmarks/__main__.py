"""Measure Conveyor on this machine, with the bare libraries and the peers beside it in the same run.

Every figure is the median of several rounds; in a round every subject is measured once, in a process of its own. The column "of the
first" sets a figure against the same one of the first line of its block.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import machine
from benchmarks.rounds import Result, Rounds, SubjectFailed, beside_first
from benchmarks.subject import FIGURES, Measurement
from benchmarks.table import MEASUREMENTS
from servers.server import ServerMissing

ROUNDS: Final = 5
QUICK_ROUNDS: Final = 2
QUICK_SCALE: Final = 0.1
WIDTH: Final = 120
"""Columns, where the output is no terminal."""
MARKS: Final = ("<!-- figures -->", "<!-- end of figures -->")
"""Where a document has its table."""
HEADING: Final = "\n### "
RUN: Final = "The machine and the last run"
"""The title of the section about where and how it was measured."""
COLUMNS: Final = {"who": False, "median": True, "": False, "least to most": True, "of the first": True, "goal": False}
"""The table's columns, and whether they are numbers."""

Cells = tuple[str, str, str, str, str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and show."""
    options = _parser().parse_args(arguments)
    chosen = [each for each in MEASUREMENTS if not options.only or each.name in options.only]
    scale = options.scale or (QUICK_SCALE if options.quick else 1.0)
    number = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    to_people = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="conveyor-bench-") as name:
        folder = Path(name)
        facts = machine.facts(folder) | {"rounds": str(number), "load": f"{scale:g} of the full one"}
        rounds = Rounds(chosen, folder, scale, peers=options.peers)
        columns = TextColumn("{task.description:50}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=to_people, transient=True) as progress:
            bar = progress.add_task("preparing", total=number * len(rounds.results))
            done = -1

            def say(what: str) -> None:
                nonlocal done
                done += 1
                progress.update(bar, description=what, completed=done)
                if not to_people.is_terminal:
                    to_people.print(what)

            try:
                results = rounds.run(number, say)
            except (SubjectFailed, ServerMissing) as failure:
                progress.stop()
                print(failure, file=sys.stderr)
                return 1
        facts |= rounds.versions
    if options.json:
        print(json.dumps({"machine": facts, "results": [_as_json(each) for each in results]}, indent=2))
    else:
        to_reader = Console()
        _show(to_reader if to_reader.is_terminal else Console(width=WIDTH), facts, results)
    if options.write:
        _write(options.write, facts, results, keep=bool(options.only))
    return 0


def _write(document: Path, facts: dict[str, str], results: Sequence[Result], *, keep: bool) -> None:
    """Put the figures between a document's two marks.

    Parameters:
        keep: what was not measured now stays in the document, as an earlier run wrote it.
    """
    before, _, rest = document.read_text().partition(MARKS[0])
    old, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise SystemExit(f"{document} has no place for the figures: a line {MARKS[0]} and, below it, a line {MARKS[1]}")
    parts = (part.partition("\n") for part in f"\n{old}".split(HEADING)[1:]) if keep else ()
    sections = {title: text.strip() for title, _, text in parts} | dict(_markdown(facts, results))
    titles = [title for title in (*(each.title for each in MEASUREMENTS), RUN) if title in sections]
    figures = "".join(f"{HEADING}{title}\n\n{sections[title]}\n" for title in titles)
    document.write_text(f"{before}{MARKS[0]}\n{figures}\n{MARKS[1]}{after}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the load, in two rounds")
    names = [each.name for each in MEASUREMENTS]
    parser.add_argument("--only", action="append", choices=names, help="this measurement alone; may be repeated")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without those of .venv-peers")
    parser.add_argument("--rounds", type=int, help=f"so many rounds; {ROUNDS} unless told")
    parser.add_argument("--scale", type=float, help="so much of the full load; 1 unless told")
    parser.add_argument("--folder", type=Path, help="measure the disk that this folder is on")
    parser.add_argument("--json", action="store_true", help="print every sample, for programs")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="also put the figures into docs/benchmarks.md, or another FILE; with --only, beside those of earlier runs",
    )
    return parser


def _cells(results: Sequence[Result]) -> Iterator[tuple[Measurement, Cells]]:
    """Every line, with the measurement that it belongs to."""
    for result, first in beside_first(results):
        name = result.subject.name
        if result.left_out:
            yield result.measurement, (name, "", "", "left out, see below", "", "")
        for figure, kind in FIGURES.items():
            if figure not in result.samples:
                continue
            samples, median, beside = result.samples[figure], result.median(figure), first.median(figure)
            goal = result.subject.goals.get(figure)
            yield (
                result.measurement,
                (
                    name,
                    f"{median:,.{kind.digits}f}",
                    kind.unit,
                    f"{min(samples):,.{kind.digits}f} – {max(samples):,.{kind.digits}f}",
                    f"{median / beside:.2f} ×",
                    "" if goal is None else f"{goal} {'✓' if goal.met(median, beside) else '✗ missed'}",
                ),
            )
            name = ""


def _settings(results: Sequence[Result], measurement: Measurement) -> list[str]:
    """What is to be known of a measurement's subjects."""
    of_it = [each for each in results if each.measurement is measurement]
    return [f"{each.subject.name}: {each.settings}" for each in of_it if each.settings]


def _show(console: Console, facts: dict[str, str], results: Sequence[Result]) -> None:
    lines = list(_cells(results))
    for measurement, block in itertools.groupby(lines, key=lambda line: line[0]):
        console.print(f"\n[bold]{measurement.title}[/]", highlight=False)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for number, (name, right) in enumerate(COLUMNS.items()):
            width = max(len(cells[number]) for _, cells in lines)  # the same in every block
            table.add_column(name, justify="right" if right else "left", min_width=width, no_wrap=True)
        for _, (*others, verdict) in block:
            table.add_row(*others, f"[red]{verdict}" if "missed" in verdict else f"[green]{verdict}")
        console.print(table)
        for line in _settings(results, measurement):
            console.print(f"[dim]{escape(line)}[/]", highlight=False)
    console.print("\n" + "\n".join(f"{name}: {value}" for name, value in facts.items()), highlight=False)


def _markdown(facts: dict[str, str], results: Sequence[Result]) -> Iterator[tuple[str, str]]:
    """Sections: the title of each, and its text."""
    head = f"| {' | '.join(COLUMNS)} |\n| --- | ---: | --- | ---: | ---: | --- |"
    for measurement, lines in itertools.groupby(_cells(results), key=lambda line: line[0]):
        rows = "\n".join(f"| {' | '.join(cells)} |" for _, cells in lines)
        settings = "".join(f"\n- {line}" for line in _settings(results, measurement))
        yield measurement.title, f"{head}\n{rows}\n{settings}".strip()
    yield RUN, "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _as_json(result: Result) -> dict[str, object]:
    return {
        "measurement": result.measurement.name,
        "subject": result.subject.name,
        "samples": result.samples,
        "settings": result.settings,
        "left_out": result.left_out,
        "goals": {name: str(goal) for name, goal in result.subject.goals.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
