"""A broker's server that dies, sleeps or is cut off: work resumes unaided, and nothing that was accepted is lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from redis.asyncio import Redis as RedisClient

from conveyor import Conveyor
from conveyor.errors import BrokerUnavailable, PublishFailed
from servers.proxy import Proxy
from servers.rabbitmq import RabbitMQ
from servers.redis import Redis

if TYPE_CHECKING:
    from conveyor.runtime.runner import Runner
    from tests.faults.conftest import Eventually, World

RESUMES_SECONDS: Final = 30.0
"""The bound: so long after a server is there again, at the latest, messages are handled again. Of a connection that fell silent it
counts from the silence. Trying again takes five seconds at most, noticing the silence two heartbeats or one time-out for answers."""
PUBLISH_SECONDS: Final = 60.0
"""A publish that says nothing for so long hangs."""
LEASE_SECONDS: Final = 2.0
IN_FLIGHT: Final = 16
"""Messages that the worker holds at most."""
PUBLISHERS: Final = 4
BETWEEN_SECONDS: Final = 0.01
CLIENTS: Final = 500
AT_A_TIME: Final = 20
ANSWER_LOST: Final = b"the-answer-to-this-is-lost"


@dataclass(frozen=True)
class Numbered:
    number: int


@dataclass(frozen=True)
class Followed:
    number: int
    mark: str


@dataclass
class Site:
    """A server, a proxy before it, and a URL that leads through the proxy."""

    server: RabbitMQ | Redis
    proxy: Proxy
    url: str
    direct: str

    async def connections(self) -> int:
        """How many connections the server has, but for the one that asks."""
        if isinstance(self.server, RabbitMQ):
            return len(self.server.ctl("list_connections", "pid").strip().splitlines()[1:])
        async with RedisClient(port=self.server.port) as client:
            return len(await client.client_list()) - 1


@pytest.fixture(params=["rabbitmq-quorum", "rabbitmq-classic", "redis"])
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    kind, _, queue_type = request.param.partition("-")
    server: RabbitMQ | Redis = request.getfixturevalue(kind)
    direct = await asyncio.to_thread(server.url)
    if queue_type:
        direct += f"?queue_type={queue_type}&heartbeat=4"
    async with Proxy(server.port) as proxy:
        yield Site(server, proxy, direct.replace(f":{server.port}/", f":{proxy.port}/"), direct)
    await asyncio.to_thread(server.start)


@dataclass
class Load:
    """Publishers that remember what became of each message, and a worker that remembers what it handled."""

    app: Conveyor
    handled: Counter[int] = field(default_factory=Counter)
    accepted: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)
    other: list[BaseException] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)

    async def publish(self) -> None:
        number = next(self.numbers)
        id = f"message-{number}"
        try:
            async with asyncio.timeout(PUBLISH_SECONDS):
                await self.app.publish(Numbered(number), id=id)
        except PublishFailed as error:
            assert {*error.refused, *error.unknown} == {id}
            (self.unknown if id in error.unknown else self.refused).add(number)
        except BrokerUnavailable:
            self.refused.add(number)
        else:
            self.accepted.add(number)

    async def go_on(self) -> None:
        while True:
            try:
                await self.publish()
            except Exception as error:
                self.other.append(error)
            await asyncio.sleep(BETWEEN_SECONDS)

    @property
    def told(self) -> str:
        """How far it is, for whoever waits in vain."""
        missing = sorted(self.accepted - set(self.handled))
        return (
            f"{len(self.accepted)} accepted, {len(self.refused)} refused, {len(self.unknown)} unknown,"
            f" {len(self.handled)} handled; accepted and not handled: {missing[:20]}; {self.other[:3]}"
        )


@contextlib.asynccontextmanager
async def under_load(url: str) -> AsyncIterator[tuple[Load, Runner]]:
    """An application on the broker with its worker running, and publishers that do not stop at an error."""
    app = Conveyor("faults", broker=url)
    load = Load(app)

    @app.worker(lease=LEASE_SECONDS, concurrency=IN_FLIGHT // 2, prefetch=IN_FLIGHT)
    async def take(event: Numbered) -> None:
        load.handled[event.number] += 1

    async with app.running() as runner:
        publishers = [asyncio.create_task(load.go_on()) for _ in range(PUBLISHERS)]
        try:
            yield load, runner
        finally:
            for each in publishers:
                each.cancel()
            await asyncio.gather(*publishers, return_exceptions=True)


async def resumed(load: Load, eventually: Eventually) -> None:
    """Messages that are published from now on are accepted and handled."""
    begin = next(load.numbers)

    def look() -> bool:
        return any(number > begin and number in load.handled for number in load.accepted)

    await eventually(look, lambda: load.told, RESUMES_SECONDS)


async def complete(load: Load, eventually: Eventually, *, breaks: int) -> None:
    """Everything that was accepted by now is handled, nobody was told what is not so, and no more came again than was under way.

    Parameters:
        breaks: how often connections were lost. Each time, what the worker held comes again, and what it had settled in that moment,
            of which the server may not have known yet, or not on its disk.
    """
    accepted = set(load.accepted)
    await eventually(lambda: accepted <= set(load.handled), lambda: load.told)
    assert not load.other, load.told
    assert not load.refused & set(load.handled), (
        f"refused, and yet delivered: {sorted(load.refused & set(load.handled))}"
    )
    again = {number: times - 1 for number, times in load.handled.items() if times > 1}
    assert sum(again.values()) <= breaks * 2 * IN_FLIGHT, f"{len(again)} of {len(load.handled)} came again: {again}"
    assert max(again.values(), default=0) <= breaks, f"what was lost {breaks} times came again more often: {again}"


def files() -> int:
    """Descriptors that this process has."""
    return len(descriptors())


def descriptors() -> list[str]:
    """Where they lead."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one of this very look
            found.append(str(each.readlink()))
    return found


