"""The control plane: what runners are told and asked while they run, through temporary queues of their own broker.

Every runner hears the topic conveyor.control. An answer goes to a topic of whoever asked, so nothing is sent while nobody asks.
Orders may come twice and in any order, and get lost with a connection: each says a state and not a change, and who connects
(again) asks the others for theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Self

import msgspec

from conveyor.broker import Broker, Clock
from conveyor.core.message import Message, uuid7
from conveyor.core.pause import Switch, Switches, decided, merged, paused_in
from conveyor.core.settle import describe
from conveyor.errors import BrokerError, BrokerUnavailable
from conveyor.runtime.health import Health
from conveyor.runtime.loop import Loops
from conveyor.runtime.mailbox import Mailbox
from conveyor.runtime.metrics import process_name

log = logging.getLogger("conveyor.control")

INTERNAL: Final = "conveyor."
"""Begins the names of queues and topics that are Conveyor's own."""
CONTROL: Final = "conveyor.control"
"""The topic that every runner hears."""
PEERS: Final = "conveyor.peers"
"""The topic on which a runner that starts asks those that are there."""
STATUS: Final = "conveyor.status"
"""Begins the topics on which whoever asked gets the answers."""
LEFT: Final = "conveyor.left"
"""The topic of runners that are there no more."""
PEERS_SECONDS: Final = 1.0
"""How long a runner that starts waits for what the others know: those that are there answer in milliseconds, and those that
died without having been noticed never do."""
ANSWER_SECONDS: Final = 5.0
"""How long somebody waits for the first runner to answer; one that stands still never does."""
FAREWELL_SECONDS: Final = 1.0
"""That a runner has ended is told for no longer: who asks it will see that it is silent."""
LAST_ANSWER_SECONDS: Final = 0.5
"""How long, after one answer, somebody waits for the next."""
PAUSES_SECONDS: Final = 2.0
"""What is paused is waited for no longer: a look at the queues tells most of all where other things stand still."""
REFUSED_SECONDS: Final = 60.0
"""Between two tries where the broker permits no queue for it: it will hardly change its mind sooner."""


class Turn(msgspec.Struct, frozen=True, tag="turn"):
    """These queues are paused, or not."""

    switches: dict[str, Switch]


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Do not handle these messages; stop where one is being handled.

    Parameters:
        ids: theirs → when somebody wished it (Unix seconds).
    """

    ids: dict[str, float]


class Over(msgspec.Struct, frozen=True, tag="over"):
    """These messages, which somebody wanted cancelled, had ended by then: what comes of them again was redriven, and is handled.

    Parameters:
        of: the identity of a worker → the ids of messages that are its dead letters → the time of the last wish that this ends.
    """

    of: dict[str, dict[str, float]]


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Somebody has come: tell under the topic to what there is to know."""

    to: str


class Known(msgspec.Struct, frozen=True, tag="known"):
    """What there is to know: the answer to a Hello, by somebody who has been informed himself.

    Parameters:
        switches: which queues are paused, or not.
        cancelled: as in a Cancel.
        over: as in an Over.
    """

    switches: dict[str, Switch]
    cancelled: dict[str, float] = {}
    over: dict[str, dict[str, float]] = {}


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Tell under the topic to how you are.

    Parameters:
        seen: runner → the number of its failures that are known already.
        switches: what the asker knows.
    """

    to: str
    seen: dict[str, int] = {}
    switches: dict[str, Switch] = {}


Order = Turn | Cancel | Over | Hello | Known | Report


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An attempt that ended with an error.

    Parameters:
        number: counts the failures of its runner, from 1.
        at: Unix seconds.
        attempt: 1 for the first one.
        dead: the message was given up; else it is tried again.
    """

    number: int
    at: float
    worker: str
    queue: str
    message_id: str
    attempt: int
    error: str
    traceback: str = ""
    dead: bool = False


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one worker of a runner is.

    Parameters:
        queue: where its messages wait.
        concurrency: how many are handled at once.
        in_flight: messages that it holds.
        handled: messages whose handler ended well.
        failed: attempts that ended with an error.
        retried: of those, the ones to be tried again.
        dead: of those, the ones given up.
        paused: it fetches nothing, because its queue is paused.
    """

    name: str
    queue: str
    concurrency: int
    in_flight: int = 0
    handled: int = 0
    failed: int = 0
    retried: int = 0
    dead: int = 0
    paused: bool = False


class Status(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="status"):
    """How a runner is.

    Parameters:
        runner: names it among all runners.
        app: its application.
        process: ``<host>/<number>``, as its supervisor counts; ``<host>/<pid>`` where it has none.
        started: Unix seconds.
        at: seconds on the runner's own clock, which only goes forward: two of them tell how much time lies between two answers.
        resident_bytes: memory held now.
        switches: what it knows of paused queues.
        failures: its latest ones that were asked for, oldest first.
    """

    runner: str
    app: str
    process: str
    host: str
    pid: int
    started: float
    at: float
    resident_bytes: int
    health: Health
    workers: tuple[WorkerStatus, ...] = ()
    switches: dict[str, Switch] = {}
    failures: tuple[Failure, ...] = ()

    @property
    def queues(self) -> frozenset[str]:
        """Where its workers fetch from."""
        return frozenset(worker.queue for worker in self.workers)


class Left(msgspec.Struct, frozen=True, tag="left"):
    """A runner is there no more: it ended, or its supervisor saw that it had."""

    runner: str


def internal(name: str) -> bool:
    """Whether a queue is Conveyor's own: operators look at it only when they ask for everything."""
    return name.startswith(INTERNAL)


