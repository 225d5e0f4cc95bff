"""The SQLite broker under real faults: processes killed and stopped, a full disk, a damaged file, a power cut's view."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import apsw
import pytest

from conveyor.broker import Delivery, Queue, QueueInfo, Settlement, Subscription
from conveyor.brokers.sqlite import Durability, SqliteBroker, queue_file
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Done
from conveyor.errors import BrokerError, BrokerFull, BrokerUnavailable

LEASE_SECONDS = 1.0
PROCESSES = 4
MESSAGES = 3_000
KILLS = 12
MEGABYTE = 1024 * 1024

CARRIER = """
import asyncio, sys
from conveyor.broker import Settlement
from conveyor.brokers.sqlite import SqliteBroker
from conveyor.core.message import Message, emitted_id
from conveyor.core.settle import Done

async def main():
    broker = SqliteBroker(sys.argv[1])
    await broker.open()
    subscription = await broker.subscribe("in", 50)
    print("ready", flush=True)
    while True:
        held = await subscription.fetch(20)
        await asyncio.sleep(0.002)
        emits = [Message(emitted_id(each.message.id, "carrier", 0), "out", each.message.body) for each in held]
        await broker.settle([Settlement(each, Done((emit,))) for each, emit in zip(held, emits)])

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def opened(path: Path, durability: Durability = "full") -> AsyncIterator[SqliteBroker]:
    broker = SqliteBroker(path, durability=durability)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


def message(name: str, topic: str = "t", size: int = 10) -> Message:
    return Message(name, topic, os.urandom(size))


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str]) -> None:
    with process:  # closes its pipes, waits
        process.kill()


async def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return (await asyncio.to_thread(process.stdout.readline)).strip()


async def take(subscription: Subscription, number: int) -> list[Delivery]:
    taken: list[Delivery] = []
    async with asyncio.timeout(60):
        while len(taken) < number:
            taken += await subscription.fetch(number - len(taken))
    return taken


async def figures(broker: SqliteBroker, queue: str) -> QueueInfo:
    return next(each for each in await broker.queues() if each.name == queue)


# Killed and stopped


@pytest.mark.parametrize("durability", ["full", "normal"])
async def test_random_kills_lose_nothing_and_settle_nothing_twice(tmp_path: Path, durability: Durability) -> None:
    path, chance = tmp_path / "shop.queue", random.Random(7)
    accepted: list[bytes] = []
    async with opened(path, durability) as broker:
        queues = [Queue(name=name, topics=(name,), lease_seconds=LEASE_SECONDS) for name in ("in", "out")]
        await broker.declare(queues)
        processes = [start(CARRIER, path) for _ in range(PROCESSES)]
        try:

            async def publish() -> None:
                for number in range(MESSAGES // 10):
                    batch = [message(f"{number}-{each}", "in") for each in range(10)]
                    await broker.publish(batch)
                    accepted.extend(each.body for each in batch)
                    await asyncio.sleep(0.01)

            publishing = asyncio.create_task(publish())
            for _ in range(KILLS):
                victim = chance.randrange(PROCESSES)
                await line(processes[victim])
                await asyncio.sleep(chance.random() * 0.1)
                end(processes[victim])
                processes[victim] = start(CARRIER, path)
            await publishing
            async with asyncio.timeout(60):
                while (info := await figures(broker, "in")).ready + info.in_flight:
                    await asyncio.sleep(0.05)
        finally:
            for process in processes:
                end(process)
        carried = await take(await broker.subscribe("out", MESSAGES), MESSAGES)
        assert sorted(each.message.body for each in carried) == sorted(accepted)
        assert (await figures(broker, "out")).ready == 0, "something was carried twice"


async def test_who_sleeps_past_its_lease_settles_nothing(tmp_path: Path) -> None:
    path = tmp_path / "shop.queue"
    program = """
import asyncio, os, signal, sys
from conveyor.broker import Settlement
from conveyor.brokers.sqlite import SqliteBroker
from conveyor.core.message import Message
from conveyor.core.settle import Done
async def main():
    broker = SqliteBroker(sys.argv[1])
    await broker.open()
    held = await (await broker.subscribe("in", 1)).fetch(1)
    print("held", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    lost = await broker.extend(held) and await broker.settle([Settlement(held[0], Done((Message("zombie", "out", b""),)))])
    print(lost == held, flush=True)
    await broker.close()
asyncio.run(main())
"""
    async with opened(path) as broker:
        await broker.declare([Queue(name=name, topics=(name,), lease_seconds=LEASE_SECONDS) for name in ("in", "out")])
        await broker.publish([message("1", "in")])
        sleeper = start(program, path)
        assert await line(sleeper) == "held"
        [delivery] = await take(await broker.subscribe("in", 1), 1)
        assert (delivery.deliveries, delivery.crashes) == (2, 1)
        sleeper.send_signal(signal.SIGCONT)
        assert await line(sleeper) == "True"
        await asyncio.to_thread(sleeper.communicate)
        assert await broker.settle([Settlement(delivery, DONE)]) == []
        assert (await figures(broker, "out")).ready == 0


async def test_who_was_stopped_inside_a_write_is_named_and_its_death_frees_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_file, "BUSY_SECONDS", 0.3)
    path = tmp_path / "shop.queue"
    program = """
import apsw, os, signal, sys
db = apsw.Connection(sys.argv[1])
db.execute("BEGIN IMMEDIATE; UPDATE meta SET value = value + 1")
print("stopping", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""
    async with opened(path) as broker:
        await broker.declare([Queue(name="q", topics=("t",))])
        waiting = asyncio.create_task((await broker.subscribe("q", 1)).fetch(1))
        stopped = start(program, path)
        try:
            assert await line(stopped) == "stopping"
            with pytest.raises(BrokerUnavailable, match=f"process {stopped.pid} has held the write lock"):
                await broker.publish([message("1")])
            assert [each.name for each in await broker.queues()] == ["q"], "readers are not held up"
        finally:
            end(stopped)
        await broker.publish([message("2")])
        assert [each.message.id for each in await waiting] == ["2"]


async def test_what_every_process_left_at_its_death_is_there_after_it(tmp_path: Path) -> None:
    path = tmp_path / "shop.queue"
    program = """