@contextlib.asynccontextmanager
async def nothing_left(site: Site, eventually: Eventually) -> AsyncIterator[None]:
    """Behind the block there are no more tasks, descriptors and connections than before it."""
    before, tasks = files(), len(asyncio.all_tasks())
    yield
    await eventually(lambda: site.proxy.connections == 0, lambda: site.proxy.connections)
    site.proxy.cut()  # the server's side of what was half open
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks, asyncio.all_tasks)
    await eventually(
        lambda: files() <= before,
        descriptors,
    )


async def test_a_server_that_is_killed_and_restarted_under_load_loses_nothing(
    site: Site, eventually: Eventually
) -> None:
    async with nothing_left(site, eventually), under_load(site.url) as (load, runner):
        await resumed(load, eventually)
        connected = site.proxy.connections
        site.server.kill()
        await eventually(lambda: not runner.health().ready, runner.health)
        assert any(runner.health().unready), "it does not say why it is not ready"
        await eventually(lambda: load.refused or load.unknown, lambda: load.told)
        await asyncio.to_thread(site.server.start)
        await resumed(load, eventually)
        await complete(load, eventually, breaks=1)
        await eventually(lambda: site.proxy.connections <= connected, lambda: site.proxy.connections)


async def test_a_server_that_is_restarted_in_order_loses_nothing(site: Site, eventually: Eventually) -> None:
    async with under_load(site.url) as (load, _):
        await resumed(load, eventually)
        await asyncio.to_thread(site.server.restart)
        await resumed(load, eventually)
        await complete(load, eventually, breaks=2)


async def test_a_server_that_sleeps_longer_than_the_lease_loses_nothing(site: Site, eventually: Eventually) -> None:
    async with nothing_left(site, eventually), under_load(site.url) as (load, _):
        await resumed(load, eventually)
        site.server.pause()
        try:
            await asyncio.sleep(LEASE_SECONDS * 1.5)
        finally:
            site.server.resume()
        await resumed(load, eventually)
        await complete(load, eventually, breaks=1)


async def test_connections_that_are_cut_are_made_anew(site: Site, eventually: Eventually) -> None:
    async with nothing_left(site, eventually), under_load(site.url) as (load, _):
        for _ in range(5):
            await resumed(load, eventually)
            site.proxy.cut()
        await resumed(load, eventually)
        await complete(load, eventually, breaks=5)


async def test_a_server_that_cannot_be_reached_for_a_while_is_found_again(site: Site, eventually: Eventually) -> None:
    async with nothing_left(site, eventually), under_load(site.url) as (load, runner):
        await resumed(load, eventually)
        site.proxy.refuse()
        await eventually(lambda: not runner.health().ready, runner.health)
        await eventually(lambda: load.refused or load.unknown, lambda: load.told)
        site.proxy.accept()
        await resumed(load, eventually)
        await complete(load, eventually, breaks=1)


async def test_a_connection_that_falls_silent_is_given_up(site: Site, eventually: Eventually) -> None:
    async with nothing_left(site, eventually), under_load(site.url) as (load, _):
        await resumed(load, eventually)
        site.proxy.fall_silent()
        await resumed(load, eventually)
        await complete(load, eventually, breaks=1)


