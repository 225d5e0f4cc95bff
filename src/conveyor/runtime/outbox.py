"""The tables of inbox and outbox: how they are made, the SQL that reads and writes them, and their rows."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from sqlalchemy import ARRAY, BigInteger, Float, Integer, LargeBinary, String, TextClause, bindparam, text
from sqlalchemy.types import TypeEngine

from conveyor.core.message import Message
from conveyor.errors import LedgerError

T = TypeVar("T")

ROWS_PER_STATEMENT: Final = 200
"""Keeps statements under the 32,766 parameters that SQLite and PostgreSQL allow."""
NEVER: Final = float("inf")
"""As claim_until: parked, until somebody looks."""


def steady() -> float:
    """Seconds since some fixed moment, never set back, going on while the process is stopped or the machine asleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Row(msgspec.Struct, frozen=True, gc=False):
    """A row of the outbox.

    Parameters:
        seq: its place in the order of commits (exact among the rows of one key).
        attempts: how often the broker has refused it.
        required: no queue for its topic is an error.
        error: what the broker said last.
    """

    seq: int
    message: Message
    attempts: int = 0
    required: bool = False
    error: str = ""


class Claimed(msgspec.Struct, frozen=True):
    """Rows that this process alone may send.

    Parameters:
        rows: in the order of their seq.
        until: when others may send them too, as steady() tells it.
        left: how many more rows the same transaction wrote that are left to the relay, because older ones of their key go first.
    """

    rows: tuple[Row, ...] = ()
    until: float = 0.0
    left: int = 0

    def seconds_left(self) -> float:
        """How long they still are this process's own; publishing must end before that."""
        return self.until - steady()


class Pending(msgspec.Struct, frozen=True):
    """What waits in the outbox.

    Parameters:
        rows: messages not yet owned by the broker, parked ones included.
        oldest_seconds: how long the oldest has been waiting; 0.0 where none is.
        parked: those that the broker refuses for good.
    """

    rows: int
    oldest_seconds: float
    parked: int


class Outgoing(msgspec.Struct, frozen=True):
    """A message on its way into the outbox."""

    message: Message
    required: bool


# -- SQL -------------------------------------------------------------------------------------------------------------------------

MIGRATIONS: Final[tuple[Mapping[str, tuple[str, ...]], ...]] = (
    # One entry a version, by dialect; only ever added to, and only with what processes of the version before can live with.
    {
        "sqlite": (
            """CREATE TABLE {p}inbox (
                app TEXT NOT NULL,
                worker TEXT NOT NULL,
                message_id TEXT NOT NULL,
                handled_at REAL NOT NULL,
                PRIMARY KEY (app, worker, message_id)
            ) WITHOUT ROWID""",
            "CREATE INDEX {p}inbox_handled_at ON {p}inbox (app, handled_at)",
            """CREATE TABLE {p}outbox (
                seq INTEGER PRIMARY KEY AUTOINCREMENT,
                app TEXT NOT NULL,
                id TEXT NOT NULL,
                topic TEXT NOT NULL,
                key TEXT,
                headers TEXT NOT NULL,
                body BLOB NOT NULL,
                content_type TEXT NOT NULL,
                correlation_id TEXT,
                causation_id TEXT,
                created REAL NOT NULL,
                due REAL NOT NULL,
                expires REAL,
                priority INTEGER NOT NULL,
                required INTEGER NOT NULL,
                added_at REAL NOT NULL,
                claim TEXT,
                claim_until REAL NOT NULL,
                attempts INTEGER NOT NULL DEFAULT 0,
                error TEXT NOT NULL DEFAULT '',
                UNIQUE (app, id, topic)
            )""",
            "CREATE INDEX {p}outbox_claim_until ON {p}outbox (app, claim_until, seq)",
            "CREATE INDEX {p}outbox_key ON {p}outbox (app, key, seq) WHERE key IS NOT NULL",
        ),
        "postgresql": (
            """CREATE TABLE {p}inbox (
                app text NOT NULL,
                worker text NOT NULL,
                message_id text NOT NULL,
                handled_at double precision NOT NULL,
                PRIMARY KEY (app, worker, message_id)
            )""",
            "CREATE INDEX {p}inbox_handled_at ON {p}inbox (app, handled_at)",
            """CREATE TABLE {p}outbox (
                seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                app text NOT NULL,
                id text NOT NULL,
                topic text NOT NULL,
                key text,
                headers text NOT NULL,
                body bytea NOT NULL,
                content_type text NOT NULL,
                correlation_id text,
                causation_id text,
                created double precision NOT NULL,
                due double precision NOT NULL,
                expires double precision,
                priority integer NOT NULL,
                required integer NOT NULL,
                added_at double precision NOT NULL,
                claim text,
                claim_until double precision NOT NULL,
                attempts integer NOT NULL DEFAULT 0,
                error text NOT NULL DEFAULT '',
                UNIQUE (app, id, topic)
            )""",
            "CREATE INDEX {p}outbox_claim_until ON {p}outbox (app, claim_until, seq)",
            "CREATE INDEX {p}outbox_key ON {p}outbox (app, key, seq) WHERE key IS NOT NULL",
        ),
    },
)

