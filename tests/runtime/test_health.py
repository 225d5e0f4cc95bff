"""Probes get a truthful answer, and nobody can hurt the process by asking."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator

import httpx
import pytest

from conveyor.errors import ConfigurationError
from conveyor.runtime import health
from conveyor.runtime.health import Health, HealthServer
from conveyor.runtime.metrics import CONTENT_TYPE


class World:
    """A process whose health a test decides."""

    def __init__(self) -> None:
        self.health = Health()
        self.metrics: bytes | Exception = b"conveyor_x 1\n"

    async def measure(self) -> bytes:
        if isinstance(self.metrics, Exception):
            raise self.metrics
        return self.metrics


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def server(world: World) -> AsyncIterator[HealthServer]:
    async with HealthServer(("127.0.0.1", 0), health=lambda: world.health, metrics=world.measure) as server:
        yield server


@pytest.fixture
async def http(server: HealthServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        yield client


async def raw(server: HealthServer, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(data)
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def connections(server: HealthServer, count: int) -> None:
    while len(server._connections) != count:
        await asyncio.sleep(0)


async def test_a_well_process_is_live_and_ready(http: httpx.AsyncClient) -> None:
    assert (await http.get("/livez")).json() == {"live": True, "reasons": [], "notes": []}
    answer = await http.get("/readyz?verbose=1")
    assert (answer.status_code, answer.json()["ready"]) == (200, True)


async def test_a_process_that_is_not_ready_says_why_and_stays_live(world: World, http: httpx.AsyncClient) -> None:
    world.health = Health(unready=("draining", "broker: <gone>\n"), notes=("2 of 4",))
    answer = await http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "reasons": ["draining", "broker: <gone>\n"], "notes": ["2 of 4"]}
    assert (await http.get("/livez")).status_code == 200


async def test_a_stalled_process_is_not_live_and_says_why(world: World, http: httpx.AsyncClient) -> None:
    world.health = Health(unhealthy=("shop.charge: 7 ready, none fetched",))
    answer = await http.get("/livez")
    assert (answer.status_code, answer.json()["reasons"]) == (503, ["shop.charge: 7 ready, none fetched"])


async def test_metrics_come_in_prometheus_own_type(http: httpx.AsyncClient) -> None:
    answer = await http.get("/metrics")
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (
        200,
        b"conveyor_x 1\n",
        CONTENT_TYPE,
    )


async def test_metrics_that_fail_tell_the_log_and_not_the_caller(
    world: World, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    world.metrics = RuntimeError("redis://user:secret@host is down")
    with caplog.at_level(logging.WARNING, "conveyor.health"):
        answer = await http.get("/metrics")
    assert answer.status_code == 503
    assert "secret" not in answer.text
    assert "is down" in caplog.text


async def test_a_head_request_gets_the_head_only(http: httpx.AsyncClient) -> None:
    answer = await http.head("/livez")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_nothing_can_be_changed(http: httpx.AsyncClient, method: str) -> None:
    answer = await http.request(method, "/livez")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_an_unknown_page_says_what_there_is(http: httpx.AsyncClient) -> None:
    answer = await http.get("/metrics/../etc")
    assert answer.status_code == 404
    assert "/livez" in answer.text


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x00\xa5\r\n\r\n", b"400"),
        (b"GET /livez\r\n\r\n", b"400"),
        (b"GET http://elsewhere/ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /livez HTTP/1.1\r\nX: " + b"x" * health.REQUEST_LIMIT * 2 + b"\r\n\r\n", b"431"),
        (b"GET /" + b"\xff" * 100 + b" HTTP/1.1\r\n\r\n", b"404"),
    ],
)
async def test_a_malformed_request_is_refused(server: HealthServer, request_bytes: bytes, status: bytes) -> None:
    answer = await raw(server, request_bytes)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 " + status)


async def test_a_client_that_sends_nothing_is_let_go(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "REQUEST_SECONDS", 0.05)
    assert await raw(server, b"GET /livez HTTP/1.1\r\n") == b""


async def test_too_many_connections_are_refused_and_later_ones_served(
    server: HealthServer, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CONNECTION_LIMIT", 1)
    _, idle = await asyncio.open_connection("127.0.0.1", server.port)
    await connections(server, 1)
    assert await raw(server, b"GET /livez HTTP/1.1\r\n\r\n") == b""
    idle.close()
    await connections(server, 0)
    assert (await http.get("/livez")).status_code == 200


async def test_closing_ends_open_connections(world: World) -> None:
    async with HealthServer(("127.0.0.1", 0), health=lambda: world.health, metrics=world.measure) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await connections(server, 1)
    try:
        assert await reader.read() == b""
    except ConnectionResetError:
        pass
    writer.close()


async def test_a_taken_address_is_a_clear_error(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{address[1]}: another program listens there"):
            await HealthServer(address, health=lambda: world.health, metrics=world.measure).__aenter__()


async def test_an_address_that_is_not_ours_is_a_clear_error(world: World) -> None:
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1:9000"):
        await HealthServer(("192.0.2.1", 9000), health=lambda: world.health, metrics=world.measure).__aenter__()
