"""Measure Conveyor on this machine, with the bare library and a peer beside it in the same run.

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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import machine
from benchmarks.rounds import Result, Rounds, SubjectFailed, rows
from benchmarks.subject import FIGURES
from benchmarks.table import MEASUREMENTS

ROUNDS: Final = 5
QUICK_ROUNDS: Final = 2
QUICK_SCALE: Final = 0.1
WIDTH: Final = 120
"""Columns, where the output is no terminal."""
MARKS: Final = ("<!-- figures -->", "<!-- end of figures -->")
"""Where a document has its table."""
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
        rounds = Rounds(chosen, folder, scale)
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
            except SubjectFailed as failure:
                progress.stop()
                print(failure, file=sys.stderr)
                return 1
    if options.json:
        print(json.dumps({"machine": facts, "results": [_as_json(each) for each in results]}, indent=2))
    else:
        to_reader = Console()
        _show(to_reader if to_reader.is_terminal else Console(width=WIDTH), facts, results)
    if options.write:
        _write(options.write, "\n".join(_markdown(facts, results)))
    return 0


def _write(document: Path, figures: str) -> None:
    """Put the figures between a document's two marks."""
    before, _, rest = document.read_text().partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise SystemExit(f"{document} has no place for the figures: a line {MARKS[0]} and, below it, a line {MARKS[1]}")
    document.write_text(f"{before}{MARKS[0]}\n\n{figures}\n\n{MARKS[1]}{after}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the load, in two rounds")
    names = [each.name for each in MEASUREMENTS]
    parser.add_argument("--only", action="append", choices=names, help="this measurement alone; may be repeated")
    parser.add_argument("--rounds", type=int, help=f"so many rounds; {ROUNDS} unless told")
    parser.add_argument("--scale", type=float, help="so much of the full load; 1 unless told")
    parser.add_argument("--folder", type=Path, help="measure the disk that this folder is on")
    parser.add_argument("--json", action="store_true", help="print every sample, for programs")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="also put the table into docs/benchmarks.md, or another FILE"
    )
    return parser


def _cells(results: Sequence[Result]) -> Iterator[tuple[str, Cells]]:
    """The title of the block with each line."""
    last: Result | None = None
    for result, name, median, first in rows(results):
        figure, goal = FIGURES[name], result.subject.goals.get(name)
        samples = result.samples[name]
        verdict = "" if goal is None else f"{goal} {'✓' if goal.met(median, first) else '✗ missed'}"
        yield (
            result.measurement.title,
            (
                result.subject.name if result is not last else "",
                f"{median:,.{figure.digits}f}",
                figure.unit,
                f"{min(samples):,.{figure.digits}f} – {max(samples):,.{figure.digits}f}",
                f"{median / first:.2f} ×",
                verdict,
            ),
        )
        last = result


def _show(console: Console, facts: dict[str, str], results: Sequence[Result]) -> None:
    lines = list(_cells(results))
    for title, block in itertools.groupby(lines, key=lambda line: line[0]):
        console.print(f"\n[bold]{title}[/]", highlight=False)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for number, (name, right) in enumerate(COLUMNS.items()):
            width = max(len(cells[number]) for _, cells in lines)  # the same in every block
            table.add_column(name, justify="right" if right else "left", min_width=width, no_wrap=True)
        for _, (*others, verdict) in block:
            table.add_row(*others, f"[red]{verdict}" if "missed" in verdict else f"[green]{verdict}")
        console.print(table)
    console.print("\n" + "\n".join(f"{name}: {value}" for name, value in facts.items()), highlight=False)


def _markdown(facts: dict[str, str], results: Sequence[Result]) -> Iterator[str]:
    yield f"| what | {' | '.join(COLUMNS)} |"
    yield "| --- | --- | ---: | --- | ---: | ---: | --- |"
    block = ""
    for title, cells in _cells(results):
        yield f"| {title if title != block else ''} | {' | '.join(cells)} |"
        block = title
    yield ""
    yield from (f"- {name}: {value}" for name, value in facts.items())


def _as_json(result: Result) -> dict[str, object]:
    return {
        "measurement": result.measurement.name,
        "subject": result.subject.name,
        "samples": result.samples,
        "goals": {name: str(goal) for name, goal in result.subject.goals.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
