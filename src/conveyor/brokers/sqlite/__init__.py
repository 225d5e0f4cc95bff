"""The SQLite broker: many processes of one host on one queue file, with no server.

Every broker object has one writer thread with one connection. Whatever has gathered while a commit was on its way goes into the
next one together, and its results reach the event loop by one call. The SQL is beside this file, in statements.sql.

The connection gives up the interpreter's lock at every step of a statement, and behind a busy event loop each return of it may
take milliseconds. So a batch is one step, however many rows it has: rows go in as many-row VALUES or as JSON, and come out as one.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import queue
import re
import secrets
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar, cast, get_args
from urllib.parse import parse_qsl, unquote, urlsplit
from weakref import WeakSet

import apsw
import msgspec

from conveyor.broker import Clock, DeadFilter, DeadLetter, Delivery, Feature, Queue, QueueInfo, Settlement
from conveyor.core.message import JSON, NO_HEADERS, Message
from conveyor.core.settle import Dead, Done, Release, RetryAt
from conveyor.errors import BrokerError, BrokerFull, BrokerUnavailable, ConfigurationError, PublishFailed, QueueConflict

log = logging.getLogger("conveyor.sqlite")

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
POLL_SECONDS: Final = (0.05, 1.0)
"""A waiting fetch looks by itself, in case that nobody could wake it: soon after something happened, then ever more seldom."""
OPERATOR_SECONDS: Final = 30.0
"""An operator's question that takes longer is given up: a long read keeps the WAL from being reused."""
LARGE_BODY: Final = 65_536
"""Bytes; larger bodies are read one by one, smaller ones of a batch together."""
CHUNKS: Final = (100, 10, 1)
"""So many rows are inserted by one statement."""
CLOCK_TICK_NANOSECONDS: Final = 50_000_000
"""A folder's time of change has at least this resolution."""
LONGEST_ADDRESS: Final = 100
"""Bytes of a unix socket's path (sun_path has 108, on some systems 104)."""
WRITE_LOCK_BYTE: Final = 120
MANY: Final = 5_000
"""So many messages are purged in one commit, so that others wait milliseconds."""
REMOTE: Final = frozenset("9p afs ceph cifs coda glusterfs gpfs lustre ncpfs nfs nfs4 smb2 smb3 smbfs".split())
"""File systems whose locks or shared memory do not hold between hosts; and all of fuse."""
WITNESS_SECONDS: Final = 2.0
"""Who saw a process die can say more about it than a socket that does not answer, and has so long to say it (reclaim)."""
EXPIRED: Final = "its lease ended without a sign of life"
BURIED: Final = "its process ended without closing the broker"