_MESSAGE_COLUMNS: Final = (
    "id, topic, key, headers, body, content_type, correlation_id, causation_id, "
    "created, due, expires, priority, required"
)
_TYPES: Final[Mapping[str, TypeEngine[Any]]] = {
    # PostgreSQL wants to know the types of parameters, also where a value is NULL; those not named here are text.
    "body": LargeBinary(),
    "created": Float(),
    "due": Float(),
    "expires": Float(),
    "priority": Integer(),
    "required": Integer(),
    "hold": Float(),
    "keep": Float(),
    "now": Float(),
    "seq": BigInteger(),
    "seqs": BigInteger(),
    "limit": Integer(),
    "version": Integer(),
    "key_array": ARRAY(String()),
}
_LISTS: Final = frozenset({"seqs", "ids", "keys"})
"""Parameters of IN."""
_PARAMETER: Final = re.compile(r"(?<![:\w]):([a-z]+(?:_[a-z]+)*)(_\d+)?")

_SQL: Final = {
    "lock_schema": "SELECT pg_advisory_xact_lock(hashtextextended('{p}schema', 0))",
    "schema": "CREATE TABLE IF NOT EXISTS {p}schema (version integer PRIMARY KEY, applied_at double precision NOT NULL)",
    "version": "SELECT max(version) FROM {p}schema",
    "applied": "INSERT INTO {p}schema (version, applied_at) VALUES (:version, {now})",
    "seen": "SELECT 1 FROM {p}inbox WHERE app = :app AND worker = :worker AND message_id = :message_id",
    "purge": """
        DELETE FROM {p}inbox WHERE app = :app AND (worker, message_id) IN (
            SELECT worker, message_id FROM {p}inbox
            WHERE app = :app AND handled_at < {now} - :keep ORDER BY handled_at LIMIT :limit)""",
    # Held until COMMIT: whoever writes a row of this key later also commits later, so that seq orders the commits of a key.
    "lock_keys": """
        SELECT pg_advisory_xact_lock(hashtextextended('{p}outbox ' || :app || ' ' || key, 0)) FROM unnest(:key_array) AS key""",
    "older": "SELECT DISTINCT key FROM {p}outbox WHERE app = :app AND key IN :keys",
    "stored": "SELECT {columns} FROM {p}outbox WHERE app = :app AND id = :id AND topic = :topic",
    "free": "SELECT 1 FROM {p}outbox WHERE app = :app AND claim_until <= {now} LIMIT 1",
    # One relay claims at a time, so that none takes the second row of a key while another is about to take the first.
    "lock_claims": "SELECT pg_advisory_xact_lock(hashtextextended('{p}claims ' || :app, 0))",
    # Never "seq > the last one sent": a lower seq may be committed later. A row waits while an older one of its key is
    # claimed, backs off or is parked; older ones that are free are lower in this very list.
    "claim": """
        UPDATE {p}outbox SET claim = :me, claim_until = {now} + :hold
        WHERE seq IN (
            SELECT seq FROM {p}outbox AS this
            WHERE app = :app AND claim_until <= {now} AND (key IS NULL OR NOT EXISTS (
                SELECT 1 FROM {p}outbox AS older
                WHERE older.app = :app AND older.key = this.key AND older.seq < this.seq AND older.claim_until > {now}))
            ORDER BY seq LIMIT :limit)
        RETURNING seq, attempts, error, {columns}""",
    "sent": "DELETE FROM {p}outbox WHERE claim = :me AND seq IN :seqs",
    "put_off": """
        UPDATE {p}outbox SET claim = NULL, claim_until = {now} + :hold, attempts = attempts + 1, error = :error
        WHERE claim = :me AND seq = :seq""",
    "release": "UPDATE {p}outbox SET claim = NULL, claim_until = 0 WHERE claim = :me AND seq IN :seqs",
    "reclaim": "UPDATE {p}outbox SET claim = NULL, claim_until = 0 WHERE app = :app AND claim = :owner",
    "pending": """
        SELECT count(*), min(added_at), coalesce(sum(CASE WHEN claim_until > 1e300 THEN 1 ELSE 0 END), 0), {now}
        FROM {p}outbox WHERE app = :app""",
    "parked": """
        SELECT seq, attempts, error, {columns} FROM {p}outbox
        WHERE app = :app AND claim_until > 1e300 ORDER BY seq LIMIT :limit""",
    "unpark": "UPDATE {p}outbox SET claim_until = 0, attempts = 0 WHERE app = :app AND claim_until > 1e300 AND id IN :ids",
    "discard": "DELETE FROM {p}outbox WHERE app = :app AND claim_until > 1e300 AND id IN :ids",
}
_INBOX_INSERT: Final = """
    INSERT INTO {p}inbox (app, worker, message_id, handled_at) VALUES {values}
    ON CONFLICT (app, worker, message_id) DO NOTHING RETURNING message_id"""
