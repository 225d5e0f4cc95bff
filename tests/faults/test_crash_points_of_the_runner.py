"""A process dies at each named point of the way of a message; started again, everything has happened once.

The rows of the crash table: P producer, H hand-off, R relay, C consumer.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

import pytest

from conveyor.runtime.points import POINTS

if TYPE_CHECKING:
    from tests.faults.conftest import Eventually, Program, World

ORDER: Final = "A-1"
CLAIM_SECONDS: Final = "3"
"""Shorter than any sensible claim, so that a test need not wait long for the end of a dead process' one."""
BEFORE_COMMIT: Final = ("inbox.inserted", "work.written", "outbox.inserted")
OF_PRODUCER: Final = {
    # the point → what the dead producer left: effects, rows in the outbox, messages in queues
    "transaction.opening": (0, 0, 0),
    "work.written": (0, 0, 0),
    "outbox.inserted": (0, 0, 0),
    "committed": (1, 1, 0),
    "handoff.publishing": (1, 1, 0),
    "handoff.published": (1, 1, 1),
    "handoff.deleted": (1, 0, 1),
}
OF_CONSUMER: Final = {
    # the point → what the dead consumer left: effects, messages in its inbox, rows in the outbox; None where chance decides
    "received": (0, 0, 0),
    "inbox.inserted": (0, 0, 0),
    "work.written": (0, 0, 0),
    "outbox.inserted": (0, 0, 0),
    "committed": (1, 1, 1),
    "settled": (1, 1, None),
    "handoff.publishing": (1, 1, 1),
    "handoff.published": (1, 1, 1),
    "handoff.deleted": (1, 1, 0),
}
OF_RELAY: Final = ("relay.claimed", "relay.published")


def test_every_point_is_hit_by_one_of_these_tests() -> None:
    assert {*OF_PRODUCER, *OF_CONSUMER, *OF_RELAY} == set(POINTS)


@pytest.fixture
async def trade(ledger_world: World) -> World:
    await ledger_world.query("CREATE TABLE effect (worker VARCHAR(20), order_id VARCHAR(20))")
    return ledger_world


@pytest.mark.parametrize("point", OF_PRODUCER)
async def test_a_producer_dies_at(point: str, trade: World, eventually: Eventually) -> None:
    producer = trade.start(".producer", ORDER, CONVEYOR_CRASH=point, CLAIM_SECONDS=CLAIM_SECONDS)
    assert await producer.ended() == -signal.SIGKILL, producer.said()
    left = await trade.count("effect"), await trade.count("conveyor_outbox"), len(trade.waiting)
    assert left == OF_PRODUCER[point]
    program = trade.run("trade", CLAIM_SECONDS=CLAIM_SECONDS)
    if left[0] == 0:  # its caller saw an error, and tries again
        again = trade.start(".producer", ORDER)
        assert await again.ended() == 0, again.said()
    await all_is_well(trade, program, eventually, place=1)


@pytest.mark.parametrize("point", OF_CONSUMER)
async def test_a_consumer_dies_at(point: str, trade: World, eventually: Eventually) -> None:
    supervisor = await armed_runner(trade, point, "--workers", "confirm")
    await trade.publish("order.placed", b'{"order_id": "A-1"}', key=ORDER)
    await death_of_runner(supervisor, eventually)
    effects, inbox, outbox = OF_CONSUMER[point]
    assert (await trade.count("effect"), await trade.count("conveyor_inbox")) == (effects, inbox)
    assert outbox is None or await trade.count("conveyor_outbox") == outbox
    held = [each for each in trade.waiting if each.queue == "trade.confirm"]
    if not effects:
        assert [each.state for each in held] == [1], "it still is the dead process'"
    elif point == "settled":
        assert not held
    supervisor.kill()
    await all_is_well(trade, trade.run("trade", CLAIM_SECONDS=CLAIM_SECONDS), eventually, place=0)


@pytest.mark.parametrize("point", OF_RELAY)
async def test_a_relay_dies_at(point: str, trade: World, eventually: Eventually) -> None:
    supervisor = await armed_runner(trade, point, "--workers", "deliver")
    producer = trade.start(".producer", ORDER, CONVEYOR_CRASH="committed", CLAIM_SECONDS=CLAIM_SECONDS)
    assert await producer.ended() == -signal.SIGKILL, producer.said()
    await death_of_runner(supervisor, eventually)
    assert await trade.count("conveyor_outbox") == 1
    assert len(trade.waiting) == (1 if point == "relay.published" else 0)
    supervisor.kill()
    await all_is_well(trade, trade.run("trade", CLAIM_SECONDS=CLAIM_SECONDS), eventually, place=1)


async def test_what_a_dead_process_had_still_to_hand_off_leaves_at_once(trade: World, eventually: Eventually) -> None:
    dying = trade.run("trade", CONVEYOR_CRASH="handoff.publishing", CLAIM_SECONDS="3600")
    await trade.ready(dying)
    await trade.publish("order.placed", b'{"order_id": "A-1"}', key=ORDER)
    await all_is_well(trade, dying, eventually, place=0)
    assert "killed by SIGKILL" in dying.said()


async def armed_runner(trade: World, point: str, *flags: str) -> Program:
    """A runner that dies at a point; its supervisor is stopped, so that nothing is tidied up behind it."""
    supervisor = trade.run("trade", *flags, CONVEYOR_CRASH=point, CLAIM_SECONDS=CLAIM_SECONDS)
    await trade.ready(supervisor)
    supervisor.send(signal.SIGSTOP)
    return supervisor


async def death_of_runner(supervisor: Program, eventually: Eventually) -> None:
    """Wait until the armed point has killed."""
    [died_of] = [
        child.died_of
        for child in await eventually(lambda: [each for each in supervisor.children if not each.alive], supervisor.said)
    ]
    assert died_of == signal.SIGKILL


async def all_is_well(trade: World, program: Program, eventually: Eventually, *, place: int) -> None:
    """Everything happened once, and nothing is left on the way."""

    async def nothing_is_left() -> bool:
        if trade.waiting or not await trade.query("SELECT 1 FROM effect WHERE worker = 'deliver'"):
            return False
        return await trade.count("conveyor_outbox") == 0 and not trade.waiting

    await eventually(nothing_is_left, program.said)
    await program.stop()
    expected = [("confirm", ORDER), ("deliver", ORDER), *[("place", ORDER)] * place]
    assert sorted(await trade.query("SELECT worker, order_id FROM effect")) == expected
    assert (trade.waiting, trade.dead) == ([], [])
