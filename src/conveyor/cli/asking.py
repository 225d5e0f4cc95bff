"""Asking about the journal: its keepers over the broker, else the files that they left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from cyclopts import Parameter

from conveyor.cli.connection import Where, connected
from conveyor.cli.terminal import Output
from conveyor.core.questions import Answer, JobsOf, JourneyOf
from conveyor.core.words import counted
from conveyor.errors import BrokerError, ConfigurationError, NoKeeper
from conveyor.runtime.archive import Archive
from conveyor.runtime.ask import Asker, silence_of, together
from conveyor.runtime.journal import journal_queues

MANY: Final = 64
"""Batches that wait for a keeper which keeps up, at most."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Kept:
    """Where the journal is.

    Parameters:
        broker: The broker's URL. Default: the app's, else $CONVEYOR_BROKER, else conveyor.toml's.
        app: The app whose broker is meant, as module:attribute.
        file: Read this file, and ask nobody.
    """

    broker: str | None = None
    app: str | None = None
    file: Path | None = None

    async def answer(self, request: JourneyOf | JobsOf, output: Output) -> Answer:
        """What is known; words about where that comes from go to stderr.

        Raises:
            JournalError: nobody answers, and there is no file.
            ConfigurationError: nothing says where to ask, and there is no file.
        """
        if self.file is not None:
            return together([_read(self.file, request, output, asked=False)], request)
        try:
            url = Where(self.broker, self.app).url()
        except ConfigurationError:
            if self.broker is not None or self.app is not None or not (files := files_here()):
                raise
            return together([await _beside(file, request, output) for file in files], request)
        try:
            return await _ask(url, request, output)
        except (BrokerError, NoKeeper) as error:
            if not (files := self._files(url)):
                raise
            output.note(str(error))
            return together([_read(file, request, output, asked=True) for file in files], request)

    def _files(self, url: str) -> list[Path]:
        """The files that the keepers on a broker may have left."""
        if self.app is not None:
            from conveyor.cli.application import load_app

            app = load_app(self.app, broker=self.broker)
            place = app.journal_place(app.new_broker())
            return [place] if isinstance(place, Path) and place.exists() else []
        parts = urlsplit(url)
        beside = Path(f"{unquote(parts.path.removeprefix('/'))}.journal")
        if parts.scheme == "sqlite":
            return [beside] if beside.exists() else []
        return files_here()


def files_here() -> list[Path]:
    """The journals in the working directory."""
    return sorted(Path.cwd().glob("*.journal"))


def queue_beside(file: Path) -> str | None:
    """The URL of the queue file beside which a journal lies; None where it lies alone."""
    queue = file.with_suffix("")
    return f"sqlite:///{quote(str(queue))}" if queue.is_file() else None


def shown(file: Path) -> str:
    """A file for people: by its name alone where it is in the working directory."""
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)


async def _ask(url: str, request: JourneyOf | JobsOf, output: Output) -> Answer:
    """What the keepers on a broker know.

    Raises:
        NoKeeper: nobody keeps a journal there, or nobody answers.
        BrokerError: the broker is away, or not there.
    """
    async with connected(url) as broker:
        asker = Asker(broker, time.time)
        try:
            answer = await asker.ask(request)
            if answer.silent:
                output.note(f"{silence_of(answer.silent)}; --file reads what was kept", "yellow")
            if answer.behind:
                output.note(f"the newest entries are not in this: {answer.behind}", "yellow")
            elif (left := sum((await journal_queues(broker)).values())) > MANY:
                output.note(f"the keeper is behind: {left:,} batches of entries still wait for it", "yellow")
            return answer
        except NoKeeper:
            if left := sum((await journal_queues(broker)).values()):
                batches = counted(left, "batch", "batches")
                output.note(f"{batches} of entries still wait for a keeper: they are not in this", "yellow")
            raise
        finally:
            await asker.close()


async def _beside(file: Path, request: JourneyOf | JobsOf, output: Output) -> Answer:
    """What is known to the keeper whose file this is, where its name says which broker is meant; else what is in the file."""
    if (url := queue_beside(file)) is not None:
        try:
            answer = await _ask(url, request, output)
        except (BrokerError, NoKeeper):
            return _read(file, request, output, asked=True)
        output.note(f"asked whoever keeps {shown(file)}")
        return answer
    return _read(file, request, output, asked=False)


def _read(file: Path, request: JourneyOf | JobsOf, output: Output, *, asked: bool) -> Answer:
    """What is in a file.

    Parameters:
        asked: its keeper was, in vain.

    Raises:
        JournalError: it is no journal, or cannot be read.
    """
    is_open = not asked and Path(f"{file}-wal").exists()
    archive = Archive(file).open(create=False)
    try:
        answer = archive.answer("", request)
    finally:
        archive.close()
    if is_open:
        output.note(
            f"read from {shown(file)}, which somebody may be writing: the newest entries may not be in it yet; --broker URL"
            " or --app APP asks its keeper",
            "yellow",
        )
    else:
        output.note(f"read from {shown(file)}, as it was left")
    return answer
