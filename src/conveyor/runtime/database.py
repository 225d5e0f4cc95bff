"""The application's database as the ledger reaches it: from a URL to engines set up so that transactions are what they promise."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from conveyor.core.settle import describe
from conveyor.errors import ConfigurationError, LedgerBusy, LedgerError, LedgerUnavailable, MissingExtra

try:
    from sqlalchemy import Connection, TextClause, event
    from sqlalchemy.engine import URL, Dialect, ExceptionContext, make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError
    from sqlalchemy.exc import TimeoutError as PoolTimeout
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
    from sqlalchemy.pool import PoolResetState
    from sqlalchemy.util import await_only
except ModuleNotFoundError as missing:
    raise MissingExtra("the ledger", "ledger") from missing

T = TypeVar("T")

SQLITE_READERS: Final = 4
CONNECT_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 2.0
"""Longest wait for cancelled statements of SQLite; one that waits for a lock longer than that dies with the process."""
_WATCHER: Final = "conveyor.watcher"
"""In the info of a connection: the Watcher of its present transaction."""
_ANSWERED: Final = "conveyor.answered"
"""In the info of a connection: when the last answer came, by time.monotonic()."""
_NO_BEGIN: Final = "conveyor_no_begin"
"""An execution option: a single statement is a transaction of its own."""


class Watcher(Protocol):
    """Who wants to know what happens to a transaction behind the session's back."""

    def committing(self) -> None:
        """COMMIT is about to be sent, by whomever; raise to refuse it."""
        ...

    def failed(self, *, still_open: bool) -> None:
        """A statement failed; still_open where the database has not rolled back the whole transaction."""
        ...


class Database:
    """A database behind an asynchronous SQLAlchemy URL; nothing is connected before it is used.

    Parameters:
        url: ``postgresql+asyncpg://…`` or ``sqlite+aiosqlite:///file``.
        connections: to PostgreSQL, per process. SQLite has one writer and a few readers.
        lock_seconds: longest wait for another transaction.
        idle_seconds: PostgreSQL ends a transaction that was silent for so long.

    Raises:
        ConfigurationError: the URL cannot work; says what to write instead.
        MissingExtra: the driver is not installed.
    """

    def __init__(self, url: str, *, connections: int, lock_seconds: float, idle_seconds: float) -> None:
        self._url = _checked(url)
        self._lock_seconds = lock_seconds
        self._leaving: set[asyncio.Future[None]] = set()
        self.shown: Final = _shown(self._url)
        """The URL without anything secret."""
        self.dialect: Final = self._url.get_backend_name()
        """``postgresql`` or ``sqlite``."""
        try:
            if self.dialect == "postgresql":
                self.writer = _postgresql_engine(self._url, connections, lock_seconds, idle_seconds)
                self.reader = self.writer.execution_options(postgresql_readonly=True)
                self._looker = self.writer.execution_options(isolation_level="AUTOCOMMIT")
            else:
                self.writer = _sqlite_engine(self._url, lock_seconds, self._leaving, writes=True)
                self.reader = _sqlite_engine(self._url, lock_seconds, self._leaving, writes=False)
                self._looker = self.reader.execution_options(**{_NO_BEGIN: True})
        except ModuleNotFoundError as error:
            extra = "ledger,postgresql" if self.dialect == "postgresql" else "ledger"
            raise MissingExtra(f"a ledger on {self.dialect}", extra) from error

    @property
    def file(self) -> Path | None:
        """The file of a SQLite database; None where there is none, or where the URL names it in SQLite's own way."""
        name = self._url.database
        return None if self.dialect != "sqlite" or name is None or name.startswith("file:") else Path(name)

    async def close(self) -> None:
        """Let go of all connections."""
        await self.reader.dispose()
        await self.writer.dispose()
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=CLOSE_SECONDS)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction, committed at the end of the block."""
        with self.translated():
            async with self.writer.begin() as connection:
                yield connection

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[AsyncConnection]:
        """A connection for a quick look: one statement, as of one moment."""
        with self.translated():
            async with self._looker.connect() as connection:
                yield connection

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Errors that may be over when one tries again become LedgerUnavailable or LedgerBusy."""
        try:
            yield
        except PoolTimeout as error:
            raise LedgerBusy(
                f"{self.shown}: no connection became free within {self._lock_seconds:g} s; whoever opens a transaction inside another "
                "one holds two, and where all do so at once each waits for the others: use the outer transaction, or end it first"
            ) from error
        except (DBAPIError, sqlite3.Error) as error:
            kind = trouble(error)
            if kind is None:
                raise
            raise kind(f"{self.shown} could not do it now: {describe(error)}") from error

    def fetch(self, connection: Connection, statement: TextClause, values: Mapping[str, object]) -> Sequence[Any]:
        """Execute a statement with plain parameters, and fetch its rows; for what is done with every message."""
        if self.dialect == "sqlite":  # one hop to the connection's thread, where SQLAlchemy takes four
            rows: Sequence[Any] = _awaited(connection, _driver(connection).execute_fetchall(statement.text, values))
            return rows
        return connection.execute(statement, values).fetchall()


