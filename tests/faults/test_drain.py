"""SIGTERM under load: a good end within the grace period, and no message is the worse for it."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest

from tests.faults.conftest import World

if TYPE_CHECKING:
    from pathlib import Path

    from servers.rabbitmq import RabbitMQ
    from servers.redis import Redis
    from tests.faults.conftest import Eventually

PARTS: Final = 5
ROUNDS: Final = 10
"""In each part; fifty in all."""
LOAD: Final = 200
"""Messages of each quick kind that are added for every round: more than one handles before it is ended."""
QUICK: Final = ("quick", "quick_in_thread", "lingering")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
async def test_sigterm_under_load_ends_in_order_and_nothing_that_went_back_is_counted(
    part: int, world: World, eventually: Eventually
) -> None:
    published = dict.fromkeys(QUICK, 0)
    for round_ in range(ROUNDS):
        processes = 1 + round_ % 2
        files = ("begun", "handled")
        before = [len(world.lines(file)) for file in files]
        program = world.run("steady", f"--processes={processes}")
        await world.ready(program, processes)
        for kind in QUICK:
            first, last = published[kind], published[kind] + (4 if kind == "lingering" else LOAD)
            await world.publish(kind, *numbered(first, last))
            published[kind] = last
        await eventually(partial(grown, world, files, before), program.said)

        program.send(signal.SIGTERM)
        assert await program.ended() == 0, program.said()

        assert program.said().count("ended in order") == processes, program.said()
        assert {(each.state, each.deliveries, each.attempts) for each in world.waiting} <= {(0, 0, 0)}
        assert not world.repeated("handled")
    program = world.run("steady")
    await eventually(lambda: world.subscribed and not world.waiting, program.said)
    await program.stop()
    expected = [f"{kind}-{number}" for kind in QUICK for number in range(published[kind])]
    assert sorted(world.lines("handled")) == sorted(expected)
    assert not world.dead


async def test_what_outlasts_the_grace_period_is_cut_and_goes_back_uncounted(
    world: World, eventually: Eventually
) -> None:
    for round_ in range(3):
        before = len(world.lines("begun"))
        program = world.run("steady", "--grace=0.3", "--workers=slow,quick_in_thread")
        await world.ready(program)
        if round_ == 0:
            await world.publish("slow", *numbered(0, 3))
        await world.publish("quick_in_thread", *numbered(round_ * LOAD, round_ * LOAD + LOAD))
        await eventually(partial(grown, world, ["begun"], [before + 1]), program.said)

        program.send(signal.SIGTERM)
        assert await program.ended() == 1, program.said()

        slow = [each for each in world.waiting if each.queue == "steady.slow"]
        assert len(slow) == 3
        assert {(each.state, each.deliveries, each.attempts) for each in world.waiting} == {(0, 0, 0)}
    (world.folder / "release").touch()
    program = world.run("steady")
    await eventually(lambda: world.subscribed and not world.waiting, program.said)
    await program.stop()
    handled = Counter(world.lines("handled"))
    assert set(handled) == {f"quick_in_thread-{number}" for number in range(3 * LOAD)} | {"slow-0", "slow-1", "slow-2"}
    assert [handled[f"slow-{number}"] for number in range(3)] == [1, 1, 1]
    # What the cut meets between its effect and its end comes again: of the four threads, on a machine that was very slow.
    assert handled.total() - len(handled) <= 3 * 4
    assert not world.dead


async def test_what_was_given_up_and_runs_on_cannot_keep_a_process_from_ending(
    world: World, eventually: Eventually
) -> None:
    program = world.run("steady", "--hang-limit=600", DEAF_SECONDS="0.3")
    await world.ready(program)
    await world.publish("deaf", *numbered(0, 1))
    await world.publish("lost", *numbered(0, 1))
    await eventually(lambda: len(world.dead) == 2, program.said)
    program.send(signal.SIGTERM)
    assert await program.ended() == 0, program.said()
    assert program.said().count("ended in order") == 1
    assert ["HandlerTimeout" in letter.error for letter in world.dead] == [True, True]


async def test_what_swallows_its_cancellation_at_the_end_goes_back_uncounted(
    world: World, eventually: Eventually
) -> None:
    program = world.run("steady", "--hang-limit=600", "--grace=0.3")
    await world.ready(program)
    await world.publish("deaf", *numbered(0, 2))
    await eventually(lambda: len(world.lines("begun")) == 1, program.said)
    program.send(signal.SIGTERM)
    assert await program.ended() == 1, program.said()
    assert "did not drain" not in program.said()
    assert [(each.state, each.deliveries, each.attempts) for each in world.waiting] == [(0, 0, 0)] * 2


@pytest.mark.parametrize(("grace", "at_work"), [("0", False), ("5", True)], ids=["idle", "at work"])
@pytest.mark.parametrize("kind", ["rabbitmq", "redis"])
async def test_sigterm_while_the_server_is_silent_ends_in_time_and_without_being_killed(
    kind: str, grace: str, at_work: bool, tmp_path: Path, request: pytest.FixtureRequest, eventually: Eventually
) -> None:
    server: RabbitMQ | Redis = request.getfixturevalue(kind)
    world = World(tmp_path, broker=await asyncio.to_thread(server.url))
    try:
        program = world.run("steady", f"--grace={grace}", "--workers=lingering,slow,quick")
        await eventually(lambda: "steady is ready" in program.said(), program.said)
        if at_work:
            await world.publish("slow", *numbered(0, 2))
            await eventually(lambda: len(world.lines("begun")) == 2, program.said)
        server.pause()
        (tmp_path / "release").touch()
        if at_work:
            await eventually(lambda: len(world.lines("handled")) == 2, program.said)
        program.send(signal.SIGTERM)
        assert await program.ended() == 0, program.said()
        assert program.said().count("ended in order") == 1
        assert "left without a word" in program.said()
    finally:
        server.resume()
        world.close()


@pytest.mark.parametrize("grace", ["0", "0.5"])
@pytest.mark.parametrize("kind", ["rabbitmq", "redis"])
async def test_what_a_short_grace_cuts_while_the_server_is_silent_is_handled_when_it_is_back(
    kind: str, grace: str, tmp_path: Path, request: pytest.FixtureRequest, eventually: Eventually
) -> None:
    server: RabbitMQ | Redis = request.getfixturevalue(kind)
    world = World(tmp_path, broker=await asyncio.to_thread(server.url))
    world.environment["LEASE_SECONDS"] = "10"  # what nobody could give back comes by its end
    try:
        program = world.run("steady", f"--grace={grace}", "--workers=slow")
        await eventually(lambda: "steady is ready" in program.said(), program.said)
        await world.publish("slow", *numbered(0, 5))
        await eventually(lambda: len(world.lines("begun")) == 2, program.said)
        server.pause()
        try:
            program.send(signal.SIGTERM)
            assert await program.ended() == 1, program.said()
        finally:
            server.resume()
        assert "exit code 1" in program.said()
        assert "did not drain" not in program.said()
        assert not world.lines("handled")

        (tmp_path / "release").touch()
        program = world.run("steady", "--workers=slow")
        expected = {f"slow-{number}" for number in range(5)}
        await eventually(lambda: set(world.lines("handled")) == expected, program.said)
        await program.stop()
        async with world.broker() as broker:
            [queue] = [each for each in await broker.queues() if each.name == "steady.slow"]
        assert (queue.ready, queue.in_flight, queue.delayed, queue.dead) == (0, 0, 0, 0)
        assert not world.repeated("handled")
    finally:
        world.close()


def grown(world: World, files: Sequence[str], before: Sequence[int]) -> bool:
    """Whether each file has more lines than before."""
    return all(len(world.lines(file)) > number for file, number in zip(files, before, strict=True))


def numbered(first: int, last: int) -> list[bytes]:
    return [json.dumps({"number": number}).encode() for number in range(first, last)]
