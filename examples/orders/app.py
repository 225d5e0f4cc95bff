"""The shop's workers: what happens to an order from its creation to its end.

    order_created → [validation] → order_validated → [payment] → payment_processed
      → [inventory] → inventory_reserved → [shipping] → shipment_created, order_completed
    [inventory] → inventory_insufficient → [refund] → payment_refunded, order_failed
    [validation], [payment] → order_failed

Each worker does its (simulated) work first and touches the transaction after it: the order's row, its history and the
next event are one atomic step, and no lock is held while the work goes on.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from datetime import UTC, datetime
from typing import Final

from pydantic import ValidationError
from sqlalchemy import update

from conveyor import Context, Conveyor, Reject, RetryPolicy, Transaction
from examples.orders.events import (
    InventoryInsufficient,
    InventoryReserved,
    OrderChanged,
    OrderCompleted,
    OrderCreated,
    OrderFailed,
    OrderValidated,
    PaymentProcessed,
    PaymentRefunded,
    ShipmentCreated,
)
from examples.orders.gateway import Gateway, PaymentDeclined
from examples.orders.model import NewOrder, OrderItem, Status
from examples.orders.settings import Seconds, Settings
from examples.orders.tables import EventRow, OrderRow, ShipmentRow, StockRow

STEADFAST: Final = RetryPolicy(attempts=20, initial=0.2, maximum=60.0, crashes=20)
"""A customer waits at the other end: neither an outage of minutes nor a series of crashes may end an order."""
AT_ONCE: Final = 20
"""Orders that one process works on at the same time, at each step."""

settings = Settings.from_environment()
app = Conveyor("shop", broker=settings.broker, database=settings.database, migrate=True)
gateway = Gateway(app, settings.decline_rate)


@app.worker(retry=STEADFAST, concurrency=AT_ONCE, lease=settings.lease)
async def validation(created: OrderCreated, tx: Transaction) -> OrderValidated | OrderFailed:
    """Check the order once more, whoever wrote it down."""
    await work(created.order_id, Status.VALIDATING, settings.validation)
    order = await load(tx, created.order_id)
    try:
        NewOrder.model_validate(order)
    except ValidationError as error:
        return await fail(tx, order, f"Invalid order: {error.errors()[0]['msg']}")
    await record(tx, order, "order_validated", "Order validated")
    return OrderValidated(order.id, order.total_amount)


@app.worker(retry=STEADFAST, concurrency=AT_ONCE, lease=settings.lease)
async def payment(validated: OrderValidated, tx: Transaction, context: Context) -> PaymentProcessed | OrderFailed:
    """Charge the customer, once."""
    order_id, amount = validated.order_id, validated.amount
    await work(order_id, Status.PAYMENT_PROCESSING, settings.payment)
    try:
        transaction_id = await gateway.charge(order_id, amount, idempotency_key=context.idempotency_key)
    except PaymentDeclined:
        return await fail(tx, await load(tx, order_id), "Payment declined")
    order = await load(tx, order_id)
    await record(tx, order, "payment_processed", "Payment accepted", transaction_id=transaction_id, amount=str(amount))
    return PaymentProcessed(order_id, transaction_id, amount)


@app.worker(retry=STEADFAST, concurrency=AT_ONCE, lease=settings.lease)
async def inventory(paid: PaymentProcessed, tx: Transaction) -> InventoryReserved | InventoryInsufficient:
    """Reserve every item of the order, or none."""
    await work(paid.order_id, Status.INVENTORY_CHECK, settings.inventory)
    order = await load(tx, paid.order_id)
    if not await reserve(tx, order.items):
        return InventoryInsufficient(paid.order_id, paid.transaction_id, paid.amount)
    await record(tx, order, "inventory_reserved", "Items reserved")
    return InventoryReserved(order.id)


@app.worker(retry=STEADFAST, concurrency=AT_ONCE, lease=settings.lease)
async def shipping(reserved: InventoryReserved, tx: Transaction) -> list[ShipmentCreated | OrderCompleted]:
    """Send the parcel, and complete the order."""
    await work(reserved.order_id, Status.SHIPPING, settings.shipping)
    order = await load(tx, reserved.order_id)
    tracking_number = f"SHIP-{order.id[:8]}"
    tx.session.add(ShipmentRow(order_id=order.id, tracking_number=tracking_number, created_at=datetime.now(UTC)))
    await record(tx, order, "shipment_created", "Shipment created", tracking_number=tracking_number)
    await move(tx, order, Status.COMPLETED)
    await record(tx, order, "order_completed", "Order completed")
    return [ShipmentCreated(order.id, tracking_number), OrderCompleted(order.id)]


@app.worker(retry=STEADFAST, concurrency=AT_ONCE, lease=settings.lease)
async def refund(
    missing: InventoryInsufficient, tx: Transaction, context: Context
) -> list[PaymentRefunded | OrderFailed]:
    """Make up for a payment that nothing can be sent for; the order fails when the money is back."""
    order_id, transaction_id, amount = missing.order_id, missing.transaction_id, missing.amount
    await gateway.refund(order_id, transaction_id, amount, idempotency_key=context.idempotency_key)
    order = await load(tx, order_id)
    await record(tx, order, "payment_refunded", "Payment refunded", transaction_id=transaction_id, amount=str(amount))
    return [PaymentRefunded(order_id, transaction_id, amount), await fail(tx, order, "Insufficient inventory")]


async def work(order_id: str, status: Status, span: Seconds) -> None:
    """Show that a step of the order has begun, and take the time that it takes."""
    async with app.transaction() as tx:
        order = await load(tx, order_id)
        if order.status.rank < status.rank:
            await move(tx, order, status)
    await asyncio.sleep(random.uniform(span.least, span.most))


async def load(tx: Transaction, order_id: str) -> OrderRow:
    """The order's row, locked until the transaction ends."""
    order = await tx.session.get(OrderRow, order_id, with_for_update=True)
    if order is None:
        raise Reject(f"there is no order {order_id}")
    return order