def watch(connection: Connection, watcher: Watcher) -> None:
    """Tell watcher what happens to the present transaction of this connection."""
    connection.info[_WATCHER] = watcher


def create_private(path: Path) -> None:
    """Create the file, for this user only, unless it exists (an existing one must not even be opened: SQLite's locks would go)."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise LedgerError(f"{path} cannot be created: {error.strerror}") from error


def wal_is_safe(version: tuple[int, int, int]) -> bool:
    """Whether this SQLite is without the bug by which several connections in WAL mode can lose commits.

    Source: sqlite.org/wal.html, "the WAL-reset bug"; 3.52.0 was withdrawn.
    """
    if version == (3, 52, 0):
        return False
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)


def trouble(error: BaseException) -> type[LedgerUnavailable | LedgerBusy] | None:
    """What an error says about the database, where the same transaction may well succeed when tried again; None elsewhere."""
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return LedgerUnavailable
        cause: BaseException | None = error.orig
    else:
        cause = error
    state = getattr(cause, "sqlstate", None)
    if isinstance(state, str):
        return _trouble_of_state(state)
    code = (getattr(cause, "sqlite_errorcode", None) or 0) & 0xFF
    if code in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}:
        return LedgerUnavailable
    return LedgerBusy if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED} else None


def _trouble_of_state(state: str) -> type[LedgerUnavailable | LedgerBusy] | None:
    """Sort an SQLSTATE (PostgreSQL, appendix A).

    An outage: connection (08), operator intervention (57P), disk full, too many connections. Busy: transaction rollback (40),
    other resources (53), lock and idle time-outs.
    """
    if state[:2] == "08" or state[:3] == "57P" or state in {"53100", "53300"}:
        return LedgerUnavailable
    return LedgerBusy if state[:2] in {"40", "53"} or state in {"55P03", "25P03"} else None


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (
        ArgumentError,
        ValueError,
    ):  # the URL is not shown, nor the cause, which quotes it: there may be a password in it
        missing = "its port is no number" if "://" in url else "it has no driver:// at its begin"
        raise ConfigurationError(
            f"this is no database URL, {missing}; "
            "write postgresql+asyncpg://user@host/database or sqlite+aiosqlite:///file.db"
        ) from None
    drivers = {"postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg", "sqlite": "sqlite+aiosqlite"}
    wanted = drivers.get(parsed.drivername.partition("+")[0])
    if wanted is None:
        raise ConfigurationError(f"a ledger on {parsed.drivername} is not supported; it works on PostgreSQL and SQLite")
    if parsed.drivername != wanted:
        better = _shown(parsed.set(drivername=wanted))
        raise ConfigurationError(f"the ledger needs an asynchronous driver; write {better} instead of {_shown(parsed)}")
    if wanted == "sqlite+aiosqlite" and parsed.database in {None, "", ":memory:"}:
        raise ConfigurationError("a ledger needs a file, which all processes share: sqlite+aiosqlite:///file.db")
    return parsed


def _shown(url: URL) -> str:
    return url.set(query={}).render_as_string(hide_password=True)


def _driver(connection: Connection) -> Any:
    """The connection of aiosqlite."""
    return connection.connection.driver_connection


def _awaited(connection: Connection, statement: Awaitable[T]) -> T:
    """Wait for a statement of the driver's own; a connection that was left while it executed one is not used again."""
    try:
        return await_only(statement)
    except asyncio.CancelledError:
        connection.invalidate()
        raise


def _postgresql_engine(url: URL, connections: int, lock_seconds: float, idle_seconds: float) -> AsyncEngine:
    engine = create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=lock_seconds,
        pool_pre_ping=True,  # after a restart of the server nobody meets a dead connection
        isolation_level="READ COMMITTED",  # the outbox is read after waiting for a lock, whatever the server's default
        connect_args={
            "timeout": CONNECT_SECONDS,
            "server_settings": {
                "application_name": "conveyor",
                "lock_timeout": str(int(lock_seconds * 1000)),
                "idle_in_transaction_session_timeout": str(int(idle_seconds * 1000)),
            },
        },
    )
    _listen(engine)
    _tell_silence(engine, idle_seconds)
    return engine


def _tell_silence(engine: AsyncEngine, idle_seconds: float) -> None:
    """Tell a connection that PostgreSQL ended for its silence from one that was lost: the driver drops what the server said (25P03)."""
    sync = engine.sync_engine

    @event.listens_for(sync, "begin")
    @event.listens_for(sync, "after_cursor_execute")
    def answered(connection: Connection, *_: object) -> None:
        connection.info[_ANSWERED] = time.monotonic()

    @event.listens_for(sync, "handle_error")
    def handle_error(context: ExceptionContext) -> None:
        connection = context.connection
        if not context.is_disconnect or connection is None or connection.closed or connection.invalidated:
            return
        silent = time.monotonic() - connection.info.get(_ANSWERED, float("inf"))
        if silent > idle_seconds:
            raise LedgerBusy(
                f"{_shown(engine.url)} ended this transaction, because nothing was asked of it for {silent:.1f} s (at most "
                f"{idle_seconds:g} s); do slow work before the transaction is first used"
            ) from context.original_exception


