"""``conveyor check``: mistakes in an app's wiring, found before anything runs."""

from __future__ import annotations

import difflib
import enum
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cyclopts import App

from conveyor import config
from conveyor.broker import Broker, Feature, Queue
from conveyor.cli import EXIT_CODES
from conveyor.cli.application import load_app
from conveyor.cli.fit import misfit
from conveyor.cli.terminal import FAILED, OK, Output, out, safe
from conveyor.cli.wiring import Wiring, wiring
from conveyor.core.message import Message
from conveyor.core.words import counted
from conveyor.errors import ConfigurationError
from conveyor.runtime.call import is_transaction
from conveyor.runtime.context import Context
from conveyor.runtime.worker import Worker

if TYPE_CHECKING:
    from conveyor.app import Conveyor

PLAIN = Output()

command = App(
    name="check",
    help_epilogue=f"""Examples:
  conveyor check shop:app
  conveyor check shop:app --strict --json

Errors stop an app from working; warnings are worth a look (events that nobody
receives); notes say how it is meant. Errors end it with 1; with --strict
warnings do, too.

{EXIT_CODES}""",
)


class Level(enum.StrEnum):
    """How bad it is."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


TYPING_ERROR: Final = 0.85
"""How alike two topics are of which one is taken for a typing error of the other; order_created and order_completed are 0.79."""
COLOURS = {Level.ERROR: "bold red", Level.WARNING: "yellow", Level.NOTE: "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Parameters:
        level: how bad it is.
        subject: the worker, topic or queue that it is about.
        text: what is wrong and what to do.
    """

    level: Level
    subject: str
    text: str


@command.default
def check(
    app: str, /, *, strict: bool = False, broker: str | None = None, database: str | None = None, output: Output = PLAIN
) -> int:
    """Look for mistakes in an app's wiring.

    Parameters:
        app: The app, as module:attribute.
        strict: Warnings count as problems, too.
        broker: Check against what this broker can do. Default: the app's, else $CONVEYOR_BROKER.
        database: The database's URL. Default: the app's, else $CONVEYOR_DATABASE.
    """
    loaded = load_app(app, broker=broker, database=database)
    found = sorted(findings(loaded), key=lambda finding: list(Level).index(finding.level))
    bad = [finding for finding in found if finding.level is Level.ERROR or (strict and finding.level is Level.WARNING)]
    if output.json:
        output.document(
            {
                "app": loaded.name,
                "workers": len(loaded.workers),
                "ok": not bad,
                "findings": [
                    {"level": finding.level, "subject": finding.subject, "text": finding.text} for finding in found
                ],
            }
        )
    else:
        for finding in found:
            out().print(
                safe(f"{finding.level:<8}", COLOURS[finding.level]),
                safe(f"{finding.subject}: {finding.text}"),
                soft_wrap=True,
            )
        complaints = ", ".join(counted(n, level) for level in Level if (n := sum(f.level is level for f in found)))
        output.say(
            f"{loaded.name}: {counted(len(loaded.workers), 'worker')}, {complaints or 'nothing to complain about'}",
            "red" if bad else "green",
        )
    return FAILED if bad else OK


def findings(app: Conveyor) -> Iterator[Finding]:
    """Everything that there is to say about an app's wiring."""
    drawn = wiring(app.workers.values())
    if not app.workers:
        yield Finding(
            Level.ERROR,
            app.name,
            "has no workers; decorate functions with @app.worker or @app.task, in modules that APP imports",
        )
    yield from _unreceived(drawn)
    yield from _unfed(drawn)
    yield from _misfits(drawn)
    yield from _circles(drawn)
    yield from _shared_queues(app.workers.values())
    yield from unprovided(app, app.workers.values())
    try:
        made = app.new_broker()
    except ConfigurationError as error:
        yield Finding(Level.ERROR, "broker", str(error))
    else:
        for worker in app.workers.values():
            yield from _features(worker.queue, made)


