"""What surrounds the order processor: a payment service with pika, a mail server, a warehouse, and the service as a program."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import pika
import pytest
import uvicorn
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from pika.adapters.blocking_connection import BlockingChannel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from servers.rabbitmq import RabbitMQ
from servers.server import find_free_port

ROOT: Final = Path(__file__).parents[3]
PATIENCE_SECONDS: Final = 60.0
"""What has not happened by then will not happen, however crowded the machine."""
APP: Final = "examples.order_processor.app:app"

GIVEN: Final[dict[str, Any]] = {
    "orderId": "ORD-1702554000123",
    "sessionId": "user-session-123",
    "userId": "507f1f77bcf86cd799439011",
    "items": [{"sku": "Linux", "name": "Linux Administration", "price": 1999, "quantity": 1}],
    "total": 1999,
    "timestamp": "2024-12-14T10:00:00Z",
    "paymentId": "pay_1234567890",
}
"""A message word for word as the payment service documents it."""


def paid(order_id: str = "ORD-1702554000123", **other: object) -> dict[str, Any]:
    """An order as the payment service sends it."""
    return {**copy.deepcopy(GIVEN), "orderId": order_id, **other}


def wait_for(what: Callable[[], object], why: str) -> Any:
    """Wait until something is so; gives what it gave."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := what()):
        if time.monotonic() > deadline:
            raise AssertionError(f"in vain: {why}")
        time.sleep(0.02)
    return found


