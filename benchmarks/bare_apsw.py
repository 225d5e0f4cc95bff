"""The bare loop: apsw by hand in the shape that Conveyor has, and nothing of what makes it safe to use.

One writer thread puts what has gathered into one commit; claims and settlements go in batches; 100 coroutines over a deque decode
and await a handler. No lost leases, retries, timeouts, metrics, priorities due later, other processes, or errors.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import apsw
import msgspec

from benchmarks.load import FILL_BATCH
from benchmarks.order import BODY, ORDER, TASKS, TOPIC, Countdown, OrderCreated
from benchmarks.subject import Load
from conveyor.core.message import uuid7

PREFETCH: Final = 2 * TASKS
LEASE_SECONDS: Final = 30.0

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS message (seq INTEGER PRIMARY KEY, state INTEGER NOT NULL DEFAULT 0, priority INTEGER NOT NULL DEFAULT 0,
    deliveries INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, token INTEGER NOT NULL DEFAULT 0, lease REAL,
    id TEXT NOT NULL, topic TEXT NOT NULL, key TEXT, headers TEXT, correlation_id TEXT, created REAL NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS ready ON message (priority DESC, seq) WHERE state = 0;
CREATE INDEX IF NOT EXISTS leased ON message (lease) WHERE state = 1;
"""
INSERT: Final = "INSERT INTO message (id, topic, correlation_id, created, body) VALUES (?, ?, ?, ?, ?)"
CLAIM: Final = """
UPDATE message SET state = 1, deliveries = deliveries + 1, token = token + 1, lease = ?
WHERE seq IN (SELECT seq FROM message WHERE state = 0 ORDER BY priority DESC, seq LIMIT ?)
RETURNING seq, token, deliveries, attempts, id, topic, key, headers, correlation_id, created, priority, body
"""
SETTLE: Final = "DELETE FROM message WHERE seq = ? AND token = ? AND state = 1"

Row = tuple[Any, ...]
Operation = Callable[[apsw.Connection], Any]


class BareMessage(msgspec.Struct, frozen=True, gc=False):
    """What a claimed row becomes."""

    receipt: tuple[int, int]
    deliveries: int
    attempts: int
    id: str
    topic: str
    key: str | None
    headers: str | None
    correlation_id: str | None
    created: float
    priority: int
    body: bytes


class Writer:
    """A thread with the connection: whatever gathers while a commit is on its way goes into the next one."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "bare.db"
        self._loop = asyncio.get_running_loop()
        self._asked: queue.SimpleQueue[tuple[Operation, asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def ask(self, operation: Operation) -> asyncio.Future[Any]:
        """Have something done in a commit."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self._asked.put((operation, future))
        return future

    def close(self) -> None:
        """End the thread."""
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        db = connect(self._path)
        while first := self._asked.get():
            work = [first]
            try:
                while more := self._asked.get_nowait():
                    work.append(more)
            except queue.Empty:
                pass
            db.execute("BEGIN IMMEDIATE")
            done = [(future, operation(db)) for operation, future in work]
            db.execute("COMMIT")
            self._loop.call_soon_threadsafe(_tell, done)
        db.close()


def _tell(done: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in done:
        future.set_result(result)


def connect(path: Path) -> apsw.Connection:
    """The file with the durability that Conveyor has."""
    db = apsw.Connection(str(path))
    db.execute("PRAGMA journal_mode = wal; PRAGMA synchronous = full; PRAGMA wal_autocheckpoint = 4000")
    db.execute(SCHEMA)
    return db


def row() -> Row:
    """One order, ready to be inserted."""
    now = time.time()
    id = uuid7(now, os.urandom(10))
    return id, TOPIC, id, now, BODY


def fill(folder: Path, load: Load) -> None:
    """A file with what waits in it."""
    db = connect(folder / "bare.db")
    for start in range(0, load.ready, FILL_BATCH):
        with db:
            db.executemany(INSERT, [row() for _ in range(min(FILL_BATCH, load.ready - start))])
    db.close()


def _claim(limit: int, db: apsw.Connection) -> list[BareMessage]:
    rows = db.execute(CLAIM, (time.time() + LEASE_SECONDS, limit))
    return [BareMessage((seq, token), *rest) for seq, token, *rest in rows]


def _settle(receipts: list[tuple[int, int]], db: apsw.Connection) -> None:
    db.executemany(SETTLE, receipts).fetchall()


def _insert(values: Row, db: apsw.Connection) -> None:
    db.execute(INSERT, values)


async def _consume(folder: Path, load: Load) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    writer = Writer(folder)
    decode = msgspec.json.Decoder(OrderCreated).decode
    ready: deque[BareMessage] = deque()
    idle: deque[asyncio.Future[None]] = deque()
    settled: list[tuple[int, int]] = []
    hungry, handled = asyncio.Event(), asyncio.Event()
    countdown = Countdown(load.messages)

    async def handler(_: OrderCreated) -> None:
        countdown.one()

    async def lane() -> None:
        while True:
            while ready:
                message = ready.popleft()
                await handler(decode(message.body))
                settled.append(message.receipt)
                handled.set()
                if len(ready) < PREFETCH // 2:
                    hungry.set()
            waiter = loop.create_future()
            idle.append(waiter)
            await waiter

    async def fetch() -> None:
        while True:
            messages: list[BareMessage] = await writer.ask(partial(_claim, PREFETCH - len(ready)))
            ready.extend(messages)
            for _ in range(min(len(messages), len(idle))):
                idle.popleft().set_result(None)
            await hungry.wait()
            hungry.clear()

    async def settle() -> None:
        nonlocal settled
        while countdown.left or settled:
            await handled.wait()
            handled.clear()
            receipts, settled = settled, []
            await writer.ask(partial(_settle, receipts))

    tasks = [loop.create_task(work) for work in (fetch(), *(lane() for _ in range(TASKS)))]
    await settle()
    figures = countdown.figures()
    for task in tasks:
        task.cancel()
    writer.close()
    return figures


def consume(folder: Path, load: Load) -> Mapping[str, float]:
    """Claims and settlements in batches, 100 coroutines over a deque, typed decode."""
    return asyncio.run(_consume(folder, load))


async def _publish(folder: Path, load: Load) -> dict[str, float]:
    encode = msgspec.json.Encoder().encode
    writer = Writer(folder)
    await writer.ask(lambda _: None)
    countdown = Countdown(load.messages)

    async def task(number: int) -> None:
        for _ in range(number, load.messages, TASKS):
            now = time.time()
            id = uuid7(now, os.urandom(10))
            values = id, TOPIC, id, now, encode(ORDER)
            await writer.ask(partial(_insert, values))

    await asyncio.gather(*(task(number) for number in range(TASKS)))
    figures = countdown.figures()
    writer.close()
    return figures


def publish(folder: Path, load: Load) -> Mapping[str, float]:
    """Group commit: 100 tasks, each awaiting the commit that its insert is in."""
    return asyncio.run(_publish(folder, load))
