"""The ledger: inbox and outbox in the application's own database, in the very transaction of its own writes.

A handler's transaction notes its message as handled (inbox), holds the handler's writes, and what it publishes (outbox): all of it
happens, or none of it. Who repeats the message finds it in the inbox and is unwound. Rows of the outbox are deleted once the
broker owns their messages; which of them may be sent now, and by whom, is decided here, the sending is done by the relay.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from conveyor.broker import Clock
from conveyor.core.message import Message
from conveyor.core.settle import describe
from conveyor.errors import AlreadyHandled, ConfigurationError, LedgerError, LedgerUnavailable, MissingExtra
from conveyor.runtime.points import point

try:
    from sqlalchemy import ARRAY, BigInteger, Connection, Engine, Float, Integer, LargeBinary, String, TextClause
    from sqlalchemy import bindparam, event, inspect, text
    from sqlalchemy.engine import URL, Dialect, ExceptionContext, make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidRequestError
    from sqlalchemy.exc import TimeoutError as PoolTimeout
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
    from sqlalchemy.orm import Session, SessionTransaction
    from sqlalchemy.types import TypeEngine
except ModuleNotFoundError as missing:
    raise MissingExtra("the ledger", "ledger") from missing

T = TypeVar("T")
log = logging.getLogger("conveyor.ledger")

DEFAULT_INBOX_DAYS: Final = 7.0
"""Longer than any redelivery, relay outage or restored broker is late (NServiceBus keeps as long)."""
SHORTEST_SAFE_INBOX_DAYS: Final = 1.0
DEFAULT_LOCK_SECONDS: Final = 30.0
"""A transaction that waits longer for another one than a lease lasts is better tried again."""
DEFAULT_IDLE_SECONDS: Final = 30.0
"""PostgreSQL ends a transaction whose process has fallen silent for so long, so that a frozen handler blocks nobody for longer."""
DEFAULT_CONNECTIONS: Final = 10
"""Per process on PostgreSQL, whose own default allows a hundred in all. SQLite has one writer and a few readers."""
SQLITE_READERS: Final = 4
CONNECT_SECONDS: Final = 10.0
HAND_OFF_SECONDS: Final = 10.0
"""How long rows belong to the process that wrote them; then anybody's relay sends them."""
ROWS_PER_STATEMENT: Final = 200
"""Keeps statements under the 32,766 parameters that SQLite and PostgreSQL allow."""
NEVER: Final = float("inf")
"""As claim_until: parked, until somebody looks."""

Make = Callable[..., Message]
"""Makes the message for an event and its publish options."""


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


# -- SQL -------------------------------------------------------------------------------------------------------------------------

MIGRATIONS: Final[tuple[Mapping[str, tuple[str, ...]], ...]] = (
    # One entry a version, by dialect; only ever added to, and only with what processes of the version before can live with.
    {
        "sqlite": (
            """CREATE TABLE {p}inbox (
                worker TEXT NOT NULL,
                message_id TEXT NOT NULL,
                handled_at REAL NOT NULL,
                PRIMARY KEY (worker, message_id)
            ) WITHOUT ROWID""",
            "CREATE INDEX {p}inbox_handled_at ON {p}inbox (handled_at)",
            """CREATE TABLE {p}outbox (
                seq INTEGER PRIMARY KEY AUTOINCREMENT,
                id TEXT NOT NULL UNIQUE,
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
                error TEXT NOT NULL DEFAULT ''
            )""",
            "CREATE INDEX {p}outbox_claim_until ON {p}outbox (claim_until, seq)",
            "CREATE INDEX {p}outbox_key ON {p}outbox (key, seq) WHERE key IS NOT NULL",
        ),
        "postgresql": (
            """CREATE TABLE {p}inbox (
                worker text NOT NULL,
                message_id text NOT NULL,
                handled_at double precision NOT NULL,
                PRIMARY KEY (worker, message_id)
            )""",
            "CREATE INDEX {p}inbox_handled_at ON {p}inbox (handled_at)",
            """CREATE TABLE {p}outbox (
                seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                id text NOT NULL UNIQUE,
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
                error text NOT NULL DEFAULT ''
            )""",
            "CREATE INDEX {p}outbox_claim_until ON {p}outbox (claim_until, seq)",
            "CREATE INDEX {p}outbox_key ON {p}outbox (key, seq) WHERE key IS NOT NULL",
        ),
    },
)

