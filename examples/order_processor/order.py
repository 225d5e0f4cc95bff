"""An order as the payment service sends it, and everything that can be wrong with one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Final, Literal

import msgspec

from conveyor import event

PAISA: Final = Decimal("0.01")
LARGEST: Final = Decimal(1_000_000_000)
"""Rupees; a larger amount is somebody's mistake."""
MOST: Final = 10_000
"""Pieces in one line."""
LONGEST_ORDER: Final = 500
"""Lines."""
LONGEST_TEXT: Final = 200
"""Characters of an id or a name."""
CLOCKS_APART: Final = timedelta(hours=1)
"""How far the payment service's clock may be ahead of this one."""

Moment = Annotated[datetime, msgspec.Meta(tz=True)]
"""A moment with its offset from UTC, as RFC 3339 has it."""


class Item(msgspec.Struct, frozen=True):
    """One line of an order: so many of a product, each at this price."""

    sku: str
    name: str
    price: Decimal
    quantity: int


@event("order-processing", key="order_id")
class Order(msgspec.Struct, frozen=True, rename="camel"):
    """A paid order. Amounts are rupees, exact to the paisa; a currency may be named, and is no other one."""

    order_id: str
    session_id: str
    user_id: str
    items: tuple[Item, ...]
    total: Decimal
    timestamp: Moment
    payment_id: str
    currency: Literal["INR", "₹"] = "INR"

    @property
    def fingerprint(self) -> str:
        """The same for the same order, however its JSON is written."""
        lines = [[item.sku, item.name, rupees(item.price), item.quantity] for item in self.items]
        facts = [self.session_id, self.user_id, self.payment_id, rupees(self.total), lines]
        return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()


def problems(order: Order, now: datetime) -> list[str]:
    """What is wrong with an order that has the right shape, each with its place; empty where all is well."""
    return [*_problems(order, now)]


def _problems(order: Order, now: datetime) -> Iterator[str]:
    ids = {"orderId": order.order_id, "sessionId": order.session_id, "userId": order.user_id}
    for name, text in {**ids, "paymentId": order.payment_id}.items():
        yield from _wrong_text(name, text, spaces=False)
    if not order.items:
        yield "items: an order has at least one"
    if len(order.items) > LONGEST_ORDER:
        yield f"items: {len(order.items)} are more than the {LONGEST_ORDER} that an order may have"
        return
    for number, item in enumerate(order.items):
        place = f"items[{number}]"
        yield from _wrong_text(f"{place}.sku", item.sku, spaces=True)
        yield from _wrong_text(f"{place}.name", item.name, spaces=True)
        yield from _wrong_amount(f"{place}.price", item.price)
        if not 1 <= item.quantity <= MOST:
            yield f"{place}.quantity: {_short(item.quantity)} is not between 1 and {MOST}"
    amounts = [order.total, *(item.price for item in order.items)]
    wrong_total = [*_wrong_amount("total", order.total)]
    yield from wrong_total
    if order.items and all(_is_amount(amount) for amount in amounts):
        due = sum((item.price * item.quantity for item in order.items), Decimal(0))
        if due != order.total:
            yield f"total: {rupees(order.total)} is not the sum of price x quantity, which is {rupees(due)}"
    if order.timestamp > now + CLOCKS_APART:
        yield f"timestamp: {order.timestamp.isoformat()} is in the future"


def _wrong_text(place: str, text: str, *, spaces: bool) -> Iterator[str]:
    if not text or text != text.strip():
        yield f"{place}: it is empty, or begins or ends with a space"
    elif len(text) > LONGEST_TEXT:
        yield f"{place}: it has {len(text)} characters, more than {LONGEST_TEXT}"
    elif not text.isprintable() or (" " in text and not spaces):
        yield f"{place}: it holds a {'character that cannot be printed' if spaces else 'space or control character'}"


def _wrong_amount(place: str, amount: Decimal) -> Iterator[str]:
    if not _is_amount(amount):
        yield f"{place}: {_short(amount)} is no amount; it is above ₹0, at most ₹{LARGEST}, and exact to the paisa"


def _is_amount(amount: Decimal) -> bool:
    return 0 < amount <= LARGEST and amount == amount.quantize(PAISA)


def _short(number: int | Decimal) -> str:
    text = str(number)
    return text if len(text) <= 30 else text[:29] + "…"


def rupees(amount: Decimal) -> str:
    """An amount for people: ₹1999, ₹19.50."""
    whole = amount == amount.to_integral_value()
    return f"₹{amount:.0f}" if whole else f"₹{amount:.2f}"


def described(order: Order) -> str:
    """An order for the log: what it is in the first line, then a line for each item."""
    lines = [f"order {order.order_id} of user {order.user_id}: total {rupees(order.total)}"]
    for item in order.items:
        line = f"{item.name} x {item.quantity} = {rupees(item.price)}"
        if item.quantity > 1:
            line += f" each, {rupees(item.price * item.quantity)} together"
        lines.append(line)
    return "\n".join(lines)
