"""conveyor move: everything that is in one broker arrives in another one, also when the move is stopped or killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor import brokers
from conveyor.broker import Broker, DeadFilter, DeadLetter, Delivery, Queue, QueueInfo, Settlement, Subscription
from conveyor.cli.move import BATCH, Moved, Mover, held, is_same, turns
from conveyor.core.message import Message
from conveyor.core.settle import Dead, Release, RetryAt
from conveyor.errors import BrokerError, BrokerUnavailable, PublishFailed

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ
    from tests.cli.conftest import Program

CHARGE: Final = Queue(name="shop.charge", topics=("order.created", "order.changed"), lease_seconds=45.0)
SHIP: Final = Queue(name="shop.ship", topics=("order.paid",), ordered=True)
NEWS: Final = Queue(name="shop.news", topics=("order.created",), max_length=100)
LATER: Final = 3600.0
MANY: Final = 6_000
PATIENCE_SECONDS: Final = 60.0


@pytest.fixture
def old(conveyor: Program) -> str:
    return f"sqlite:///{conveyor.folder}/old.queue"


@pytest.fixture(params=["sqlite", "redis", "rabbitmq"])
def new(request: pytest.FixtureRequest, conveyor: Program) -> str:
    """An empty broker of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{conveyor.folder}/new.queue"
    url: str = request.getfixturevalue(request.param).url()
    return url


@pytest.fixture(params=["sqlite", "redis"])
def leasing(request: pytest.FixtureRequest, conveyor: Program) -> str:
    """A broker of each kind where what a dead process held is its own until the lease ends."""
    if request.param == "sqlite":
        return f"sqlite:///{conveyor.folder}/leasing.queue"
    url: str = request.getfixturevalue(request.param).url()
    return url


ROUTES: Final = [
    ("sqlite", "sqlite"),
    ("sqlite", "redis"),
    ("sqlite", "rabbitmq"),
    ("redis", "sqlite"),
    ("rabbitmq", "sqlite"),
]


@pytest.fixture(params=ROUTES, ids=" to ".join)
def route(request: pytest.FixtureRequest, conveyor: Program) -> tuple[str, str]:
    """Where from, and where to."""
    files = {"old": f"sqlite:///{conveyor.folder}/old.queue", "new": f"sqlite:///{conveyor.folder}/new.queue"}
    old, new = (
        files[end] if kind == "sqlite" else request.getfixturevalue(kind).url()
        for end, kind in zip(files, request.param, strict=True)
    )
    return old, new


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Broker]:
    broker = brokers.from_url(url)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


def message(topic: str, number: int, *, key: str | None = None, due: float = 0.0) -> Message:
    return Message(
        id=f"{topic}-{number}",
        topic=topic,
        body=b'{"n": %d}' % number,
        key=key,
        headers={"tenant": "blau"},
        correlation_id="journey",
        created=1_700_000_000.0,
        due=due,
        priority=3,
    )


async def fill(broker: Broker) -> float:
    """Something of everything; until when the delayed ones wait."""
    due = round(time.time() + LATER, 3)
    await broker.declare([CHARGE, SHIP, NEWS])
    await broker.publish([message("order.changed", number) for number in range(3)])
    subscription = await broker.subscribe(CHARGE.name, 10)
    failing, dying, waiting = await taken(subscription, 3)
    await broker.settle(
        [
            Settlement(failing, RetryAt(due, "TimeoutError")),
            Settlement(dying, Dead("rejected", "ValueError: no", "Traceback …")),
            Settlement(waiting, Release()),
        ]
    )
    await subscription.close()
    await broker.publish([message("order.changed", 10, due=due)])
    await broker.publish([message("order.paid", number, key=f"k{number % 3}") for number in range(12)])
    return due