async def test_a_slow_network_is_only_slow(site: Site, eventually: Eventually) -> None:
    site.proxy.delay_seconds = 0.05
    async with under_load(site.url) as (load, _):
        await resumed(load, eventually)
        await eventually(lambda: len(load.accepted) > 20, lambda: load.told)
        await complete(load, eventually, breaks=0)
        assert not load.refused | load.unknown, load.told


async def test_a_publish_whose_answer_is_lost_has_a_clear_end_and_is_delivered_once(
    site: Site, eventually: Eventually
) -> None:
    app = Conveyor("faults", broker=site.url)
    received: Counter[str] = Counter()

    @app.worker
    async def take(event: Followed) -> None:
        received[event.mark] += 1

    async with app.running():
        await app.publish(Followed(0, "before"))
        lost = site.proxy.lose_answer_to(ANSWER_LOST)
        try:
            await app.publish(Followed(1, ANSWER_LOST.decode()), id="the-one")
        except PublishFailed as failed:  # a broker that can tell a repeat asks again, and succeeds
            assert (set(failed.refused), set(failed.unknown)) == (set(), {"the-one"})
        assert lost.is_set()
        await eventually(lambda: received[ANSWER_LOST.decode()] == 1, lambda: received)

        async def works() -> bool:
            try:
                await app.publish(Followed(2, "after"))
            except BrokerUnavailable:
                return False
            return True

        await eventually(works, seconds=RESUMES_SECONDS)
        await eventually(lambda: received["after"] == 1, lambda: received)


async def test_a_settlement_whose_answer_is_lost_loses_nothing_that_it_emits(
    site: Site, eventually: Eventually
) -> None:
    app = Conveyor("faults", broker=site.url)
    followed: Counter[str] = Counter()

    @app.worker
    async def lead(event: Numbered) -> Followed:
        return Followed(event.number, ANSWER_LOST.decode())

    @app.worker
    async def follow(event: Followed) -> None:
        followed[event.mark] += 1

    async with app.running() as runner, Conveyor("faults", broker=site.direct) as visitor:
        lost = site.proxy.lose_answer_to(ANSWER_LOST)
        # Not through the proxy: there the handler's answer may cut off this one's, and its fate would be unknown.
        await visitor.publish(Numbered(1), topic="numbered")
        await lost.wait()
        await eventually(lambda: followed[ANSWER_LOST.decode()] >= 1, lambda: (followed, runner.health()))
        # Where the broker cannot fence, it may come twice, under one id.
        broker = (await app.connect()).broker

        async def drained() -> bool:
            try:
                queues = await broker.queues()
            except BrokerUnavailable:
                return False
            return all(each.ready + each.in_flight + each.delayed + each.dead == 0 for each in queues)

        await eventually(drained, runner.health, RESUMES_SECONDS)


async def test_five_hundred_clients_that_connect_publish_and_leave_leave_nothing_behind(
    site: Site, eventually: Eventually
) -> None:
    app = Conveyor("faults", broker=site.direct)

    @app.worker
    async def take(event: Numbered) -> None: ...

    async with app:
        await app.connect()
        broker = (await app.connect()).broker
        before, tasks, held = await site.connections(), len(asyncio.all_tasks()), files()
        turns = asyncio.Semaphore(AT_A_TIME)

        async def client(number: int) -> None:
            async with turns:
                visitor = Conveyor("faults", broker=site.direct)
                async with visitor:
                    await visitor.publish(Numbered(number), topic="numbered")

        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(client(number))
        [queue] = [each for each in await broker.queues() if each.name == "faults.take"]
        assert queue.ready == CLIENTS

        async def gone() -> bool:
            return await site.connections() <= before

        await eventually(gone)
        assert len(asyncio.all_tasks()) <= tasks, asyncio.all_tasks()
        assert files() <= held, descriptors()


async def test_readyz_says_why_while_the_server_is_away_and_no_longer(
    site: Site, world: World, eventually: Eventually, free_port: int
) -> None:
    program = world.run("never_calm", f"--http=127.0.0.1:{free_port}", CONVEYOR_BROKER=site.url)

    async def probe() -> tuple[int, dict[str, Any]]:
        return await asyncio.to_thread(readyz, free_port)

    async def answers(status: int) -> dict[str, Any]:
        async def look() -> dict[str, Any] | None:
            code, body = await probe()
            return body if code == status else None

        return await eventually(look, program.said)

    await answers(200)
    site.proxy.refuse()
    assert any((await answers(503))["reasons"]), program.said()
    site.proxy.accept()
    await answers(200)
    await program.stop()


def readyz(port: int) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, {}
