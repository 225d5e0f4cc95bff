"""What an order is: its data, its statuses, and the rules that a new one must obey."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

CENT: Final = Decimal("0.01")
MOST: Final = 10_000
"""Pieces of a product in one line."""
FLOAT_NOISE: Final = Decimal("0.000001")
"""A client that adds with floats sends 89.97000000000001; what is nearer than this to a cent means that cent."""


class Status(enum.StrEnum):
    """Where an order is. It only ever moves forward, in this order."""

    PENDING = "pending"
    VALIDATING = "validating"
    PAYMENT_PROCESSING = "payment_processing"
    INVENTORY_CHECK = "inventory_check"
    SHIPPING = "shipping"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def rank(self) -> int:
        """How far along it is: of two reports about one order, the one with the higher rank is the newer."""
        return list(Status).index(self)

    @property
    def is_final(self) -> bool:
        return self in (Status.COMPLETED, Status.FAILED)


FINAL: Final = tuple(status for status in Status if status.is_final)


def _cents(amount: Decimal) -> Decimal:
    """The amount in whole cents, at least one."""
    rounded = amount.quantize(CENT, ROUND_HALF_EVEN)
    if rounded <= 0:
        raise PydanticCustomError("money", "The amount must be greater than 0")
    if abs(amount - rounded) > FLOAT_NOISE:
        raise PydanticCustomError("money", "Money has at most two decimals")
    return rounded


Money = Annotated[Decimal, PlainSerializer(float, when_used="json")]
"""Dollars and cents, exact. In JSON a number, which fifteen digits and the shortest form of a double keep exact."""
Moment = Annotated[datetime, PlainSerializer(datetime.isoformat, when_used="json")]
"""A moment in UTC; in JSON as ISO 8601 with its offset."""
LARGEST: Final = 1_000_000_000_000
Amount = Annotated[Money, Field(le=LARGEST), AfterValidator(_cents)]
"""Money as a customer sends it: a JSON number or text such as "19.99", more than nothing, in whole cents."""


class Product(BaseModel):
    """What the shop sells; stock is how many it starts with."""

    model_config = ConfigDict(frozen=True)

    product_id: str
    name: str
    price: Money
    stock: int = Field(exclude=True)


CATALOGUE: Final[Mapping[str, Product]] = {
    product.product_id: product
    for product in (
        Product(product_id="PROD-001", name="Laptop", price=Decimal("999.99"), stock=100),
        Product(product_id="PROD-002", name="Mouse", price=Decimal("29.99"), stock=50),
        Product(product_id="PROD-003", name="Keyboard", price=Decimal("79.99"), stock=25),
        Product(product_id="PROD-004", name="Monitor", price=Decimal("299.99"), stock=0),
    )
}

_LOCAL = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ADDRESS: Final = re.compile(rf"{_LOCAL}@(?:{_LABEL}\.)+(?:[A-Za-z]{{2,63}}|xn--[A-Za-z0-9-]{{1,59}})")
"""An address as mail systems take it (RFC 5321), without the quoted forms that nobody has."""


def _address(text: str) -> str:
    text = text.strip()
    if len(text) > 254 or len(text.partition("@")[0]) > 64 or not _ADDRESS.fullmatch(text):
        raise PydanticCustomError("email", "Enter a valid e-mail address, such as name@example.com")
    return text


def _known(product_id: str) -> str:
    if product_id not in CATALOGUE:
        raise PydanticCustomError(
            "product", "The shop has no such product; it sells {known}", {"known": ", ".join(CATALOGUE)}
        )
    return product_id


def _whole(quantity: object) -> object:
    if type(quantity) is not int or not 1 <= quantity <= MOST:  # True is an int, and no quantity
        raise PydanticCustomError(
            "quantity", "The quantity must be a whole number from 1 to {most}", {"most": f"{MOST:,}"}
        )
    return quantity


def _printable(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("text", "A name has no control characters")
    return text


def _not_empty(items: list[NewItem]) -> list[NewItem]:
    if not items:
        raise PydanticCustomError("empty", "An order has at least one item")
    return items


class OrderItem(BaseModel):
    """One line of an order: so many of a product, at the price that was agreed."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    product_id: str
    name: str
    quantity: int
    price: Money


class NewItem(OrderItem):
    """A line as a customer sends it."""

    product_id: Annotated[str, AfterValidator(_known)]
    name: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
    quantity: Annotated[int, BeforeValidator(_whole)]
    price: Annotated[Amount, Field(le=1_000_000)]


class NewOrder(BaseModel):
    """What a customer sends. The total may be left out; a wrong one is refused."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    customer_email: Annotated[str, Field(max_length=1_000), AfterValidator(_address)]
    items: Annotated[list[NewItem], Field(max_length=100), AfterValidator(_not_empty)]
    total_amount: Annotated[Amount | None, Field(validate_default=True)] = None

    @field_validator("total_amount")
    @classmethod
    def _adds_up(cls, total: Decimal | None, info: ValidationInfo) -> Decimal | None:
        if "items" not in info.data:
            return total  # the lines have an error of their own
        due = sum((item.price * item.quantity for item in info.data["items"]), Decimal(0))
        if total is None or total == due:
            return due
        raise PydanticCustomError(
            "total", "The total must be {due}: the sum of price times quantity", {"due": str(due)}
        )


class Order(BaseModel):
    """An order as everybody sees it. Only status and updated_at ever change."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    id: str
    customer_email: str
    items: tuple[OrderItem, ...]
    total_amount: Money
    status: Status
    created_at: Moment
    updated_at: Moment


class OrderEvent(BaseModel):
    """One entry of an order's history."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    order_id: str
    event_type: str
    status: Status
    message: str
    timestamp: Moment
    metadata: dict[str, object]
