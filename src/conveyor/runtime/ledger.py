"""The ledger: inbox and outbox in the application's own database, in the very transaction of its own writes.

A handler's transaction notes its message as handled (inbox), holds the handler's writes, and what it publishes (outbox): all of it
happens, or none of it. Who repeats the message finds it in the inbox and is unwound. Rows of the outbox are deleted once the
broker owns their messages; which of them may be sent now, and by whom, is decided here, the sending is done by the relay.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar

import msgspec

from conveyor.broker import Clock
from conveyor.core.message import Message
from conveyor.core.settle import describe
from conveyor.errors import AlreadyHandled, ConfigurationError, LedgerError, LedgerUnavailable
from conveyor.runtime.database import Database, create_private, watch
from conveyor.runtime.points import point

# After database, which says what to install where SQLAlchemy is missing.
# isort: split
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Connection,
    Engine,
    Float,
    Integer,
    LargeBinary,
    String,
    TextClause,
    bindparam,
    event,
    inspect,
    text,
)
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.types import TypeEngine

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


class _Statements:
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


# -- what a transaction is -------------------------------------------------------------------------------------------------------


_around: ContextVar[_Work | None] = ContextVar("conveyor_transaction", default=None)
"""The transaction whose block the running code is in."""


class _Outgoing(msgspec.Struct, frozen=True):
    """A message on its way into the outbox."""

    message: Message
    required: bool


class _Session(Session):
    """The session of a transaction: begins with the inbox, and leaves COMMIT to the transaction's end."""

    def __init__(self, *arguments: Any, work: _Work, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.work = work

    def get_bind(self, *arguments: Any, **options: Any) -> Engine | Connection:
        """Passed before every statement, whoever sends it: a doomed transaction sends none."""
        self.work.check()
        return super().get_bind(*arguments, **options)

    def begin(self, nested: bool = False) -> SessionTransaction:
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
        if not self.work.ended:
            raise InvalidRequestError(
                "a Conveyor transaction is committed when its block or handler ends, together with its inbox and outbox rows; "
                "use session.flush() to send what is pending, or session.begin_nested() for a savepoint"
            )
        super().commit()


@event.listens_for(_Session, "after_begin")
def _after_begin(session: _Session, part: SessionTransaction, connection: Connection) -> None:
    if not part.nested:
        session.work.begun(connection)


@event.listens_for(_Session, "after_transaction_create")
def _after_transaction_create(session: _Session, part: SessionTransaction) -> None:
    session.work.part_begun(part)


@event.listens_for(_Session, "after_soft_rollback")
def _after_soft_rollback(session: _Session, part: SessionTransaction) -> None:
    session.work.part_rolled_back(part)


class _Work:
    """The inner side of a Transaction: what it has to write, and whether it still may be committed.

    Parameters:
        message_ids: what it handles, for the inbox of worker.
    """

    def __init__(self, ledger: Ledger, worker: str, message_ids: Sequence[str]) -> None:
        self.session: Final = AsyncSession(
            ledger.database.writer,
            sync_session_class=_Session,
            work=self,
            expire_on_commit=False,
            close_resets_only=False,  # a session kept beyond its end would begin what nobody ends
        )
        self.ended = False
        """The block is over; now it may be committed."""
        self.doom: BaseException | None = None
        """Why it never can be committed."""
        self.holds_lock = False
        """It has begun: on SQLite nobody else can begin until it ends."""
        self._task = asyncio.current_task()
        outer = _around.get()
        # Another task may well wait for this one's transaction to end; the same task would wait for itself.
        self._outer = outer if outer is not None and outer._task is self._task else None
        self._lost: LedgerError | None = None
        self._had_error = False
        self._ledger = ledger
        self._worker = worker
        self._message_ids = message_ids
        self._outgoing: list[_Outgoing] = []
        self._marks: dict[SessionTransaction, int] = {}

    def check(self) -> None:
        if (reason := self.doom or self._lost) is not None:
            raise reason
        outer = self._outer
        if outer is not None and outer.holds_lock and not self.holds_lock and self._ledger.database.dialect == "sqlite":
            raise LedgerError(
                "a transaction inside another one that has begun would wait for it for ever: SQLite has one writer at a time; "
                "use the outer transaction, or end it first"
            )

    def add(self, outgoing: Iterable[_Outgoing]) -> None:
        self.check()
        session = self.session.sync_session
        assert isinstance(session, _Session)
        session.begin_here()
        self._outgoing += outgoing

    def begun(self, connection: Connection) -> None:
        """The database transaction has just begun: note the messages as handled, before anything else."""
        watch(connection, self)
        self.holds_lock = True
        self._lost, self._had_error = None, False
        if not self._message_ids:
            return
        try:
            handled_before = self._ledger.note_handled(connection, self._worker, self._message_ids)
        except BaseException:
            self._lost = LedgerError("the transaction could not begin; session.rollback() begins anew")
            raise
        if handled_before:
            self.doom = AlreadyHandled(self._worker, handled_before)
            raise self.doom
        point("inbox.inserted")

    def part_begun(self, part: SessionTransaction) -> None:
        self._marks[part] = len(self._outgoing)

    def part_rolled_back(self, part: SessionTransaction) -> None:
        """A rollback, whole or to a savepoint, takes back what was published since that began."""
        del self._outgoing[self._marks.pop(part, len(self._outgoing)) :]
        if part.parent is None:
            self._lost = None
            self.holds_lock = False

    def committing(self) -> None:
        if not self.ended:
            self.doom = InvalidRequestError("a Conveyor transaction was committed from inside; nothing of it is kept")
            raise self.doom

    def failed(self, *, still_open: bool) -> None:
        self._had_error = True
        if not still_open:
            self._lost = LedgerError("the database rolled this transaction back; session.rollback() begins anew")

    def end(self) -> None:
        """The block is over, however. It may end in another task than it began in: there it is around nothing."""
        self.holds_lock = False
        if _around.get() is self:
            _around.set(self._outer)

    async def commit(self) -> Claimed:
        """The block has ended well: write inbox and outbox, and COMMIT."""
        self.check()
        if not (self._message_ids or self._outgoing or self.session.in_transaction()):
            return Claimed()
        try:
            return await self.session.run_sync(self._commit)
        except DBAPIError as error:
            if self.ended and error.connection_invalidated:
                unknown = f"the connection was lost during COMMIT, nobody can tell its outcome: {describe(error)}"
                raise LedgerUnavailable(unknown, unknown=True) from error
            raise

    def _commit(self, session: Session) -> Claimed:
        connection = session.connection()
        session.flush()
        point("work.written")
        claimed = self._ledger.write_outbox(connection, self._outgoing)
        if self._had_error:  # PostgreSQL turns the COMMIT of a failed transaction into a rollback, and says nothing
            connection.execute(text("SELECT 1"))
        point("outbox.inserted")
        self.ended = True
        session.commit()
        point("committed")
        return claimed


class Transaction:
    """A transaction of the application's database: its writes, and the messages that it publishes, together or not at all.

    Handlers get it by its type, other code with ``async with app.transaction() as tx``. It begins when the session is first used,
    so that slow work before that holds no lock and no connection; it is committed at the end of the block.
    """

    def __init__(self, work: _Work, make: Make | None) -> None:
        self.session: Final = work.session
        """A SQLAlchemy session. What is left open to it: everything but ending the transaction."""
        self.committed = Claimed()
        """After the end: what is to be handed off now."""
        self._work = work
        self._make = make

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

    def add(self, messages: Iterable[Message], *, require_subscriber: bool = False) -> None:
        """Publish messages that are made already; see publish()."""
        self._work.add(_Outgoing(message, require_subscriber) for message in messages)


# -- the ledger ------------------------------------------------------------------------------------------------------------------


class Ledger:
    """Inbox and outbox in the application's database.

    Parameters:
        url: ``postgresql+asyncpg://…`` or ``sqlite+aiosqlite:///file``.
        app: the application's name; applications that share a database neither see nor touch each other's rows.
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

    def __init__(
        self,
        url: str,
        *,
        app: str,
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
        self.database: Final = Database(
            url, connections=connections, lock_seconds=lock_seconds, idle_seconds=idle_seconds
        )
        self.app: Final = app
        self.owner: Final = owner
        self.hands_off = False
        """A relay of this process is at work: what is written here is claimed for it."""
        self._inbox_seconds = inbox_days * 86_400
        self._clock = clock or time.time
        self._server_clock = clock is None and self.database.dialect == "postgresql"
        # statement_timestamp(): the server's time, and the same for every row that a statement looks at.
        now = "extract(epoch FROM statement_timestamp())::double precision" if self._server_clock else ":now"
        self._prefix = prefix
        self._sql = _Statements(prefix, now)

    def __repr__(self) -> str:
        return f"Ledger({self.database.shown!r})"

    # -- life

    async def open(self) -> None:
        """Connect, and check that the tables are there.

        Raises:
            LedgerUnavailable: the database cannot be reached now.
            LedgerError: it refuses, or lacks Conveyor's tables; says what to do.
        """
        shown, file = self.database.shown, self.database.file
        if file is not None and not await asyncio.to_thread(file.exists):
            raise LedgerError(f"{shown} does not exist yet; create it with `conveyor migrate`")
        async with self.database.looking() as connection:
            version = await self._version(connection)
        if version == 0:
            raise LedgerError(f"{shown} has no Conveyor tables yet; create them with `conveyor migrate`")
        if version < len(MIGRATIONS):
            raise LedgerError(
                f"{shown} has Conveyor tables of version {version}, this Conveyor needs version {len(MIGRATIONS)}; "
                "bring them up to date with `conveyor migrate`"
            )

    async def close(self) -> None:
        """Let go of all connections."""
        await self.database.close()

    async def migrate(self) -> list[str]:
        """Bring the tables up to date; any number of times, from any number of processes at once.

        Returns:
            The statements that were executed; none where everything was up to date.
        """
        if (file := self.database.file) is not None:
            await asyncio.to_thread(create_private, file)
        done: list[str] = []
        async with self.database.writing() as connection:
            if self.database.dialect == "postgresql":
                await connection.execute(self._sql["lock_schema"])
            version = await self._version(connection)
            if version == 0:
                await connection.execute(self._sql["schema"])
            for number, step in enumerate(MIGRATIONS[version:], version + 1):
                for template in step[self.database.dialect]:
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
        with self.database.translated():
            async with AsyncSession(self.database.reader, expire_on_commit=False, close_resets_only=False) as session:
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
            LedgerUnavailable: the database is out of order; nothing was done, unless the error says that this is unknown.
            LedgerBusy: it met a deadlock, a conflict or a limit of time; nothing was done.
            LedgerError: it cannot be done so, for instance as another message with the same id and topic waits in the outbox.
        """
        worker, ids = inbox if inbox is not None else ("", ())
        work = _Work(self, worker, (ids,) if isinstance(ids, str) else tuple(ids))
        tx = Transaction(work, make)
        point("transaction.opening")
        _around.set(work)
        try:
            with self.database.translated():
                async with work.session:
                    yield tx
                    tx.committed = await work.commit()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if work.doom is not None and error is not work.doom:
                raise work.doom from error
            raise
        finally:
            work.end()

    async def seen(self, worker: str, message_id: str) -> bool:
        """Whether the worker has handled this message; a cheap look, the decision falls when a transaction begins."""
        async with self.database.looking() as connection:
            values = {"app": self.app, "worker": worker, "message_id": message_id}
            return bool(await connection.run_sync(self.database.fetch, self._sql["seen"], values))

    async def pending(self) -> Pending:
        """What waits in the outbox."""
        async with self.database.looking() as connection:
            rows, oldest, parked, now = (
                await connection.execute(self._sql["pending"], self._with_now(app=self.app))
            ).one()
        return Pending(rows, 0.0 if oldest is None else max(0.0, now - oldest), parked)

    async def parked(self, limit: int = 100) -> list[Row]:
        """The messages that the broker refuses for good, oldest first; each blocks the later ones of its key."""
        async with self.database.looking() as connection:
            values = {"app": self.app, "limit": limit}
            return [_row(found) for found in await connection.execute(self._sql["parked"], values)]

    async def unpark(self, ids: Sequence[str]) -> int:
        """Have the relay try these parked messages again. Returns how many there were."""
        return await self._change("unpark", app=self.app, ids=list(ids))

    async def discard(self, ids: Sequence[str]) -> int:
        """Delete these parked messages for good. Returns how many there were."""
        return await self._change("discard", app=self.app, ids=list(ids))

    async def reclaim(self, owner: str) -> int:
        """Leave to anybody's relay what a dead process had claimed, without waiting for its claims to end. Returns how many."""
        return await self._change("reclaim", app=self.app, owner=owner)

    # -- for the relay

    async def claim(self, limit: int, hold_seconds: float) -> Claimed:
        """Take rows that nobody holds, such that no older row of their keys is held by another or put off."""
        async with self.database.looking() as connection:
            if (await connection.execute(self._sql["free"], self._with_now(app=self.app))).first() is None:
                return Claimed()
        until = steady() + hold_seconds
        values = self._with_now(app=self.app, me=self.owner, hold=hold_seconds, limit=limit)
        async with self.database.writing() as connection:
            if self.database.dialect == "postgresql":
                await connection.execute(self._sql["lock_claims"], {"app": self.app})
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
        return await self._change("purge", **self._with_now(app=self.app, keep=self._inbox_seconds, limit=limit))

    # -- within

    def note_handled(self, connection: Connection, worker: str, message_ids: Sequence[str]) -> tuple[str, ...]:
        """Put messages into the worker's inbox; those that were there before are returned.

        Where another transaction is just handling one of them, this waits until that ends.
        """
        ids = sorted(message_ids)  # so that two transactions wait for each other in one order only
        values = self._with_now(app=self.app, worker=worker, **{f"message_id_{i}": id for i, id in enumerate(ids)})
        noted = self.database.fetch(connection, self._sql.inbox_insert(len(ids)), values)
        return () if len(noted) == len(ids) else tuple(sorted(set(ids).difference(id for (id,) in noted)))

    def write_outbox(self, connection: Connection, outgoing: Sequence[_Outgoing]) -> Claimed:
        """Insert outbox rows; those that may go at once are claimed for this process, which hands them off after COMMIT."""
        if not outgoing:
            return Claimed()
        outgoing = _once(outgoing)
        keys = sorted({each.message.key for each in outgoing if each.message.key is not None})
        waiting: set[str] = set()
        if keys and self.database.dialect == "postgresql":
            connection.execute(self._sql["lock_keys"], {"app": self.app, "key_array": keys})
        for some in _chunks(keys):
            waiting.update(connection.execute(self._sql["older"], {"app": self.app, "keys": some}).scalars())
        direct = [self.hands_off and each.message.key not in waiting for each in outgoing]
        until = steady() + HAND_OFF_SECONDS
        rows: list[Row] = []
        for chunk in _chunks(list(zip(outgoing, direct, strict=True))):
            values = self._with_now(app=self.app)
            for i, (each, claims) in enumerate(chunk):
                values |= _values(each, i)
                values[f"claim_{i}"], values[f"hold_{i}"] = (self.owner, HAND_OFF_SECONDS) if claims else (None, 0.0)
            inserted = self.database.fetch(connection, self._sql.outbox_insert(len(chunk)), values)
            seqs = {(id, topic): seq for seq, id, topic in inserted}
            for each, claims in chunk:
                if (seq := seqs.get((each.message.id, each.message.topic))) is None:
                    self._check_same(connection, each.message)
                elif claims:
                    rows.append(Row(seq, each.message, required=each.required))
        return Claimed(tuple(sorted(rows, key=lambda row: row.seq)), until, left=direct.count(False))

    def _check_same(self, connection: Connection, message: Message) -> None:
        """A row of this id and topic waits in the outbox already: it has to be the same message."""
        stored = connection.execute(
            self._sql["stored"], {"app": self.app, "id": message.id, "topic": message.topic}
        ).first()
        if stored is not None:
            _same(message, stored)

    def _with_now(self, **values: object) -> dict[str, object]:
        if not self._server_clock:
            values["now"] = self._clock()
        return values

    async def _change(self, statement: str, **values: object) -> int:
        async with self.database.writing() as connection:
            return (await connection.execute(self._sql[statement], values)).rowcount


def _once(outgoing: Iterable[_Outgoing]) -> list[_Outgoing]:
    """What a transaction publishes, each message once.

    Raises:
        LedgerError: two different messages have the same id and topic.
    """
    found: dict[tuple[str, str], _Outgoing] = {}
    for each in outgoing:
        first = found.setdefault((each.message.id, each.message.topic), each)
        if first is not each:
            _same(each.message, first.message)
    return list(found.values())


def _same(message: Message, other: Any) -> None:
    """Check that two messages of one id and topic mean the same (their times and headers may differ: published again, later)."""
    if (message.key, message.body, message.content_type) != (other.key, bytes(other.body), other.content_type):
        raise LedgerError(
            f"message {message.id!r} of topic {message.topic!r} waits to be sent already, with another key or body; an id names one "
            "message: give each its own"
        )


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