async def reserve(tx: Transaction, items: tuple[OrderItem, ...]) -> bool:
    """Take all the items out of stock; takes nothing, and says False, where one is missing.

    Products are taken in the order of their ids, so that two orders never wait for each other in a circle.
    """
    wanted: Counter[str] = Counter()
    for item in items:
        wanted[item.product_id] += item.quantity
    attempt = await tx.session.begin_nested()
    for product_id, quantity in sorted(wanted.items()):
        taken = await tx.session.execute(
            update(StockRow)
            .where(StockRow.product_id == product_id, StockRow.quantity >= quantity)
            .values(quantity=StockRow.quantity - quantity)
            .returning(StockRow.product_id)
        )
        if taken.first() is None:
            await attempt.rollback()
            return False
    await attempt.commit()
    return True


async def record(tx: Transaction, order: OrderRow, event_type: str, message: str, **details: str) -> None:
    """Write an entry into the order's history."""
    tx.session.add(
        EventRow(
            order_id=order.id,
            event_type=event_type,
            status=order.status,
            message=message,
            timestamp=datetime.now(UTC),
            details=details,
        )
    )
    await tx.session.flush()  # entries are numbered in the order in which they were written


async def move(tx: Transaction, order: OrderRow, status: Status) -> None:
    """Give the order its next status, and tell everybody who watches."""
    order.status, order.updated_at = status, datetime.now(UTC)
    await tx.publish(OrderChanged(order.id, order.status, order.updated_at))


async def fail(tx: Transaction, order: OrderRow, reason: str) -> OrderFailed:
    """End the order without success."""
    await move(tx, order, Status.FAILED)
    await record(tx, order, "order_failed", reason)
    return OrderFailed(order.id, reason)
