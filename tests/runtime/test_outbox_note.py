"""What is parked in the outbox is seen by whoever looks at a process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from conveyor import Conveyor
from conveyor.core.message import Message
from conveyor.runtime import runner as runner_module
from conveyor.runtime.ledger import Ledger
from conveyor.runtime.outbox import NEVER


async def test_parked_messages_are_a_note_of_health_and_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "STALL_SECONDS", 0.03)
    app = Conveyor("shop", broker=f"sqlite:///{tmp_path}/q.queue", database=f"sqlite+aiosqlite:///{tmp_path}/app.db")

    @app.worker(topic="thing")
    async def handle(_: bytes) -> None: ...

    ledger = Ledger(f"sqlite+aiosqlite:///{tmp_path}/app.db", app="shop", owner="a process before")
    await ledger.migrate()
    async with ledger.transaction() as tx:
        tx.add([Message(id="m", topic="thing", body=b"")])
    for row in (await ledger.claim(1, 30.0)).rows:
        await ledger.put_off(row.seq, "refused", NEVER)
    await ledger.close()
    async with app.running() as runner:
        async with asyncio.timeout(60):
            while not runner.health().notes:
                await asyncio.sleep(0.01)
        assert runner.health().ready
        assert runner.health().notes == ("outbox: 1 parked; see: conveyor outbox list shop",)
        assert runner.snapshot().outbox_parked == 1
