"""Deliveries on RabbitMQ when something goes wrong beside them: each is counted, settled or given back, and none is forgotten."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from conveyor.broker import Delivery, Queue, Settlement
from conveyor.brokers.rabbitmq import RabbitBroker, delay, order, publisher, work
from conveyor.brokers.rabbitmq.amqp import AmqpError
from conveyor.brokers.rabbitmq.held import Held
from conveyor.brokers.rabbitmq.order import Keyed, Place
from conveyor.brokers.rabbitmq.subscription import PASSIVE_SECONDS, RabbitSubscription
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Dead, RetryAt
from conveyor.errors import BrokerError, BrokerUnavailable
from tests.brokers.test_rabbitmq import PATIENCE_SECONDS, one, opened, plainly

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ


@pytest.fixture(params=["quorum", "classic"])
def url(rabbitmq: RabbitMQ, request: pytest.FixtureRequest) -> str:
    return f"{rabbitmq.url()}?queue_type={request.param}"


# --- crashes ----------------------------------------------------------------------------------------------------------


def abort(broker: RabbitBroker) -> None:
    """As the server sees the death of its process."""
    for connection in (broker._link.connection, broker.publisher.connection):
        assert connection is not None
        connection._abort()


async def test_the_crashes_of_others_are_counted_by_a_survivor_whose_fetches_were_small(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "DOUBT_SECONDS", PATIENCE_SECONDS)
    async with opened(url) as survivor:
        await survivor.declare([Queue(name="q", topics=("t",))])
        await survivor.publish([Message("poison", "t", b"{}")])
        for crash in range(1, 5):
            async with opened(url) as victim:
                taken = await one(victim, "q")
                assert (taken.message.id, taken.crashes) == ("poison", crash - 1)
                subscription = await survivor.subscribe("q", 10)
                await survivor.publish([Message("fine", "t", b"{}")])
                [fine] = await subscription.fetch(10)  # more was allowed to come than came
                assert await survivor.settle([Settlement(fine, DONE)]) == []
                await subscription.close()
                abort(victim)
        survived = await one(survivor, "q")
        assert (survived.message.id, survived.crashes) == ("poison", 4)


@pytest.mark.parametrize("ordered", [False, True], ids=["plain", "ordered"])
async def test_receivers_that_end_at_once_after_settling_let_nothing_be_counted_that_nobody_got(
    rabbitmq: RabbitMQ, ordered: bool
) -> None:
    async with opened(f"{rabbitmq.url()}?queue_type=quorum") as broker:
        await broker.declare([Queue(name="q", topics=("t",), ordered=ordered)])
        await broker.publish([Message(f"m{number}", "t", b"{}") for number in range(300)])
        counted: Counter[int] = Counter()
        while counted.total() < 300:
            subscription = await broker.subscribe("q", 40)
            for _ in range(3):
                if counted.total() < 300:
                    taken = await subscription.fetch(10)
                    counted.update(delivery.deliveries for delivery in taken)
                    assert await broker.settle([Settlement(delivery, DONE) for delivery in taken]) == []
            await subscription.close()  # each settlement has just let the server send another message
        assert counted == {1: 300}


async def test_what_is_published_while_a_fetch_ends_is_not_counted_before_somebody_gets_it(rabbitmq: RabbitMQ) -> None:
    async with opened(f"{rabbitmq.url()}?queue_type=quorum") as broker:
        await broker.declare([Queue(name="q", topics=("t",), ordered=True)])
        subscription = await broker.subscribe("q", 40)

        async def publish() -> None:
            for number in range(300):
                await broker.publish([Message(f"m{number}", "t", b"{}")])  # no key: it comes from the queue itself

        publishing = asyncio.create_task(publish())
        counted: Counter[int] = Counter()
        while counted.total() < 300:
            taken = await subscription.fetch(20)
            counted.update(delivery.deliveries for delivery in taken)
            assert await broker.settle([Settlement(delivery, DONE) for delivery in taken]) == []
        await publishing
        assert counted == {1: 300}


# --- settlements that break off -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True], ids=["plain", "ordered"])
async def test_a_settlement_whose_caller_goes_away_comes_to_its_end(
    url: str, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",), ordered=ordered)])
        await broker.publish([Message(name, "t", b"{}", key="k") for name in "ab"])
        subscription = await broker.subscribe("q", 1)
        [first] = await subscription.fetch(1)
        flush, asked, answered = work.Work.flush, asyncio.Event(), asyncio.Event()

        async def slow(self: work.Work) -> None:
            asked.set()
            await answered.wait()
            await flush(self)

        with monkeypatch.context() as patched:
            patched.setattr(work.Work, "flush", slow)
            settling = asyncio.create_task(broker.settle([Settlement(first, DONE)]))
            await asked.wait()
            settling.cancel()
            await asyncio.wait([settling])
            answered.set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            [second] = await subscription.fetch(1)  # its slot is free again, and so is its key
        assert (first.message.id, second.message.id) == ("a", "b")
        assert await broker.settle([Settlement(first, DONE)]) == [first]
        assert await broker.settle([Settlement(second, DONE)]) == []


async def test_a_settlement_that_cannot_be_noted_can_be_tried_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",), ordered=True)])
        await broker.publish(
            [Message("a", "t", b"{}", key="k"), Message("b", "t", b"{}", key="k"), Message("c", "t", b"{}", key="l")]
        )
        subscription = await broker.subscribe("q", 10)
        held: list[Delivery] = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(held) < 2:
                held += await subscription.fetch(10)
        a, c = sorted(held, key=lambda each: each.message.id)
        settlements = [Settlement(a, RetryAt(0.0, "once more")), Settlement(c, DONE)]
        with monkeypatch.context() as patched:
            patched.setattr(Keyed, "note", unavailable)
            with pytest.raises(BrokerUnavailable):
                await broker.settle(settlements)
        assert await broker.extend([a, c]) == []
        assert await broker.settle(settlements) == []
        async with asyncio.timeout(PATIENCE_SECONDS):
            [again] = await subscription.fetch(10)
        assert (again.message.id, again.deliveries, again.attempts, again.error) == ("a", 2, 1, "once more")


async def unavailable(*_: object) -> None:
    raise BrokerUnavailable("away")


async def test_when_leases_end_all_go_back_though_nothing_can_be_noted_or_copied(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as broker:
        await broker.declare([
            Queue(name="keyed", topics=("t",), ordered=True, lease_seconds=1.0),
            Queue(name="plain", topics=("t",), lease_seconds=1.0),
        ])  # fmt: skip
        keys = {f"k{number}" for number in range(8)}
        await broker.publish([Message(key, "t", b"{}", key=key) for key in keys])
        subscriptions = [await broker.subscribe(name, 100) for name in ("keyed", "plain")]

        async def all_of_them() -> list[Delivery]:
            found: list[Delivery] = []
            for subscription in subscriptions:
                ids: set[str] = set()
                while ids != keys:
                    deliveries = await subscription.fetch(100)
                    ids |= {each.message.id for each in deliveries}
                    found += deliveries
            return found

        async with asyncio.timeout(PATIENCE_SECONDS):
            first = await all_of_them()
            with monkeypatch.context() as patched:
                patched.setattr(Keyed, "note", unavailable)
                patched.setattr(publisher.Publisher, "send_all", unavailable)
                while broker.leases.all():
                    await asyncio.sleep(0.01)
                for _ in range(3):  # the turns in which they are given back
                    await asyncio.sleep(0)
            assert await broker.settle([Settlement(each, DONE) for each in first]) == first
            again = await all_of_them()
        assert {(each.queue, each.message.id) for each in again} == {
            (name, key) for name in ("keyed", "plain") for key in keys
        }


# --- partitions that change hands -------------------------------------------------------------------------------------


async def anew(keyed: Keyed) -> None:
    """The server closes the channel of the partitions, and somebody who waits for messages takes them again."""
    assert keyed.work is not None
    await keyed.work.channel.close()
    news = asyncio.Event()
    await keyed.begin(news)
    keyed.end(news)


async def test_what_was_held_of_partitions_that_were_taken_anew_is_lost_and_erases_no_counts(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",), ordered=True)])
        keys = {f"k{number}" for number in range(12)}
        await broker.publish([Message(key, "t", b"{}", key=key) for key in keys])
        subscription = await broker.subscribe("q", 100)
        held: list[Delivery] = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(held) < len(keys):
                held += await subscription.fetch(100)
        one, *others, dead = held
        assert await broker.settle([Settlement(each, RetryAt(0.0, "again")) for each in others]) == []
        keyed, send_named = broker.keyed("q"), publisher.Publisher.send_named

        async def meanwhile(self: publisher.Publisher, *what: Any) -> list[int]:
            await anew(keyed)
            return await send_named(self, *what)

        with monkeypatch.context() as patched:
            patched.setattr(publisher.Publisher, "send_named", meanwhile)
            ends = [Settlement(dead, Dead("rejected", "no")), Settlement(one, RetryAt(0.0, "late"))]
            assert await broker.settle(ends) == [one, dead]
        await broker._settling._give_back([each.receipt for each in (one, dead) if isinstance(each.receipt, Held)])
        await anew(keyed)
        counts: dict[str, int] = {}
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(counts) < len(keys):
                counts |= {each.message.id: each.attempts for each in await subscription.fetch(100)}
        assert {counts[each.message.id] for each in others} == {1}


async def test_what_is_handed_out_while_partitions_are_taken_anew_is_of_the_new_channel(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",), ordered=True)])
        await broker.publish([Message(str(number), "t", b"{}", key=str(number)) for number in range(8)])
        subscription = await broker.subscribe("q", 100)
        keyed, note, times = broker.keyed("q"), Keyed.note, itertools.count()

        async def meanwhile(self: Keyed, places: Iterable[Place]) -> None:
            await note(self, places)
            if next(times) == 0:
                await anew(keyed)

        with monkeypatch.context() as patched:
            patched.setattr(Keyed, "note", meanwhile)
            async with asyncio.timeout(PATIENCE_SECONDS):
                deliveries = await subscription.fetch(100)
        assert deliveries
        there = {id(place) for chain in keyed._chains.values() for place in chain}
        assert {id(each.receipt.place) for each in deliveries if isinstance(each.receipt, Held)} <= there


async def test_what_was_drawn_and_leased_is_received_whatever_happens_to_the_keys(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",), ordered=True)])
        await broker.publish([Message("without a key", "t", b"{}")])
        subscription = await broker.subscribe("q", 10)
        settle_down = Keyed.settle_down

        async def broken(self: Keyed) -> None:
            if broker.leases.all():
                raise BrokerUnavailable("away")
            await settle_down(self)

        monkeypatch.setattr(Keyed, "settle_down", broken)
        async with asyncio.timeout(PATIENCE_SECONDS):
            [delivery] = await subscription.fetch(10)
        assert delivery.message.id == "without a key"


async def test_a_key_whose_waiting_messages_leave_no_room_for_its_neighbours_is_told_of(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(order, "AHEAD", 5)
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",), ordered=True)])
        await broker.publish([Message(str(number), "t", b"{}", key="k") for number in range(6)])
        subscription = await broker.subscribe("q", 10)
        async with asyncio.timeout(PATIENCE_SECONDS):
            [first] = await subscription.fetch(10)
            while broker.keyed("q").waiting < 4:
                await asyncio.sleep(0.01)
        assert "get nothing" not in caplog.text
        assert await broker.settle([Settlement(first, RetryAt(broker.clock() + 2.0, "away"))]) == []
        async with asyncio.timeout(PATIENCE_SECONDS):
            [again] = await subscription.fetch(10)
        assert again.message.id == "0"
        assert [each for each in caplog.messages if "5 messages of q" in each and "get nothing" in each]
        assert await broker.settle([Settlement(again, DONE)]) == []


# --- queues that others made, and delete ------------------------------------------------------------------------------


async def test_what_waits_in_a_queue_of_others_for_its_time_does_not_spin(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await plainly(url, lambda channel: channel.queue_declare("theirs", durable=True))
    async with opened(url) as broker:
        await broker.declare([Queue(name="theirs", topics=("t",), native={"passive": "true"})])
        await plainly(url, lambda channel: channel.basic_publish("", "theirs", b"{}"))
        subscription = await broker.subscribe("theirs", 1)
        copies: Counter[str] = Counter()
        send_all = publisher.Publisher.send_all

        async def counting(self: publisher.Publisher, batch: Sequence[publisher.Outgoing]) -> None:
            copies.update(each.routing_key for each in batch)
            await send_all(self, batch)

        monkeypatch.setattr(publisher.Publisher, "send_all", counting)
        async with asyncio.timeout(PATIENCE_SECONDS):
            [first] = await subscription.fetch(1)
            due = broker.clock() + 1.5
            assert await broker.settle([Settlement(first, RetryAt(due, "later"))]) == []
            [again] = await subscription.fetch(1)
        assert broker.clock() >= due
        assert (again.deliveries, again.attempts, again.error) == (2, 1, "later")
        assert copies["theirs"] <= 1.5 / PASSIVE_SECONDS + 1
        assert await broker.settle([Settlement(again, RetryAt(broker.clock() + 3600.0, "much later"))]) == []
        waiting = asyncio.create_task(subscription.fetch(1))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not subscription.aside:
                await asyncio.sleep(0.01)
        [info] = await broker.queues()
        assert info.ready + info.delayed == 1
        assert await broker.purge("theirs") == 1
        waiting.cancel()
        await asyncio.wait([waiting])
        await subscription.close()
        assert (
            await plainly(url, lambda channel: channel.queue_declare("theirs", passive=True).method.message_count) == 0
        )


async def test_a_deleted_queue_takes_no_other_receivers_deliveries_with_it(url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="gone", topics=("t",)), Queue(name="fine", topics=("t",))])
        await broker.publish([Message("m", "t", b"{}")])
        gone, fine = [await broker.subscribe(name, 10) for name in ("gone", "fine")]
        [lost], [held] = [await each.fetch(1) for each in (gone, fine)]
        connection = await broker.connection()
        await plainly(url, lambda channel: channel.queue_delete("gone"))
        async with asyncio.timeout(PATIENCE_SECONDS):
            for _ in range(3):
                with pytest.raises(BrokerError, match="NOT_FOUND"):
                    await gone.fetch(1)
        assert await broker.connection() is connection
        assert await broker.settle([Settlement(lost, DONE), Settlement(held, DONE)]) == [lost]
        await broker.publish([Message("next", "t", b"{}")])
        async with asyncio.timeout(PATIENCE_SECONDS):
            [delivery] = await fine.fetch(1)
        assert (delivery.message.id, delivery.crashes) == ("next", 0)


async def test_a_closed_subscription_leaves_no_channel_behind_once_its_deliveries_are_settled(url: str) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",))])
        await broker.publish([Message(name, "t", b"{}") for name in "ab"])
        subscription = await broker.subscribe("q", 10)
        held: list[Delivery] = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(held) < 2:
                held += await subscription.fetch(10)
        receipts = [each.receipt for each in held if isinstance(each.receipt, Held)]
        await subscription.close()
        for delivery in held:
            assert await broker.extend([delivery]) == []
            assert await broker.settle([Settlement(delivery, DONE)]) == []
        assert all(receipt.work.channel.closed.done() for receipt in receipts)
        assert [info.ready + info.in_flight for info in await broker.queues()] == [0]


async def test_a_subscription_that_failed_leaves_no_receiver(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",))])
        with monkeypatch.context() as patched:
            patched.setattr(RabbitSubscription, "attach", unavailable)
            with pytest.raises(BrokerUnavailable):
                await broker.subscribe("q", 10)
        assert not broker.subscriptions


async def test_a_mover_that_begins_anew_leaves_no_consumer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delay, "AGAIN_SECONDS", 0.01)
    async with opened(url) as broker:
        await broker.declare([Queue(name="q", topics=("t",))])
        move, times = delay.Mover._move, itertools.count()

        async def broken(self: delay.Mover, work: work.Work) -> float | None:
            if next(times) < 3:
                raise AmqpError("no")
            return await move(self, work)

        monkeypatch.setattr(delay.Mover, "_move", broken)
        subscription = await broker.subscribe("q", 10)
        await broker.publish([Message("m", "t", b"{}", due=broker.clock() + 0.2)])
        async with asyncio.timeout(PATIENCE_SECONDS):
            [delivery] = await subscription.fetch(1)
            assert (delivery.message.id, delivery.deliveries) == ("m", 1)
            assert await broker.settle([Settlement(delivery, DONE)]) == []
            while [info.consumers for info in await broker.queues()] != [1]:
                await asyncio.sleep(0.01)


# --- heartbeats -------------------------------------------------------------------------------------------------------


async def test_heartbeats_are_at_most_half_of_the_shortest_lease_or_as_the_url_says(rabbitmq: RabbitMQ) -> None:
    url = rabbitmq.url()
    async with opened(url) as broker, opened(url) as receiver, opened(f"{url}?heartbeat=1") as eager:
        await broker.declare([Queue(name="slow", lease_seconds=60.0)])
        first = await broker.connection()
        await broker.declare([Queue(name="quick", topics=("t",), lease_seconds=6.0)])
        assert (await broker.connection()).heartbeat_seconds == 3
        assert first.closed.done()
        await receiver.subscribe("quick", 10)
        assert (await receiver.connection()).heartbeat_seconds == 3
        assert (await eager.connection()).heartbeat_seconds == 1
        await broker.publish([Message("m", "t", b"{}")])
        assert (await one(receiver, "quick")).message.id == "m"
