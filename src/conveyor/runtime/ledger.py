"""The ledger: inbox and outbox in the application's own database, in the very transaction of its own writes.

A handler's transaction notes its message as handled (inbox), holds the handler's writes, and what it publishes (outbox): all of it
happens, or none of it. Who repeats the message finds it in the inbox and is unwound. Rows of the outbox are deleted once the
broker owns their messages; which of them may be sent now, and by whom, is decided here, the sending is done by the relay.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from conveyor.broker import Clock
from conveyor.core.message import Message
from conveyor.errors import ConfigurationError, LedgerError
from conveyor.runtime.database import Database, create_private
from conveyor.runtime.outbox import (
    MIGRATIONS,
    Claimed,
    Outgoing,
    Pending,
    Row,
    Statements,
    check_same,
    chunks,
    once,
    row_of,
    steady,
    values_of,
)
from conveyor.runtime.points import point
from conveyor.runtime.transaction import Make, Transaction, Work

# After database, which says what to install where SQLAlchemy is missing.
# isort: split
from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

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
        self._sql = Statements(prefix, now)

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
        work = Work(self, worker, (ids,) if isinstance(ids, str) else tuple(ids))
        tx = Transaction(work, make)
        point("transaction.opening")
        work.begin()
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
            return [row_of(found) for found in await connection.execute(self._sql["parked"], values)]

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
            rows = [row_of(found) for found in await connection.execute(self._sql["claim"], values)]
        return Claimed(tuple(sorted(rows, key=lambda row: row.seq)), until)

    async def sent(self, seqs: Sequence[int]) -> None:
        """The broker owns these messages: delete their rows, as far as this process still claims them."""
        for some in chunks(seqs):
            await self._change("sent", me=self.owner, seqs=some)

    async def release(self, seqs: Sequence[int]) -> None:
        """Leave these rows to anybody's relay at once."""
        for some in chunks(seqs):
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

    def write_outbox(self, connection: Connection, outgoing: Sequence[Outgoing]) -> Claimed:
        """Insert outbox rows; those that may go at once are claimed for this process, which hands them off after COMMIT."""
        if not outgoing:
            return Claimed()
        outgoing = once(outgoing)
        keys = sorted({each.message.key for each in outgoing if each.message.key is not None})
        waiting: set[str] = set()
        if keys and self.database.dialect == "postgresql":
            connection.execute(self._sql["lock_keys"], {"app": self.app, "key_array": keys})
        for some in chunks(keys):
            waiting.update(connection.execute(self._sql["older"], {"app": self.app, "keys": some}).scalars())
        direct = [self.hands_off and each.message.key not in waiting for each in outgoing]
        until = steady() + HAND_OFF_SECONDS
        rows: list[Row] = []
        for chunk in chunks(list(zip(outgoing, direct, strict=True))):
            values = self._with_now(app=self.app)
            for i, (each, claims) in enumerate(chunk):
                values |= values_of(each, i)
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
            check_same(message, stored)

    def _with_now(self, **values: object) -> dict[str, object]:
        if not self._server_clock:
            values["now"] = self._clock()
        return values

    async def _change(self, statement: str, **values: object) -> int:
        async with self.database.writing() as connection:
            return (await connection.execute(self._sql[statement], values)).rowcount