def _nothing(*_: object) -> None:
    """Where nobody cares."""


async def _nothing_to_do() -> None:
    """Where nobody cares, in a coroutine."""


def _no_wishes() -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    return {}, {}


def runner_of(owner: str) -> str:
    """What the runner of a supervisor's process is called.

    Parameters:
        owner: the identity under which the process holds leases, given to it by its supervisor.
    """
    return owner[:12]


def _message(topic: str, content: Order | Status | Left) -> Message:
    now = time.time()
    return Message(id=uuid7(now, os.urandom(10)), topic=topic, body=msgspec.json.encode(content), created=now)


async def tell(broker: Broker, order: Order) -> bool:
    """Give an order to every runner on a broker. Returns whether there is one.

    Raises:
        BrokerError: it could not be sent.
    """
    return not await broker.publish([_message(CONTROL, order)])


async def cancel(broker: Broker, ids: Mapping[str, float]) -> bool:
    """Tell every runner not to handle these messages. Returns whether there is one.

    Parameters:
        ids: theirs → when somebody wished it (Unix seconds).

    Raises:
        BrokerError: it could not be sent.
    """
    return await tell(broker, Cancel(dict(ids)))


async def tell_left(broker: Broker, runner: str) -> None:
    """Tell whoever looks at the runners now that one of them is there no more; where that takes long, nobody is told."""
    with contextlib.suppress(BrokerError, TimeoutError):
        async with asyncio.timeout(FAREWELL_SECONDS):
            await broker.publish([_message(LEFT, Left(runner))])