# A message that is still in the outbox under the same id and topic is the same message.
_OUTBOX_INSERT: Final = """
    INSERT INTO {p}outbox (app, {columns}, added_at, claim, claim_until) VALUES {values}
    ON CONFLICT (app, id, topic) DO NOTHING RETURNING seq, id, topic"""


class Statements:
    """The SQL above, for one prefix and one way to tell the time.

    Parameters:
        now: the SQL expression for the time in Unix seconds, the same all through a statement.
    """

    def __init__(self, prefix: str, now: str) -> None:
        self._names = {"p": prefix, "now": now, "columns": _MESSAGE_COLUMNS}
        self._made = {name: self._typed(sql.format(**self._names)) for name, sql in _SQL.items()}
        self.inbox_insert = functools.lru_cache(64)(self._inbox_insert)
        self.outbox_insert = functools.lru_cache(64)(self._outbox_insert)

    def __getitem__(self, name: str) -> TextClause:
        return self._made[name]

    def _inbox_insert(self, count: int) -> TextClause:
        values = ", ".join(f"(:app, :worker, :message_id_{i}, {self._names['now']})" for i in range(count))
        return self._typed(_INBOX_INSERT.format(values=values, **self._names))

    def _outbox_insert(self, count: int) -> TextClause:
        now = self._names["now"]
        names = _MESSAGE_COLUMNS.split(", ")
        values = ", ".join(
            f"(:app, {', '.join(f':{name}_{i}' for name in names)}, {now}, :claim_{i}, {now} + :hold_{i})"
            for i in range(count)
        )
        return self._typed(_OUTBOX_INSERT.format(values=values, **self._names))

    @staticmethod
    def _typed(sql: str) -> TextClause:
        names = {match[0][1:]: match[1] for match in _PARAMETER.finditer(sql)}
        return text(sql).bindparams(
            *(
                bindparam(full, type_=_TYPES.get(name, String()), expanding=name in _LISTS)
                for full, name in names.items()
            )
        )


# -- messages as rows, and back --------------------------------------------------------------------------------------------------


def once(outgoing: Iterable[Outgoing]) -> list[Outgoing]:
    """What a transaction publishes, each message once.

    Raises:
        LedgerError: two different messages have the same id and topic.
    """
    found: dict[tuple[str, str], Outgoing] = {}
    for each in outgoing:
        first = found.setdefault((each.message.id, each.message.topic), each)
        if first is not each:
            check_same(each.message, first.message)
    return list(found.values())


def check_same(message: Message, other: Any) -> None:
    """Check that two messages of one id and topic mean the same (their times and headers may differ: published again, later)."""
    if (message.key, message.body, message.content_type) != (other.key, bytes(other.body), other.content_type):
        raise LedgerError(
            f"message {message.id!r} of topic {message.topic!r} waits to be sent already, with another key or body; an id names one "
            "message: give each its own"
        )


def values_of(outgoing: Outgoing, i: int) -> dict[str, object]:
    """The parameters of the i-th row of an insert."""
    message = outgoing.message
    return {
        f"id_{i}": message.id,
        f"topic_{i}": message.topic,
        f"key_{i}": message.key,
        f"headers_{i}": msgspec.json.encode(dict(message.headers)).decode(),
        f"body_{i}": message.body,
        f"content_type_{i}": message.content_type,
        f"correlation_id_{i}": message.correlation_id,
        f"causation_id_{i}": message.causation_id,
        f"created_{i}": message.created,
        f"due_{i}": message.due,
        f"expires_{i}": message.expires,
        f"priority_{i}": message.priority,
        f"required_{i}": int(outgoing.required),
    }


def row_of(found: Any) -> Row:
    """A row as a statement gave it."""
    message = Message(
        id=found.id,
        topic=found.topic,
        body=found.body,
        key=found.key,
        headers=msgspec.json.decode(found.headers, type=dict[str, str]),
        content_type=found.content_type,
        correlation_id=found.correlation_id,
        causation_id=found.causation_id,
        created=found.created,
        due=found.due,
        expires=found.expires,
        priority=found.priority,
    )
    return Row(found.seq, message, found.attempts, bool(found.required), found.error)


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many at a time as one statement can take."""
    for start in range(0, len(items), ROWS_PER_STATEMENT):
        yield items[start : start + ROWS_PER_STATEMENT]
