"""conveyor doctor on servers: which promises they keep, and what about them is risky, in words."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from conveyor import brokers
from conveyor.broker import Queue
from conveyor.core.message import Message
from servers.certificate import Certificate
from servers.redis import Redis
from tests.cli.conftest import PATIENCE_SECONDS

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ
    from tests.cli.conftest import Program

FEW: Final = "publishing,priority,bounds"
NONE_PUBLISHED: Final = "risks_are_told_in_sentences"


@contextmanager
def a_redis_with(folder: Path, **settings: str) -> Iterator[Redis]:
    """A server whose settings are a risk."""
    with closing(Redis(folder)) as server:
        for name, value in settings.items():
            server.configure(name.replace("_", "-"), value)
        yield server


@pytest.mark.parametrize(
    ("broker", "options", "not_asked"),
    [("redis", "", set()), ("rabbitmq", "", {"priority"}), ("rabbitmq", "?queue_type=priority", set())],
    ids=["redis", "rabbitmq, quorum", "rabbitmq, priority"],
)
def test_a_server_keeps_the_promises_that_doctor_asks_for(
    conveyor: Program, request: pytest.FixtureRequest, broker: str, options: str, not_asked: set[str]
) -> None:
    url = request.getfixturevalue(broker).url() + options
    found = conveyor.json("doctor", "--broker", url, "--only", FEW)
    assert found["ok"] is True
    assert {each["area"] for each in found["promises"]} == set(FEW.split(","))
    assert {each["area"] for each in found["promises"] if each["verdict"] == "skipped"} == not_asked
    assert {each["verdict"] for each in found["promises"]} <= {"passed", "skipped"}
    assert not_asked <= set(found["missing"])
    assert "guest:guest" not in str(found)
    # It works with queues of its own, and takes them with it.
    assert conveyor.json("queues", "--broker", url)["queues"] == []


async def test_doctor_removes_what_a_run_left_that_was_killed(conveyor: Program, redis: Redis) -> None:
    url, now = redis.url(), int(time.time())
    old, young = f"promise-{now - 3600:x}-0123456789ab.1", f"promise-{now:x}-0123456789ab.1"
    names = [old, young, "promise-of-somebody-else.1"]
    broker = brokers.from_url(url)
    await broker.open()
    await broker.declare([Queue(name=name, topics=(name,)) for name in names])
    await broker.publish([Message("m", old, b"left")])
    await asyncio.to_thread(conveyor.ok, "doctor", "--broker", url, "--only", NONE_PUBLISHED)
    assert {each.name for each in await broker.queues()} == {young, "promise-of-somebody-else.1"}
    await broker.close()


def test_doctor_stops_when_the_server_dies_under_it(conveyor: Program, tmp_path: Path) -> None:
    with closing(Redis(tmp_path)) as server:
        examining = subprocess.Popen(
            conveyor.command("doctor", "--broker", server.url()),
            cwd=conveyor.folder,
            env=conveyor.environment | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with examining:
            assert examining.stdout is not None
            while b"  kept " not in examining.stdout.readline():
                pass
            server.kill()
            _, said = examining.communicate(timeout=PATIENCE_SECONDS)
    assert examining.returncode == 1
    assert "the server went away after" in said.decode()
    assert "Traceback" not in said.decode()


def test_what_is_risky_about_a_redis_is_said_in_words(conveyor: Program, redis: Redis, tmp_path: Path) -> None:
    said = conveyor.ok("doctor", "--broker", redis.url(), "--only", NONE_PUBLISHED)
    assert "risk: Redis writes to the disk once a second (appendfsync everysec)" in said
    assert "1 of 1 promises kept" in said
    with a_redis_with(tmp_path, appendonly="no") as forgetful:
        found = conveyor.json("doctor", "--broker", forgetful.url(), "--only", NONE_PUBLISHED)
    [risk] = found["risks"]
    assert risk.startswith("Redis keeps no append-only file")
    assert risk.endswith("Set appendonly yes.")


def test_a_redis_that_evicts_is_refused_in_words(conveyor: Program, tmp_path: Path) -> None:
    with a_redis_with(tmp_path, maxmemory="100mb", maxmemory_policy="allkeys-lru") as evicting:
        said = conveyor.refused("doctor", "--broker", evicting.url(), "--only", NONE_PUBLISHED, code=1)
    assert "Redis deletes messages when its memory is full (maxmemory-policy allkeys-lru): set it to noeviction" in said


def test_a_redis_is_examined_over_tls_and_one_that_cannot_be_trusted_is_named_without_the_password(
    conveyor: Program, tmp_path: Path
) -> None:
    certificate = Certificate.make(tmp_path)
    with closing(Redis(tmp_path)) as server:
        port = server.serve_tls(certificate)
        url = server.url(port=port).replace("redis://", "rediss://default:s3cr3t@")
        found = conveyor.json("doctor", "--broker", f"{url}&cafile={certificate.authority}", "--only", FEW)
        assert {each["verdict"] for each in found["promises"]} == {"passed"}
        assert "s3cr3t" not in str(found)
        said = conveyor.refused("doctor", "--broker", url, "--only", NONE_PUBLISHED, code=1)
    assert f"no connection to Redis at 127.0.0.1:{port}: its certificate is refused" in said
    assert "cafile= in the URL" in said
    assert "s3cr3t" not in said


def test_what_is_risky_about_a_rabbitmq_is_said_in_words(conveyor: Program, rabbitmq: RabbitMQ) -> None:
    url = rabbitmq.url()
    quorum = conveyor.json("doctor", "--broker", url, "--only", NONE_PUBLISHED)
    assert quorum["risks"] == []
    two_nodes = url.replace(f":{rabbitmq.port}/", f":{rabbitmq.port},127.0.0.1:{rabbitmq.port}/")
    said = conveyor.ok("doctor", "--broker", f"{two_nodes}?queue_type=classic", "--only", NONE_PUBLISHED)
    assert "risk: Classic queues live on one node of the cluster" in said


def test_handlers_that_may_outlast_the_server_s_patience_are_risks_of_the_app(
    conveyor: Program, rabbitmq: RabbitMQ
) -> None:
    url = f"{rabbitmq.url()}?consumer_timeout=60"
    found = conveyor.json("doctor", "--broker", url, "--app", "shop:app", "--only", NONE_PUBLISHED)
    risks = " ".join(found["risks"])
    assert "worker charge may take" in risks
    assert "consumer_timeout" in risks


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{port}/0", "amqp://guest:secret@127.0.0.1:{port}/"])
def test_a_server_that_is_not_there_is_a_failure_in_words(conveyor: Program, free_port: int, url: str) -> None:
    said = conveyor.refused("doctor", "--broker", url.format(port=free_port), code=1)
    assert f"127.0.0.1:{free_port}" in said
    assert "secret" not in said


def test_a_virtual_host_that_is_not_there_is_told_with_the_server_s_words(
    conveyor: Program, rabbitmq: RabbitMQ
) -> None:
    url = f"amqp://guest:guest@127.0.0.1:{rabbitmq.port}/absent"
    rabbitmq.start()
    assert "vhost absent not found" in conveyor.refused("doctor", "--broker", url, code=1)


def test_what_is_risky_about_a_redis_is_not_said_above_every_list(conveyor: Program, tmp_path: Path) -> None:
    with a_redis_with(tmp_path, appendonly="no") as forgetful:
        assert conveyor.run("queues", "--broker", forgetful.url()).stderr == ""
