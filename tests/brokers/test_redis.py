"""The Redis broker beside programs that know nothing of it, on servers that refuse, forget, forbid and move, and what it writes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from redis import Redis as Client
from redis import ResponseError

import conveyor.brokers.redis as module
from conveyor.broker import DeadFilter, Delivery, Queue, Settlement
from conveyor.brokers import from_url
from conveyor.brokers.redis import RedisBroker, lane, link, scripts
from conveyor.brokers.redis.health import risks_of
from conveyor.brokers.redis.wire import arguments_of, fields_of, message_of
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Dead, Done, Release, RetryAt, Verdict
from conveyor.errors import BrokerError, BrokerFull, BrokerUnavailable, ConfigurationError, PublishFailed
from servers.certificate import Certificate
from servers.proxy import Proxy
from servers.redis import Redis
from servers.server import find_free_port

if TYPE_CHECKING:
    from conveyor.broker import Subscription

PATIENCE_SECONDS: Final = 60.0
ANSWER_LOST: Final = "the-answer-to-this-is-lost"


def namespace_of(url: str) -> str:
    """What a URL of the fixture names."""
    return parse_qs(urlsplit(url).query)["namespace"][0]


@contextlib.asynccontextmanager
async def opened(url: str, *queues: Queue) -> AsyncIterator[RedisBroker]:
    """A broker object with these queues."""
    broker = from_url(url)
    assert isinstance(broker, RedisBroker)
    await broker.open()
    try:
        await broker.declare(queues)
        yield broker
    finally:
        await broker.close()


def plain(server: Redis) -> Any:
    """A plain client's answers have types that depend on everything."""
    return Client(port=server.port, decode_responses=True)


@pytest.fixture
def client(redis: Redis) -> Iterator[Any]:
    """A program that knows nothing of Conveyor."""
    redis.start()
    with plain(redis) as client:
        yield client


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Redis]:
    """A server that a test may set up as it likes."""
    server = Redis(tmp_path)
    yield server
    server.close()


async def take(subscription: Subscription, number: int) -> list[Delivery]:
    """So many deliveries."""
    taken: list[Delivery] = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(taken) < number:
            taken += await subscription.fetch(number - len(taken))
    return taken


def bodies(deliveries: Sequence[Delivery]) -> list[bytes]:
    """What they say."""
    return [each.message.body for each in deliveries]


async def test_what_a_plain_client_adds_to_a_queue_is_consumed(redis: Redis, client: Any) -> None:
    url = redis.url()
    stream = f"{{{namespace_of(url)}}}:queue:shop.charge"
    async with opened(url, Queue(name="shop.charge", topics=("order.created",))) as broker:
        subscription = await broker.subscribe("shop.charge", 10)
        waiting = asyncio.create_task(take(subscription, 1))
        await asyncio.sleep(0)
        id_ = client.xadd(stream, {"body": '{"order_id": "A-1"}', "tenant": "blau", "ce_partitionkey": "A-1"})
        [delivery] = await waiting
        message = delivery.message
        assert (message.topic, message.body, message.key) == ("order.created", b'{"order_id": "A-1"}', "A-1")
        assert (message.id, dict(message.headers)) == (f"shop.charge/{id_}", {"tenant": "blau"})
        await broker.settle([Settlement(delivery, RetryAt(0.0, "again"))])
        [again] = await take(subscription, 1)
        assert (again.message.id, again.deliveries, again.attempts) == (message.id, 2, 1)
        await broker.settle([Settlement(again, DONE)])
        assert client.xlen(stream) == 0


@pytest.mark.parametrize("verdict", [DONE, RetryAt(0.0, "again"), Release(), Dead("rejected", "no")])
@pytest.mark.parametrize(
    "key",
    [
        {b"ce_partitionkey": b"\xffk"},
        {b"ce_partitionkey": b"A", b"ce-partitionkey": b"B"},
        {b"ce-partitionkey": b"A", b"CE_partitionkey": b"B", b"ce_partitionkey": b"\0"},
        {b"ce_partitionkey": b""},
    ],
)
async def test_no_key_of_another_program_blocks_an_ordered_queue(
    redis: Redis, client: Any, key: dict[bytes, bytes], verdict: Verdict
) -> None:
    url = redis.url()
    async with opened(url, Queue(name="q", topics=("t",), ordered=True)) as broker:
        for body in (b"0", b"1", b"2"):
            client.xadd(f"{{{namespace_of(url)}}}:queue:q", {b"body": body, **key})
        subscription = await broker.subscribe("q", 10)
        [first] = await take(subscription, 1)
        await broker.settle([Settlement(first, verdict)])
        ended = [first] if verdict is DONE or isinstance(verdict, Dead) else []
        while len(ended) < 3:
            ended += await take(subscription, 1)
            await broker.settle([Settlement(ended[-1], DONE)])
        assert bodies(ended) == [b"0", b"1", b"2"]
        assert not client.exists(f"{{{namespace_of(url)}}}:heads:q", f"{{{namespace_of(url)}}}:behind:q")


async def test_a_later_publish_does_not_overtake_what_another_program_added_with_its_key(
    redis: Redis, client: Any
) -> None:
    url = redis.url()
    async with opened(url, Queue(name="q", topics=("t",), ordered=True)) as broker:
        await broker.publish([Message("m", "t", b"0", key="A")])
        client.xadd(f"{{{namespace_of(url)}}}:queue:q", {"body": b"1", "ce_partitionkey": "A"})
        for body, priority, due in ((b"2", 0, 0.0), (b"3", 9, 0.0), (b"4", 0, time.time() + 0.1), (b"5", 0, 0.0)):
            await broker.publish([Message("m", "t", body, key="A", priority=priority, due=due)])
        subscription = await broker.subscribe("q", 10)
        taken: list[Delivery] = []
        while len(taken) < 6:
            taken += await take(subscription, 1)
            await broker.settle([Settlement(taken[-1], DONE)])
        assert bodies(taken) == [b"0", b"1", b"2", b"3", b"4", b"5"]


async def test_a_shell_script_can_publish_with_the_servers_own_tool(redis: Redis) -> None:
    url = redis.url()
    stream = f"{{{namespace_of(url)}}}:queue:shop.charge"
    async with opened(url, Queue(name="shop.charge", topics=("order.created",))) as broker:
        command = ["redis-cli", "-p", str(redis.port), "XADD", stream, "*", "body", '{"a": 1}', "ce_id", "from-a-shell"]
        await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
        [delivery] = await take(await broker.subscribe("shop.charge", 10), 1)
        assert (delivery.message.id, delivery.message.body) == ("from-a-shell", b'{"a": 1}')


async def test_a_stream_that_was_written_before_its_queue_was_declared_is_consumed(
    redis: Redis, client: Client
) -> None:
    url = redis.url()
    client.xadd(f"{{{namespace_of(url)}}}:queue:q", {"body": "early"})
    async with opened(url, Queue(name="q", topics=("t",))) as broker:
        assert bodies(await take(await broker.subscribe("q", 10), 1)) == [b"early"]


