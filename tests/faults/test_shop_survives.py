"""The shop under fire: its runners are killed and stopped at random while customers order; no order, cent or parcel goes astray."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest

from conveyor.broker import DeadFilter

if TYPE_CHECKING:
    from tests.faults.conftest import Eventually, Process, Program, World

MINUTES: Final = float(os.environ.get("MINUTES") or 0)
"""Set, faults and orders go on for so long (for each database); else for about half a minute."""
ORDERS: Final = 320
"""At least."""
FAULTS: Final = 60
"""At least, two a second."""
CUSTOMERS: Final = 12
SUPERVISORS: Final = 2
PROCESSES: Final = 2
"""Of each supervisor."""
LEASE_SECONDS: Final = 2.0
STOP_SECONDS: Final = 3.0
"""A stopped process sleeps past its lease."""
SETTLE_SECONDS: Final = 180.0 + 60 * MINUTES
"""After the last fault all orders come to their end within that time."""
PLENTY: Final = "PROD-001"
"""There is always enough of it; of the others too little, or nothing at all."""
PRICES: Final = {PLENTY: 999.99, "PROD-002": 29.99, "PROD-003": 79.99, "PROD-004": 299.99}
SETTINGS: Final = {
    "SHOP_VALIDATION_SECONDS": "0-0.1",
    "SHOP_PAYMENT_SECONDS": "0-0.2",
    "SHOP_INVENTORY_SECONDS": "0-0.1",
    "SHOP_SHIPPING_SECONDS": "0-0.1",
    "SHOP_DECLINE_RATE": "0.1",
    "SHOP_LEASE_SECONDS": str(LEASE_SECONDS),
}
COMPLETED: Final = (
    "order_created",
    "order_validated",
    "payment_processed",
    "inventory_reserved",
    "shipment_created",
    "order_completed",
)
DECLINED: Final = ("order_created", "order_validated", "order_failed")
REFUNDED: Final = ("order_created", "order_validated", "payment_processed", "payment_refunded", "order_failed")

Body = dict[str, Any]


class Shop:
    """The shop's programs: the web process, and supervisors with their runners."""

    def __init__(self, world: World, port: int, chance: random.Random) -> None:
        self.world: Final = world
        self.base: Final = f"http://127.0.0.1:{port}"
        self.orders: Final[dict[str, Body]] = {}
        """What was accepted: the order's id → what was ordered."""
        self.faults: Final[Counter[str]] = Counter()
        self._port = port
        self._chance = chance
        self._stopped: set[int] = set()
        world.environment.update(SETTINGS)
        self.web = self._start_web()
        self.supervisors: Final = [self._start_supervisor() for _ in range(SUPERVISORS)]

    def _start_web(self) -> Program:
        return self.world.start("examples.orders", "--web-only", f"--port={self._port}")

    def _start_supervisor(self) -> Program:
        return self.world.start("conveyor", "run", "examples.orders.app:app", f"--processes={PROCESSES}")

    async def serves(self) -> bool:
        """Whether the web process answers."""
        try:
            async with httpx.AsyncClient(base_url=self.base, timeout=5.0) as http:
                return (await http.get("/health")).status_code == 200
        except httpx.TransportError:
            return False

    # faults

    async def suffer(self, over: asyncio.Event) -> None:
        """Two faults a second, until there were enough and the customers have gone."""
        async with asyncio.TaskGroup() as sleeping:
            while not (over.is_set() and self.faults.total() >= FAULTS):
                await asyncio.sleep(0.5)
                number = self.faults.total()
                if number % 25 == 24:
                    self._kill_supervisor()
                elif number == 30:
                    self._kill_web()
                elif victims := self._runners():
                    victim = self._chance.choice(victims)
                    if number % 8 == 7:
                        sleeping.create_task(self._stop(victim))
                    elif victim.send(signal.SIGKILL):
                        self.faults["runner killed"] += 1

    def _runners(self) -> list[Process]:
        found = [each for supervisor in self.supervisors for each in supervisor.runners]
        return [each for each in found if each.pid not in self._stopped]

    async def _stop(self, runner: Process) -> None:
        """Let a runner sleep past its leases."""
        self.faults["runner stopped"] += 1
        self._stopped.add(runner.pid)
        runner.send(signal.SIGSTOP)
        await asyncio.sleep(STOP_SECONDS)
        runner.send(signal.SIGCONT)
        self._stopped.discard(runner.pid)

    def _kill_supervisor(self) -> None:
        place = self._chance.randrange(SUPERVISORS)
        self.supervisors[place].kill()
        self.supervisors[place] = self._start_supervisor()
        self.faults["supervisor killed"] += 1

    def _kill_web(self) -> None:
        self.web.kill()
        self.web = self._start_web()
        self.faults["web process killed"] += 1

    # customers

    async def sell(self, until: float) -> None:
        """Let customers order, all at once, until that time and at least ORDERS orders."""
        numbers = iter(range(10**9))
        async with httpx.AsyncClient(base_url=self.base, timeout=10.0) as http, asyncio.TaskGroup() as customers:
            for _ in range(CUSTOMERS):
                customers.create_task(self._customer(http, numbers, until))

    async def _customer(self, http: httpx.AsyncClient, numbers: Any, until: float) -> None:
        while (number := next(numbers)) < ORDERS or time.monotonic() < until:
            body = self._wish()
            key = {"Idempotency-Key": f"order-{number}"}
            order = await self._place(http, body, key)
            self.orders[order["id"]] = body
            if number % 10 == 0:  # an impatient one
                assert (await self._place(http, body, key))["id"] == order["id"]
            await asyncio.sleep(self._chance.uniform(0, 0.8))

    async def _place(self, http: httpx.AsyncClient, body: Body, key: dict[str, str]) -> Body:
        """Order, and try again until there is an answer."""
        while True:
            try:
                answer = await http.post("/orders", json=body, headers=key)
            except httpx.TransportError:
                await asyncio.sleep(0.2)
                continue
            if answer.status_code == 200:
                order: Body = answer.json()
                return order
            assert answer.status_code == 503, answer.text
            await asyncio.sleep(0.2)

    def _wish(self) -> Body:
        products = self._chance.choices(list(PRICES), [6, 2, 2, 1], k=self._chance.choice([1, 1, 2]))
        items = [
            {"product_id": each, "name": each, "quantity": self._chance.randint(1, 3), "price": PRICES[each]}
            for each in dict.fromkeys(products)
        ]
        return {"customer_email": "ada@example.com", "items": items}


