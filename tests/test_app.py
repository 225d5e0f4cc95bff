"""The application: what can be declared, published, watched and run, and what is refused with words that help."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import msgspec
import pytest

from conveyor import Context, Conveyor, HandlerError, Message, RetryPolicy, Transaction, event
from conveyor.brokers.memory import MemoryBroker
from conveyor.errors import (
    ConfigurationError,
    ConveyorError,
    MissingFeature,
    NoSubscriber,
    PayloadError,
    PayloadTooLarge,
)
from conveyor.testing.harness import Harness


@event("order.created", key="order_id")
@dataclass(frozen=True)
class OrderCreated:
    order_id: str
    total: int = 0


@dataclass(frozen=True)
class Paid:
    order_id: str


class Note(TypedDict):
    text: str


class Client:
    """Something that handlers ask for."""


# --- what cannot work is refused where it is written ------------------------------------------------------------------


def no_parameter() -> None: ...
def no_annotation(order) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001 - the point
def plain_type(order: int) -> None: ...
def dict_without_topic(order: dict[str, Any]) -> None: ...
def returns_no_event(order: OrderCreated) -> int:
    return 1


def star(order: OrderCreated, *rest: Client) -> None: ...
def yields_nothing_known(order: OrderCreated) -> None:  # type: ignore[misc]
    yield Paid("1")


def unknown_name(order: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def unserialisable(order: WithSocket) -> None: ...
async def async_cpu(order: OrderCreated) -> None: ...


@dataclass
class WithSocket:
    line: socket.socket


@pytest.mark.parametrize(
    ("handler", "options", "said"),
    [
        (no_parameter, {}, "the first one says what it receives"),
        (no_annotation, {}, "parameter 'order' has no annotation"),
        (plain_type, {}, "order: int, is no payload"),
        (dict_without_topic, {}, 'topic="…"'),
        (returns_no_event, {}, "returns int, which is no event"),
        (star, {}, r"\*rest cannot be filled in"),
        (yields_nothing_known, {}, "needs a return annotation such as Iterator"),
        (unknown_name, {}, "'Missing' names nothing that can be found"),
        (unserialisable, {}, "line"),
        (async_cpu, {"cpu": True}, "plain def"),
        (no_annotation, {"batch": 10}, "has no annotation"),
        (plain_type, {"batch": 10}, "must be a list"),
        (lambda order: None, {}, "has no annotation"),
    ],
)
def test_a_handler_that_cannot_work_is_refused_when_it_is_declared(
    handler: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(HandlerError, match=said):
        Conveyor("t").worker(**options)(handler)


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"prefetch": -1}, {"max_length": -1}])
def test_an_option_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(HandlerError, match="at least 1"):
        Conveyor("t").worker(**options)(charge)


@pytest.mark.parametrize(
    "options", [{"lease": 0}, {"lease": float("nan")}, {"timeout": 0}, {"timeout": timedelta(seconds=-1)}]
)
def test_a_time_that_is_none_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(HandlerError, match="a time above 0 seconds"):
        Conveyor("t").worker(**options)(charge)


def test_what_is_no_retry_policy_is_refused() -> None:
    with pytest.raises(HandlerError, match=r"such as RetryPolicy\(attempts=3\), not 3"):
        Conveyor("t").worker(retry=3)(charge)  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match="or None for no retry, not 3"):
        RetryPolicy(rules={ValueError: 3})  # type: ignore[dict-item]


def test_middleware_of_the_wrong_shape_is_refused() -> None:
    def not_async(call: object, next: object) -> None: ...

    async def one_parameter(call: object) -> None: ...

    for wrong in (not_async, one_parameter):
        with pytest.raises(HandlerError, match="async def middleware"):
            Conveyor("t").use(wrong)  # type: ignore[arg-type]


async def test_a_handler_that_promised_an_event_and_returns_none_has_failed() -> None:
    app = Conveyor("t")

    @app.worker(retry=RetryPolicy(attempts=1))
    async def pay(order: OrderCreated) -> Paid:
        return None  # type: ignore[return-value]

    async with Harness(app) as run:
        await run.publish(OrderCreated("1"))
        (letter,) = await run.dead("pay")
        with pytest.raises(ConfigurationError, match="it has: pay"):
            await run.dead("payy")
    assert "promises an event" in letter.error


def test_a_transaction_in_a_handler_that_cannot_await_it_is_refused() -> None:
    def store(order: OrderCreated, tx: Transaction) -> None: ...

    with pytest.raises(HandlerError, match="make it async def"):
        Conveyor("t").worker(store)


def test_several_typed_dicts_in_a_return_annotation_are_refused() -> None:
    class Other(TypedDict):
        text: str

    def answer(order: OrderCreated) -> Note | Other:
        return {"text": ""}

    with pytest.raises(HandlerError, match="cannot be told apart"):
        Conveyor("t").worker(answer)


def test_each_event_loop_has_a_connection_of_its_own(tmp_path: Path) -> None:
    app = Conveyor("t", broker=f"sqlite:///{tmp_path}/t.queue")
    app.worker(charge)

    async def publish_and_close(number: str) -> None:
        await app.publish(OrderCreated(number))
        await app.close()

    for number in ("1", "2"):
        asyncio.run(publish_and_close(number))
    app.publish_sync(OrderCreated("3"))
    asyncio.run(publish_and_close("4"))

    async def ready() -> int:
        async with app:
            return (await app.broker.queues())[0].ready

    assert asyncio.run(ready()) == 4


async def test_a_process_has_one_identity_and_its_other_event_loops_have_others(tmp_path: Path) -> None:
    app = Conveyor("t", broker=f"sqlite:///{tmp_path}/t.queue")
    app.owner = "known-to-the-supervisor"

    async def owner() -> str:
        async with app:
            return app.broker.owner

    async with app:
        beside = [await asyncio.to_thread(asyncio.run, owner()) for _ in range(2)]
        assert len({app.broker.owner, *beside}) == 3
        assert app.broker.owner == "known-to-the-supervisor"


def test_many_threads_may_publish_at_once_for_the_first_time(tmp_path: Path) -> None:
    app = Conveyor("t", broker=f"sqlite:///{tmp_path}/t.queue")
    app.worker(charge)
    with ThreadPoolExecutor(8) as threads:
        messages = list(threads.map(lambda n: app.publish_sync(OrderCreated(str(n))), range(16)))
    assert len({message.id for message in messages}) == 16


def test_two_workers_cannot_have_one_name() -> None:
    app = Conveyor("t")
    app.worker(name="ship")(charge)
    with pytest.raises(HandlerError, match="already"):
        app.worker(name="ship")(charge)


def charge(order: OrderCreated) -> Paid:
    return Paid(order.order_id)


def test_a_declared_worker_is_still_the_function_that_it_was() -> None:
    app = Conveyor("t")
    assert app.worker(charge) is charge
    assert charge(OrderCreated("a")) == Paid("a")
    worker = app.workers["charge"]
    assert worker.queue.name == "t.charge"
    assert worker.queue.topics == ("order.created",)
    assert [emitted.topic for emitted in worker.plan.emits] == ["paid"]


async def test_a_handler_that_asks_for_what_nobody_provides_stops_the_start() -> None:
    app = Conveyor("t", broker="memory://")

    @app.worker
    async def ship(order: OrderCreated, client: Client) -> None: ...

    with pytest.raises(
        ConfigurationError, match="nobody provides Client; write a function that does and decorate it with @app.provide"
    ):
        async with app.running():
            pass


async def test_an_unknown_worker_name_stops_the_start() -> None:
    app = Conveyor("t", broker="memory://")
    app.worker(charge)
    with pytest.raises(ConfigurationError, match="no worker named 'shipp'; it has: charge"):
        async with app.running(["shipp"]):
            pass


async def test_a_feature_that_the_broker_lacks_stops_the_start() -> None:
    from conveyor.broker import Feature

    class Plain(MemoryBroker):
        missing: Mapping[Feature, str] = MappingProxyType({Feature.ORDER: "it has one queue for all keys"})

        async def declare(self, queues: Any) -> None:
            for queue in queues:
                if queue.ordered:
                    raise MissingFeature(f"{queue.name} wants order by key: {self.missing[Feature.ORDER]}")

    broker = Plain()
    await broker.open()
    app = Conveyor("t", broker=broker)
    app.worker(ordered=True)(charge)
    with pytest.raises(MissingFeature, match="one queue for all keys"):
        async with app.running():
            pass
    await broker.close()


# --- publishing -------------------------------------------------------------------------------------------------------


async def test_a_message_carries_what_its_publisher_said() -> None:
    app = Conveyor("t")
    app.worker(charge)
    async with Harness(app) as run:
        message = await app.publish(
            OrderCreated("A-1"), priority=3, headers={"a": "b"}, delay=timedelta(minutes=1), expires=120.0, id="mine"
        )
        assert (message.id, message.topic, message.key, message.priority) == ("mine", "order.created", "A-1", 3)
        assert message.due == run.clock() + 60.0
        assert message.expires == run.clock() + 120.0
        assert message.headers == {"a": "b"}
        assert message.correlation_id == "mine"
        at = await app.publish(OrderCreated("A-2"), at=datetime(2100, 1, 1, tzinfo=UTC), key="other")
        assert at.due == datetime(2100, 1, 1, tzinfo=UTC).timestamp()
        assert at.key == "other"


@pytest.mark.parametrize(
    ("payload", "options", "error", "said"),
    [
        (OrderCreated("a", total="x"), {}, PayloadError, "total"),  # type: ignore[arg-type]
        (3, {}, PayloadError, "int is no event"),
        ({"a": 1}, {}, PayloadError, "names no topic"),
        ({"a": 1}, {"topic": "no spaces"}, ConfigurationError, "is no topic"),
        (OrderCreated("a"), {"priority": 10}, PayloadError, "0 .* to 9"),
        (OrderCreated("a"), {"at": datetime(2100, 1, 1)}, PayloadError, "no time zone"),  # noqa: DTZ001 - the point
        (OrderCreated("a"), {"at": 1.0, "delay": 1.0}, PayloadError, "either"),
        (OrderCreated("x" * 2_000_000), {}, PayloadTooLarge, "the limit is 1,048,576"),
        (OrderCreated("a"), {"headers": {"a": "x" * 20_000}}, PayloadTooLarge, "headers"),
        (OrderCreated("a"), {"headers": {"a": 1}}, PayloadError, "text to text"),
    ],
)
async def test_what_cannot_be_published_is_refused_in_words(
    payload: object, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    async with Conveyor("t", broker="memory://") as app:
        with pytest.raises(error, match=said):
            await app.publish(payload, **options)


async def test_an_event_without_a_queue_is_said_once_and_an_error_only_on_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Conveyor("t", broker="memory://") as app:
        with caplog.at_level(logging.INFO):
            await app.publish(Paid("1"))
            await app.publish(Paid("2"))
        assert caplog.text.count("no queue receives 'paid'") == 1
        assert app.metrics.unrouted == 2
        with pytest.raises(NoSubscriber, match="'paid'"):
            await app.publish(Paid("3"), require_subscriber=True)


async def test_what_was_published_before_the_first_worker_ran_is_not_lost(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/t.queue"
    handled = asyncio.Event()

    def declared() -> Conveyor:
        app = Conveyor("t", broker=url)

        @app.worker
        async def ship(order: OrderCreated) -> None:
            handled.set()

        return app

    async with declared() as publisher:
        await publisher.publish(OrderCreated("1"))
    async with declared().running():
        async with asyncio.timeout(60):
            await handled.wait()


def test_publish_sync_works_without_an_event_loop_and_from_threads(tmp_path: Path) -> None:
    app = Conveyor("t", broker=f"sqlite:///{tmp_path}/t.queue")
    app.worker(charge)
    first = app.publish_sync(OrderCreated("1"))
    ids = [first.id]
    thread = threading.Thread(target=lambda: ids.append(app.publish_sync(OrderCreated("2")).id))
    thread.start()
    thread.join()

    async def ready() -> int:
        async with Conveyor("other", broker=f"sqlite:///{tmp_path}/t.queue") as other:
            return next(info.ready for info in await other.broker.queues())

    assert asyncio.run(ready()) == 2
    assert len(set(ids)) == 2


async def test_publish_sync_refuses_to_block_a_running_loop() -> None:
    async with Conveyor("t", broker="memory://") as app:
        with pytest.raises(ConveyorError, match="await app.publish"):
            app.publish_sync(OrderCreated("1"))


async def test_publish_sync_in_a_threaded_handler_uses_the_running_connection() -> None:
    app = Conveyor("t")

    @app.worker
    def ship(order: OrderCreated) -> None:
        app.publish_sync(Paid(order.order_id))

    async with Harness(app) as run:
        await run.publish(OrderCreated("9"))
        assert run.published(Paid) == [Paid("9")]


# --- tasks ------------------------------------------------------------------------------------------------------------


async def test_a_task_is_called_here_or_sent_to_a_worker_with_checked_arguments() -> None:
    app = Conveyor("t")
    seen: list[tuple[Path, int, int]] = []

    @app.task
    def resize(path: Path, context: Context | None = None, width: int = 800) -> str:
        seen.append((path, width, 0))
        return f"{path}:{width}"

    assert resize(Path("a.jpg"), width=3) == "a.jpg:3"
    async with Harness(app) as run:
        ticket = await resize.send(Path("b.jpg"), width=5)
        await resize.options(delay=60.0, key="k").send(Path("c.jpg"))
        assert ticket.message is not None
        assert ticket.message.topic == "t.resize"
        await run.run_to_end()
        assert run.sent(resize) == 2
        with pytest.raises(PayloadError):
            await resize.send(Path("d.jpg"), width="wide")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            await resize.send()  # type: ignore[call-arg]
    assert [(path, width) for path, width, _ in seen] == [(Path("a.jpg"), 3), (Path("b.jpg"), 5), (Path("c.jpg"), 800)]


# --- what handlers are given ------------------------------------------------------------------------------------------


async def test_providers_open_once_in_order_of_need_and_close_at_the_end() -> None:
    app = Conveyor("t")
    story: list[str] = []

    class Pool: ...

    @app.provide
    async def client(pool: Pool) -> AsyncIterator[Client]:
        story.append("client opens")
        yield Client()
        story.append("client closes")

    @app.provide
    def pool() -> Iterator[Pool]:
        story.append("pool opens")
        yield Pool()
        story.append("pool closes")

    given: list[Client] = []

    @app.worker
    async def ship(order: OrderCreated, http: Client, message: Message, context: Context) -> None:
        given.append(http)
        assert context.message is message

    async with Harness(app) as run:
        await run.publish(OrderCreated("1"))
        await run.publish(OrderCreated("2"))
    assert given[0] is given[1]
    assert story == ["pool opens", "client opens", "client closes", "pool closes"]


async def test_a_test_can_hand_in_something_else() -> None:
    app = Conveyor("t")
    made = Client()

    @app.provide
    async def client() -> Client:
        raise AssertionError("not in a test")

    given: list[Client] = []

    @app.worker
    async def ship(order: OrderCreated, http: Client) -> None:
        given.append(http)

    async with Harness(app, provide={Client: made}) as run:
        await run.publish(OrderCreated("1"))
    assert given == [made]


async def test_typed_dicts_structs_dicts_and_bytes_are_payloads_too() -> None:
    app = Conveyor("t")
    seen: list[object] = []

    class Struct(msgspec.Struct):
        n: int

    @app.worker
    async def on_struct(struct: Struct) -> Note:
        return {"text": str(struct.n)}

    @app.worker
    async def on_note(note: Note) -> None:
        seen.append(note)

    @app.worker(topic="raw")
    async def on_bytes(body: bytes) -> None:
        seen.append(body)

    @app.worker(topic="loose")
    async def on_dict(body: dict[str, Any]) -> None:
        seen.append(body)

    async with Harness(app) as run:
        await run.publish(Struct(4))
        await run.publish(b"\x00\xff", topic="raw")
        await run.publish({"a": [1]}, topic="loose")
    assert seen == [{"text": "4"}, b"\x00\xff", {"a": [1]}]


async def test_one_worker_can_receive_several_types() -> None:
    app = Conveyor("t")
    seen: list[object] = []

    @app.worker
    async def audit(happened: OrderCreated | Paid) -> None:
        seen.append(happened)

    async with Harness(app) as run:
        await run.publish(OrderCreated("1"))
        await run.publish(Paid("2"))
    assert seen == [OrderCreated("1"), Paid("2")]


# --- watching ---------------------------------------------------------------------------------------------------------


async def test_watchers_see_what_is_published_from_the_moment_they_are_entered() -> None:
    app = Conveyor("t", broker="memory://")
    async with app, app.watch(Paid) as everything, app.watch(Paid, where=lambda paid: paid.order_id == "2") as second:
        for number in range(4):
            await app.publish(Paid(str(number)))
        seen = []
        async with asyncio.timeout(60):
            async for paid in everything:
                seen.append(paid.order_id)
                if len(seen) == 4:
                    break
            async for paid in second:
                assert paid == Paid("2")
                break
    assert seen == ["0", "1", "2", "3"]


async def test_a_slow_watcher_misses_the_oldest_and_holds_up_nobody() -> None:
    app = Conveyor("t", broker="memory://")
    async with app, app.watch(Paid, buffer=2) as slow, app.watch(Paid) as quick:
        for number in range(10):
            await app.publish(Paid(str(number)))
        async with asyncio.timeout(60):
            async for paid in quick:
                if paid == Paid("9"):
                    break
            async for paid in slow:
                assert paid == Paid("8")
                break
        assert slow.missed == 8


# --- harness ----------------------------------------------------------------------------------------------------------


async def test_the_harness_turns_the_clock_instead_of_waiting() -> None:
    app = Conveyor("t")
    done: list[str] = []

    @app.worker(retry=RetryPolicy(attempts=3, initial=3600.0, maximum=7200.0))
    async def ship(order: OrderCreated, context: Context) -> None:
        if context.attempt < 3:
            raise ValueError("later")
        done.append(order.order_id)

    async with Harness(app) as run:
        await app.publish(OrderCreated("1"), delay=60.0)
        await run.turn(59.0)
        assert done == []
        assert run.retried() == []
        await run.turn(1.0)
        assert len(run.retried()) == 1
        await run.run_to_end()
        assert done == ["1"]


async def test_the_harness_says_what_is_still_at_work() -> None:
    app = Conveyor("t")

    @app.worker
    async def ship(order: OrderCreated) -> None:
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="t.ship .*in flight 1"):
        async with Harness(app, run_seconds=0.05) as run:
            await run.publish(OrderCreated("1"))


def test_what_is_said_of_a_queue_that_others_share_reaches_the_broker() -> None:
    app = Conveyor("shop", broker="memory://")

    @app.worker(queue="orders", exchange="shop", exchange_type="direct", dead_queue="orders-dlq", passive=True)
    async def take(order: OrderCreated) -> None: ...

    assert app.workers["take"].queue.native == {
        "exchange": "shop", "exchange_type": "direct", "dead_queue": "orders-dlq", "passive": "true"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exchang": "shop"}, "no option 'exchang'; did you mean exchange?"),
        ({"retries": 3}, "no option 'retries'; did you mean retry?"),
        ({"passive": "yes"}, "passive cannot be 'yes'"),
        ({"exchange": ""}, "exchange cannot be ''"),
    ],
)
def test_an_option_that_there_is_not_is_refused_with_a_guess(options: dict[str, Any], words: str) -> None:
    app = Conveyor("shop", broker="memory://")

    async def take(order: OrderCreated) -> None: ...

    with pytest.raises(HandlerError) as refused:
        app.worker(**options)(take)
    assert words in str(refused.value)
