"""What happens to an order, as events that workers receive and publish."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from conveyor import event
from examples.orders.model import Status


@event(key="order_id")
@dataclass(frozen=True, slots=True)
class OrderCreated:
    """A customer placed an order."""

    order_id: str


@event(key="order_id")
@dataclass(frozen=True, slots=True)
class OrderValidated:
    """The order makes sense as it is written."""

    order_id: str
    amount: Decimal


@event(key="order_id")
@dataclass(frozen=True, slots=True)
class PaymentProcessed:
    """The customer's money is ours."""

    order_id: str
    transaction_id: str
    amount: Decimal


@event(key="order_id")
@dataclass(frozen=True, slots=True)
class InventoryReserved:
    """Every item lies aside for this order."""

    order_id: str


@event(key="order_id")
@dataclass(frozen=True, slots=True)
class InventoryInsufficient:
    """Not every item could be had, so none was taken: the money goes back."""

    order_id: str
    transaction_id: str
    amount: Decimal


@event(key="order_id")
@dataclass(frozen=True, slots=True)
class PaymentRefunded:
    """The customer has the money again."""

    order_id: str
    transaction_id: str
    amount: Decimal


@event(key="order_id")
@dataclass(frozen=True, slots=True)
class ShipmentCreated:
    """The parcel is on its way."""

    order_id: str
    tracking_number: str


@event(key="order_id")
@dataclass(frozen=True, slots=True)
class OrderCompleted:
    """The order has reached its end as it should."""

    order_id: str


@event(key="order_id")
@dataclass(frozen=True, slots=True)
class OrderFailed:
    """The order has ended, and the customer gets nothing."""

    order_id: str
    reason: str


@event(key="order_id")
@dataclass(frozen=True, slots=True)
class OrderChanged:
    """An order has a new status: what a page that shows it needs to know."""

    order_id: str
    status: Status
    updated_at: datetime
