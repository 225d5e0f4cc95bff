"""The command line as users meet it: the real program, in a folder with an app of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from conveyor import brokers
from conveyor.broker import Queue, Settlement
from conveyor.core.message import Message
from conveyor.core.settle import Dead

PATIENCE_SECONDS: Final = 120.0

SHOP: Final = """
from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from conveyor import Conveyor, event

app = Conveyor("shop")


@event("order.created", key="order_id")
@dataclass(frozen=True)
class OrderCreated:
    order_id: str
    total: Decimal


@dataclass(frozen=True)
class PaymentProcessed:
    order_id: str


@app.worker
async def charge(order: OrderCreated) -> PaymentProcessed:
    return PaymentProcessed(order.order_id)


@app.worker(ordered=True)
async def ship(payment: PaymentProcessed) -> None:
    with open("shipped", "a") as shipped:
        shipped.write(payment.order_id + "\\n")


@app.task
def resize(path: Path, width: int = 80) -> None: ...
"""


class Program:
    """The program ``conveyor`` in a folder.

    Parameters:
        folder: its current directory, which holds shop.py.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("CONVEYOR_")}
        self.queue_url = "sqlite:///shop.queue"

    def command(self, *arguments: str) -> list[str]:
        """What starts it."""
        return [sys.executable, "-m", "conveyor", *arguments]

    def run(self, *arguments: str, stdin: str | bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment | environment,
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def ok(self, *arguments: str, stdin: str | bytes = b"", **environment: str) -> str:
        """Run it to its end, which is a good one; what it printed on stdout."""
        done = self.run(*arguments, stdin=stdin, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def json(self, *arguments: str, code: int = 0, **environment: str) -> Any:
        """Run it with --json; the document that it printed."""
        done = self.run(*arguments, "--json", **environment)
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    def refused(self, *arguments: str, code: int = 2, **environment: str) -> str:
        """Run it, and have it refuse in words; what it said."""
        done = self.run(*arguments, **environment)
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        return done.stderr

    def declare(self, *queues: Queue) -> None:
        """Declare queues on the folder's broker."""

        async def go() -> None:
            broker = brokers.from_url(self._url)
            await broker.open()
            await broker.declare(queues)
            await broker.close()

        asyncio.run(go())

    def bury(self, queue: Queue, dead: Sequence[tuple[Message, Dead]]) -> None:
        """Let messages die in a queue of the folder's broker."""

        async def go() -> None:
            broker = brokers.from_url(self._url)
            await broker.open()
            await broker.declare([queue])
            await broker.publish([message for message, _ in dead])
            verdicts = {message.id: verdict for message, verdict in dead}
            subscription = await broker.subscribe(queue.name, len(dead))
            left = len(dead)
            while left:
                taken = await subscription.fetch(left)
                await broker.settle([Settlement(each, verdicts[each.message.id]) for each in taken])
                left -= len(taken)
            await subscription.close()
            await broker.close()

        asyncio.run(go())

    @property
    def _url(self) -> str:
        return f"sqlite:///{self.folder / 'shop.queue'}"


@pytest.fixture
def conveyor(tmp_path: Path) -> Program:
    """The program, in a folder with shop.py."""
    (tmp_path / "shop.py").write_text(SHOP)
    return Program(tmp_path)
