"""Asking about the journal: its keepers over the broker, else the files that they left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cyclopts import Parameter

from conveyor.cli.connection import Where, connected
from conveyor.cli.terminal import Output
from conveyor.core.questions import Answer, JobsOf, JourneyOf
from conveyor.core.words import counted
from conveyor.errors import BrokerError, ConfigurationError, JournalError, NoKeeper
from conveyor.runtime.archive import Archive
from conveyor.runtime.ask import Asker, together
from conveyor.runtime.journal import ASK, TOPIC


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
            return _read([self.file], request)
        try:
            url = Where(self.broker, self.app).url()
        except ConfigurationError as error:
            if self.broker is not None or self.app is not None:
                raise
            return self._from_files(None, request, output, error)
        try:
            async with connected(url) as broker:
                asker = Asker(broker, time.time)
                try:
                    return await asker.ask(request)
                except NoKeeper:
                    waiting = [queue for queue in await broker.queues() if queue.name.startswith(f"{TOPIC}.")]
                    left = sum(queue.ready + queue.in_flight for queue in waiting if not queue.name.startswith(ASK))
                    if left:
                        batches = counted(left, "batch", "batches")
                        output.note(f"{batches} of entries still wait for a keeper: they are not in this", "yellow")
                    raise
                finally:
                    await asker.close()
        except (BrokerError, NoKeeper) as error:
            return self._from_files(url, request, output, error)

    def _from_files(
        self,
        url: str | None,
        request: JourneyOf | JobsOf,
        output: Output,
        error: BrokerError | JournalError | ConfigurationError,
    ) -> Answer:
        files = self._files(url)
        if not files:
            raise error
        answer = _read(files, request)
        reason = "" if url is None else f"{error}\n"
        output.note(f"{reason}read from {', '.join(map(str, files))}, as it was left")
        return answer

    def _files(self, url: str | None) -> list[Path]:
        """The files that a keeper may have left."""
        if self.app is not None:
            from conveyor.cli.application import load_app

            app = load_app(self.app, broker=self.broker)
            place = app.journal_place(app.new_broker())
            return [place] if isinstance(place, Path) and place.exists() else []
        parts = urlsplit(url or "")
        beside = Path(f"{unquote(parts.path.removeprefix('/'))}.journal")
        if parts.scheme == "sqlite":
            return [beside] if beside.exists() else []
        return sorted(Path.cwd().glob("*.journal"))


def _read(files: list[Path], request: JourneyOf | JobsOf) -> Answer:
    answers = []
    for file in files:
        archive = Archive(file).open(create=False)
        try:
            answers.append(archive.answer("", request))
        finally:
            archive.close()
    return together(answers, request)