def _unreceived(drawn: Wiring) -> Iterator[Finding]:
    for topic, publishers in drawn.publishers.items():
        if topic not in drawn.receivers:
            who = ", ".join(worker.name for worker in publishers)
            near = difflib.get_close_matches(topic, drawn.receivers, 1, TYPING_ERROR)
            hint = (
                f"did you mean {near[0]}?" if near else "fine where another app does, or where it only ends the story"
            )
            yield Finding(Level.WARNING, topic, f"is published by {who}, and no worker of this app receives it; {hint}")


def _unfed(drawn: Wiring) -> Iterator[Finding]:
    unheard = [topic for topic in drawn.publishers if topic not in drawn.receivers]
    for topic, receivers in drawn.receivers.items():
        if topic in drawn.publishers:
            continue
        who = ", ".join(worker.name for worker in receivers)
        if near := difflib.get_close_matches(topic, unheard, 1, TYPING_ERROR):
            text = f"is received by {who}, and no worker publishes it; {near[0]} is published: is that it?"
            yield Finding(Level.WARNING, topic, text)
        else:
            yield Finding(Level.NOTE, topic, f"feeds {who}, and comes from outside: app.publish(…), or another app")


def _misfits(drawn: Wiring) -> Iterator[Finding]:
    for topic, receivers in drawn.receivers.items():
        made = [(worker, event) for worker in drawn.publishers.get(topic, ()) for event in worker.plan.emits]
        wanted = [(worker, event) for worker in receivers for event in worker.plan.receives]
        for (publisher, published), (receiver, received) in itertools.product(made, wanted):
            if published.topic == received.topic == topic and (why := misfit(published.type, received.type)):
                who = f"{publisher.name} publishes {_name(published.type)}, {receiver.name} receives {_name(received.type)}"
                yield Finding(Level.ERROR, topic, f"{who}: {why}")


def _circles(drawn: Wiring) -> Iterator[Finding]:
    for circle in drawn.circles():
        yield Finding(
            Level.NOTE, circle[0], f"goes in a circle ({' → '.join((*circle, circle[0]))}); make sure that it ends"
        )


def _shared_queues(workers: Iterable[Worker]) -> Iterator[Finding]:
    by_queue: dict[str, list[Worker]] = defaultdict(list)
    for worker in workers:
        by_queue[worker.queue.name].append(worker)
    for queue, sharers in by_queue.items():
        if len(sharers) > 1:
            who = ", ".join(worker.name for worker in sharers)
            yield Finding(
                Level.ERROR,
                queue,
                f"is the queue of {who}: each message would reach only one of them; leave queue= out",
            )


def unprovided(app: Conveyor, workers: Iterable[Worker]) -> Iterator[Finding]:
    """What these workers need that nobody provides: the one mistake that stops them from being started."""
    wanted = {worker.name: [parameter.type for parameter in worker.plan.injected] for worker in workers}
    wanted |= {_name(provider.function): list(provider.needs.values()) for provider in app.providers.values()}
    has_database = config.database_url(app.database_url) is not None
    for who, types in wanted.items():
        for needed in types:
            if is_transaction(needed) and not has_database:
                hint = f"say Conveyor({app.name!r}, database=…), --database URL, or set CONVEYOR_DATABASE"
                yield Finding(Level.ERROR, who, f"takes a Transaction, and there is no database; {hint}")
            elif not is_transaction(needed) and needed not in (Message, Context) and needed not in app.providers:
                hint = "write a function that does and decorate it with @app.provide"
                yield Finding(Level.ERROR, who, f"needs {_name(needed)}, which nobody provides; {hint}")


def _features(queue: Queue, broker: Broker) -> Iterator[Finding]:
    asked = {
        Feature.ORDER: (queue.ordered, "ordered=True"),
        Feature.BOUND: (queue.max_length is not None, f"max_length={queue.max_length}"),
        Feature.TEMPORARY: (queue.temporary, "a temporary queue"),
    }
    for feature, (wanted, words) in asked.items():
        if wanted and feature in broker.missing:
            yield Finding(
                Level.ERROR, queue.name, f"asks for {words}, and the broker has none: {broker.missing[feature]}"
            )


def _name(tp: object) -> str:
    return getattr(tp, "__name__", str(tp))
