"""Transactions: every message writes a row and publishes an event, exactly once, with inbox and outbox on SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Column, MetaData, String, Table, insert
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.load import url
from benchmarks.order import Countdown, OrderCreated
from benchmarks.subject import Load
from conveyor import Conveyor, Message, Transaction

METADATA = MetaData()
NOTES = Table("notes", METADATA, Column("message", String, primary_key=True), Column("customer", String))


@dataclass(frozen=True)
class OrderNoted:
    """What is published in the same transaction."""

    order_id: str


async def _transactions(folder: Path, load: Load) -> dict[str, float]:
    database = f"sqlite+aiosqlite:///{folder / 'orders.db'}"
    engine = create_async_engine(database)
    async with engine.begin() as connection:
        await connection.run_sync(METADATA.create_all)
    await engine.dispose()
    app = Conveyor("orders", broker=url(folder), database=database)
    countdown: Countdown

    @app.worker
    async def handle(order: OrderCreated, message: Message, tx: Transaction) -> OrderNoted:
        await tx.session.execute(insert(NOTES).values(message=message.id, customer=order.customer))
        countdown.one()
        return OrderNoted(order.order_id)

    @app.worker
    async def collect(_: OrderNoted) -> None:
        pass

    async with app:
        countdown = Countdown(load.messages)
        async with app.running(["handle"]):
            await countdown.over.wait()
        return countdown.figures()


def transactions(folder: Path, load: Load) -> Mapping[str, float]:
    """Inbox, row, outbox, commit, hand-off to the broker, settlement."""
    return asyncio.run(_transactions(folder, load))
