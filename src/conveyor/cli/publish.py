"""``conveyor publish``: one message, by hand."""

from __future__ import annotations

import asyncio
import difflib
import re
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from cyclopts import App, Parameter, validators

from conveyor.broker import Broker, Queue
from conveyor.cli import EXIT_CODES
from conveyor.cli.connection import Where, connected
from conveyor.cli.terminal import FAILED, OK, Output, moment
from conveyor.core.codec import Codec, codec_for
from conveyor.core.events import EventType, check_topic
from conveyor.core.message import JSON, Message
from conveyor.errors import ConfigurationError, PayloadError
from conveyor.runtime.control import internal
from conveyor.runtime.journal import Journal, journal_queue
from conveyor.runtime.outgoing import Options, Outgoing

if TYPE_CHECKING:
    from conveyor.app import Conveyor

PLAIN = Output()
UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}

command = App(
    name="publish",
    help_epilogue=f"""Examples:
  conveyor publish shop:app OrderCreated --data '{{"order_id": "A-1"}}'
  conveyor publish shop:app OrderCreated --data @order.json --delay 10m
  conveyor publish order.created --data - --broker $URL < order.json

With an APP the payload is checked by the app's own type, and gets its topic
and key; a task goes by its name. With a TOPIC it travels as it is.

{EXIT_CODES}""",
)


def duration(_: object, tokens: Any) -> float:
    """Seconds, of what somebody wrote: 90, 500ms, 10m, 2h, 1d."""
    text = tokens[0].value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or (found[2] or "s") not in UNITS:
        raise ValueError(f"{text!r} is no duration; write seconds, or 500ms, 90s, 10m, 2h, 1d")
    return float(found[1]) * UNITS[found[2] or "s"]


def _when(_: object, tokens: Any) -> datetime:
    text = tokens[0].value
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no moment; write it like 2027-01-31T18:00:00+01:00") from None
    if found.tzinfo is None:
        raise ValueError(
            f"{text!r} has no offset from UTC, so it could be many moments; write {found.isoformat()}Z or …+01:00"
        )
    return found


@command.default
def publish(
    target: Annotated[str, Parameter(name="TOPIC|APP")],
    event: str | None = None,
    /,
    *,
    data: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    key: str | None = None,
    delay: Annotated[float | None, Parameter(converter=duration, n_tokens=1)] = None,
    at: Annotated[datetime | None, Parameter(converter=_when, n_tokens=1)] = None,
    priority: Annotated[int, Parameter(validator=validators.Number(gte=0, lte=9))] = 0,
    message_id: Annotated[str | None, Parameter(name="--id")] = None,
    header: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = (),
    content_type: str = JSON,
    broker: str | None = None,
    output: Output = PLAIN,
) -> int:
    """Publish one message.

    Parameters:
        target: A topic, or an app (module:attribute) whose event follows.
        event: The event's class name or topic, or a task's name.
        data: The payload: JSON, @FILE for a file's content, or - for stdin.
        key: Keeps related messages in order. Default: what the event's key field holds.
        delay: Nobody receives it before so long: seconds, or 10m, 2h, 1d.
        at: Nobody receives it before this moment: ISO 8601 with an offset.
        priority: 0 (ordinary) to 9 (first).
        message_id: The message's id, so that a repeat can be told. Default: a new one.
        header: A header as NAME=VALUE; may be repeated.
        content_type: Media type of the payload, for a TOPIC. Default: application/json, and then it must be JSON.
        broker: The broker's URL. Default: the app's, else $CONVEYOR_BROKER, else conveyor.toml.
    """
    if delay is not None and at is not None:
        raise ConfigurationError("say either --delay or --at, not both")
    options = Options(key=key, delay=delay, at=at, priority=priority, id=message_id, headers=_headers(header))
    outgoing = Outgoing(time.time)
    if event is None and ":" not in target:
        message = _raw(outgoing, target, _body(data), options, content_type)
        return asyncio.run(_publish(Where(broker=broker).url(), (), message, output))
    from conveyor.cli.application import broker_url, load_app

    app = load_app(target, broker=broker)
    if event is None:
        raise ConfigurationError(f"which event of {target}? It knows {', '.join(payloads(app))}")
    message = _typed(outgoing, app, event, _body(data), options)
    queues = tuple(worker.queue for worker in app.workers.values())
    return asyncio.run(_publish(broker_url(app), queues, message, output, app))


