"""Queues that somebody deletes under a running application: it declares them again, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest
from redis.asyncio import Redis as RedisClient

from conveyor import Conveyor
from conveyor.brokers.rabbitmq import RabbitBroker
from conveyor.errors import BrokerError
from servers.rabbitmq import USER

if TYPE_CHECKING:
    from conveyor.runtime.runner import Runner
    from servers.rabbitmq import RabbitMQ
    from servers.redis import Redis
    from tests.faults.conftest import Eventually

QUEUE = "faults.take"


@dataclass(frozen=True)
class Numbered:
    number: int


@dataclass
class Site:
    """An application at work."""

    app: Conveyor
    runner: Runner
    handled: Counter[int] = field(default_factory=Counter)
    number: int = 0

    async def works(self) -> bool:
        """Whether something that was published by now has been handled since the last look."""
        before = sum(self.handled.values())
        self.number += 1
        with contextlib.suppress(BrokerError):
            await self.app.publish(Numbered(self.number))
        await asyncio.sleep(0.05)
        return sum(self.handled.values()) > before


@contextlib.asynccontextmanager
async def at_work(url: str, eventually: Eventually) -> AsyncIterator[Site]:
    app = Conveyor("faults", broker=url)
    handled: Counter[int] = Counter()

    @app.worker(lease=2.0)
    async def take(event: Numbered) -> None:
        handled[event.number] += 1

    async with app.running() as runner:
        site = Site(app, runner, handled)
        await eventually(site.works)
        yield site


async def delete(site: Site, *queues: str) -> None:
    broker = (await site.app.connect()).broker
    assert isinstance(broker, RabbitBroker)
    for queue in queues:
        await broker.topology.delete(queue)


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_queues_that_are_deleted_on_rabbitmq_are_declared_again(
    rabbitmq: RabbitMQ, queue_type: str, eventually: Eventually
) -> None:
    url = await asyncio.to_thread(rabbitmq.url)
    async with at_work(f"{url}?queue_type={queue_type}", eventually) as site:
        await delete(site, QUEUE)
        await eventually(site.works, site.runner.health)
        await delete(site, QUEUE, f"{QUEUE}.later", f"{QUEUE}.dead", "conveyor.catalog")
        await eventually(site.works, site.runner.health)
        await eventually(lambda: site.runner.health().ready, site.runner.health)


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_what_is_given_back_into_a_queue_that_is_gone_is_told_once(
    rabbitmq: RabbitMQ, queue_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = Conveyor("faults", broker=f"{await asyncio.to_thread(rabbitmq.url)}?queue_type={queue_type}")
    begun, go = asyncio.Event(), asyncio.Event()

    @app.worker(concurrency=1)
    async def take(_: Numbered) -> None:
        begun.set()
        await go.wait()

    async with app.running() as runner:
        for number in range(5):
            await app.publish(Numbered(number))
        await begun.wait()
        broker = (await app.connect()).broker
        assert isinstance(broker, RabbitBroker)
        await broker.topology.delete(QUEUE)
        asyncio.get_running_loop().call_soon(go.set)
        assert await runner.drain()
    said = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert not [line for line in said if "dead letter" in line]
    assert len([line for line in said if "was deleted, and with it" in line]) <= 1


async def test_a_virtual_host_that_is_made_anew_gets_its_queues_again(
    rabbitmq: RabbitMQ, eventually: Eventually
) -> None:
    url = await asyncio.to_thread(rabbitmq.url)
    name = urlsplit(url).path[1:]
    async with at_work(url, eventually) as site:
        await asyncio.to_thread(rabbitmq.ctl, "delete_vhost", name)
        await eventually(lambda: not site.runner.health().ready, site.runner.health)
        await asyncio.to_thread(rabbitmq.ctl, "add_vhost", name)
        await asyncio.to_thread(rabbitmq.ctl, "set_permissions", "--vhost", name, USER, ".*", ".*", ".*")
        await eventually(site.works, site.runner.health)
        await eventually(lambda: site.runner.health().ready, site.runner.health)


async def test_a_process_that_only_watches_sees_what_comes_after_the_virtual_host_was_made_anew(
    rabbitmq: RabbitMQ, eventually: Eventually
) -> None:
    url = await asyncio.to_thread(rabbitmq.url)
    name = urlsplit(url).path[1:]
    web = Conveyor("web", broker=url)
    seen: set[int] = set()

    async def watch() -> None:
        async for event in web.watch(Numbered):
            seen.add(event.number)

    async def shown(number: int) -> None:
        async with Conveyor("shop", broker=url) as shop:

            async def is_shown() -> bool:
                await shop.publish(Numbered(number))
                return number in seen

            await eventually(is_shown)

    async with web:
        watching = asyncio.create_task(watch())
        await shown(1)
        broker = (await web.connect()).broker
        assert isinstance(broker, RabbitBroker)
        before = await broker.connection()
        # Nobody is connected while it is deleted: what is declared in that moment would be left behind, locked for ever.
        await asyncio.to_thread(rabbitmq.ctl, "clear_permissions", "--vhost", name, USER)
        await asyncio.to_thread(rabbitmq.ctl, "close_all_connections", "--vhost", name, "the end")
        await eventually(before.closed.done)
        await asyncio.to_thread(rabbitmq.ctl, "delete_vhost", name)
        await asyncio.to_thread(rabbitmq.ctl, "add_vhost", name)
        await asyncio.to_thread(rabbitmq.ctl, "set_permissions", "--vhost", name, USER, ".*", ".*", ".*")

        async def is_back() -> bool:
            with contextlib.suppress(BrokerError):
                await broker.connection()
                return True
            return False

        await eventually(is_back)  # before anybody who publishes
        await shown(2)
        watching.cancel()


@pytest.mark.parametrize("what", ["stream", "group", "settings", "all"])
async def test_what_is_deleted_of_a_queue_on_redis_is_made_again(
    redis: Redis, what: str, eventually: Eventually
) -> None:
    url = await asyncio.to_thread(redis.url)
    prefix = f"{{{parse_qs(urlsplit(url).query)['namespace'][0]}}}:"
    async with RedisClient(port=redis.port) as client, at_work(url, eventually) as site:
        if what == "group":
            await client.xgroup_destroy(f"{prefix}queue:{QUEUE}", "conveyor")
        elif what == "all":
            await client.delete(*[key async for key in client.scan_iter(f"{prefix}*") if b"owner:" not in key])
        else:
            await client.delete(f"{prefix}{'queue' if what == 'stream' else what}:{QUEUE}")
        await eventually(site.works, site.runner.health)
        await eventually(lambda: site.runner.health().ready, site.runner.health)
        broker = (await site.app.connect()).broker

        async def is_counted() -> bool:
            return [each.consumers for each in await broker.queues() if each.name == QUEUE] == [1]

        await eventually(is_counted)  # with its next sign of life