_TEXT: Final = resources.files(__name__).joinpath("statements.sql").read_text("utf-8")
SQL: Final = {
    name: text.strip()
    for name, text in re.findall(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", _TEXT, re.MULTILINE | re.DOTALL)
}
COLUMNS: Final = 17
"""Values of one row of SQL["insert"]."""
INSERTS: Final = {rows: f"{SQL['insert']} {','.join(['(' + ','.join('?' * COLUMNS) + ')'] * rows)}" for rows in CHUNKS}
READY, DELAYED = 0, 2
FATAL: Final = (apsw.FullError, apsw.IOError, apsw.CorruptError)
"""No operation's fault: the whole transaction fails."""

_decode_headers: Final = msgspec.json.Decoder(dict[str, str]).decode
_Result = TypeVar("_Result")
_Receipt = tuple[int, int]


def from_url(url: str, *, owner: str | None, clock: Clock) -> SqliteBroker:
    """``sqlite:///relative.queue`` or ``sqlite:////absolute.queue``, with ``?durability=full|normal&network_filesystem=allow``.

    Raises:
        ConfigurationError: the URL has parts that make no sense here.
    """
    parts = urlsplit(url)
    if parts.netloc or len(parts.path) < 2 or parts.path.endswith("/") or parts.fragment:
        raise ConfigurationError(
            f"{url!r}: a SQLite URL is sqlite:///relative/path.queue or sqlite:////absolute/path.queue"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    durability, remote = options.pop("durability", "full"), options.pop("network_filesystem", "refuse")
    if options:
        raise ConfigurationError(
            f"{url!r}: unknown parameter {next(iter(options))!r}; known are durability and network_filesystem"
        )
    if durability not in get_args(Durability):
        raise ConfigurationError(f"{url!r}: durability is full or normal, not {durability!r}")
    if remote not in {"refuse", "allow"}:
        raise ConfigurationError(f"{url!r}: network_filesystem is refuse or allow, not {remote!r}")
    return SqliteBroker(
        Path(unquote(parts.path[1:])),
        durability=cast("Durability", durability),
        owner=owner,
        clock=clock,
        network_filesystem=remote == "allow",
    )


class _QueueRow(NamedTuple):
    id: int
    name: str
    ordered: int
    max_length: int | None
    lease_seconds: float
    owner: int | None
    topics: tuple[str, ...]


class _Doubt(Exception):
    """A lease in a batch is lost, or a message cannot be stored: it is rolled back, and done again one operation after the other."""


class _Claim(NamedTuple):
    """A claimed batch as it comes from SQLite; made into deliveries after the commit, when nobody waits for the write lock."""

    queue: str
    token: int
    rows: bytes
    bodies: bytes
    large: dict[int, bytes]

    def deliveries(self) -> list[Delivery]:
        """What the receiver gets."""
        try:
            rows = msgspec.json.decode(self.rows)
        except (msgspec.DecodeError, UnicodeDecodeError):  # another program put text there that is not UTF-8
            rows = msgspec.json.decode(self.rows.decode("utf-8", "replace"))
        made: list[Delivery] = []
        queue, token, bodies, large = self.queue, self.token, self.bodies, self.large
        offset, by_priority = 0, False
        for seq, deliveries, attempts, error, length, name, topic, key, headers, kind, *rest in rows:
            if length > LARGE_BODY:
                body = large[seq]
            else:
                body = bodies[offset : offset + length]
                offset += length
            message = Message(name, topic, body, key, _headers(headers), kind or JSON, *rest)
            by_priority = by_priority or message.priority != 0
            made.append(Delivery(message, queue, (seq, token), deliveries, attempts, error))
        if by_priority:
            made.sort(key=lambda each: -each.message.priority)
        return made


class _File:
    """The queue file as its writer thread uses it. All but open, close and tidy is called inside a transaction."""

    def __init__(
        self, path: Path, owner: str, bell: _Bell, clock: Clock, durability: Durability, *, network_filesystem: bool
    ) -> None:
        self.path = path
        self._owner = owner
        self._owner_id = 0
        self._bell = bell
        self._clock = clock
        self.now = 0.0
        """When this transaction began."""
        self.touched: set[str] = set()
        """Queues in which this transaction made something ready, or may have."""
        self.by_name: dict[str, _QueueRow] = {}
        self._by_topic: dict[str, list[_QueueRow]] = {}
        self._catalog = -1
        self._unchecked: dict[int, int] = {}
        self._durability = durability
        self._network_filesystem = network_filesystem

    # The file itself

    def open(self) -> None:
        """Open or create it, and check that it is safe to use."""
        if tuple(map(int, apsw.sqlite_lib_version().split("."))) < OLDEST_SQLITE:
            raise BrokerError(
                f"apsw carries SQLite {apsw.sqlite_lib_version()}, which can lose commits; 3.51.3 or later is needed:"
                " pip install --upgrade apsw (a distribution's own package may be too old)"
            )
        _check_place(self.path, network_filesystem=self._network_filesystem)
        self.db = apsw.Connection(str(self.path), flags=apsw.SQLITE_OPEN_READWRITE, statementcachesize=64)
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
        if not Path(f"{self.path}-wal").exists():
            self.drop_ballast()

    def _check_content(self) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        while self._pragma("application_id") != APPLICATION_ID:
            if self._rows("SELECT 1 FROM sqlite_schema"):
                raise BrokerError(
                    f"cannot open {self.path}: it is a database of another program; give the queue a file of its own"
                )
            try:
                self.db.execute("PRAGMA auto_vacuum = incremental")  # before WAL and the first table, or it stays off
                self._rows("PRAGMA journal_mode = wal")
                self.begin()
                if self._pragma("application_id") != APPLICATION_ID:
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

    def _rows(self, statement: str, *values: object) -> list[Any]:
        return self.db.execute(statement, cast("Any", values)).fetchall()

    def _pragma(self, name: str) -> Any:
        return self._rows(f"PRAGMA {name}")[0][0]

    def begin(self) -> None:
        """Start a write transaction; from here on nobody else writes."""
        self.db.execute("BEGIN IMMEDIATE")
        self.now = self._clock()

    def roll_back(self) -> None:
        """Undo what is not committed; SQLite may have done so itself."""
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")
        self._catalog = -1
        self.touched.clear()

    def forget_catalog(self) -> None:
        """What was read of the queues may have been rolled back: read it again."""
        self._catalog = -1
        self.read_catalog()

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
        ballast = self._ballast
        if ballast.exists() or self.low_disk():
            return
        with contextlib.suppress(OSError):  # no room, or another process made it
            ballast.touch(0o600, exist_ok=False)
            ballast.write_bytes(bytes(int(min(BALLAST_BYTES, _disk(self.path.parent)[1] * LOW_DISK_SHARE))))

    def drop_ballast(self) -> bool:
        """Give up the held space; False where it is gone already."""
        try:
            self._ballast.unlink()
        except FileNotFoundError:
            return False
        return True

    @property
    def _ballast(self) -> Path:
        return self.path.with_name(self.path.name + ".ballast")

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
                self._rows(f"PRAGMA incremental_vacuum({FREE_PAGES})")
                self.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)  # only now is the file shorter
                more = unused > 3 * FREE_PAGES
            if Path(f"{self.path}-wal").stat().st_size > WAL_LIMIT_BYTES:
                self.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        self.db.set_busy_timeout(int(BUSY_SECONDS * 1000))
        return more

    # Owners and queues

    def register(self) -> None:
        """Become known as alive: what needs an owner (a lease, a temporary queue, a subscription) has one from here on."""
        self._owner_id = 0
        for number, name in self._rows("SELECT id, socket FROM owner WHERE name = ?", self._owner):
            if name == self._bell.name:
                self._owner_id = number
                return
            if self._bell.answers(name):
                raise BrokerError(f"the owner {self._owner!r} is in use by another living broker object on {self.path}")
            self._bury(number, why=BURIED, uncounted=False)
        self.db.execute("INSERT INTO owner (name, socket) VALUES (?, ?)", (self._owner, self._bell.name))
        self._owner_id = self.db.last_insert_rowid()

    def sweep(self) -> None:
        """Bury the owners that are dead: their leases, subscriptions and temporary queues."""
        for number, name in self._rows("SELECT id, socket FROM owner"):
            if not self._bell.answers(name):
                self._bury(number, why=BURIED, uncounted=False)

    def _bury(self, number: int, *, why: str | None, uncounted: bool) -> int:
        """Give back what an owner holds, and forget it; returns how many messages came back."""
        self.db.execute(SQL["reclaim"], (number, self.now, why, int(uncounted)))
        if came_back := self.db.changes():
            self.touched.update(self.by_name)
        for [temporary] in self._rows("SELECT id FROM queue WHERE owner = ?", number):
            self.db.execute(SQL["remove_queue"], (temporary,) * SQL["remove_queue"].count("?1"))
        self.db.execute("DELETE FROM subscription WHERE owner = ?", (number,))
        self.db.execute("DELETE FROM owner WHERE id = ?", (number,))
        self._changed()
        return came_back

    def reclaim(self, owner: str, why: str) -> int:
        """Give back what a dead owner held."""
        owners = self._rows("SELECT id FROM owner WHERE name = ?", owner)
        return sum(self._bury(number, why=_text(why), uncounted=False) for [number] in owners)

    def leave(self) -> None:
        """The end of this owner: what it still holds goes back uncounted."""
        number, self._owner_id = self._owner_id, 0
        self._bury(number, why=None, uncounted=True)

    def subscribe(self, queue: str) -> int:
        """Make a subscription known; returns its number."""
        row = self.by_name.get(queue)
        if row is None:
            raise BrokerError(f"there is no queue {queue!r} in {self.path}; declare it first")
        self.db.execute("INSERT INTO subscription (owner, queue) VALUES (?, ?)", (self._owner_id, row.id))
        return self.db.last_insert_rowid()

    def unsubscribe(self, number: int) -> None:
        """A subscription is closed."""
        self.db.execute("DELETE FROM subscription WHERE id = ?", (number,))

    def read_catalog(self) -> None:
        """Know the queues and their topics as they are now."""
        [[number]] = self._rows("SELECT value FROM meta WHERE name = 'catalog'")
        if number == self._catalog:
            return
        rows = [
            _QueueRow._make((*row, tuple(msgspec.json.decode(topics)))) for *row, topics in self._rows(SQL["catalog"])
        ]
        self.by_name = {row.name: row for row in rows}
        self._by_topic = {}
        for row in rows:
            for topic in row.topics:
                self._by_topic.setdefault(topic, []).append(row)
        self._catalog = number
        if self._owner_id:  # somebody may have taken us for dead
            self.register()

    def _changed(self) -> None:
        self.db.execute("UPDATE meta SET value = value + 1 WHERE name = 'catalog'")
        self.read_catalog()

    def declare(self, wanted: Queue) -> None:
        """Make a queue exist as declared."""
        there = self.by_name.get(wanted.name)
        mine = self._owner_id if wanted.temporary else None
        if there is None:
            self.db.execute(
                "INSERT INTO queue (name, ordered, max_length, lease_seconds, owner) VALUES (?, ?, ?, ?, ?)",
                (wanted.name, int(wanted.ordered), wanted.max_length, wanted.lease_seconds, mine),
            )
            number = self.db.last_insert_rowid()
        else:
            number = there.id
            exists, asked = _nature(there.ordered, there.owner), _nature(wanted.ordered, mine)
            if exists != asked:
                raise QueueConflict(
                    f"the queue {wanted.name!r} exists as {exists}, and is declared as {asked}; rename it, or change one of the two"
                )
            if there.owner != mine:
                raise QueueConflict(
                    f"the temporary queue {wanted.name!r} belongs to another broker object; rename one of the two"
                )
            if (there.max_length is None) != (wanted.max_length is None):
                self.db.execute(SQL["set_bounded"], (number, int(wanted.max_length is not None)))
            self.db.execute(
                "UPDATE queue SET max_length = ?2, lease_seconds = ?3 WHERE id = ?1",
                (number, wanted.max_length, wanted.lease_seconds),
            )
        for topic in wanted.topics:
            self.db.execute("INSERT INTO binding VALUES (?, ?) ON CONFLICT DO NOTHING", (topic, number))
        self._changed()
        if wanted.max_length is not None:
            self._drop_oldest(self.by_name[wanted.name], wanted.max_length, wanted.max_length)

    # Messages

    def insert(self, messages: Iterable[Message]) -> list[str]:
        """Put messages into the queues of their topics; returns the ids of those that have none."""
        heard: list[tuple[Message, Sequence[_QueueRow]]] = []
        unheard: list[str] = []
        for message in messages:
            if (found := self._by_topic.get(message.topic)) is not None:
                heard.append((message, found))
            else:
                unheard.append(message.id)
        self._insert(heard)
        return unheard

    def _insert(self, messages: Iterable[tuple[Message, Sequence[_QueueRow]]]) -> None:
        now = self.now
        values: list[Any] = []
        queues: dict[int, _QueueRow] = {}
        for message, found in messages:
            due, key, kind = message.due, message.key, message.content_type
            headers = msgspec.json.encode(message.headers).decode() if message.headers else None
            for row in found:
                queues[row.id] = row
                values += (
                    row.id, DELAYED if due > now else READY, message.priority, max(now, due),
                    1 if row.ordered and key is not None else 0, 0 if row.max_length is None else 1,
                    message.id, message.topic, key, headers, None if kind == JSON else kind, message.correlation_id,
                    message.causation_id, message.created, due, message.expires, message.body
                )  # fmt: skip
        at, count = 0, len(values) // COLUMNS
        for rows, statement in INSERTS.items():
            while count - at >= rows:
                self.db.execute(statement, values[at * COLUMNS : (at + rows) * COLUMNS])
                at += rows
        last = self.db.last_insert_rowid()
        for row in queues.values():
            self.touched.add(row.name)
            if row.max_length is not None:
                self._drop_oldest(row, row.max_length, count)
        if any(row.ordered for row in queues.values()):
            self.db.execute(SQL["keep_order"], (last - count + 1, last))

    def _drop_oldest(self, row: _QueueRow, max_length: int, inserted: int) -> None:
        """Hold a queue to its bound. It is looked at once per hundredth of it: counting costs as much as the bound is long."""
        self._unchecked[row.id] = unchecked = self._unchecked.get(row.id, max_length) + inserted
        if unchecked * 100 < max_length:
            return
        self._unchecked[row.id] = 0
        self.db.execute(SQL["drop_oldest"], (row.id, max_length))
        if row.ordered and self.db.changes():
            self.db.execute(SQL["next_of_queue"], (row.id, self.now))

    def settle(self, settlements: Iterable[Settlement]) -> None:
        """End deliveries that are all held.

        Raises:
            _Doubt: one of them is not; the transaction is to be rolled back.
        """
        ended: dict[int, list[int]] = {}
        back: list[tuple[object, ...]] = []
        dead: list[tuple[object, ...]] = []
        emits: list[Message] = []
        keys: list[tuple[int, str]] = []
        for settlement in settlements:
            delivery, verdict = settlement.delivery, settlement.verdict
            seq, token = cast("_Receipt", delivery.receipt)
            if isinstance(verdict, Done):
                emits += verdict.emits
            elif isinstance(verdict, Dead):
                dead.append((seq, token, verdict.reason, _text(verdict.error), _text(verdict.traceback)))
            else:
                error = _text(verdict.error) if isinstance(verdict, RetryAt) else None
                back.append((seq, token, verdict.due, int(isinstance(verdict, RetryAt)), error))
                self.touched.add(delivery.queue)
                continue
            ended.setdefault(token, []).append(seq)
            row = self.by_name.get(delivery.queue)
            if row is not None and row.ordered and delivery.message.key is not None:
                keys.append((row.id, delivery.message.key))
                self.touched.add(row.name)
        if emits:
            self.insert(emits)
        for statement, rows in ((SQL["bury"], dead), (SQL["give_back"], back)):
            if rows:
                self._change(statement, (_json(rows), self.now), len(rows))
        for token, seqs in ended.items():
            self._change(SQL["end"], (_json(seqs), token), len(seqs))
        if keys:
            self.db.execute(SQL["next_of_keys"], (_json(keys), self.now))

    def _change(self, statement: str, values: tuple[object, ...], expected: int) -> None:
        self.db.execute(statement, cast("Any", values))
        if self.db.changes() != expected:
            raise _Doubt

    def settle_with_care(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """End those deliveries that are still held, each once; returns the others."""
        held = self._held(each.delivery for each in settlements)
        mine: list[Settlement] = []
        lost: list[Delivery] = []
        for each in settlements:
            if each.delivery.receipt in held:
                held.remove(each.delivery.receipt)
                mine.append(each)
            else:
                lost.append(each.delivery)
        self.settle(mine)
        return lost

    def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Start the leases anew of those that are still held; returns the others."""
        held = self._held(deliveries)
        self.db.execute(SQL["extend"], (_json(list(held)), self.now))
        return [each for each in deliveries if each.receipt not in held]

    def _held(self, deliveries: Iterable[Delivery]) -> set[_Receipt]:
        [[held]] = self._rows(SQL["held"], _json([each.receipt for each in deliveries]))
        return {(seq, token) for seq, token in msgspec.json.decode(held)}

    def next_at(self, queue: str) -> float | None:
        """When there is something to claim, as far as is known: 0.0 is now. Needs no transaction."""
        row = self.by_name.get(queue)
        if row is None:
            return 0.0  # it is gone: let the claim tell
        [[at]] = self._rows(SQL["next_at"], row.id)
        return cast("float | None", at)

    def claim(self, queue: str, limit: int) -> _Claim | None:
        """Count and lease up to limit messages."""
        row = self.by_name.get(queue)
        if row is None:
            raise BrokerUnavailable(f"the queue {queue!r} is gone")
        [[due, ended]] = self._rows(SQL["turned"], row.id, self.now)
        if due:
            self.db.execute(SQL["become_due"], (row.id, self.now, limit))
        if ended:
            self.db.execute(SQL["expire"], (row.id, self.now, limit, EXPIRED))
        until, token = self.now + row.lease_seconds, secrets.randbits(62)
        self.db.execute(SQL["claim"], (row.id, until, token, self._owner_id, limit))
        if not self.db.changes():
            return None
        [[rows, bodies, large]] = self._rows(SQL["claimed"], row.id, until, token, LARGE_BODY)
        one_by_one = {seq: self._rows(SQL["body"], seq)[0][0] for seq in msgspec.json.decode(large)}
        return _Claim(queue, token, rows, bodies or b"", one_by_one)

    def purge(self, queue: str) -> int:
        """Delete some of what waits in a queue; returns how many, 0 where nothing waits any more."""
        row = self.by_name.get(queue)
        if row is None:
            raise BrokerError(f"there is no queue {queue!r} in {self.path}")
        self.db.execute(SQL["purge"], (row.id, MANY))
        purged = self.db.changes()
        if purged and row.ordered:  # the next part may never come
            self.db.execute(SQL["next_of_queue"], (row.id, self.now))
        return purged

    def redrive(self, letters: Iterable[DeadLetter]) -> int:
        """Put dead letters back into their queues, behind what is there."""
        positions = _json([int(each.position) for each in letters])
        there = [_letter(row) for row in self._rows(SQL["letters"], positions) if row[1] in self.by_name]
        for each in there:
            self._insert([(each.message, (self.by_name[each.queue],))])
        return self.discard(there)

    def discard(self, letters: Iterable[DeadLetter]) -> int:
        """Delete dead letters."""
        positions = _json([int(each.position) for each in letters])
        self.db.execute("DELETE FROM dead_letter WHERE position IN (SELECT value FROM json_each(?))", (positions,))
        return self.db.changes()


@dataclass(eq=False, slots=True)
class _Operation:
    """Something that the writer does inside a commit. The future belongs to the event loop."""

    future: asyncio.Future[Any] = field(init=False)


@dataclass(eq=False, slots=True)
class _Publish(_Operation):
    messages: Sequence[Message]


@dataclass(eq=False, slots=True)
class _Settle(_Operation):
    settlements: Sequence[Settlement]


@dataclass(eq=False, slots=True)
class _Fetch(_Operation):
    queue: str
    limit: int


@dataclass(eq=False, slots=True)
class _Call(_Operation):
    """Anything that is rare."""

    function: Callable[[_File], object]


_WAKE: Final = _Operation()
"""Not an operation: somebody made something ready."""
_STOP: Final = _Operation()
"""Not an operation: the last thing that the writer hears."""

_Outcome = tuple[_Operation, object]
"""An operation with its result, or with the BrokerError that ended it."""


class _Writer:
    """The thread that does everything to the file, in as few commits as there can be."""

    def __init__(self, file: _File, bell: _Bell, clock: Clock) -> None:
        self._file = file
        self._bell = bell
        self._clock = clock
        self._heard: queue.SimpleQueue[_Operation] = queue.SimpleQueue()
        self._parked: dict[str, list[_Fetch]] = {}
        self._times: dict[str, float] = {}
        """Queue of a parked fetch → when there will be something, as far as is known."""
        self._poll_seconds = POLL_SECONDS[0]
        self._untidy = True
        self._holders: dict[int, tuple[SqliteSubscription, set[int]]] = {}
        self._sweep: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Open the file; it raises here what is wrong with it."""
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="conveyor-sqlite", daemon=True)
        self._thread.start()
        await opened
        _writers.add(self)

    async def stop(self) -> None:
        """Do what was asked until now, then close the file. Fetches that wait are told."""
        if self._sweep is not None:
            self._sweep.cancel()
        self._heard.put(_STOP)
        await asyncio.shield(self._ended)

    def stop_at_exit(self) -> None:
        """The program ends without closing the broker: its thread must not be inside SQLite when the interpreter goes."""
        self._heard.put(_STOP)
        self._thread.join(BUSY_SECONDS)

    def ask(self, operation: _Operation) -> asyncio.Future[Any]:
        """Have an operation done; its result or error will be in the future."""
        operation.future = self._loop.create_future()
        self._heard.put(operation)
        return operation.future

    def wake(self) -> None:
        """Look whether there is something for the fetches that wait."""
        self._heard.put(_WAKE)

    def release(self, deliveries: Iterable[Delivery]) -> None:
        """Give back what was claimed for a caller who has gone."""
        self.ask(_Settle([Settlement(each, Release()) for each in deliveries])).add_done_callback(_ignore)

    def holds(self, subscription: SqliteSubscription, deliveries: Sequence[Delivery]) -> None:
        """Remember in whose hands these are; all of one claim have one token."""
        receipts = [cast("_Receipt", each.receipt) for each in deliveries]
        self._holders[receipts[0][1]] = subscription, {seq for seq, _ in receipts}

    def lets_go(self, deliveries: Iterable[Delivery]) -> None:
        """These are no longer in anybody's hands."""
        for delivery in deliveries:
            seq, token = cast("_Receipt", delivery.receipt)
            subscription, seqs = self._holders.get(token, (None, set()))
            if subscription is not None and seq in seqs:
                seqs.discard(seq)
                subscription.lets_go(1)
                if not seqs:
                    del self._holders[token]

    def sweep_soon(self) -> None:
        """Somebody is dead, or may be: bury it, unless its supervisor does."""
        if self._sweep is None:
            self._sweep = self._loop.call_later(WITNESS_SECONDS, self._do_sweep)

    def _do_sweep(self) -> None:
        self._sweep = None
        self.ask(_Call(_File.sweep)).add_done_callback(_ignore)

    # What follows runs in the thread

    def _run(self, opened: asyncio.Future[None]) -> None:
        try:
            self._file.open()
        except Exception as error:  # told to whoever opens
            self._tell(_resolve, opened, _explain(error, self._file.path))
            return
        self._tell(_resolve, opened, None)
        try:
            while self._step():
                pass
        finally:
            for fetches in self._parked.values():
                for fetch in fetches:
                    self._tell(_resolve, fetch.future, BrokerUnavailable("the broker is closed"))
            self._file.close()
            self._tell(_resolve, self._ended, None)

    def _tell(self, function: Callable[..., None], *values: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *values)
        except RuntimeError:  # the event loop is closed, without closing the broker: nobody is left to hear it
            self._heard.put(_STOP)

    def _step(self) -> bool:
        """Do what has gathered, or what time brings; False at the end."""
        operations: list[_Operation] = []
        with contextlib.suppress(queue.Empty):
            operations.append(self._heard.get(timeout=self._patience()))
            while True:
                operations.append(self._heard.get_nowait())
        quiet = not operations
        going_on = _STOP not in operations
        asked = [each for each in operations if each not in (_WAKE, _STOP)]
        if quiet or _WAKE in operations:
            asked += self._timely()
        if asked:
            self._commit(asked)
            self._untidy = True
        elif quiet and self._untidy and self._poll_seconds >= POLL_SECONDS[1]:
            self._untidy = self._file.tidy()
        self._poll_seconds = min(2 * self._poll_seconds, POLL_SECONDS[1]) if quiet and not asked else POLL_SECONDS[0]
        return going_on

    def _patience(self) -> float | None:
        """Seconds until something is to be done unasked; None is never."""
        if self._parked:
            return max(0.0, min(self._poll_seconds, min(self._times.values(), default=float("inf")) - self._clock()))
        return self._poll_seconds if self._untidy else None

    def _timely(self) -> list[_Fetch]:
        """The fetches that wait, of those queues where there may be something by now."""
        found: list[_Fetch] = []
        now = self._clock()
        for name, fetches in list(self._parked.items()):
            waiting = [each for each in fetches if not each.future.done()]
            self._unpark(name)
            if waiting and self._next_at(name) <= now:
                found += waiting
            else:
                self._park(waiting)
        return found

    def _next_at(self, name: str) -> float:
        try:
            at = self._file.next_at(name)
        except apsw.Error:
            return 0.0  # the claim will say what is wrong
        return float("inf") if at is None else at

    def _park(self, fetches: list[_Fetch]) -> None:
        for fetch in fetches:
            self._parked.setdefault(fetch.queue, []).append(fetch)
            self._times[fetch.queue] = self._next_at(fetch.queue)

    def _unpark(self, name: str) -> list[_Fetch]:
        self._times.pop(name, None)
        return self._parked.pop(name, [])

    def _commit(self, operations: list[_Operation]) -> None:
        """Do all of these in one transaction, and tell."""
        beginning: list[_Operation] = [each for each in operations if isinstance(each, _Publish | _Fetch)]
        ending = [each for each in operations if not isinstance(each, _Publish | _Fetch)]
        outcomes: list[_Outcome] = []
        try:
            self._file.check_same()
            if why := self._file.low_disk():
                outcomes = [(each, BrokerFull(why)) for each in beginning]
                beginning = []
            outcomes += self._transact(ending + beginning) if ending or beginning else []
        except Exception as error:  # whatever it is, they must hear it, and the thread must live
            why_not = _explain(error, self._file.path)
            outcomes += [(each, why_not) for each in beginning]
            outcomes += self._end_on_ballast(ending, why_not) if ending else []
        self._tell(_report, self, outcomes)

    def _end_on_ballast(self, operations: list[_Operation], error: BrokerError) -> list[_Outcome]:
        """What is at work must be able to end, on a full disk too: it gets the space that was held for it."""
        try:
            if isinstance(error, BrokerFull) and self._file.drop_ballast():
                return self._transact(operations)
        except Exception as again:
            error = _explain(again, self._file.path)
        return [(each, error) for each in operations]

    def _transact(self, operations: list[_Operation]) -> list[_Outcome]:
        file = self._file
        fetches = [each for each in operations if isinstance(each, _Fetch)]
        others = [each for each in operations if not isinstance(each, _Fetch)]
        woken: list[_Fetch] = []
        file.begin()
        try:
            file.read_catalog()
            try:
                outcomes = self._together(others)
            except FATAL:
                raise
            except Exception:  # whatever it is, only the operation that caused it shall see it
                file.roll_back()
                file.begin()
                file.read_catalog()
                outcomes = [self._alone(each) for each in others]
            woken = [each for name in file.touched for each in self._unpark(name)]
            outcomes += self._claim(woken + fetches)
            file.db.execute("COMMIT")
        except BaseException:
            file.roll_back()
            self._park(woken)
            raise
        if file.touched:
            file.touched.clear()
            if not self._bell.ring():
                self._tell(self.sweep_soon)
        return [(each, value.deliveries() if isinstance(value, _Claim) else value) for each, value in outcomes]

    def _together(self, operations: list[_Operation]) -> list[_Outcome]:
        """The fast way: each kind as one batch. Anything unexpected raises."""
        publishes = [each for each in operations if isinstance(each, _Publish)]
        settles = [each for each in operations if isinstance(each, _Settle)]
        outcomes: list[_Outcome] = []
        if publishes:
            unheard = frozenset(self._file.insert([message for each in publishes for message in each.messages]))
            outcomes += [
                (each, unheard.intersection([m.id for m in each.messages]) if unheard else unheard)
                for each in publishes
            ]
        if settles:
            self._file.settle([settlement for each in settles for settlement in each.settlements])
            outcomes += [(each, []) for each in settles]
        outcomes += [(each, each.function(self._file)) for each in operations if isinstance(each, _Call)]
        return outcomes

    def _alone(self, operation: _Operation) -> _Outcome:
        """The careful way: an operation that fails fails for itself."""
        file = self._file
        file.db.execute("SAVEPOINT operation")
        result: object
        try:
            if isinstance(operation, _Publish):
                result = self._publish_each(operation.messages)
            elif isinstance(operation, _Settle):
                result = file.settle_with_care(operation.settlements)
            else:
                result = cast("_Call", operation).function(file)
        except FATAL:
            raise
        except Exception as error:  # told to whoever asked for it
            file.db.execute("ROLLBACK TO operation")
            result = _explain(error, file.path)
            if isinstance(operation, _Settle):  # the likely cause: a message that it emits
                emits = [
                    m for each in operation.settlements if isinstance(each.verdict, Done) for m in each.verdict.emits
                ]
                refused = self._publish_each(emits)
                file.db.execute("ROLLBACK TO operation")
                result = refused if isinstance(refused, PublishFailed) else result
            file.forget_catalog()
        file.db.execute("RELEASE operation")
        return operation, result

    def _publish_each(self, messages: Sequence[Message]) -> frozenset[str] | PublishFailed:
        unheard: list[str] = []
        refused: dict[str, str] = {}
        for message in messages:
            try:
                unheard += self._file.insert([message])
            except FATAL:
                raise
            except Exception as error:  # a value that cannot be stored: a statement that fails leaves nothing behind
                refused[str(message.id)] = _why(error)
        return PublishFailed(refused) if refused else frozenset(unheard)

    def _claim(self, fetches: list[_Fetch]) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        for fetch in fetches:
            if fetch.future.done():  # its caller has gone
                continue
            try:
                claim = self._file.claim(fetch.queue, fetch.limit)
            except BrokerError as error:
                outcomes.append((fetch, error))
                continue
            if claim is not None:
                outcomes.append((fetch, claim))
            else:
                self._park([fetch])
        return outcomes


def _resolve(future: asyncio.Future[Any], value: object) -> None:
    if future.done():
        return
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)