import asyncio, os, signal, sys
from conveyor.broker import Queue
from conveyor.brokers.sqlite import SqliteBroker
from conveyor.core.message import Message
async def main():
    broker = SqliteBroker(sys.argv[1], durability="normal")
    await broker.open()
    await broker.declare([Queue(name="q", topics=("t",))])
    await asyncio.gather(*(broker.publish([Message(str(number), "t", b"")]) for number in range(100)))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    await asyncio.to_thread(start(program, path).communicate)
    async with opened(path) as broker:
        received = await take(await broker.subscribe("q", 100), 100)
        assert [each.message.id for each in received] == [str(number) for number in range(100)]


# The disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def publish_until_full(broker: SqliteBroker) -> list[str]:
    accepted: list[str] = []
    for number in range(10_000):
        try:
            await broker.publish([message(str(number), size=2_000)])
        except BrokerFull:
            return accepted
        accepted.append(str(number))
    raise AssertionError("the disk never filled")


async def test_an_almost_full_disk_lets_nothing_begin_and_everything_end(small_disk: Path) -> None:
    async with opened(small_disk / "shop.queue") as broker:
        await broker.declare([Queue(name="q", topics=("t",))])
        subscription = await broker.subscribe("q", 10_000)
        await broker.publish([message(f"first-{number}") for number in range(50)])
        held = await take(subscription, 50)
        accepted = await publish_until_full(broker)
        with pytest.raises(BrokerFull, match="almost full"):
            await broker.publish([message("one more")])
        with pytest.raises(BrokerFull, match="almost full"):
            await subscription.fetch(1)
        assert await broker.extend(held) == []
        assert await broker.settle([Settlement(held[0], Done((message("emitted"),)))]) == []
        assert await broker.settle([Settlement(each, DONE) for each in held[1:]]) == []
        subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
        received = await take(subscription, len(accepted) + 1)
        assert [each.message.id for each in received] == [*accepted, "emitted"]


