"""Deliveries that outlive the server's consumer_timeout on RabbitMQ: renewed, and neither lost, doubled nor in anybody's way."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from conveyor.broker import Delivery, Queue, Settlement
from conveyor.brokers.rabbitmq import RabbitBroker, order, publisher, work
from conveyor.brokers.rabbitmq.amqp import AmqpError
from conveyor.brokers.rabbitmq.held import Held
from conveyor.brokers.rabbitmq.order import Keyed
from conveyor.brokers.rabbitmq.renew import Renewals
from conveyor.brokers.rabbitmq.settle import LEASE_ENDED
from conveyor.brokers.rabbitmq.spec import Spec
from conveyor.brokers.rabbitmq.subscription import RabbitSubscription
from conveyor.core.message import Message
from conveyor.core.settle import DONE
from tests.brokers.test_rabbitmq import PATIENCE_SECONDS, opened

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ


@pytest.fixture(params=["quorum", "classic"])
def url(rabbitmq: RabbitMQ, request: pytest.FixtureRequest) -> str:
    return f"{rabbitmq.url()}?queue_type={request.param}"


async def taken(broker: RabbitBroker, queue: str, topic: str, names: str) -> tuple[RabbitSubscription, dict[str, Held]]:
    """Messages of a queue in our hands."""
    await broker.declare([Queue(name=queue, topics=(topic,))])
    await broker.publish([Message(name, topic, b"{}") for name in names])
    subscription = await broker.subscribe(queue, 10)
    held: dict[str, Held] = {}
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(held) < len(names):
            for each in await subscription.fetch(10):
                assert isinstance(each.receipt, Held)
                held[each.message.id] = each.receipt
    return subscription, held


async def test_what_is_settled_before_its_renewal_begins_is_not_renewed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as broker:
        _, held = await taken(broker, "q", "t", "abc")
        renewals, own_queue = broker._renewals, Renewals._own_queue

        async def meanwhile(self: Renewals, spec: Spec) -> tuple[str, work.Work]:
            found = await own_queue(self, spec)
            for name in settled:
                assert await broker.settle([Settlement(held[name].delivery(), DONE)]) == []
            return found

        monkeypatch.setattr(Renewals, "_own_queue", meanwhile)
        settled = "a"
        await renewals._renew(broker.specs["q"], list(held.values()))
        assert renewals._work is not None
        assert held["b"].work is renewals._work
        assert held["b"].tag in renewals._work._open
        assert len(renewals._work._open) == 2, "a copy that nobody holds comes again when the connection ends"
        settled = "bc"
        await renewals._renew(broker.specs["q"], list(held.values()))
        assert not renewals._work._open


async def test_what_goes_while_it_is_renewed_leaves_no_copy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url) as broker:
        subscription, held = await taken(broker, "q", "t", "a")
        send_all, times = publisher.Publisher.send_all, itertools.count()

        async def meanwhile(self: publisher.Publisher, batch: Sequence[publisher.Outgoing]) -> None:
            if next(times) == 0:
                broker._settling.leases_ended([held["a"]])
            await send_all(self, batch)

        monkeypatch.setattr(publisher.Publisher, "send_all", meanwhile)
        await broker._renewals._renew(broker.specs["q"], list(held.values()))
        assert broker._renewals._work is not None
        assert not broker._renewals._work._open
        async with asyncio.timeout(PATIENCE_SECONDS):
            [again] = await subscription.fetch(1)
        assert (again.message.id, again.deliveries, again.error) == ("a", 2, LEASE_ENDED)
        assert await broker.settle([Settlement(again, DONE)]) == []
        assert [info.ready + info.in_flight + info.delayed for info in await broker.queues()] == [0]


async def test_a_key_goes_on_when_the_connection_goes_while_it_is_renewed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",), ordered=True)])
        await broker.publish([Message("a", "t", b"{}", key="k")])
        subscription = await broker.subscribe("q", 10)
        keyed, settle_down, give_back = broker.keyed("q"), Keyed.settle_down, work.Work.give_back

        def cut() -> None:
            assert keyed.work is not None
            keyed.work.connection.give_up("cut")

        async def while_it_waits(self: Keyed) -> None:
            await settle_down(self)
            cut()

        def before_it_gives_back(self: work.Work, tags: Iterable[int]) -> None:
            cut()
            give_back(self, tags)

        for owner, name, lose in (
            (Keyed, "settle_down", while_it_waits),
            (work.Work, "give_back", before_it_gives_back),
        ):
            async with asyncio.timeout(PATIENCE_SECONDS):
                [held] = await subscription.fetch(10)
            with monkeypatch.context() as patched, contextlib.suppress(AmqpError):
                patched.setattr(owner, name, lose)
                await keyed.renew(float("inf"))
            assert keyed.renewing is None
            assert await broker.settle([Settlement(held, DONE)]) == [held]
        async with asyncio.timeout(PATIENCE_SECONDS):
            [held] = await subscription.fetch(10)
            await keyed.renew(float("inf"))
            assert await broker.settle([Settlement(held, DONE)]) == []
        assert [info.ready + info.in_flight + info.delayed for info in await broker.queues()] == [0]


async def test_what_is_settled_while_its_key_is_renewed_holds_up_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "RENEWAL_SECONDS", 10 * PATIENCE_SECONDS)
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",), ordered=True)])
        await broker.publish([Message(name, "t", b"{}", key="k") for name in "ab"])
        subscription = await broker.subscribe("q", 10)
        async with asyncio.timeout(PATIENCE_SECONDS):
            [held] = await subscription.fetch(10)
        keyed, settle_down, flush, go_on = broker.keyed("q"), Keyed.settle_down, work.Work.flush, asyncio.Event()

        async def slow(self: work.Work) -> None:
            await go_on.wait()
            await flush(self)

        settling: list[asyncio.Task[list[Delivery]]] = []

        async def meanwhile(self: Keyed) -> None:
            await settle_down(self)
            acknowledged = asyncio.Event()
            ack = work.Work.ack

            def telling(self: work.Work, tags: Iterable[int]) -> None:
                ack(self, tags)
                acknowledged.set()

            monkeypatch.setattr(work.Work, "ack", telling)
            monkeypatch.setattr(work.Work, "flush", slow)
            settling.append(asyncio.create_task(broker.settle([Settlement(held, DONE)])))
            await acknowledged.wait()

        with monkeypatch.context() as patched:
            patched.setattr(Keyed, "settle_down", meanwhile)
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await keyed.renew(float("inf"))
            finally:
                go_on.set()
        assert await settling[0] == []
        async with asyncio.timeout(PATIENCE_SECONDS):
            [held] = await subscription.fetch(10)
        assert held.message.id == "b"
        assert await broker.settle([Settlement(held, DONE)]) == []


async def test_who_may_not_create_the_queue_of_copies_is_told_so_before_anything_takes_long(
    rabbitmq: RabbitMQ, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    queues = [Queue(name="orders", topics=("t",)), Queue(name="mails", topics=("u",))]
    async with opened(url) as broker:
        await broker.declare(queues)
        assert await broker.risks() == []
    parts = urlsplit(url)
    host, name = parts.path[1:], f"worker{parts.path[1:]}"
    rabbitmq.ctl("add_user", name, "secret")
    theirs = url.replace(parts.netloc.partition("@")[0], f"{name}:secret")
    rabbitmq.ctl("set_permissions", "--vhost", host, name, r"^orders\.held\.", ".*", ".*")
    async with opened(theirs) as broker:
        [operator] = await broker.risks()
        assert "mails" in operator
        assert "orders" not in operator
    rabbitmq.ctl("set_permissions", "--vhost", host, name, "^$", ".*", ".*")
    async with opened(theirs) as broker:
        caplog.clear()
        await broker.declare(queues)
        [risk] = await broker.risks()
        assert risk in caplog.messages
        assert "mails, orders" in risk
        assert "1800" in risk
        assert "permission" in risk
    rabbitmq.ctl("set_permissions", "--vhost", host, name, r"\.held\.", ".*", ".*")
    async with opened(theirs) as broker:
        _, held = await taken(broker, "orders", "t", "a")
        assert await broker.risks() == []
        await broker._renewals._renew(broker.specs["orders"], list(held.values()))
        assert held["a"].work is broker._renewals._work
        assert await broker.settle([Settlement(held["a"].delivery(), DONE)]) == []
