"""Messages that hurt whoever handles them end as dead letters that say why; their neighbours are handled, and the program lives."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Final

import pytest

from conveyor import Conveyor, PayloadError, RetryPolicy
from conveyor.broker import DeadFilter, DeadLetter
from tests.faults.conftest import World

if TYPE_CHECKING:
    from pathlib import Path

    from conveyor.broker import Broker
    from servers.rabbitmq import RabbitMQ
    from servers.redis import Redis
    from tests.faults.conftest import Dead, Eventually, Program

NEIGHBOURS: Final = 12
MANY: Final = 25
"""Neighbours in each of several parts."""
LIMITS: Final = ("--hang-limit=3", "--max-rss=300")
TOPICS: Final = {"swallow": "dose", "swallow_in_thread": "thread_dose", "swallow_elsewhere": "cpu_dose"}
DEEP: Final = b'{"kind": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HUGE: Final = b'{"kind": [' + b",".join([b'"0123456789"'] * 800_000) + b"]}"
"""Ten megabytes."""
NO_TEXT: Final = b'{"kind": "\xff\xfe"}'


def dose(kind: str) -> bytes:
    return json.dumps({"kind": kind}).encode()


async def poisoned(world: World, topic: str, *bodies: bytes) -> Program:
    """A program at work, its queue prepared: poison first, then neighbours."""
    program = world.run("poison", *LIMITS)
    await world.ready(program)
    fine = [b"{}" if topic == "plain" else dose(f"fine-{number}") for number in range(NEIGHBOURS)]
    await world.publish(topic, *bodies, *fine)
    return program


async def died(world: World, program: Program, eventually: Eventually, number: int = 1) -> list[Dead]:
    """Wait until all is handled or given up; the dead letters, after a good end of the program."""
    await eventually(lambda: not world.waiting and len(world.dead) == number, program.said)
    await program.stop()
    return world.dead


@pytest.mark.parametrize(
    ("worker", "kind", "why"),
    [
        ("swallow", "exit", "exit code 7"),
        ("swallow", "segfault", "killed by SIGSEGV"),
        ("swallow", "loop", "made no sign of life for 3 s: its event loop is blocked"),
        ("swallow", "memory", "over --max-rss 300 MB"),
        ("swallow_in_thread", "exit", "exit code 7"),
        ("swallow_in_thread", "segfault", "killed by SIGSEGV"),
    ],
)
async def test_a_message_that_kills_its_process_becomes_a_dead_letter_that_says_how(
    worker: str, kind: str, why: str, world: World, eventually: Eventually
) -> None:
    program = await poisoned(world, TOPICS[worker], dose(kind))
    [letter] = await died(world, program, eventually)
    assert (letter.queue, letter.reason, letter.body) == (f"poison.{worker}", "crashed", dose(kind))
    assert letter.error.startswith("3 deliveries of it ended without a word: the process died, lost its connection ")
    assert why in letter.error
    assert {f"fine-{number}" for number in range(NEIGHBOURS)} == set(world.lines("handled"))


@pytest.mark.parametrize("broker", ["rabbitmq-quorum", "rabbitmq-classic", "redis"])
@pytest.mark.parametrize("kind", ["exit", "segfault"])
async def test_on_a_server_too_a_message_that_kills_its_process_becomes_a_dead_letter_and_its_neighbours_are_handled(
    broker: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest, eventually: Eventually
) -> None:
    world = await asyncio.to_thread(world_on, broker, tmp_path, request)
    try:
        program = world.run("poison", *LIMITS)
        await eventually(lambda: "poison is ready" in program.said(), program.said)
        neighbours = [f"fine-{number}" for number in range(NEIGHBOURS)]
        [poison, *_] = await world.publish("dose", dose(kind), *map(dose, neighbours))

        async with world.broker() as there:

            async def letters() -> list[DeadLetter]:
                return await there.dead_letters(DeadFilter(), limit=10)

            letter, *_ = await eventually(letters, program.said)
            assert (letter.message.id, letter.queue, letter.reason) == (poison, "poison.swallow", "crashed")
            assert letter.message.body == dose(kind)
            await eventually(lambda: set(world.lines("handled")) == set(neighbours), program.said)
            await eventually(lambda: nothing_waits(there), program.said)
            await program.stop()
            assert await world.unsettled() == 0
            assert {letter.message.id for letter in await letters()} == {poison}
    finally:
        world.close()


@pytest.mark.parametrize(
    ("worker", "kind", "why"),
    [
        ("swallow", "sys.exit", "SystemExit: 3"),
        ("swallow_in_thread", "sys.exit", "the handler raised SystemExit(3)"),
        ("swallow_in_thread", "loop", "HandlerTimeout: no end after 0.5 s"),
        (
            "swallow_elsewhere",
            "exit",
            "poison:swallow_elsewhere died: exit code 7",
        ),
        ("swallow_elsewhere", "segfault", "died: killed by SIGSEGV"),
        ("swallow_elsewhere", "memory", "MB, over 300 MB"),
        ("swallow_elsewhere", "sys.exit", "raised SystemExit: 3"),
    ],
)
async def test_a_message_that_hurts_only_its_own_attempt_leaves_the_process_alone(
    worker: str, kind: str, why: str, world: World, eventually: Eventually
) -> None:
    program = await poisoned(world, TOPICS[worker], dose(kind))
    [runner] = program.runners
    [letter] = await died(world, program, eventually)
    assert (letter.queue, letter.reason) == (f"poison.{worker}", "exhausted")
    assert why in letter.error
    assert [f"fine-{number}" for number in range(NEIGHBOURS)] == sorted(
        world.lines("handled"), key=lambda line: int(line.removeprefix("fine-"))
    )
    assert f"process 1 (pid {runner.pid}) ended in order" in program.said()
    assert "died after" not in program.said()


@pytest.mark.parametrize("topic", ["dose", "cpu_dose", "plain"])
async def test_what_cannot_be_read_becomes_a_dead_letter_whole(
    topic: str, world: World, eventually: Eventually
) -> None:
    bad = {"deep": DEEP, "no text": NO_TEXT, "no JSON": b'{"kind": ', "empty": b"", "huge": HUGE}
    if topic == "plain":
        del bad["huge"]  # a dict may be as large as it likes, once somebody else has published it
    program = await poisoned(world, topic, *bad.values())
    [runner] = program.runners
    letters = await died(world, program, eventually, len(bad))
    assert sorted(letter.body for letter in letters) == sorted(bad.values())
    assert {letter.reason for letter in letters} == {"invalid"}
    assert all(letter.error and len(letter.error) < 5000 for letter in letters)
    assert len(world.lines("handled")) == NEIGHBOURS
    assert f"process 1 (pid {runner.pid}) ended in order" in program.said()


async def test_all_poisons_at_once_take_nobody_else_with_them(world: World, eventually: Eventually) -> None:
    program = world.run("poison", *LIMITS, "--processes=2", CRASHES=str(RetryPolicy().crashes))
    await world.ready(program, 2)
    poisons = [
        ("dose", "exit"),
        ("thread_dose", "segfault"),
        ("dose", "loop"),
        ("dose", "memory"),
        ("dose", "sys.exit"),
    ]
    poisons += [("thread_dose", "loop"), ("cpu_dose", "exit")]
    expected = {id for topic, kind in poisons for id in await world.publish(topic, dose(kind))}
    for topic in TOPICS.values():
        await world.publish(topic, *(dose(f"{topic}-{number}") for number in range(NEIGHBOURS)))
    letters = await died(world, program, eventually, len(poisons))
    assert {letter.id for letter in letters} == expected
    assert {letter.reason for letter in letters} == {"crashed", "exhausted"}
    fine = {f"{topic}-{number}" for topic in TOPICS.values() for number in range(NEIGHBOURS)}
    assert set(world.lines("handled")) == fine


@pytest.mark.parametrize("broker", ["sqlite", "rabbitmq-quorum", "rabbitmq-classic", "redis"])
async def test_two_that_kill_at_once_are_given_up_and_none_of_many_neighbours_is(
    broker: str, tmp_path: Path, request: pytest.FixtureRequest, eventually: Eventually
) -> None:
    world = await asyncio.to_thread(world_on, broker, tmp_path, request)
    try:
        program = world.run("poison", *LIMITS, "--processes=2", CRASHES=str(RetryPolicy().crashes))
        await eventually(lambda: "poison is ready" in program.said(), program.said)
        poisons: set[str] = set()
        neighbours: set[str] = set()
        # Each kills beside others twice: so two of them charge nobody else more often than the default policy has room for.
        for part in range(4):  # one for each worker, among many
            for topic in ("dose", "thread_dose"):
                fine = [f"{topic}-{part}-{number}" for number in range(MANY)]
                if part == 0:
                    poisons.update(await world.publish(topic, dose("exit")))
                await world.publish(topic, *map(dose, fine))
                neighbours.update(fine)

        async with world.broker() as there:

            async def given_up() -> set[str]:  # one may be there twice: who writes it may be killed in the midst of it
                return {letter.message.id for letter in await there.dead_letters(DeadFilter(), limit=100)}

            async def all_given_up() -> bool:
                return await given_up() >= poisons

            await eventually(all_given_up, program.said)
            await eventually(lambda: set(world.lines("handled")) == neighbours, program.said)
            await eventually(lambda: nothing_waits(there), program.said)
            await program.stop()
            assert await world.unsettled() == 0
            assert await given_up() == poisons
        alone = Counter(
            said["message"].split()[1] for said in program.entries() if "is run alone" in said.get("message", "")
        )
        copies = (
            2 if broker.startswith("rabbitmq") else 1
        )  # a death in the midst of moving one leaves two, each of which is counted
        assert all(alone[each] <= copies * (RetryPolicy().crashes - 2) for each in poisons), alone
    finally:
        world.close()


async def nothing_waits(broker: Broker) -> bool:
    """Whether all is handled: of what a death met while it was moved, two may be there."""
    return not any(queue.ready or queue.delayed for queue in await broker.queues() if not queue.temporary)


def world_on(broker: str, folder: Path, request: pytest.FixtureRequest) -> World:
    """A world on a broker of this kind."""
    name, _, queue_type = broker.partition("-")
    if name == "sqlite":
        return World(folder)
    server: RabbitMQ | Redis = request.getfixturevalue(name)
    url = server.url()
    return World(folder, broker=f"{url}?queue_type={queue_type}" if queue_type else url)


@pytest.mark.parametrize("body", [DEEP, NO_TEXT, HUGE], ids=["deep", "no text", "huge"])
async def test_the_command_line_refuses_to_publish_it(body: bytes, world: World) -> None:
    for named in ("Dose", "plain"):
        done = subprocess.run(
            [sys.executable, "-m", "conveyor", "publish", world.full_name(".poison:app"), named, "--data", "-"],
            cwd=world.folder,
            env=world.environment,
            input=body,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert b"--data" in done.stderr or b"body" in done.stderr or b"payload" in done.stderr
        assert b"Traceback" not in done.stderr
        assert len(done.stderr) < 5000


async def test_the_application_refuses_to_publish_it(world: World) -> None:
    deep: object = []
    for _ in range(100_000):
        deep = [deep]
    app = Conveyor("refusing", broker=f"sqlite:///{world.queue_file}")
    async with app:
        for bad in ({"kind": deep}, {"kind": "\udcff"}, {"kind": "0123456789" * 1_000_000}):
            with pytest.raises(PayloadError):
                await app.publish(bad, topic="plain")
    assert not world.waiting
