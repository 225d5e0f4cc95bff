"""The shop's tables, and what the web process reads from them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, ClassVar, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    func,
    select,
    text,
    tuple_,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from conveyor import Conveyor
from examples.orders.model import CATALOGUE, FINAL, Order, OrderEvent, OrderItem, Status

SETUP_LOCK: Final = 0x5_40_9
"""Names, on a PostgreSQL server, the advisory lock of whoever sets up the tables."""


class Cents(TypeDecorator[Decimal]):
    """Money as whole cents: exact on every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, _dialect: Dialect) -> int | None:
        return None if value is None else int(value.scaleb(2))

    def process_result_value(self, value: Any, _dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value).scaleb(-2)


class Moment(TypeDecorator[datetime]):
    """A moment in UTC, also on databases that know no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Lines(TypeDecorator[tuple[OrderItem, ...]]):
    """The lines of an order, kept as they were agreed."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Sequence[OrderItem] | None, _dialect: Dialect) -> Any:
        return [{**line.model_dump(), "price": str(line.price)} for line in value or ()]

    def process_result_value(self, value: Any, _dialect: Dialect) -> tuple[OrderItem, ...]:
        return tuple(OrderItem.model_validate(line) for line in value)


class Base(DeclarativeBase):
    """The shop's tables."""

    type_annotation_map: ClassVar = {
        datetime: Moment,
        Decimal: Cents,
        Status: Enum(
            Status, native_enum=False, length=20, values_callable=lambda kind: [status.value for status in kind]
        ),
    }


class OrderRow(Base):
    """An order."""

    __tablename__ = "orders"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    customer_email: Mapped[str] = mapped_column(String(254))
    items: Mapped[tuple[OrderItem, ...]] = mapped_column(Lines)
    total_amount: Mapped[Decimal]
    status: Mapped[Status] = mapped_column(index=True)
    created_at: Mapped[datetime] = mapped_column(index=True)
    updated_at: Mapped[datetime]
    idempotency_key: Mapped[str | None] = mapped_column(String(200), unique=True)
    fingerprint: Mapped[str | None] = mapped_column(String(64))
    """Tells whether a repeat with the same idempotency key asks for the same order."""


class EventRow(Base):
    """One entry of an order's history; each kind of event happens to an order once."""

    __tablename__ = "order_events"
    __table_args__ = (UniqueConstraint("order_id", "event_type"),)

    number: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str] = mapped_column(ForeignKey("orders.id"))
    event_type: Mapped[str] = mapped_column(String(50))
    status: Mapped[Status]
    message: Mapped[str] = mapped_column(Text)
    timestamp: Mapped[datetime]
    details: Mapped[dict[str, Any]] = mapped_column("metadata", JSON)


class StockRow(Base):
    """How many of a product are left."""

    __tablename__ = "stock"
    __table_args__ = (CheckConstraint("quantity >= 0"),)

    product_id: Mapped[str] = mapped_column(String(50), primary_key=True)
    quantity: Mapped[int]


class ShipmentRow(Base):
    """A parcel: one for an order."""

    __tablename__ = "shipments"

    order_id: Mapped[str] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    tracking_number: Mapped[str] = mapped_column(String(50))
    created_at: Mapped[datetime]


async def create_tables(app: Conveyor) -> None:
    """Create what is missing, and put the first stock on the shelves; any number of processes may do so at once."""
    async with app.transaction() as tx:
        connection = await tx.session.connection()
        if connection.dialect.name == "postgresql":  # SQLite has one writer at a time anyway
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": SETUP_LOCK})
        await connection.run_sync(Base.metadata.create_all)
        there = set(await tx.session.scalars(select(StockRow.product_id)))
        missing = [product for product in CATALOGUE.values() if product.product_id not in there]
        tx.session.add_all(StockRow(product_id=product.product_id, quantity=product.stock) for product in missing)


async def read_order(session: AsyncSession, order_id: str) -> Order | None:
    """An order as it is now."""
    row = await session.get(OrderRow, order_id)
    return None if row is None else Order.model_validate(row)


async def read_history(session: AsyncSession, order_id: str) -> list[OrderEvent]:
    """What happened to an order, oldest first."""
    rows = await session.scalars(select(EventRow).where(EventRow.order_id == order_id).order_by(EventRow.number))
    return [
        OrderEvent(
            order_id=row.order_id,
            event_type=row.event_type,
            status=row.status,
            message=row.message,
            timestamp=row.timestamp,
            metadata=row.details,
        )
        for row in rows
    ]


async def read_recent(session: AsyncSession, limit: int, before: str | None) -> list[Order]:
    """A page of orders, newest first: those placed before a given one."""
    newest_first = (OrderRow.created_at.desc(), OrderRow.id.desc())
    page = select(OrderRow).order_by(*newest_first).limit(limit)
    if before is not None:
        mark = await session.get(OrderRow, before)
        if mark is None:
            return []
        page = page.where(tuple_(OrderRow.created_at, OrderRow.id) < (mark.created_at, mark.id))
    return [Order.model_validate(row) for row in await session.scalars(page)]


async def count_active(session: AsyncSession) -> int:
    """How many orders have not come to their end."""
    return await session.scalar(select(func.count()).where(OrderRow.status.not_in(FINAL))) or 0