async def test_attributes_of_a_plain_client_have_their_effect(redis: Redis, client: Any) -> None:
    url = redis.url()
    stream = f"{{{namespace_of(url)}}}:queue:q"
    async with opened(url, Queue(name="q", topics=("t", "u"), ordered=True)) as broker:
        client.xadd(stream, {"body": "some day", "ce_duetime": "2999-01-01T00:00:00+02:00"})
        client.xadd(stream, {"body": "k1", "ce_partitionkey": "k", "ce_type": "u"})
        client.xadd(stream, {"body": "k2", "ce_partitionkey": "k", "ce_duetime": "2001-01-01T00:00:00Z"})
        client.xadd(stream, {"body": "urgent", "ce_priority": "9"})
        subscription = await broker.subscribe("q", 10)
        held = await take(subscription, 2)
        assert sorted(bodies(held)) == [b"k1", b"urgent"]
        assert {each.message.body: each.message.topic for each in held}[b"k1"] == "u"
        await broker.settle([Settlement(each, DONE) for each in held])
        assert bodies(await take(subscription, 1)) == [b"k2"]
        [info] = await broker.queues()
        assert (info.ready, info.in_flight, info.delayed) == (0, 1, 1)


async def test_what_conveyor_publishes_is_plain_for_any_client(redis: Redis, client: Any) -> None:
    url = redis.url()
    message = Message(
        "an-id", "order.created", b'{"order_id":"A-1"}', key="A-1", headers={"tenant": "blau"}, created=1.5
    )
    async with opened(url, Queue(name="q", topics=("order.created",))) as broker:
        await broker.publish([message])
        [(_, fields)] = client.xrange(f"{{{namespace_of(url)}}}:queue:q")
    assert fields == {
        "body": '{"order_id":"A-1"}',
        "tenant": "blau",
        "content-type": "application/json",
        "ce_specversion": "1.0",
        "ce_id": "an-id",
        "ce_source": "conveyor",
        "ce_type": "order.created",
        "ce_time": "1970-01-01T00:00:01.500000Z",
        "ce_partitionkey": "A-1",
    }


async def test_dead_letters_are_read_and_deleted_by_any_client(redis: Redis, client: Any) -> None:
    url = redis.url()
    dead = f"{{{namespace_of(url)}}}:dead:q"
    async with opened(url, Queue(name="q", topics=("t",))) as broker:
        await broker.publish([Message("m", "t", b"x")])
        [delivery] = await take(await broker.subscribe("q", 1), 1)
        await broker.settle([Settlement(delivery, Dead("rejected", "no", "trace"))])
        [(id_, fields)] = client.xrange(dead)
        assert (fields["dead_reason"], fields["dead_error"], fields["body"], fields["ce_id"]) == (
            "rejected",
            "no",
            "x",
            "m",
        )
        client.xdel(dead, id_)
        assert await broker.dead_letters(DeadFilter(), limit=10) == []


async def test_a_message_of_thousands_of_fields_is_kept_whole_when_it_is_given_up_and_comes_back_whole(
    redis: Redis, client: Any
) -> None:
    url = redis.url()
    stream, dead = f"{{{namespace_of(url)}}}:queue:q", f"{{{namespace_of(url)}}}:dead:q"
    headers = {f"header-{number}": "value \n" for number in range(9_000)}
    fields = {**headers, "body": "{}", "ce_id": "an-id", "ce_partitionkey": "A"}
    async with opened(url, Queue(name="q", topics=("t",), ordered=True)) as broker:
        client.xadd(stream, {**fields, "ce_priority": "3", "ce_duetime": "2001-01-01T00:00:00Z"})
        client.xadd(stream, {"body": "behind", "ce_partitionkey": "A"})
        subscription = await broker.subscribe("q", 10)
        [held] = await take(subscription, 1)
        assert await broker.settle([Settlement(held, Dead("rejected", "no"))]) == []
        letters = await broker.dead_letters(DeadFilter(), limit=10)
        assert [each.message.headers for each in letters] == [headers]
        [behind] = await take(subscription, 1)
        assert behind.message.body == b"behind"
        await broker.bury(letters)
        assert await broker.discard(letters) == 1
        letters = await broker.dead_letters(DeadFilter(), limit=10)
        assert await broker.redrive(letters) == 1
        await broker.settle([Settlement(behind, DONE)])  # the turn of those of the key that came later
        [again] = await take(subscription, 1)
        message = again.message
        assert (message.id, message.headers, message.key, message.priority) == ("an-id", headers, "A", 3)
        assert client.xlen(dead) == 0


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_message_of_thousands_of_headers_arrives_whole(redis: Redis, ordered: bool) -> None:
    headers = {f"header-{number}": "" for number in range(9_000)}
    plain = Message("plain", "t", b"x", headers=headers)
    with_a_way = Message("way", "t", b"x", key="A", headers=headers, created=1.0, due=time.time() + 0.1, priority=3)
    async with opened(redis.url(), Queue(name="q", topics=("t",), ordered=ordered)) as broker:
        await broker.publish([plain, with_a_way])
        subscription = await broker.subscribe("q", 10)
        [held] = await take(subscription, 1)
        assert held.message == msgspec.structs.replace(plain, created=held.message.created)
        await broker.settle([Settlement(held, Done((msgspec.structs.replace(plain, id="effect"),)))])
        arrived = {each.message.id: each.message for each in await take(subscription, 2)}
        assert set(arrived) == {"effect", "way"}
        assert msgspec.structs.replace(arrived["way"], due=0.0) == msgspec.structs.replace(with_a_way, due=0.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"a": "b"},
        {"dead_reason": "x"},
        {"body": "1", "dead_time": "soon", "dead_reason": "y"},
        {"dead_time": "soon", "dead_deliveries": "many", "dead_attempts": "9" * 400, "body": "1"},
        {"dead_time": "9" * 18, "conveyor_fields": "no such"},
        {"dead_error": "z", "ce_duetime": "2999-01-01T00:00:00Z"},
    ],
)
async def test_what_others_write_among_the_dead_letters_is_listed_and_can_be_discarded_or_put_back(
    redis: Redis, client: Any, fields: dict[str, str]
) -> None:
    url = redis.url()
    dead = f"{{{namespace_of(url)}}}:dead:q"
    async with opened(url, Queue(name="q", topics=("t",), ordered=True)) as broker:
        await broker.publish([Message("m", "t", b"x")])
        subscription = await broker.subscribe("q", 10)
        await broker.settle([Settlement(each, Dead("rejected", "no")) for each in await take(subscription, 1)])
        for _ in range(2):
            client.xadd(dead, fields)
        mine, one, other = await broker.dead_letters(DeadFilter(), limit=10)
        assert (mine.message.id, mine.reason, mine.deliveries) == ("m", "rejected", 1)
        known = "x" if fields == {"dead_reason": "x"} else "unknown"
        assert (one.reason, one.died, one.deliveries, one.attempts) == (known, 0.0, 0, 0)
        assert await broker.discard([one]) == 1
        assert await broker.redrive([other]) == 1
        assert bodies(await take(subscription, 1)) == [fields.get("body", "").encode()]


