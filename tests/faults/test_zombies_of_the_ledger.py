"""A process that is stopped in the middle of a handler, and goes on when others have handled its message, changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from conveyor.errors import LedgerBusy
from conveyor.runtime.ledger import Ledger

if TYPE_CHECKING:
    from servers.postgres import Postgres

ADD = "INSERT INTO effects (name) VALUES (:name)"
HANDLER = f"""
import asyncio, sys
from sqlalchemy import text
from conveyor.errors import AlreadyHandled, LedgerError
from conveyor.runtime.ledger import Ledger

async def main(url, touches_first):
    ledger = Ledger(url, app="shop", owner="zombie", idle_seconds=0.5)
    await ledger.open()
    try:
        async with ledger.transaction(inbox=("w", "m")) as tx:
            if touches_first:
                await tx.session.execute(text("{ADD}"), {{"name": "zombie"}})
            print("at work", flush=True)
            sys.stdin.readline()  # it is stopped while it waits here
            await tx.session.execute(text("{ADD}"), {{"name": "zombie"}})
        print("committed")
    except (AlreadyHandled, LedgerError) as error:
        print(type(error).__name__)
    await ledger.close()

asyncio.run(main(sys.argv[1], sys.argv[2] == "inside"))
"""


async def prepared(url: str) -> Ledger:
    """The ledger of the process that handles the message in the zombie's place."""
    ledger = Ledger(url, app="shop", owner="successor", lock_seconds=2.0)
    await ledger.migrate()
    async with ledger.transaction() as tx:
        await tx.session.execute(text("CREATE TABLE effects (name varchar(20))"))
    return ledger


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"


@contextlib.asynccontextmanager
async def stopped(url: str, where: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that is stopped inside its handler, before or inside its transaction."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", HANDLER, url, where, stdin=pipe, stdout=pipe
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"at work\n"
        process.send_signal(signal.SIGSTOP)
        # Only its parent is told when it has stopped.
        await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def woken(process: asyncio.subprocess.Process) -> str:
    """What it says when it goes on."""
    process.send_signal(signal.SIGCONT)
    said, _ = await process.communicate(b"go on\n")
    return said.decode().strip()


async def handle(ledger: Ledger) -> None:
    async with ledger.transaction(inbox=("w", "m")) as tx:
        await tx.session.execute(text(ADD), {"name": "successor"})


async def effects(ledger: Ledger) -> list[str]:
    async with ledger.session() as session:
        return list((await session.execute(text("SELECT name FROM effects"))).scalars())


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_one_that_wakes_before_its_transaction_is_unwound(
    request: pytest.FixtureRequest, sqlite_url: str, database: str
) -> None:
    url = sqlite_url if database == "sqlite" else request.getfixturevalue("postgres").url()
    ledger = await prepared(url)
    async with stopped(url, "before") as zombie:
        await handle(ledger)
        assert await woken(zombie) == "AlreadyHandled"
    assert await effects(ledger) == ["successor"]
    await ledger.close()


async def test_one_that_sleeps_inside_its_transaction_is_cut_off_by_postgresql(postgres: Postgres) -> None:
    url = postgres.url()
    ledger = await prepared(url)
    async with stopped(url, "inside") as zombie:
        await handle(ledger)  # waits until PostgreSQL has ended the zombie's transaction
        assert await woken(zombie) == "LedgerBusy"
    assert await effects(ledger) == ["successor"]
    await ledger.close()


async def test_one_that_sleeps_inside_its_transaction_blocks_sqlite_until_it_is_killed(sqlite_url: str) -> None:
    ledger = await prepared(sqlite_url)
    async with stopped(sqlite_url, "inside") as zombie:
        with pytest.raises(LedgerBusy):
            await handle(ledger)
        assert await effects(ledger) == [], "readers go on"
        zombie.kill()
        await handle(ledger)
    assert await effects(ledger) == ["successor"]
    await ledger.close()