class Control:
    """A runner's end: it hears orders, answers questions, and knows what is paused.

    Parameters:
        broker: open.
        app: the application whose workers run here.
        number: of this process below its supervisor, which gave the broker its owner; None where there is none.
        switches: what is known of paused queues from before.
    """

    def __init__(
        self, broker: Broker, app: str = "", number: str | None = None, *, switches: Switches | None = None
    ) -> None:
        self.app: Final = app
        self.process: Final = process_name(number)
        self.runner: Final = uuid.uuid4().hex[:12] if number is None else runner_of(broker.owner)
        """Names it among all runners."""
        self.switches: Switches = dict(switches or {})
        self.on_turn: Callable[[], Awaitable[object]] = _nothing_to_do
        """Called when a queue is paused that was not, or the reverse; what is asked meanwhile is answered afterwards."""
        self.on_cancel: Callable[[Mapping[str, float]], object] = _nothing
        """Called with messages that shall not be handled: their ids → when somebody wished it."""
        self.on_over: Callable[[Mapping[str, Mapping[str, float]]], object] = _nothing
        """Called with wishes that mean nothing any more: the identity of a worker → ids → the time of the last such wish."""
        self.wishes: Callable[[], tuple[dict[str, float], dict[str, dict[str, float]]]] = _no_wishes
        """Gives what a runner that starts has to be told, as on_cancel and on_over take it."""
        self.status: Callable[[int], Status] | None = None
        """Gives this runner's status, with its failures behind a number; None where there is nothing to tell."""
        self.problem: str | None = None
        """Why nothing can be heard now, in words."""
        self._own_topic = f"{CONTROL}.{self.runner}"
        self._broker = broker
        decode = msgspec.json.Decoder[Order](Order).decode
        self._mailbox: Mailbox[Order] = Mailbox(broker, self._own_topic, (CONTROL, self._own_topic), decode)
        self._informed = asyncio.Event()
        """It knows what its peers know, or there is none."""
        self._loops = Loops()

    @property
    def paused(self) -> frozenset[str]:
        """The queues that are paused."""
        return paused_in(self.switches)

    async def start(self) -> None:
        """Begin to hear; returns when it knows what other runners know, or can know nothing for now."""
        self._loops.start("control", self._run)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PEERS_SECONDS):
                await self._informed.wait()
        self._informed.set()  # nobody there knows more, and whoever starts next need not wait

    async def close(self) -> None:
        """Hear no more, and say so where there was somebody to be asked."""
        await self._loops.stop()
        if self.status is not None:
            await tell_left(self._broker, self.runner)
        await self._mailbox.remove()

    async def _run(self) -> None:
        while True:
            try:
                await self._listen()
            except BrokerUnavailable as error:
                self.problem = describe(error)
                raise
            except BrokerError as error:
                if self.problem is None:
                    log.warning("no pause, cancellation or conveyor top for this runner: %s", describe(error))
                self.problem = describe(error)
                self._informed.set()
                await asyncio.sleep(REFUSED_SECONDS)

    async def _listen(self) -> None:
        # It hears orders before it asks, or it would miss those in between; and it asks before it can be asked itself, or the
        # broker could not tell it that nobody else is there.
        await self._mailbox.declare()
        alone = bool(await self._broker.publish([_message(PEERS, Hello(self._own_topic))]))
        async with self._mailbox.receiving(PEERS) as take:
            self.problem = None
            if alone:
                self._informed.set()
            if self.switches:  # those that started in the same moment could not be asked
                await tell(self._broker, Turn(dict(self.switches)))
            while True:
                orders = await take()
                for order in orders:
                    await self._obey(order)
                await self._answer(orders)

    async def _obey(self, order: Order) -> None:
        match order:
            case Known(switches, cancelled, over):
                self.on_over(over)
                self.on_cancel(cancelled)
                await self._learn(switches)
                self._informed.set()
            case Turn(switches):
                await self._learn(switches)
            case Report(switches=switches):
                await self._learn(switches)
            case Cancel(ids):
                self.on_cancel(ids)
            case Over(of):
                self.on_over(of)
            case Hello():
                pass

    async def _learn(self, switches: Switches) -> None:
        before = self.paused
        self.switches = merged(self.switches, switches)
        for queue in self.paused - before:
            log.warning("%s is paused", queue)
        for queue in before - self.paused:
            log.info("%s goes on", queue)
        if self.paused != before:
            await self.on_turn()

    async def _answer(self, orders: Sequence[Order]) -> None:
        answers: dict[str, Message] = {}
        """By asker: whoever asked several times meanwhile gets one answer."""
        for order in orders:
            # Whoever begins by what he is told has to be told everything: who does not know it himself is silent.
            if isinstance(order, Hello) and order.to != self._own_topic and self._informed.is_set():
                answers[order.to] = _message(order.to, Known(dict(self.switches), *self.wishes()))
            if isinstance(order, Report) and self.status is not None:
                answers[order.to] = _message(order.to, self.status(order.seen.get(self.runner, 0)))
        if answers:
            try:
                await self._broker.publish(list(answers.values()))
            except BrokerError as error:  # whoever asked asks again
                log.debug("an answer was not sent: %s", describe(error))


Paused = frozenset[str] | None
"""The queues that are paused; None where those who know it do not answer."""