@pytest.mark.kill
@pytest.mark.timeout(600 + 180 * MINUTES)
async def test_every_order_ends_once_and_everything_adds_up(
    any_world: World, free_port: int, eventually: Eventually
) -> None:
    world = any_world
    seed = int(os.environ.get("SEED") or time.time_ns() % 10**9)
    print(f"SEED={seed}")
    shop = Shop(world, free_port, random.Random(seed))
    await eventually(shop.serves, shop.web.said)
    await world.query(f"UPDATE stock SET quantity = 1000000 WHERE product_id = '{PLENTY}'")
    stock = dict(await world.query("SELECT product_id, quantity FROM stock"))

    over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(shop.suffer(over))
        await shop.sell(until=time.monotonic() + 60 * MINUTES)
        over.set()
    calm = time.monotonic()

    async def all_settled() -> bool:
        active = await world.query("SELECT count(*) FROM orders WHERE status NOT IN ('completed', 'failed')")
        return active == [(0,)] and await world.count("conveyor_outbox") == 0 and not await world.unsettled()

    await eventually(all_settled, lambda: told(shop), SETTLE_SECONDS)
    recovery = time.monotonic() - calm
    for program in (*shop.supervisors, shop.web):
        await program.stop()
    async with world.broker() as broker:
        assert await broker.dead_letters(DeadFilter(), limit=10) == []
        assert sum(each.ready + each.in_flight + each.delayed for each in await broker.queues()) == 0
    ends = await check_books(world, shop.orders, stock)
    print(f"SEED={seed}: {dict(ends)}, {dict(shop.faults)}; all settled {recovery:.1f} s after the last fault")
    assert shop.faults["runner killed"] >= FAULTS // 2
    assert shop.faults["runner stopped"] >= 3
    assert shop.faults["supervisor killed"] >= 2
    assert len(shop.orders) >= ORDERS
    assert min(ends["completed"], ends["declined"], ends["refunded"]) >= 10


async def check_books(world: World, accepted: dict[str, Body], stock: dict[str, int]) -> Counter[str]:
    """Compare what was accepted with what the books say; how many orders ended how."""
    statuses = dict(await world.query("SELECT id, status FROM orders"))
    assert statuses.keys() == accepted.keys(), "the orders that are there are those that were accepted"
    history: defaultdict[str, list[str]] = defaultdict(list)
    reasons: dict[str, str] = {}
    for order_id, kind, message in await world.query(
        "SELECT order_id, event_type, message FROM order_events ORDER BY number"
    ):
        history[order_id].append(kind)
        if kind == "order_failed":
            reasons[order_id] = message
    charged = Counter(id for (id,) in await world.query("SELECT order_id FROM charges"))
    refunded = Counter(id for (id,) in await world.query("SELECT order_id FROM refunds"))
    shipped = Counter(id for (id,) in await world.query("SELECT order_id FROM shipments"))
    ends: Counter[str] = Counter()
    reserved: Counter[str] = Counter()
    for order_id, status in statuses.items():
        books = charged[order_id], refunded[order_id], shipped[order_id]
        found = status, tuple(history[order_id]), reasons.get(order_id), books
        match status:
            case "completed":
                expected: Sequence[Any] = ("completed", COMPLETED, None, (1, 0, 1))
                ends["completed"] += 1
                for item in accepted[order_id]["items"]:
                    reserved[item["product_id"]] += item["quantity"]
            case _ if reasons[order_id] == "Payment declined":
                expected = ("failed", DECLINED, "Payment declined", (0, 0, 0))
                ends["declined"] += 1
            case _:
                expected = ("failed", REFUNDED, "Insufficient inventory", (1, 1, 0))
                ends["refunded"] += 1
        assert found == expected, order_id
    remaining = dict(await world.query("SELECT product_id, quantity FROM stock"))
    assert min(remaining.values()) >= 0
    assert {id: remaining[id] + reserved[id] for id in stock} == stock
    return ends


def told(shop: Shop) -> str:
    """What is known where something does not come to its end."""
    logs = "\n".join(f"--- {each.command}\n{each.said()[-4000:]}" for each in (*shop.supervisors, shop.web))
    return f"{dict(shop.faults)}\n{logs}"
