"""What was done for which order, noted so that no crash and no repeat lets anything be sent twice.

Before a call to another service it is noted as being sent, afterwards as sent. Whoever finds something being sent for longer
than a call can take knows that its process died, or lost the answer, and that nobody can tell whether the other side did it.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from sqlalchemy import BigInteger, Float, String, Text, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from conveyor import Conveyor
from examples.order_processor.calls import AtWork, NotDone, Refused, Unclear
from examples.order_processor.order import Order

log = logging.getLogger("order-processor")

SETUP_LOCK: Final = 0x0D_2D
"""Names, on a PostgreSQL server, the advisory lock of whoever sets up the tables."""
SETTLING_SECONDS: Final = 1.0
"""After its longest time a call's end may need so long to be noted, and half of its longest time on a busy machine."""


class State(enum.StrEnum):
    """How far the sending of one thing is."""

    SENDING = "sending"
    SENT = "sent"
    NOT_SENT = "not sent"
    UNKNOWN = "unknown"


class Step(enum.Enum):
    """What to do about a thing that has to be sent."""

    SEND = enum.auto()
    SKIP = enum.auto()
    WAIT = enum.auto()
    GIVE_UP = enum.auto()


def decide(state: State, age_seconds: float, *, longest_seconds: float, repeatable: bool) -> Step:
    """What to do about a thing that has to be sent at most once.

    Parameters:
        state: what is noted about it.
        age_seconds: since when.
        longest_seconds: no attempt that is alive takes longer.
        repeatable: the other side knows a repeat, so that it is harmless.
    """
    match state:
        case State.NOT_SENT:
            return Step.SEND
        case State.SENT:
            return Step.SKIP
        case State.SENDING if age_seconds < longest_seconds:
            return Step.WAIT
        case _:
            return Step.SEND if repeatable else Step.GIVE_UP


class Base(DeclarativeBase):
    """The tables of this service."""