async def test_all_keys_have_one_hash_tag_and_what_is_done_leaves_none_of_its_own(redis: Redis, client: Any) -> None:
    url = redis.url()
    tag = f"{{{namespace_of(url)}}}:"
    queue = Queue(name="q", topics=("t",), ordered=True)
    async with opened(url, queue) as broker:
        others = {key for key in client.scan_iter() if not key.startswith(tag)}
        subscription = await broker.subscribe("q", 100)
        before = set(client.scan_iter(match=f"{tag}*"))
        messages = [Message(str(n), "t", b"x", key=f"k{n % 3}", priority=n % 2) for n in range(9)]
        await broker.publish(messages)
        done = 0
        while done < len(messages):
            [held] = await take(subscription, 1)
            verdict = DONE if held.attempts else RetryAt(0.0, "again")
            assert await broker.settle([Settlement(held, verdict)]) == []
            done += verdict is DONE
        new = set(client.scan_iter(match=f"{tag}*")) - before
        assert {key.removeprefix(tag).split(":")[0] for key in new} <= {"sent", "kept"}
        assert client.xlen(f"{tag}kept:q") == client.xlen(f"{tag}queue:q") == 0
        assert {key for key in client.scan_iter() if not key.startswith(tag)} <= others


async def test_a_publish_whose_answer_is_lost_is_done_once(redis: Redis) -> None:
    url = redis.url()
    async with (
        Proxy(redis.port) as proxy,
        opened(url, Queue(name="q", topics=("t",))) as here,
        opened(url.replace(f":{redis.port}/", f":{proxy.port}/")) as broker,
    ):
        lost = proxy.lose_answer_to(ANSWER_LOST.encode())
        nobody = Message("nobody", "of no queue", b"")
        assert await broker.publish([Message("one", "t", ANSWER_LOST.encode()), nobody]) == {"nobody"}
        assert lost.is_set()
        await broker.publish([Message("two", "t", b"behind")])
        received = await take(await here.subscribe("q", 10), 2)
        assert [each.message.id for each in received] == ["one", "two"]
        assert (await here.queues())[0].ready == 0


async def test_a_batch_that_comes_late_when_a_later_one_is_done_does_nothing(redis: Redis, client: Any) -> None:
    url = redis.url()
    namespace = f"{{{namespace_of(url)}}}"
    async with opened(
        url, Queue(name="q", topics=("t",)), Queue(name="both", topics=("u",)), Queue(name="p", topics=("u",))
    ):
        for topic, streams in ("t", ["q"]), ("u", ["both", "p"]):
            for number in 1, 2, 1, 2, 3:
                message = arguments_of(Message(str(number), topic, b"1"))
                client.evalsha(scripts.PUBLISH.digest, 1, f"{namespace}:queues", f"sender of {topic}", number, *message)
            for stream in streams:
                entries = client.xrange(f"{namespace}:queue:{stream}")
                assert [fields["ce_id"] for _, fields in entries] == ["1", "2", "3"]


async def test_a_batch_that_failed_is_done_when_it_comes_again_and_one_that_was_done_is_known_by_a_full_server(
    own_server: Redis,
) -> None:
    url = own_server.url()
    namespace = f"{{{namespace_of(url)}}}"
    queues = Queue(name="q", topics=("t",)), Queue(name="both", topics=("u",)), Queue(name="p", topics=("u",))
    async with opened(url, *queues) as broker:
        with plain(own_server) as client:

            def publish(topic: str, number: int) -> Any:
                message = arguments_of(Message(f"{topic}{number}", topic, b"1"))
                return client.evalsha(scripts.PUBLISH.digest, 1, f"{namespace}:queues", f"of {topic}", number, *message)

            for topic, stream in ("t", "q"), ("u", "p"):
                client.rename(f"{namespace}:queue:{stream}", "aside")
                client.set(f"{namespace}:queue:{stream}", "of another kind")
                with pytest.raises(ResponseError, match="WRONGTYPE"):
                    publish(topic, 1)
                client.rename("aside", f"{namespace}:queue:{stream}")
                publish(topic, 1)
                assert client.xlen(f"{namespace}:queue:{stream}") == 1
                client.config_set("maxmemory", "1mb")
                publish(topic, 1)
                with pytest.raises(ResponseError, match="maxmemory"):
                    publish(topic, 2)
                client.config_set("maxmemory", "0")
                assert client.xlen(f"{namespace}:queue:{stream}") == 1
        assert sum(queue.ready for queue in await broker.queues()) >= 3


async def test_what_was_done_is_remembered_for_as_long_as_the_sender_gives_signs_of_life(
    redis: Redis, client: Any
) -> None:
    url = redis.url()
    async with opened(url, Queue(name="q", topics=("t",))) as broker:
        subscription = await broker.subscribe("q", 10)
        for number in range(2):
            await broker.publish([Message(str(number), "t", b"1")])
            await broker.settle([Settlement(each, DONE) for each in await take(subscription, 1)])
        notes = client.keys(f"{{{namespace_of(url)}}}:sent:*")
        assert len(notes) == 2
        [sender] = {note.split(":")[2] for note in notes}
        for note in notes:
            assert 0 < client.ttl(note) <= 3600
            client.expire(note, 60)
        client.evalsha(scripts.BEAT.digest, 1, f"{{{namespace_of(url)}}}:queues", "an owner", 20_000, sender)
        assert all(client.ttl(note) > 60 for note in notes)


async def test_whoever_waits_is_given_all_that_comes_but_what_is_for_later(redis: Redis, client: Any) -> None:
    url = redis.url()
    stream = f"{{{namespace_of(url)}}}:queue:q"
    later = {"ce_duetime": "2999-01-01T00:00:00Z"}
    async with opened(url, Queue(name="q", topics=("t",))) as broker:
        for number in 1, 5, 16, 40:
            subscription = await broker.subscribe("q", 100)
            waiting = asyncio.create_task(take(subscription, number))
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not any("b" in each["flags"] for each in client.client_list()):  # blocked, in its read
                    await asyncio.sleep(0)
            with client.pipeline() as at_once:
                for each in range(number):
                    at_once.xadd(
                        stream, {"body": str(each), "ce_priority": str(int(each == 3)), "ce_partitionkey": "k"}
                    )
                    at_once.xadd(stream, {"body": "not now", **later})
                at_once.execute()
            taken = await waiting
            assert sorted(int(body) for body in bodies(taken)) == list(range(number))
            await broker.settle([Settlement(each, DONE) for each in taken])
            await subscription.close()
        [queue] = await broker.queues()
        assert (queue.delayed + queue.ready, queue.in_flight) == (1 + 5 + 16 + 40, 0)  # a last one was not looked at


