"""What an order may be: everything that is wrong with one is named, with its place."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.order_processor.order import LARGEST, Order, described, problems, rupees
from tests.examples.order_processor.conftest import GIVEN, paid

NOW = datetime(2026, 11, 22, tzinfo=UTC)


def decoded(order: dict[str, Any]) -> Order:
    return msgspec.json.decode(json.dumps(order), type=Order)


def wrong(**changes: Any) -> str:
    return "; ".join(problems(decoded(paid(**changes)), NOW))


def line(**changes: object) -> list[dict[str, Any]]:
    return [{**GIVEN["items"][0], **changes}]


def test_the_documented_message_is_an_order_without_problems() -> None:
    order = decoded(GIVEN)
    assert order.order_id == "ORD-1702554000123"
    assert order.items[0].price == Decimal(1999)
    assert order.timestamp == datetime(2024, 12, 14, 10, tzinfo=UTC)
    assert problems(order, NOW) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"orderId": ""}, "orderId: it is empty, or begins or ends with a space"),
        ({"userId": " u"}, "userId: it is empty, or begins or ends with a space"),
        ({"paymentId": "p" * 201}, "paymentId: it has 201 characters, more than 200"),
        ({"sessionId": "a b"}, "sessionId: it holds a space"),
        ({"orderId": "ORD-1\nINFO all is well"}, "orderId: it holds a space or control character"),
        ({"items": []}, "items: an order has at least one"),
        ({"items": line() * 501}, "items: 501 are more than the 500"),
        ({"items": line(name="")}, "items[0].name: it is empty"),
        ({"items": line(sku="a\x1bb")}, "items[0].sku: it holds a character that cannot be printed"),
        ({"items": line(quantity=0), "total": 0.5}, "items[0].quantity: 0 is not between 1 and 10000"),
        ({"items": line(quantity=-3)}, "items[0].quantity: -3 is not between 1 and 10000"),
        ({"items": line(quantity=10**40)}, "items[0].quantity: 10000000000000000000000000000…"),
        ({"items": line(price=0)}, "items[0].price: 0 is no amount; it is above ₹0"),
        ({"items": line(price=-1999)}, "items[0].price: -1999 is no amount"),
        (
            {"items": line(price=19.999)},
            "items[0].price: 19.999 is no amount; it is above ₹0, at most ₹1000000000, and exact to the paisa",
        ),
        ({"total": 2000}, "total: ₹2000 is not the sum of price x quantity, which is ₹1999"),
        ({"total": 0}, "total: 0 is no amount"),
        ({"items": line(quantity=2)}, "total: ₹1999 is not the sum of price x quantity, which is ₹3998"),
        ({"items": line() + line(price=0.5)}, "total: ₹1999 is not the sum of price x quantity, which is ₹1999.50"),
        ({"timestamp": "2026-11-22T01:00:01Z"}, "timestamp: 2026-11-22T01:00:01+00:00 is in the future"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(changes: dict[str, Any], said: str) -> None:
    assert said in wrong(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total": "much"}, "Invalid decimal string - at `$.total`"),
        ({"total": None}, "Expected `decimal`, got `null` - at `$.total`"),
        ({"total": True}, "Expected `decimal`, got `bool` - at `$.total`"),
        ({"items": line(quantity="2")}, "Expected `int`, got `str` - at `$.items[0].quantity`"),
        ({"items": line(quantity=1.5)}, "Expected `int`, got `float` - at `$.items[0].quantity`"),
        ({"items": {}}, "Expected `array`, got `object` - at `$.items`"),
        ({"timestamp": "yesterday"}, "Invalid RFC3339 encoded datetime - at `$.timestamp`"),
        ({"timestamp": "2024-12-14T10:00:00"}, "Expected `datetime` with a timezone component - at `$.timestamp`"),
        ({"timestamp": 1702554000}, "Expected `datetime`, got `int` - at `$.timestamp`"),
        ({"currency": "USD"}, "Invalid enum value 'USD' - at `$.currency`"),
    ],
)
def test_another_shape_is_no_order(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(msgspec.ValidationError) as refused:
        decoded(paid(**changes))
    assert said in str(refused.value)


@pytest.mark.parametrize("field", GIVEN)
def test_every_field_is_needed(field: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"missing required field `{field}`"):
        decoded({name: value for name, value in GIVEN.items() if name != field})


def test_what_the_payment_service_adds_one_day_is_no_problem() -> None:
    assert wrong(coupon="DIWALI", currency="INR") == ""


def test_all_problems_are_named_at_once() -> None:
    assert wrong(orderId="", items=line(quantity=0), total=-1).count(";") >= 2


amounts = st.decimals(min_value=Decimal("0.01"), max_value=1_000_000, places=2)


@given(st.lists(st.tuples(amounts, st.integers(1, 10_000)), min_size=1, max_size=5), st.booleans())
def test_a_total_is_right_to_the_paisa(lines: list[tuple[Decimal, int]], right: bool) -> None:
    total = sum((price * quantity for price, quantity in lines), Decimal(0))
    items = ", ".join(f'{{"sku": "s", "name": "n", "price": {price}, "quantity": {n}}}' for price, n in lines)
    body = json.dumps(paid(items=[], total=0)).replace('"items": []', f'"items": [{items}]')
    body = body.replace('"total": 0', f'"total": {total if right else total + Decimal("0.01")}')
    found = problems(msgspec.json.decode(body, type=Order), NOW)
    assert bool(found) == (not right or total > LARGEST)


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_no_number_breaks_the_check(amount: Decimal) -> None:
    order = decoded(GIVEN)
    item = msgspec.structs.replace(order.items[0], price=amount)
    problems(msgspec.structs.replace(order, items=(item,), total=amount), NOW)


def test_a_clock_may_be_a_little_ahead() -> None:
    order = msgspec.structs.replace(decoded(GIVEN), timestamp=NOW + timedelta(minutes=59))
    assert problems(order, NOW) == []


def test_an_order_is_described_with_its_total_and_each_line_in_rupees() -> None:
    items = line() + line(name="Go in Production", price=19.5, quantity=2)
    assert described(decoded(paid(items=items, total=2038))).splitlines() == [
        "order ORD-1702554000123 of user 507f1f77bcf86cd799439011: total ₹2038",
        "Linux Administration x 1 = ₹1999",
        "Go in Production x 2 = ₹19.50 each, ₹39 together",
    ]
    assert rupees(Decimal("1E+3")) == "₹1000"


def test_the_same_order_has_the_same_fingerprint_however_it_is_written() -> None:
    same = paid(items=line(price=1999.00), total=1999.0, timestamp="2024-12-14T15:30:00+05:30", extra=1)
    assert decoded(GIVEN).fingerprint == decoded(same).fingerprint
    assert decoded(GIVEN).fingerprint != decoded(paid(userId="somebody-else")).fingerprint
