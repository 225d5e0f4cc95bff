"""The servers that tests run against: they keep what they were told, and leave nothing behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pika
import pika.exceptions
import pytest
import redis as redis_py
from redis.asyncio import Redis as Client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from servers.proxy import Proxy

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ
    from servers.redis import Redis

WAIT_SECONDS: Final = 20.0
NEVER: Final = Retry(NoBackoff(), 0)


def test_what_redis_acknowledged_survives_its_crash(redis: Redis) -> None:
    redis.start()
    with redis_py.Redis(port=redis.port) as client:
        client.set("kept", "yes")
        redis.kill()
        redis.start()
        assert client.get("kept") == b"yes"


def test_what_rabbitmq_confirmed_survives_its_crash(rabbitmq: RabbitMQ) -> None:
    parameters = pika.URLParameters(rabbitmq.url())
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare("kept", durable=True)
        channel.basic_publish("", "kept", b"yes", pika.BasicProperties(delivery_mode=2), mandatory=True)
        rabbitmq.kill()
        with pytest.raises(pika.exceptions.AMQPConnectionError):
            connection.process_data_events(None)
    rabbitmq.start()
    with pika.BlockingConnection(parameters) as connection:
        assert connection.channel().basic_get("kept", auto_ack=True)[2] == b"yes"


def test_rabbitmq_takes_settings_and_tells_of_itself(rabbitmq: RabbitMQ) -> None:
    name = rabbitmq.url().rpartition("/")[2]
    assert name in rabbitmq.ctl("list_vhosts")
    rabbitmq.set("consumer_timeout", "1234")
    assert rabbitmq.evaluate("application:get_env(rabbit, consumer_timeout)") == "{ok, 1234}"
    rabbitmq.evaluate("application:unset_env(rabbit, consumer_timeout)")


def test_a_killed_test_process_takes_its_server_with_it(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from servers.redis import Redis
server = Redis(Path({str(tmp_path)!r}))
server.start()
print(server.pid, flush=True)
input()
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None
        server = os.pidfd_open(int(holder.stdout.readline()))
        holder.send_signal(signal.SIGKILL)
    assert select.select([server], [], [], WAIT_SECONDS)[0], "the server outlives the process that started it"
    os.close(server)


async def test_the_proxy_lets_the_server_have_the_frame_and_loses_its_answer(redis: Redis) -> None:
    redis.start()
    async with (
        Proxy(redis.port) as proxy,
        Client(port=redis.port) as direct,
        Client(port=proxy.port, retry=NEVER) as client,
    ):
        await client.set("before", "x")
        lost = proxy.lose_answer_to(b"the-mark")
        with pytest.raises(redis_py.ConnectionError):
            await client.set("told", "the-mark")
        assert lost.is_set()
        assert await direct.get("told") == b"the-mark"
        assert await client.set("after", "x")


async def test_the_proxy_cuts_refuses_and_falls_silent(redis: Redis) -> None:
    redis.start()
    async with Proxy(redis.port) as proxy, Client(port=proxy.port, retry=NEVER, socket_timeout=0.3) as client:
        assert await client.ping()
        assert proxy.connections == 1
        proxy.cut()
        with pytest.raises(redis_py.ConnectionError):
            await client.ping()
        assert await client.ping()
        proxy.fall_silent()
        with pytest.raises(redis_py.TimeoutError):
            await client.ping()
        assert await client.ping()
        proxy.refuse()
        with pytest.raises(redis_py.ConnectionError):
            await client.ping()
        proxy.accept()
        assert await client.ping()
