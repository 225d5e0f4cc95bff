"""Of which original each result is: the size and date that it had when it was sent to be processed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import msgspec

DAMAGED: Final = ("SQLITE_NOTADB", "SQLITE_CORRUPT")


class Original(msgspec.Struct, frozen=True):
    """What tells an original from another one of the same name.

    Parameters:
        changed: nanoseconds of Unix time.
        size: bytes.
    """

    changed: int
    size: int


def look_at(path: Path) -> Original | None:
    """What is there now; None where nothing can be seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Original(found.st_mtime_ns, found.st_size)


class Originals:
    """What was noted of each original, by its path within the folder. A file: memory does not grow with the folder."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def of(self, path: Path) -> Original | None:
        """What the original was when it was noted; None where it never was."""
        row = self._connection.execute("SELECT changed, size FROM originals WHERE path = ?", (str(path),)).fetchone()
        return Original(*row) if row else None

    def note(self, path: Path, original: Original) -> None:
        """It will be processed as it is now."""
        self._connection.execute(
            "INSERT OR REPLACE INTO originals VALUES (?, ?, ?)", (str(path), original.changed, original.size)
        )


@contextmanager
def noted(file: Path) -> Iterator[Originals]:
    """The notes in a file that no other process uses meanwhile; one that is damaged is begun anew, and so are all images.

    Raises:
        OSError: they cannot be kept; the disk is full, for example.
    """
    try:
        with closing(_opened(file)) as connection:
            yield Originals(connection)
    except sqlite3.Error as error:
        raise OSError(f"{file} cannot be kept: {error}") from error


def _opened(file: Path) -> sqlite3.Connection:
    try:
        return _open(file)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorname", None) not in DAMAGED:
            raise
    for ending in ("", "-wal"):
        Path(f"{file}{ending}").unlink(missing_ok=True)
    return _open(file)


def _open(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, isolation_level=None)
    try:
        # Alone, so that it may be on a network; and what a power failure takes is noted again.
        for statement in (
            "PRAGMA locking_mode=EXCLUSIVE",
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=NORMAL",
            "CREATE TABLE IF NOT EXISTS originals (path TEXT PRIMARY KEY, changed INTEGER, size INTEGER) WITHOUT ROWID",
        ):
            connection.execute(statement)
    except BaseException:
        connection.close()
        raise
    return connection
