"""``conveyor queues pause`` and ``resume``, on real runners; and Conveyor's own queues, which operators see only when they ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import pytest

from conveyor import Conveyor
from conveyor.broker import Broker, Queue
from conveyor.brokers.memory import MemoryBroker
from conveyor.brokers.sqlite import SqliteBroker
from conveyor.cli.queues import _turn, as_json
from conveyor.cli.terminal import Output
from conveyor.core.pause import Switch
from conveyor.runtime.control import CONTROL, Control, Operator, Status, paused_queues

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ
    from tests.cli.conftest import Program

PATIENCE_SECONDS: Final = 60.0
HERE: Final = ("--broker", "sqlite:///shop.queue")


@contextlib.contextmanager
def running(conveyor: Program, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The shop's workers at work."""
    command = conveyor.command("run", "shop", *arguments, "--json")
    with (
        (conveyor.folder / "log").open("ab") as log,
        subprocess.Popen(command, cwd=conveyor.folder, env=conveyor.environment, stdout=log, stderr=log) as program,
    ):
        try:
            yield program
        finally:
            program.terminate()
            try:
                program.wait(PATIENCE_SECONDS)
            finally:
                program.kill()


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await asyncio.to_thread(true):
            await asyncio.sleep(0.1)


async def ready(conveyor: Program, processes: int = 1) -> None:
    """Wait until so many processes are."""
    log = conveyor.folder / "log"
    await until(lambda: log.read_text().count("shop is ready") >= processes)


def order(conveyor: Program, name: str, *where: str) -> None:
    conveyor.ok("publish", "shop", "OrderCreated", "--data", json.dumps({"order_id": name, "total": "1"}), *where)


def shipped(conveyor: Program) -> list[str]:
    file = conveyor.folder / "shipped"
    return file.read_text().split() if file.exists() else []


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_SECONDS) as answer:
        return str(answer.read().decode())


@contextlib.asynccontextmanager
async def opened() -> AsyncIterator[Broker]:
    broker = MemoryBroker()
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


def queues(conveyor: Program, *arguments: str) -> dict[str, Any]:
    return {queue["name"]: queue for queue in conveyor.json("queues", *arguments, *HERE)["queues"]}


async def test_what_is_published_into_a_paused_queue_waits_until_it_is_resumed(conveyor: Program) -> None:
    with running(conveyor, "--processes", "2"):
        await ready(conveyor, 2)
        told = conveyor.json("queues", "pause", "shop.charge", "shop.ship", *HERE)
        assert (told["paused"], told["runners"], len(told["working"]["shop.ship"])) == (True, 2, 2)
        order(conveyor, "A-1")
        assert conveyor.ok("queues", "pause", "shop.ship", *HERE) == "shop.ship is paused: 2 runners\n"
        assert queues(conveyor)["shop.charge"]["ready"] == 1
        assert conveyor.ok("queues", "resume", "shop.charge", *HERE) == "shop.charge is going on: 2 runners\n"
        await until(lambda: queues(conveyor)["shop.ship"]["ready"] == 1)
        assert shipped(conveyor) == []
        conveyor.ok("queues", "resume", "shop.ship", *HERE)
        await until(lambda: shipped(conveyor) == ["A-1"])


async def test_the_list_of_queues_says_which_are_paused(conveyor: Program) -> None:
    def paused() -> dict[str, bool]:
        return {name: queue["paused"] for name, queue in queues(conveyor).items()}

    with running(conveyor):
        await ready(conveyor)
        conveyor.ok("queues", "pause", "shop.charge", *HERE)
        assert paused() == {"shop.charge": True, "shop.resize": False, "shop.ship": False}
        shown = conveyor.ok("queues", *HERE)
        assert "shop.charge (paused)" in shown
        assert shown.count("paused") == 1
        conveyor.ok("queues", "resume", "shop.charge", *HERE)
        assert not any(paused().values())
        conveyor.ok("queues", "pause", "shop.charge", *HERE)
    assert not any(paused().values())  # the pause has gone with the runners


async def test_a_pause_that_only_a_journal_s_keeper_knows_is_listed() -> None:
    async with opened() as broker:
        control = Control(broker, switches={"shop.charge": Switch(1, True), "shop.ship": Switch(2, False)})
        await control.start()
        try:
            assert await paused_queues(broker) == frozenset({"shop.charge"})
        finally:
            await control.close()
        assert await paused_queues(broker) == frozenset()
        assert await broker.queues() == []


async def test_where_nobody_answers_it_is_not_known_what_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conveyor.runtime.control.PAUSES_SECONDS", 0.05)
    async with opened() as broker:
        await broker.declare([Queue(name="conveyor.control.deaf", topics=(CONTROL,), temporary=True)])
        assert await paused_queues(broker) is None
        [queue] = as_json("memory://", await broker.queues(), None)["queues"]
        assert (queue["name"], queue["paused"]) == ("conveyor.control.deaf", None)


