"""Watching an order: everybody sees every change, and nobody is disturbed by anybody else."""

from __future__ import annotations

import asyncio
import socket as sockets
from typing import TYPE_CHECKING, Any

import pytest
from websockets.exceptions import ConnectionClosed

if TYPE_CHECKING:
    from tests.examples.orders.conftest import Shop, StartShop

WHOLE_WAY = ["pending", "validating", "payment_processing", "inventory_check", "shipping", "completed"]
LAPTOP: dict[str, Any] = {
    "customer_email": "ada@example.com",
    "items": [{"product_id": "PROD-001", "name": "Laptop", "quantity": 1, "price": 999.99}],
}


async def read_all(shop: Shop, order_id: str, ready: asyncio.Event | None = None) -> list[str]:
    """Watch an order to its end; says when the first state is there."""
    async with shop.watching(order_id) as socket:
        seen = [str(await socket.recv())]
        if ready is not None:
            ready.set()
        async for message in socket:
            seen.append(str(message))
            if '"completed"' in seen[-1] or '"failed"' in seen[-1]:
                return seen
    raise AssertionError("closed before the order's end")


async def test_all_watchers_see_every_change_of_workers_in_another_process(start_shop: StartShop) -> None:
    shop = start_shop(web_only="yes")
    order_id = (await shop.place(LAPTOP))["id"]
    ready = [asyncio.Event() for _ in range(30)]
    async with asyncio.TaskGroup() as group:
        watching = [group.create_task(read_all(shop, order_id, event)) for event in ready]
        for event in ready:
            await event.wait()
        shop.run_workers()
    for task in watching:
        assert [
            status for message in task.result() for status in WHOLE_WAY if f'"status":"{status}"' in message
        ] == WHOLE_WAY


async def test_a_watcher_sees_the_state_at_once_also_of_an_order_that_has_ended(shop: Shop) -> None:
    order_id = (await shop.place(LAPTOP))["id"]
    await shop.statuses(order_id)
    assert await shop.statuses(order_id) == ["completed"]


async def test_a_watcher_that_leaves_disturbs_nobody(start_shop: StartShop) -> None:
    shop = start_shop(web_only="yes")
    order_id = (await shop.place(LAPTOP))["id"]
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        staying = group.create_task(read_all(shop, order_id, ready))
        await ready.wait()
        for politely in (True, False):
            async with shop.watching(order_id) as leaving:
                await leaving.recv()
                if not politely:
                    leaving.transport.abort()
        shop.run_workers()
    assert len(staying.result()) == len(WHOLE_WAY)


async def test_a_watcher_that_does_not_read_disturbs_nobody(start_shop: StartShop) -> None:
    shop = start_shop(web_only="yes")
    order_id = (await shop.place(LAPTOP))["id"]
    ready = asyncio.Event()
    with sockets.create_connection(("127.0.0.1", shop.port)) as deaf:
        deaf.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 1)
        deaf.sendall(
            f"GET /ws/orders/{order_id} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        async with asyncio.TaskGroup() as group:
            staying = group.create_task(read_all(shop, order_id, ready))
            await ready.wait()
            shop.run_workers()
    assert len(staying.result()) == len(WHOLE_WAY)


async def test_a_watcher_who_comes_while_the_order_moves_misses_nothing(start_shop: StartShop) -> None:
    shop = start_shop(validation="0.05", payment="0.05", inventory="0.05", shipping="0.05")
    order_id = (await shop.place(LAPTOP))["id"]
    async with asyncio.timeout(60):
        seen = await asyncio.gather(*(late(shop, order_id, 0.01 * n) for n in range(25)))
    for statuses in seen:
        assert statuses == WHOLE_WAY[WHOLE_WAY.index(statuses[0]) :]


async def late(shop: Shop, order_id: str, seconds: float) -> list[str]:
    await asyncio.sleep(seconds)
    return await shop.statuses(order_id)


@pytest.mark.parametrize("unknown", ["00000000-0000-4000-8000-000000000000", "no-id", "%00", "x" * 500])
async def test_watching_an_unknown_order_is_closed_with_4404(shop: Shop, unknown: str) -> None:
    async with shop.watching(unknown) as socket:
        with pytest.raises(ConnectionClosed):
            await socket.recv()
        assert socket.close_code == 4404
        assert socket.close_reason == "Order not found"


async def test_what_a_watcher_says_is_ignored(shop: Shop) -> None:
    order_id = (await shop.place(LAPTOP))["id"]
    async with shop.watching(order_id) as socket:
        await socket.send("hello")
        await socket.send(b"\x00\xff")
        async for message in socket:
            if '"completed"' in str(message):
                break
    async with shop.watching(order_id) as socket:
        await socket.send("x" * 100_000)
        await socket.wait_closed()
    assert await shop.statuses(order_id) == ["completed"]
