"""The queue file on its disk: where it may be, opening and checking it, the room it has, and what its errors mean."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, cast

import apsw

from conveyor.errors import BrokerError, BrokerFull, BrokerUnavailable

Durability = Literal["full", "normal"]
"""full: a publish that returned survives a power cut. normal: it survives the death of every process, but not always of the machine."""

OLDEST_SQLITE: Final = (3, 51, 3)
"""Earlier ones can lose commits in WAL mode with several connections (sqlite.org/wal.html#walresetbug)."""
APPLICATION_ID: Final = 0x436E7679
"""'Cnvy' in the file's header: it is a queue file."""
SCHEMA_VERSION: Final = 1
BUSY_SECONDS: Final = 5.0
"""How long to wait for another process' write: it lasts milliseconds unless that process was stopped inside it."""
CHECKPOINT_PAGES: Final = 4000
"""16 MB of WAL are copied into the file at a time: pages that change often are copied once."""
WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024
"""A WAL that grew beyond it is cut off at the next quiet moment."""
FREE_PAGES: Final = 4096
"""So many unused pages (16 MB) stay in the file for later; more are given back to the disk at a quiet moment, so many at a time."""
LOW_DISK_BYTES: Final = 64 * 1024 * 1024
LOW_DISK_SHARE: Final = 0.05
"""The disk is almost full when less than both is free: nothing is accepted or handed out, so that what is at work can end."""
BALLAST_BYTES: Final = 4 * 1024 * 1024
"""Space held in a file of its own, given up on a full disk so that what is at work can end; at most LOW_DISK_SHARE of the disk."""
FULL_DISK_BYTES: Final = 64 * 1024
"""With less than this free, an I/O error is that of a full disk: so SQLite says that it cannot make its -shm longer."""
OPERATOR_SECONDS: Final = 30.0
"""An operator's question that takes longer is given up: a long read keeps the WAL from being reused."""
REMOTE: Final = frozenset("9p afs ceph cifs coda glusterfs gpfs lustre ncpfs nfs nfs4 smb2 smb3 smbfs".split())
"""File systems whose locks or shared memory do not hold between hosts; and all of fuse."""

_TEXT: Final = resources.files(__package__).joinpath("statements.sql").read_text("utf-8")
SQL: Final = {
    name: text.strip()
    for name, text in re.findall(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", _TEXT, re.MULTILINE | re.DOTALL)
}

_open_connections: Final[set[apsw.Connection]] = set()
"""Keeps a forked child from closing what belongs to its parent."""


class QueueFile:
    """The file and its one writing connection; used by one thread."""

    def __init__(self, path: Path, durability: Durability, *, network_filesystem: bool) -> None:
        self.path = path
        self._wal = Path(f"{path}-wal")
        self._ballast = Path(f"{path}.ballast")
        self._durability = durability
        self._network_filesystem = network_filesystem

    def open(self) -> None:
        """Open or create it, and check that it is safe to use.

        Raises:
            BrokerError, apsw.Error, OSError: it is not; explain() says what to do.
        """
        if tuple(map(int, apsw.sqlite_lib_version().split("."))) < OLDEST_SQLITE:
            raise BrokerError(
                f"apsw carries SQLite {apsw.sqlite_lib_version()}, which can lose commits; 3.51.3 or later is needed:"
                " pip install --upgrade apsw (a distribution's own package may be too old)"
            )
        _check_place(self.path, network_filesystem=self._network_filesystem)
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_NOMUTEX  # one thread opens, uses and closes it
        self.db = apsw.Connection(str(self.path), flags=flags, statementcachesize=64)
        _open_connections.add(self.db)
        try:
            self.db.set_busy_timeout(int(BUSY_SECONDS * 1000))
            self._check_content()
            self.db.execute(f"PRAGMA synchronous = {self._durability}; PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        except BaseException:
            self.close()
            raise
        self._inode = self.path.stat().st_ino
        self._fill_ballast()

    def close(self) -> None:
        """Close it; the last one of all processes takes the ballast away."""
        self.db.close()
        _open_connections.discard(self.db)
        if not self._wal.exists():
            self.drop_ballast()

    def _check_content(self) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        while not self._is_ours():
            # Whoever makes it sets the tables and the id in one commit, which may have come after the first look.
            if self.rows("SELECT 1 FROM sqlite_schema") and not self._is_ours():
                raise BrokerError(
                    f"cannot open {self.path}: it is a database of another program; give the queue a file of its own"
                )
            try:
                self.db.execute("PRAGMA auto_vacuum = incremental")  # before WAL and the first table, or it stays off
                self.rows("PRAGMA journal_mode = wal")
                self.db.execute("BEGIN IMMEDIATE")
                if not self._is_ours():
                    self.db.execute(SQL["schema"])
                    self.db.execute(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}")
                self.db.execute("COMMIT")
            except apsw.BusyError:  # somebody else makes it in this moment; changing the journal mode does not wait
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if (version := self._pragma("user_version")) != SCHEMA_VERSION:
            raise BrokerError(
                f"cannot open {self.path}: a later version of Conveyor made it (file version {version}, this one knows {SCHEMA_VERSION});"
                " upgrade Conveyor here"
            )

    def _is_ours(self) -> bool:
        return bool(self._pragma("application_id") == APPLICATION_ID)

    def rows(self, statement: str, *values: object) -> list[Any]:
        """All rows of an answer."""
        return self.db.execute(statement, cast("Any", values)).fetchall()

    def _pragma(self, name: str) -> Any:
        return self.rows(f"PRAGMA {name}")[0][0]

    def check_same(self) -> None:
        """Fail where the file is no longer there: what is written now would vanish."""
        try:
            if self.path.stat().st_ino == self._inode:
                return
        except FileNotFoundError:
            pass
        raise BrokerUnavailable(
            f"{self.path} was deleted or replaced while it was in use; restart every process that uses it"
        )

    def low_disk(self) -> str | None:
        """Why nothing more should begin; None where there is room."""
        free, size = _disk(self.path.parent)
        if free >= min(LOW_DISK_BYTES, size * LOW_DISK_SHARE):
            return None
        return f"the disk of {self.path} is almost full ({free // 1024} kB free): what is at work may end; free some space to go on"

    def _fill_ballast(self) -> None:
        if self._ballast.exists() or self.low_disk():
            return
        with contextlib.suppress(OSError):  # no room, or another process made it
            self._ballast.touch(0o600, exist_ok=False)
            self._ballast.write_bytes(bytes(int(min(BALLAST_BYTES, _disk(self.path.parent)[1] * LOW_DISK_SHARE))))

    def drop_ballast(self) -> bool:
        """Give up the held space; False where it is gone already."""
        try:
            self._ballast.unlink()
        except FileNotFoundError:
            return False
        return True

    def tidy(self) -> bool:
        """In a quiet moment: cut off a WAL that grew, give unused pages back to the disk, hold space for hard times.

        Returns:
            Whether there is more to do, in the next quiet moment.
        """
        more = False
        self.db.set_busy_timeout(0)  # whoever is busy has better things to do than to wait for this
        with contextlib.suppress(apsw.Error, OSError):
            self._fill_ballast()
            if (unused := self._pragma("freelist_count")) > 2 * FREE_PAGES:
                self.rows(f"PRAGMA incremental_vacuum({FREE_PAGES})")
                self.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)  # only now is the file shorter
                more = unused > 3 * FREE_PAGES
            if self._wal.stat().st_size > WAL_LIMIT_BYTES:
                self.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        self.db.set_busy_timeout(int(BUSY_SECONDS * 1000))
        return more


def _check_place(path: Path, *, network_filesystem: bool) -> None:
    """Fail where no queue file can be; create an empty one where there is none."""
    folder = path.parent
    if not folder.is_dir():
        raise BrokerError(
            f"cannot open {path}: the folder {folder} does not exist; create it, or change the broker's URL"
        )
    if path.is_dir():
        raise BrokerError(
            f"cannot open {path}: it is a folder, and the broker needs the name of a file, such as {path / 'shop.queue'}"
        )
    kind = file_system(folder.resolve(), Path("/proc/self/mountinfo"))
    if not network_filesystem and (kind in REMOTE or kind.startswith("fuse.")):
        raise BrokerError(
            f"cannot open {path}: it is on a network file system ({kind}), where locks do not hold between hosts and messages would be"
            " lost; use a local disk or another broker, or add ?network_filesystem=allow where only this host uses it"
        )
    try:
        if not path.exists():
            create(path)
    except PermissionError as error:
        raise BrokerError(
            f"cannot open {path}: no permission to create it; change the folder's owner or mode, or the broker's URL"
        ) from error
    for place in (path, folder):
        if not os.access(place, os.R_OK | os.W_OK):
            raise BrokerError(
                f"cannot open {path}: no permission to write {place}; change its owner or mode, or the broker's URL"
            )


def create(path: Path) -> None:
    """An empty file of mode 0600, whatever the umask. It has its name only when we have closed it: a close drops SQLite's locks."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with contextlib.suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()


def file_system(folder: Path, mounts: Path) -> str:
    """The kind of file system that a folder is on; "" where the system does not say (proc_pid_mountinfo(5))."""
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4])
        if folder.is_relative_to(mount) and len(mount) >= best:
            best, kind = len(mount), rest.split()[0]
    return kind


def _disk(folder: Path) -> tuple[int, int]:
    """Free bytes, and all."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize


def read(path: Path, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """An operator's question, on a connection of its own, so that it holds up nobody."""
    deadline = time.monotonic() + OPERATOR_SECONDS
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        db.set_busy_timeout(int(BUSY_SECONDS * 1000))
        db.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
        db.create_scalar_function("casefold", _casefold, 1, deterministic=True)
        return db.execute(statement, values).fetchall()
    finally:
        db.close()


def _casefold(*texts: Any) -> str:
    return str(texts[0]).casefold()


def explain(error: Exception, path: Path) -> BrokerError:
    """What an error of SQLite or of the system means to whoever asked, and what to do."""
    if isinstance(error, BrokerError):
        return error
    if isinstance(error, apsw.FullError) or (
        isinstance(error, apsw.IOError) and _disk(path.parent)[0] < FULL_DISK_BYTES
    ):
        return BrokerFull(f"the disk of {path} is full; free some space, it goes on by itself")
    if isinstance(error, apsw.BusyError):
        pid = _write_lock_holder(path)
        who = f"process {pid}" if pid else "another process"
        return BrokerUnavailable(
            f"{who} has held the write lock of {path} for more than {BUSY_SECONDS:g} s; if it is stopped, continue or kill it"
        )
    if isinstance(error, apsw.NotADBError):
        return BrokerError(f"{path} is no SQLite database; move it away, or change the broker's URL")
    if isinstance(error, apsw.CorruptError):
        return BrokerError(
            f"{path} is damaged ({error}); stop its users, keep a copy, and save what can be read with: sqlite3 {path} .recover"
        )
    if isinstance(error, apsw.InterruptError):
        return BrokerUnavailable(f"the question to {path} took more than {OPERATOR_SECONDS:g} s and was given up")
    if isinstance(error, OSError | apsw.IOError | apsw.CantOpenError | apsw.ReadOnlyError | apsw.NoMemError):
        return BrokerUnavailable(f"{path}: {why(error)}")
    return BrokerError(f"{path}: {why(error)}")


def why(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}"


WRITE_LOCK_BYTE: Final = 120
"""Of the -shm file (sqlite.org/walformat.html#locks)."""


def _write_lock_holder(path: Path) -> int | None:
    """The process that holds the WAL's write lock; None where the system does not say (Linux does, in proc_locks(5))."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = Path(f"{path}-shm").stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if (
                "->" not in fields
                and fields[5].endswith(f":{inode}")
                and fields[3] == "WRITE"
                and int(fields[6]) <= WRITE_LOCK_BYTE <= int(fields[7])
            ):
                return int(fields[4]) or None
    return None
