from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor.core.message import (
    JSON,
    NO_HEADERS,
    SOURCE,
    Message,
    emitted_id,
    from_headers,
    timestamp,
    to_headers,
    uuid7,
)

WIRE_FORMAT = Path(__file__).parents[2] / "docs" / "wire-format.md"
PREFIXES = ("ce-", "ce_", "cloudEvents:", "cloudEvents_")
ENVELOPE = ("specversion", "id", "source", "type", "time", "partitionkey", "duetime", "expirytime", "priority")

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
# Microseconds, from 1970 to beyond 2200: what a timestamp on the wire is exact to.
moments = st.integers(1, 8_000_000_000_000_000).map(lambda micros: micros / 1_000_000)
names = st.from_regex(r"x-[a-z]{1,8}|ce-ext[0-9]|traceparent|Content-Language", fullmatch=True)
messages = st.builds(
    Message,
    id=texts,
    topic=st.from_regex(r"[a-z][a-z.]{0,20}", fullmatch=True),
    body=st.binary(max_size=20),
    key=st.none() | texts,
    headers=st.dictionaries(names, texts, max_size=4),
    content_type=st.sampled_from([JSON, "application/octet-stream", "text/plain; charset=utf-8"]),
    correlation_id=st.none() | texts,
    causation_id=st.none() | texts,
    created=moments,
    due=st.just(0.0) | moments,
    expires=st.none() | moments,
    priority=st.integers(0, 9),
)
anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.datetimes()
    | st.lists(st.integers()) | st.dictionaries(st.text(), st.text()) | st.just(10**5000)
)  # fmt: skip
header_names = st.one_of(
    st.text(max_size=20),
    st.builds(str.__add__, st.sampled_from(PREFIXES), st.sampled_from(ENVELOPE)),
    st.sampled_from(["content-type", "Content-Type"]),
)


def arrive(headers: dict[str, Any], *, topic: str = "order.created") -> Message:
    return from_headers(topic, b"{}", headers, fallback_id="made-up", now=99.0)


@given(messages, st.sampled_from(PREFIXES))
def test_a_message_survives_its_journey_through_headers(message: Message, prefix: str) -> None:
    headers = to_headers(message, prefix)
    assert from_headers(message.topic, message.body, headers, fallback_id="made-up", now=0.0) == message


@given(st.floats(-62_135_596_800.0, 253_402_300_799.0))
def test_a_moment_is_written_as_the_standard_library_writes_it(seconds: float) -> None:
    assert timestamp(seconds) == datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


@given(st.dictionaries(header_names, anything, max_size=12))
def test_no_header_whatever_makes_a_message_undeliverable(headers: dict[str, Any]) -> None:
    message = arrive(headers)
    assert message.id
    assert message.priority in range(10)
    carried = [message.id, message.key or "", message.content_type, *message.headers.values()]
    assert "\0" not in "".join(carried)
    "".join(carried).encode()  # a store that takes only Unicode can keep it
    again = from_headers(message.topic, message.body, to_headers(message), fallback_id="other", now=0.0)
    assert again.id == message.id


def test_a_message_without_any_header_is_taken_as_it_is() -> None:
    message = from_headers("order.created", b"{}", {}, fallback_id="made-up", now=99.0)
    assert message == Message("made-up", "order.created", b"{}", created=99.0)
    assert message.headers is NO_HEADERS


def test_headers_are_what_cloudevents_calls_binary_mode() -> None:
    message = Message("1", "order.created", b"{}", key="A-1", created=1522949484.5, priority=3, headers={"x-shop": "1"})
    assert to_headers(message) == {
        "ce-specversion": "1.0",
        "ce-id": "1",
        "ce-source": SOURCE,
        "ce-type": "order.created",
        "ce-time": "2018-04-05T17:31:24.500000Z",
        "ce-partitionkey": "A-1",
        "ce-priority": "3",
        "x-shop": "1",
        "content-type": "application/json",
    }


@given(messages)
def test_attribute_names_are_lower_case_letters_and_digits(message: Message) -> None:
    for name in to_headers(message):
        if name.startswith("ce-"):
            assert name[3:].isalnum()
            assert name[3:].islower()
            assert len(name[3:]) <= 20


def test_the_attributes_that_the_documentation_lists_are_those_that_there_are() -> None:
    table = WIRE_FORMAT.read_text().split("| attribute |")[1].split("\n\n")[0]
    documented = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    full = Message("1", "t", b"", "k", {}, JSON, "c", "d", 1.0, 2.0, 3.0, 4)
    written = {name.removeprefix("ce-") for name in to_headers(full)}
    assert documented == written - {"content-type"} | {"datacontenttype"}