def payloads(app: Conveyor) -> dict[str, Payload]:
    """What an app's workers receive or publish, by class name, and its tasks, by name."""
    found: dict[str, Payload] = {}
    for worker in app.workers.values():
        if worker.plan.fields is not None:
            topic, codec = next(iter(worker.codecs.items()))
            found[worker.name] = Payload(topic, codec, None)
        for event in (*worker.plan.receives, *worker.plan.emits):
            name = getattr(event.type, "__name__", event.topic)
            found.setdefault(
                event.topic if name in ("dict", "bytes") else name, Payload(event.topic, codec_for(event.type), event)
            )
    return found


@dataclass(frozen=True, slots=True)
class Payload:
    """Something that an app can be sent: an event, or a job (which has no event)."""

    topic: str
    codec: Codec
    event: EventType | None


def _typed(outgoing: Outgoing, app: Conveyor, name: str, body: bytes, options: Options) -> Message:
    known = payloads(app)
    payload = known.get(name) or next((payload for payload in known.values() if payload.topic == name), None)
    if payload is None:
        near = difflib.get_close_matches(name, [*known, *(payload.topic for payload in known.values())], 1)
        hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known) or 'none'}"
        raise ConfigurationError(f"{app.name} has no event or task {name!r}; {hint}")
    if payload.codec.content_type == JSON:
        _check_json(body)
    try:
        value = payload.codec.decode(body)
    except Exception as error:  # whatever a decoder raises means that the bytes are no such payload
        raise PayloadError(f"--data is no {name}: {payload.codec.explain(error)}") from error
    encoded = payload.codec.encode(value)
    if options.key is None and payload.event is not None:
        options = msgspec.structs.replace(options, key=payload.event.key_of(value))
    return outgoing.raw(payload.topic, encoded, options, payload.codec.content_type)


def _raw(outgoing: Outgoing, topic: str, body: bytes, options: Options, content_type: str) -> Message:
    check_topic(topic)
    if content_type == JSON:
        _check_json(body, "; say --content-type where it is not meant to be")
    return outgoing.raw(topic, body, options, content_type)


def _check_json(body: bytes, hint: str = "") -> None:
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PayloadError(f"--data is no JSON: {error}{hint}") from error


def _body(data: str | None) -> bytes:
    if data is None:
        raise ConfigurationError("which payload? Give --data JSON, --data @FILE, or --data - for stdin")
    if data == "-":
        return sys.stdin.buffer.read()
    if data.startswith("@"):
        try:
            return Path(data[1:]).read_bytes()
        except OSError as error:
            raise ConfigurationError(f"--data {data}: {error.strerror or error}") from error
    return data.encode("utf-8", "surrogateescape")


def _headers(pairs: tuple[str, ...]) -> dict[str, str]:
    headers = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--header {pair!r} is no NAME=VALUE")
        headers[name] = value
    return headers


async def _publish(
    url: str, queues: tuple[Queue, ...], message: Message, output: Output, app: Conveyor | None = None
) -> int:
    async with connected(url, create=bool(queues)) as broker:
        await broker.declare(queues)
        nowhere = message.id in await broker.publish([message])
        if app is not None and app.journal_place(broker) is not None:
            await broker.declare([journal_queue(app.name)])
            journal = Journal(app.name, broker, app.metrics, time.time)
            journal.published(message, nowhere=nowhere)
            await journal.close()
        hint = await _nowhere(broker, message.topic) if nowhere else ""
    if output.json:
        output.document(
            {"id": message.id, "topic": message.topic, "key": message.key, "due": message.due, "received": not nowhere}
        )
    elif not nowhere:
        later = f", due {moment(message.due)}" if message.due else ""
        output.say(f"published {message.topic} {message.id}{later}")
    if nowhere:
        output.note(f"no queue receives {message.topic!r}, so the message went nowhere; {hint}", "red")
    return FAILED if nowhere else OK


async def _nowhere(broker: Broker, topic: str) -> str:
    queues = [queue for queue in await broker.queues() if not internal(queue.name)]
    topics = sorted({topic for queue in queues for topic in queue.topics})
    near = difflib.get_close_matches(topic, topics, 1)
    if near:
        return f"did you mean {near[0]}?"
    return (
        f"queues exist for {', '.join(topics[:20])}"
        if topics
        else "no queue exists yet: conveyor run APP declares them"
    )
