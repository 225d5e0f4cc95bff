"""Two types under one topic fit, or it is said why not."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, TypedDict

import msgspec
import pydantic
import pytest

from conveyor.cli.fit import misfit


@dataclass
class Line:
    sku: str
    price: Decimal


@dataclass
class Order:
    order_id: str
    lines: list[Line]
    note: str | None = None


@dataclass
class Tree:
    children: list[Tree] = field(default_factory=list)


class SameTree(msgspec.Struct):
    children: list[SameTree]


class SmallOrder(msgspec.Struct):
    order_id: str


class NumberedOrder(msgspec.Struct):
    order_id: int


class CustomerOrder(TypedDict):
    order_id: str
    customer: str


class ModelOrder(pydantic.BaseModel):
    order_id: str
    note: str | None = None


class StrictLine(msgspec.Struct):
    sku: str
    price: bool


class LineOrder(msgspec.Struct):
    lines: list[StrictLine]


class Red(msgspec.Struct):
    colour: Literal["red", "blue"]


class OnlyRed(msgspec.Struct):
    colour: Literal["red"]


@pytest.mark.parametrize(
    ("published", "received"),
    [
        (Order, Order),
        (Order, SmallOrder),
        (Order, ModelOrder),
        (ModelOrder, SmallOrder),
        (Order, dict[str, Any]),
        (OnlyRed, Red),
        (Tree, SameTree),
        (dict, Order),
    ],
)
def test_types_that_fit_are_not_complained_about(published: Any, received: Any) -> None:
    assert misfit(published, received) is None


@pytest.mark.parametrize(
    ("published", "received", "why"),
    [
        (SmallOrder, Order, "lines is expected and never published"),
        (Order, CustomerOrder, "customer is expected and never published"),
        (Order, NumberedOrder, "order_id is published as string and expected as integer"),
        (NumberedOrder, ModelOrder, "order_id is published as integer and expected as string"),
        (Order, LineOrder, "lines[…].price is published as string and expected as boolean"),
        (Red, OnlyRed, "colour may be 'blue', which is not expected"),
        (Order, bytes, "one is bytes, the other JSON"),
    ],
)
def test_types_that_cannot_fit_are_named_with_the_field(published: Any, received: Any, why: str) -> None:
    assert misfit(published, received) == why
