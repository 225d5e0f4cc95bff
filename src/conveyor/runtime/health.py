"""Whether a process is well, and the small HTTP server that tells orchestrators and Prometheus."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final, Self

import msgspec

from conveyor.core.settle import describe
from conveyor.errors import ConfigurationError
from conveyor.runtime.metrics import CONTENT_TYPE

log = logging.getLogger("conveyor.health")

REQUEST_SECONDS: Final = 5.0
"""A probe's request and its answer take no longer than this each, or the connection ends."""
METRICS_SECONDS: Final = 10.0
"""Prometheus' own default for a scrape; counting queues may take a while on a slow broker."""
REQUEST_LIMIT: Final = 8 * 1024
"""Bytes of a request's head; a probe needs 200."""
CONNECTION_LIMIT: Final = 64
"""Connections at a time; probes are few."""
JSON: Final = "application/json"
TEXT: Final = "text/plain; charset=utf-8"


class Health(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a process is.

    Parameters:
        unready: why it should get no work now; empty where it should.
        unhealthy: why it should be replaced; empty where all is well.
        notes: what an operator should know although it changes neither.
    """

    unready: tuple[str, ...] = ()
    unhealthy: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        return not self.unready

    @property
    def live(self) -> bool:
        return not self.unhealthy


STARTING: Final = Health(unready=("starting",))


class HealthServer:
    """Serves /livez, /readyz (each 200, or 503 with the reasons) and /metrics. GET and HEAD only, no state, no secrets.

    It answers from the event loop that it watches: where the loop stands still, the probe fails by its timeout.

    Parameters:
        address: host and port; port 0 takes any free one.
        health: asked at each probe.
        metrics: gives Prometheus' text format; what it raises is logged and answered with 503.
    """

    def __init__(
        self, address: tuple[str, int], *, health: Callable[[], Health], metrics: Callable[[], Awaitable[bytes]]
    ) -> None:
        self._address = address
        self._health = health
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Begin to serve.

        Raises:
            ConfigurationError: the address cannot be had.
        """
        host, port = self._address
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=REQUEST_LIMIT)
        except OSError as error:
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            if error.errno == errno.EADDRINUSE:
                why = "another program listens there; stop it, or choose another port"
            else:
                why = error.strerror or str(error)
            raise ConfigurationError(f"cannot serve health and metrics on {where}: {why}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def port(self) -> int:
        """The port it serves on."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) <= CONNECTION_LIMIT:
                async with asyncio.timeout(REQUEST_SECONDS):
                    head = await _read_head(reader)
                answer = await self._answer(head)
                async with asyncio.timeout(REQUEST_SECONDS):
                    writer.write(answer)
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # a slow or vanished client is its own problem
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _answer(self, head: bytes | None) -> bytes:
        if head is None:
            return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        target, _, version = rest.partition(" ")
        if not version.startswith("HTTP/1.") or not target.startswith("/"):
            return _response(HTTPStatus.BAD_REQUEST)
        if method not in ("GET", "HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, extra="Allow: GET, HEAD\r\n")
        status, kind, body = await self._page(target.partition("?")[0])
        return _response(status, kind, body, with_body=method == "GET")

    async def _page(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        if path == "/livez":
            health = self._health()
            return _verdict(health.live, "live", health.unhealthy, health.notes)
        if path == "/readyz":
            health = self._health()
            return _verdict(health.ready, "ready", health.unready, health.notes)
        if path == "/metrics":
            try:
                async with asyncio.timeout(METRICS_SECONDS):
                    return HTTPStatus.OK, CONTENT_TYPE, await self._metrics()
            except Exception as error:  # the text may hold what is not for everybody's eyes: it goes to the log
                log.warning("no metrics: %s", describe(error))
                return HTTPStatus.SERVICE_UNAVAILABLE, TEXT, b"no metrics now; the log says why\n"
        return HTTPStatus.NOT_FOUND, TEXT, b"there are /livez, /readyz and /metrics\n"


async def _read_head(reader: asyncio.StreamReader) -> bytes | None:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        return None


def _verdict(well: bool, word: str, reasons: tuple[str, ...], notes: tuple[str, ...]) -> tuple[HTTPStatus, str, bytes]:
    body = {word: well, "reasons": reasons, "notes": notes}
    return HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE, JSON, json.dumps(body).encode() + b"\n"


def _response(
    status: HTTPStatus, kind: str = TEXT, body: bytes | None = None, *, with_body: bool = True, extra: str = ""
) -> bytes:
    body = f"{status.phrase}\n".encode() if body is None else body
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        f"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n{extra}\r\n"
    )
    return head.encode("latin-1") + (body if with_body else b"")