_MESSAGE_COLUMNS: Final = "id, topic, key, headers, body, content_type, correlation_id, causation_id, created, due, expires, priority, required"
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
    "schema": "CREATE TABLE IF NOT EXISTS {p}schema (version integer PRIMARY KEY, applied_at double precision NOT NULL)",
    "version": "SELECT max(version) FROM {p}schema",
    "applied": "INSERT INTO {p}schema (version, applied_at) VALUES (:version, {now})",
    "seen": "SELECT 1 FROM {p}inbox WHERE worker = :worker AND message_id = :message_id",
    "purge": """
        DELETE FROM {p}inbox WHERE (worker, message_id) IN
            (SELECT worker, message_id FROM {p}inbox WHERE handled_at < {now} - :keep ORDER BY handled_at LIMIT :limit)""",
    # Held until COMMIT: whoever writes a row of this key later also commits later, so that seq orders the commits of a key.
    "lock_keys": "SELECT pg_advisory_xact_lock(hashtextextended('{p}outbox ' || key, 0)) FROM unnest(:key_array) AS key",
    "older": "SELECT DISTINCT key FROM {p}outbox WHERE key IN :keys",
    "free": "SELECT 1 FROM {p}outbox WHERE claim_until <= {now} LIMIT 1",
    # One relay claims at a time, so that none takes the second row of a key while another is about to take the first.
    "lock_claims": "SELECT pg_advisory_xact_lock(hashtextextended('{p}outbox', 0))",
    # Never "seq > the last one sent": a lower seq may be committed later. A row waits while an older one of its key is
    # claimed, backs off or is parked; older ones that are free are lower in this very list.
    "claim": """
        UPDATE {p}outbox SET claim = :me, claim_until = {now} + :hold
        WHERE seq IN (
            SELECT seq FROM {p}outbox AS this
            WHERE claim_until <= {now} AND (key IS NULL OR NOT EXISTS (
                SELECT 1 FROM {p}outbox AS older
                WHERE older.key = this.key AND older.seq < this.seq AND older.claim_until > {now} AND {blocks}))
            ORDER BY seq LIMIT :limit)
        RETURNING seq, attempts, error, {columns}""",
    "sent": "DELETE FROM {p}outbox WHERE claim = :me AND seq IN :seqs",
    "put_off": """
        UPDATE {p}outbox SET claim = NULL, claim_until = {now} + :hold, attempts = attempts + 1, error = :error
        WHERE claim = :me AND seq = :seq""",
    "release": "UPDATE {p}outbox SET claim = NULL, claim_until = 0 WHERE claim = :me AND seq IN :seqs",
    "reclaim": "UPDATE {p}outbox SET claim = NULL, claim_until = 0 WHERE claim = :owner",
    "pending": """
        SELECT count(*), min(added_at), coalesce(sum(CASE WHEN claim_until > 1e300 THEN 1 ELSE 0 END), 0), {now} FROM {p}outbox""",
    "parked": "SELECT seq, attempts, error, {columns} FROM {p}outbox WHERE claim_until > 1e300 ORDER BY seq LIMIT :limit",
    "unpark": "UPDATE {p}outbox SET claim_until = 0, attempts = 0 WHERE claim_until > 1e300 AND id IN :ids",
    "discard": "DELETE FROM {p}outbox WHERE claim_until > 1e300 AND id IN :ids",
}
_INBOX_INSERT: Final = """
    INSERT INTO {p}inbox (worker, message_id, handled_at) VALUES {values}
    ON CONFLICT (worker, message_id) DO NOTHING RETURNING message_id"""
# A message that is still in the outbox under the same id is the same message.
_OUTBOX_INSERT: Final = """
    INSERT INTO {p}outbox ({columns}, added_at, claim, claim_until) VALUES {values}
    ON CONFLICT (id) DO NOTHING RETURNING seq, id"""