async def paused_queues(broker: Broker) -> Paused:
    """The queues that are paused, as runners and keepers of journals know. Where none of them is there, nothing is."""
    topic = f"{STATUS}.{uuid.uuid4().hex[:12]}"
    mailbox = Mailbox(broker, topic, (topic,), msgspec.json.Decoder(Known).decode)
    switches: Switches | None = None
    # A broker that takes nothing any more, and is looked at because of that, cannot be asked, and shows its queues.
    with contextlib.suppress(BrokerError, TimeoutError):
        async with asyncio.timeout(PAUSES_SECONDS) as patience:
            try:
                async with mailbox.receiving() as take:
                    if not await tell(broker, Hello(topic)):
                        return frozenset()
                    while True:
                        for known in await take():
                            switches = merged(switches or {}, known.switches)
                            patience.reschedule(asyncio.get_running_loop().time() + LAST_ANSWER_SECONDS)
            finally:
                await mailbox.remove()
    return None if switches is None else paused_in(switches)


class Operator:
    """The other end: asks all runners of a broker how they are, and tells them what to do.

    Parameters:
        broker: open.
        clock: gives Unix seconds.
    """

    def __init__(self, broker: Broker, clock: Clock = time.time) -> None:
        self.statuses: dict[str, Status] = {}
        """Runner → its last answer."""
        self.heard: dict[str, float] = {}
        """Runner → when it answered last, in seconds of time.monotonic()."""
        self.on_status: Callable[[Status], object] = _nothing
        """Called with each answer as it comes."""
        self.on_gone: Callable[[Status], object] = _nothing
        """Called with the last answer of a runner that is there no more."""
        self._broker = broker
        self._clock = clock
        self._topic = f"{STATUS}.{uuid.uuid4().hex[:12]}"
        decode = msgspec.json.Decoder[Status | Left](Status | Left).decode
        self._mailbox: Mailbox[Status | Left] = Mailbox(broker, self._topic, (self._topic, LEFT), decode)
        self._switches: Switches = {}
        self._answered = asyncio.Event()
        self._loops = Loops()

    async def __aenter__(self) -> Self:
        """Begin to hear answers.

        Raises:
            BrokerError: the broker permits no queue for it.
        """
        await self._mailbox.declare()
        self._loops.start("answers", self._run)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._loops.stop()
        await self._mailbox.remove()

    @property
    def paused(self) -> frozenset[str]:
        """The queues that are paused, as far as is known."""
        return paused_in(self._switches)

    async def ask(self) -> bool:
        """Ask every runner for its status; the answers come by themselves. Returns whether there is a runner.

        Raises:
            BrokerError: it could not be sent.
        """
        seen = {name: status.failures[-1].number for name, status in self.statuses.items() if status.failures}
        return await tell(self._broker, Report(self._topic, seen, dict(self._switches)))

    async def hear_all(self) -> list[Status]:
        """Ask every runner for its status, and wait until no more answers come; those that answered.

        Raises:
            BrokerError: it could not be asked.
        """
        self.statuses.clear()
        self._answered.clear()
        if not await self.ask():
            return []
        wait_seconds = ANSWER_SECONDS
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(wait_seconds):
                    await self._answered.wait()
                self._answered.clear()
                wait_seconds = LAST_ANSWER_SECONDS
        return list(self.statuses.values())

    async def turn(self, queue: str, *, paused: bool) -> bool:
        """Pause a queue, or let it go on. Returns whether there is a runner that heard it.

        What every runner knows should be asked for before: the new decision has to be later than all of it.

        Raises:
            BrokerError: it could not be sent.
        """
        switches = decided(self._switches, queue, paused=paused, now=self._clock())
        there_is_one = await tell(self._broker, Turn(switches))
        self._switches = merged(self._switches, switches)
        return there_is_one

    def forget(self, runner: str) -> None:
        """A runner is gone."""
        self.heard.pop(runner, None)
        if (last := self.statuses.pop(runner, None)) is not None:
            self.on_gone(last)

    async def _run(self) -> None:
        async with self._mailbox.receiving() as take:
            while True:
                for told in await take():
                    match told:
                        case Left(runner):
                            self.forget(runner)
                        case Status():
                            self._note(told)

    def _note(self, status: Status) -> None:
        before = self.statuses.get(status.runner)
        if before is not None and not status.failures:
            status = msgspec.structs.replace(status, failures=before.failures[-1:])
        self.statuses[status.runner] = status
        self.heard[status.runner] = time.monotonic()
        self._switches = merged(self._switches, status.switches)
        self._answered.set()
        self.on_status(status)