class OrderRow(Base):
    """An order that has been seen."""

    __tablename__ = "orders"

    order_id: Mapped[str] = mapped_column(String(200), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    seen: Mapped[float] = mapped_column(Float(53))
    fulfilled: Mapped[float | None] = mapped_column(Float(53))


class SentRow(Base):
    """Something that is sent once for an order."""

    __tablename__ = "sent"

    order_id: Mapped[str] = mapped_column(String(200), primary_key=True)
    what: Mapped[str] = mapped_column(String(50), primary_key=True)
    state: Mapped[str] = mapped_column(String(10), index=True)
    since: Mapped[float] = mapped_column(Float(53))
    attempt: Mapped[int] = mapped_column(BigInteger)
    said: Mapped[str] = mapped_column(Text)


class Known(enum.Enum):
    """What is known about an order that arrives."""

    NEW = enum.auto()
    BEGUN = enum.auto()
    FULFILLED = enum.auto()
    ANOTHER = enum.auto()
    """An order of this id was seen, and it was another one."""


class Records:
    """The tables, in the application's database.

    Parameters:
        app: whose database it is.
        longest_seconds: how long a call to another service may take.
    """

    def __init__(self, app: Conveyor, *, longest_seconds: float) -> None:
        self._app = app
        self._longest_seconds: Final = longest_seconds

    async def create(self) -> None:
        """Create the tables where they are missing; any number of processes may do so at once."""
        async with self._app.transaction() as tx:
            connection = await tx.session.connection()
            if connection.dialect.name == "postgresql":  # SQLite has one writer at a time anyway
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": SETUP_LOCK})
            await connection.run_sync(Base.metadata.create_all)

    async def begin(self, order: Order) -> Known:
        """Note that an order has arrived; what was known about it."""
        try:
            async with self._app.transaction() as tx:
                row = await tx.session.get(OrderRow, order.order_id)
                if row is None:
                    tx.session.add(
                        OrderRow(
                            order_id=order.order_id, fingerprint=order.fingerprint, seen=time.time(), fulfilled=None
                        )
                    )
                    await tx.session.flush()
                    return Known.NEW
        except IntegrityError:
            return await self.begin(order)  # somebody else has it as well, and was faster
        if row.fingerprint != order.fingerprint:
            return Known.ANOTHER
        return Known.BEGUN if row.fulfilled is None else Known.FULFILLED

    async def finish(self, order: Order) -> None:
        """Note that everything was done for an order."""
        async with self._app.transaction() as tx:
            await tx.session.execute(
                update(OrderRow).where(OrderRow.order_id == order.order_id).values(fulfilled=time.time())
            )

    async def send_once(
        self, order: Order, what: str, send: Callable[[Order], Awaitable[None]], *, repeatable: bool
    ) -> None:
        """Send something for an order, at most once.

        Parameters:
            what: names it among the things that are sent for an order.
            send: sends it.
            repeatable: the other side knows a repeat, so that what may have been sent is sent again.

        Raises:
            AtWork: another attempt is sending it.
            NotDone: it was not sent, and may be tried again later.
            Refused: it was not sent, and cannot be.
            Unclear: it may have been sent: by this attempt, or by one whose process died.
        """
        step, attempt = await self._claim(order, what, repeatable=repeatable)
        if step is Step.SKIP:
            log.info("order %s: the %s was sent before; not again", order.order_id, what)
        if step is Step.WAIT:
            raise AtWork(f"the {what} is being sent for another copy of it", after_seconds=self._wait_seconds)
        if step is Step.GIVE_UP:
            raise _unclear(order, what, "the process that sent it died, or lost the answer")
        if step is Step.SEND:
            await self._send(order, what, attempt, send, repeatable=repeatable)

    async def unclear(self) -> list[tuple[str, str, str]]:
        """What may have been sent, oldest first: order, what, and why nobody knows."""
        async with self._app.transaction() as tx:
            rows = await tx.session.scalars(
                select(SentRow).where(SentRow.state == State.UNKNOWN).order_by(SentRow.since)
            )
            return [(row.order_id, row.what, row.said) for row in rows]

    async def settle(self, order_id: str, what: str, *, sent: bool) -> bool:
        """Note what somebody found out about a thing that may have been sent; False where there is no doubt about it."""
        async with self._app.transaction() as tx:
            row = await tx.session.get(SentRow, (order_id, what), with_for_update=True)
            if row is None or row.state != State.UNKNOWN:
                return False
            row.state, row.since, row.said = State.SENT if sent else State.NOT_SENT, time.time(), "said the operator"
            return True

    async def _send(
        self, order: Order, what: str, attempt: int, send: Callable[[Order], Awaitable[None]], *, repeatable: bool
    ) -> None:
        try:
            async with asyncio.timeout(self._longest_seconds):
                await send(order)
        except (NotDone, Refused) as error:
            await self._note(order, what, attempt, State.NOT_SENT, str(error))
            raise
        except (Unclear, TimeoutError) as error:
            said = str(error) or f"no end after {self._longest_seconds:g} s"
            await self._note(order, what, attempt, State.NOT_SENT if repeatable else State.UNKNOWN, said)
            if repeatable:
                raise NotDone(said, after_seconds=getattr(error, "after_seconds", None)) from error
            raise _unclear(order, what, said) from error
        await self._note(order, what, attempt, State.SENT, "")

    @property
    def _wait_seconds(self) -> float:
        return 1.5 * self._longest_seconds + SETTLING_SECONDS

    async def _claim(self, order: Order, what: str, *, repeatable: bool) -> tuple[Step, int]:
        """Decide, and note it where it is to be sent: of several processes, one sends. Gives the number of the attempt, too."""
        now = time.time()
        try:
            async with self._app.transaction() as tx:
                row = await tx.session.get(SentRow, (order.order_id, what), with_for_update=True)
                if row is None:
                    row = SentRow(
                        order_id=order.order_id, what=what, state=State.NOT_SENT, since=now, attempt=0, said=""
                    )
                    tx.session.add(row)
                step = decide(
                    State(row.state), now - row.since, longest_seconds=self._wait_seconds, repeatable=repeatable
                )
                if step is Step.SEND:
                    row.state, row.since, row.attempt, row.said = State.SENDING, now, row.attempt + 1, ""
                elif step is Step.GIVE_UP and row.state != State.UNKNOWN:
                    row.state, row.since, row.said = State.UNKNOWN, now, "its process died, or lost the answer"
                await tx.session.flush()
                return step, row.attempt
        except IntegrityError:
            return await self._claim(order, what, repeatable=repeatable)  # somebody else was faster

    async def _note(self, order: Order, what: str, attempt: int, state: State, said: str) -> None:
        async with self._app.transaction() as tx:
            row = await tx.session.get(SentRow, (order.order_id, what), with_for_update=True)
            if row is None or row.state == State.SENT:
                return
            # A process that stood still for long may come late: what it did counts, what it did not do says nothing any more.
            if state is State.SENT or row.attempt == attempt:
                row.state, row.since, row.said = state, time.time(), said


def _unclear(order: Order, what: str, why: str) -> Unclear:
    log.error(
        "order %s: nobody can tell whether the %s was sent, so it is not sent again: %s", order.order_id, what, why
    )
    return Unclear(
        f"the {what} may have been sent ({why}); find out, say it with "
        f"`python -m examples.order_processor.unclear {order.order_id} {what} sent` (or not-sent), and redrive"
    )
