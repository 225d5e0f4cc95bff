"""The SQLite broker alone: carrying, publishing from many tasks, a backlog of a million, and waking another process.

python benchmarks/broker_sqlite.py [--durability full|normal] [--backlog MESSAGES] [carry] [publish] [backlog] [wake]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from conveyor.broker import Queue, Settlement
from conveyor.brokers.sqlite import Durability, SqliteBroker
from conveyor.core.message import Message, uuid7
from conveyor.core.settle import DONE

MESSAGES: Final = 100_000
PREFETCH: Final = 200
TASKS: Final = 100
BATCH: Final = 1_000
WAKES: Final = 500
WAKE_PAUSE_SECONDS: Final = 0.005
BODY: Final = b'{"order_id":"A-123456","total":"19.99","customer":"someone@example.org","note":"xxxxxxxxxxxxxxxxxxxx"}'


def message(topic: str = "order_created", due: float = 0.0) -> Message:
    """A message of about 100 bytes."""
    now = time.time()
    return Message(id=uuid7(now, os.urandom(10)), topic=topic, body=BODY, created=now, due=due)


async def fill(broker: SqliteBroker, number: int, topic: str = "order_created", due: float = 0.0) -> None:
    """Publish in large batches."""
    for start in range(0, number, BATCH):
        await broker.publish([message(topic, due) for _ in range(min(BATCH, number - start))])


async def carry(broker: SqliteBroker, number: int = MESSAGES) -> float:
    """Fetch and settle: each batch is settled while the next ones are fetched. Messages a second."""
    subscription = await broker.subscribe("orders", PREFETCH)
    settling: set[asyncio.Task[object]] = set()
    left, started = number, time.perf_counter()
    while left:
        deliveries = await subscription.fetch(PREFETCH)
        left -= len(deliveries)
        task: asyncio.Task[object] = asyncio.create_task(broker.settle([Settlement(each, DONE) for each in deliveries]))
        settling.add(task)
        task.add_done_callback(settling.discard)
    await asyncio.gather(*settling)
    seconds = time.perf_counter() - started
    await subscription.close()
    return number / seconds


async def publish(broker: SqliteBroker, number: int = MESSAGES // 2) -> float:
    """Tasks that each await their own publish of one message. Messages a second."""

    async def task() -> None:
        for _ in range(number // TASKS):
            await broker.publish([message()])

    started = time.perf_counter()
    await asyncio.gather(*(task() for _ in range(TASKS)))
    return number / (time.perf_counter() - started)


async def wake(path: Path) -> tuple[float, float]:
    """From a publish here to the fetch that waits in another process. Milliseconds: median and 99th percentile."""
    broker = SqliteBroker(path)
    await broker.open()
    await broker.declare([Queue(name="wakes", topics=("wake",))])
    reader = await asyncio.to_thread(_start_reader, path)
    assert reader.stdout is not None
    await asyncio.to_thread(reader.stdout.readline)
    for _ in range(WAKES):
        await asyncio.sleep(WAKE_PAUSE_SECONDS)
        await broker.publish([message("wake")])
    times = [float(line) for line in (await asyncio.to_thread(reader.stdout.read)).split()]
    reader.wait()
    await broker.close()
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


def _start_reader(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__, "--wait-on", str(path)], stdout=subprocess.PIPE, text=True)


async def wait_on(path: Path) -> None:
    """The other process of wake()."""
    broker = SqliteBroker(path)
    await broker.open()
    subscription = await broker.subscribe("wakes", PREFETCH)
    print("ready", flush=True)
    times: list[float] = []
    while len(times) < WAKES:
        deliveries = await subscription.fetch(PREFETCH)
        times += [(time.time() - each.message.created) * 1000 for each in deliveries]
        await broker.settle([Settlement(each, DONE) for each in deliveries])
    await broker.close()
    print(*times, sep="\n")


async def measure(which: list[str], durability: Durability, backlog: int) -> None:
    """Print what was asked for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench.queue")
        broker = SqliteBroker(path, durability=durability)
        await broker.open()
        await broker.declare([Queue(name="orders", topics=("order_created",)), Queue(name="other", topics=("other",))])

        async def cpu(what: str, number: int, work: Callable[[], Awaitable[float]]) -> None:
            before = time.process_time()
            rate = await work()
            print(f"{what:50} {rate:10,.0f}/s {(time.process_time() - before) / number * 1e6:6.1f} µs CPU", flush=True)

        if "carry" in which:
            await fill(broker, MESSAGES)
            await cpu(f"fetch and settle, {durability}, prefetch {PREFETCH}", MESSAGES, lambda: carry(broker))
        if "publish" in which:
            await cpu(f"publish, {durability}, {TASKS} tasks", MESSAGES // 2, lambda: publish(broker))
            await broker.purge("orders")
        if "backlog" in which:
            await fill(broker, backlog, "other")
            await fill(broker, backlog, due=time.time() + 3600)
            await fill(broker, backlog)
            print(f"with {backlog:,} ready, {backlog:,} delayed, and {backlog:,} in another queue:")
            await cpu(f"  fetch and settle, {durability}", MESSAGES, lambda: carry(broker))
            await cpu(f"  publish, {durability}, {TASKS} tasks", MESSAGES // 2, lambda: publish(broker))
            started = time.perf_counter()
            await broker.queues()
            print(f"  the queues' figures: {(time.perf_counter() - started) * 1000:.0f} ms")
        await broker.close()
        if "wake" in which:
            median, slow = await wake(path)
            print(f"publish to a waiting fetch in another process: median {median:.2f} ms, 99 % {slow:.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=["carry", "publish", "wake"])
    parser.add_argument("--durability", choices=("full", "normal"), default="full")
    parser.add_argument("--backlog", type=int, default=1_000_000)
    parser.add_argument("--wait-on", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.wait_on is not None:
        asyncio.run(wait_on(options.wait_on))
    else:
        asyncio.run(measure(options.which, options.durability, options.backlog))
