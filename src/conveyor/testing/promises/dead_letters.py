"""Promises on dead letters: kept whole, found again, and moved or deleted only when somebody says so."""

from __future__ import annotations

from collections.abc import Sequence

from conveyor.broker import DeadFilter, DeadLetter, Queue
from conveyor.core.message import Message
from conveyor.core.settle import Dead, RetryAt
from conveyor.testing.promises.suite import World, promise, same_message, texts

LONG_TRACE = "\n".join(f'  File "worker.py", line {line}, in handle: Grüße "quoted" \\ 家' for line in range(2_000))
DIED_WITHIN_SECONDS = 60.0
MANY = 250


async def bury(world: World, queue: Queue, *deaths: tuple[str, str, str]) -> list[Message]:
    """Publish messages (text, reason, error) and give them up."""
    messages = await world.put(queue, *(text for text, _, _ in deaths))
    subscription = await world.subscribe(queue)
    for delivery, (_, reason, error) in zip(await world.take(subscription, len(deaths)), deaths, strict=True):
        await world.settle(Dead(reason, error), delivery)
    await subscription.close()
    return messages


async def letters_of(world: World, queue: Queue) -> list[DeadLetter]:
    """All dead letters of a queue."""
    return await world.broker.dead_letters(DeadFilter(queue=queue.name), limit=1_000)


def said(letters: Sequence[DeadLetter]) -> list[str]:
    """What the messages say."""
    return [each.message.body.decode() for each in letters]


@promise("dead letters")
async def a_dead_letter_is_kept_whole(world: World) -> None:
    """A message given up is kept as it was, with its reason, error, whole traceback, counts and time, and not delivered again."""
    queue = await world.queue()
    message = Message(
        id=world.fresh(),
        topic=queue.topics[0],
        body=bytes(range(256)),
        key="k",
        headers={"a": "ä"},
        content_type="image/png",
        correlation_id="journey",
        causation_id="cause",
        created=round(world.now(), 3),
        priority=4,
    )
    await world.broker.publish([message])
    subscription, before = await world.subscribe(queue), world.now()
    await world.settle(RetryAt(0.0, "first"), *await world.take(subscription, 1))
    await world.settle(Dead("exhausted", "ValueError: 'Grüße' \\ 100%", LONG_TRACE), *await world.take(subscription, 1))
    assert await world.ready(subscription, queue) == []
    [letter] = await letters_of(world, queue)
    same_message(letter.message, message)
    assert (letter.queue, letter.reason, letter.error) == (queue.name, "exhausted", "ValueError: 'Grüße' \\ 100%")
    assert letter.traceback == LONG_TRACE, f"{len(LONG_TRACE)} characters of traceback became {len(letter.traceback)}"
    assert (letter.deliveries, letter.attempts) == (2, 1)
    assert before - DIED_WITHIN_SECONDS <= letter.died <= world.now() + DIED_WITHIN_SECONDS


@promise("dead letters")
async def a_dead_letter_outlives_its_receiver(world: World) -> None:
    """A dead letter stays when the broker object that gave it up has closed."""
    queue, other = await world.queue(), await world.another()
    await world.put(queue, "x")
    held = await world.take(await world.subscribe(queue, by=other), 1)
    await world.settle(Dead("rejected", "no"), *held, by=other)
    await other.close()
    assert said(await letters_of(world, queue)) == ["x"]


@promise("dead letters")
async def dead_letters_are_found_by_what_is_known(world: World) -> None:
    """Dead letters are found by queue, id, reason, a part of the error in any case, and all of these together."""
    queue, other = await world.queue(), await world.queue()
    mark = world.fresh()
    a, b, c = await bury(
        world,
        queue,
        ("a", "rejected", f"ValueError {mark}: 100% off_by one"),
        ("b", "exhausted", f"TimeoutError {mark}: 100 off-by"),
        ("c", "rejected", "KeyError: 'sku'"),
    )
    await bury(world, other, ("d", "rejected", f"ValueError {mark}"))

    async def found(which: DeadFilter) -> list[str]:
        return said(await world.broker.dead_letters(which, limit=100))

    assert await found(DeadFilter(queue=queue.name)) == ["a", "b", "c"]
    assert await found(DeadFilter(id=b.id)) == ["b"]
    assert await found(DeadFilter(queue=queue.name, reason="rejected")) == ["a", "c"]
    assert await found(DeadFilter(error=f"error {mark}".upper())) == ["a", "b", "d"]
    assert await found(DeadFilter(queue=queue.name, reason="rejected", error="valueERROR")) == ["a"]
    assert await found(DeadFilter(queue=queue.name, error="100%")) == ["a"], "a % was taken for a wildcard"
    assert await found(DeadFilter(queue=queue.name, error="off_by")) == ["a"], "a _ was taken for a wildcard"
    assert await found(DeadFilter(queue=other.name, id=a.id)) == []
    assert await found(DeadFilter(queue=world.fresh())) == []
    assert await found(DeadFilter(id=c.id, reason="crashed")) == []


@promise("dead letters")
async def dead_letters_come_in_pages(world: World) -> None:
    """Page after page, each behind the last position, gives every dead letter once, oldest first; a page obeys its limit."""
    queue, other = await world.queue(), await world.queue()
    for number in range(7):
        await bury(world, queue, (str(number), "rejected", "odd" if number % 2 else "even"))
        await bury(world, other, ("other", "rejected", "x"))

    async def pages(which: DeadFilter) -> list[list[str]]:
        after, found = None, []
        while page := await world.broker.dead_letters(which, limit=3, after=after):
            found.append(said(page))
            after = page[-1].position
        return found

    assert await pages(DeadFilter(queue=queue.name)) == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert await pages(DeadFilter(queue=queue.name, error="even")) == [["0", "2", "4"], ["6"]]


