"""The shop over HTTP: what it accepts, refuses and shows."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

import httpx
import pytest

from conveyor import BrokerUnavailable
from conveyor.broker import QueueInfo
from conveyor.brokers.memory import MemoryBroker
from examples.orders.app import app
from examples.orders.web import lifespan, web

if TYPE_CHECKING:
    from tests.examples.orders.conftest import Shop, StartShop

Json = dict[str, Any]
GHOST: Final = "f0000000-0000-4000-8000-000000000000"
"""An id that no order has."""


def item(**other: object) -> Json:
    return {"product_id": "PROD-001", "name": "Laptop", "quantity": 1, "price": 999.99, **other}


def order(**other: object) -> Json:
    return {"customer_email": "ada@example.com", "items": [item()], **other}


async def test_a_new_order_is_answered_as_it_was_created(shop: Shop) -> None:
    lines = [item(), item(product_id="PROD-002", name="Mouse", quantity=3, price=29.99)]
    placed = await shop.place(order(items=lines, total_amount=1089.96))
    assert placed.keys() == {
        "id", "customer_email", "items", "total_amount", "status", "created_at", "updated_at",
    }  # fmt: skip
    assert str(UUID(placed["id"])) == placed["id"]
    assert placed["customer_email"] == "ada@example.com"
    assert placed["items"] == lines
    assert placed["total_amount"] == 1089.96
    assert placed["status"] == "pending"
    created = datetime.fromisoformat(placed["created_at"])
    assert created.utcoffset() == timedelta(0)
    assert placed["created_at"].endswith("+00:00")
    assert abs(datetime.now(UTC) - created) < timedelta(minutes=5)
    assert placed["updated_at"] == placed["created_at"]


async def test_an_order_without_a_total_gets_the_exact_one(shop: Shop) -> None:
    # In floats, 3 × 29.99 is 89.97 but 3 × 19.99 is 59.97 only after rounding, and 0.1 + 0.2 is not 0.3.
    placed = await shop.place(order(items=[item(quantity=3, price=19.99), item(price="0.10"), item(price=0.2)]))
    assert placed["total_amount"] == 60.27


@pytest.mark.parametrize("total", [89.97, "89.97", 3 * 29.99, 29.99 + 29.99 + 29.99])
async def test_the_right_total_is_accepted_however_it_was_computed(shop: Shop, total: object) -> None:
    placed = await shop.place(order(items=[item(quantity=3, price=29.99)], total_amount=total))
    assert placed["total_amount"] == 89.97


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (order(customer_email="ada"), ["customer_email"]),
        (order(customer_email="ada@localhost"), ["customer_email"]),
        (order(customer_email="ada@example..com"), ["customer_email"]),
        (order(customer_email="ada@example.com\nBcc: eve@example.com"), ["customer_email"]),
        (order(customer_email=7), ["customer_email"]),
        ({"items": [item()]}, ["customer_email"]),
        ({"customer_email": "ada@example.com"}, ["items"]),
        (order(items=[]), ["items"]),
        (order(items="two laptops"), ["items"]),
        (order(items=[item()] * 101), ["items"]),
        (order(items=[item(), item(quantity=-1)]), ["items", 1, "quantity"]),
        (order(items=[item(quantity=0)]), ["items", 0, "quantity"]),
        (order(items=[item(quantity=1.5)]), ["items", 0, "quantity"]),
        (order(items=[item(quantity=True)]), ["items", 0, "quantity"]),
        (order(items=[item(quantity=10**30)]), ["items", 0, "quantity"]),
        (order(items=[item(quantity=None)]), ["items", 0, "quantity"]),
        (order(items=[item(price=0)]), ["items", 0, "price"]),
        (order(items=[item(price=-5)]), ["items", 0, "price"]),
        (order(items=[item(price=9.999)]), ["items", 0, "price"]),
        (order(items=[item(price="1e-9")]), ["items", 0, "price"]),
        (order(items=[item(price="1e400")]), ["items", 0, "price"]),
        (order(items=[item(price="cheap")]), ["items", 0, "price"]),
        (order(items=[item(product_id="PROD-999")]), ["items", 0, "product_id"]),
        (order(items=[item(name="")]), ["items", 0, "name"]),
        (order(items=[item(name="Lap\0top")]), ["items", 0, "name"]),
        (order(items=[{"product_id": "PROD-001", "quantity": 1, "price": 1}]), ["items", 0, "name"]),
        (order(total_amount=999.98), ["total_amount"]),
        (order(total_amount=0), ["total_amount"]),
        (order(total_amount=-999.99), ["total_amount"]),
        (order(total_amount="much"), ["total_amount"]),
        ([], []),
    ],
)
async def test_an_invalid_order_is_refused_and_the_field_is_named(
    shop: Shop, body: object, field: list[object]
) -> None:
    async with shop.client() as http:
        answer = await http.post("/orders", json=body)
    assert answer.status_code == 422
    problems = answer.json()["detail"]
    assert [problem["loc"] for problem in problems] == [["body", *field]]
    assert all(problem["msg"] for problem in problems)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"customer_email": "\xed\xa0\x80"}',
        b"[" * 20_000,
        b'{"customer_email": "ada@example.com", "items": [], "total_amount": NaN}',
        b'{"customer_email": "\\ud800@example.com", "items": [], "total_amount": -Infinity}',
    ],
)
async def test_a_body_that_is_no_sensible_json_is_refused_in_words(shop: Shop, body: bytes) -> None:
    async with shop.client() as http:
        answer = await http.post("/orders", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422)
        assert answer.json()["detail"]
        assert (await http.get("/health")).status_code == 200


async def test_a_body_that_is_too_large_is_refused(shop: Shop) -> None:
    async def trickle() -> Any:
        for _ in range(100):
            yield b" " * 1024

    async with shop.client() as http:
        for content in (b" " * 100_000, trickle()):
            answer = await http.post("/orders", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413
            assert "bytes" in answer.json()["detail"]


@pytest.mark.parametrize("unknown", [GHOST, "no-id", "%00", "x" * 500, GHOST.upper()])
async def test_an_unknown_order_is_not_found(shop: Shop, unknown: str) -> None:
    async with shop.client() as http:
        answer = await http.get(f"/orders/{unknown}")
    assert answer.status_code == 404
    assert answer.json() == {"detail": "Order not found"}


async def test_a_repeat_with_the_same_key_gets_the_first_order(shop: Shop) -> None:
    key = uuid4().hex
    first = await shop.place(order(), **{"Idempotency-Key": key})
    await shop.statuses(first["id"])
    again = await shop.place(order(), **{"Idempotency-Key": key})
    assert again == first
    assert len(await shop.query(f"SELECT id FROM orders WHERE idempotency_key = '{key}'")) == 1


async def test_concurrent_repeats_make_one_order(shop: Shop) -> None:
    key = uuid4().hex
    placed = await asyncio.gather(*(shop.place(order(), **{"Idempotency-Key": key}) for _ in range(20)))
    assert len({found["id"] for found in placed}) == 1
    assert (await shop.statuses(placed[0]["id"]))[-1] == "completed"
    events = (await shop.details(placed[0]["id"]))["events"]
    assert [event["event_type"] for event in events].count("order_created") == 1


async def test_a_key_used_for_another_order_is_refused(shop: Shop) -> None:
    key = uuid4().hex
    await shop.place(order(), **{"Idempotency-Key": key})
    async with shop.client() as http:
        answer = await http.post("/orders", json=order(items=[item(quantity=2)]), headers={"Idempotency-Key": key})
    assert answer.status_code == 422
    assert "use a new one" in answer.json()["detail"][0]["msg"]


async def test_orders_without_a_key_are_orders_of_their_own(shop: Shop) -> None:
    first, second = await shop.place(order()), await shop.place(order())
    assert first["id"] != second["id"]


async def test_the_list_pages_through_every_order_once_newest_first(shop: Shop) -> None:
    placed = [await shop.place(order(items=[item(quantity=n)])) for n in range(1, 6)]
    ids: list[str] = []
    async with shop.client() as http:
        page = (await http.get("/orders", params={"limit": 2})).json()
        assert len(page["orders"]) == 2
        while True:
            ids += [found["id"] for found in page["orders"]]
            if page["next"] is None:
                break
            page = (await http.get("/orders", params={"limit": 2, "before": page["next"]})).json()
    assert ids[:5] == [found["id"] for found in reversed(placed)]
    assert len(set(ids)) == len(ids) == (await shop.query("SELECT count(*) FROM orders"))[0][0]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "before=x"])
async def test_a_page_that_cannot_be_is_refused(shop: Shop, query: str) -> None:
    async with shop.client() as http:
        answer = await http.get(f"/orders?{query}")
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", query.partition("=")[0]]


async def test_the_products_are_the_four_of_the_shop(shop: Shop) -> None:
    async with shop.client() as http:
        found = (await http.get("/products")).json()["products"]
    assert [(product["product_id"], product["name"], product["price"]) for product in found] == [
        ("PROD-001", "Laptop", 999.99),
        ("PROD-002", "Mouse", 29.99),
        ("PROD-003", "Keyboard", 79.99),
        ("PROD-004", "Monitor", 299.99),
    ]


async def test_health_counts_the_orders_under_way(start_shop: StartShop) -> None:
    shop = start_shop(web_only="yes")
    async with shop.client() as http:
        assert (await http.get("/health")).json() == {"status": "healthy", "event_bus": "connected", "active_orders": 0}
        await shop.place(order())
        last = await shop.place(order())
        assert (await http.get("/health")).json()["active_orders"] == 2
        shop.run_workers()
        await shop.statuses(last["id"])
        await until(lambda: active(shop), 0)


async def test_a_shop_without_its_broker_is_unhealthy_and_says_so(tmp_path: Path) -> None:
    broker = Unreachable()
    await broker.open()
    with app.replaced(broker=broker, clock=time.time, database=f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}"):
        async with lifespan(web), httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://shop") as http:
            assert (await http.get("/health")).status_code == 200
            broker.reachable = False
            answer = await http.get("/health")
            assert answer.status_code == 503
            assert answer.json() == {"status": "unhealthy", "event_bus": "disconnected", "active_orders": 0}
            broker.reachable = True
            assert (await http.get("/health")).json()["event_bus"] == "connected"
    await broker.close()


class Unreachable(MemoryBroker):
    """A broker whose server can be away."""

    reachable = True

    async def queues(self) -> list[QueueInfo]:
        if not self.reachable:
            raise BrokerUnavailable("connection refused")
        return await super().queues()


async def active(shop: Shop) -> int:
    async with shop.client() as http:
        return (await http.get("/health")).json()["active_orders"]  # type: ignore[no-any-return]


async def until(look: Callable[[], Awaitable[object]], wanted: object) -> None:
    """Look until what is wanted is there."""
    async with asyncio.timeout(60):
        while await look() != wanted:
            await asyncio.sleep(0.02)


async def test_every_answer_carries_the_security_headers(shop: Shop) -> None:
    async with shop.client() as http:
        for path in ("/", "/assets/shop.js", "/assets/shop.css", "/orders", "/orders/nothing", "/nowhere", "/products"):
            headers = (await http.get(path)).headers
            policy = headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
            assert "unsafe" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff"


async def test_the_page_needs_nothing_from_elsewhere_and_has_nothing_inline(shop: Shop) -> None:
    async with shop.client() as http:
        html = (await http.get("/")).text
        assets = set(re.findall(r'(?:src|href)="(/assets/[^"]+)"', html))
        sources = {path: (await http.get(path)).raise_for_status().text for path in assets}
        imports = re.findall(r'from "\./([^"]+)"', "".join(sources.values()))
        sources |= {path: (await http.get(f"/assets/{path}")).raise_for_status().text for path in imports}
    assert {"/assets/shop.js", "/assets/shop.css", "form.js", "live.js", "order.js", "text.js"} <= sources.keys()
    for text in (html, *sources.values()):
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", html)


async def test_there_are_no_pages_that_load_scripts_from_elsewhere(shop: Shop) -> None:
    async with shop.client() as http:
        assert (await http.get("/docs")).status_code == 404
        assert (await http.get("/redoc")).status_code == 404
        assert "/orders" in (await http.get("/openapi.json")).json()["paths"]