async def taken(subscription: Subscription, number: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(found) < number:
            found += await subscription.fetch(number - len(found))
    return found


async def contents(broker: Broker, queue: Queue) -> tuple[QueueInfo, list[Message], list[DeadLetter]]:
    """What is in a queue: figures, messages (taken out early, and left held), dead letters."""
    [info] = [each for each in await broker.queues() if each.name == queue.name]
    subscription = await broker.subscribe(queue.name, 100_000, early=True)
    held = await taken(subscription, info.ready + info.delayed)
    return info, [each.message for each in held], await broker.dead_letters(DeadFilter(queue=queue.name), limit=100)


def test_everything_arrives_as_it_was(conveyor: Program, route: tuple[str, str]) -> None:
    old, new = route

    async def before() -> float:
        async with opened(old) as broker:
            return await fill(broker)

    due = asyncio.run(before())
    told = conveyor.json("move", "--from", old, "--to", new)
    assert {each["name"]: (each["moved"], each["moved_dead"], each["left"]) for each in told["queues"]} == {
        "shop.charge": (3, 1, 0),
        "shop.news": (0, 0, 0),
        "shop.ship": (12, 0, 0),
    }

    async def after() -> None:
        async with opened(old) as broker:
            for info in await broker.queues():
                assert (info.ready, info.in_flight, info.delayed, info.dead) == (0, 0, 0, 0)
        async with opened(new) as broker:
            info, messages, dead = await contents(broker, CHARGE)
            assert (info.ready, info.delayed, info.dead, info.lease_seconds) == (1, 2, 1, 45.0)
            assert {each.id: round(each.due, 3) for each in messages} == {
                "order.changed-0": due,
                "order.changed-2": 0.0,
                "order.changed-10": due,
            }
            [now] = [each for each in messages if not each.due]
            assert now == message("order.changed", 2)
            [letter] = dead
            assert (letter.message, letter.reason, letter.error, letter.traceback, letter.deliveries) == (
                message("order.changed", 1), "rejected", "ValueError: no", "Traceback …", 1
            )  # fmt: skip
            info, messages, _ = await contents(broker, SHIP)
            assert info.ordered
            for key in ("k0", "k1", "k2"):
                numbers = [int(each.id.rpartition("-")[2]) for each in messages if each.key == key]
                assert numbers == sorted(numbers)
                assert len(numbers) == 4
            [news] = [each for each in await broker.queues() if each.name == NEWS.name]
            assert news.max_length == 100
            # The queues receive their topics there.
            assert await broker.publish([message("order.created", 1)]) == frozenset()

    asyncio.run(after())


def test_only_the_named_queues_are_moved(conveyor: Program, old: str, new: str) -> None:
    async def before() -> None:
        async with opened(old) as broker:
            await fill(broker)

    asyncio.run(before())
    told = conveyor.json("move", "--from", old, "--to", new, "--queue", "shop.ship")
    assert [each["name"] for each in told["queues"]] == ["shop.ship"]
    found = conveyor.json("queues", "--broker", old)["queues"]
    assert {each["name"]: each["ready"] + each["delayed"] for each in found} == {
        "shop.charge": 3, "shop.news": 0, "shop.ship": 0
    }  # fmt: skip
    assert "did you mean shop.ship?" in conveyor.refused(
        "move", "--from", old, "--to", new, "--queue", "shop.shipp", code=1
    )


def test_a_dry_run_tells_and_moves_nothing(conveyor: Program, old: str) -> None:
    async def before() -> None:
        async with opened(old) as broker:
            await fill(broker)

    asyncio.run(before())
    new = f"sqlite:///{conveyor.folder}/new.queue"
    shown = conveyor.ok("move", "--from", old, "--to", new, "--dry-run")
    assert "nothing was moved" in shown
    assert not (conveyor.folder / "new.queue").exists()
    told = conveyor.json("move", "--from", old, "--to", new, "--dry-run")
    assert [(each["name"], each["ready"], each["delayed"], each["dead"]) for each in told["queues"]] == [
        ("shop.charge", 1, 2, 1), ("shop.news", 0, 0, 0), ("shop.ship", 3, 9, 0)
    ]  # fmt: skip
    found = conveyor.json("queues", "--broker", old)["queues"]
    assert sum(each["ready"] + each["delayed"] + each["dead"] for each in found) == 16


def test_what_workers_receive_is_moved_only_when_told_so(conveyor: Program, old: str, new: str) -> None:
    async def receiving() -> None:
        async with opened(old) as broker:
            await fill(broker)
            await broker.subscribe(CHARGE.name, 1)
            move = ("move", "--from", old, "--to", new)
            said = await asyncio.to_thread(conveyor.refused, *move, code=1)
            assert "workers receive from shop.charge (1)" in said
            assert "what was killed" in said
            await asyncio.to_thread(conveyor.ok, *move, "--while-consuming")

    asyncio.run(receiving())


def test_what_a_dead_process_held_is_told_and_moved_later(conveyor: Program, old: str, new: str) -> None:
    async def story() -> None:
        async with opened(old) as broker:
            await broker.declare([CHARGE])
            await broker.publish([message("order.changed", number) for number in range(3)])
            subscription = await broker.subscribe(CHARGE.name, 1)
            held = await taken(subscription, 1)
            await subscription.close()
            move = ("move", "--from", old, "--to", new)
            told = await asyncio.to_thread(lambda: conveyor.json(*move, code=1))
            assert [(each["moved"], each["left"]) for each in told["queues"]] == [(2, 1)]
            await broker.settle([Settlement(each, RetryAt(0.0, "again")) for each in held])
            told = await asyncio.to_thread(lambda: conveyor.json(*move))
            assert [(each["moved"], each["left"]) for each in told["queues"]] == [(1, 0)]

    asyncio.run(story())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_move_that_is_stopped_or_killed_loses_nothing(
    conveyor: Program, old: str, new: str, number: signal.Signals
) -> None:
    async def before() -> None:
        async with opened(old) as broker:
            await broker.declare([CHARGE])
            await broker.publish([message("order.changed", each) for each in range(MANY)])

    asyncio.run(before())
    move = conveyor.command("move", "--from", old, "--to", new)

    async def stop() -> None:
        process = subprocess.Popen(move, cwd=conveyor.folder, env=conveyor.environment, stdout=subprocess.DEVNULL)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while process.poll() is None:
                with contextlib.suppress(Exception):
                    async with opened(new) as broker:
                        if sum(each.ready for each in await broker.queues()) > BATCH:
                            process.send_signal(number)
                            break
        assert await asyncio.to_thread(process.wait) == (-9 if number == signal.SIGKILL else 130)

    async def ids(url: str) -> Counter[str]:
        async with opened(url) as broker:
            await broker.declare([CHARGE])
            subscription = await broker.subscribe(CHARGE.name, 2 * MANY)
            [info] = await broker.queues()
            held = await taken(subscription, info.ready + info.in_flight)  # what a killed move held comes back
            return Counter(each.message.id for each in held)

    asyncio.run(stop())
    there, still = asyncio.run(ids(new)), asyncio.run(ids(old))
    if number != signal.SIGKILL:
        assert not there & still, "an orderly end leaves no message in both"
    else:
        assert (there & still).total() <= BATCH
    assert len(there | still) == MANY
    assert still, "it was stopped too late to prove anything"
    conveyor.ok("move", "--from", old, "--to", new)
    found = asyncio.run(ids(new))
    assert len(found) == MANY
    assert found.total() <= MANY + BATCH
    assert not asyncio.run(ids(old))


async def test_leases_are_held_on_to_when_one_sign_of_life_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    broker, came_through = brokers.from_url("memory://"), asyncio.Event()
    signs = itertools.count()

    async def extend(_: object) -> list[Delivery]:
        if next(signs) == 0:
            raise BrokerUnavailable("not now")
        came_through.set()
        return []

    monkeypatch.setattr(broker, "extend", extend)
    async with asyncio.timeout(PATIENCE_SECONDS), held(broker, [], 0.03):
        await came_through.wait()


@contextlib.asynccontextmanager
async def two_brokers(queue: Queue) -> AsyncIterator[tuple[Broker, Broker, Moved, Mover]]:
    """An old one and a new one in memory, and what moves the queue from one to the other."""
    old, new = brokers.from_url("memory://"), brokers.from_url("memory://")
    await old.open()
    await new.open()
    for broker in (old, new):
        await broker.declare([queue])
    [info] = await old.queues()
    mover = Mover(old, new, asyncio.Event(), lambda _: None)
    try:
        yield old, new, Moved(info), mover
    finally:
        await old.close()
        await new.close()


async def test_what_is_behind_a_refused_message_of_its_key_stays_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_brokers(SHIP) as (old, new, moved, mover):
        await old.publish([message("order.paid", number, key=f"k{number % 2}") for number in range(8)])
        publish = new.publish

        async def refusing(messages: list[Message], *, queue: str | None = None) -> frozenset[str]:
            await publish([each for each in messages if each.id != "order.paid-2"], queue=queue)
            if any(each.id == "order.paid-2" for each in messages):
                raise PublishFailed({"order.paid-2": "too long"}, {})
            return frozenset()

        monkeypatch.setattr(new, "publish", refusing)
        with pytest.raises(BrokerError, match="run this again"):
            await mover.move(moved)
        there = [each.id for each in (await contents(new, SHIP))[1]]
        assert sorted(there) == [f"order.paid-{number}" for number in (0, 1, 3, 5, 7)]
        still = [each.id for each in (await contents(old, SHIP))[1]]
        assert still == ["order.paid-2", "order.paid-4", "order.paid-6"]


async def test_what_a_killed_process_had_of_an_ordered_queue_is_not_overtaken(leasing: str) -> None:
    queue = Queue(name="shop.ship", topics=("order.paid",), ordered=True, lease_seconds=1.0)
    async with opened(leasing) as dead, opened(leasing) as source, opened("memory://") as new:
        for broker in (dead, new):
            await broker.declare([queue])
        await dead.publish([message("order.paid", number, key="k") for number in range(6)])
        await taken(await dead.subscribe(queue.name, 2, early=True), 2)
        [info] = await source.queues()
        said: list[str] = []
        mover, moved = Mover(source, new, asyncio.Event(), lambda _: None), Moved(info)
        await mover.wait_until_still(moved, said.append)
        await mover.move(moved)
        assert [each.id for each in (await contents(new, queue))[1]] == [f"order.paid-{number}" for number in range(6)]
        assert "waiting for up to 1 s until the leases of 2 messages end" in said[0]


async def test_an_ordered_queue_of_which_somebody_alive_has_messages_stays_where_it_is(
    leasing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conveyor.cli.move.LEASE_MARGIN_SECONDS", 0.0)
    queue = Queue(name="shop.ship", topics=("order.paid",), ordered=True, lease_seconds=1.0)
    async with opened(leasing) as alive, opened(leasing) as source, opened("memory://") as new:
        for broker in (alive, new):
            await broker.declare([queue])
        await alive.publish([message("order.paid", number, key="k") for number in range(6)])
        held = await taken(await alive.subscribe(queue.name, 2, early=True), 2)
        [info] = await source.queues()
        mover, moved, said = Mover(source, new, asyncio.Event(), lambda _: None), Moved(info), list[str]()
        waiting = asyncio.create_task(mover.wait_until_still(moved, said.append))
        while not waiting.done():
            await alive.extend(held)
            await asyncio.sleep(0.2)
        await waiting
        await mover.move(moved)
        assert (moved.messages, moved.left) == (0, 6)
        assert "somebody alive has 2 of its messages" in said[-1]


async def test_what_the_old_broker_may_give_out_again_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_brokers(CHARGE) as (old, _, moved, mover):
        await old.publish([message("order.changed", number) for number in range(3)])
        settle = old.settle

        async def one_lease_had_ended(settlements: list[Settlement]) -> list[Delivery]:
            await settle(settlements)
            return [settlements[0].delivery]

        monkeypatch.setattr(old, "settle", one_lease_had_ended)
        await mover.move(moved)
        assert (moved.messages, moved.twice) == (3, 1)


def test_what_the_new_broker_refuses_stays_in_the_old_one(conveyor: Program, old: str) -> None:
    async def before() -> None:
        async with opened(old) as broker:
            await fill(broker)

    asyncio.run(before())
    new = conveyor.folder / "there" / "new.queue"
    new.parent.mkdir()
    new.write_text("this is no queue file")
    assert "new.queue" in conveyor.refused("move", "--from", old, "--to", f"sqlite:///{new}", code=1)
    found = conveyor.json("queues", "--broker", old)["queues"]
    assert sum(each["ready"] + each["delayed"] + each["dead"] for each in found) == 16


OWN: Final = Queue(
    name="paid-orders",
    topics=("paid-orders",),
    native={"queue_type": "classic", "exchange": "shop", "exchange_type": "direct", "dead_queue": "paid-orders-dlq"},
)
"""With settings of RabbitMQ's own."""


@pytest.mark.parametrize(
    ("kind", "started"),
    [("rabbitmq", False), ("rabbitmq", True), ("sqlite", True)],
    ids=["RabbitMQ, into nothing", "RabbitMQ, after a start", "SQLite, after a start"],
)
def test_an_application_with_settings_of_rabbitmqs_own_goes_on_there(
    conveyor: Program, rabbitmq: RabbitMQ, old: str, kind: str, started: bool
) -> None:
    old, new = rabbitmq.url() if kind == "rabbitmq" else old, rabbitmq.url()

    async def before() -> None:
        async with opened(old) as broker:
            await broker.declare([OWN])
            await broker.publish([message("paid-orders", number) for number in range(3)])
            subscription = await broker.subscribe(OWN.name, 1)
            [dying] = await taken(subscription, 1)
            await broker.settle([Settlement(dying, Dead("rejected", "ValueError: no"))])
            await subscription.close()
        if started:
            async with opened(new) as broker:
                await broker.declare([OWN])

    async def after() -> None:
        async with opened(new) as broker:
            await broker.declare([OWN])
            info, messages, dead = await contents(broker, OWN)
            assert dict(info.native) == OWN.native
            assert sorted(each.id for each in messages) == ["paid-orders-1", "paid-orders-2"]
            assert [each.message.id for each in dead] == ["paid-orders-0"]

    asyncio.run(before())
    # As its application has it: the URL may name another type of queue than the declaration.
    told = conveyor.json("move", "--from", old, "--to", new)
    assert [(each["moved"], each["moved_dead"], each["left"]) for each in told["queues"]] == [(2, 1, 0)]
    asyncio.run(after())


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (Queue(name=CHARGE.name, ordered=True), "it is ordered by key there"),
        (Queue(name=CHARGE.name, max_length=2), "it holds 2 messages there at most, and 3 would come"),
    ],
    ids=["ordered", "bounded"],
)
def test_a_queue_of_the_new_broker_in_which_something_would_be_lost_gets_nothing(
    conveyor: Program, old: str, there: Queue, why: str
) -> None:
    new = f"sqlite:///{conveyor.folder}/new.queue"

    async def before() -> None:
        async with opened(old) as broker:
            await broker.declare([CHARGE])
            await broker.publish([message("order.changed", number) for number in range(3)])
        async with opened(new) as broker:
            await broker.declare([there])

    asyncio.run(before())
    assert why in conveyor.refused("move", "--from", old, "--to", new, code=1)
    assert [each["ready"] for each in conveyor.json("queues", "--broker", old)["queues"]] == [3]
    assert [each["ready"] for each in conveyor.json("queues", "--broker", new)["queues"]] == [0]


