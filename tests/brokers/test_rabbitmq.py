"""RabbitMQ's own ways: plain clients, queues of others, long handlers, alarms, and what its URL says."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import pika
import pytest

from conveyor.broker import DeadFilter, DeadLetter, Delivery, Queue, Settlement
from conveyor.brokers import from_url
from conveyor.brokers.rabbitmq import RabbitBroker, catalog, delay, publisher
from conveyor.brokers.rabbitmq.address import read_url
from conveyor.brokers.rabbitmq.amqp import Channel, ConnectionClosed, Incoming
from conveyor.brokers.rabbitmq.envelope import LONGEST_TRACEBACK_BYTES, TRACEBACK_ZLIB, trace_in, trace_note
from conveyor.brokers.rabbitmq.link import Link
from conveyor.brokers.rabbitmq.topology import Topology
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Dead, Done, RetryAt
from conveyor.errors import BrokerError, BrokerFull, BrokerUnavailable, ConfigurationError, QueueConflict

if TYPE_CHECKING:
    from pika.adapters.blocking_connection import BlockingChannel

    from servers.rabbitmq import RabbitMQ

PATIENCE_SECONDS: Final = 30.0


@pytest.fixture(params=["quorum", "classic"])
def url(rabbitmq: RabbitMQ, request: pytest.FixtureRequest) -> str:
    return f"{rabbitmq.url()}?queue_type={request.param}"


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[RabbitBroker]:
    broker = from_url(url)
    assert isinstance(broker, RabbitBroker)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


@contextlib.contextmanager
def plain(url: str) -> Iterator[BlockingChannel]:
    """A client that knows nothing of Conveyor."""
    connection = pika.BlockingConnection(pika.URLParameters(url.partition("?")[0]))
    try:
        yield connection.channel()
    finally:
        if connection.is_open:
            connection.close()


async def plainly(url: str, act: Callable[[BlockingChannel], Any]) -> Any:
    def run() -> Any:
        with plain(url) as channel:
            return act(channel)

    return await asyncio.to_thread(run)


async def one(broker: RabbitBroker, queue: str) -> Delivery:
    async with asyncio.timeout(PATIENCE_SECONDS):
        [delivery] = await (await broker.subscribe(queue, 10)).fetch(1)
    return delivery


# --- plain clients ----------------------------------------------------------------------------------------------------


async def test_plain_json_sent_to_the_queue_by_name_is_a_message(url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("order_created",))])
        await plainly(url, lambda channel: channel.basic_publish("", "orders", b'{"order_id": "A-1"}'))
        delivery = await one(broker, "orders")
        assert delivery.message.topic == "order_created"
        assert delivery.message.body == b'{"order_id": "A-1"}'
        assert delivery.message.content_type == "application/json"
        assert delivery.message.id
        await broker.settle([Settlement(delivery, RetryAt(0.0, "again"))])
        again = await one(broker, "orders")
        assert (again.message.id, again.message.topic) == (delivery.message.id, "order_created")


async def test_a_plain_client_may_publish_to_the_exchange_with_properties_of_its_own(url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("order_created", "order_paid"))])
        properties = pika.BasicProperties(
            message_id="m-1", correlation_id="journey", content_type="text/plain", headers={"tenant": "blau", "n": 7}
        )
        await plainly(url, lambda channel: channel.basic_publish("conveyor", "order_paid", b"paid", properties))
        message = (await one(broker, "orders")).message
        assert (message.id, message.topic, message.correlation_id) == ("m-1", "order_paid", "journey")
        assert (message.content_type, dict(message.headers)) == ("text/plain", {"tenant": "blau", "n": "7"})


async def test_what_is_published_is_plain_json_with_cloudevents_headers(url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("order_created",))])
        await broker.publish(
            [Message("m-1", "order_created", b"{}", key="A-1", headers={"tenant": "blau"}, created=1e9)]
        )
        method, properties, body = await plainly(url, lambda channel: channel.basic_get("orders"))
        assert (method.exchange, method.routing_key, body) == ("conveyor", "order_created", b"{}")
        assert (properties.content_type, properties.message_id, properties.delivery_mode) == (
            "application/json",
            "m-1",
            2,
        )
        told = {name: value for name, value in properties.headers.items() if name.startswith("cloudEvents:")}
        assert told == {
            "cloudEvents:specversion": "1.0",
            "cloudEvents:id": "m-1",
            "cloudEvents:source": "conveyor",
            "cloudEvents:type": "order_created",
            "cloudEvents:time": "2001-09-09T01:46:40Z",
            "cloudEvents:partitionkey": "A-1",
        }
        assert properties.headers["tenant"] == "blau"


async def test_a_dead_letter_is_a_plain_message_with_its_reason(url: str) -> None:
    async with opened(url) as broker:
        queue = Queue(name="orders", topics=("order",), native={"dead_queue": "orders-dlq"})
        await broker.declare([queue])
        await plainly(url, lambda channel: channel.basic_publish("", "orders", b"not json"))
        await broker.settle([Settlement(await one(broker, "orders"), Dead("invalid", "no JSON", "a trace"))])
        _, properties, body = await plainly(url, lambda channel: channel.basic_get("orders-dlq", auto_ack=True))
        assert body == b"not json"
        assert properties.headers["conveyor-reason"] == "invalid"
        assert properties.headers["conveyor-error"] == "no JSON"
        assert properties.headers["conveyor-traceback"] == "a trace"


async def test_what_the_server_dead_lettered_is_listed_and_goes_back(url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("order",))])

        def expire(channel: BlockingChannel) -> None:
            arguments = {"x-message-ttl": 1, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "orders.dead"}
            channel.queue_declare("elsewhere", durable=True, arguments=arguments)
            channel.basic_publish("", "elsewhere", b"late", pika.BasicProperties(message_id="m-1"))

        await plainly(url, expire)
        letters: list[DeadLetter] = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not letters:
                letters = await broker.dead_letters(DeadFilter(queue="orders"), limit=10)
        [letter] = letters
        assert (letter.message.id, letter.message.body, letter.reason) == ("m-1", b"late", "expired")
        assert await broker.redrive(letters) == 1
        assert (await one(broker, "orders")).message.body == b"late"


async def test_a_page_of_dead_letters_has_the_oldest_in_whatever_order_they_lie_there(url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("order",))])

        def bury(channel: BlockingChannel) -> None:
            for number in (4, 1, 5, 0, 3, 2):  # the hosts that bury have clocks of their own
                headers: dict[str, Any] = {
                    "conveyor-reason": "rejected",
                    "conveyor-position": f"{number:024x}",
                    "conveyor-died": 1,
                }
                channel.basic_publish(
                    "", "orders.dead", b"{}", pika.BasicProperties(message_id=str(number), headers=headers)
                )

        await plainly(url, bury)
        pages: list[list[str]] = []
        after: str | None = None
        async with asyncio.timeout(PATIENCE_SECONDS):
            while [info.dead for info in await broker.queues()] != [6]:
                await asyncio.sleep(0.01)
        while page := await broker.dead_letters(DeadFilter(), limit=2, after=after):
            pages.append([each.message.id for each in page])
            after = page[-1].position
        assert pages == [["0", "1"], ["2", "3"], ["4", "5"]]


# --- what others own --------------------------------------------------------------------------------------------------


async def test_an_exchange_of_others_is_used_as_it_is(url: str) -> None:
    await plainly(url, lambda channel: channel.exchange_declare("skillupworks", "direct", durable=True))
    async with opened(url) as broker:
        native = {"exchange": "skillupworks", "exchange_type": "direct", "routing_key": "order"}
        await broker.declare([Queue(name="order-processing", topics=("order_placed",), native=native)])
        await plainly(url, lambda channel: channel.basic_publish("skillupworks", "order", b"{}"))
        assert (await one(broker, "order-processing")).message.topic == "order_placed"


async def test_a_queue_with_other_arguments_is_a_conflict_unless_it_is_passive(url: str) -> None:
    await plainly(url, lambda channel: channel.queue_declare("theirs", durable=True, arguments={"x-max-length": 7}))
    async with opened(url) as broker:
        with pytest.raises(QueueConflict, match=r"'theirs'.*PRECONDITION_FAILED.*'passive'"):
            await broker.declare([Queue(name="theirs", topics=("order",))])
        await broker.declare([Queue(name="theirs", topics=("order",), native={"passive": "true"})])
        await plainly(url, lambda channel: channel.basic_publish("", "theirs", b"{}"))
        delivery = await one(broker, "theirs")
        assert await broker.settle([Settlement(delivery, DONE)]) == []


async def test_a_dead_letter_queue_of_others_is_used_as_it_is(url: str) -> None:
    await plainly(url, lambda channel: channel.queue_declare("dlq", durable=True, arguments={"x-max-length": 7}))
    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("order",), native={"dead_queue": "dlq"})])
        await broker.publish([Message("m-1", "order", b"{}")])
        await broker.settle([Settlement(await one(broker, "orders"), Dead("rejected", "ValueError: no"))])
        [letter] = await broker.dead_letters(DeadFilter(queue="orders"), limit=10)
        assert letter.message.id == "m-1"


async def names(rabbitmq: RabbitMQ, url: str, lists: str = "rabbit_amqqueue:list_names()") -> set[str]:
    """What exists on the server."""
    wanted = f'[binary_to_list(Name) || {{resource, <<"{urlsplit(url).path[1:]}">>, _, Name}} <- {lists}]'
    return set(re.findall(r'"(.*?)"', await asyncio.to_thread(rabbitmq.evaluate, wanted)))


async def test_a_worker_has_no_more_queues_than_it_needs_by_now(rabbitmq: RabbitMQ, url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="plain", topics=("t",)), Queue(name="keyed", ordered=True)])
        first = {
            "conveyor.catalog",
            *(f"{queue}{end}" for queue in ("plain", "keyed") for end in ("", ".dead", ".later")),
        }
        first |= {f"keyed.keyed.{number}{end}" for number in range(4) for end in ("", ".notes")}
        assert await names(rabbitmq, url) == first
        subscription = await broker.subscribe("plain", 10)
        rungs = 0
        for seconds, more in ((2.0, 2), (0.5, 0), (100.0, 2), (1e9, 4)):
            await broker.publish([Message("m", "t", b"{}", due=broker.clock() + seconds)])
            rungs += more
            async with asyncio.timeout(PATIENCE_SECONDS):
                while broker.specs["plain"].steps < rungs:
                    await asyncio.sleep(0.01)
            there = await names(rabbitmq, url)
            assert {each for each in there if not each.endswith(".lock")} - first == {
                f"plain.delay.{n}" for n in range(rungs)
            }
        await subscription.close()


async def test_a_removed_queue_takes_all_with_it_but_what_others_have_made(rabbitmq: RabbitMQ, url: str) -> None:
    lists = "rabbit_amqqueue:list_names() ++ rabbit_exchange:list_names()"

    def others(channel: BlockingChannel) -> None:
        channel.queue_declare("theirs", durable=True)
        channel.queue_declare("their.dead", durable=True)

    await plainly(url, others)
    async with opened(url) as broker:
        before = await names(rabbitmq, url, lists)
        mine = [
            Queue(name="plain", topics=("t",), native={"dead_queue": "their.dead"}),
            Queue(name="keyed", topics=("t",), ordered=True),
            Queue(name="theirs", native={"passive": "true"}),
        ]
        await broker.declare(mine)
        await broker.publish([Message("m", "t", b"{}", key="k")])
        for queue in mine[:2]:
            subscription = await broker.subscribe(queue.name, 10)
            [delivery] = await subscription.fetch(1)
            await broker.settle([Settlement(delivery, RetryAt(broker.clock() + 3600.0, "later"))])
            await subscription.close()
        await broker.bury([DeadLetter(
            position="", queue="keyed", message=Message("d", "t", b"{}"), reason="rejected", error="", traceback="",
            deliveries=1, attempts=0, died=0.0
        )])  # fmt: skip
        for queue in mine:
            await broker.remove(queue.name, discard_dead=True)
        assert await names(rabbitmq, url, lists) == before
        assert await broker.queues() == []


async def test_a_passive_queue_that_does_not_exist_is_an_error(url: str) -> None:
    async with opened(url) as broker:
        with pytest.raises(BrokerError, match="there is no queue 'nowhere'"):
            await broker.declare([Queue(name="nowhere", native={"passive": "true"})])


async def test_a_user_without_the_permission_to_configure_works_on_what_exists(rabbitmq: RabbitMQ, url: str) -> None:
    queue = Queue(name="orders", topics=("order",))
    async with opened(url) as broker:
        await broker.declare([queue])
    parts = urlsplit(url)
    rabbitmq.ctl("add_user", name := f"worker{parts.path[1:]}", "secret")
    rabbitmq.ctl("set_permissions", "--vhost", parts.path[1:], name, "^$", ".*", ".*")
    async with opened(url.replace(parts.netloc.partition("@")[0], f"{name}:secret")) as broker:
        await broker.declare([queue])
        await broker.publish([Message("m-1", "order", b"{}")])
        delivery = await one(broker, "orders")
        assert delivery.message.id == "m-1"
        assert await broker.settle([Settlement(delivery, DONE)]) == []
        with pytest.raises(BrokerError, match="permission"):
            await broker.declare([Queue(name="new", topics=("order",))])
    rabbitmq.ctl("set_permissions", "--vhost", parts.path[1:], name, "^$", "^conveyor.catalog$|^amq.default$", ".*")
    async with opened(url.replace(parts.netloc.partition("@")[0], f"{name}:secret")) as broker:
        with pytest.raises(BrokerError, match="403 ACCESS_REFUSED .* a permission is missing"):
            await broker.publish([Message("m-2", "order", b"{}")])


# --- the server's moods -----------------------------------------------------------------------------------------------


async def test_the_bound_of_a_queue_does_not_change_under_its_receivers(url: str) -> None:
    def bound(most: int) -> Queue:
        return Queue(name="news", topics=("news",), max_length=most)

    async with opened(url) as old, opened(url) as new:
        await old.declare([bound(3)])
        await old.publish([Message("in-flight", "news", b"{}")])
        delivery = await one(old, "news")
        with pytest.raises(QueueConflict, match="receivers"):
            await new.declare([bound(4)])
        await old.close()  # it gives back what it holds
        with pytest.raises(QueueConflict, match="1 messages"):
            await new.declare([bound(4)])
        assert (await one(new, "news")).message.id == delivery.message.id


@pytest.mark.parametrize("ordered", [False, True], ids=["plain", "ordered"])
async def test_what_is_published_while_a_bound_changes_is_not_lost(
    url: str, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    def bound(most: int | None) -> Queue:
        return Queue(name="q", topics=("t", "u"), ordered=ordered, max_length=most)

    async with opened(url) as broker, opened(url) as other:
        await broker.declare([bound(10)])
        delete = Topology.delete

        async def while_others_publish(self: Topology, queue: str) -> None:
            assert not await other.publish([Message("before", "t", b"{}")])
            await delete(self, queue)
            assert not await other.publish([Message("after", "u", b"{}")])

        with monkeypatch.context() as patched:
            patched.setattr(Topology, "delete", while_others_publish)
            await broker.declare([bound(20)])
        assert not await other.publish([Message("at last", "t", b"{}")])
        subscription = await broker.subscribe("q", 100)
        got: list[str] = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(got) < 3:
                deliveries = await subscription.fetch(10)
                got += [each.message.id for each in deliveries]
                assert {each.message.topic for each in deliveries} <= {"t", "u"}
                await broker.settle([Settlement(each, DONE) for each in deliveries])
        assert sorted(got) == ["after", "at last", "before"]


async def test_letters_that_say_the_same_are_each_found_and_taken_alone(url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("t",))])

        def bury(channel: BlockingChannel) -> None:
            for _ in range(3):
                channel.basic_publish("", "orders.dead", b"same")

        await plainly(url, bury)
        which = DeadFilter()
        letters = await broker.dead_letters(which, limit=10)
        assert len({each.position for each in letters}) == 3
        assert len({each.message.id for each in letters}) == 3
        page = await broker.dead_letters(which, limit=10, after=letters[0].position)
        assert [each.position for each in page] == [each.position for each in letters[1:]]
        assert await broker.discard([letters[2]]) == 1
        assert await broker.redrive(await broker.dead_letters(which, limit=10)) == 2
        assert [info.ready for info in await broker.queues()] == [2]


async def test_a_queue_that_refuses_more_is_told_as_full(url: str) -> None:
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    await plainly(url, lambda channel: channel.queue_declare("small", durable=True, arguments=arguments))
    async with opened(url) as broker:
        await broker.declare([Queue(name="small", native={"passive": "true"})])

        async def fill() -> None:
            for number in range(10):
                await broker.publish([Message(str(number), "any", b"{}")], queue="small")

        with pytest.raises(BrokerFull, match="full"):
            await fill()


async def test_what_a_handler_emits_into_a_queue_that_is_full_waits_and_its_message_stays_whole(url: str) -> None:
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",))])

        def others(channel: BlockingChannel) -> None:
            channel.queue_declare("small", durable=True, arguments=arguments)
            channel.queue_bind("small", "conveyor", "emitted")
            channel.basic_publish("", "small", b"is there")

        await plainly(url, others)
        await broker.publish([Message("m", "t", b"{}")])
        delivery = await one(broker, "q")
        done = Settlement(delivery, Done(emits=(Message("e", "emitted", b"{}"),)))
        with pytest.raises(BrokerFull, match="full"):
            await broker.settle([done])
        await plainly(url, lambda channel: channel.queue_purge("small"))
        assert await broker.settle([done]) == []
        assert await plainly(url, lambda channel: channel.basic_get("small", auto_ack=True)[2]) == b"{}"


async def test_what_amqp_calls_an_error_does_not_get_out_of_the_seam(url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",))])
        await plainly(url, lambda channel: channel.queue_delete("conveyor.catalog"))
        with pytest.raises(BrokerError, match="NOT_FOUND"):
            await broker.subscribe("q", 10)


async def test_a_server_out_of_memory_is_told_to_who_has_published_nothing(rabbitmq: RabbitMQ, url: str) -> None:
    async with opened(url) as broker:
        assert await broker.risks() == []
        await broker.declare([Queue(name="there", topics=("order",))])
        await asyncio.to_thread(rabbitmq.ctl, "set_vm_memory_high_watermark", "0.00001")
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not (risks := await broker.risks()):
                    await asyncio.sleep(0.05)
            assert "takes no publishes now" in risks[0]
            for _ in range(3):  # an operator may look
                assert [info.name for info in await broker.queues()] == ["there"]
        finally:
            await asyncio.to_thread(rabbitmq.ctl, "set_vm_memory_high_watermark", "0.6")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await broker.risks():
                await asyncio.sleep(0.05)
        await broker.declare([Queue(name="orders", topics=("order",))])
        assert await broker.publish([Message("m-1", "order", b"{}")]) == frozenset()


async def test_a_server_out_of_memory_is_told_and_refused_and_over(
    rabbitmq: RabbitMQ, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "BLOCKED_SECONDS", 0.2)
    monkeypatch.setattr(publisher, "CONFIRM_SECONDS", 1.0)
    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("order",))])
        assert await broker.risks() == []
        await asyncio.to_thread(rabbitmq.ctl, "set_vm_memory_high_watermark", "0.00001")
        try:
            with pytest.raises(BrokerError):
                await broker.publish([Message("unconfirmed", "order", b"{}")])
            async with asyncio.timeout(PATIENCE_SECONDS):  # however many they are, they wait together
                with pytest.raises(BrokerFull, match="takes nothing now"):
                    await broker.publish([Message(f"refused-{number}", "order", b"{}") for number in range(200)])
            [risk] = await broker.risks()
            assert "takes no publishes now" in risk
        finally:
            await asyncio.to_thread(rabbitmq.ctl, "set_vm_memory_high_watermark", "0.6")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await broker.risks():
                await asyncio.sleep(0.05)
        assert await broker.publish([Message("welcome", "order", b"{}")]) == frozenset()


@pytest.mark.parametrize("ordered", [False, True], ids=["plain", "ordered"])
async def test_a_handler_that_outlives_the_consumer_timeout_is_run_once(
    rabbitmq: RabbitMQ, url: str, ordered: bool
) -> None:
    rabbitmq.set("consumer_timeout", "3000")
    try:
        async with opened(f"{url}&consumer_timeout=3") as broker, opened(url) as other:
            await broker.declare([Queue(name="long", topics=("long",), ordered=ordered)])
            await broker.publish([Message(f"m-{key}", "long", b"{}", key=key) for key in "ab"])
            subscription = await broker.subscribe("long", 10)
            held: list[Delivery] = []
            while len(held) < 2:
                held += await subscription.fetch(2)
            waiting = asyncio.create_task((await other.subscribe("long", 10)).fetch(1))
            for _ in range(10):
                await asyncio.sleep(0.7)
                assert await broker.extend(held) == []
            assert await broker.settle([Settlement(each, DONE) for each in held]) == []
            assert not waiting.done(), "another receiver got what was being handled"
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
    finally:
        rabbitmq.set("consumer_timeout", "1800000")


# --- receiving --------------------------------------------------------------------------------------------------------


async def test_what_came_for_a_receiver_that_fetches_no_more_goes_to_others_uncounted(url: str) -> None:
    async with opened(url) as busy, opened(url) as other:
        await busy.declare([Queue(name="orders", topics=("order",))])
        await busy.publish([Message(f"m-{number}", "order", b"{}") for number in range(20)])
        subscription = await busy.subscribe("orders", 100)
        async with asyncio.timeout(PATIENCE_SECONDS):
            held = [*await subscription.fetch(2), *await subscription.fetch(2), *await subscription.fetch(2)]
            [info] = await busy.queues()
            assert (info.ready, info.in_flight) == (20 - len(held), len(held)), "what waits in the process is ready"
            theirs = await other.subscribe("orders", 100)
            rest: list[Delivery] = []
            while len(held) + len(rest) < 20:
                rest += await theirs.fetch(20)
        assert {each.deliveries for each in held + rest} == {1}
        assert len({each.message.id for each in held + rest}) == 20
        assert await busy.settle([Settlement(each, DONE) for each in held]) == []


async def test_a_receiver_that_asks_for_ever_more_is_told_of_no_delivery_that_never_was(url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("order_created",))])
        await broker.publish([Message(f"m-{number}", "order_created", b"{}", created=1e9) for number in range(6_000)])
        subscription = await broker.subscribe("orders", 4_000)
        counts: list[int] = []
        async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as settling:
            while len(counts) < 6_000:
                deliveries = await subscription.fetch(min(100 + len(counts) // 4, 1_000))
                counts += [each.deliveries for each in deliveries]
                settling.create_task(broker.settle([Settlement(each, DONE) for each in deliveries]))
        assert set(counts) == {1}


async def test_a_catalog_that_gives_nothing_is_not_taken_for_an_empty_one(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "PATIENCE_SECONDS", 0.1)
    queue = Queue(name="orders", topics=("order",))
    async with opened(url) as broker:
        await broker.declare([queue])
        get = Channel.get

        async def nothing(channel: Channel, queue: str) -> Incoming | None:
            return None if queue == "conveyor.catalog" else await get(channel, queue)

        with monkeypatch.context() as patched:
            patched.setattr(Channel, "get", nothing)
            with pytest.raises(BrokerUnavailable, match=r"conveyor\.catalog"):
                await broker.declare([Queue(name="orders", ordered=True)])
        with pytest.raises(QueueConflict):
            await broker.declare([Queue(name="orders", ordered=True)])


@pytest.mark.parametrize("failures", [1, 1_000], ids=["now and then", "for ever"])
async def test_a_server_that_fails_at_the_catalog_that_is_being_created_is_asked_again_but_not_for_ever(
    url: str, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, failed = Channel.get, 0

    async def failing(channel: Channel, queue: str) -> Incoming | None:
        nonlocal failed
        if failed == failures:
            return await get(channel, queue)
        failed += 1
        channel.connection.give_up("INTERNAL_ERROR")
        raise ConnectionClosed(541, "INTERNAL_ERROR - Cannot get a message from queue: noproc")

    monkeypatch.setattr(Channel, "get", failing)
    if failures > catalog.TRIES:
        with pytest.raises(BrokerUnavailable, match="541 INTERNAL_ERROR"):
            await from_url(url).open()
        return
    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("order",))])
        assert [info.name for info in await broker.queues()] == ["orders"]


@pytest.mark.parametrize("lock", ["conveyor.catalog.lock", "orders.dead.lock"])
async def test_whoever_is_cancelled_while_it_takes_a_lock_locks_nobody_out(
    url: str, lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare = Channel.queue_declare
    asked = asyncio.Event()

    async def telling(channel: Channel, queue: str = "", **how: Any) -> Any:
        if queue == lock:
            asked.set()  # whoever hears it does so when the question is on its way, and has no answer yet
        return await declare(channel, queue, **how)

    async with opened(url) as impatient, opened(url) as other:
        await impatient.declare([Queue(name="orders", topics=("order",))])
        for _ in range(3):
            with monkeypatch.context() as patched:
                patched.setattr(Channel, "queue_declare", telling)
                reading = asyncio.create_task(impatient.dead_letters(DeadFilter(), limit=1))
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await asked.wait()
                asked.clear()
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading
            assert reading.cancelled()
            assert await other.dead_letters(DeadFilter(), limit=1) == []
        assert await impatient.dead_letters(DeadFilter(), limit=1) == []


async def test_an_unforeseen_error_while_connecting_is_raised_once_and_not_for_ever() -> None:
    class Unforeseen(Exception):
        pass

    tries = itertools.count()

    async def begin(_: object) -> str:
        raise AssertionError

    async def connect() -> str:
        if next(tries) == 0:
            raise Unforeseen
        return "session"

    link = Link[str](read_url("amqp://localhost"), "a link", begin, lambda: 10.0)
    link._open = True
    link._connect = connect  # type: ignore[method-assign]
    with pytest.raises(Unforeseen):
        await link.session()
    assert await link.session() == "session"
    await link.close()


async def test_a_delay_queue_that_does_not_answer_holds_up_nothing_else(
    rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delay, "PATIENCE_SECONDS", 0.5)
    url = rabbitmq.url()
    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("order",))])
        member = f"'{urlsplit(url).path[1:]}_orders.later'"
        rabbitmq.evaluate(f"sys:suspend({member})")  # as one without a leader, which answers nobody
        try:
            await broker.publish([Message("now", "order", b"{}")])
            assert (await one(broker, "orders")).message.id == "now"
            [risk] = await broker.risks()
            assert "orders.later" in risk
        finally:
            rabbitmq.evaluate(f"sys:resume({member})")
        await broker.publish([Message("soon", "order", b"{}", due=broker.clock() + 0.2)])
        assert (await one(broker, "orders")).message.id == "soon"
        assert await broker.risks() == []


@pytest.mark.parametrize("allowed", [True, False])
async def test_what_is_tried_again_waits_though_somebody_deleted_its_delay_queues(
    url: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forbidden(*_: object) -> bool:
        return False

    async with opened(url) as broker:
        await broker.declare([Queue(name="orders", topics=("order",))])
        spec = await broker.raise_ladder(broker.specs["orders"], 2)
        await broker.publish([Message("1", "order", b"{}")])
        subscription = await broker.subscribe("orders", 10)
        for rung in spec.ladder:
            await broker.topology.delete(rung)
        if not allowed:
            monkeypatch.setattr(Topology, "raise_ladder", forbidden)
        async with asyncio.timeout(PATIENCE_SECONDS):
            [delivery] = await subscription.fetch(1)
            due = broker.clock() + 1.2
            assert await broker.settle([Settlement(delivery, RetryAt(due, "no"))]) == []
            [delivery] = await subscription.fetch(1)
            assert (delivery.message.id, delivery.attempts, broker.clock() >= due) == ("1", 1, True)
            assert await broker.settle([Settlement(delivery, DONE)]) == []
        assert [await broker.topology.count(rung) is not None for rung in spec.ladder] == [allowed, allowed]


async def test_delay_queues_that_somebody_deleted_are_there_again_after_a_restart(url: str) -> None:
    queue = Queue(name="orders", topics=("order",))
    async with opened(url) as broker:
        await broker.declare([queue])
        spec = await broker.raise_ladder(broker.specs["orders"], 3)
        for rung in spec.ladder:
            await broker.topology.delete(rung)
    async with opened(url) as broker:
        await broker.declare([queue])
        assert [await broker.topology.count(rung) is not None for rung in spec.ladder] == [True] * 3


async def test_a_fetch_that_was_cancelled_while_it_took_the_keys_leaves_none_unattended(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="keys", topics=("key",), ordered=True)])
        keys = {f"k{number}" for number in range(30)}
        await broker.publish([Message(key, "key", b"{}", key=key) for key in keys])
        subscription = await broker.subscribe("keys", 100)
        consume, half_way = Channel.consume, asyncio.Event()
        partitions = itertools.count(1)

        async def slow(channel: Channel, queue: str, on_delivery: Callable[[Incoming], None], **how: Any) -> str:
            if queue in broker.specs["keys"].partitions and next(partitions) == 3:
                half_way.set()
                await asyncio.Event().wait()
            return await consume(channel, queue, on_delivery, **how)

        with monkeypatch.context() as patched:
            patched.setattr(Channel, "consume", slow)
            fetching = asyncio.create_task(subscription.fetch(100))
            await half_way.wait()
            fetching.cancel()
            await asyncio.wait([fetching])
        came: set[str] = set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while came != keys:
                came |= {each.message.id for each in await subscription.fetch(100)}


async def test_a_note_that_nobody_can_read_does_not_stop_a_partition(url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="keys", topics=("key",), ordered=True)])
        await broker.publish([Message("m-1", "key", b"{}", key="k")])

        def spoil(channel: BlockingChannel) -> None:
            for partition in broker.specs["keys"].partitions:
                channel.basic_publish("", f"{partition}.notes", b"\xffno note")

        await plainly(url, spoil)
        delivery = await one(broker, "keys")
        assert (delivery.message.id, delivery.deliveries) == ("m-1", 1)
        assert await broker.settle([Settlement(delivery, DONE)]) == []


@pytest.mark.parametrize("what", ["a partition", "its notes"])
async def test_a_partition_that_was_deleted_is_there_again_and_received(url: str, what: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="keys", topics=("key",), ordered=True)])
        keys = {f"k{number}" for number in range(30)}
        subscription = await broker.subscribe("keys", 100)
        waiting = asyncio.create_task(subscription.fetch(100))
        keyed = broker.keyed("keys")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while keyed.work is None:
                await asyncio.sleep(0.01)

        def delete(channel: BlockingChannel) -> None:
            for partition in broker.specs["keys"].partitions[:2]:
                channel.queue_delete(partition if what == "a partition" else f"{partition}.notes")

        await plainly(url, delete)
        await broker.publish([Message(key, "key", b"{}", key=key) for key in keys])
        came: set[str] = set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while came != keys:
                with contextlib.suppress(BrokerError):
                    held = await waiting
                    came |= {each.message.id for each in held}
                    await broker.settle([Settlement(each, DONE) for each in held])
                waiting = asyncio.create_task(subscription.fetch(100))
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_what_comes_while_long_deliveries_are_renewed_stays_behind_them(url: str) -> None:
    async with opened(url) as broker, opened(url) as publisher:
        queue = Queue(name="long", topics=("long",), ordered=True)
        for each in (broker, publisher):
            await each.declare([queue])
        await publisher.publish([Message(name, "long", b"{}", key="k") for name in "ab"])
        subscription = await broker.subscribe("long", 10)
        [held] = await subscription.fetch(10)
        keyed = broker.keyed("long")
        work = keyed.work
        assert work is not None
        give_back, publishing = work.give_back, []

        def on_its_way(tags: Iterable[int]) -> None:
            """Until the server hears of it, it delivers what is published meanwhile."""
            publishing.append(asyncio.create_task(publisher.publish([Message("c", "long", b"{}", key="k")])))
            asyncio.get_running_loop().call_later(0.5, give_back, tags)

        work.give_back = on_its_way  # type: ignore[method-assign]
        await keyed.renew(float("inf"))
        await asyncio.gather(*publishing)
        came = [held.message.id]
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(came) < 3:
                assert await broker.settle([Settlement(held, DONE)]) == []
                [held] = await subscription.fetch(10)
                came.append(held.message.id)
        assert came == ["a", "b", "c"]


def test_a_compressed_traceback_is_read_and_one_that_is_a_bomb_is_cut() -> None:
    traceback = "".join(f"line {number}: Grüße\n" for number in range(5_000))
    assert trace_in(trace_note(traceback)) == traceback
    bomb = {TRACEBACK_ZLIB: zlib.compress(bytes(50 * LONGEST_TRACEBACK_BYTES))}
    assert len(trace_in(bomb)) == LONGEST_TRACEBACK_BYTES
    assert trace_in({TRACEBACK_ZLIB: b"no zlib"}) == "(its traceback cannot be read)"


# --- the URL ----------------------------------------------------------------------------------------------------------


def test_a_url_names_hosts_virtual_host_and_user() -> None:
    options = read_url("amqp://me:p%40ss@one:1234,two/the%2Fhost?queue_type=classic&exchange=shop&heartbeat=3")
    assert [(each.host, each.port) for each in options.addresses] == [("one", 1234), ("two", 5672)]
    assert {(each.virtual_host, each.user, each.password) for each in options.addresses} == {("the/host", "me", "p@ss")}
    assert (options.queue_type, options.exchange, options.heartbeat_seconds) == ("classic", "shop", 3.0)
    assert "p@ss" not in repr(options)
    assert read_url("amqps://host").addresses[0].port == 5671


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("amqp://host/a/b", "%2F"),
        ("amqp://host?queue_type=mirrored", "quorum, classic, priority"),
        ("amqp://host?no_such=1", "no_such"),
        ("amqp://host?heartbeat=soon", "seconds"),
        ("amqp://host?exchange=amq.topic", "amq."),
        ("amqp://host:port", "host:port"),
        ("amqp://host?cafile=x", "amqps"),
        ("amqps://host?cafile=/no/such/file", "TLS files"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        read_url(url)
