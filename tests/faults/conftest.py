"""Faults on demand: real programs in a folder of their own, killed, stopped and poisoned, and a look at what they left."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, overload

import apsw
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from conveyor import brokers
from conveyor.broker import Broker
from conveyor.core.message import Message

if TYPE_CHECKING:
    from servers.postgres import Postgres
    from servers.rabbitmq import RabbitMQ
    from servers.redis import Redis

T = TypeVar("T")

ROOT: Final = Path(__file__).parents[2]
APPS: Final = "tests.faults.apps"
PATIENCE_SECONDS: Final = 90.0
"""What has not come about by then will not, however crowded the machine."""
LOOK_SECONDS: Final = (0.02, 0.2)
"""Between two looks: soon at first, then ever more seldom."""


class Eventually(Protocol):
    """Waits for something to come true; what tells more when it does not."""

    @overload
    async def __call__(
        self, look: Callable[[], Coroutine[Any, Any, T | None]], what: Callable[[], object] = ..., seconds: float = ...
    ) -> T: ...
    @overload
    async def __call__(
        self, look: Callable[[], T | None], what: Callable[[], object] = ..., seconds: float = ...
    ) -> T: ...


async def wait_until(
    look: Callable[[], Any], what: Callable[[], object] = str, seconds: float = PATIENCE_SECONDS
) -> Any:
    """Look again and again until what is seen is true, and give it."""
    deadline = time.monotonic() + seconds
    pause = LOOK_SECONDS[0]
    while True:
        found = look()
        seen = await found if inspect.isawaitable(found) else found
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain: {inspect.getsource(look).strip()}\n{what()}")
        await asyncio.sleep(pause)
        pause = min(1.2 * pause, LOOK_SECONDS[1])


@pytest.fixture
def eventually() -> Eventually:
    """The one way to wait in these tests: on a condition, with a deadline."""
    return wait_until


class Process:
    """Any process, by its pid."""

    def __init__(self, pid: int) -> None:
        self.pid: Final = pid

    def _stat(self) -> list[str]:
        """The fields of /proc/PID/stat behind the name (proc_pid_stat(5)); none when it is gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return []

    @property
    def alive(self) -> bool:
        """It exists, and is no zombie."""
        stat = self._stat()
        return bool(stat) and stat[0] not in "ZX"

    @property
    def stopped(self) -> bool:
        stat = self._stat()
        return bool(stat) and stat[0] == "T"

    @property
    def died_of(self) -> int | None:
        """The signal that ended it, while its parent has not reaped it."""
        stat = self._stat()
        return int(stat[-1]) & 0x7F if stat and stat[0] == "Z" else None

    @property
    def children(self) -> list[Process]:
        found = []
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                found += [Process(int(pid)) for pid in (task / "children").read_text().split()]
        return found

    @property
    def descendants(self) -> list[Process]:
        return [each for child in self.children for each in (child, *child.descendants)]

    @property
    def command(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; False where nobody is there."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def __repr__(self) -> str:
        return f"{self.pid}: {self.command}"


class Program(Process):
    """A program that a test started: its process, and what it writes."""

    def __init__(self, command: Sequence[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
        self.log: Final = log
        with log.open("ab") as out:
            self._process: Final = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        super().__init__(self._process.pid)

    @property
    def runners(self) -> list[Process]:
        """The processes of a supervisor that run workers."""
        return [child for child in self.children if " conveyor run " in child.command and child.alive]

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def said(self) -> str:
        """Everything it wrote so far."""
        return self.log.read_text(errors="replace")

    def entries(self) -> list[dict[str, Any]]:
        """The entries of its log; what is none (the stacks of a crash) is left out."""
        found = []
        for line in self.said().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [each for each in found if isinstance(each, dict)]

    async def ended(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for its end; the exit code."""
        await wait_until(lambda: self.exit_code is not None, self.said, seconds)
        assert self.exit_code is not None
        return self.exit_code

    async def stop(self) -> None:
        """SIGTERM, and a good end."""
        self.send(signal.SIGTERM)
        assert await self.ended() == 0, self.said()

    def kill(self) -> None:
        """SIGKILL, and reap it."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Leave nothing behind, whatever became of it."""
        family = self.descendants
        if self.exit_code is None:
            self.kill()
        deadline = time.monotonic() + 10
        while any(each.alive for each in family) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS[0])
        for each in family:
            if each.alive:
                each.send(signal.SIGKILL)


@dataclass(frozen=True)
class Waiting:
    """A message in the queue file. state: 0 ready, 1 leased, 2 delayed, 3 behind an older one of its key."""

    queue: str
    id: str
    state: int
    deliveries: int
    attempts: int
    error: str


@dataclass(frozen=True)
class Dead:
    """A dead letter in the queue file."""

    queue: str
    id: str
    reason: str
    error: str
    body: bytes


class World:
    """A folder with a queue file and a database, and the programs that work there.

    Parameters:
        database: the SQLAlchemy URL of the ledger; None is no ledger.
        broker: the URL of a broker; None is the queue file, into which this world can look closely.
    """

    def __init__(self, folder: Path, database: str | None = None, broker: str | None = None) -> None:
        self.folder: Final = folder
        self.queue_file: Final = folder / "test.queue"
        self.database: Final = database or ""
        self.environment: Final = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CONVEYOR_")},
            "CONVEYOR_BROKER": broker or f"sqlite:///{self.queue_file}",
            "PYTHONPATH": str(ROOT),
        }
        self.programs: list[Program] = []
        if database:
            self.environment["CONVEYOR_DATABASE"] = database
            self._engine = create_async_engine(database, poolclass=NullPool)

    # programs

    def start(self, *command: str, **environment: str) -> Program:
        """Start ``python -m …`` in the folder; a name with a dot in front is one of the apps' folder."""
        log = self.folder / f"log-{len(self.programs)}"
        program = Program(
            [sys.executable, "-m", *map(self.full_name, command)], self.folder, log, self.environment | environment
        )
        self.programs.append(program)
        return program

    @staticmethod
    def full_name(part: str) -> str:
        return APPS + part if part.startswith(".") else part

    def run(self, app: str, *flags: str, **environment: str) -> Program:
        """Start ``conveyor run`` with one of the apps."""
        return self.start("conveyor", "run", f".{app}:app", *flags, **environment)

    async def ready(self, program: Program, processes: int = 1) -> list[Process]:
        """Wait until so many processes of a program work; the processes."""

        def look() -> list[Process]:
            assert program.exit_code is None, program.said()
            return program.runners if self.subscribed >= processes and len(program.runners) == processes else []

        found: list[Process] = await wait_until(look, program.said)
        return found

    def close(self) -> None:
        for program in self.programs:
            program.close()

    # the queue file, with its own library: SQLite's locks forbid a second one in a process

    def look(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Look into the queue file; nothing where there is none yet."""
        if not self.queue_file.exists():
            return []
        db = apsw.Connection(str(self.queue_file), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            db.set_busy_timeout(5000)
            return db.execute(sql, values).fetchall()
        except (apsw.SQLError, apsw.CantOpenError):  # its tables are just being made
            return []
        finally:
            db.close()

    @property
    def subscribed(self) -> int:
        """Broker objects that receive messages."""
        return len(self.look("SELECT DISTINCT owner FROM subscription"))

    @property
    def waiting(self) -> list[Waiting]:
        """What is in the application's queues."""
        sql = """SELECT queue.name, message.id, state, deliveries, attempts, error
            FROM message JOIN queue ON queue.id = queue WHERE queue.name NOT LIKE 'conveyor.%' ORDER BY seq"""
        return [Waiting(*row) for row in self.look(sql)]

    @property
    def leased(self) -> int:
        """Messages in somebody's hands."""
        return sum(each.state == 1 for each in self.waiting)

    @property
    def dead(self) -> list[Dead]:
        """What was given up."""
        return [
            Dead(*row) for row in self.look("SELECT queue, id, reason, error, body FROM dead_letter ORDER BY position")
        ]

    @contextlib.asynccontextmanager
    async def broker(self) -> AsyncIterator[Broker]:
        """The broker, in this process."""
        found = brokers.from_url(self.environment["CONVEYOR_BROKER"])
        await found.open()
        try:
            yield found
        finally:
            await found.close()

    async def unsettled(self) -> int:
        """Messages that wait or are in somebody's hands, in all queues."""
        async with self.broker() as broker:
            return sum(each.ready + each.in_flight + each.delayed for each in await broker.queues())

    async def publish(self, topic: str, *bodies: bytes, key: str | None = None) -> list[str]:
        """Publish messages; their ids."""
        messages = [Message(uuid.uuid4().hex, topic, body, key, created=time.time()) for body in bodies]
        async with self.broker() as broker:
            assert not await broker.publish(messages), "nobody receives them"
        return [message.id for message in messages]

    # the database

    async def query(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        """Ask, or change, the database."""
        async with self._engine.begin() as connection:
            result = await connection.execute(text(sql), values)
            return [tuple(row) for row in result] if result.returns_rows else []

    async def count(self, table: str) -> int:
        """How many rows a table has; 0 where there is none."""
        try:
            [[number]] = await self.query(f"SELECT count(*) FROM {table}")
        except DBAPIError as error:
            if "no such table" in str(error) or "does not exist" in str(error) or "unable to open" in str(error):
                return 0
            raise
        return int(number)

    # files that handlers write

    def lines(self, name: str) -> list[str]:
        """What handlers wrote into a file of the folder, one line each."""
        file = self.folder / name
        return file.read_text().split() if file.exists() else []

    def repeated(self, name: str) -> dict[str, int]:
        """The lines that are there more than once."""
        return {line: number for line, number in Counter(self.lines(name)).items() if number > 1}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world without a database."""
    made = World(tmp_path)
    yield made
    made.close()


def database_url(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    """A new database of a kind."""
    if kind == "postgresql":
        postgres: Postgres = request.getfixturevalue("postgres")
        return postgres.url()
    return f"sqlite+aiosqlite:///{folder / 'test.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    """A world with each kind of database in turn."""
    made = World(tmp_path, database_url(request.param, tmp_path, request))
    yield made
    made.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest) -> str:
    """Each kind of database in turn."""
    return str(request.param)


@pytest.fixture(params=["sqlite", "rabbitmq", "redis"])
def any_world(tmp_path: Path, ledger: str, request: pytest.FixtureRequest) -> Iterator[World]:
    """A world with each broker and each kind of database in turn."""
    broker = None
    if request.param != "sqlite":
        server: RabbitMQ | Redis = request.getfixturevalue(request.param)
        broker = server.url()
    made = World(tmp_path, database_url(ledger, tmp_path, request), broker)
    yield made
    made.close()