@pytest.mark.parametrize("queue", [CHARGE, SHIP], ids=["no order", "order"])
async def test_of_two_messages_with_one_id_the_one_that_is_refused_stays(
    monkeypatch: pytest.MonkeyPatch, queue: Queue
) -> None:
    async with two_brokers(queue) as (old, new, moved, mover):
        topic = queue.topics[0]
        twins = [msgspec.structs.replace(message(topic, number, key=f"k{number}"), id="twin") for number in range(2)]
        await old.publish(twins)
        publish = new.publish

        async def refusing(messages: list[Message], *, queue: str | None = None) -> frozenset[str]:
            fine = [each for each in messages if each.key != "k1"]
            await publish(fine, queue=queue)
            if len(fine) < len(messages):
                raise PublishFailed({"twin": "too long"}, {})
            return frozenset()

        monkeypatch.setattr(new, "publish", refusing)
        with pytest.raises(BrokerError, match="too long"):
            await mover.move(moved)
        assert [each.key for each in (await contents(new, queue))[1]] == ["k0"]
        assert [each.key for each in (await contents(old, queue))[1]] == ["k1"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y", None]))), st.booleans())
def test_in_each_part_of_a_batch_an_id_and_where_there_is_order_a_key_means_one_message(
    given: list[tuple[str, str | None]], ordered: bool
) -> None:
    batch = [
        Delivery(Message(id=id, topic="t", body=b"", key=key), "q", number, 1, 0)
        for number, (id, key) in enumerate(given)
    ]
    parts = turns(batch, ordered=ordered)
    assert sorted(cast("int", each.receipt) for part in parts for each in part) == list(range(len(batch)))
    for part in parts:
        assert len({each.message.id for each in part}) == len(part)
        keys = [each.message.key for each in part if each.message.key is not None]
        assert not ordered or len(set(keys)) == len(keys)
    for name in range(2 if ordered else 1):
        for same in ("abc", "xy")[name]:
            going = [
                cast("int", each.receipt)
                for part in parts
                for each in part
                if (each.message.id, each.message.key)[name] == same
            ]
            assert going == sorted(going)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("redis://localhost", "redis://localhost:6379/0"),
        ("redis://localhost", "redis://user:secret@127.0.0.1/?namespace=conveyor"),
        ("redis://Shop.example", "rediss://shop.example:6379/00"),
        ("unix:///run/redis.sock", "unix:///run/../run/redis.sock?db=0"),
        ("amqp://localhost", "amqp://guest:guest@localhost:5672/%2F"),
        ("amqp://one/shop", "amqps://two:5671,one:5671/shop?queue_type=classic"),
        ("amqp://one/shop", "amqp://one/shop?exchange=other"),
        ("sqlite:///shop.queue", "sqlite:///./shop.queue?durability=normal"),
    ],
)
def test_one_broker_is_known_by_all_its_names(one: str, other: str) -> None:
    assert is_same(one, other)
    assert is_same(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("redis://localhost", "redis://localhost/1"),
        ("redis://localhost", "redis://localhost:6380"),
        ("redis://localhost", "redis://elsewhere"),
        ("redis://localhost", "redis://localhost?namespace=shop"),
        ("redis://localhost", "amqp://localhost"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock?db=1"),
        ("amqp://localhost", "amqp://localhost/shop"),
        ("amqp://localhost/shop", "amqp://localhost/Shop"),
        ("sqlite:///shop.queue", "sqlite:////shop.queue"),
    ],
)
def test_two_brokers_are_not_taken_for_one(one: str, other: str) -> None:
    assert not is_same(one, other)


def test_a_broker_is_not_moved_into_itself(conveyor: Program, old: str) -> None:
    assert "the same broker" in conveyor.refused("move", "--from", old, "--to", f"{old}?durability=normal")
    assert "no queue file" in conveyor.refused("move", "--from", old, "--to", f"{old}2", code=1)
