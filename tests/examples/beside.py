"""What stands beside an example in its tests: its programs, and another program's client of RabbitMQ."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import pika
from pika.adapters.blocking_connection import BlockingChannel

T = TypeVar("T")

ROOT: Final = Path(__file__).parents[2]
PATIENCE_SECONDS: Final = 60.0
"""What has not come about by then will not, however crowded the machine."""


def wait_for(look: Callable[[], T | None], what: Callable[[], object] = str) -> T:
    """Look until what is seen is true, and give it; what tells more when it never is."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE_SECONDS:g} s in vain\n{what()}")
        time.sleep(0.05)
    return found


class Program:
    """A program of an example's: its process, and what it says."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *command: str) -> None:
        self.log: Final = folder / f"{len(list(folder.glob('*.log')))}.log"
        known = {name: value for name, value in os.environ.items() if not name.startswith(("CONVEYOR_", "RABBITMQ_"))}
        with self.log.open("ab") as out:
            self.process: Final = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env={**known, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def said(self) -> str:
        """Everything it wrote so far."""
        return self.log.read_text(errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """The lines of JSON in its log."""
        return [json.loads(line) for line in self.said().splitlines() if line.startswith("{")]

    def until(self, text: str) -> None:
        """Wait until it has said something."""
        wait_for(lambda: text in self.said() or self.process.poll() is not None, self.said)
        assert text in self.said(), self.said()

    @property
    def children(self) -> list[int]:
        """The processes that it started."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in found.split()]

    def kill_all(self) -> None:
        """End it and the processes that it started, all of them by kill -9."""
        for pid in [self.process.pid, *self.children]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        """End it for certain."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill_all()


class Foreigner:
    """A program that knows nothing of Conveyor, and speaks to RabbitMQ with pika.

    Parameters:
        declares: it declares queues before it sends to them, durable and nothing else, as such programs do.
    """

    def __init__(self, url: str, *, declares: bool = True) -> None:
        self._parameters: Final = pika.URLParameters(url)
        self._declares: Final = declares

    @contextlib.contextmanager
    def channel(self) -> Iterator[BlockingChannel]:
        """A channel of a connection of its own."""
        with pika.BlockingConnection(self._parameters) as connection, connection.channel() as channel:
            yield channel

    def send(self, queue: str, body: object, **properties: Any) -> None:
        """Send JSON (or bytes) to a queue by its name, and see it confirmed."""
        properties.setdefault("delivery_mode", 2)  # without it, RabbitMQ may forget the message when it restarts
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.channel() as channel:
            if self._declares:
                channel.queue_declare(queue, durable=True)
            channel.confirm_delivery()
            channel.basic_publish("", queue, text, pika.BasicProperties(**properties), mandatory=True)

    def listen(self, topic: str) -> str:
        """A queue that gets what is published under a topic from now on."""
        with self.channel() as channel:
            queue = channel.queue_declare(f"heard.{topic}", durable=True).method.queue
            channel.queue_bind(queue, "conveyor", topic)
        return str(queue)

    def take(self, queue: str) -> tuple[Any, dict[str, Any]]:
        """Wait for a message of a queue, and take it: its JSON and its headers."""

        def take() -> tuple[Any, dict[str, Any]] | None:
            with self.channel() as channel:
                method, properties, body = channel.basic_get(queue, auto_ack=True)
                if method is None or body is None:
                    return None
                return json.loads(body), dict(properties.headers or {}) if properties else {}

        return wait_for(take)

    def peek(self, queue: str) -> list[tuple[bytes, dict[str, Any]]]:
        """What waits in a queue, where it stays: bodies and headers."""
        found: list[tuple[bytes, dict[str, Any]]] = []
        with self.channel() as channel:
            while True:
                method, properties, body = channel.basic_get(queue)
                if method is None or body is None:
                    return found
                found.append((body, dict(properties.headers or {}) if properties else {}))

    def depth(self, queue: str) -> int:
        """How many messages are ready in a queue."""
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).method.message_count)
