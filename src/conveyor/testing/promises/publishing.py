"""Promises on publishing: nothing that was accepted is lost, changed, reordered or given to the wrong queue."""

from __future__ import annotations

import asyncio

from conveyor.broker import DEFAULT_BODY_LIMIT
from conveyor.core.message import Message
from conveyor.core.settle import DONE
from conveyor.testing.promises.suite import World, promise, same_message, texts

LARGE_BATCH = 2_000


@promise("publishing")
async def a_published_message_is_received(world: World) -> None:
    """What is published under a topic is received from the queue of that topic."""
    queue = await world.queue()
    [message] = await world.put(queue, "hello")
    [delivery] = await world.take(await world.subscribe(queue), 1)
    assert delivery.message.id == message.id
    assert delivery.message.body == b"hello"
    assert delivery.queue == queue.name


@promise("publishing")
async def a_publish_that_returned_outlives_its_publisher(world: World) -> None:
    """When publish() returns, the broker owns the messages: the publisher may go."""
    queue, publisher = await world.queue(), await world.another()
    messages = [world.message(queue, str(number)) for number in range(10)]
    await publisher.publish(messages)
    await publisher.close()
    received = await world.take(await world.subscribe(queue, by=await world.another()), 10)
    assert [each.message.id for each in received] == [each.id for each in messages]


@promise("publishing")
async def every_queue_of_a_topic_gets_a_copy(world: World) -> None:
    """Fan-out: each queue of a topic has its own copy, and settling one leaves the others."""
    topic = world.fresh(".topic")
    queues = [await world.queue(topics=[topic]) for _ in range(3)]
    message = world.message(topic, "to all")
    assert await world.broker.publish([message]) == frozenset()
    for queue in queues:
        [delivery] = await world.take(await world.subscribe(queue), 1)
        assert delivery.message.id == message.id
        assert delivery.queue == queue.name
        await world.settle(DONE, delivery)


@promise("publishing")
async def a_queue_gets_its_topics_and_no_others(world: World) -> None:
    """A queue of several topics receives each of them, and nothing of any other topic, however alike the names."""
    topic = world.fresh(".order")
    queue = await world.queue(topics=[topic, f"{topic}.paid"])
    other = await world.queue(topics=[f"{topic}.created", topic.upper(), f"{topic}s", f"{topic}.*"])
    batch = [
        world.message(name, name) for name in (f"{topic}.created", topic, topic.upper(), f"{topic}.paid", f"{topic}s")
    ]
    assert await world.broker.publish(batch) == frozenset()
    received = await world.ready(await world.subscribe(queue), queue)
    assert texts(received) == [topic, f"{topic}.paid"]
    others = await world.ready(await world.subscribe(other), other)
    assert texts(others) == [f"{topic}.created", topic.upper(), f"{topic}s"]


@promise("publishing")
async def a_message_that_no_queue_receives_is_reported(world: World) -> None:
    """publish() returns the ids of exactly those messages that went nowhere; the others arrive."""
    queue = await world.queue()
    heard, unheard = world.message(queue, "heard"), world.message(world.fresh(".nobody"), "unheard")
    assert await world.broker.publish([unheard, heard]) == frozenset([unheard.id])
    [delivery] = await world.take(await world.subscribe(queue), 1)
    assert delivery.message.id == heard.id


@promise("publishing")
async def a_batch_keeps_its_order(world: World) -> None:
    """Messages of one call are received in their order."""
    queue = await world.queue()
    published = [str(number) for number in range(200)]
    await world.put(queue, *published)
    assert texts(await world.take(await world.subscribe(queue), 200, limit=7)) == published


@promise("publishing")
async def a_large_batch_arrives_whole(world: World) -> None:
    """A batch of thousands arrives whole, in order, and once."""
    queue = await world.queue()
    published = [str(number) for number in range(LARGE_BATCH)]
    await world.put(queue, *published)
    subscription = await world.subscribe(queue)
    assert texts(await world.take(subscription, LARGE_BATCH, limit=500)) == published
    assert await world.ready(subscription, queue) == []


@promise("publishing")
async def an_empty_batch_is_no_error(world: World) -> None:
    """Publishing, settling, extending and redriving nothing does nothing."""
    assert await world.broker.publish([]) == frozenset()
    assert await world.broker.settle([]) == []
    assert await world.broker.extend([]) == []
    assert await world.broker.redrive([]) == 0
    assert await world.broker.discard([]) == 0
    await world.broker.declare([])


@promise("publishing")
async def every_field_of_the_envelope_survives(world: World) -> None:
    """A message is received as it was published, in every field; times to the millisecond."""
    queue, now = await world.queue(), round(world.now(), 3)
    full = Message(
        id="an id of another program: Ünï \"quoted\" 'too' 100% 🚚",
        topic=queue.topics[0],
        body=b'{"total": "19.99"}',
        key="customer 42; DROP TABLE",
        headers={"tenant": "blau", "Mixed-Case": "Yes", "empty": ""},
        content_type="application/vnd.shop+json; charset=utf-8",
        correlation_id="the first",
        causation_id="the one before",
        created=now - 5.25,
        due=now - 1.5,
        expires=now + 3600.125,
        priority=7,
    )
    bare = Message(id=world.fresh(), topic=queue.topics[0], body=b"")
    assert await world.broker.publish([full]) == frozenset()
    subscription = await world.subscribe(queue)
    [delivery] = await world.take(subscription, 1)
    same_message(delivery.message, full)
    assert await world.broker.publish([bare]) == frozenset()
    [delivery] = await world.take(subscription, 1)
    same_message(delivery.message, bare)


@promise("publishing")
async def any_bytes_are_a_body(world: World) -> None:
    """A body is bytes: empty, binary, not UTF-8, with zeros and line ends, and as large as the limit."""
    queue = await world.queue()
    bodies = [b"", bytes(range(256)), b"\xff\xfe\x00", b"a\r\n\r\nb\n", b"\0" * 1000, b"z" * DEFAULT_BODY_LIMIT]
    await world.broker.publish([Message(id=world.fresh(), topic=queue.topics[0], body=body) for body in bodies])
    received = await world.take(await world.subscribe(queue), len(bodies))
    assert [each.message.body for each in received] == bodies


@promise("publishing")
async def any_text_is_a_header(world: World) -> None:
    """Headers are text: any script, any length that fits, many of them, and none."""
    queue = await world.queue()
    many: list[dict[str, str]] = [
        {},
        {"grüße": "дом 家 🏠", "quotes": "\"'`", "newline": "a\nb"},
        {"long": "x" * 10_000},
        {f"header-{number}": str(number) for number in range(100)},
    ]
    batch = [Message(id=world.fresh(), topic=queue.topics[0], body=b"", headers=headers) for headers in many]
    await world.broker.publish(batch)
    received = await world.take(await world.subscribe(queue), len(many))
    assert [dict(each.message.headers) for each in received] == many


@promise("publishing")
async def many_publishers_at_once_lose_nothing(world: World) -> None:
    """A hundred tasks that publish at the same time, over two broker objects, lose and double nothing."""
    queue, other = await world.queue(), await world.another()
    messages = [world.message(queue, str(number)) for number in range(100)]
    reported = await asyncio.gather(
        *((world.broker if number % 2 else other).publish([message]) for number, message in enumerate(messages))
    )
    assert not any(reported), "a declared queue did not receive its topic"
    received = await world.ready(await world.subscribe(queue), queue)
    assert sorted(each.message.id for each in received) == sorted(each.id for each in messages)