async def test_on_a_full_disk_the_ballast_lets_what_is_at_work_end(small_disk: Path) -> None:
    path, filler = small_disk / "shop.queue", small_disk / "filler"
    async with opened(path) as broker:
        await broker.declare([Queue(name="q", topics=("t",))])
        subscription = await broker.subscribe("q", 1_000)
        await broker.publish([message(str(number), size=100) for number in range(300)])
        held = await take(subscription, 200)
        assert (small_disk / "shop.queue.ballast").stat().st_size > 100_000
        await asyncio.to_thread(fill, filler)
        with pytest.raises(BrokerFull):
            await broker.publish([message("no room")])
        assert await broker.settle([Settlement(each, DONE) for each in held]) == []
        await asyncio.to_thread(filler.unlink)
        assert [each.message.id for each in await take(subscription, 100)] == [
            str(number) for number in range(200, 300)
        ]
        assert await broker.publish([message("room again")]) == frozenset()
        assert [each.message.id for each in await take(subscription, 1)] == ["room again"]
    assert apsw.Connection(str(path)).execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def fill(filler: Path) -> None:
    """Until not a single page is left."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


async def test_without_ballast_a_full_disk_refuses_settlements_and_keeps_them_possible(small_disk: Path) -> None:
    path, filler = small_disk / "shop.queue", small_disk / "filler"
    async with opened(path) as broker:
        await broker.declare([Queue(name="q", topics=("t",))])
        subscription = await broker.subscribe("q", 1_000)
        await broker.publish([message(str(number), size=1_000) for number in range(1_000)])
        held = await take(subscription, 1_000)
        (small_disk / "shop.queue.ballast").unlink()
        await asyncio.to_thread(fill, filler)
        settlements = [Settlement(each, Done((message("emitted", size=20_000),))) for each in held]
        with pytest.raises(BrokerFull, match="full"):
            await broker.settle(settlements)
        await asyncio.to_thread(filler.unlink)
        assert await broker.settle([Settlement(each, DONE) for each in held]) == []
        assert (await figures(broker, "q")).ready == 0, "a settlement that failed has published"


@pytest.mark.parametrize("where", [0, 0.3, 0.6])
async def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path, where: float) -> None:
    path = tmp_path / "shop.queue"
    async with opened(path) as broker:
        await broker.declare([Queue(name="q", topics=("t",))])
        await broker.publish([message(str(number), size=1_000) for number in range(500)])
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * where) // 4096 * 4096)
        file.write(b"\xa5" * 40 * 4096)

    async def use() -> None:
        async with opened(path) as broker:
            subscription = await broker.subscribe("q", 1_000)
            await broker.settle([Settlement(each, DONE) for each in await take(subscription, 500)])

    with pytest.raises(BrokerError, match="is damaged|no SQLite database"):
        await use()


# A power cut


@pytest.mark.parametrize(("durability", "synced"), [("full", "True"), ("normal", "False")])
async def test_a_publish_returns_after_the_disk_has_it(tmp_path: Path, durability: str, synced: str) -> None:
    """Full: between the last write to the WAL and the return of a publish or settlement there is an fsync."""
    program = """
import asyncio, sys
import apsw
from conveyor.broker import Queue, Settlement
from conveyor.brokers.sqlite import SqliteBroker
from conveyor.core.message import Message
from conveyor.core.settle import DONE

unsynced = set()

class File(apsw.VFSFile):
    def __init__(self, base, name, flags):
        self.wal = bool(flags[0] & apsw.SQLITE_OPEN_WAL)
        super().__init__(base, name, flags)
    def xWrite(self, data, offset):
        super().xWrite(data, offset)
        if self.wal: unsynced.add(offset)
    def xSync(self, flags):
        super().xSync(flags)
        if self.wal: unsynced.clear()

class Watched(apsw.VFS):
    def __init__(self):
        super().__init__("watched", "unix", makedefault=True)
    def xOpen(self, name, flags):
        return File("unix", name, flags)

watched = Watched()

async def main():
    broker = SqliteBroker(sys.argv[1], durability=sys.argv[2])
    await broker.open()
    await broker.declare([Queue(name="q", topics=("t",))])
    subscription = await broker.subscribe("q", 10)
    clean = []
    for number in range(20):
        await broker.publish([Message(str(number), "t", bytes(1000))])
        clean.append(not unsynced)
    for delivery in await subscription.fetch(10):
        clean.append(not unsynced)
        await broker.settle([Settlement(delivery, DONE)])
        clean.append(not unsynced)
    await broker.close()
    print(all(clean))

asyncio.run(main())
"""
    told = await asyncio.to_thread(start(program, tmp_path / "shop.queue", durability).communicate)
    assert told[0].strip() == synced
