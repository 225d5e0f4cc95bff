"""A process that stood still: past its hang limit it is replaced; past its lease it finds that it may no longer settle or commit."""

from __future__ import annotations

import re
import signal
import urllib.request
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from tests.faults.conftest import Eventually, Process, World

ORDER: Final = ("order.placed", b'{"order_id": "A-1"}')
EFFECTS: Final = [("confirm", "A-1"), ("deliver", "A-1")]
LEASE_SECONDS: Final = "1"


@pytest.fixture
async def trade(ledger_world: World) -> World:
    await ledger_world.query("CREATE TABLE effect (worker VARCHAR(20), order_id VARCHAR(20))")
    return ledger_world


def counted(name: str, port: int) -> float:
    """A counter of all workers, as /metrics tells it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    values = [re.fullmatch(rf"conveyor_messages_{name}_total\{{.*\}} (\S+)", line) for line in lines]
    return sum(float(value[1]) for value in values if value)


async def stopped_one(trade: World, eventually: Eventually) -> Process:
    """The process that stopped itself at the point."""
    return await eventually(
        lambda: next((each for program in trade.programs for each in program.runners if each.stopped), None),
        lambda: [program.said() for program in trade.programs],
    )


@pytest.mark.parametrize("point", ["received", "transaction.opening", "committed"])
async def test_one_that_slept_past_its_lease_does_nothing_twice(
    point: str, trade: World, eventually: Eventually, free_port: int
) -> None:
    first = trade.run(
        "trade",
        f"--http=127.0.0.1:{free_port}",
        "--hang-limit=300",
        STOP_AT=point,
        LEASE_SECONDS=LEASE_SECONDS,
        CLAIM_SECONDS="3",
    )
    await trade.ready(first)
    await trade.publish(*ORDER, key="A-1")
    zombie = await stopped_one(trade, eventually)
    second = trade.run("trade", LEASE_SECONDS=LEASE_SECONDS)
    await eventually(lambda: not trade.waiting, second.said)

    async def all_done() -> bool:
        return sorted(await trade.query("SELECT worker, order_id FROM effect")) == EFFECTS

    await eventually(all_done, second.said)
    zombie.send(signal.SIGCONT)
    await eventually(lambda: counted("lost_leases", free_port) >= 1, first.said)
    await first.stop()
    await second.stop()
    assert await all_done()
    assert (trade.waiting, trade.dead, await trade.count("conveyor_outbox")) == ([], [], 0)


async def test_one_that_stands_still_inside_a_transaction_is_killed_and_holds_up_nobody_for_longer(
    trade: World, eventually: Eventually
) -> None:
    program = trade.run("trade", "--processes=2", "--hang-limit=3", STOP_AT="outbox.inserted", CLAIM_SECONDS="3")
    await trade.ready(program, 2)
    await trade.publish(*ORDER, key="A-1")
    zombie = await stopped_one(trade, eventually)
    await eventually(lambda: not zombie.alive, program.said)
    await eventually(lambda: "it is stopped" in program.said(), program.said)

    async def all_done() -> bool:
        return sorted(await trade.query("SELECT worker, order_id FROM effect")) == EFFECTS and not trade.waiting

    await eventually(all_done, program.said)
    await eventually(lambda: len(program.runners) == 2, program.said)
    await program.stop()
    assert await all_done()
    assert (trade.dead, await trade.count("conveyor_outbox")) == ([], 0)


async def test_one_that_is_stopped_past_the_hang_limit_is_replaced_and_its_message_is_handled(
    world: World, eventually: Eventually
) -> None:
    program = world.run("steady", "--hang-limit=2")
    [runner] = await world.ready(program)
    await world.publish("slow", b'{"number": 0}')
    await eventually(lambda: world.lines("begun") == [f"slow-{runner.pid}"], program.said)
    runner.send(signal.SIGSTOP)
    await eventually(lambda: len(world.lines("begun")) == 2, program.said)
    assert not runner.alive
    (world.folder / "release").touch()
    await eventually(lambda: not world.waiting, program.said)
    await program.stop()
    assert world.lines("handled") == ["slow-0"]
    assert f"killing process 1 (pid {runner.pid}): it made no sign of life for 2 s: it is stopped" in program.said()