async def test_a_pause_outlives_the_only_process_that_works_because_its_supervisor_knows_it(
    conveyor: Program, free_port: int
) -> None:
    with running(conveyor, "--http", f"127.0.0.1:{free_port}"):
        await ready(conveyor)
        told = conveyor.json("queues", "pause", "shop.charge", *HERE)
        [process] = told["working"]["shop.charge"]
        assert process["process"] == f"{socket.gethostname()}/1"
        note = "worker charge: its queue shop.charge is paused"
        await until(lambda: note in get(free_port, "/readyz"))
        assert json.loads(get(free_port, "/readyz"))["ready"] is True
        os.kill(process["pid"], signal.SIGKILL)
        order(conveyor, "A-1")
        await ready(conveyor, 2)
        told = conveyor.json("queues", "pause", "shop.ship", *HERE)
        assert told["working"]["shop.ship"] != [process]
        assert queues(conveyor)["shop.charge"]["ready"] == 1
        conveyor.ok("queues", "resume", "shop.charge", "shop.ship", *HERE)
        await until(lambda: shipped(conveyor) == ["A-1"])


async def test_a_pause_on_rabbitmq_reaches_a_runner_that_starts_later(conveyor: Program, rabbitmq: RabbitMQ) -> None:
    url = rabbitmq.url()
    where = ("--broker", url)
    with running(conveyor, *where):
        await ready(conveyor)
        conveyor.ok("queues", "pause", "shop.charge", *where)
        with running(conveyor, *where):
            await ready(conveyor, 2)
            order(conveyor, "A-1", *where)
            told = conveyor.json("queues", "pause", "shop.charge", *where)
            assert len(told["working"]["shop.charge"]) == 2
            [charge] = [q for q in conveyor.json("queues", *where)["queues"] if q["name"] == "shop.charge"]
            assert charge["ready"] == 1
            conveyor.ok("queues", "resume", "shop.charge", *where)
            await until(lambda: shipped(conveyor) == ["A-1"])


def test_without_a_runner_there_is_nobody_to_keep_a_pause(conveyor: Program) -> None:
    conveyor.declare(Queue(name="shop.charge", topics=("order.created",)))
    assert "no runner answers" in conveyor.refused("queues", "pause", "shop.charge", *HERE, code=1)
    told = conveyor.json("queues", "resume", "shop.charge", *HERE, code=1)
    assert (told["runners"], told["working"]) == (0, {"shop.charge": []})


async def test_runners_that_were_told_and_have_not_confirmed_it_yet_are_named(
    conveyor: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(conveyor.folder)
    broker = SqliteBroker(conveyor.folder / "shop.queue")
    await broker.open()
    app = Conveyor("shop", broker=broker)
    app.switches = {}

    @app.worker(topic="order.created")
    async def charge(order: dict[str, str]) -> None: ...

    hear_all = Operator.hear_all
    try:
        async with app.running() as runner:
            for late, also_json in ((True, False), (True, True), (False, False)):
                told = False

                async def impatient(self: Operator, late: bool = late) -> list[Status]:
                    nonlocal told
                    found = [] if told and late else await hear_all(self)
                    told = True
                    return found

                monkeypatch.setattr(Operator, "hear_all", impatient)
                output = Output(json=also_json)
                assert await _turn("sqlite:///shop.queue", ["shop.charge"], output, paused=True) == 0
                said = capsys.readouterr()
                me = {"process": f"{socket.gethostname()}/{os.getpid()}", "pid": os.getpid()}
                if also_json:
                    assert json.loads(said.out)["unconfirmed"] == [me]
                elif late:
                    assert said.out == "shop.charge is paused: 0 runners\n"
                    name = f"{me['process']} (pid {me['pid']})"
                    assert f"told, and not confirmed yet: {name}" in " ".join(said.err.split())
                else:
                    assert (said.out, said.err) == ("shop.charge is paused: 1 runner\n", "")
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not runner.consumers["charge"].paused:
                    await asyncio.sleep(0.01)
    finally:
        await broker.close()


def test_a_queue_that_is_paused_has_to_exist(conveyor: Program) -> None:
    conveyor.declare(Queue(name="shop.charge"), Queue(name="conveyor.charged"))
    assert "did you mean shop.charge?" in conveyor.refused("queues", "pause", "shop.chrge", *HERE, code=1)
    assert "which queue?" in conveyor.refused("queues", "pause", *HERE)


async def test_what_is_conveyor_s_own_is_listed_only_where_it_is_asked_for(conveyor: Program, free_port: int) -> None:
    with running(conveyor, "--http", f"127.0.0.1:{free_port}"):
        await ready(conveyor)
        own = [name for name in queues(conveyor, "--all") if name.startswith("conveyor.control.")]
        assert len(own) == 1
        assert set(queues(conveyor)) == {"shop.charge", "shop.resize", "shop.ship"}
        assert own[0] not in get(free_port, "/metrics")
    assert not any(name.startswith("conveyor.control.") for name in queues(conveyor, "--all"))


def test_what_is_conveyor_s_own_is_not_moved(conveyor: Program) -> None:
    conveyor.declare(Queue(name="shop.charge"), Queue(name="conveyor.own"))
    where = ("--from", "sqlite:///shop.queue", "--to", "sqlite:///new.queue")
    assert [each["name"] for each in conveyor.json("move", *where)["queues"]] == ["shop.charge"]
    assert "Conveyor's own" in conveyor.refused("move", *where, "--queue", "conveyor.own", code=1)
