"""The supervisor itself is killed: nothing stays behind, nothing is lost, and the next one goes on at once."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.conftest import Eventually, World

QUICK = 200


def numbered(count: int) -> list[bytes]:
    return [json.dumps({"number": number}).encode() for number in range(count)]


async def test_no_process_outlives_its_supervisor_and_a_restart_goes_on(world: World, eventually: Eventually) -> None:
    program = world.run("steady", "--processes=2")
    runners = await world.ready(program, 2)
    await world.publish("slow", *numbered(2))
    await world.publish("grind", *numbered(2))
    await eventually(
        lambda: [kind.split("-")[0] for kind in sorted(world.lines("begun"))].count("grind") >= 1, program.said
    )
    await eventually(lambda: sum(line.startswith("slow") for line in world.lines("begun")) == 2, program.said)
    await world.publish("quick", *numbered(QUICK))
    await world.publish("quick_in_thread", *numbered(QUICK))
    await eventually(lambda: len(world.lines("handled")) > 10, program.said)
    runners[0].send(signal.SIGSTOP)  # one that cannot even notice
    family = program.descendants
    assert len(family) >= 3, "two runners, and a process of the pool"

    program.kill()

    await eventually(lambda: not any(each.alive for each in family), lambda: family)
    assert world.leased >= 3, "leased for an hour"
    (world.folder / "release").touch()
    program = world.run("steady", "--processes=2")
    await eventually(lambda: world.subscribed and not world.waiting, program.said)
    await program.stop()
    expected = {f"{kind}-{number}" for kind in ("quick", "quick_in_thread") for number in range(QUICK)}
    expected |= {f"{kind}-{number}" for kind in ("slow", "grind") for number in range(2)}
    assert set(world.lines("handled")) == expected
    assert not world.dead


async def test_a_runner_that_is_killed_is_replaced_and_what_it_held_comes_back_at_once(
    world: World, eventually: Eventually
) -> None:
    program = world.run("steady", "--processes=2")
    await world.ready(program, 2)
    await world.publish("slow", *numbered(2))
    begun = await eventually(lambda: lines if len(lines := world.lines("begun")) == 2 else [], program.said)
    victim = next(each for each in program.runners if f"slow-{each.pid}" in begun)
    mine = begun.count(f"slow-{victim.pid}")

    victim.send(signal.SIGKILL)

    await eventually(lambda: len(world.lines("begun")) == 2 + mine, program.said)
    assert f"(pid {victim.pid}) died" in program.said()
    (world.folder / "release").touch()
    await eventually(lambda: not world.waiting, program.said)
    await eventually(lambda: len(program.runners) == 2, program.said)
    await program.stop()
    assert sorted(world.lines("handled")) == ["slow-0", "slow-1"]
