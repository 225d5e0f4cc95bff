"""Places one order in a transaction, as a web process would, and waits until it has left the outbox."""

from __future__ import annotations

import asyncio
import sys

from sqlalchemy import text

from tests.faults.apps.trade import Placed, app


async def main(order_id: str) -> None:
    async with app:
        async with app.transaction() as tx:
            values = {"worker": "place", "order_id": order_id}
            await tx.session.execute(text("INSERT INTO effect (worker, order_id) VALUES (:worker, :order_id)"), values)
            await tx.publish(Placed(order_id))
        while await app.handing_off():
            await asyncio.sleep(0.01)


asyncio.run(main(sys.argv[1]))
