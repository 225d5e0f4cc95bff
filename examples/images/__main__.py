"""Image processing on the command line: ``python -m examples.images``."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue as queues
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from conveyor import BrokerError, ConveyorError
from examples.images.bench import compare, make_large_photographs, measure
from examples.images.demo import Demonstrations, images_in
from examples.images.display import PlainProgress, RunDisplay, workers_table
from examples.images.files import LARGEST_PIXELS, Refused, format_for
from examples.images.filters import EXAMPLES, FilterError, FilterPipeline, parse_filters
from examples.images.folder import JOURNAL, MEGAPIXEL, STATE, FolderError, Run, process_folder, walk
from examples.images.report import Report, writable
from examples.images.settings import Settings
from examples.images.sheet import contact_sheet, share_of
from examples.images.tasks import LEASE_SECONDS, TaskQueue
from examples.images.workers import SimpleWorker
from examples.settings import SettingError, add_flags, from_parsed

FILTERS: Final = "blur:3,sharpen:2,brightness:1.3"
SHEET: Final = "contact-sheet.png"
INTERRUPTED: Final = 128 + signal.SIGINT
LOOK_SECONDS: Final = 0.5
QUEUES: Final = ("images.process_image", "conveyor.journal.images")
"""On the broker, of the application that processes folders."""
LEFT_ON_BROKER: Final = (
    f"on the broker, the queues {' and '.join(QUEUES)} stay for the next run, with the dead letters of images that failed;"
    f" when nobody uses them: conveyor queues remove {' '.join(QUEUES)} --yes --with-dead --broker URL"
)
"""Another run, or a helper, may have declared them and not receive yet: only people know that nobody uses them."""

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; gives the exit code, as --help explains them."""
    given = parser().parse_args(arguments)
    logging.basicConfig(
        level=(given.log_level or given.usual_log_level).upper(), format="%(asctime)s %(name)s %(message)s"
    )
    command: Command = given.command
    try:
        return command(given)
    except (FolderError, FilterError, Refused, SettingError, ConveyorError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


# --- process ------------------------------------------------------------------------------------------------------------


def process(given: argparse.Namespace) -> int:
    """Process a folder."""
    log = logging.getLogger("conveyor.consumer")
    level = log.level
    if not logging.getLogger().isEnabledFor(logging.INFO):  # what becomes of each image is in the report
        log.setLevel(logging.CRITICAL)
    try:
        return _process(given)
    finally:
        log.setLevel(level)


def _process(given: argparse.Namespace) -> int:
    settings = from_parsed(Settings, given)
    source, target = Path(given.source), Path(given.target)
    if given.sheet:  # before the work, not after it
        format_for(Path(given.sheet))
        check_sheet(Path(given.sheet), source, target)
    broker = given.broker or os.environ.get("CONVEYOR_BROKER") or None
    console = Console(stderr=given.json)
    display = RunDisplay()
    plain = PlainProgress(tell_plainly)

    def begin(run: Run) -> None:
        images = f"{run.total} image{'' if run.total == 1 else 's'} of {source}"
        tell_plainly(f"{images} through {given.filters} to {target}, {settings.processes} at once")
        display.watch(run)

    with Live(display, console=console, refresh_per_second=4, transient=not console.is_terminal):
        report = process_folder(
            source,
            target,
            given.filters,
            settings,
            broker=broker,
            journal=given.journal,
            again=given.again,
            on_start=begin,
            on_look=(lambda _: None) if console.is_terminal else plain.look,
        )
    if given.json:
        print(json.dumps(report.summary(), indent=2))
    else:
        report.show(console)
    if not (report.processed or report.before or report.failed or report.interrupted):
        console.print(f"there are no images in {source}", soft_wrap=True, highlight=False)
    if any(failure.id for failure in report.failures):
        journal = given.journal or target / STATE / JOURNAL
        console.print(f"more about a failure: conveyor trace ID --file {journal}", soft_wrap=True, highlight=False)
    if report.interrupted:
        without = " without --again" if given.again else ""
        console.print(f"interrupted; the same command again{without} does the rest")
        return INTERRUPTED
    try:

        def tell(name: str, error: Exception) -> None:
            console.print(
                f"not on the contact sheet: {writable(f'{name}: {error}')}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )

        sheet = sheet_path(source, target, given.sheet)
        if shown := make_sheet(report, source, target, given.filters, sheet, tell):
            share = share_of(shown, report.processed + report.before)
            console.print(f"before and after{share}: {sheet}", soft_wrap=True, highlight=False)
    except KeyboardInterrupt:
        console.print("interrupted; the images are done, and the contact sheet is not")
        return INTERRUPTED
    if broker:
        console.print(LEFT_ON_BROKER, soft_wrap=True, highlight=False)
    return 1 if report.failed else 0


def tell_plainly(line: str) -> None:
    """Say to people what is going on, beside what programs read."""
    with contextlib.suppress(OSError):  # nobody reads it any more, or there is no room: the images matter more
        print(writable(line), file=sys.stderr, flush=True)


def check_sheet(sheet: Path, source: Path, target: Path) -> None:
    """See that the contact sheet takes the place of no image.

    Raises:
        FolderError: it lies among the originals, or where the result of one of them goes.
    """
    place = sheet.parent.resolve() / sheet.name  # a link there would be replaced itself, not what it leads to
    source, target = source.resolve(), target.resolve()
    if place.is_relative_to(target):
        if os.path.lexists(source / place.relative_to(target)):
            raise FolderError(f"{sheet} is the result of an image; let --sheet name another file")
    elif place.is_relative_to(source):
        raise FolderError(f"{sheet} is among the originals in {source}; let --sheet name a file elsewhere")


def sheet_path(source: Path, target: Path, asked: str | None) -> Path:
    """Where the contact sheet of a run goes; it never takes the place of an image."""
    return Path(asked) if asked else target / (SHEET if not (source / SHEET).exists() else f"{STATE}/{SHEET}")


def make_sheet(
    report: Report,
    source: Path,
    target: Path,
    filters: str,
    sheet: Path,
    on_missing: Callable[[str, Exception], object],
) -> int:
    """Write the contact sheet of a run; gives how many images are on it."""
    shown = sorted(report.examples)
    pairs = [(source / path, target / path) for path in shown]
    names, title = [str(path) for path in shown], f"before and after {filters}"
    return contact_sheet(pairs, names, sheet, title, on_missing, of=report.processed + report.before)


# --- a task queue with workers elsewhere ------------------------------------------------------------------------------------


def add(given: argparse.Namespace) -> int:
    """Add the images of a folder, and of the folders within, to a task queue."""
    source, target = Path(given.source).resolve(), Path(given.target).resolve()
    if not source.is_dir():
        raise FolderError(f"there is no folder {source}")
    refused = 0
    with TaskQueue(given.broker) as queue:
        for path, left_out in walk(source, target):
            try:
                if left_out:
                    print(f"left out: {path}: {left_out}", file=sys.stderr)
                else:
                    result = target / path.relative_to(source)
                    print(queue.add_task({"image_path": path, "output_path": result}), path)
            except (Refused, ConveyorError) as error:
                refused += 1
                print(f"not added: {error}", file=sys.stderr)
    return 1 if refused else 0


def work(given: argparse.Namespace) -> int:
    """Run one worker on a task queue, until told to stop."""
    # stop() takes a lock, which the code that a signal interrupts may hold; put() of such a queue may interrupt itself.
    told: queues.SimpleQueue[None] = queues.SimpleQueue()
    pipeline, largest_pixels = FilterPipeline(given.filters), round(given.largest_megapixels * MEGAPIXEL)
    with TaskQueue(given.broker, lease=given.lease) as queue:
        worker = SimpleWorker(given.worker, pipeline, queue, largest_pixels=largest_pixels)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: told.put(None))

        def heed() -> None:
            told.get()
            worker.stop()

        threading.Thread(target=heed, name="signals", daemon=True).start()
        worker.start(forever=not given.until_empty)
        print(worker.get_stats())
    return 0


def monitor(given: argparse.Namespace) -> int:
    """Show the workers of a task queue, live, until Ctrl-C."""
    console = Console()
    with TaskQueue(given.broker) as queue:
        with contextlib.suppress(KeyboardInterrupt), Live(console=console, refresh_per_second=4) as live:
            until = time.monotonic() + given.seconds if given.seconds else float("inf")
            while time.monotonic() < until:
                try:
                    tasks = ", ".join(f"{count} {name}" for name, count in queue.get_stats().items())
                except BrokerError as error:  # it may come back
                    tasks = f"the queue cannot be asked: {error}"
                live.update(Group(workers_table(queue.registry), Text(tasks)))
                time.sleep(LOOK_SECONDS)
        if not console.is_terminal:  # there, rich ends the last line itself
            console.line()
    return 0


# --- demonstrations and benchmark ---------------------------------------------------------------------------------------


def demo(given: argparse.Namespace) -> int:
    """Run the demonstrations."""
    with folder_of(given.folder) as folder:
        shows = Demonstrations(folder, images_in(Path(given.images)) if given.images else ())
        chosen = {"sequence": shows.sequence, "async": shows.concurrent, "workers": shows.workers}
        for name, show in chosen.items():
            if given.only in (None, name):
                show()
        if given.folder and (sheet := shows.sheet()):
            print(f"before and after: {sheet}")
    return 0


def bench(given: argparse.Namespace) -> int:
    """Measure the speed-up."""
    parse_filters(given.filters)
    with folder_of(given.folder) as folder:
        photographs = folder / "photographs"
        print(f"making {given.images} photographs of {given.megapixels:g} megapixels in {folder}", flush=True)
        make_large_photographs(photographs, given.images, given.megapixels)
        measured = []
        for processes in given.processes:
            measured.append(measure(photographs, given.filters, processes))
            print(compare(measured)[-1], flush=True)
    return 0


@contextlib.contextmanager
def folder_of(given: str | None) -> Iterator[Path]:
    """The folder that was given, or one that is gone afterwards."""
    if given:
        yield Path(given)
    else:
        with tempfile.TemporaryDirectory(prefix="images-") as folder:
            yield Path(folder)


def at_least_one(said: str) -> int:
    """A number in the command line."""
    if not said.isdecimal() or int(said) < 1:
        raise argparse.ArgumentTypeError(f"it is a whole number from 1 on, not {said!r}")
    return int(said)


def shared(broker: str) -> str:
    """A broker in the command line of one that works with others."""
    if not broker:
        raise argparse.ArgumentTypeError("'' names no broker")
    if broker.startswith("memory:"):
        raise argparse.ArgumentTypeError(f"{broker} ends with this process; name one that others reach, too")
    return broker


# --- the command line ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """What can be said."""
    known = ", ".join(EXAMPLES.values())
    filters = f"filters in their order, with commas between: {known}"
    found = argparse.ArgumentParser(
        prog="python -m examples.images",
        description="Filters images: a folder on every core, or tasks from a queue.",
        epilog="""examples:
  python -m examples.images demo
  python -m examples.images process photos out --filters "blur:3,brightness:1.3" --processes 2
  python -m examples.images bench --images 200 --megapixels 12
  python -m examples.images work --broker sqlite:///images.queue     a worker; more of them in other terminals
  python -m examples.images monitor --broker sqlite:///images.queue  who works, and how well

exit codes:
  0    all is well; also where work or monitor is told to end
  1    process: some images failed; add: some were not added
  2    it cannot be done, and why is said
  130  interrupted; the same command again does the rest
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    levels = ["debug", "info", "warning", "error"]
    found.add_argument("--log-level", choices=levels, help="also behind the command; default warning, info for work")
    commands = found.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, does: Command, log_level: str = "warning") -> argparse.ArgumentParser:
        what = (does.__doc__ or "").rstrip(".")
        made = commands.add_parser(name, help=what, description=what)
        made.set_defaults(command=does, usual_log_level=log_level)
        # Left out here, that before the command counts.
        said = f"what is logged on the standard error; default {log_level}"
        made.add_argument("--log-level", choices=levels, default=argparse.SUPPRESS, help=said)
        return made

    one = command("process", process)
    one.add_argument("source", metavar="IN", help="folder of the images; folders within are processed, too")
    one.add_argument(
        "target", metavar="OUT", help="folder for the results; images that are there already are not made again"
    )
    one.add_argument("--filters", default=FILTERS, help=f"{filters}; default {FILTERS}")
    add_flags(one, Settings)
    one.add_argument("--again", action="store_true", help="make all images anew, also those that are there")
    one.add_argument("--sheet", metavar="FILE", help=f"where the contact sheet goes; default OUT/{SHEET}")
    one.add_argument("--broker", metavar="URL", help="where the queue is ($CONVEYOR_BROKER; default: a file in OUT)")
    one.add_argument(
        "--journal", metavar="FILE", type=Path, help=f"where the journal is kept; default OUT/{STATE}/{JOURNAL}"
    )
    one.add_argument("--json", action="store_true", help="the report as JSON on the standard output")

    one = command("demo", demo)
    one.add_argument("only", nargs="?", choices=["sequence", "async", "workers"], help="one of them; default all")
    one.add_argument("--images", metavar="FOLDER", help="pictures of your own; left out, some are made")
    one.add_argument("--folder", metavar="FOLDER", help="keep pictures and results there, with a contact sheet")

    one = command("bench", bench)
    one.add_argument("--images", type=at_least_one, default=200, help="photographs; default 200")
    one.add_argument("--megapixels", type=at_least_one, default=12, help="of each; default 12")
    one.add_argument("--filters", default=FILTERS, help=f"{filters}; default {FILTERS}")
    one.add_argument(
        "--processes",
        type=lambda said: [at_least_one(number) for number in said.split(",")],
        default="1,2",
        metavar="NUMBERS",
        help="numbers of processes to compare; default 1,2",
    )
    one.add_argument("--folder", metavar="FOLDER", help="keep the photographs there for the next time")

    one = command("add", add)
    one.add_argument("source", metavar="IN", help="folder of the images")
    one.add_argument("target", metavar="OUT", help="folder for the results")
    one.add_argument(
        "--broker", metavar="URL", required=True, type=shared, help="such as sqlite:///images.queue or redis://host"
    )

    one = command("work", work, "info")
    one.add_argument(
        "--broker", metavar="URL", required=True, type=shared, help="such as sqlite:///images.queue or redis://host"
    )
    one.add_argument("--filters", default=FILTERS, help=f"{filters}; default {FILTERS}")
    one.add_argument(
        "--worker", metavar="NAME", default=f"worker-{os.getpid()}", help="its name; default from its process id"
    )
    one.add_argument(
        "--lease",
        type=float,
        default=LEASE_SECONDS,
        help=f"seconds after which the task of a worker that died goes to another one; default {LEASE_SECONDS:g}",
    )
    one.add_argument(
        "--largest-megapixels",
        metavar="MEGAPIXELS",
        type=float,
        default=LARGEST_PIXELS / MEGAPIXEL,
        help=f"larger images are refused: they could be decompression bombs; default {LARGEST_PIXELS / MEGAPIXEL:g}",
    )
    one.add_argument("--until-empty", action="store_true", help="end when the queue is worked off")

    one = command("monitor", monitor)
    one.add_argument(
        "--broker", metavar="URL", required=True, type=shared, help="such as sqlite:///images.queue or redis://host"
    )
    one.add_argument("--seconds", type=float, help="end after so long; default: at Ctrl-C")
    return found


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and said: one more Ctrl-C changes nothing of that
    sys.exit(code)
