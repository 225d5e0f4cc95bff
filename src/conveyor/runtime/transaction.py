"""A transaction of the application's database: its session, what it publishes, and whether it still may be committed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from conveyor.core.message import Message
from conveyor.core.settle import describe
from conveyor.errors import AlreadyHandled, LedgerError, LedgerUnavailable
from conveyor.runtime.database import watch
from conveyor.runtime.outbox import Claimed, Outgoing
from conveyor.runtime.points import point

# After database, which says what to install where SQLAlchemy is missing.
# isort: split
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

if TYPE_CHECKING:
    from conveyor.runtime.ledger import Ledger

Make = Callable[..., Message]
"""Makes the message for an event and its publish options."""

_around: ContextVar[Work | None] = ContextVar("conveyor_transaction", default=None)
"""The transaction whose block the running code is in."""


class _Session(Session):
    """The session of a transaction: begins with the inbox, and leaves COMMIT to the transaction's end."""

    def __init__(self, *arguments: Any, work: Work, **options: Any) -> None:
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


class Work:
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
        self._outgoing: list[Outgoing] = []
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

    def add(self, outgoing: Iterable[Outgoing]) -> None:
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

    def begin(self) -> None:
        """The block begins."""
        _around.set(self)

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

    def __init__(self, work: Work, make: Make | None) -> None:
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
        self._work.add(Outgoing(message, require_subscriber) for message in messages)
