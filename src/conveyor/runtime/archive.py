"""The archive: an application's journal in a SQLite file, bounded in age and size."""

# ruff: noqa: S608 - what is put into the statements are the names of columns, and conditions with parameters
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, cast

import apsw
import msgspec

from conveyor.broker import Clock
from conveyor.brokers.sqlite import queue_file
from conveyor.core.jobs import Job, JobFilter, Wish, jobs_of, wish_of
from conveyor.core.journal import Entry, Successes, Told
from conveyor.core.questions import Answer, JobsOf, JourneyOf, fit, shortened
from conveyor.errors import JournalError
from conveyor.runtime.journal import IN_MEMORY
from conveyor.runtime.tables import (
    APPLICATION_ID,
    AT_LENGTH,
    BRIEF,
    CAUSED,
    CAUSES,
    COLUMNS,
    ENTRIES_OF,
    FIRST_SEQ,
    FORGET_BATCHES,
    JOURNEYS_FROM,
    LAST_ENTRY_FROM,
    MESSAGES_FROM,
    OLD,
    ORIGIN,
    SCHEMA,
    SCHEMA_VERSION,
    SUCCEEDED,
    conditions_of,
    in_order,
    insert_entries,
    insert_successes,
)

DEFAULT_AGE_SECONDS: Final = 7 * 86_400.0
"""A week: time to come back from a weekend and look."""
DEFAULT_SIZE_BYTES: Final = 1024**3
"""About three million messages."""

BUSY_SECONDS: Final = 5.0
"""How long to wait for another keeper of the same file."""
QUESTION_SECONDS: Final = 3.0
"""A question that takes longer is answered with what was found by then."""
ROWS_AT_ONCE: Final = (200, 20, 1)
"""Rows in one statement: the connection gives up the interpreter's lock at every step, and behind a busy event loop each return of
it may take milliseconds. Of more text than 16 KiB apsw keeps no prepared statement."""
FEW: Final = 3
"""Successes with an origin of their own, in a batch, of which fewer are not worth an origin: they are kept at length."""
PRUNED_AT_ONCE: Final = 10_000
"""Entries that one step of pruning deletes at most: nobody waits long behind it."""
PRUNE_TO: Final = 0.95
"""Share of the permitted size that is left when it was exceeded, so that this is not so at once again."""
LOOK_AFTER: Final = 5_000
"""Entries after which the size is looked at."""
LONGEST_JOURNEY: Final = 5_000
"""Entries of one journey that are read at most."""
MOST_CAUSES: Final = 500
"""Hops back from what was asked for, at most."""
NEARBY: Final = 10_000
"""Entries of the journey, on either side of a message's success, among which is looked for what it led to: what a handler
publishes is told with its success, or not much earlier or later, and to look further would be to read all of the journey."""
PAGE: Final = 200
"""Jobs that are looked at in one step."""
KEPT_FREE_BYTES: Final = 2 * queue_file.LOW_DISK_BYTES
KEPT_FREE_SHARE: Final = 2 * queue_file.LOW_DISK_SHARE
"""Nothing is written while less than both of the disk is free: the queue file may be on it, and needs the room more."""

_decode: Final = msgspec.json.Decoder(list[Entry]).decode
_decode_ids: Final = msgspec.json.Decoder(list[str]).decode


class Found(NamedTuple):
    """What is known about a journey.

    Parameters:
        entries: where there are more, the first of all by what they have to do with what was asked for.
        more: there are more entries than these.
        others: the journeys that the id may mean, where that is not clear.
        own: so many of the entries, the first ones, are of the messages that were asked for.
    """

    entries: list[Entry]
    more: bool = False
    others: tuple[str, ...] = ()
    own: int = 0


class Jobs(NamedTuple):
    """The jobs that were found; more tells that there may be others."""

    jobs: list[Job]
    more: bool