class MailServer:
    """A real SMTP server, which may be slow, refuse, or hang up.

    Attributes:
        accepted: the order ids of the e-mails that it took responsibility for, in order.
        answers: what it says to the next e-mails, instead of taking them.
    """

    def __init__(self) -> None:
        self.accepted: list[str] = []
        self.envelopes: list[Envelope] = []
        self.answers: list[str] = []
        self.recipient_answers: list[str] = []
        self.tried = 0
        self.hold = threading.Event()
        """Cleared: an e-mail that has arrived whole is taken, and the answer is held back."""
        self.hold.set()
        self.port: Final = find_free_port()
        self._controller: Controller | None = None

    @property
    def url(self) -> str:
        return f"smtp://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port)
        self._controller.start()

    def stop(self) -> None:
        self.hold.set()
        controller, self._controller = self._controller, None
        if controller is not None:
            controller.stop()

    async def handle_RCPT(  # noqa: N802 - the library's word
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.recipient_answers:
            return self.recipient_answers.pop(0)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        self.tried += 1
        if self.answers:
            return self.answers.pop(0)
        content = envelope.content
        assert isinstance(content, bytes)
        self.envelopes.append(envelope)
        self.accepted.append(content.decode().split("Order: ")[1].split()[0])
        while not self.hold.is_set():
            await asyncio.sleep(0.01)
        return "250 taken"


class WarehouseServer:
    """A real HTTP API, which knows repeats by their Idempotency-Key.

    Attributes:
        requests: the keys of everything that arrived, in order.
        sent: the orders that it sends out, by key.
        answers: statuses (with headers) for the next requests, instead of taking them.
        after: statuses for the next requests, which it takes.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.bodies: list[Any] = []
        self.sent: dict[str, Any] = {}
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.after: list[int] = []
        self.hold = threading.Event()
        self.hold.set()
        self.port: Final = find_free_port()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/orders"

    def start(self) -> None:
        web = Starlette(routes=[Route("/api/orders", self._take, methods=["POST"])])
        config = uvicorn.Config(web, host="127.0.0.1", port=self.port, log_level="error", lifespan="off", ws="none")
        self._server = server = uvicorn.Server(config)
        self._thread = threading.Thread(target=server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: server.started, "the warehouse starts")

    def stop(self) -> None:
        self.hold.set()
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(PATIENCE_SECONDS)

    async def _take(self, request: Request) -> Response:
        key, body = request.headers["Idempotency-Key"], await request.json()
        self.requests.append(key)
        self.bodies.append(body)
        if self.answers:
            status, headers = self.answers.pop(0)
            return Response(status_code=status, headers=headers)
        self.sent.setdefault(key, body)
        while not self.hold.is_set():
            await asyncio.sleep(0.01)
        if self.after:
            return Response(status_code=self.after.pop(0))
        return JSONResponse({"accepted": True})


class PaymentService:
    """A program that knows nothing of Conveyor: plain JSON, by pika."""

    def __init__(self, url: str) -> None:
        self._url = url

    @contextlib.contextmanager
    def channel(self) -> Iterator[BlockingChannel]:
        connection = pika.BlockingConnection(pika.URLParameters(self._url))
        with connection, connection.channel() as channel:
            yield channel

    def send(self, *orders: object) -> None:
        """Publish orders (or raw bodies), each confirmed by the server."""
        with self.channel() as channel:
            channel.confirm_delivery()
            for order in orders:
                body = order if isinstance(order, bytes) else json.dumps(order).encode()
                channel.basic_publish(
                    "skillupworks", "order-processing", body, pika.BasicProperties(delivery_mode=2), mandatory=True
                )

    def count(self, queue: str) -> tuple[int, int]:
        """How many messages are ready, and how many consumers there are."""
        with self.channel() as channel:
            method = channel.queue_declare(queue, durable=True, passive=True).method
            return method.message_count, method.consumer_count

    def dead(self, number: int) -> list[tuple[bytes, dict[str, Any]]]:
        """Wait for so many dead letters; their bodies and headers. They stay there."""
        wait_for(lambda: self.count("order-processing-dlq")[0] >= number, f"{number} dead letters")
        found = []
        with self.channel() as channel:
            for _ in range(number):
                _, properties, body = channel.basic_get("order-processing-dlq")
                assert properties is not None
                assert body is not None
                found.append((body, dict(properties.headers or {})))
        return found


class Service:
    """The order processor with a folder of its own.

    Parameters:
        folder: for its database and its logs.
        url: of RabbitMQ.
        settings: environment variables.
    """

    def __init__(self, folder: Path, url: str, **settings: str) -> None:
        parts = urlsplit(url)
        self.folder: Final = folder
        self.payments: Final = PaymentService(url)
        known = {name: value for name, value in os.environ.items() if not name.startswith(("CONVEYOR_", "RABBITMQ_"))}
        self.environment: Final = known | {
            "RABBITMQ_HOST": str(parts.hostname),
            "RABBITMQ_PORT": str(parts.port),
            "RABBITMQ_USER": "guest",
            "RABBITMQ_PASS": "guest",
            "RABBITMQ_VHOST": unquote(parts.path[1:]),
            "ORDER_DATA": str(folder),
            "ORDER_RETRY_SECONDS": "0.1",
            "ORDER_LONGEST_RETRY_SECONDS": "0.5",
            "CALL_TIMEOUT_SECONDS": "2",
            "CONVEYOR_LOG_FORMAT": "human",  # as its systemd unit has it
            **settings,
        }
        self._programs: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(self, *flags: str, ready: bool = True, app: str = "") -> subprocess.Popen[bytes]:
        """Start a program, the service's own unless an app is named; waits until a process of it is ready, unless told not to."""
        log = self.folder / f"service-{len(self._programs)}.log"
        command = ["conveyor", "run", app] if app else ["examples.order_processor"]
        with log.open("wb") as out:
            program = subprocess.Popen(
                [sys.executable, "-m", *command, *flags],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        self._programs.append((program, log))
        if ready:
            self.says("order-processor is ready")
        return program

    def said(self, number: int = -1) -> str:
        """What a program wrote so far; the last one that was started, unless a number says which."""
        return self._programs[number][1].read_text(errors="replace")

    def says(self, text: str, *, times: int = 1, number: int = -1) -> str:
        """Wait until a program says so; all that it said."""
        program, _ = self._programs[number]

        def heard() -> bool:
            if program.poll() is not None and self.said(number).count(text) < times:
                raise AssertionError(f"it ended without saying {text!r}:\n{self.said(number)}")
            return self.said(number).count(text) >= times

        try:
            wait_for(heard, f"it says {text!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said(number)}") from None
        return self.said(number)

    def end(self) -> int:
        """SIGTERM for the last program; its exit code."""
        program, _ = self._programs[-1]
        program.send_signal(signal.SIGTERM)
        return program.wait(PATIENCE_SECONDS)

    def workers(self) -> list[int]:
        """The processes that do the work of the last program."""
        pid = self._programs[-1][0].pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def run(self, *command: str, code: int = 0) -> str:
        """Run a Python module in the service's environment; what it said."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stdout + done.stderr

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Look into the service's database."""
        with contextlib.closing(sqlite3.connect(self.folder / "order-processor.db", timeout=PATIENCE_SECONDS)) as file:
            return file.execute(sql).fetchall()

    def fulfilled(self, number: int) -> list[str]:
        """Wait until so many orders are fulfilled; their ids."""
        sql = "SELECT order_id FROM orders WHERE fulfilled IS NOT NULL ORDER BY order_id"

        def enough() -> list[str]:
            found = [str(row[0]) for row in self.query(sql)]
            return found if len(found) >= number else []

        try:
            found: list[str] = wait_for(enough, f"{number} orders are fulfilled")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None
        return found

    def get(self, port: int, path: str) -> str:
        """What it says about itself over HTTP."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def close(self) -> None:
        """Stop everything that was started."""
        for program, _ in self._programs:
            program.send_signal(signal.SIGCONT)
            program.terminate()
        for program, _ in self._programs:
            try:
                program.wait(30)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()


StartService = Callable[..., Service]


@pytest.fixture
def mail() -> Iterator[MailServer]:
    """A mail server."""
    server = MailServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def warehouse() -> Iterator[WarehouseServer]:
    """A warehouse."""
    server = WarehouseServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_service(tmp_path: Path, rabbitmq: RabbitMQ) -> Iterator[StartService]:
    """Make a service on a virtual host of its own; it is not started yet."""
    made = []

    def make(url: str | None = None, **settings: str) -> Service:
        service = Service(tmp_path, url or rabbitmq.url(), **settings)
        made.append(service)
        return service

    yield make
    for service in made:
        service.close()
