"""Processing a folder: what is there already is left alone, the rest goes through the application, a few images at a time.

An image that is there is whole, and done: unless its original is another one than was noted before it was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import logging
import os
import shutil
import signal
import stat
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from conveyor import Conveyor, JobError, JobFailed, PayloadError
from conveyor.errors import HandlerTimeout, JournalError
from examples.images.app import Images, Recipe, make_app, recipe_by_now
from examples.images.files import FORMATS, TEMPORARY, Processed, Refused, is_made, pixels_of
from examples.images.filters import parse_filters
from examples.images.originals import Originals, look_at, noted
from examples.images.report import Report
from examples.images.settings import Settings

STATE: Final = ".conveyor"
"""A folder within the output: the queue, the journal, the recipe, and the lock."""
RECIPE: Final = "recipe.json"
"""Within it: what the images are made with."""
ORIGINALS: Final = "originals"
"""Within it: of what each image was made."""
JOURNAL: Final = "images.journal"
"""Within it: what happened to every image, for ``conveyor trace --file``."""
AHEAD: Final = 4
"""Images that are queued for each process: enough that none waits, few enough that memory does not grow with the folder."""
MEGAPIXEL: Final = 1_000_000
JOURNAL_SECONDS: Final = 10.0
"""A journal that cannot be kept for so long ends the run: what becomes of the images is known from it alone."""
LOW_DISK_BYTES: Final = 64 * 2**20
LOW_DISK_SHARE: Final = 0.05
"""Where less than both is free, a queue in a file takes nothing in and hands nothing out."""
LAST_SECONDS: Final = 3.0
"""What waits for room on a full disk is given up so long after the end began."""
LOOK_SECONDS: Final = 0.2
"""Between two looks whether it is kept."""

log = logging.getLogger("examples.images.folder")


class FolderError(Exception):
    """The command cannot do what it is asked; says what to change."""


class Seen(msgspec.Struct):
    """One process of the pool, by what it did.

    Parameters:
        last: monotonic seconds.
    """

    completed: int
    first: float
    last: float


class Run:
    """One run of the command, as a display sees it while it goes on."""

    def __init__(self, total: int) -> None:
        self.total: Final = total
        self.report: Final = Report()
        self.workers: dict[tuple[str, int], Seen] = {}
        """By host and process id."""
        self.stopping = False
        """It was interrupted, and finishes what is in hand."""
        self.problem = ""
        """Why it cannot go on, and ends."""

    @property
    def ended(self) -> int:
        """Images that nothing more is to be done for."""
        return self.report.processed + self.report.before + self.report.failed

    def note(self, path: Path, processed: Processed) -> None:
        """An image was processed."""
        now = time.monotonic()
        process = (processed.host, processed.process)
        seen = self.workers.setdefault(process, Seen(0, now - processed.seconds, now))
        seen.completed += 1
        seen.last = now
        self.report.add(path, processed)


def process_folder(
    source: Path,
    target: Path,
    filters: str,
    settings: Settings,
    *,
    broker: str | None = None,
    journal: Path | None = None,
    again: bool = False,
    on_start: Callable[[Run], object] = lambda _: None,
    on_look: Callable[[Run], object] = lambda _: None,
) -> Report:
    """Process every image below source into the same place below target; those that are there already are left alone.

    Ctrl-C (or SIGTERM) finishes the images in hand, and once more gives them up; calling it again does the rest.

    Parameters:
        filters: an expression such as ``blur:3,brightness:1.3``.
        broker: a URL; left out, a SQLite file in the target.
        journal: its file; left out, one in the target.
        again: make all images anew where the target holds those of other filters.
        on_start: called with what a display may look at from now on.
        on_look: called with it several times a second while images are processed.

    Raises:
        FolderError: source, target or filters cannot be; somebody else is at work in target; or the journal cannot be kept.
        FilterError: the filters make no sense.
    """
    parse_filters(filters)
    source, target = source.resolve(), target.resolve()
    if not source.is_dir():
        raise FolderError(f"there is no folder {source}")
    if source == target:
        raise FolderError("the output has to go into another folder than the input")
    if source.is_relative_to(target):
        raise FolderError(f"the input {source} is within the output {target}: results could be written over originals")
    if target.exists() and not target.is_dir():
        raise FolderError(f"{target} is no folder")
    with locked(target) as state, noted(state / ORIGINALS) as originals:
        recipe = begin(state, source, filters, again=again)
        clean(target)
        own = None if journal else state / JOURNAL
        queue = None if broker else own_queue(state)
        images = make_app(settings, broker or f"sqlite:///{queue}/images.queue?durability=normal", journal or own)
        run = Run(sum(not found.left_out for found in walk(source, target)))
        on_start(run)
        started = time.monotonic()
        conductor = Conductor(run, source, target, recipe, settings, images, originals, own, queue, on_look)
        asyncio.run(_to_the_end(conductor.work(), run, queue))
        run.report.seconds = time.monotonic() - started
        clean(target)
    return run.report


async def _to_the_end(work: Coroutine[Any, Any, None], run: Run, queue: Path | None) -> None:
    """Do the work, or as much of it as signals leave time for.

    Raises:
        FolderError: it cannot go on.
    """
    task, loop = asyncio.ensure_future(work), asyncio.get_running_loop()

    def stop() -> None:
        run.stopping = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    hurry = asyncio.create_task(_give_up_without_room(task, run, queue), name="hurry")
    try:
        await task
    except asyncio.CancelledError:
        if run.problem:
            raise FolderError(run.problem) from None
        run.report.interrupted = True
    finally:
        hurry.cancel()


async def _give_up_without_room(work: asyncio.Future[None], run: Run, queue: Path | None) -> None:
    """Interrupt once more what ends and cannot, because the disk is full: it would wait long for room, and the next run does it."""
    while not (run.stopping or run.problem):  # noqa: ASYNC110 - two flags, and a disk
        await asyncio.sleep(LOOK_SECONDS)
    await asyncio.sleep(LAST_SECONDS)
    while no_room(queue) is None:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_SECONDS)
    work.cancel()


class Conductor:
    """Sends images to the application, a few at a time, and learns from its tickets what becomes of each.

    Parameters:
        journal: its file, where that is ours to move aside.
        queue: its folder, where that is ours.
        on_look: called several times a second.
    """

    def __init__(
        self,
        run: Run,
        source: Path,
        target: Path,
        recipe: Recipe,
        settings: Settings,
        images: Images,
        originals: Originals,
        journal: Path | None,
        queue: Path | None,
        on_look: Callable[[Run], object],
    ) -> None:
        self._run = run
        self._on_look = on_look
        self._source = source
        self._target = target
        self._recipe = recipe
        self._largest = settings.largest_megapixels * MEGAPIXEL
        self._ahead = AHEAD * settings.processes
        self._room = asyncio.Semaphore(self._ahead)
        self._open: set[Path] = set()
        self._images = images
        self._originals = originals
        self._journal = journal
        self._queue = queue
        self._ended = 0

    async def work(self) -> None:
        """Have every image processed that is not there yet."""
        try:
            async with (
                kept(self._images.app, self._journal) as problem,
                self._images.app.running(keeper=False),
                asyncio.TaskGroup() as group,
            ):
                watch = group.create_task(self._watch(problem), name="watch")
                await self._send_all(group)
                for _ in range(self._ahead):  # every image has come back
                    await self._room.acquire()
                watch.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        finally:
            # What was in hand when it was interrupted is finished by now, or comes the next time.
            for path in filter(self._is_made, self._open):
                self._note_unseen(path)

    async def _watch(self, problem: Callable[[], str | None]) -> None:
        def look() -> str | None:
            self._on_look(self._run)
            return problem() or self._stuck()

        try:
            await fail_without(look)
        except FolderError as error:
            self._run.problem = str(error)  # also where the end itself is interrupted
            raise

    def _stuck(self) -> str | None:
        """Why no image ends, where that is because the queue has no room."""
        before, self._ended = self._ended, self._run.ended
        return no_room(self._queue) if self._ended == before else None

    async def _send_all(self, following: asyncio.TaskGroup) -> None:
        for path, left_out in walk(self._source, self._target):
            relative = path.relative_to(self._source)
            if left_out:
                self._run.report.add_left_out(relative, left_out)
            elif self._is_done(relative):
                self._run.report.add_before(relative)
                await asyncio.sleep(0)  # there may be many, and the application shall go on meanwhile
            else:
                await self._room.acquire()
                self._open.add(relative)
                following.create_task(self._have_processed(relative), name=str(relative))

    async def _have_processed(self, path: Path) -> None:
        report, recipe = self._run.report, self._recipe
        source, target = self._source / path, self._target / path
        try:
            self._note_original(path)
            ticket = await self._images.process.send(
                source, target, recipe, self._largest, self._target / STATE / RECIPE
            )
            processed = await ticket.result()
            if processed is None and not self._is_made(path):
                report.add_failure(
                    path, f"it is not wanted any more: the recipe in {self._target} has changed", ticket.id
                )
            elif (
                processed is None
            ):  # an interrupted run's message, which came first, or an attempt that nobody heard of
                self._note_unseen(path)
            else:
                self._run.note(path, processed)
        except JobFailed as error:
            if self._is_made(path):  # its process died, or was too late, just after that
                self._note_unseen(path)
            else:
                report.add_failure(path, _reason(error), error.id)
        except (JobError, PayloadError) as error:  # somebody else cancelled it; or its name cannot be written
            report.add_failure(path, str(error), getattr(error, "id", ""))
        except OSError as error:
            report.add_failure(path, f"what is there cannot be replaced: {error.strerror}", "")
        self._open.remove(path)
        self._room.release()

    def _note_unseen(self, path: Path) -> None:
        self._run.report.add_unseen(path, pixels_of(self._target / path))

    def _is_done(self, path: Path) -> bool:
        """Whether it is there, and made of the original that is there now."""
        return self._is_made(path) and self._originals.of(path) == look_at(self._source / path)

    def _note_original(self, path: Path) -> None:
        """Note of what it is made, before that begins: else a run that is killed would not be known to have made it."""
        original = look_at(self._source / path)
        if original is None:  # it fails, with its reason
            return
        if self._originals.of(path) != original and self._is_made(path):
            # Made of another original, or no result at all, such as a contact sheet. From now on nobody takes it for one.
            os.utime(self._target / path, (0, 0))
        self._originals.note(path, original)

    def _is_made(self, path: Path) -> bool:
        return is_made(self._source / path, self._target / path, self._recipe.since)


def _reason(error: JobFailed) -> str:
    """What it was refused for, or the error of its last attempt."""
    longer = " (--timeout allows more)" if error.error.startswith(HandlerTimeout.__name__) else ""
    return error.error.removeprefix(f"{Refused.__name__}: ") + longer


# --- the folders --------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What is in a folder: an image by its name (whether that is true is found out when it is opened), or why it is left out."""

    path: Path
    left_out: str = ""


