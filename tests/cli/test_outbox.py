"""Operators see what the broker refuses to take out of an app's database, and have it sent again or deleted."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from conveyor import Conveyor
from conveyor.core.message import Message
from conveyor.runtime.outbox import NEVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conveyor.runtime.outbox import Pending
    from tests.cli.conftest import Program


def park(conveyor: Program, app: str, *, parked: Sequence[Message], waiting: Sequence[Message] = ()) -> None:
    """Put messages into the outbox of the folder's database, some of which the broker has refused for good."""

    async def go() -> None:
        ledger = Conveyor(app, database=url(conveyor)).new_ledger("x")
        assert ledger is not None
        await ledger.migrate()
        async with ledger.transaction() as tx:
            tx.add([*parked, *waiting])
        for row in (await ledger.claim(100, 60.0)).rows:
            if row.message in parked:
                await ledger.put_off(row.seq, "PayloadError: far too\nlarge \x1b[31m", NEVER)
            else:
                await ledger.release([row.seq])
        await ledger.close()

    asyncio.run(go())


def pending(conveyor: Program, app: str = "shop") -> Pending:
    async def go() -> Pending:
        ledger = Conveyor(app, database=url(conveyor)).new_ledger("x")
        assert ledger is not None
        found = await ledger.pending()
        await ledger.close()
        return found

    return asyncio.run(go())


def url(conveyor: Program) -> str:
    return f"sqlite+aiosqlite:///{conveyor.folder / 'shop.db'}"


A, B, C = (Message(f"id-{name}", "order.created", b'{"a": "\xff"}', key=name, created=1e9) for name in "ABC")


@pytest.fixture
def stalled(conveyor: Program) -> Program:
    """Two events are parked, one waits."""
    conveyor.environment["CONVEYOR_DATABASE"] = url(conveyor)
    park(conveyor, "shop", parked=[A, B], waiting=[C])
    return conveyor


def test_parked_events_are_listed_with_what_the_broker_said(stalled: Program) -> None:
    listed = stalled.json("outbox", "list", "shop:app")
    assert [(row["id"], row["topic"], row["key"], row["refusals"]) for row in listed["parked"]] == [
        ("id-A", "order.created", "A", 1),
        ("id-B", "order.created", "B", 1),
    ]
    assert listed["parked"][0]["payload"] == '{"a": "\\xff"}'
    assert (listed["more"], listed["waiting"]) == (False, 1)
    assert stalled.json("outbox", "list", "shop", "--limit", "1")["more"] is True
    shown = stalled.ok("outbox", "list", "shop")
    assert "id-A  order.created, key A  refusals: 1" in shown
    assert "PayloadError: far too large" in shown
    assert "\x1b" not in shown
    assert "2 parked, 1 waiting" in shown


def test_an_event_that_is_retried_waits_for_the_relay_again(stalled: Program) -> None:
    assert stalled.json("outbox", "retry", "shop", "--id", "id-A") == {"matched": 1, "retried": 1}
    assert (pending(stalled).rows, pending(stalled).parked) == (3, 1)
    assert "1 of 1 retried" in stalled.ok("outbox", "retry", "shop", "--all")
    assert (pending(stalled).rows, pending(stalled).parked) == (3, 0)
    assert stalled.json("outbox", "retry", "shop", "--all") == {"matched": 0, "retried": 0}


def test_several_ids_may_be_named(stalled: Program) -> None:
    assert stalled.json("outbox", "retry", "shop", "--id", "id-A", "--id", "id-B") == {"matched": 2, "retried": 2}


def test_only_parked_events_can_be_discarded_and_not_by_accident(stalled: Program) -> None:
    assert "--yes" in stalled.refused("outbox", "discard", "shop", "--all")
    assert stalled.json("outbox", "discard", "shop", "--id", "id-C", "--yes", code=1) == {"matched": 1, "discarded": 0}
    assert pending(stalled).rows == 3
    assert stalled.json("outbox", "discard", "shop", "--id", "id-B", "--yes") == {"matched": 1, "discarded": 1}
    assert stalled.json("outbox", "discard", "shop", "--all", "--yes") == {"matched": 1, "discarded": 1}
    assert (pending(stalled).rows, pending(stalled).parked) == (1, 0)


def test_the_outbox_of_another_app_in_the_same_database_is_left_alone(stalled: Program) -> None:
    park(stalled, "billing", parked=[Message("id-A", "order.created", b"1"), Message("id-Z", "paid", b"1")])
    assert stalled.json("outbox", "discard", "shop", "--id", "id-Z", "--yes", code=1)["discarded"] == 0
    assert stalled.json("outbox", "discard", "shop", "--all", "--yes") == {"matched": 2, "discarded": 2}
    assert pending(stalled, "billing").parked == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["retry", "shop"], "retry what?"),
        (["discard", "shop", "--yes"], "discard what?"),
        (["retry", "shop", "--all", "--id", "x"], "leave it out"),
        (["list", "shop"], "has no database"),
    ],
)
def test_what_cannot_be_meant_is_refused(conveyor: Program, arguments: list[str], said: str) -> None:
    assert said in conveyor.refused("outbox", *arguments)


def test_a_database_without_tables_is_told_how_to_get_them(conveyor: Program) -> None:
    assert "conveyor migrate" in conveyor.refused("outbox", "list", "shop", "--database", url(conveyor), code=1)


async def test_what_is_retried_is_sent_by_running_workers(conveyor: Program) -> None:
    conveyor.environment["CONVEYOR_DATABASE"] = url(conveyor)
    body = json.dumps({"order_id": "A-1"}).encode()
    await asyncio.to_thread(park, conveyor, "shop", parked=[Message("id-P", "payment_processed", body)])
    await asyncio.to_thread(conveyor.ok, "outbox", "retry", "shop", "--all")
    program = await asyncio.create_subprocess_exec(
        *conveyor.command("run", "shop"), cwd=conveyor.folder, env=conveyor.environment
    )
    try:
        async with asyncio.timeout(60):
            while not (conveyor.folder / "shipped").exists():
                await asyncio.sleep(0.05)
    finally:
        program.terminate()
        await program.wait()