class _Statements:
    """The SQL above, for one prefix and one way to tell the time.

    Parameters:
        now: the SQL expression for the time in Unix seconds, the same all through a statement.
    """

    def __init__(self, prefix: str, now: str, *, parked_blocks_key: bool) -> None:
        self._names = {
            "p": prefix,
            "now": now,
            "columns": _MESSAGE_COLUMNS,
            "blocks": "true" if parked_blocks_key else "older.claim_until < 1e300",
        }
        self._made = {name: self._typed(sql.format(**self._names)) for name, sql in _SQL.items()}
        self.inbox_insert = functools.lru_cache(64)(self._inbox_insert)
        self.outbox_insert = functools.lru_cache(64)(self._outbox_insert)

    def __getitem__(self, name: str) -> TextClause:
        return self._made[name]

    def _inbox_insert(self, count: int) -> TextClause:
        values = ", ".join(f"(:worker, :message_id_{i}, {self._names['now']})" for i in range(count))
        return self._typed(_INBOX_INSERT.format(values=values, **self._names))

    def _outbox_insert(self, count: int) -> TextClause:
        now = self._names["now"]
        names = _MESSAGE_COLUMNS.split(", ")
        values = ", ".join(
            f"({', '.join(f':{name}_{i}' for name in names)}, {now}, :claim_{i}, {now} + :hold_{i})"
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


# -- what a transaction is -------------------------------------------------------------------------------------------------------

_MARK: Final = "conveyor.transaction"
"""In the info of a database connection: the Transaction that it is at work for."""


class _Session(Session):
    """The session of a Transaction: begins with the inbox, and leaves COMMIT to the transaction's end."""

    def __init__(self, *arguments: Any, transaction: Transaction, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.owner = transaction

    def get_bind(self, *arguments: Any, **options: Any) -> Engine | Connection:
        """Passed before every statement, whoever sends it: a doomed transaction sends none."""
        self.owner._check()  # noqa: SLF001 - the two classes are one thing, split because SQLAlchemy wants a subclass
        return super().get_bind(*arguments, **options)

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002 - SQLAlchemy's signature
        if not nested:
            raise InvalidRequestError(
                "a Conveyor transaction begins by itself and is committed when its block or handler ends; "
                "use session.begin_nested() for a savepoint"
            )
        return super().begin(nested=True)

    def begin_here(self) -> None:
        """Begin without touching the database, so that a rollback from here on is seen."""
        if not self.in_transaction():
            super().begin()

    def commit(self) -> None:
        if not self.owner._committing:  # noqa: SLF001
            raise InvalidRequestError(
                "a Conveyor transaction is committed when its block or handler ends, together with its inbox and outbox rows; "
                "use session.flush() to send what is pending, or session.begin_nested() for a savepoint"
            )
        super().commit()


class _Outgoing(msgspec.Struct, frozen=True):
    """A message on its way into the outbox."""

    message: Message
    required: bool


class Transaction:
    """A transaction of the application's database: its writes, and the messages that it publishes, together or not at all.

    Handlers get it by its type, other code with ``async with app.transaction() as tx``. It begins when the session is first used,
    so that slow work before that holds no lock and no connection; it is committed at the end of the block.
    """

    def __init__(self, ledger: Ledger, worker: str, message_ids: tuple[str, ...], make: Make | None) -> None:
        self.session: Final = AsyncSession(
            ledger._writer,  # noqa: SLF001 - a ledger makes its transactions
            sync_session_class=_Session,
            transaction=self,
            expire_on_commit=False,
            close_resets_only=False,  # a session kept beyond its end would begin what nobody ends
        )
        self.committed = Claimed()
        """After the end: what is to be handed off now."""
        self._ledger = ledger
        self._worker = worker
        self._message_ids = message_ids
        self._make = make
        self._outgoing: list[_Outgoing] = []
        self._marks: dict[SessionTransaction, int] = {}
        self._doom: BaseException | None = None
        self._lost: LedgerError | None = None
        self._had_error = False
        self._committing = False

    async def publish(self, event: object, *, require_subscriber: bool = False, **options: Any) -> Message:
        """Publish with this transaction: the message leaves when it is committed, and never if it is not.

        Parameters:
            event: what is published.
            require_subscriber: that no queue receives its topic is an error, shown by the relay.
            options: those of ``app.publish`` (topic, key, delay, at, priority, id, expires, headers).

        Returns:
            The message, as it will be sent.
        """
        if self._make is None:
            raise LedgerError("this transaction was opened without a way to make messages of events; use add()")
        message = self._make(event, **options)
        self.add((message,), require_subscriber=require_subscriber)
        return message

    def add(self, messages: Sequence[Message], *, require_subscriber: bool = False) -> None:
        """Publish messages that are made already; see publish()."""
        self._check()
        _sync(self.session).begin_here()
        self._outgoing += [_Outgoing(message, require_subscriber) for message in messages]

    def _check(self) -> None:
        if (reason := self._doom or self._lost) is not None:
            raise reason

    def _begun(self, connection: Connection) -> None:
        """The database transaction has just begun: note the messages as handled, before anything else."""
        connection.info[_MARK] = self
        self._lost, self._had_error = None, False
        if not self._message_ids:
            return
        # Sorted, so that two transactions with some messages in common wait for each other in one order only.
        ids = sorted(self._message_ids)
        values = self._ledger._with_now(worker=self._worker, **{f"message_id_{i}": id for i, id in enumerate(ids)})  # noqa: SLF001
        fresh = connection.execute(self._ledger._sql.inbox_insert(len(ids)), values).scalars().all()  # noqa: SLF001
        if len(fresh) < len(ids):
            self._doom = AlreadyHandled(self._worker, tuple(sorted(set(ids).difference(fresh))))
            raise self._doom
        point("inbox.inserted")

    def _created(self, part: SessionTransaction) -> None:
        self._marks[part] = len(self._outgoing)

    def _rolled_back(self, part: SessionTransaction) -> None:
        """A rollback, whole or to a savepoint, takes back what was published since that began."""
        del self._outgoing[self._marks.pop(part, len(self._outgoing)) :]

    def _refuse_commit(self) -> None:
        """COMMIT is about to be sent by something other than the end of this transaction."""
        if not self._committing:
            self._doom = InvalidRequestError("a Conveyor transaction was committed from inside; nothing of it is kept")
            raise self._doom

    def _failed(self, *, still_open: bool) -> None:
        """A statement failed. PostgreSQL turns a later COMMIT into a silent rollback; SQLite may have rolled back at once."""
        self._had_error = True
        if not still_open:
            self._lost = LedgerError("the database rolled this transaction back; session.rollback() begins anew")

    async def _commit(self) -> None:
        self._check()
        session = self.session
        if not (self._message_ids or self._outgoing or session.in_transaction()):
            return
        connection = await session.connection()
        await session.flush()
        point("work.written")
        claimed = await self._ledger._write(connection, self._outgoing)  # noqa: SLF001
        if self._had_error:
            await connection.execute(text("SELECT 1"))
        point("outbox.inserted")
        self._committing = True
        try:
            await session.commit()
        except DBAPIError as error:
            if error.connection_invalidated:
                text_ = f"the connection was lost during COMMIT, nobody can tell its outcome: {describe(error)}"
                raise LedgerUnavailable(text_, unknown=True) from error
            raise
        point("committed")
        self.committed = claimed


def _sync(session: AsyncSession) -> _Session:
    found = session.sync_session
    assert isinstance(found, _Session)
    return found


@event.listens_for(_Session, "after_begin")
def _after_begin(session: _Session, part: SessionTransaction, connection: Connection) -> None:
    if not part.nested:
        session.owner._begun(connection)  # noqa: SLF001


@event.listens_for(_Session, "after_transaction_create")
def _after_transaction_create(session: _Session, part: SessionTransaction) -> None:
    session.owner._created(part)  # noqa: SLF001


@event.listens_for(_Session, "after_soft_rollback")
def _after_soft_rollback(session: _Session, part: SessionTransaction) -> None:
    session.owner._rolled_back(part)  # noqa: SLF001


# -- the database ----------------------------------------------------------------------------------------------------------------


class Ledger:
    """The application's database as Conveyor uses it.

    Parameters:
        url: ``postgresql+asyncpg://…`` or ``sqlite+aiosqlite:///file``.
        owner: names this process in the claims of the outbox, unguessably.
        clock: gives Unix seconds; None is the server's own clock on PostgreSQL, this host's on SQLite.
        prefix: begins the names of Conveyor's tables.
        inbox_days: how long a handled message is remembered; a repeat that comes later is handled again.
        connections: to PostgreSQL, per process.
        lock_seconds: longest wait for another transaction.
        idle_seconds: PostgreSQL ends a transaction that was silent for so long.

    Raises:
        ConfigurationError: the URL or the prefix cannot work; says what to write instead.
        MissingExtra: the database's driver is not installed.
    """

    def __init__(  # noqa: PLR0917
        self,
        url: str,
        *,
        owner: str,
        clock: Clock | None = None,
        prefix: str = "conveyor_",
        inbox_days: float = DEFAULT_INBOX_DAYS,
        connections: int = DEFAULT_CONNECTIONS,
        lock_seconds: float = DEFAULT_LOCK_SECONDS,
        idle_seconds: float = DEFAULT_IDLE_SECONDS,
    ) -> None:
        if re.fullmatch(r"[a-z_][a-z0-9_]{0,40}", prefix) is None:
            raise ConfigurationError(f"ledger prefix {prefix!r}: small letters, digits and _ only, at most 41 of them")
        if inbox_days < SHORTEST_SAFE_INBOX_DAYS:
            log.warning(
                "the inbox forgets after %.2f days; a message repeated later than that is handled twice", inbox_days
            )
        self.url: Final = _checked(url)
        self.owner: Final = owner
        self.hands_off = False
        """A relay of this process is at work: what is written here is claimed for it."""
        self._inbox_seconds = inbox_days * 86_400
        self._clock = clock
        self._postgresql = self.url.get_backend_name() == "postgresql"
        self._server_clock = self._postgresql and clock is None
        # statement_timestamp(): the server's time, and the same for every row that a statement looks at.
        now = "extract(epoch FROM statement_timestamp())::double precision" if self._server_clock else ":now"
        self._sql = _Statements(prefix, now, parked_blocks_key=True)
        self._prefix = prefix
        try:
            if self._postgresql:
                self._writer = _postgresql_engine(self.url, connections, lock_seconds, idle_seconds)
                self._reader = self._writer.execution_options(postgresql_readonly=True)
                self._looker = self._writer.execution_options(isolation_level="AUTOCOMMIT")
            else:
                self._writer = _sqlite_engine(self.url, lock_seconds, writes=True)
                self._reader = self._looker = _sqlite_engine(self.url, lock_seconds, writes=False)
        except ModuleNotFoundError as error:
            raise MissingExtra(
                f"a ledger on {self.url.get_backend_name()}", "ledger,postgresql" if self._postgresql else "ledger"
            ) from error

    def __repr__(self) -> str:
        return f"Ledger({_shown(self.url)!r})"

    # -- life

    async def open(self) -> None:
        """Connect, and check that the tables are there.

        Raises:
            LedgerUnavailable: the database cannot be reached now.
            LedgerError: it refuses, or lacks Conveyor's tables; says what to do.
        """
        path = _file(self.url)
        if path is not None and not await asyncio.to_thread(path.exists):
            raise LedgerError(f"{_shown(self.url)} does not exist yet; create it with `conveyor migrate`")
        async with self._looking() as connection:
            version = await self._version(connection)
        if version < len(MIGRATIONS):
            said = (
                f"has Conveyor tables of version {version}, this Conveyor needs {len(MIGRATIONS)}"
                if version
                else "has no Conveyor tables yet"
            )
            raise LedgerError(f"{_shown(self.url)} {said}; bring it up to date with `conveyor migrate`")

    async def close(self) -> None:
        """Let go of all connections."""
        await self._reader.dispose()
        await self._writer.dispose()

    async def migrate(self) -> list[str]:
        """Bring the tables up to date; any number of times, from any number of processes at once.

        Returns:
            The statements that were executed; none where everything was up to date.
        """
        path = _file(self.url)
        if path is not None:
            await asyncio.to_thread(_create_private, path)
        done: list[str] = []
        async with self._writing() as connection:
            if self._postgresql:
                await connection.execute(self._sql["lock_claims"])
            version = await self._version(connection)
            if version < len(MIGRATIONS):
                await connection.execute(self._sql["schema"])
            for number, step in enumerate(MIGRATIONS[version:], version + 1):
                for template in step[self.url.get_backend_name()]:
                    statement = template.format(p=self._prefix)
                    await connection.exec_driver_sql(statement)
                    done.append(statement)
                await connection.execute(self._sql["applied"], self._with_now(version=number))
        return done

    async def _version(self, connection: AsyncConnection) -> int:
        has_table = await connection.run_sync(lambda sync: inspect(sync).has_table(f"{self._prefix}schema"))
        if not has_table:
            return 0
        return (await connection.execute(self._sql["version"])).scalar_one() or 0

    # -- for the application

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """A session that only reads, all of it as of one moment."""
        with self._translated():
            async with AsyncSession(self._reader, expire_on_commit=False, close_resets_only=False) as session:
                yield session

    @asynccontextmanager
    async def transaction(
        self, *, inbox: tuple[str, str | Sequence[str]] | None = None, make: Make | None = None
    ) -> AsyncIterator[Transaction]:
        """A transaction that is committed at the end of the block, with its inbox and outbox rows.

        Parameters:
            inbox: the worker and the id (or, for a batch, the ids) of what it handles; None where nothing is handled.
            make: makes messages of events, for publish().

        Raises:
            AlreadyHandled: some of these messages were handled before; nothing was done. Also where the block swallowed it.
            LedgerUnavailable: the database could not do it now; nothing was done, unless the error says that this is unknown.
        """
        worker, ids = inbox if inbox is not None else ("", ())
        tx = Transaction(self, worker, (ids,) if isinstance(ids, str) else tuple(ids), make)
        point("transaction.opening")
        try:
            with self._translated():
                async with tx.session:
                    yield tx
                    await tx._commit()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if tx._doom is not None and error is not tx._doom:
                raise tx._doom from error
            raise

    async def seen(self, worker: str, message_id: str) -> bool:
        """Whether the worker has handled this message; a cheap look, the decision falls when a transaction begins."""
        async with self._looking() as connection:
            found = await connection.execute(self._sql["seen"], {"worker": worker, "message_id": message_id})
            return found.first() is not None

    async def pending(self) -> Pending:
        """What waits in the outbox."""
        async with self._looking() as connection:
            rows, oldest, parked, now = (await connection.execute(self._sql["pending"], self._with_now())).one()
        return Pending(rows, 0.0 if oldest is None else max(0.0, now - oldest), parked)

    async def parked(self, limit: int = 100) -> list[Row]:
        """The messages that the broker refuses for good, oldest first; each blocks the later ones of its key."""
        async with self._looking() as connection:
            return [_row(found) for found in await connection.execute(self._sql["parked"], {"limit": limit})]

    async def unpark(self, ids: Sequence[str]) -> int:
        """Have the relay try these parked messages again. Returns how many there were."""
        return await self._change("unpark", ids=list(ids))

    async def discard(self, ids: Sequence[str]) -> int:
        """Delete these parked messages for good. Returns how many there were."""
        return await self._change("discard", ids=list(ids))

    async def reclaim(self, owner: str) -> int:
        """Leave to anybody's relay what a dead process had claimed, without waiting for its claims to end. Returns how many."""
        return await self._change("reclaim", owner=owner)

    # -- for the relay

    async def claim(self, limit: int, hold_seconds: float) -> Claimed:
        """Take rows that nobody holds, such that no older row of their keys is held by another or put off."""
        async with self._looking() as connection:
            if (await connection.execute(self._sql["free"], self._with_now())).first() is None:
                return Claimed()
        until = steady() + hold_seconds
        values = self._with_now(me=self.owner, hold=hold_seconds, limit=limit)
        async with self._writing() as connection:
            if self._postgresql:
                await connection.execute(self._sql["lock_claims"])
            rows = [_row(found) for found in await connection.execute(self._sql["claim"], values)]
        return Claimed(tuple(sorted(rows, key=lambda row: row.seq)), until)

    async def sent(self, seqs: Sequence[int]) -> None:
        """The broker owns these messages: delete their rows, as far as this process still claims them."""
        for some in _chunks(seqs):
            await self._change("sent", me=self.owner, seqs=some)

    async def release(self, seqs: Sequence[int]) -> None:
        """Leave these rows to anybody's relay at once."""
        for some in _chunks(seqs):
            await self._change("release", me=self.owner, seqs=some)

    async def put_off(self, seq: int, error: str, seconds: float) -> None:
        """The broker refused this message: count it, and try again after so many seconds (NEVER parks it)."""
        await self._change("put_off", **self._with_now(me=self.owner, seq=seq, error=error, hold=seconds))

    async def purge_inbox(self, limit: int = 1000) -> int:
        """Forget up to limit messages that were handled longer ago than inbox_days. Returns how many."""
        return await self._change("purge", **self._with_now(keep=self._inbox_seconds, limit=limit))

    # -- within

    async def _write(self, connection: AsyncConnection, outgoing: Sequence[_Outgoing]) -> Claimed:
        """Insert outbox rows; those that may go at once are claimed for this process, which hands them off after COMMIT."""
        if not outgoing:
            return Claimed()
        keys = sorted({each.message.key for each in outgoing if each.message.key is not None})
        waiting: set[str] = set()
        if keys:
            if self._postgresql:
                await connection.execute(self._sql["lock_keys"], {"key_array": keys})
            for some in _chunks(keys):
                waiting.update((await connection.execute(self._sql["older"], {"keys": some})).scalars())
        until = steady() + HAND_OFF_SECONDS
        rows: list[Row] = []
        left = 0
        for chunk in _chunks(outgoing):
            values: dict[str, object] = self._with_now()
            for i, each in enumerate(chunk):
                direct = self.hands_off and each.message.key not in waiting
                values.update(_values(each, i))
                values[f"claim_{i}"], values[f"hold_{i}"] = (self.owner, HAND_OFF_SECONDS) if direct else (None, 0.0)
            written = await connection.execute(self._sql.outbox_insert(len(chunk)), values)
            seqs = {id: seq for seq, id in written}
            for each in chunk:
                if (seq := seqs.pop(each.message.id, None)) is None:
                    continue
                if self.hands_off and each.message.key not in waiting:
                    rows.append(Row(seq, each.message, required=each.required))
                else:
                    left += 1
        return Claimed(tuple(sorted(rows, key=lambda row: row.seq)), until, left)

    def _with_now(self, **values: object) -> dict[str, object]:
        if not self._server_clock:
            values["now"] = (self._clock or time.time)()
        return values

    async def _change(self, statement: str, **values: object) -> int:
        async with self._writing() as connection:
            return (await connection.execute(self._sql[statement], values)).rowcount

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[AsyncConnection]:
        with self._translated():
            async with self._writer.begin() as connection:
                yield connection

    @asynccontextmanager
    async def _looking(self) -> AsyncIterator[AsyncConnection]:
        with self._translated():
            async with self._looker.connect() as connection:
                yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, PoolTimeout) as error:
            if not is_transient(error):
                raise
            raise LedgerUnavailable(f"{_shown(self.url)} could not do it now: {describe(error)}") from error


def _values(outgoing: _Outgoing, i: int) -> dict[str, object]:
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


def _row(found: Any) -> Row:
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


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), ROWS_PER_STATEMENT):
        yield items[start : start + ROWS_PER_STATEMENT]


