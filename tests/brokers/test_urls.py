"""What is wrong with a broker's URL is said in words, and never with the password in it."""

from __future__ import annotations

import asyncio

import pytest

from conveyor.brokers import from_url
from conveyor.errors import BrokerUnavailable, ConfigurationError
from servers.rabbitmq import RabbitMQ


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("amqp:/guest:s3cret@host", "begins with amqp://"),
        ("redis:s3cret@host", "begins with redis://"),
        ("amqp://guest:s3@c/ret@host/", "@ is written %40 and / is written %2F"),
        ("amqp://guest:s3c/ret@host", "@ is written %40 and / is written %2F"),
        ("redis://:s3c/ret@host/0", "@ is written %40 and / is written %2F"),
    ],
)
def test_a_url_that_was_written_wrongly_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        from_url(url)
    assert said in str(refused.value)
    assert not any(part in str(refused.value) for part in ("s3", "ret@"))


async def test_tls_to_a_port_without_it_asks_whether_it_speaks_tls(rabbitmq: RabbitMQ) -> None:
    url = await asyncio.to_thread(rabbitmq.url)
    broker = from_url(url.replace("amqp://", "amqps://") + "?verify=no")
    with pytest.raises(BrokerUnavailable, match="does it speak TLS on this port"):
        await broker.open()


async def test_a_server_that_is_no_redis_is_named_once(rabbitmq: RabbitMQ) -> None:
    await asyncio.to_thread(rabbitmq.start)
    broker = from_url(f"redis://127.0.0.1:{rabbitmq.port}")
    with pytest.raises(BrokerUnavailable) as refused:
        await broker.open()
    assert str(refused.value).count(str(rabbitmq.port)) == 1