def _sqlite_engine(url: URL, lock_seconds: float, leaving: set[asyncio.Future[None]], *, writes: bool) -> AsyncEngine:
    """The engine for SQLite.

    Parameters:
        leaving: where connections are noted that are to close when the statement under way has ended.
    """
    engine = create_async_engine(
        url,
        # One writer: whoever waits for it in this process waits in line, not in SQLite's sleeps.
        pool_size=1 if writes else SQLITE_READERS,
        max_overflow=0,
        pool_timeout=lock_seconds,
        pool_reset_on_return=None,  # below, where it is not done when there is nothing to undo
        connect_args={"timeout": lock_seconds, "isolation_level": None},  # BEGIN is ours
    )
    sync = engine.sync_engine
    begin_statement = "BEGIN IMMEDIATE" if writes else "BEGIN"

    def terminate(connection: Any) -> None:
        closed: asyncio.Future[None] | None = connection.driver_connection.stop()
        if closed is not None:
            leaving.add(closed)
            closed.add_done_callback(leaving.discard)

    # SQLAlchemy's own waits until the statement under way has ended, for a lock perhaps; a cancelled handler cannot.
    sync.dialect.do_terminate = terminate  # type: ignore[assignment]

    @event.listens_for(sync, "connect")
    def prepare(connection: Any, _: object) -> None:
        try:
            cursor = connection.cursor()
            cursor.execute("PRAGMA foreign_keys = ON")
            if writes:
                _set_journal(cursor, _shown(url))
            else:
                cursor.execute("PRAGMA query_only = ON")
            cursor.close()
        except BaseException:  # nobody else would close it
            terminate(connection)
            raise

    @event.listens_for(sync, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get(_NO_BEGIN):
            return
        try:
            _awaited(connection, _driver(connection).execute(begin_statement))
        except sqlite3.OperationalError as error:
            kind = trouble(error) or LedgerError
            raise kind(f"{_shown(url)} could not begin a transaction: {describe(error)}") from error

    @event.listens_for(sync, "reset")
    def reset(connection: Any, _: object, state: PoolResetState) -> None:
        if not state.terminate_only and connection.driver_connection.in_transaction:
            connection.rollback()

    _listen(engine)
    return engine


def _set_journal(cursor: Any, shown: str) -> None:
    """FULL: a commit that returned outlives a power failure. WAL only where this SQLite cannot lose commits by it."""
    cursor.execute("PRAGMA synchronous = FULL")
    wanted = "wal" if wal_is_safe(sqlite3.sqlite_version_info) else "truncate"
    cursor.execute(f"PRAGMA journal_mode = {wanted}")
    if (found := cursor.fetchone()[0]) != wanted:
        raise LedgerError(
            f"{shown} is in journal mode {found} and in use, so that it cannot be changed to {wanted}, which is the safe one "
            f"with SQLite {sqlite3.sqlite_version}; stop the other programs that use it"
        )


def _listen(engine: AsyncEngine) -> None:
    sync = engine.sync_engine
    shown = _shown(engine.url)

    @event.listens_for(sync, "do_connect")
    def connect(dialect: Dialect, _: object, arguments: list[Any], options: dict[str, Any]) -> Any:
        try:
            return dialect.connect(*arguments, **options)
        except Exception as error:
            state = getattr(error, "sqlstate", None)
            later = isinstance(error, OSError) or (isinstance(state, str) and _trouble_of_state(state) is not None)
            kind = LedgerUnavailable if later else LedgerError
            raise kind(f"{shown} cannot be opened: {describe(error)}") from error

    @event.listens_for(sync, "commit")
    def commit(connection: Connection) -> None:
        if (watcher := connection.info.get(_WATCHER)) is None:
            return
        try:
            watcher.committing()
        except BaseException:
            connection.invalidate()  # SQLAlchemy takes it for ended, and would pool it with its transaction open
            raise
        del connection.info[_WATCHER]

    @event.listens_for(sync, "rollback")
    def rollback(connection: Connection) -> None:
        if not connection.invalidated:
            connection.info.pop(_WATCHER, None)

    @event.listens_for(sync, "handle_error")
    def handle_error(context: ExceptionContext) -> None:
        connection = context.connection
        if connection is None or connection.closed or connection.invalidated:
            return
        if (watcher := connection.info.get(_WATCHER)) is not None:
            is_sqlite = connection.dialect.name == "sqlite"
            watcher.failed(still_open=not is_sqlite or _driver(connection).in_transaction)