@promise("dead letters")
async def a_redriven_message_starts_anew(world: World) -> None:
    """A redriven message is delivered again, whole, with all counts at zero and no error, and is no dead letter any more."""
    queue = await world.queue()
    [message] = await world.put(queue, "x")
    subscription = await world.subscribe(queue)
    await world.settle(RetryAt(0.0, "first"), *await world.take(subscription, 1))
    await world.settle(Dead("exhausted", "no"), *await world.take(subscription, 1))
    assert await world.broker.redrive(await letters_of(world, queue)) == 1
    assert await letters_of(world, queue) == []
    [again] = await world.take(subscription, 1)
    same_message(again.message, message)
    assert (again.deliveries, again.attempts, again.error) == (1, 0, "")


@promise("dead letters")
async def a_redriven_message_does_not_expire_again(world: World) -> None:
    """What an operator sends back has no limit in time any more."""
    queue = await world.queue()
    [topic] = queue.topics
    await world.broker.publish([Message("m", topic, b"x", expires=world.now() + 60.0)])
    subscription = await world.subscribe(queue)
    await world.settle(Dead("expired", "too late"), *await world.take(subscription, 1))
    await world.broker.redrive(await letters_of(world, queue))
    [again] = await world.take(subscription, 1)
    assert again.message.expires is None


@promise("dead letters")
async def a_redriven_message_wakes_a_fetch(world: World) -> None:
    """A receiver that waits gets what is redriven."""
    queue = await world.queue()
    await bury(world, queue, ("x", "rejected", "no"))
    async with world.waiting(await world.subscribe(queue, by=await world.another())) as [fetch]:
        await world.broker.redrive(await letters_of(world, queue))
    assert texts(fetch.result()) == ["x"]


@promise("dead letters")
async def a_redriven_message_goes_to_its_own_queue_only(world: World) -> None:
    """The other queues of the topic, which had their copy, get no second one."""
    topic = world.fresh(".topic")
    queue, other = await world.queue(topics=[topic]), await world.queue(topics=[topic])
    await bury(world, queue, ("x", "rejected", "no"))
    others = await world.subscribe(other)
    assert texts(await world.ready(others, other)) == ["x"]
    assert await world.broker.redrive(await letters_of(world, queue)) == 1
    assert texts(await world.ready(await world.subscribe(queue), queue)) == ["x"]
    assert await world.ready(others, other) == []


@promise("dead letters")
async def a_redrive_moves_only_what_is_named(world: World) -> None:
    """Redriving some dead letters leaves the others."""
    queue = await world.queue()
    await bury(world, queue, *((text, "rejected", "no") for text in "abc"))
    a, _, c = await letters_of(world, queue)
    assert await world.broker.redrive([c, a]) == 2
    assert said(await letters_of(world, queue)) == ["b"]
    assert sorted(texts(await world.ready(await world.subscribe(queue), queue))) == ["a", "c"]


@promise("dead letters")
async def a_redrive_twice_moves_once(world: World) -> None:
    """Redriving a dead letter a second time, or twice in one call, moves it once."""
    queue = await world.queue()
    await bury(world, queue, ("x", "rejected", "no"))
    letters = await letters_of(world, queue)
    assert await world.broker.redrive([*letters, *letters]) == 1
    assert await world.broker.redrive(letters) == 0
    assert await world.broker.discard(letters) == 0, "a redriven letter could be discarded"
    assert texts(await world.ready(await world.subscribe(queue), queue)) == ["x"]


@promise("dead letters")
async def a_redriven_message_may_die_again(world: World) -> None:
    """A redriven message that is given up again is one dead letter, with the counts since."""
    queue = await world.queue()
    await bury(world, queue, ("x", "rejected", "first"))
    await world.broker.redrive(await letters_of(world, queue))
    await world.settle(Dead("rejected", "second"), *await world.take(await world.subscribe(queue), 1))
    [letter] = await letters_of(world, queue)
    assert (letter.error, letter.deliveries, letter.attempts) == ("second", 1, 0)


@promise("dead letters")
async def a_discarded_letter_is_gone(world: World) -> None:
    """What is discarded is neither a dead letter nor delivered again; the others stay; a second time does nothing."""
    queue = await world.queue()
    await bury(world, queue, *((text, "rejected", "no") for text in "abc"))
    a, b, _ = await letters_of(world, queue)
    assert await world.broker.discard([a, b]) == 2
    assert said(await letters_of(world, queue)) == ["c"]
    assert await world.broker.discard([a, b]) == 0
    assert await world.broker.redrive([a, b]) == 0, "a discarded letter could be redriven"
    assert await world.ready(await world.subscribe(queue), queue) == []


@promise("dead letters")
async def many_letters_are_redriven_at_once(world: World) -> None:
    """Hundreds of dead letters are redriven in one call, each once."""
    queue = await world.queue()
    await bury(world, queue, *((str(number), "rejected", "no") for number in range(MANY)))
    assert await world.broker.redrive(await letters_of(world, queue)) == MANY
    assert await letters_of(world, queue) == []
    received = await world.ready(await world.subscribe(queue), queue)
    assert sorted(texts(received), key=int) == [str(number) for number in range(MANY)]
