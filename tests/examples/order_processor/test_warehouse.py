"""The warehouse, against a real HTTP server: what it took, what it certainly did not, and what nobody can tell."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.order_processor.calls import CallFailed, NotDone, Refused, Unclear
from examples.order_processor.order import Order
from examples.order_processor.warehouse import LONGEST_PAUSE_SECONDS, HttpWarehouse, key, pause_seconds, timeouts
from servers.server import find_free_port
from tests.examples.order_processor.conftest import GIVEN, WarehouseServer

ORDER = msgspec.convert(GIVEN, type=Order)
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@asynccontextmanager
async def client(url: str, *, timeout_seconds: float = 30.0) -> AsyncIterator[HttpWarehouse]:
    async with httpx.AsyncClient(timeout=timeouts(timeout_seconds)) as http:
        yield HttpWarehouse(url, http)


async def test_it_is_told_what_to_send_under_a_key_that_stays_the_same(warehouse: WarehouseServer) -> None:
    async with client(warehouse.url) as api:
        for _ in range(2):
            await api.notify(ORDER)
    assert warehouse.requests == ["ORD-1702554000123"] * 2
    assert len(warehouse.sent) == 1
    assert warehouse.bodies[0] == {
        "orderId": "ORD-1702554000123",
        "userId": "507f1f77bcf86cd799439011",
        "items": [{"sku": "Linux", "name": "Linux Administration", "quantity": 1}],
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Refused),
        (401, Refused),
        (404, Refused),
        (422, Refused),
        (301, Refused),
        (408, NotDone),
        (409, NotDone),
        (429, NotDone),
        (503, NotDone),
        (500, Unclear),
        (502, Unclear),
        (504, Unclear),
    ],
)
async def test_an_answer_says_whether_a_repeat_makes_sense(
    warehouse: WarehouseServer, status: int, kind: type[CallFailed]
) -> None:
    warehouse.answers.append((status, {}))
    async with client(warehouse.url) as api:
        with pytest.raises(kind, match=str(status)):
            await api.notify(ORDER)


async def test_it_is_left_alone_for_as_long_as_it_asks(warehouse: WarehouseServer) -> None:
    warehouse.answers.append((429, {"Retry-After": "7"}))
    async with client(warehouse.url) as api:
        with pytest.raises(NotDone) as later:
            await api.notify(ORDER)
    assert later.value.after_seconds == 7.0


async def test_nobody_there_means_that_nobody_was_told() -> None:
    async with client(f"http://127.0.0.1:{find_free_port()}/") as api:
        with pytest.raises(NotDone, match="cannot be reached"):
            await api.notify(ORDER)


async def test_an_answer_that_does_not_come_leaves_it_open(warehouse: WarehouseServer) -> None:
    warehouse.hold.clear()
    async with client(warehouse.url, timeout_seconds=0.5) as api:
        with pytest.raises(Unclear, match="did not answer"):
            await api.notify(ORDER)
    assert list(warehouse.sent) == ["ORD-1702554000123"]


async def test_a_server_that_is_silent_before_the_request_is_given_up_while_others_are_still_patient() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        async with client(f"https://127.0.0.1:{deaf.getsockname()[1]}/", timeout_seconds=8) as api:
            with pytest.raises(NotDone, match="cannot be reached"):
                async with asyncio.timeout(8):
                    await api.notify(ORDER)


async def test_a_connection_cut_in_the_answer_leaves_it_open() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 20")
        writer.close()

    async with (
        await asyncio.start_server(serve, "127.0.0.1", 0) as server,
        client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/") as api,
    ):
        with pytest.raises(Unclear):
            await api.notify(ORDER)


@given(st.text(min_size=1))
def test_every_order_has_a_key_that_a_header_can_carry(order_id: str) -> None:
    try:
        order_id.encode()
    except UnicodeEncodeError:
        return
    found = key(msgspec.structs.replace(ORDER, order_id=order_id))
    assert found.isascii()
    assert found.isprintable()
    assert found


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", None),
        ("soon", None),
        ("-5", None),
        ("0", 0.0),
        ("120", 120.0),
        ("99999999", LONGEST_PAUSE_SECONDS),
        ("Sun, 22 Nov 2026 12:01:00 GMT", 60.0),
        ("Sun, 22 Nov 2026 11:00:00 GMT", 0.0),
        ("Sun, 22 Nov 2026 12:01:00", None),
    ],
)
def test_a_pause_is_read_as_seconds_or_as_a_moment(text: str, seconds: float | None) -> None:
    assert pause_seconds(text, NOW) == seconds


@given(st.text())
def test_no_pause_is_read_that_makes_no_sense(text: str) -> None:
    seconds = pause_seconds(text, NOW)
    assert seconds is None or 0 <= seconds <= LONGEST_PAUSE_SECONDS