# -- engines ---------------------------------------------------------------------------------------------------------------------


def wal_is_safe(version: tuple[int, int, int]) -> bool:
    """Whether this SQLite is without the WAL-reset bug, which can lose commits when several connections write (sqlite.org/wal.html)."""
    if version == (3, 52, 0):  # withdrawn
        return False
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may well succeed when tried again: it met a lock, a conflict, a full disk or a lost connection."""
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    state = getattr(error.orig, "sqlstate", None)
    if isinstance(state, str):
        return _is_transient_state(state)
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    return code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


def _is_transient_state(state: str) -> bool:
    """PostgreSQL's error codes (appendix A): connection, transaction rollback, resources, operator intervention, lock and idle time-outs."""
    return state[:2] in {"08", "40", "53"} or state[:3] == "57P" or state in {"55P03", "25P03"}


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError(
            f"{url!r} is no database URL; write postgresql+asyncpg://user@host/database or sqlite+aiosqlite:///file.db"
        ) from error
    backend = "postgresql" if parsed.get_backend_name() == "postgres" else parsed.get_backend_name()
    drivers = {"postgresql": "postgresql+asyncpg", "sqlite": "sqlite+aiosqlite"}
    if backend not in drivers:
        raise ConfigurationError(f"a ledger on {backend} is not supported; it works on PostgreSQL and SQLite")
    if parsed.drivername != drivers[backend]:
        better = parsed.set(drivername=drivers[backend])
        raise ConfigurationError(
            f"the ledger needs an asynchronous driver; write {_shown(better)} instead of {_shown(parsed)}"
        )
    if backend == "sqlite" and parsed.database in {None, "", ":memory:"}:
        raise ConfigurationError("a ledger needs a file, which all processes share: sqlite+aiosqlite:///file.db")
    return parsed


