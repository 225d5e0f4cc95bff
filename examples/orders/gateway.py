"""A payment gateway, simulated: it keeps books of its own, and knows a repeated request by its idempotency key.

A real one is a service elsewhere. Here its books are two tables beside those of the shop, in transactions of their own:
as with a real one, money moves when the gateway says so, not when the shop commits.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime
from decimal import Decimal

from sqlalchemy import String
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column

from conveyor import Conveyor
from examples.orders.tables import Base


class Entry:
    """One movement of money in the gateway's books."""

    idempotency_key: Mapped[str] = mapped_column(String(64), primary_key=True)
    order_id: Mapped[str] = mapped_column(String(36), index=True)
    transaction_id: Mapped[str] = mapped_column(String(50))
    amount: Mapped[Decimal]
    created_at: Mapped[datetime]


class ChargeRow(Entry, Base):
    """Money taken."""

    __tablename__ = "charges"


class RefundRow(Entry, Base):
    """Money given back."""

    __tablename__ = "refunds"


class PaymentDeclined(Exception):
    """The customer's bank said no."""


class Gateway:
    """The gateway as its client sees it.

    Parameters:
        app: whose database holds the books.
        decline_rate: share of charges that are declined. The order seeds the chance: a repeat gets the same answer.
    """

    def __init__(self, app: Conveyor, decline_rate: float) -> None:
        self._app = app
        self._decline_rate = decline_rate

    async def charge(self, order_id: str, amount: Decimal, *, idempotency_key: str) -> str:
        """Take money, once for a key; gives the transaction's id.

        Raises:
            PaymentDeclined: nothing was taken.
        """
        if random.Random(order_id).random() < self._decline_rate:
            raise PaymentDeclined
        transaction_id = f"TXN-{order_id[:8]}"
        await self._enter(ChargeRow, idempotency_key, order_id, transaction_id, amount)
        return transaction_id

    async def refund(self, order_id: str, transaction_id: str, amount: Decimal, *, idempotency_key: str) -> None:
        """Give money back, once for a key."""
        await self._enter(RefundRow, idempotency_key, order_id, transaction_id, amount)

    async def _enter(
        self, book: type[ChargeRow | RefundRow], key: str, order_id: str, transaction_id: str, amount: Decimal
    ) -> None:
        entry = book(
            idempotency_key=key,
            order_id=order_id,
            transaction_id=transaction_id,
            amount=amount,
            created_at=datetime.now(UTC),
        )
        try:
            async with self._app.transaction() as tx:
                if await tx.session.get(book, key) is None:
                    tx.session.add(entry)
                    await tx.session.flush()
        except IntegrityError:
            pass  # a repeat was faster: its entry is this entry
