"""The shop's flow, down each of its paths: what becomes of an order, its money and the stock."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from servers.postgres import Postgres
    from tests.examples.orders.conftest import Shop, StartShop

WHOLE_WAY = ["pending", "validating", "payment_processing", "inventory_check", "shipping", "completed"]
INITIAL = {"PROD-001": 100, "PROD-002": 50, "PROD-003": 25, "PROD-004": 0}


def order(*lines: tuple[str, int]) -> dict[str, Any]:
    prices = {"PROD-001": 999.99, "PROD-002": 29.99, "PROD-003": 79.99, "PROD-004": 299.99}
    items = [{"product_id": p, "name": p.title(), "quantity": n, "price": prices[p]} for p, n in lines]
    return {"customer_email": "ada@example.com", "items": items}


def types(details: dict[str, Any]) -> list[str]:
    return [event["event_type"] for event in details["events"]]


async def test_an_order_goes_the_whole_way(start_shop: StartShop) -> None:
    shop = start_shop(validation="0.05")
    placed = await shop.place(order(("PROD-001", 1), ("PROD-002", 2)))
    seen = await shop.statuses(placed["id"])
    assert seen == WHOLE_WAY[-len(seen) :]
    assert len(seen) >= 5  # the first one may have been over before we looked

    details = await shop.details(placed["id"])
    events = {event["event_type"]: event for event in details["events"]}
    assert types(details) == [
        "order_created", "order_validated", "payment_processed", "inventory_reserved", "shipment_created", "order_completed",
    ]  # fmt: skip
    assert [event["status"] for event in details["events"]] == WHOLE_WAY
    assert events["payment_processed"]["metadata"] == {
        "transaction_id": f"TXN-{placed['id'][:8]}",
        "amount": "1059.97",
    }
    assert all(event["order_id"] == placed["id"] and event["message"] for event in details["events"])
    times = [datetime.fromisoformat(event["timestamp"]) for event in details["events"]]
    assert times == sorted(times)
    assert details["order"]["status"] == "completed"
    assert datetime.fromisoformat(details["order"]["updated_at"]) > datetime.fromisoformat(placed["created_at"])

    assert await shop.stock() == INITIAL | {"PROD-001": 99, "PROD-002": 48}
    assert await shop.query("SELECT order_id, amount FROM charges") == [(placed["id"], 105997)]
    assert await shop.query("SELECT order_id FROM shipments") == [(placed["id"],)]
    assert await shop.query("SELECT * FROM refunds") == []


async def test_a_declined_payment_ends_the_order_and_takes_nothing(start_shop: StartShop) -> None:
    shop = start_shop(decline_rate="1")
    details = await shop.finish(order(("PROD-001", 1)))
    assert details["order"]["status"] == "failed"
    assert types(details) == ["order_created", "order_validated", "order_failed"]
    assert details["events"][-1]["message"] == "Payment declined"
    assert await shop.query("SELECT * FROM charges") == []
    assert await shop.stock() == INITIAL


async def test_the_gateway_declines_about_the_share_that_is_set(start_shop: StartShop) -> None:
    shop = start_shop(decline_rate="0.5")
    ended = await asyncio.gather(*(shop.finish(order(("PROD-002", 1))) for _ in range(30)))
    counts = Counter(details["order"]["status"] for details in ended)
    assert counts["failed"] > 0
    assert counts["completed"] > 0
    assert len(await shop.query("SELECT * FROM charges")) == counts["completed"]


async def test_missing_stock_fails_the_order_and_refunds_the_payment(start_shop: StartShop) -> None:
    shop = start_shop()
    details = await shop.finish(order(("PROD-001", 1), ("PROD-004", 1)))
    events = {event["event_type"]: event for event in details["events"]}
    assert details["order"]["status"] == "failed"
    assert types(details) == [
        "order_created", "order_validated", "payment_processed", "payment_refunded", "order_failed",
    ]  # fmt: skip
    assert events["order_failed"]["message"] == "Insufficient inventory"
    assert events["payment_refunded"]["metadata"] == events["payment_processed"]["metadata"]
    refunds = await shop.query("SELECT order_id, transaction_id, amount FROM refunds")
    assert refunds == await shop.query("SELECT order_id, transaction_id, amount FROM charges")
    assert len(refunds) == 1
    assert await shop.stock() == INITIAL  # all or nothing: the laptop was there, and stays


async def test_lines_of_one_product_count_together(start_shop: StartShop) -> None:
    shop = start_shop()
    details = await shop.finish(order(("PROD-003", 13), ("PROD-003", 13)))
    assert details["events"][-1]["message"] == "Insufficient inventory"
    assert await shop.stock() == INITIAL


async def race(shop: Shop) -> None:
    """Thirty customers for the twenty-five keyboards, all of whom also want a mouse."""
    shop.run_workers()
    ended = await asyncio.gather(*(shop.finish(order(("PROD-003", 1), ("PROD-002", 1))) for _ in range(30)))
    assert Counter(details["order"]["status"] for details in ended) == {"completed": 25, "failed": 5}
    assert await shop.stock() == INITIAL | {"PROD-003": 0, "PROD-002": 25}
    assert all(count == 1 for details in ended for count in Counter(types(details)).values())
    charged = await shop.query("SELECT order_id FROM charges")
    assert len(charged) == len(set(charged)) == 30
    assert len(await shop.query("SELECT order_id FROM refunds")) == 5
    assert len(await shop.query("SELECT order_id FROM shipments")) == 25


async def test_racing_orders_never_take_more_than_there_is(start_shop: StartShop) -> None:
    await race(start_shop())


async def test_the_same_holds_with_the_ledger_on_postgresql(start_shop: StartShop, postgres: Postgres) -> None:
    await race(start_shop(database=postgres.url("shop")))


async def test_an_order_goes_the_whole_way_on_postgresql(start_shop: StartShop, postgres: Postgres) -> None:
    shop = start_shop(database=postgres.url("shop"))
    key = uuid4().hex
    placed = await asyncio.gather(*(shop.place(order(("PROD-001", 1)), **{"Idempotency-Key": key}) for _ in range(10)))
    assert len({found["id"] for found in placed}) == 1
    assert (await shop.statuses(placed[0]["id"]))[-1] == "completed"
    details = await shop.details(placed[0]["id"])
    assert details["order"]["created_at"] == placed[0]["created_at"]
    assert [event["status"] for event in details["events"]] == WHOLE_WAY
    assert await shop.stock() == INITIAL | {"PROD-001": 99}


async def test_an_order_that_came_past_the_web_process_is_checked_too(start_shop: StartShop) -> None:
    shop = start_shop()
    wrong = subprocess.run(
        [sys.executable, "-c", WRONG_TOTAL],
        env=shop.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()
    assert await shop.statuses(wrong) in (["validating", "failed"], ["failed"], ["pending", "validating", "failed"])
    details = await shop.details(wrong)
    assert types(details) == ["order_failed"]
    assert details["events"][0]["message"] == "Invalid order: The total must be 999.99: the sum of price times quantity"
    assert await shop.query("SELECT * FROM charges") == []


WRONG_TOTAL = """
import asyncio
from datetime import UTC, datetime
from decimal import Decimal
from uuid import uuid4

