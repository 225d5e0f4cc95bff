"""conveyor dead on Redis and RabbitMQ: list, show, redrive and discard, also where other programs filled the dead-letter queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pika
import pytest

from conveyor import brokers
from conveyor.broker import Broker, DeadLetter, Delivery, Queue, Settlement
from conveyor.cli.dead import as_json, attempts_of
from conveyor.core.message import Message
from conveyor.core.settle import Dead

if TYPE_CHECKING:
    from pika.adapters.blocking_connection import BlockingChannel

    from servers.rabbitmq import RabbitMQ
    from tests.cli.conftest import Program

CHARGE: Final = Queue(name="shop.charge", topics=("order.created",))
MAIL: Final = Queue(name="shop.mail", topics=("mail",))
RENAMED: Final = Queue(name="order-processing", topics=("order_placed",), native={"dead_queue": "order-processing-dlq"})
"""As the order processor has it."""
PATIENCE_SECONDS: Final = 60.0


@pytest.fixture(params=["redis", "rabbitmq, quorum", "rabbitmq, classic"])
def url(request: pytest.FixtureRequest) -> str:
    kind, _, queue_type = request.param.partition(", ")
    server: str = request.getfixturevalue(kind).url()
    return f"{server}?queue_type={queue_type}" if queue_type else server


def message(number: int, topic: str = "order.created") -> Message:
    return Message(f"{topic}-{number}", topic, b'{"n": %d}' % number, headers={"X-Request-ID": "blau"}, created=1.7e9)


@asynccontextmanager
async def declared(url: str, queue: Queue) -> AsyncIterator[Broker]:
    """An open broker that has the queue."""
    broker = brokers.from_url(url)
    await broker.open()
    try:
        await broker.declare([queue])
        yield broker
    finally:
        await broker.close()


def let_die(url: str, queue: Queue, messages: list[Message], verdict: Dead) -> None:
    """Messages that Conveyor itself gives up."""

    async def go() -> None:
        async with declared(url, queue) as broker:
            await broker.publish(messages)
            subscription = await broker.subscribe(queue.name, len(messages))
            held: list[Delivery] = []
            async with asyncio.timeout(PATIENCE_SECONDS):
                while len(held) < len(messages):
                    held += await subscription.fetch(len(messages))
            await broker.settle([Settlement(each, verdict) for each in held])

    asyncio.run(go())


def counts(conveyor: Program, url: str) -> dict[str, tuple[int, int]]:
    """Ready and dead, by queue."""
    found = conveyor.json("queues", "--broker", url)["queues"]
    return {queue["name"]: (queue["ready"], queue["dead"]) for queue in found}


def ids(found: dict[str, Any]) -> list[str]:
    return [letter["id"] for letter in found["dead"]]


def test_dead_letters_are_listed_shown_redriven_and_discarded(conveyor: Program, url: str) -> None:
    here = ("--broker", url)
    let_die(url, CHARGE, [message(n) for n in range(3)], Dead("exhausted", "TimeoutError: slow", "Traceback: charge"))
    let_die(url, MAIL, [message(n, "mail") for n in range(2)], Dead("rejected", "ValueError: no"))

    listed = conveyor.json("dead", "list", *here)
    assert sorted(ids(listed)) == ["mail-0", "mail-1", "order.created-0", "order.created-1", "order.created-2"]
    assert ids(conveyor.json("dead", "list", "--reason", "rejected", *here)) == ["mail-0", "mail-1"]
    assert conveyor.json("dead", "list", "--limit", "1", *here)["more"] is True
    shown = conveyor.ok("dead", "show", "order.created-1", *here)
    assert "Traceback: charge" in shown
    assert '{"n": 1}' in shown
    assert "header X-Request-ID blau" in shown
    assert "1 of the handler" in shown, "the attempt that ended it is not counted"
    [letter] = conveyor.json("dead", "show", "order.created-1", *here)["dead"]
    assert letter["attempts"] == 1
    assert (letter["queue"], letter["topic"], letter["payload"]) == ("shop.charge", "order.created", '{"n": 1}')
    assert (letter["reason"], letter["error"], letter["headers"]) == (
        "exhausted", "TimeoutError: slow", {"X-Request-ID": "blau"}
    )  # fmt: skip
    assert counts(conveyor, url) == {"shop.charge": (0, 3), "shop.mail": (0, 2)}, "looking changed something"

    said = conveyor.refused("dead", "list", "--queue", "shop.charge.dead", *here, code=1)
    assert "say --queue shop.charge" in said

    done = conveyor.json("dead", "redrive", "--error", "timeout", "--id", "order.created-1", *here)
    assert (done["matched"], done["redriven"]) == (1, 1)
    assert counts(conveyor, url) == {"shop.charge": (1, 2), "shop.mail": (0, 2)}
    assert conveyor.json("dead", "discard", "--queue", "shop.mail", "--yes", *here)["discarded"] == 2
    assert counts(conveyor, url) == {"shop.charge": (1, 2), "shop.mail": (0, 0)}
    assert conveyor.json("dead", "redrive", "--all", *here)["redriven"] == 2
    assert counts(conveyor, url) == {"shop.charge": (3, 0), "shop.mail": (0, 0)}


@pytest.mark.parametrize(
    ("reason", "repeated", "tried"),
    [
        ("exhausted", 2, 3),
        ("rejected", 0, 1),
        ("crashed", 1, 1),
        ("expired", 0, 0),
        ("invalid", 0, 0),
        ("maxlen", 0, 0),
    ],
)
def test_the_attempt_that_ended_a_message_is_among_its_attempts(reason: str, repeated: int, tried: int) -> None:
    letter = DeadLetter(
        position="1", queue="shop.mail", message=message(1), reason=reason, error="", traceback="", deliveries=3,
        attempts=repeated, died=1.7e9,
    )  # fmt: skip
    assert attempts_of(letter) == tried
    assert as_json(letter)["attempts"] == tried


# --- dead-letter queues of others, on RabbitMQ -------------------------------------------------------------------------


def plainly(url: str, act: Callable[[BlockingChannel], Any]) -> Any:
    """What a client does that knows nothing of Conveyor."""
    connection = pika.BlockingConnection(pika.URLParameters(url.partition("?")[0]))
    try:
        return act(connection.channel())
    finally:
        connection.close()


def test_a_dead_letter_queue_of_another_name_is_found_by_the_name_of_its_queue(
    conveyor: Program, rabbitmq: RabbitMQ
) -> None:
    url = rabbitmq.url()
    let_die(url, RENAMED, [message(n, "order_placed") for n in range(2)], Dead("rejected", "ValueError: no e-mail"))
    assert counts(conveyor, url) == {"order-processing": (0, 2)}
    here = ("--queue", "order-processing", "--broker", url)
    assert ids(conveyor.json("dead", "list", *here)) == ["order_placed-0", "order_placed-1"]
    there = plainly(url, lambda channel: channel.queue_declare("order-processing-dlq", passive=True))
    assert there.method.message_count == 2
    assert conveyor.json("dead", "redrive", "--id", "order_placed-0", "--broker", url)["redriven"] == 1
    assert conveyor.json("dead", "discard", *here, "--yes")["discarded"] == 1
    assert counts(conveyor, url) == {"order-processing": (1, 0)}


@pytest.mark.parametrize("how", ["rejected", "expired"])
def test_what_the_server_dead_lettered_for_another_program_is_listed_redriven_and_discarded(
    conveyor: Program, rabbitmq: RabbitMQ, how: str
) -> None:
    url = rabbitmq.url()
    queue = Queue(name=RENAMED.name, topics=RENAMED.topics, native={**RENAMED.native, "passive": "true"})

    def fill(channel: BlockingChannel) -> None:
        """Their queue dead-letters by itself; what dies there gets the server's x-death headers, and no others."""
        channel.queue_declare("order-processing-dlq", durable=True)
        arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "order-processing-dlq"}
        channel.queue_declare("order-processing", durable=True, arguments=arguments)
        channel.confirm_delivery()
        for number in range(3):
            expiration = "0" if how == "expired" else None
            properties = pika.BasicProperties(
                message_id=f"theirs-{number}", content_type="application/json", expiration=expiration
            )
            channel.basic_publish("", "order-processing", b'{"order_id": %d}' % number, properties)
            if how == "rejected":
                method, _, _ = channel.basic_get("order-processing")
                assert method is not None
                assert method.delivery_tag is not None
                channel.basic_reject(method.delivery_tag, requeue=False)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while channel.queue_declare("order-processing-dlq", passive=True).method.message_count < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    plainly(url, fill)

    async def declare() -> None:
        async with declared(url, queue):
            pass

    asyncio.run(declare())
    here = ("--queue", "order-processing", "--broker", url)
    assert counts(conveyor, url) == {"order-processing": (0, 3)}
    listed = conveyor.json("dead", "list", *here)
    assert sorted(ids(listed)) == ["theirs-0", "theirs-1", "theirs-2"]
    for letter in listed["dead"]:
        assert (letter["queue"], letter["topic"], letter["reason"]) == ("order-processing", "order_placed", how)
        assert "dead-lettered by the server from order-processing" in letter["error"]
        assert letter["died"][:4] == time.strftime("%Y", time.gmtime())
    [shown] = conveyor.json("dead", "show", "theirs-1", "--broker", url)["dead"]
    assert shown["payload"] == '{"order_id": 1}'
    assert conveyor.json("dead", "redrive", "--id", "theirs-1", "--broker", url)["redriven"] == 1
    assert counts(conveyor, url) == {"order-processing": (1, 2)}

    _, properties, body = plainly(url, lambda channel: channel.basic_get("order-processing", auto_ack=True))
    assert (body, properties.message_id) == (b'{"order_id": 1}', "theirs-1")
    assert conveyor.json("dead", "discard", *here, "--reason", how, "--yes")["discarded"] == 2
    assert counts(conveyor, url) == {"order-processing": (0, 0)}


def test_bare_bytes_that_another_program_put_into_the_dead_letter_queue_are_listed_and_go_back(
    conveyor: Program, rabbitmq: RabbitMQ
) -> None:
    url = rabbitmq.url()
    let_die(url, RENAMED, [message(0, "order_placed")], Dead("rejected", "ValueError: no"))
    plainly(url, lambda channel: channel.basic_publish("", "order-processing-dlq", b"\xffnot json"))
    here = ("--queue", "order-processing", "--broker", url)
    found = conveyor.json("dead", "list", *here)["dead"]
    [bare] = [letter for letter in found if letter["id"] != "order_placed-0"]
    assert (bare["topic"], bare["error"]) == ("order_placed", "put there by another program")
    assert bare["payload"] == "\\xffnot json"
    [shown] = conveyor.json("dead", "show", bare["id"], "--broker", url)["dead"]
    assert shown["payload"] == bare["payload"]
    assert conveyor.json("dead", "redrive", *here, "--id", bare["id"])["redriven"] == 1
    assert counts(conveyor, url) == {"order-processing": (1, 1)}
