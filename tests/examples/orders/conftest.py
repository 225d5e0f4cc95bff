"""The shop as a program: started, asked, watched, and stopped, as its users do."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from websockets.asyncio.client import ClientConnection, connect

ROOT: Final = Path(__file__).parents[3]
START_SECONDS: Final = 60.0
"""A shop that does not answer by then will not, however crowded the machine."""
FLOW_SECONDS: Final = 60.0
QUICK: Final = {"validation": "0", "payment": "0", "inventory": "0", "shipping": "0", "decline_rate": "0"}

Order = dict[str, Any]


def item(product: str = "PROD-001", quantity: object = 1, price: object = 999.99, name: str = "Laptop") -> Order:
    """A line of an order as a customer sends it."""
    return {"product_id": product, "name": name, "quantity": quantity, "price": price}


def order(*items: Order, **other: object) -> Order:
    """An order as a customer sends it: one laptop, unless said otherwise."""
    return {"customer_email": "ada@example.com", "items": list(items) or [item()], **other}


class Program:
    """A program of the shop's: its process and what it says."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log: Final = log
        with log.open("ab") as out:
            self.process: Final = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def said(self) -> str:
        """Everything it wrote so far."""
        return self.log.read_text(errors="replace")

    def stop(self) -> int:
        """Ask it to end (SIGTERM); gives its exit code."""
        self.process.terminate()
        return self.process.wait(60)

    def kill(self) -> None:
        """End it for certain."""
        self.process.kill()
        self.process.wait()


class Shop:
    """A shop with a folder of its own.

    Parameters:
        folder: for its data and its logs.
        settings: flags of ``python -m examples.orders``, beside those that make everything quick.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder: Final = folder
        self.settings: Final = {**QUICK, "data": str(folder), **settings}
        self.url: Final = settings.get("database", f"sqlite+aiosqlite:///{folder / 'shop.db'}")
        self.port = 0
        self._programs: list[Program] = []

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a worker process of this shop needs."""
        found = {f"SHOP_{name.upper()}_SECONDS": self.settings[name] for name in QUICK if name != "decline_rate"}
        found |= {"SHOP_DATA": str(self.folder), "SHOP_DECLINE_RATE": self.settings["decline_rate"]}
        return found | ({"CONVEYOR_DATABASE": self.settings["database"]} if "database" in self.settings else {})

    def run(self, name: str, *command: str) -> Program:
        """Start a program beside the web process."""
        log = self.folder / f"{name}-{len(self._programs)}.log"
        program = Program([sys.executable, "-m", *command], log, self.environment)
        self._programs.append(program)
        return program

    def run_workers(self) -> Program:
        """Start the workers as a process of their own."""
        return self.run("workers", "conveyor", "run", "examples.orders.app:app")

    def start(self) -> Program:
        """Start the shop, on the port that it had before, and wait until it serves."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self.settings.items() if value != "yes"]
        flags += [f"--{name.replace('_', '-')}" for name, value in self.settings.items() if value == "yes"]
        web = self.run("web", "examples.orders", *flags, f"--port={self.port}")
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", web.said())):
            if web.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the shop does not start:\n{web.said()}")
            time.sleep(0.02)
        self.port = int(found[1])
        return web

    def close(self) -> None:
        """Stop everything that was started."""
        for program in self._programs:
            program.process.send_signal(signal.SIGTERM)
        for program in self._programs:
            try:
                program.process.wait(30)
            except subprocess.TimeoutExpired:
                program.kill()

    # -- asking

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.base, timeout=30.0)

    async def place(self, body: Order, **headers: str) -> Order:
        """Place an order that the shop accepts."""
        async with self.client() as http:
            answer = await http.post("/orders", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    async def details(self, order_id: str) -> Order:
        """An order and its events."""
        async with self.client() as http:
            answer = await http.get(f"/orders/{order_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    @asynccontextmanager
    async def watching(self, order_id: str) -> AsyncIterator[ClientConnection]:
        """A live connection to an order."""
        async with connect(f"ws://127.0.0.1:{self.port}/ws/orders/{order_id}") as socket:
            yield socket

    async def statuses(self, order_id: str) -> list[str]:
        """Watch an order to its end; the statuses that were seen."""
        async with self.watching(order_id) as socket:
            return await statuses(socket)

    async def finish(self, body: Order) -> Order:
        """Place an order and wait for its end; the order and its events."""
        placed = await self.place(body)
        await self.statuses(placed["id"])
        return await self.details(placed["id"])

    async def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Look into the shop's database."""
        engine = create_async_engine(self.url, poolclass=NullPool)
        try:
            async with engine.connect() as connection:
                return [tuple(row) for row in await connection.execute(text(sql))]
        finally:
            await engine.dispose()

    async def stock(self) -> dict[str, int]:
        """What is left of each product."""
        rows = await self.query("SELECT product_id, quantity FROM stock")
        return {str(product): int(left) for product, left in rows}


async def statuses(socket: ClientConnection) -> list[str]:
    """The statuses that a watcher sees, to the last one."""
    seen: list[str] = []
    async with asyncio.timeout(FLOW_SECONDS):
        while not seen or seen[-1] not in ("completed", "failed"):
            seen.append((await update(socket))["status"])
    return seen


async def update(socket: ClientConnection) -> Order:
    """The next state of the order that a watcher is sent."""
    message = json.loads(await socket.recv())
    assert message.keys() == {"type", "order"}
    assert message["type"] == "status_update"
    return message["order"]  # type: ignore[no-any-return]


StartShop = Callable[..., Shop]


@pytest.fixture
def start_shop(tmp_path: Path) -> Iterator[StartShop]:
    """Start a shop with these settings."""
    shops = []

    def start(**settings: str) -> Shop:
        shop = Shop(tmp_path, **settings)
        shops.append(shop)
        shop.start()
        return shop

    yield start
    for shop in shops:
        shop.close()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A quick shop that the tests of one file share: each works on orders of its own."""
    found = Shop(tmp_path_factory.mktemp("shop"))
    try:
        found.start()
        yield found
    finally:
        found.close()