def walk(source: Path, target: Path) -> Iterator[Found]:
    """What is below source, and not in target, however much it is. What cannot be looked at is left out, and only that."""
    folders = [source]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if path == target:
                        continue
                    try:
                        reason = _left_out(entry, path)
                        folder_within = not reason and entry.is_dir(follow_symlinks=False)
                    except OSError as error:
                        yield Found(path, f"cannot be read: {error.strerror}")
                        continue
                    if folder_within:
                        folders.append(path)
                    else:
                        yield Found(path, reason)
        except OSError as error:
            yield Found(folder, f"cannot be read: {error.strerror}")


def _left_out(entry: os.DirEntry[str], path: Path) -> str:
    """Why something in a folder is neither taken for an image nor looked into; "" where it is.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        return "its name is no UTF-8; rename it"
    if entry.is_dir(follow_symlinks=False):
        if entry.name == STATE:
            return "holds what a run remembers"
        return "holds the results of another run" if _is_there(path / STATE / RECIPE) else ""
    if entry.is_symlink() and _leads_to_folder(path):
        return "links to a folder, which is not followed"
    if path.suffix.lower() not in FORMATS:
        return "no image by its ending"
    return (
        f"its name begins with {TEMPORARY}, as those of half-written images" if path.name.startswith(TEMPORARY) else ""
    )


def _is_there(path: Path) -> bool:
    """That of Path raises in Python 3.11 where a folder may not be entered, or a path is too long."""
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise
    return True


def _leads_to_folder(link: Path) -> bool:
    try:
        return stat.S_ISDIR(link.stat().st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False  # to nothing
        raise


@contextlib.contextmanager
def locked(target: Path) -> Iterator[Path]:
    """The state's folder, which is this process' alone while the block lasts.

    Raises:
        FolderError: somebody else is at work there.
    """
    state = target / STATE
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(f"another run is at work in {target}; wait for its end") from None
        yield state


@contextlib.asynccontextmanager
async def kept(app: Conveyor, own: Path | None) -> AsyncIterator[Callable[[], str | None]]:
    """Keep the application's journal while the block lasts; gives what tells why it cannot be kept now.

    Parameters:
        own: its file, where that is ours: when it is no journal, or none any more, it is moved aside, and a new one begun.

    Raises:
        FolderError: there can be no journal.
    """
    async with app, contextlib.AsyncExitStack() as stack:
        keeper = app.keeper(app.broker)
        try:
            await stack.enter_async_context(keeper)
        except JournalError as error:
            if own is None or (aside := move_aside(own)) is None:
                raise FolderError(f"{error} (--journal says where)") from error
            keeper = app.keeper(app.broker)
            try:
                await stack.enter_async_context(keeper)
            except JournalError as again:
                raise FolderError(f"{again} (--journal says where); the one that was there is {aside} now") from again
            log.warning("%s; it is %s now, and a new journal has begun", error, aside)
        yield lambda: keeper.problem


async def fail_without(problem: Callable[[], str | None]) -> None:
    """Watch what the run cannot do without, for ever: the journal, and room for the queue.

    Raises:
        FolderError: it was not there for long.
    """
    last = time.monotonic()
    while True:
        if (said := problem()) is None:
            last = time.monotonic()
        elif time.monotonic() - last >= JOURNAL_SECONDS:
            raise FolderError(
                f"{said}; the images that are there stay, and the same command (without --again) does the rest"
            )
        await asyncio.sleep(LOOK_SECONDS)


def move_aside(journal: Path) -> Path | None:
    """Give a journal that cannot be used, and what SQLite keeps beside it, another name; gives that. None where there is none.

    Raises:
        FolderError: something there cannot be moved.
    """
    if not journal.exists():
        return None
    number = next(number for number in itertools.count(1) if not journal.with_suffix(f".unusable-{number}").exists())
    aside = journal.with_suffix(f".unusable-{number}")
    try:
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{journal}{ending}").rename(f"{aside}{ending}")
    except OSError as error:
        raise FolderError(f"the journal {journal} cannot be used, nor moved aside: {error.strerror}") from error
    return aside


def begin(state: Path, source: Path, filters: str, *, again: bool) -> Recipe:
    """The recipe: that of an earlier run, or a new one from now on.

    Raises:
        FolderError: the folder holds images that were made with other filters, of other originals, or by somebody else.
    """
    file, instead = state / RECIPE, "use another folder, or --again to write over those of the same names"
    if not again:
        try:
            known = recipe_by_now(file)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FolderError(f"{file} is damaged ({error}); --again makes it, and all images, anew") from error
        if known:
            if known.filters != filters:
                raise FolderError(f"{state.parent} holds images made with {known.filters!r}; {instead}")
            if known.source != str(source):
                raise FolderError(f"{state.parent} holds images made of those in {known.source}; {instead}")
            return known
        if any(not found.left_out for found in walk(state.parent, source)):
            raise FolderError(f"{state.parent} holds images that were not made here; {instead}")
    recipe = Recipe(filters, time.time(), str(source))
    temporary = file.with_suffix(".new")
    temporary.write_bytes(msgspec.json.encode(recipe))
    temporary.replace(file)
    return recipe


def own_queue(state: Path) -> Path:
    """The folder of a new queue in the state's. That of an interrupted run goes: what it held is among what is not done yet."""
    folder = state / "queue"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def no_room(queue: Path | None) -> str | None:
    """Why the queue in this folder takes nothing in; None where there is room, or it is not ours."""
    if queue is None:
        return None
    disk = os.statvfs(queue)
    free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    if free >= min(LOW_DISK_BYTES, size * LOW_DISK_SHARE):
        return None
    return (
        f"the disk of {queue} is almost full ({free // 1024} kB free), and no image is done any more: free some space"
    )


def clean(target: Path) -> None:
    """Remove what killed processes left half-written."""
    for path, _ in walk(target, target):
        if path.name.startswith(TEMPORARY):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                path.unlink()