def _shown(url: URL) -> str:
    """The URL without anything secret."""
    return url.set(query={}).render_as_string(hide_password=True)


def _file(url: URL) -> Path | None:
    """The file of a SQLite URL; None where there is none, or where the URL is SQLite's own kind."""
    if url.get_backend_name() != "sqlite" or url.database is None or url.database.startswith("file:"):
        return None
    return Path(url.database)


def _create_private(path: Path) -> None:
    """Create the file, for this user only, unless it exists (an existing one must not even be opened: SQLite's locks would go)."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise LedgerError(f"{path} cannot be created: {error.strerror}") from error


def _postgresql_engine(url: URL, connections: int, lock_seconds: float, idle_seconds: float) -> AsyncEngine:
    engine = create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=lock_seconds,
        pool_pre_ping=True,  # after a restart of the server nobody meets a dead connection
        isolation_level="READ COMMITTED",  # the order of the outbox is read after waiting for a lock, whatever the server's default
        connect_args={
            "timeout": CONNECT_SECONDS,
            "server_settings": {
                "application_name": "conveyor",
                "lock_timeout": str(int(lock_seconds * 1000)),
                "idle_in_transaction_session_timeout": str(int(idle_seconds * 1000)),
            },
        },
    )
    _listen(engine, lambda _: True)
    return engine


def _sqlite_engine(url: URL, lock_seconds: float, *, writes: bool) -> AsyncEngine:
    engine = create_async_engine(
        url,
        # One writer: whoever waits for it in this process waits in line, not in SQLite's sleeps.
        pool_size=1 if writes else SQLITE_READERS,
        max_overflow=0,
        pool_timeout=lock_seconds,
        connect_args={"timeout": lock_seconds, "isolation_level": None},  # BEGIN is ours
    )
    journal = "WAL" if wal_is_safe(sqlite3.sqlite_version_info) else "TRUNCATE"

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        if writes:
            cursor.execute("PRAGMA synchronous = FULL")
            cursor.execute(f"PRAGMA journal_mode = {journal}")
            if (found := cursor.fetchone()[0].upper()) != journal:
                raise LedgerError(
                    f"{_shown(url)} is in journal mode {found} and in use, so that it cannot be changed to {journal}, which is safe "
                    f"with SQLite {sqlite3.sqlite_version}; stop the other programs that use it"
                )
        else:
            cursor.execute("PRAGMA query_only = ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    _listen(engine, lambda connection: bool(connection.driver_connection.in_transaction))
    return engine


def _listen(engine: AsyncEngine, is_open: Callable[[Any], bool]) -> None:
    """Watch what happens on the engine's connections.

    Parameters:
        is_open: whether a failed statement left the transaction of this database connection open.
    """
    sync = engine.sync_engine

    @event.listens_for(sync, "do_connect")
    def connect(dialect: Dialect, record: object, arguments: list[Any], options: dict[str, Any]) -> Any:
        try:
            return dialect.connect(*arguments, **options)
        except Exception as error:
            said = f"{_shown(engine.url)} cannot be reached: {describe(error)}"
            state = getattr(error, "sqlstate", None)
            later = isinstance(error, (OSError, TimeoutError)) or (
                isinstance(state, str) and _is_transient_state(state)
            )
            raise (LedgerUnavailable if later else LedgerError)(said) from error

    @event.listens_for(sync, "commit")
    def commit(connection: Connection) -> None:
        owner = connection.info.get(_MARK)
        if isinstance(owner, Transaction):
            owner._refuse_commit()  # noqa: SLF001
            del connection.info[_MARK]

    @event.listens_for(sync, "rollback")
    def rollback(connection: Connection) -> None:
        connection.info.pop(_MARK, None)

    @event.listens_for(sync, "handle_error")
    def handle_error(context: ExceptionContext) -> None:
        connection = context.connection
        if connection is None or connection.closed or connection.invalidated:
            return
        owner = connection.info.get(_MARK)
        if isinstance(owner, Transaction):
            owner._failed(still_open=is_open(connection.connection))  # noqa: SLF001
