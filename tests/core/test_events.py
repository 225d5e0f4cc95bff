from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypedDict
from uuid import UUID

import msgspec
import pydantic
import pytest
import typing_extensions
from hypothesis import given
from hypothesis import strategies as st

from conveyor.core.events import EventType, check_topic, default_topic, event, event_type, is_event
from conveyor.errors import ConfigurationError, HandlerError, PayloadError


@dataclass(frozen=True)
class OrderCreated:
    order_id: str


class PaymentTaken(msgspec.Struct):
    amount: Decimal


class MailSent(pydantic.BaseModel):
    to: str


class Visit(TypedDict):
    page: str


class Click(typing_extensions.TypedDict):
    page: str


class Place(enum.Enum):
    HERE = "here"


@pytest.mark.parametrize("tp", [OrderCreated, PaymentTaken, MailSent, Visit, Click])
def test_dataclasses_structs_models_and_typed_dicts_name_events(tp: type) -> None:
    assert is_event(tp)
    assert event_type(tp) == EventType(tp, default_topic(tp.__name__))


@pytest.mark.parametrize(
    "tp", [dict, bytes, str, int, list, object, dict[str, int], None, OrderCreated("1"), "OrderCreated"]
)
def test_nothing_else_names_an_event(tp: Any) -> None:
    assert not is_event(tp)


@pytest.mark.parametrize("tp", [dict, bytes, int, dict[str, int]])
def test_the_error_on_a_type_that_names_no_event_says_what_to_use(tp: Any) -> None:
    with pytest.raises(HandlerError, match=r"use a dataclass, .* \(dict and bytes .* with topic=…\)"):
        event_type(tp)


@pytest.mark.parametrize(
    ("name", "topic"),
    [
        ("OrderCreated", "order_created"),
        ("HTTPRequest", "http_request"),
        ("Order2Created", "order2_created"),
        ("order", "order"),
        ("A", "a"),
        ("ABC", "abc"),
        ("Order_Created", "order_created"),
        ("_Private", "_private"),
    ],
)
def test_a_topic_is_the_class_name_in_snake_case(name: str, topic: str) -> None:
    assert default_topic(name) == topic


@given(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,30}", fullmatch=True))
def test_every_class_name_makes_a_valid_topic_that_keeps_its_letters(name: str) -> None:
    topic = default_topic(name)
    assert check_topic(topic) == topic
    assert topic == topic.lower()
    assert topic.replace("_", "") == name.replace("_", "").lower()


def test_a_decorator_names_topic_and_key() -> None:
    @event("order.paid", key="order_id")
    @dataclass
    class OrderPaid:
        order_id: str

    assert event_type(OrderPaid) == EventType(OrderPaid, "order.paid", "order_id")


def test_the_decorator_may_stand_below_dataclass_and_slots() -> None:
    @dataclass(slots=True)
    @event(key="order_id")
    class OrderPaid:
        order_id: str

    assert event_type(OrderPaid) == EventType(OrderPaid, "order_paid", "order_id")


def test_the_bare_decorator_changes_nothing() -> None:
    @event
    class Paid(msgspec.Struct):
        order_id: str

    assert event_type(Paid) == EventType(Paid, "paid")


def test_a_subclass_is_an_event_of_its_own() -> None:
    @event("order", key="order_id")
    @dataclass
    class Order:
        order_id: str

    @dataclass
    class RushOrder(Order):
        hours: int

    assert event_type(RushOrder) == EventType(RushOrder, "rush_order")


@pytest.mark.parametrize("base", [OrderCreated, PaymentTaken, MailSent, Visit])
def test_a_key_that_is_no_field_is_refused_at_once_with_the_fields_there_are(base: type) -> None:
    with pytest.raises(
        ConfigurationError, match=r"key='nummer' is no field of \w+; its fields are: (order_id|amount|to|page)$"
    ):
        event(key="nummer")(base)


def test_a_key_below_dataclass_is_checked_as_soon_as_the_fields_are_known() -> None:
    @dataclass
    @event(key="nummer")
    class Paid:
        order_id: str

    with pytest.raises(ConfigurationError, match="nummer"):
        event_type(Paid)


@given(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}", fullmatch=True))
def test_a_valid_topic_is_taken_as_it_is(topic: str) -> None:
    assert EventType(dict, topic).topic == topic


@pytest.mark.parametrize("topic", ["", ".a", "-a", "a b", "a/b", "größe", "a" * 201, "a\n", "a\0", "*", "#", None, 7])
def test_a_topic_that_some_broker_cannot_carry_is_refused_with_what_is_allowed(topic: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"is no topic: 1 to 200 letters .* for example order\.created"
    ) as caught:
        EventType(dict, topic)
    assert len(str(caught.value)) < 500


@given(st.text(max_size=300))
def test_any_text_is_either_a_topic_or_refused(text: str) -> None:
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}", text):
        assert check_topic(text) == text
    else:
        with pytest.raises(ConfigurationError):
            check_topic(text)


def test_a_class_name_that_makes_no_topic_asks_for_one() -> None:
    tp = type("Größe", (msgspec.Struct,), {})
    with pytest.raises(ConfigurationError, match=r"Größe makes no valid topic .* @event\("):
        event_type(tp)


def test_the_decorator_belongs_on_a_class() -> None:
    wrong: Any = test_the_decorator_belongs_on_a_class
    with pytest.raises(ConfigurationError, match="belongs on a class"):
        event("order.created")(wrong)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("A-1", "A-1"),
        (17, "17"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Place.HERE, "here"),
        (Decimal("1.50"), "1.50"),
        (None, None),
        ("", None),
    ],
)
def test_a_key_is_the_text_of_its_field(value: object, key: str | None) -> None:
    @dataclass
    class Thing:
        id: Any

    assert EventType(Thing, "thing", "id").key_of(Thing(value)) == key
    assert EventType(dict, "thing", "id").key_of({"id": value}) == key


@pytest.mark.parametrize("tp", [OrderCreated, Visit])
def test_an_event_without_a_key_has_none(tp: Any) -> None:
    assert event_type(tp).key_of({"page": "/"}) is None


def test_a_key_of_the_wrong_kind_is_refused_by_name() -> None:
    with pytest.raises(PayloadError, match="'id' of dict holds a list"):
        EventType(dict, "thing", "id").key_of({"id": [1]})


def test_a_key_that_is_missing_is_refused_by_name() -> None:
    with pytest.raises(PayloadError, match="no value for its key field 'id'"):
        EventType(dict, "thing", "id").key_of({})