def _ignore(future: asyncio.Future[Any]) -> None:
    """Whatever came of it: where it failed, the leases end by themselves."""
    if not future.cancelled():
        future.exception()


def _report(writer: _Writer, outcomes: list[_Outcome]) -> None:
    """On the event loop: everybody learns what came of it. What was claimed for a caller who has gone is released."""
    for operation, value in outcomes:
        if operation.future.done() and isinstance(operation, _Fetch) and isinstance(value, list):
            writer.release(value)
        else:
            _resolve(operation.future, value)


class _Bell:
    """The folder of wake sockets beside the file: who is alive, and how to wake them.

    A socket takes no data; that something came is all it says.
    """

    def __init__(self, path: Path) -> None:
        self.name = secrets.token_hex(8)
        self._folder = path.with_name(path.name + ".wake")
        self._handle = -1
        self._others: list[str] = []
        self._listed = 0
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.setblocking(False)

    def hang(self) -> socket.socket:
        """Our own socket, bound."""
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(0o700)
        bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        bell.setblocking(False)
        try:
            bell.bind(self._address(self.name))
        except OSError as error:
            bell.close()
            raise BrokerError(
                f"cannot create the wake socket {self._folder / self.name}: {error.strerror or error}"
            ) from error
        (self._folder / self.name).chmod(0o600)
        return bell

    def close(self) -> None:
        """Take our socket away."""
        (self._folder / self.name).unlink(missing_ok=True)
        self._sender.close()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def ring(self) -> bool:
        """Wake everybody else; False where somebody turned out to be dead."""
        try:
            changed = self._folder.stat().st_mtime_ns
        except FileNotFoundError:
            return True
        if changed != self._listed:
            self._others = [each.name for each in self._folder.iterdir() if each.name != self.name]
            # A change within the same tick of the kernel's clock would not show.
            self._listed = changed if time.time_ns() - changed > CLOCK_TICK_NANOSECONDS else 0
        all_alive = True
        for name in self._others:
            try:
                self._sender.sendto(b"", self._address(name))
            except BlockingIOError:
                pass  # it has not even looked at the earlier ones
            except OSError:
                all_alive = False
        return all_alive

    def answers(self, name: str) -> bool:
        """Whether the process of a socket lives; the socket of a dead one is removed."""
        if name == self.name:
            return True
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(self._address(name))
            except (FileNotFoundError, ConnectionRefusedError):
                (self._folder / name).unlink(missing_ok=True)
                return False
            except OSError:
                return True  # whoever may not be asked is not declared dead
        return True

    def _address(self, name: str) -> str:
        """Addresses are short. Where the path is too long, Linux has a shorter one, through an open handle of the folder."""
        path = str(self._folder / name)
        if len(os.fsencode(path)) <= LONGEST_ADDRESS or not sys.platform.startswith("linux"):
            return path
        if self._handle < 0:
            self._handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._handle}/{name}"