class Archive:
    """The file and one connection to it; used by one thread at a time.

    Parameters:
        path: the file, or IN_MEMORY.
        age_seconds: how long entries are kept.
        size_bytes: how large the file may become; then the oldest entries go.
        clock: gives Unix seconds.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        age_seconds: float = DEFAULT_AGE_SECONDS,
        size_bytes: int = DEFAULT_SIZE_BYTES,
        clock: Clock = time.time,
    ) -> None:
        self.path: Final = path if path == IN_MEMORY else Path(path).absolute()
        self._age_seconds = age_seconds
        self._size_bytes = size_bytes
        self._clock = clock
        self._unlooked = 0
        self._inode = 0
        self._may_create = True
        self._is_open = False

    def open(self, *, create: bool = True) -> Self:
        """Open it, or create it where that is wanted.

        Raises:
            JournalError: it is not there, cannot be used, or is not safe to use; says what to do.
        """
        self._may_create = create
        try:
            if isinstance(self.path, Path):
                if create:
                    _check_place(self.path)
                elif not self.path.exists():
                    raise JournalError(f"there is no journal {self.path}")
                elif not self.path.is_file():
                    raise JournalError(f"cannot read the journal {self.path}: it is no file")
            flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_NOMUTEX  # one thread at a time uses it
            flags |= apsw.SQLITE_OPEN_CREATE if self.path == IN_MEMORY else 0
            self._db = apsw.Connection(str(self.path), flags=flags, statementcachesize=32)
            try:
                self._db.set_busy_timeout(int(BUSY_SECONDS * 1000))
                self._check_content(create=create)
                # An entry may get lost with the power; syncing every commit would take the disk from the queues.
                self._db.execute("PRAGMA synchronous = normal")
            except BaseException:
                self._db.close()
                raise
            if isinstance(self.path, Path):
                self._inode = self.path.stat().st_ino
            self._is_open = True
        except (apsw.Error, OSError) as error:
            raise JournalError(self._explain(error)) from error
        return self

    def close(self) -> None:
        """Close it, where it is open."""
        if self._is_open:
            self._db.close()
        self._is_open = False

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, batches: Iterable[tuple[str, Sequence[Told]]]) -> None:
        """Keep batches, each with its id, in one transaction; what was kept before is left out.

        Raises:
            JournalError: it cannot be written now; nothing was.
        """
        try:
            self._check_same()
            self._check_room()
            with self._transaction("BEGIN IMMEDIATE"):
                for id, told in batches:
                    self._write(id, told)
        except (apsw.Error, OSError) as error:
            raise JournalError(self._explain(error)) from error

    def _write(self, id: str, told: Sequence[Told]) -> None:
        new = self._rows(
            "INSERT OR IGNORE INTO batches (id, arrived, last_entry) VALUES (?, ?, 0) RETURNING seq", id, self._clock()
        )
        if not new:
            return
        last = self._last()
        at_length, in_short = list[Entry](), list[Successes]()
        for each in told:
            if isinstance(each, Entry):
                at_length.append(each)
            elif len(each.each) < FEW:
                at_length += each.entries()
            else:
                in_short.append(each)
        self._insert(insert_entries, last + 1, (), [msgspec.structs.astuple(entry) for entry in at_length])
        last += len(at_length)
        for each in in_short:
            first, last = last + 1, last + len(each.each)
            origin = self._rows(ORIGIN, each.topic, each.worker, each.process, each.queue, last)[0][0]
            self._insert(insert_successes, first, (origin, each.attempt, each.crashes), each.each)
        self._rows("UPDATE batches SET last_entry = ? WHERE seq = ?", last, *new[0])

    def _last(self) -> int:
        """The last seq that was given: its entry may be pruned, the batch is still there."""
        last = self._rows("SELECT last_entry FROM batches WHERE last_entry > 0 ORDER BY seq DESC LIMIT 1")
        return int(last[0][0]) if last else 0

    def _insert(
        self,
        statement: Callable[[int], str],
        first: int,
        shared: tuple[object, ...],
        rows: Sequence[tuple[object, ...]],
    ) -> None:
        """Write rows.

        Parameters:
            statement: for so many rows.
            first: the seq of the first row.
            shared: what they all have.
        """
        at = 0
        for size in ROWS_AT_ONCE:
            starts = range(at, len(rows) - size + 1, size)
            values = (tuple(chain((first + start, *shared), *rows[start : start + size])) for start in starts)
            self._db.executemany(statement(size), cast("Any", values))
            at += size * len(starts)
        self._unlooked += len(rows)

    def prune(self, *, always: bool = True) -> bool:
        """Delete what is too old, or too much; a step of it, so that nobody waits long.

        Parameters:
            always: look even where little was written since the last time.

        Returns:
            Whether there is more to do.

        Raises:
            JournalError: it cannot be done now.
        """
        if not always and self._unlooked < LOOK_AFTER:
            return False
        self._unlooked = 0
        try:
            return self._prune()
        except (apsw.Error, OSError) as error:
            raise JournalError(self._explain(error)) from error

    def _prune(self) -> bool:
        last = self._last()
        first = min((seq for (seq,) in self._rows(FIRST_SEQ) if seq is not None), default=last + 1)
        # There may be millions of batches: each look begins at the old end, and ends at what stays.
        [[old]] = self._rows(OLD, self._clock() - self._age_seconds)
        if (used := self._used_bytes()) > self._size_bytes:
            # The file has so many bytes an entry; whole batches go, at least one.
            spare = (used - PRUNE_TO * self._size_bytes) / used * (last - first + 1)
            [[wanted]] = self._rows(LAST_ENTRY_FROM, first + int(spare))
            old = max(old, wanted or last)
        until = min(old, first + PRUNED_AT_ONCE - 1)
        if first <= until and first <= last:
            with self._transaction("BEGIN IMMEDIATE"):
                self._rows(f"DELETE FROM {AT_LENGTH} WHERE seq <= ?", until)
                self._rows("DELETE FROM successes WHERE seq <= ?", until)
                self._rows("DELETE FROM origins WHERE last_entry <= ?", until)
                self._rows(FORGET_BATCHES, min(until, last - 1))
        self._rows(f"PRAGMA incremental_vacuum({PRUNED_AT_ONCE // 10})")
        return bool(until < min(old, last)) or int(self._pragma("freelist_count")) > PRUNED_AT_ONCE

    def _used_bytes(self) -> int:
        pages = self._pragma("page_count") - self._pragma("freelist_count")
        return int(pages * self._pragma("page_size"))

    # --- reading ------------------------------------------------------------------------------------------------------

    def journey(self, id: str) -> Found:
        """All entries of a journey.

        Parameters:
            id: of the journey, or of a message on it; the beginning of one is enough where only one journey fits.

        Raises:
            JournalError: it cannot be read.
        """
        with self._asking():
            return self._journey(id)

    def _journey(self, id: str) -> Found:
        exactly = self._rows(
            "SELECT coalesce(correlation_id, message_id) FROM entries WHERE message_id = ?1"
            " UNION SELECT ?1 WHERE EXISTS (SELECT 1 FROM entries WHERE correlation_id = ?1)",
            id,
        )
        beginning = id, id + "\U0010ffff"
        journeys = exactly or self._rows(JOURNEYS_FROM, *beginning)
        if len(journeys) > 1:
            return Found([], len(journeys) > 10, tuple(journey for (journey,) in journeys[:10]))
        if not journeys:
            return Found([])
        journey = journeys[0][0]
        asked = [id] if exactly else self._ids(MESSAGES_FROM, *beginning)
        causes = self._ids(CAUSES, _json(asked), MOST_CAUSES)
        caused = self._ids(CAUSED, _json(asked), journey, NEARBY, LONGEST_JOURNEY)
        # The end of what is too long is left out. What began the journey comes early: without it nobody can tell what
        # the rest is about.
        first = _json(dict.fromkeys([*asked, journey, *causes, *caused]))
        entries = self._entries(ENTRIES_OF, first, journey, LONGEST_JOURNEY + 1)
        others = "correlation_id = ?2 AND message_id NOT IN (SELECT value FROM json_each(?1))"
        rest = in_order(f"seq, {COLUMNS}", others, "seq LIMIT ?3")
        entries += self._entries(rest, first, journey, LONGEST_JOURNEY + 1 - len(entries))
        found = entries[:LONGEST_JOURNEY]
        return Found(found, len(entries) > len(found), own=sum(entry.message_id in asked for entry in found))

    def of(self, ids: Iterable[str], *, results: bool = True) -> list[Entry]:
        """The entries of these messages.

        Raises:
            JournalError: they cannot be read.
        """
        with self._asking():
            return self._of(ids, results=results)

    def _of(self, ids: Iterable[str], *, results: bool) -> list[Entry]:
        columns = COLUMNS if results else BRIEF
        return self._entries(
            f"SELECT {columns} FROM entries WHERE message_id IN (SELECT value FROM json_each(?))", _json(ids)
        )

    def cancelled(self, limit: int) -> dict[str, Wish]:
        """The messages that are cancelled and have not ended, by id, the latest ones first.

        Raises:
            JournalError: they cannot be read.
        """
        with self._asking():
            rows = self._rows(
                f"SELECT message_id FROM {AT_LENGTH} AS wish WHERE kind = 'cancelling' AND kind NOT IN ('published', 'succeeded')"
                f" AND NOT EXISTS (SELECT 1 FROM {AT_LENGTH} WHERE message_id = wish.message_id"
                " AND kind IN ('succeeded', 'duplicate', 'cancelled') AND worker = topic)"
                f" AND NOT EXISTS (SELECT 1 FROM {SUCCEEDED} WHERE message_id = wish.message_id AND worker = topic)"
                " ORDER BY seq DESC LIMIT ?",
                limit,
            )
            of: dict[str, list[Entry]] = {id: [] for (id,) in rows}
            for entry in self._of(of, results=False):
                of[entry.message_id].append(entry)
        wishes = {id: wish_of(entries) for id, entries in of.items()}
        return {id: wish for id, wish in wishes.items() if wish is not None and wish.holds}

    def jobs(self, which: JobFilter, limit: int) -> Jobs:
        """Jobs, the newest first, without results and tracebacks; what cannot be found soon is left out.

        Raises:
            JournalError: they cannot be read.
        """
        found: list[Job] = []
        try:
            with self._asking():
                if which.ids is not None:
                    found = [job for job in jobs_of(self._of(which.ids, results=False)) if which.fits(job)]
                    return Jobs(found[:limit], len(found) > limit)
                seen: set[str] = set()
                before = 2**62
                while len(found) <= limit:
                    ids, before = self._candidates(which, before)
                    if not ids:
                        return Jobs(found, more=False)
                    fresh = [id for id in dict.fromkeys(ids) if id not in seen]
                    seen.update(fresh)
                    of: dict[str, list[Job]] = {}
                    for job in jobs_of(self._of(fresh, results=False)):
                        of.setdefault(job.id, []).append(job)
                    found += [job for id in fresh for job in of.get(id, ()) if which.fits(job)]
                return Jobs(found[:limit], more=True)
        except _TooLong:
            return Jobs(found[:limit], more=True)

    def _candidates(self, which: JobFilter, before: int) -> tuple[list[str], int]:
        """A page of messages that may be meant, the newest first, and where the next page begins."""
        conditions, values = conditions_of(which)
        page = in_order("message_id, seq", " AND ".join(("seq < ?", *conditions)), f"seq DESC LIMIT {PAGE}")
        rows = self._rows(
            f"SELECT coalesce(json_group_array(message_id), '[]'), min(seq) FROM ({page})", *(before, *values) * 2
        )
        return msgspec.json.decode(rows[0][0], type=list[str]), rows[0][1] or 0

    def answer(self, to: str, request: JourneyOf | JobsOf) -> Answer:
        """What it knows.

        Parameters:
            to: the question's id.

        Raises:
            JournalError: it cannot be read.
        """
        if isinstance(request, JourneyOf):
            entries, more, others, own = self.journey(request.id)
            fitting, cut = fit(entries)
            if cut:  # what happened is worth more than where in the code, but for what was asked for
                whole = 0 if fit(entries[:own])[1] else own
                fitting, cut = fit([*entries[:whole], *map(shortened, entries[whole:])])
            return Answer(to, entries=fitting, others=others, more=more or cut)
        jobs, more = self.jobs(request.which, request.limit)
        wanted, cut = fit(jobs)
        return Answer(to, jobs=wanted, more=more or cut)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """A question: it is given up after a while, and errors are said in words."""
        deadline = time.monotonic() + QUESTION_SECONDS
        self._check_same()
        self._db.set_progress_handler(lambda: time.monotonic() > deadline, 20_000)
        try:
            with self._transaction("BEGIN"):  # one moment of the file
                yield
        except apsw.InterruptError as error:
            raise _TooLong(f"the question to {self.path} took more than {QUESTION_SECONDS:g} s") from error
        except (apsw.Error, OSError) as error:
            raise JournalError(self._explain(error)) from error
        except msgspec.MsgspecError as error:
            raise JournalError(f"{self.path} holds what is no entry of a journal: {error}") from error
        finally:
            self._db.set_progress_handler(None)

    def _entries(self, select: str, *values: object) -> list[Entry]:
        """The entries of a selection of all columns, in one step; see ROWS_AT_ONCE."""
        found = self._rows(f"SELECT json_group_array(json_array({COLUMNS})) FROM ({select})", *values)
        return _decode(found[0][0])

    def _ids(self, select: str, *values: object) -> list[str]:
        """The ids of a selection, in one step; see ROWS_AT_ONCE."""
        return _decode_ids(self._rows(f"SELECT json_group_array(id) FROM ({select})", *values)[0][0])

    # --- the file -----------------------------------------------------------------------------------------------------

    def _check_content(self, *, create: bool) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        while not self._is_ours():
            if self._rows("SELECT 1 FROM sqlite_schema") and not self._is_ours():
                raise JournalError(f"cannot open {self.path}: {self._of_whom()}")
            if not create:
                raise JournalError(f"{self.path} is no journal")
            try:
                self._db.execute("PRAGMA auto_vacuum = incremental")
                self._rows("PRAGMA journal_mode = wal")
                self._bring_up_to_date()
            except apsw.BusyError:  # another keeper makes it in this moment; changing the journal mode does not wait
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if self._pragma("user_version") < SCHEMA_VERSION:
            if not create:
                raise JournalError(
                    f"cannot open {self.path}: an earlier version of Conveyor made it; it is brought up to date by the keeper of"
                    " this version, when it starts (conveyor run, conveyor journal)"
                )
            self._bring_up_to_date()
        if (version := self._pragma("user_version")) != SCHEMA_VERSION:
            raise JournalError(
                f"cannot open {self.path}: a later version of Conveyor made it (file version {version}); upgrade Conveyor here"
            )

    def _bring_up_to_date(self) -> None:
        """Make what the file does not have yet."""
        with self._transaction("BEGIN IMMEDIATE"):
            if self._is_ours():
                if self._pragma("user_version") >= SCHEMA_VERSION:  # another keeper was faster
                    return
                # A keeper of the earlier version that still runs cannot write to a view, and leaves its batches in the queue.
                self._db.execute(f"ALTER TABLE entries RENAME TO {AT_LENGTH}")
            self._db.execute(SCHEMA)
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}")

    def _is_ours(self) -> bool:
        return bool(self._pragma("application_id") == APPLICATION_ID)

    def _of_whom(self) -> str:
        """What a database is that is no journal, and what to do."""
        if self._pragma("application_id") != queue_file.APPLICATION_ID:
            return "it is a database of another program; name another file"
        beside = Path(f"{self.path}.journal")
        verb = "is" if beside.exists() else "would be"
        return f"it is a queue file of Conveyor, and no journal; its journal {verb} {beside}"

    def _check_same(self) -> None:
        """Go on with a new file where somebody deleted the old one."""
        if not isinstance(self.path, Path):
            return
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                return
        self.close()
        self.open(create=self._may_create)

    def _check_room(self) -> None:
        if not isinstance(self.path, Path):
            return
        disk = os.statvfs(self.path.parent)
        free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        if free < min(KEPT_FREE_BYTES, size * KEPT_FREE_SHARE):
            raise JournalError(
                f"the disk of {self.path} is almost full ({free // 1024} kB free): the journal waits, work goes on;"
                " free some space, or let the journal keep less"
            )

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        self._db.execute(begin)
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite itself takes back what met a full disk
                self._db.execute("ROLLBACK")
            raise

    def _rows(self, statement: str, *values: object) -> list[Any]:
        return self._db.execute(statement, cast("Any", values)).fetchall()

    def _pragma(self, name: str) -> Any:
        return self._rows(f"PRAGMA {name}")[0][0]

    def _explain(self, error: Exception) -> str:
        path = self.path
        if isinstance(error, apsw.FullError):
            return f"the disk of {path} is full: the journal waits, work goes on; free some space"
        if isinstance(error, apsw.BusyError):
            return f"another process has held the write lock of {path} for more than {BUSY_SECONDS:g} s"
        if isinstance(error, apsw.NotADBError):
            return f"{path} is no journal; move it away, or name another file"
        if isinstance(error, apsw.CorruptError):
            return f"{path} is damaged ({error}); move it away, and a new one is begun"
        return f"{path}: {type(error).__name__}: {error}"


class _TooLong(JournalError):
    """A question was given up."""


def _json(ids: Iterable[str]) -> str:
    """Ids as one value of a statement, which json_each() takes apart."""
    return msgspec.json.encode(list(ids)).decode()


def _check_place(path: Path) -> None:
    """Fail where no journal can be; create an empty file where there is none."""
    folder = path.parent
    if not folder.is_dir():
        raise JournalError(f"cannot keep the journal {path}: the folder {folder} does not exist")
    if path.is_dir():
        raise JournalError(
            f"cannot keep the journal {path}: it is a folder; name a file, such as {path / 'shop.journal'}"
        )
    if path.exists() and not path.is_file():
        raise JournalError(f"cannot keep the journal {path}: it is no regular file (a device, a pipe?); name another")
    kind = queue_file.file_system(folder.resolve(), Path("/proc/self/mountinfo"))
    if kind in queue_file.REMOTE or kind.startswith("fuse."):
        raise JournalError(
            f"cannot keep the journal {path}: it is on a network file system ({kind}), where locks do not hold; name a local file"
        )
    if not path.exists():
        queue_file.create(path)
    for place in (path, folder):
        if not os.access(place, os.R_OK | os.W_OK):
            raise JournalError(f"cannot keep the journal {path}: no permission to write {place}")