async def test_a_settlement_whose_answer_is_lost_is_done_once_and_not_reported_as_lost(redis: Redis) -> None:
    url = redis.url()
    queues = Queue(name="q", topics=("t",)), Queue(name="effects", topics=("e",))
    async with Proxy(redis.port) as proxy, opened(url.replace(f":{redis.port}/", f":{proxy.port}/"), *queues) as broker:
        await broker.publish([Message("cause", "t", b"")])
        held = await take(await broker.subscribe("q", 10), 1)
        lost = proxy.lose_answer_to(ANSWER_LOST.encode())
        effect = Message("effect", "e", ANSWER_LOST.encode())
        assert await broker.settle([Settlement(each, Done((effect,))) for each in held]) == []
        assert lost.is_set()
        assert await broker.settle([Settlement(each, DONE) for each in held]) == held
        assert {each.name: (each.ready, each.in_flight) for each in await broker.queues()} == {
            "effects": (1, 0),
            "q": (0, 0),
        }


@pytest.mark.parametrize(
    "bad",
    [
        Message("bad \udcff", "t", b""),
        Message("bad", "t", b"", key="\udcff"),
        Message("bad", "t", b"", headers={"a": "\udcff"}),
        Message("bad", "t \udcff", b""),
    ],
)
async def test_a_text_that_nobody_can_carry_is_refused_for_the_one_message_that_has_it(
    redis: Redis, bad: Message
) -> None:
    async with opened(redis.url(), Queue(name="q", topics=("t",))) as broker:
        calls = [[Message(f"before {n}", "t", b"")] for n in range(3)]
        calls += [[Message("in front", "t", b""), bad, Message("behind", "t", b"")]]
        calls += [[Message(f"after {n}", "t", b"")] for n in range(3)]
        outcomes = await asyncio.gather(*(broker.publish(call) for call in calls), return_exceptions=True)
        [failed] = [each for each in outcomes if each != frozenset()]
        assert isinstance(failed, PublishFailed)
        assert (list(failed.refused), failed.unknown) == ([bad.id], {})
        there = await take(await broker.subscribe("q", 10), 8)
        assert {each.message.id for each in there} == {each.id for call in calls for each in call} - {bad.id}
        with pytest.raises(PublishFailed, match="surrogates"):
            await broker.settle([Settlement(there[0], Done((bad,)))])
        ends = [Settlement(there[0], Dead("\udcff", "\udcff", "\udcff")), Settlement(there[1], RetryAt(0.0, "\udcff"))]
        lost = await asyncio.gather(*(broker.settle([each]) for each in [*ends, Settlement(there[2], DONE)]))
        assert lost == [[], [], []]
        [letter] = await broker.dead_letters(DeadFilter(), limit=10)
        assert (letter.reason, letter.error, letter.traceback) == ("?", "?", "?")


async def test_a_settlement_that_nobody_waits_for_any_more_makes_room_for_the_next_message(redis: Redis) -> None:
    async with opened(redis.url(), Queue(name="q", topics=("t",))) as broker:
        await broker.publish([Message(name, "t", b"") for name in ("one", "two")])
        subscription = await broker.subscribe("q", 1)
        [held] = await take(subscription, 1)
        settling = asyncio.create_task(broker.settle([Settlement(held, DONE)]))
        await asyncio.sleep(0)  # it is on its way
        settling.cancel()
        await asyncio.wait([settling])
        assert settling.cancelled()
        [held] = await take(subscription, 1)
        assert held.message.id == "two"


async def test_a_settlement_whose_outcome_nobody_knows_makes_room_for_the_next_message(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "AGAIN_SECONDS", 0.0)
    url = redis.url()
    async with Proxy(redis.port) as proxy, opened(url.replace(f":{redis.port}/", f":{proxy.port}/")) as broker:
        await broker.declare([Queue(name="q", topics=("t",)), Queue(name="effects", topics=("e",))])
        await broker.publish([Message(name, "t", b"") for name in ("one", "two")])
        subscription = await broker.subscribe("q", 1)
        [held] = await take(subscription, 1)
        proxy.lose_answer_to(ANSWER_LOST.encode())
        with pytest.raises(lane.Unknown):
            await broker.settle([Settlement(held, Done((Message("effect", "e", ANSWER_LOST.encode()),)))])
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                with contextlib.suppress(BrokerUnavailable):
                    [held] = await subscription.fetch(1)
                    break
        assert held.message.id == "two"


async def test_a_claim_whose_answer_is_lost_comes_back_uncounted(redis: Redis) -> None:
    url = redis.url()
    async with (
        Proxy(redis.port) as proxy,
        opened(url, Queue(name="q", topics=("t",))) as here,
        opened(url.replace(f":{redis.port}/", f":{proxy.port}/")) as broker,
    ):
        subscription = await broker.subscribe("q", 10)
        fetch = asyncio.create_task(subscription.fetch(10))
        while not proxy.accepted >= 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        proxy.fall_silent()
        await here.publish([Message("m", "t", b"x")])
        while (await here.queues())[0].in_flight == 0:
            await asyncio.sleep(0.01)
        proxy.cut()
        with pytest.raises(BrokerUnavailable):
            await fetch
        [delivery] = await take(subscription, 1)
        assert (delivery.message.id, delivery.deliveries, delivery.crashes) == ("m", 1, 0)