class SqliteSubscription:
    """One receiver of one queue; made by SqliteBroker.subscribe()."""

    def __init__(self, writer: _Writer, queue: str, prefetch: int, number: int) -> None:
        self._writer = writer
        self._queue = queue
        self._prefetch = prefetch
        self._number = number
        self._taken = 0
        self._room = asyncio.Event()
        self._fetches: set[asyncio.Future[Any]] = set()
        self._closed: BrokerError | None = None

    async def fetch(self, limit: int) -> list[Delivery]:
        """See conveyor.broker.Subscription. Waits, too, while prefetch deliveries are unsettled."""
        if limit < 1:
            raise ValueError("a fetch is for at least one message")
        while self._closed is None and self._taken >= self._prefetch:
            self._room.clear()
            await self._room.wait()
        if self._closed is not None:
            raise self._closed
        room = min(limit, self._prefetch - self._taken)
        future = self._writer.ask(_Fetch(self._queue, room))
        self._fetches.add(future)
        self._taken += room
        got = 0
        try:
            deliveries: list[Delivery] = await future
            got = len(deliveries)
            self._writer.holds(self, deliveries)
            return deliveries
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._writer.release(future.result())
            raise
        finally:
            self._fetches.discard(future)
            self.lets_go(room - got)

    def lets_go(self, number: int) -> None:
        """So many deliveries are no longer in its hands."""
        self._taken -= number
        if number:
            self._room.set()

    async def close(self) -> None:
        """See conveyor.broker.Subscription."""
        if self._closed is None:
            number = self._number
            self.end(BrokerUnavailable(f"this subscription of {self._queue!r} is closed"))
            await self._writer.ask(_Call(lambda file: file.unsubscribe(number)))

    def end(self, why: BrokerError) -> None:
        """Take part no more; a fetch that waits raises why."""
        self._closed = self._closed or why
        self._room.set()
        for future in self._fetches:
            _resolve(future, why)


