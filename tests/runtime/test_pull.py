"""Taking messages one by one: each is handed out once, and ends as its holder says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from conveyor import NO_RETRY, BrokerUnavailable, ConfigurationError, Conveyor, PayloadError, Reject, RetryPolicy
from conveyor.errors import JobUnknown

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ
    from servers.redis import Redis

PATIENCE_SECONDS = 60.0
AT_ONCE = RetryPolicy(attempts=3, initial=0.0, maximum=0.0)


class Letter(msgspec.Struct, frozen=True):
    text: str


class Answer(msgspec.Struct, frozen=True):
    text: str


@pytest.fixture(params=["memory", "sqlite", "redis", "rabbitmq"])
async def app(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Conveyor]:
    """An application that is connected to each kind of broker."""
    if request.param in {"redis", "rabbitmq"}:
        server: Redis | RabbitMQ = request.getfixturevalue(request.param)
        url = server.url()
    else:
        url = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path / 'a.queue'}"}[request.param]
    async with Conveyor("post", broker=url) as app:
        yield app


async def test_messages_are_taken_one_by_one_and_each_is_gone_when_it_is_done(app: Conveyor) -> None:
    async with app.pull(Letter) as letters:
        for text in ("a", "b"):
            await app.publish(Letter(text))
        first, second = await letters.take(), await letters.take()
        assert first is not None
        assert second is not None
        assert (first.payload, second.payload) == (Letter("a"), Letter("b"))
        assert await first.done()
        assert await second.done()
        assert await letters.take(0.2) is None
        info = await letters.info()
        assert (info.ready, info.in_flight, info.dead) == (0, 0, 0)


async def test_what_is_published_with_a_message_goes_out_when_it_is_done_and_not_before(app: Conveyor) -> None:
    async with app.pull(Letter, retry=AT_ONCE) as letters, app.pull(Answer) as answers:
        sent = await app.publish(Letter("a"))
        first = await letters.take()
        assert first is not None
        first.publish(Answer("no"))
        assert await first.failed(ValueError("not now"))
        again = await letters.take()
        assert again is not None
        assert again.attempt == 2
        again.publish(Answer("yes"))
        assert await again.done()
        answer = await answers.take()
        assert answer is not None
        assert answer.payload == Answer("yes")
        assert answer.message.causation_id == sent.id


async def test_what_is_published_with_a_message_goes_out_also_when_the_broker_did_not_hear_at_first_that_it_is_done(
    app: Conveyor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_: object) -> None:
        raise BrokerUnavailable("away")

    async with app.pull(Letter) as letters, app.pull(Answer) as answers:
        await app.publish(Letter("a"))
        taken = await letters.take()
        assert taken is not None
        taken.publish(Answer("first"))
        taken.publish(Answer("second"))
        with monkeypatch.context() as patch:
            patch.setattr(app.broker, "settle", away)
            for _ in range(2):
                with pytest.raises(BrokerUnavailable):
                    await taken.done()
        assert await taken.done()
        found = [await answers.take(30) for _ in range(2)]
        assert {answer.payload.text for answer in found if answer is not None} == {"first", "second"}
        assert await answers.take(0.2) is None


async def test_what_fails_for_good_is_a_dead_letter_that_can_be_sent_back_or_discarded(app: Conveyor) -> None:
    async with app.pull(Letter, retry=NO_RETRY) as letters:
        for text in ("a", "b"):
            await app.publish(Letter(text), id=f"letter-{text}")
            pulled = await letters.take()
            assert pulled is not None
            assert pulled.final(ValueError())
            await pulled.failed(ValueError("unreadable"))
        dead = await letters.dead_letters()
        assert [(letter.message.id, letter.reason) for letter in dead] == [
            ("letter-a", "exhausted"),
            ("letter-b", "exhausted"),
        ]
        assert "unreadable" in dead[0].error
        assert letters.decode(dead[0].message) == Letter("a")
        assert await letters.redrive(await letters.dead_letters(id="letter-b")) == 1
        again = await letters.take()
        assert again is not None
        assert (again.payload, again.attempt) == (Letter("b"), 1)
        await again.done()
        assert await letters.discard(await letters.dead_letters()) == 1
        assert await letters.dead_letters() == []


async def test_what_is_given_back_is_taken_again_uncounted(app: Conveyor) -> None:
    async with app.pull(Letter) as letters:
        await app.publish(Letter("a"))
        first = await letters.take()
        assert first is not None
        assert await first.give_back()
        again = await letters.take()
        assert again is not None
        assert again.attempt == 1
        await again.done()


async def test_what_is_not_extended_goes_to_others_and_its_first_holder_is_told(app: Conveyor) -> None:
    async with app.pull(Letter, lease=1.0) as letters:
        await app.publish(Letter("a"))
        first = await letters.take()
        assert first is not None
        assert await first.extend()
        again = await letters.take(60)
        assert again is not None
        assert again.payload == Letter("a")
        assert not await first.extend()
        assert not await first.done()
        assert await again.done()


async def test_what_does_not_decode_becomes_a_dead_letter_and_the_next_one_is_given(app: Conveyor) -> None:
    async with app.pull(Letter) as letters:
        await app.publish({"text": 5}, topic="letter")
        await app.publish(Letter("good"))
        taken = await letters.take()
        assert taken is not None
        assert taken.payload == Letter("good")
        await taken.done()
        (dead,) = await letters.dead_letters()
        assert dead.reason == "invalid"
        with pytest.raises(PayloadError):
            letters.decode(dead.message)


async def test_rejecting_ends_a_message_at_once() -> None:
    async with Conveyor("post", broker="memory://") as app, app.pull(Letter, retry=AT_ONCE) as letters:
        await app.publish(Letter("a"))
        taken = await letters.take()
        assert taken is not None
        assert not taken.final(ValueError())
        assert taken.final(Reject("never"))
        await taken.failed(Reject("never"))
        assert [letter.reason for letter in await letters.dead_letters()] == ["rejected"]


async def test_the_journal_knows_how_a_pulled_message_ended() -> None:
    app = Conveyor("post", broker="memory://", journal=True)
    async with app.running(), app.pull(Letter, retry=AT_ONCE) as letters:
        sent = await app.publish(Letter("a"))
        for ending in (ValueError("not now"), None):
            taken = await letters.take()
            assert taken is not None
            assert await (taken.done() if ending is None else taken.failed(ending))
        job = await app.ticket(sent.id).status()
        assert (job.status, job.attempts, job.worker) == ("done", 2, "post.letter")


async def _status(app: Conveyor, id: str) -> str | None:
    try:
        job = await app.ticket(id).status()
    except JobUnknown:
        return None
    return job.status


async def test_the_journal_knows_that_a_dead_letter_was_put_back() -> None:
    app = Conveyor("post", broker="memory://", journal=True)
    async with app.running(), app.pull(Letter, retry=RetryPolicy(attempts=1)) as letters:
        sent = await app.publish(Letter("a"))
        taken = await letters.take()
        assert taken is not None
        await taken.failed(ValueError("not now"))
        assert await letters.redrive(await letters.dead_letters()) == 1
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await _status(app, sent.id)) != "waiting":
                await asyncio.sleep(0.02)
        again = await letters.take()
        assert again is not None
        await again.done()


async def test_several_that_take_at_once_get_different_messages() -> None:
    async with Conveyor("post", broker="memory://") as app, app.pull(Letter) as letters:
        takers = [asyncio.create_task(letters.take()) for _ in range(5)]
        for number in range(5):
            await app.publish(Letter(str(number)))
        taken = [pulled.payload.text for pulled in await asyncio.gather(*takers) if pulled is not None]
        assert sorted(taken) == ["0", "1", "2", "3", "4"]


async def test_nothing_is_pulled_outside_of_its_block() -> None:
    app = Conveyor("post", broker="memory://")
    with pytest.raises(ConfigurationError, match="async with"):
        await app.pull(Letter).take()
