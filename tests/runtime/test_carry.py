"""A header goes on from a message to what its handler publishes, calls and logs; and an event can go on before its handler ends."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import Struct

from conveyor import Context, Conveyor, NoSubscriber, Retry, carried
from conveyor.runtime import logs
from conveyor.testing import Harness

ID = "X-Request-ID"


class Asked(Struct):
    text: str = ""


class Answered(Struct):
    text: str = ""


class Noted(Struct):
    text: str = ""


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level, known = root.handlers[:], root.level, logs.settings
    stream = io.StringIO()
    logs.configure("info", json=True, stream=stream)
    yield stream
    root.handlers[:], root.level, logs.settings = handlers, level, known
    logging.captureWarnings(False)


def said(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def application() -> Conveyor:
    app = Conveyor("desk")
    app.carry(ID, log="request_id", make=lambda message: f"made-of-{message.id}")
    return app


@pytest.mark.parametrize(
    ("sent", "called_with"),
    [
        ("job-1", "job-1"),
        ("100% of it; a=b", "100% of it; a=b"),
        ("Köln", "K%C3%B6ln"),
        ("a\r\nX-Evil: 1", "a%0D%0AX-Evil:%201"),
        ("ends ", "ends%20"),
    ],
)
async def test_what_another_program_sent_is_fit_for_a_header_of_http(sent: str, called_with: str) -> None:
    app = application()
    seen: list[str] = []

    @app.worker
    async def answer(asked: Asked) -> Noted:
        seen.append(carried()[ID])
        return Noted()

    async with Harness(app) as desk:
        await desk.publish(Asked(), headers={ID: sent})
        assert [each.headers[ID] for each in desk.messages(Noted)] == [sent]
    assert seen == [called_with]


async def test_a_header_goes_on_to_everything_that_follows(lines: io.StringIO) -> None:
    app = application()
    seen: list[str] = []

    @app.worker
    async def answer(asked: Asked, context: Context) -> Answered:
        seen.append(carried()[ID])
        context.log.info("answering")
        context.publish(Noted("collected"))
        await context.publish_now(Noted("at once"), headers={"desk": "7"})
        await app.publish(Noted("afresh"))
        return Answered()

    @app.worker
    def hear(answered: Answered) -> None:  # in a thread
        seen.append(carried()[ID])
        logging.getLogger("desk").info("heard")

    async with Harness(app) as desk:
        await desk.publish(Asked(), headers={"x-request-id": "r-1"})
        assert seen == ["r-1", "r-1"]
        assert [message.headers for message in desk.messages(Answered)] == [{ID: "r-1"}]
        assert [message.headers for message in desk.messages(Noted)] == [
            {ID: "r-1", "desk": "7"},
            {ID: "r-1"},
            {ID: "r-1"},
        ]
    told = {line["message"]: line.get("request_id") for line in said(lines)}
    assert told["answering"] == told["heard"] == "r-1"


async def test_what_a_message_lacks_is_made_up_the_same_for_every_attempt() -> None:
    app = application()
    seen: list[str] = []

    @app.worker
    async def answer(asked: Asked) -> None:
        seen.append(carried()[ID])
        if len(seen) == 1:
            raise Retry

    async with Harness(app) as desk:
        message = await desk.publish(Asked())
        assert seen == [f"made-of-{message.id}"] * 2


async def test_lines_about_a_retry_and_a_dead_letter_have_the_field_too(lines: io.StringIO) -> None:
    app = application()

    @app.worker
    async def answer(asked: Asked, context: Context) -> None:
        if context.attempt == 1:
            raise Retry("once more")
        raise ValueError("no")

    async with Harness(app) as desk:
        await desk.publish(Asked(), headers={ID: "r-1"})
        await desk.app.broker.publish(
            [desk.messages(Asked)[0].__class__("m-2", "asked", b"no json", headers={ID: "r-2"})]
        )
        await desk.run_to_end()
    ends = [(line["request_id"], line["level"]) for line in said(lines) if "message_id" in line]
    assert ("r-1", "warning") in ends
    assert ("r-1", "error") in ends
    assert ("r-2", "error") in ends  # what does not decode never reached a handler


async def test_without_a_way_to_make_it_up_nothing_is_carried() -> None:
    app = Conveyor("desk")
    app.carry("traceparent")
    seen: list[dict[str, str]] = []

    @app.worker
    async def answer(asked: Asked) -> Answered:
        seen.append(dict(carried()))
        return Answered()

    async with Harness(app) as desk:
        await desk.publish(Asked(), headers={"traceparent": "00-1"})
        await desk.publish(Asked())
        assert seen == [{"traceparent": "00-1"}, {}]
        assert [dict(message.headers) for message in desk.messages(Answered)] == [{"traceparent": "00-1"}, {}]


async def test_what_cannot_be_made_up_is_missing_and_the_message_is_handled() -> None:
    app = Conveyor("desk")
    app.carry(ID, make=lambda message: message.headers["there is none"])
    seen: list[dict[str, str]] = []

    @app.worker
    async def answer(asked: Asked) -> None:
        seen.append(dict(carried()))

    async with Harness(app) as desk:
        await desk.publish(Asked())
    assert seen == [{}]


def test_outside_of_a_handler_nothing_is_carried() -> None:
    assert carried() == {}


async def test_an_event_published_now_is_out_before_the_handler_ends_and_a_repeat_has_the_same_id() -> None:
    app = Conveyor("desk")
    out: list[int] = []

    @app.worker
    async def answer(asked: Asked, context: Context) -> None:
        await context.publish_now(Answered("now"))
        out.append(len(desk.messages(Answered)))
        if context.attempt == 1:
            raise Retry

    @app.worker
    async def hear(answered: Answered) -> None: ...

    async with Harness(app) as desk:
        message = await desk.publish(Asked())
        first, second = desk.messages(Answered)
        assert out == [1, 2]
        assert first.id == second.id
        assert first.correlation_id == first.causation_id == message.id


async def test_an_event_that_somebody_must_receive_fails_the_attempt_when_nobody_does() -> None:
    app = Conveyor("desk")
    seen: list[str] = []

    @app.worker
    async def answer(asked: Asked, context: Context) -> None:
        with pytest.raises(NoSubscriber, match="no queue receives 'answered'"):
            await context.publish_now(Answered(), require_subscriber=True)
        seen.append("said")

    async with Harness(app) as desk:
        await desk.publish(Asked())
    assert seen == ["said"]