async def test_what_an_owner_has_of_many_messages_is_given_back_in_parts(redis: Redis) -> None:
    queue, number = Queue(name="q", topics=("t",), lease_seconds=300.0), 3_500
    async with opened(redis.url(), queue) as broker:
        url = redis.url().partition("?")[0] + f"?namespace={broker._prefix[1:-2]}"
        async with opened(url) as dying, opened(url) as closing:
            await broker.publish([Message(f"m{n}", "t", b"{}") for n in range(number)])
            for owner in (dying, closing):
                await take(await owner.subscribe("q", number), number // 2)
            assert await broker.reclaim(dying.owner, "it died") == number // 2
        again = await take(await broker.subscribe("q", number), number)
        assert {each.message.id for each in again} == {f"m{n}" for n in range(number)}
        assert sum(each.deliveries for each in again) == number + number // 2


async def test_an_answer_has_no_more_bytes_than_the_server_can_give_at_once(redis: Redis) -> None:
    large, small = Queue(name="large", topics=("large",)), Queue(name="small", topics=("small",))
    async with opened(redis.url(), large, small) as broker:
        await broker.publish([Message(f"m{n}", "large", bytes(1_000_000)) for n in range(40)])
        await broker.publish([Message(f"m{n}", "small", b"{}") for n in range(500)])
        subscription = await broker.subscribe("large", 1_000)
        sizes: list[int] = []
        while sum(sizes) < 40:
            sizes.append(len(await subscription.fetch(1_000)))
        assert max(sizes) <= 20
        assert len(await (await broker.subscribe("small", 1_000)).fetch(1_000)) == 500


async def test_all_who_wait_for_a_connection_share_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONNECT_SECONDS", 0.3)
    accepted = 0

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        silent = link.Link(link.Address(host="127.0.0.1", port=port), "key")
        ended = await asyncio.gather(*(silent.connect() for _ in range(50)), return_exceptions=True)
        assert accepted == 1
        assert all(isinstance(each, BrokerUnavailable) for each in ended), ended
        assert "without TLS (rediss:// is with)?" in str(ended[0])
        silent.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """What the server of a test shows."""
    return made(tmp_path / "certificate")


@pytest.fixture
def stranger(tmp_path: Path) -> Certificate:
    """A certificate of another authority."""
    return made(tmp_path / "stranger")


def made(folder: Path, **options: Any) -> Certificate:
    """A certificate in a folder of its own."""
    folder.mkdir()
    return Certificate.make(folder, **options)


def over_tls(server: Redis, port: int, host: str = "localhost", /, **options: object) -> str:
    """The URL of a new namespace at a port of TLS, with a password that nobody may be told."""
    said = "".join(f"&{name}={value}" for name, value in options.items())
    return server.url(port=port).replace("redis://127.0.0.1", f"rediss://default:s3cr3t@{host}") + said


async def refused(url: str) -> str:
    """Why a broker cannot be opened."""
    broker = from_url(url)
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(BrokerUnavailable) as said:
            await broker.open()
    assert "s3cr3t" not in f"{said.value!r} {said.value.__cause__!r}"
    return str(said.value)


async def test_messages_go_round_over_tls_also_large_ones_and_when_the_server_comes_back(
    own_server: Redis, certificate: Certificate
) -> None:
    port = own_server.serve_tls(certificate)
    url = over_tls(own_server, port, cafile=certificate.authority)
    async with opened(url, Queue(name="q", topics=("t",))) as broker:
        subscription = await broker.subscribe("q", 10)
        waiting = asyncio.create_task(take(subscription, 1))
        await asyncio.sleep(0)
        await broker.publish([Message("small", "t", b"x")])
        [small] = await waiting
        await broker.settle([Settlement(small, DONE)])
        await broker.publish([Message("large", "t", bytes(3_000_000))])
        await asyncio.to_thread(own_server.restart)
        taken: list[Delivery] = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not taken:
                with contextlib.suppress(BrokerUnavailable):
                    taken = await subscription.fetch(10)
        assert bodies(taken) == [bytes(3_000_000)]
        assert await broker.settle([Settlement(taken[0], DONE)]) == []
        [info] = await broker.queues()
        assert (info.ready, info.in_flight) == (0, 0)


async def test_a_server_whose_certificate_cannot_be_trusted_is_refused_in_words(
    own_server: Redis, certificate: Certificate, stranger: Certificate
) -> None:
    port = own_server.serve_tls(certificate)
    authority = "cafile= in the URL names the file with the certificate of the authority that signed it"
    assert authority in await refused(over_tls(own_server, port, cafile=stranger.authority))
    assert authority in await refused(over_tls(own_server, port))  # the system's authorities do not know it either
    elsewhere = await refused(over_tls(own_server, port, "127.1", cafile=certificate.authority))
    assert "certificate is not valid for '127.1'" in elsewhere
    assert authority not in elsewhere
    async with opened(over_tls(own_server, port, "127.1", verify="no")) as broker:
        assert await broker.queues() == []


async def test_a_server_that_asks_for_a_certificate_lets_in_who_has_one_and_the_others_are_told(
    own_server: Redis, certificate: Certificate, stranger: Certificate
) -> None:
    port = own_server.serve_tls(certificate, ask_clients=True)
    asked = "does it ask for a certificate that it trusts (certfile= and keyfile= in the URL)?"
    assert asked in await refused(over_tls(own_server, port, cafile=certificate.authority))
    files: dict[str, object] = {"certfile": stranger.file, "keyfile": stranger.key}
    assert asked in await refused(over_tls(own_server, port, cafile=certificate.authority, **files))
    files = {"certfile": certificate.file, "keyfile": certificate.key}
    url = over_tls(own_server, port, cafile=certificate.authority, **files)
    async with opened(url, Queue(name="q", topics=("t",))) as broker:
        await broker.publish([Message("m", "t", b"x")])
        assert bodies(await take(await broker.subscribe("q", 10), 1)) == [b"x"]


async def test_where_only_one_side_speaks_tls_the_other_is_told(
    own_server: Redis, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = own_server.serve_tls(certificate)
    plain = over_tls(own_server, port).replace("rediss://", "redis://")
    assert "is it Redis that listens there, without TLS (rediss:// is with)?" in await refused(plain)
    monkeypatch.setattr(link, "CONNECT_SECONDS", 0.5)
    encrypted = over_tls(own_server, own_server.port)
    assert "does it speak TLS on this port (tls-port)? redis:// is without" in await refused(encrypted)


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_an_opening_that_fails_has_tried_once_and_leaves_no_socket_behind(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "CONNECT_SECONDS", 0.3)
    ends: list[asyncio.Event] = []

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(asyncio.Event())
        with contextlib.suppress(ConnectionError):
            await reader.read()
        ends[-1].set()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        said = await refused(f"{scheme}://default:s3cr3t@127.0.0.1:{server.sockets[0].getsockname()[1]}")
        assert "no answer within 0.3 s" in said
        [end] = ends
        async with asyncio.timeout(PATIENCE_SECONDS):
            await end.wait()


async def test_who_takes_leave_of_a_server_that_has_fallen_silent_does_not_wait_for_it(
    own_server: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(link, "ANSWER_SECONDS", 3600.0)
    monkeypatch.setattr(module, "FAREWELL_SECONDS", 0.2)
    queue = Queue(name="q", topics=("t",))
    async with opened(own_server.url(), queue) as broker, asyncio.timeout(PATIENCE_SECONDS):
        subscription = await broker.subscribe("q", 10)
        await broker.publish([Message("m", "t", b"x")])
        [delivery] = await take(subscription, 1)
        own_server.pause()
        settling = asyncio.create_task(broker.settle([Settlement(delivery, Release())]))
        await asyncio.sleep(0)
        await subscription.close()
        await broker.close()
        with pytest.raises(BrokerUnavailable):
            await settling
    assert "left without a word" in caplog.text


async def test_a_server_that_did_not_answer_a_new_connection_is_not_waited_for_at_the_end(
    own_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_server.start()
    async with (
        Proxy(own_server.port) as proxy,
        opened(own_server.url(port=proxy.port), Queue(name="q", topics=("t",))) as broker,
        asyncio.timeout(PATIENCE_SECONDS),
    ):
        subscription = await broker.subscribe("q", 10)
        await broker.publish([Message("m", "t", b"x")])
        held = await take(subscription, 1)
        own_server.pause()
        proxy.cut()
        monkeypatch.setattr(link, "CONNECT_SECONDS", 0.3)
        said = ""
        while "no answer within 0.3 s" not in said:
            with pytest.raises(BrokerUnavailable) as away:
                await broker.extend(held)
            said = str(away.value)
        monkeypatch.setattr(link, "CONNECT_SECONDS", 3600.0)
        monkeypatch.setattr(module, "FAREWELL_SECONDS", 3600.0)
        await subscription.close()
        await broker.close()


async def test_the_server_may_forget_the_scripts(redis: Redis, client: Any) -> None:
    async with opened(redis.url(), Queue(name="q", topics=("t",))) as broker:
        subscription = await broker.subscribe("q", 10)
        for number in range(3):
            client.script_flush()
            await broker.publish([Message(str(number), "t", b"x")])
            client.script_flush()
            held = await take(subscription, 1)
            client.script_flush()
            assert await broker.settle([Settlement(each, DONE) for each in held]) == []


async def test_what_a_cancelled_fetch_took_comes_back_though_the_server_has_forgotten_the_scripts(
    redis: Redis, client: Any
) -> None:
    async with opened(redis.url(), Queue(name="q", topics=("t",))) as broker:
        subscription = await broker.subscribe("q", 10)
        waiting = asyncio.create_task(subscription.fetch(1))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while client.info("clients")["blocked_clients"] == 0:
                await asyncio.sleep(0.01)
        client.script_flush()
        waiting.cancel()
        await asyncio.wait([waiting])
        await broker.publish([Message("m", "t", b"x")])
        [again] = await take(await broker.subscribe("q", 10), 1)
        assert (again.message.id, again.crashes) == ("m", 0)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while broker._doubtful:
                await asyncio.sleep(0.01)


async def test_what_is_under_way_fails_at_once_when_the_broker_is_closed_under_it(redis: Redis) -> None:
    async with opened(redis.url(), Queue(name="q", topics=("t",))) as broker:
        redis.pause()
        try:
            publishing = asyncio.create_task(broker.publish([Message("m", "t", b"x")]))
            await asyncio.sleep(0)
            broker._link.close()
            async with asyncio.timeout(PATIENCE_SECONDS):
                with pytest.raises(PublishFailed) as failed:
                    await publishing
        finally:
            redis.resume()
        assert list(failed.value.unknown) == ["m"]


async def test_a_queue_whose_stream_was_deleted_is_used_again_when_it_is_declared(redis: Redis, client: Any) -> None:
    url = redis.url()
    queue = Queue(name="q", topics=("t",))
    async with opened(url, queue) as broker:
        await broker.publish([Message("later", "t", b"", due=time.time() + 3600), Message("gone", "t", b"")])
        await take(await broker.subscribe("q", 10), 1)
        client.delete(f"{{{namespace_of(url)}}}:queue:q", f"{{{namespace_of(url)}}}:bell:q")
        [info] = await broker.queues()
        assert info.name == "q"
        await broker.declare([queue])
        subscription = await broker.subscribe("q", 10)
        fetch = asyncio.create_task(take(subscription, 1))
        await broker.publish([Message("m", "t", b"")])
        [delivery] = await fetch
        assert delivery.message.id == "m"


async def test_a_stream_that_is_deleted_under_a_waiting_receiver_leaves_no_error_that_nobody_heard(
    redis: Redis, client: Any
) -> None:
    url = redis.url()
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    async with opened(url, Queue(name="q", topics=("t",))) as broker:
        subscription = await broker.subscribe("q", 10)
        before = client.info("clients")["blocked_clients"]
        fetch = asyncio.create_task(subscription.fetch(1))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while client.info("clients")["blocked_clients"] == before:
                await asyncio.sleep(0.01)
            client.delete(f"{{{namespace_of(url)}}}:queue:q")
            with pytest.raises(BrokerError):
                await fetch
            with pytest.raises(BrokerError):
                await subscription.fetch(1)
        del fetch
    gc.collect()
    assert unheard == []


async def test_a_server_that_comes_back_empty_gets_its_queues_again(own_server: Redis) -> None:
    own_server.configure("appendonly", "no")
    async with opened(own_server.url(), Queue(name="q", topics=("t",))) as broker:
        subscription = await broker.subscribe("q", 10)
        await asyncio.to_thread(own_server.restart)
        with contextlib.suppress(BrokerUnavailable, PublishFailed):
            await broker.publish([Message("lost", "t", b"")])
        await broker.publish([Message("m", "t", b"")])
        while True:
            try:
                assert (await take(subscription, 1))[0].queue == "q"
                break
            except BrokerUnavailable:
                continue


async def test_a_temporary_queue_vanishes_when_its_owner_gives_no_sign_of_life(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = redis.url()
    async with opened(url) as watcher:
        monkeypatch.setattr(module, "DEAD_AFTER_SECONDS", 0.2)
        async with opened(url, Queue(name="q", topics=("t",), temporary=True)) as owner:
            monkeypatch.undo()
            assert [each.name for each in await watcher.queues()] == ["q"]
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await watcher.queues():
                    await asyncio.sleep(0.05)
            assert owner.owner != watcher.owner


async def test_what_conveyor_needs_of_an_acl_is_what_the_documentation_says(own_server: Redis) -> None:
    text = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text()
    [rule] = [line.strip() for line in text.splitlines() if line.strip().startswith("ACL SETUSER shop ")]
    url = own_server.url().split("?", maxsplit=1)[
        0
    ]  # the documented rule is for the namespace that is used unless said otherwise
    with plain(own_server) as client:
        client.execute_command(*rule.replace(">secret", ">s3cr3t").split())
    url = url.replace("redis://", "redis://shop:s3cr3t@")
    async with opened(
        url, Queue(name="q", topics=("t",), ordered=True), Queue(name="p", topics=("t",), max_length=1)
    ) as broker:
        subscription = await broker.subscribe("q", 10)
        await broker.publish([Message(str(n), "t", b"x", key="k", due=time.time() + n / 100) for n in range(3)])
        await broker.settle([Settlement(each, RetryAt(0.0, "x")) for each in await take(subscription, 1)])
        [held] = await take(subscription, 1)
        assert await broker.extend([held]) == []
        await broker.settle([Settlement(held, Dead("rejected", "no"))])
        letters = await broker.dead_letters(DeadFilter(), limit=10)
        await broker.bury(letters)
        assert await broker.redrive(letters) == 1
        assert await broker.discard(await broker.dead_letters(DeadFilter(), limit=10)) == 1
        assert await broker.purge("q") == 3
        assert await broker.reclaim("somebody", "x") == 0
        assert len(await broker.queues()) == 2
        assert any("forbidden" in risk for risk in await broker.risks())


async def test_a_wrong_password_is_said_without_the_password(own_server: Redis) -> None:
    broker = from_url(own_server.url().replace("redis://", "redis://:wr0ng@"))
    with plain(own_server) as client:
        client.config_set("requirepass", "right")
    with pytest.raises(BrokerError) as refused:
        await broker.open()
    assert not isinstance(refused.value, BrokerUnavailable), "it would be tried for ever"
    assert "WRONGPASS" in str(refused.value)
    assert "wr0ng" not in str(refused.value) + repr(broker.__dict__)


async def test_a_queue_that_is_not_there_is_an_error_whatever_its_name(redis: Redis) -> None:
    async with opened(redis.url()) as broker:
        for name in ("q", "MOVED", "shop.BUSY", "READONLY"):
            with pytest.raises(BrokerError, match="there is no queue") as error:
                await broker.subscribe(name, 1)
            assert not isinstance(error.value, BrokerUnavailable), "it would be tried for ever"


async def test_objects_of_one_owner_are_not_taken_for_repeats_of_each_other(redis: Redis) -> None:
    url, queue = redis.url(), Queue(name="q", topics=("t",))
    async with opened(url, queue) as first:
        for number in range(3):
            await first.publish([Message(str(number), "t", b"first")])
        second = from_url(url, owner=first.owner)
        await second.open()
        try:
            await second.publish([Message("3", "t", b"second")])
            deliveries = await take(await first.subscribe("q", 10), 4)
            assert await first.settle([Settlement(each, DONE) for each in deliveries[:3]]) == []
            assert await second.settle([Settlement(deliveries[3], DONE)]) == []
            [info] = await first.queues()
            assert (info.ready, info.in_flight) == (0, 0)
        finally:
            await second.close()


async def test_a_server_that_evicts_is_refused(own_server: Redis) -> None:
    own_server.configure("maxmemory", "100mb")
    own_server.configure("maxmemory-policy", "allkeys-lru")
    with pytest.raises(BrokerError, match="noeviction"):
        await from_url(own_server.url()).open()


async def test_a_server_that_is_full_refuses_messages_and_lets_work_end(own_server: Redis) -> None:
    async with opened(own_server.url(), Queue(name="q", topics=("t",))) as broker:
        await broker.publish([Message(str(n), "t", b"x") for n in range(2)])
        [first, second] = await take(await broker.subscribe("q", 10), 2)
        with plain(own_server) as client:
            client.config_set("maxmemory", "1mb")
        with pytest.raises(BrokerFull, match="maxmemory"):
            await broker.publish([Message("m", "t", b"x")])
        effect = Done((Message("effect", "t", b"x"),))
        assert await broker.settle([Settlement(first, effect)]) == [], (
            "work that was accepted is not given up for want of room"
        )
        assert await broker.settle([Settlement(second, DONE)]) == []
        assert any("maxmemory" in risk for risk in await broker.risks())


async def test_a_server_that_is_full_is_emptied_by_its_workers(own_server: Redis) -> None:
    url, queue = own_server.url(), Queue(name="q", topics=("t",), lease_seconds=60)
    async with opened(url, queue) as publisher:
        due = time.time() + 1
        await publisher.publish([Message("later", "t", b"x", due=due), *(Message(str(n), "t", b"x") for n in range(2))])
        with plain(own_server) as client:
            client.config_set("maxmemory", "1mb")
        async with opened(url, queue) as worker:
            subscription = await worker.subscribe("q", 10)
            found = await take(subscription, 3)
            assert {each.message.id for each in found} == {"0", "1", "later"}
            assert await worker.extend(found) == []
            with pytest.raises(TimeoutError):  # what is not wanted any more is given up on a full server, too
                await asyncio.wait_for(subscription.fetch(1), 0.05)
            assert await worker.settle([Settlement(each, DONE) for each in found]) == []
            assert await worker.settle([Settlement(each, DONE) for each in found]) == found
            await subscription.close()


async def test_a_replica_is_not_written_to(own_server: Redis, redis: Redis) -> None:
    redis.start()
    async with opened(own_server.url(), Queue(name="q", topics=("t",))) as broker:
        with plain(own_server) as client:
            client.execute_command("REPLICAOF", "127.0.0.1", str(redis.port))
            with pytest.raises(BrokerUnavailable):
                await broker.subscribe("q", 1)
            client.execute_command("REPLICAOF", "NO", "ONE")


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[tuple[Redis, Redis]]:
    """Two servers that may become a cluster."""
    with contextlib.ExitStack() as stack:
        yield (node(tmp_path / "one", stack), node(tmp_path / "other", stack))


def node(folder: Path, stack: contextlib.ExitStack) -> Redis:
    """One of them."""
    folder.mkdir()
    server = Redis(folder)
    stack.callback(server.close)
    server.configure("cluster-enabled", "yes")
    server.configure("cluster-require-full-coverage", "no")
    # By default it is the port + 10,000, which the kernel may have given away.
    server.configure("cluster-port", str(find_free_port()))
    return server


async def join(one: Redis, other: Redis, port: int) -> None:
    """Make a cluster of them, in which the other one has all keys.

    Parameters:
        port: the other one's, as the nodes know each other.
    """
    for server in (one, other):
        server.start()
    with plain(one) as here, plain(other) as there:
        [bus] = there.config_get("cluster-port").values()
        here.execute_command("CLUSTER", "MEET", "127.0.0.1", str(port), bus)
        there.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        while not (_is_ready(here) and _is_ready(there)):
            await asyncio.sleep(0.02)


async def test_in_a_cluster_it_goes_where_its_keys_are(two_nodes: tuple[Redis, Redis]) -> None:
    one, other = two_nodes
    await join(one, other, other.port)
    async with opened(one.url(), Queue(name="q", topics=("t",))) as broker:
        await broker.publish([Message("m", "t", b"x")])
        held = await take(await broker.subscribe("q", 1), 1)
        assert await broker.settle([Settlement(each, DONE) for each in held]) == []


async def test_in_a_cluster_with_tls_each_node_shows_a_certificate_of_its_own_name(
    two_nodes: tuple[Redis, Redis], tmp_path: Path
) -> None:
    one, other = two_nodes
    certificate = made(tmp_path / "certificate", names="IP:127.0.0.1")
    port = one.serve_tls(certificate)
    other_port = other.serve_tls(made(tmp_path / "other certificate", names="DNS:localhost", beside=certificate))
    other.configure("cluster-announce-hostname", "localhost")
    for server in two_nodes:
        server.configure("tls-cluster", "yes")
        server.configure("cluster-preferred-endpoint-type", "hostname")
    await join(one, other, other_port)
    url = over_tls(one, port, "127.0.0.1", cafile=certificate.authority)
    async with opened(url, Queue(name="q", topics=("t",))) as broker:
        await broker.publish([Message("m", "t", b"x")])
        assert bodies(await take(await broker.subscribe("q", 1), 1)) == [b"x"]


@pytest.mark.parametrize(
    ("host", "first", "name"),
    [
        ("node-2.example", "redis.example", "node-2.example"),
        ("10.0.0.2", "redis.example", "redis.example"),
        ("10.0.0.2", "10.0.0.1", "10.0.0.2"),
        ("::1", "localhost", "localhost"),
        ("localhost", "localhost", "localhost"),
    ],
)
def test_a_node_that_is_known_by_its_address_alone_shows_the_name_of_the_url(host: str, first: str, name: str) -> None:
    assert link.shown_by(host, first) == name


def _is_ready(node: Any) -> bool:
    slots = node.execute_command("CLUSTER", "SLOTS")
    state = node.execute_command("CLUSTER", "INFO")
    return bool(slots) and "cluster_state:ok" in str(state)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://localhost/0?nonsense=1", "nonsense"),
        ("redis://localhost/zero", "database"),
        ("redis://localhost:99999/0", "port"),
        ("redis://localhost/0?namespace=a{b}", "namespace"),
        ("redis://localhost/0#x", "redis://"),
        ("unix://", "socket"),
        ("rediss://localhost/0?cafile=/does/not/exist", "TLS"),
        ("rediss://localhost/0?keyfile=/a/key", "certfile"),
        ("rediss://localhost/0?verify=perhaps", "yes or no"),
        ("redis://localhost/0?cafile=/an/authority", "cafile is for rediss://"),
        ("rediss://localhost/0?ca=/an/authority", "cafile"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as refused:
        from_url(url.replace("localhost", "shop:s3cr3t@localhost"))
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    ("told", "word"),
    [
        ({"aof_enabled": "0"}, "appendonly"),
        ({"appendfsync": "no"}, "appendfsync always"),
        ({"appendfsync": "everysec"}, "two seconds"),
        ({"maxmemory": "100", "used_memory": "95"}, "95%"),
        ({"maxmemory": "100", "maxmemory_policy": "allkeys-lru"}, "noeviction"),
        ({"role": "slave"}, "replica"),
        ({"connected_slaves": "1"}, "min-replicas-to-write"),
        ({"min-replicas-to-write": "2", "connected_slaves": "1"}, "2 replica"),
        ({"slave0": "ip=10.0.0.1,port=6379,state=online,offset=1,lag=99"}, "99 s behind"),
        ({"aof_last_write_status": "err"}, "disk"),
        ({}, "INFO is forbidden"),
    ],
)
def test_each_risk_is_a_sentence_that_says_what_to_do(told: dict[str, str], word: str) -> None:
    [risk] = risks_of(told, 0.0)
    assert word in risk


async def test_that_a_crash_of_the_server_loses_messages_is_said_as_a_warning(
    own_server: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    own_server.configure("appendonly", "no")
    async with opened(own_server.url(), Queue(name="q", topics=("t",))):
        [said] = [record for record in caplog.records if "last snapshot is lost" in record.getMessage()]
    assert said.levelname == "WARNING"


def test_a_server_that_is_well_set_up_has_no_risk() -> None:
    assert risks_of({"aof_enabled": "1", "appendfsync": "always", "role": "master", "maxmemory": "0"}, 0.0) == []


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
header = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=3, max_size=12).filter(
    lambda name: name[:2] not in {"ce", "cl", "co"} and name != "body"
)


@given(
    st.builds(
        Message,
        id=text,
        topic=st.text("abc.", min_size=1),
        body=st.binary(),
        key=st.none() | text | st.just(""),
        headers=st.dictionaries(header, text | st.just(""), max_size=4),
        content_type=st.sampled_from(["application/json", "image/png"]),
        correlation_id=st.none() | text,
        causation_id=st.none() | text,
        created=st.floats(0, 1e10).map(lambda seconds: round(seconds, 6)),
        due=st.sampled_from([0.0, 1_763_776_000.5]),
        expires=st.none() | st.just(1_763_776_000.25),
        priority=st.integers(0, 9),
    ),
    st.booleans(),
)
def test_a_message_survives_its_way_through_a_streams_fields(message: Message, topic: bool) -> None:
    fields = arguments_of(message, "q" if topic else "")[6:]
    said = [value if isinstance(value, bytes) else str(value).encode() for value in fields_of(message, topic=topic)]
    assert sorted(zip(fields[::2], fields[1::2], strict=True)) == sorted(zip(said[::2], said[1::2], strict=True))
    assert message_of(fields, where="q/1-0", topics=["x", message.topic], now=7.0) == message


@given(st.lists(st.binary(max_size=20), max_size=12))
def test_no_fields_make_a_message_impossible(fields: list[bytes]) -> None:
    message = message_of(fields, where="q/1-0", topics=["t"], now=7.0)
    assert message.id


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "ce_id",
                "ce-id",
                "ce_time",
                "CE_TIME",
                "ce_priority",
                "ce_duetime",
                "cloudEvents:type",
                "ce_type",
                "ce_topic",
                "body",
                "content-type",
            ]
        ),
        st.binary(max_size=30),
    )
)
def test_strange_attributes_are_read_by_the_rules(fields: dict[str, bytes]) -> None:
    flat = [part for name, value in fields.items() for part in (name.encode(), value)]
    message = message_of(flat, where="q/1-0", topics=["t"], now=7.0)
    assert message.body == fields.get("body", b"")
    assert 0 <= message.priority <= 9


SENSELESS_TIMES: Final = [
    "9999-99-99T99:99:99Z",
    "0000-01-01T00:00:00Z",
    "2999-12-00T00:00:00Z",
    "2999-02-29T00:00:00Z",
    "2999-12-01T24:00:00Z",
    "2999-12-01T00:00:60Z",
    "2999-01-01T00:00:00 02:00",
    "2999-01-01T00:00:00+9999",
    "2999-01-01T00:00:00+24:00",
    "2999-01-01T00:00:005",
    "tomorrow",
    "",
]
a_time = st.datetimes(datetime(2000, 1, 1, tzinfo=UTC).replace(tzinfo=None), timezones=st.timezones()).map(
    datetime.isoformat
)
almost_a_time = st.tuples(
    st.integers(0, 9999), st.integers(0, 13), st.integers(0, 32), st.sampled_from("Tt "), st.integers(0, 24)
).flatmap(
    lambda parts: st.builds(
        "{:04}-{:02}-{:02}{}{:02}:{:02}:{:02}{}{}".format,
        *map(st.just, parts),
        st.integers(0, 60),
        st.integers(0, 60),
        st.from_regex(r"([.,][0-9]{1,9})?", fullmatch=True),
        st.sampled_from(["", "Z", "z", " "]) | st.from_regex(r"[+-][0-9]{2}(:?[0-5][0-9])?", fullmatch=True),
    )
)


def test_the_server_and_its_receivers_read_the_same_time(redis: Redis) -> None:
    script = scripts.script_of("local at = moment(ARGV[1]); return at and number(at) or ''").text
    redis.start()

    @given(almost_a_time | a_time)
    @example("2026-11-21T22:30:00.5+02:00")
    @example("2024-02-29 00:00:00.123456789-05")
    def agree(text: str) -> None:
        said = server.eval(script, 1, "{any}:queues", text)
        fields = [b"ce_source", b"conveyor", b"ce_id", b"m", b"ce_type", b"t", b"ce_duetime", text.encode()]
        for form in (fields, [b"ce_duetime", text.encode()]):
            due = message_of(form, where="q/1-0", topics=["t"], now=0.0).due
            assert abs(due * 1000 - float(said or 0)) <= 1 or (not said and text[11:13] == "24"), (text, said, due)

    with plain(redis) as server:
        assert [server.eval(script, 1, "{any}:queues", text) for text in SENSELESS_TIMES] == [""] * len(SENSELESS_TIMES)
        agree()