class SqliteBroker:
    """A Broker (see conveyor.broker) on a file.

    Parameters:
        path: the queue file; its folder must exist. Beside it are its -wal, -shm and .ballast, and the folder .wake.
        durability: "full" survives a power cut, "normal" only the death of processes, and is several times faster on slow disks.
        owner: the identity under which it holds leases; made up where None.
        clock: gives Unix seconds. Whoever turns the clock by hand calls clock_turned() afterwards.
        network_filesystem: allow a file system whose locks do not hold between hosts; safe only where one host uses it.
    """

    missing: Mapping[Feature, str] = {}

    def __init__(
        self,
        path: str | Path,
        *,
        durability: Durability = "full",
        owner: str | None = None,
        clock: Clock = time.time,
        network_filesystem: bool = False,
    ) -> None:
        self.owner = owner or uuid.uuid4().hex
        self._path = Path(path).absolute()
        self._durability: Durability = durability
        self._network_filesystem = network_filesystem
        self._clock = clock
        self._writer: _Writer | None = None
        self._socket: socket.socket | None = None
        self._subscriptions: WeakSet[SqliteSubscription] = WeakSet()
        self._process = 0

    async def open(self) -> None:
        """See conveyor.broker.Broker."""
        if self._writer is not None:
            return
        self._bell = _Bell(self._path)
        file = _File(
            self._path,
            self.owner,
            self._bell,
            self._clock,
            self._durability,
            network_filesystem=self._network_filesystem,
        )
        writer = _Writer(file, self._bell, self._clock)
        try:
            await writer.start()
        except BaseException:
            self._bell.close()
            raise
        self._writer, self._process = writer, os.getpid()
        writer.sweep_soon()

    async def close(self) -> None:
        """See conveyor.broker.Broker."""
        writer, self._writer = self._writer, None
        if writer is None or self._process != os.getpid():
            return
        for subscription in tuple(self._subscriptions):
            subscription.end(BrokerUnavailable("the broker is closed"))
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
        try:
            if self._socket is not None:
                await writer.ask(_Call(_File.leave))
        except BrokerError as error:
            log.warning(
                "%s was closed without giving back what it held; it comes back when its leases end: %s",
                self._path,
                error,
            )
        finally:
            await writer.stop()
            self._bell.close()
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def clock_turned(self) -> None:
        """The clock was turned by hand: look what is due."""
        self._open_writer().wake()

    async def declare(self, queues: Sequence[Queue]) -> None:
        """See conveyor.broker.Broker."""
        if any(each.temporary for each in queues):
            self._come_alive()

        def declare(file: _File) -> None:
            for each in queues:
                if each.temporary:
                    file.register()
                file.declare(each)

        await self._call(declare)

    async def publish(self, messages: Sequence[Message]) -> frozenset[str]:
        """See conveyor.broker.Broker."""
        unheard: frozenset[str] = await self._open_writer().ask(_Publish(messages))
        return unheard

    async def subscribe(self, queue: str, prefetch: int) -> SqliteSubscription:
        """See conveyor.broker.Broker."""
        self._come_alive()

        def subscribe(file: _File) -> int:
            file.register()
            return file.subscribe(queue)

        subscription = SqliteSubscription(self._open_writer(), queue, prefetch, await self._call(subscribe))
        self._subscriptions.add(subscription)
        return subscription

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """See conveyor.broker.Broker. Raises PublishFailed, with nothing done, where an emitted message cannot be stored."""
        writer = self._open_writer()
        lost: list[Delivery] = await writer.ask(_Settle(settlements))
        writer.lets_go([each.delivery for each in settlements])
        return lost

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """See conveyor.broker.Broker."""
        lost = await self._call(lambda file: file.extend(deliveries))
        self._open_writer().lets_go(lost)
        return lost

    async def reclaim(self, owner: str, why: str) -> int:
        """See conveyor.broker.Broker."""
        return await self._call(lambda file: file.reclaim(owner, why))

    async def queues(self) -> list[QueueInfo]:
        """See conveyor.broker.Broker."""
        now = self._clock()

        def info(row: tuple[Any, ...]) -> QueueInfo:
            name, topics, ready, due, leased, expired, delayed, dead, since, since_due, sockets = row
            sinces = [each for each in (since, since_due) if each is not None] or ([now] if expired else [])
            return QueueInfo(
                name=name,
                topics=tuple(msgspec.json.decode(topics)),
                ready=ready + due + expired,
                in_flight=leased,
                delayed=delayed,
                dead=dead,
                oldest_seconds=max(0.0, now - min(sinces)) if sinces else None,
                consumers=sum(map(self._bell.answers, msgspec.json.decode(sockets))),
            )

        return [info(row) for row in await self._read(SQL["info"], (now,))]

    async def dead_letters(self, which: DeadFilter, *, limit: int, after: str | None = None) -> list[DeadLetter]:
        """See conveyor.broker.Broker."""
        values = (int(after or 0), which.queue, which.id, which.reason, which.error, limit)
        return [_letter(row) for row in await self._read(SQL["dead_letters"], values)]

    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker. They wait behind what is in the queue already."""
        return await self._call(lambda file: file.redrive(letters))

    async def discard(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker."""
        return await self._call(lambda file: file.discard(letters))

    async def purge(self, queue: str) -> int:
        """See conveyor.broker.Broker."""
        purged = 0
        while number := await self._call(lambda file: file.purge(queue)):
            purged += number
        return purged

    def _open_writer(self) -> _Writer:
        if self._writer is None:
            raise BrokerUnavailable(f"the broker on {self._path} is not open")
        if self._process != os.getpid():
            raise BrokerError(
                f"the broker on {self._path} was opened in another process, and SQLite's connections do not survive a fork;"
                " open one in each process (and start processes by spawn or forkserver)"
            )
        return self._writer

    async def _call(self, function: Callable[[_File], _Result]) -> _Result:
        result: _Result = await self._open_writer().ask(_Call(function))
        return result

    async def _read(self, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """An operator's question: on a connection of its own, so that it holds up nobody."""
        self._open_writer()
        try:
            return await asyncio.to_thread(_read, self._path, statement, values)
        except apsw.Error as error:
            raise _explain(error, self._path) from error

    def _come_alive(self) -> None:
        """Have a wake socket: others can wake this object, and see that it lives."""
        writer = self._open_writer()
        if self._socket is None:
            self._socket = self._bell.hang()
            asyncio.get_running_loop().add_reader(self._socket, self._rung, self._socket, writer)

    @staticmethod
    def _rung(bell: socket.socket, writer: _Writer) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                bell.recv(1)
        writer.wake()


_writers: Final[WeakSet[_Writer]] = WeakSet()


@atexit.register
def _stop_writers() -> None:
    for writer in tuple(_writers):
        writer.stop_at_exit()


os.register_at_fork(after_in_child=_writers.clear)

_open_connections: Final[set[apsw.Connection]] = set()
"""Keeps a forked child from closing what belongs to its parent."""


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
    kind = _file_system(folder.resolve(), Path("/proc/self/mountinfo"))
    if not network_filesystem and (kind in REMOTE or kind.startswith("fuse.")):
        raise BrokerError(
            f"cannot open {path}: it is on a network file system ({kind}), where locks do not hold between hosts and messages would be"
            " lost; use a local disk or another broker, or add ?network_filesystem=allow where only this host uses it"
        )
    try:
        if not path.exists():
            _create(path)
    except PermissionError as error:
        raise BrokerError(
            f"cannot open {path}: no permission to create it; change the folder's owner or mode, or the broker's URL"
        ) from error
    for place in (path, folder):
        if not os.access(place, os.R_OK | os.W_OK):
            raise BrokerError(
                f"cannot open {path}: no permission to write {place}; change its owner or mode, or the broker's URL"
            )


def _create(path: Path) -> None:
    """An empty file of mode 0600, whatever the umask. It has its name only when we have closed it: a close drops SQLite's locks."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with contextlib.suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()


def _file_system(folder: Path, mounts: Path) -> str:
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


def _read(path: Path, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
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


def _letter(row: tuple[Any, ...]) -> DeadLetter:
    position, queue, reason, error, trace, died, deliveries, attempts, body, name, topic, key, headers, kind, *rest = (
        row
    )
    message = Message(name, topic, body, key, _headers(headers), kind or JSON, *rest)
    return DeadLetter(
        position=f"{position:020d}", queue=queue, message=message, reason=reason, error=error, traceback=trace,
        deliveries=deliveries, attempts=attempts, died=died
    )  # fmt: skip  # the position sorts as text in the order of the numbers


def _headers(text: str | None) -> Mapping[str, str]:
    if text is None:
        return NO_HEADERS
    try:
        return _decode_headers(text)
    except msgspec.DecodeError:  # another program wrote it
        return {"unreadable-headers": text}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _text(value: str) -> str:
    """Text as UTF-8 can hold it: an error's text may have come from anywhere."""
    return value.encode("utf-8", "replace").decode()


def _nature(ordered: object, owner: int | None) -> str:
    return f"{'lasting' if owner is None else 'temporary'} and {'ordered by key' if ordered else 'not ordered'}"


def _explain(error: Exception, path: Path) -> BrokerError:
    """What an error of SQLite or of the system means to whoever asked, and what to do."""
    if isinstance(error, BrokerError):
        return error
    if isinstance(error, apsw.FullError) or (isinstance(error, apsw.IOError) and _disk(path.parent)[0] < LARGE_BODY):
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
        return BrokerUnavailable(f"{path}: {_why(error)}")
    return BrokerError(f"{path}: {_why(error)}")


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _write_lock_holder(path: Path) -> int | None:
    """Who holds the WAL's write lock: byte 120 of the -shm file (sqlite.org/walformat.html#locks); Linux only."""
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