from examples.orders.app import app
from examples.orders.events import OrderCreated
from examples.orders.model import OrderItem, Status
from examples.orders.tables import OrderRow

async def main():
    laptop = OrderItem(product_id="PROD-001", name="Laptop", quantity=1, price=Decimal("999.99"))
    now = datetime.now(UTC)
    row = OrderRow(id=str(uuid4()), customer_email="ada@example.com", items=(laptop,), total_amount=Decimal("1.00"),
                   status=Status.PENDING, created_at=now, updated_at=now)
    async with app, app.transaction() as tx:
        tx.session.add(row)
        await tx.publish(OrderCreated(row.id))
    print(row.id)

asyncio.run(main())
"""


async def test_workers_in_other_processes_do_the_same(start_shop: StartShop) -> None:
    shop = start_shop(processes="2")
    ended = await asyncio.gather(*(shop.finish(order(("PROD-001", 1))) for _ in range(10)))
    assert {details["order"]["status"] for details in ended} == {"completed"}
    assert await shop.stock() == INITIAL | {"PROD-001": 90}


async def test_orders_wait_while_the_workers_are_away(start_shop: StartShop) -> None:
    shop = start_shop(web_only="yes", inventory="0.2")
    placed = await shop.place(order(("PROD-001", 1)))
    async with shop.watching(placed["id"]) as socket:
        first = shop.run_workers()
        while "inventory_check" not in str(await socket.recv()):
            pass
    assert first.stop() == 0
    details = await shop.details(placed["id"])
    assert details["order"]["status"] in WHOLE_WAY
    shop.run_workers()
    assert (await shop.statuses(placed["id"]))[-1] == "completed"
    assert len(await shop.query("SELECT * FROM charges")) == 1


async def test_the_shop_stops_when_told_and_goes_on_where_it_was(start_shop: StartShop) -> None:
    shop = start_shop(web_only="yes")
    placed = [await shop.place(order(("PROD-001", 1))) for _ in range(3)]
    shop.close()
    shop.settings.pop("web_only")
    again = shop.start()
    for found in placed:
        assert (await shop.statuses(found["id"]))[-1] == "completed"
    assert again.stop() == 0
