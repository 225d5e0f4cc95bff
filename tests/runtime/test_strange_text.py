"""Texts that no store can keep as they are: half characters, as the names of some files have them in Python, and NUL."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conveyor import Context, Conveyor, RetryPolicy
from conveyor.broker import DeadFilter
from conveyor.errors import ConfigurationError, PayloadError

SURROGATE = "caf\udce9.txt"


@dataclass(frozen=True)
class Found:
    number: int


@pytest.fixture(params=["memory", "sqlite", "redis", "rabbitmq"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kind = request.param
    if kind == "memory":
        return "memory:"
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/t.queue"
    text: str = request.getfixturevalue(kind).url()
    return text


async def test_an_error_with_half_a_character_makes_a_dead_letter_and_disturbs_nobody(url: str) -> None:
    app = Conveyor("t", broker=url)
    handled: Counter[int] = Counter()

    @app.worker(retry=RetryPolicy(attempts=2, initial=0.01, maximum=0.01))
    async def look(found: Found) -> None:
        if found.number % 10 == 5:
            raise FileNotFoundError(f"no such file: {SURROGATE}\0")
        handled[found.number] += 1

    async with app.running() as runner:
        for number in range(30):
            await app.publish(Found(number))
        broker = (await app.connect()).broker
        async with asyncio.timeout(120):
            while len(handled) < 27 or len(letters := await broker.dead_letters(DeadFilter(), limit=10)) < 3:
                await asyncio.sleep(0.05)
        assert {letter.error for letter in letters} == {r"FileNotFoundError: no such file: caf\udce9.txt\x00"}
        assert all(r"caf\udce9.txt\x00" in letter.traceback for letter in letters)
        assert runner.health().ready
    assert set(handled.values()) == {1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key": SURROGATE}, r"the key 'caf\\udce9.txt' holds"),
        ({"id": SURROGATE}, r"the id 'caf\\udce9.txt' holds"),
        ({"headers": {SURROGATE: "x"}}, r"the header 'caf\\udce9.txt' holds"),
        ({"headers": {"X-Name": SURROGATE}}, "the value of the header 'X-Name' holds"),
        ({"key": "a\0b"}, r"the key 'a\\x00b' holds"),
        ({"key": 7}, "the key is text, not 7"),
    ],
)
async def test_what_no_broker_can_carry_is_refused_when_it_is_published(options: Any, said: str) -> None:
    app = Conveyor("t", broker="memory:")
    async with app:
        with pytest.raises(PayloadError, match=said):
            await app.publish(Found(1), **options)
        with pytest.raises(ConfigurationError, match="is no topic"):
            await app.publish(b"x", topic=SURROGATE)


async def test_a_handler_that_publishes_what_no_broker_can_carry_has_a_dead_letter_that_says_so() -> None:
    app = Conveyor("t", broker="memory:")

    @app.worker
    async def look(found: Found, context: Context) -> None:
        context.publish(b"x", topic="seen", key=SURROGATE)

    async with app.running():
        await app.publish(Found(1))
        broker = (await app.connect()).broker
        async with asyncio.timeout(60):
            while not (letters := await broker.dead_letters(DeadFilter(), limit=10)):
                await asyncio.sleep(0.01)
    assert letters[0].reason == "invalid"
    assert "a lone surrogate, which no broker carries" in letters[0].error