def test_names_of_headers_are_read_in_any_case() -> None:
    message = arrive({"CE-Id": "7", "Ce-PartitionKey": "A-1", "Content-Type": "text/plain"})
    assert (message.id, message.key, message.content_type) == ("7", "A-1", "text/plain")
    assert message.headers == {}


@pytest.mark.parametrize(
    "wrong", ["yesterday", "", "17:00", "2018-13-45T00:00:00Z", float("nan"), float("inf"), [1], 10**400]
)
def test_a_time_that_is_none_falls_back(wrong: Any) -> None:
    message = arrive({"ce-time": wrong, "ce-duetime": wrong, "ce-expirytime": wrong})
    assert (message.created, message.due, message.expires) == (99.0, 0.0, None)


@pytest.mark.parametrize(
    "moment",
    [
        "2018-04-05T17:31:24Z",
        "2018-04-05t17:31:24z",
        "2018-04-05T19:31:24+02:00",
        "2018-04-05T17:31:24",
        1522949484,
        1522949484.0,
        datetime(2018, 4, 5, 17, 31, 24, tzinfo=UTC),
        datetime(2018, 4, 5, 19, 31, 24, tzinfo=timezone(timedelta(hours=2))),
    ],
)
def test_a_time_is_understood_in_every_form_that_protocols_have(moment: Any) -> None:
    assert arrive({"ce-time": moment}).created == 1522949484.0


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("5", 5),
        (5, 5),
        ("high", 0),
        ("", 0),
        ("12", 9),
        (-3, 0),
        (None, 0),
        (float("inf"), 0),
        ("9" * 5000, 0),
        (10**400, 9),
    ],
)
def test_a_priority_stays_within_its_range(said: Any, meant: int) -> None:
    assert arrive({"ce-priority": said}).priority == meant


def test_what_lies_beyond_the_calendar_becomes_its_last_second() -> None:
    headers = to_headers(Message("1", "t", b"", due=1e18, expires=-1e18))
    assert headers["ce-duetime"] == "9999-12-31T23:59:59Z"
    assert headers["ce-expirytime"] == "0001-01-01T00:00:00Z"


def test_unknown_extensions_and_a_foreign_source_and_type_travel_on_under_any_prefix() -> None:
    message = arrive(
        {"cloudEvents:source": "/bank", "cloudEvents:type": "com.bank.paid", "cloudEvents:traceparent": "00-1"}
    )
    assert message.topic == "order.created"
    assert message.headers == {"ce-source": "/bank", "ce-type": "com.bank.paid", "ce-traceparent": "00-1"}
    onward = to_headers(message, "ce_")
    assert (onward["ce_source"], onward["ce_type"], onward["ce_traceparent"]) == ("/bank", "com.bank.paid", "00-1")


def test_an_application_header_cannot_forge_the_envelope() -> None:
    forged = {"ce-id": "2", "CE_Priority": "9", "Content-Type": "text/html", "ce-time": "x", "ce-specversion": "0.1"}
    headers = to_headers(Message("1", "t", b"", headers=forged))
    assert headers == {
        "ce-specversion": "1.0", "ce-id": "1", "ce-source": SOURCE, "ce-type": "t", "content-type": JSON
    }  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 2**47), st.binary(min_size=10, max_size=12)), min_size=2))
def test_ids_made_in_later_milliseconds_sort_later(made: list[tuple[int, bytes]]) -> None:
    ids = [uuid7(millis / 1000, random) for millis, random in sorted(made)]
    for (earlier, first), (later, second) in pairwise(zip(sorted(made), ids, strict=True)):
        assert int(earlier[0] / 1000 * 1000) >= int(later[0] / 1000 * 1000) or first < second


@given(st.floats(0, 2**40), st.binary(min_size=10, max_size=16))
def test_an_id_is_a_uuid_of_version_7(now: float, random: bytes) -> None:
    made = uuid.UUID(uuid7(now, random))
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert made.int >> 80 == int(now * 1000) & 0xFFFF_FFFF_FFFF


causes = st.tuples(texts, texts, st.integers(0, 10_000))


@given(st.sets(causes, min_size=2, max_size=20))
def test_emitted_ids_differ_wherever_cause_worker_or_position_differ(made: set[tuple[str, str, int]]) -> None:
    assert len({emitted_id(*one) for one in made}) == len(made)


@given(causes)
def test_an_emitted_id_is_the_same_on_every_attempt(cause: tuple[str, str, int]) -> None:
    made = uuid.UUID(emitted_id(*cause))
    assert str(made) == emitted_id(*cause)
    assert (made.version, made.variant) == (8, uuid.RFC_4122)
