"""Publishing with confirms: many under way at once, and each knows its own fate."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Container, Mapping, Sequence
from typing import Final, NamedTuple

from conveyor.brokers.rabbitmq.address import Options
from conveyor.brokers.rabbitmq.amqp import (
    AmqpError,
    Channel,
    ChannelClosed,
    Connection,
    ConnectionClosed,
    Nacked,
    Properties,
    Returned,
)
from conveyor.brokers.rabbitmq.envelope import shortened
from conveyor.brokers.rabbitmq.link import Link, said
from conveyor.core.message import Message
from conveyor.errors import BrokerError, BrokerFull, BrokerUnavailable, PublishFailed

log: Final = logging.getLogger("conveyor.rabbitmq")

CONFIRM_SECONDS: Final = 30.0
"""A confirm that has not come by then is unknown. Far above what a busy disk needs."""
BLOCKED_SECONDS: Final = 15.0
"""How long a publish waits for a server that takes none, before it is refused as full."""
PROBE_SECONDS: Final = 1.0
"""How long a probe waits for the server's word."""
PROBE_LOOK_SECONDS: Final = 0.01
NO_ROUTE: Final = 312
HEADER_BYTES: Final = 12
"""Of a content header, beside the properties."""


class Outgoing(NamedTuple):
    """A message on its way to the server."""

    exchange: str
    routing_key: str
    body: bytes
    properties: Properties | bytes
    mandatory: bool = True


class Unrouted(Exception):
    """No queue takes it."""


class Refused(Exception):
    """The server does not have it in every queue.

    Parameters:
        full: for want of room.
        unsent: the connection was lost before.
    """

    def __init__(self, text: str, *, full: bool = False, unsent: bool = False) -> None:
        super().__init__(text)
        self.full = full
        self.unsent = unsent

    @property
    def for_now(self) -> bool:
        """Another try may succeed."""
        return self.full or self.unsent


class Unknown(Exception):
    """The server may have it, or not."""


Fate = Unrouted | Refused | Unknown | None
"""What became of a message; None is that the server durably has it."""


class _Patience:
    """Cancels confirms that do not come in time: one timer for all of them, where one for each would cost more than the publish."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, confirm: asyncio.Future[None]) -> None:
        """This one has CONFIRM_SECONDS from now on."""
        waiting = self._waiting
        while waiting and waiting[0][1].done():
            waiting.popleft()
        loop = asyncio.get_running_loop()
        waiting.append((loop.time() + CONFIRM_SECONDS, confirm))
        if self._timer is None:
            self._timer = loop.call_at(waiting[0][0], self._tick)

    def _tick(self) -> None:
        waiting, loop = self._waiting, asyncio.get_running_loop()
        now = loop.time()
        while waiting and (waiting[0][1].done() or waiting[0][0] <= now):
            waiting.popleft()[1].cancel()
        self._timer = loop.call_at(waiting[0][0], self._tick) if waiting else None


class Publisher:
    """The publishing side of a broker object: a connection of its own, so that an alarm stops no consumer.

    Parameters:
        prepare: makes sure that the exchanges exist.
        instead: of queues that are gone, where to send what was for them; they may be there again.
    """

    def __init__(
        self,
        options: Options,
        name: str,
        prepare: Callable[[Connection], Awaitable[None]],
        heartbeat_seconds: Callable[[], float],
        instead: Callable[[Collection[str]], Awaitable[Mapping[str, str]]],
    ) -> None:
        self._prepare = prepare
        self._instead = instead
        self._patience = _Patience()
        self._link: Link[Channel] = Link(options, name, self._begin, heartbeat_seconds)
        self.open = self._link.open
        self.close = self._link.close
        self.give_up = self._link.give_up

    @property
    def blocked(self) -> str | None:
        """Why the server takes no publishes now; None while it does."""
        connection = self._link.connection
        return None if connection is None else connection.blocked

    @property
    def connection(self) -> Connection | None:
        """The connection, living or not."""
        return self._link.connection

    async def probe(self) -> None:
        """Find out whether the server takes publishes: that it does not, it tells only those who publish.

        What is published goes to no queue, on a channel of its own: should even that be forbidden, nothing else is closed.

        Raises:
            BrokerUnavailable: there is no connection.
        """
        connection = (await self._channel()).connection
        channel: Channel | None = None
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                if connection.blocked is None:
                    channel = await connection.channel()
                    await channel.confirm_select()
                    answer = channel.publish("", f"conveyor.probe.{uuid.uuid4().hex}", b"", mandatory=True)
                    answer.add_done_callback(lambda done: done.cancelled() or done.exception())
                    while not answer.done() and connection.blocked is None:
                        await asyncio.wait([answer], timeout=PROBE_LOOK_SECONDS)
        except (TimeoutError, AmqpError):
            pass  # it is slow, or gone, or forbids it: that is another matter
        finally:
            if channel is not None:
                channel.begin_close()

    async def send(self, batch: Sequence[Outgoing]) -> list[Fate]:
        """Publish in this order; the fate of each.

        Raises:
            BrokerUnavailable: there is no connection, and nothing was sent.
            BrokerFull: the server takes nothing now, and nothing was sent.
        """
        fates = await self._send(batch)
        if any(fates):
            await self._send_instead(batch, fates)
        return fates

    async def _send_instead(self, batch: Sequence[Outgoing], fates: list[Fate]) -> None:
        """What was for a queue that somebody deleted gets another try, once; what is said of it then is put in its place."""
        lost = [place for place, fate in enumerate(fates) if isinstance(fate, Unrouted) and not batch[place].exchange]
        if not lost:
            return
        try:
            instead = await self._instead({batch[place].routing_key for place in lost})
            lost = [place for place in lost if batch[place].routing_key in instead]
            again = [batch[place]._replace(routing_key=instead[batch[place].routing_key]) for place in lost]
            found: list[Fate] = await self._send(again)
        except (AmqpError, BrokerError) as error:
            found = [
                Refused(f"{fates[place]}, and for now it cannot be declared again: {error}", unsent=True)
                for place in lost
            ]
        for place, fate in zip(lost, found, strict=True):
            fates[place] = fate

    async def _send(self, batch: Sequence[Outgoing]) -> list[Fate]:
        if not batch:
            return []
        channel = await self._channel()
        fates: list[Fate] = []
        under_way: list[tuple[int, asyncio.Future[None]]] = []
        lost = False
        for position, each in enumerate(batch):
            try:
                if channel.congested:
                    await self._room(channel)
                future = channel.publish(
                    each.exchange, each.routing_key, each.body, each.properties, mandatory=each.mandatory
                )
            except ValueError as error:
                if (shorter := _publish_shorter(channel, each)) is None:
                    fates.append(Refused(f"AMQP cannot carry it: {error}"))
                else:
                    fates.append(None)
                    under_way.append((position, shorter))
            except (ConnectionClosed, ChannelClosed) as error:
                fates.append(Refused(f"the connection was lost before it was sent: {said(error)}", unsent=True))
                lost = True
            except TimeoutError:  # what comes behind would overtake this one, or wait as long in vain
                why = f"the server takes nothing now: {self.blocked or 'its socket is full'}"
                fates += [Refused(why, full=True) for _ in batch[position:]]
                break
            else:
                fates.append(None)
                under_way.append((position, future))
        if under_way:
            await self._confirmed(fates, under_way)
        elif all(isinstance(fate, Refused) and fate.full for fate in fates):
            raise BrokerFull(str(fates[0]))
        elif lost:
            raise BrokerUnavailable(str(fates[0]))
        return fates

    async def send_all(self, batch: Sequence[Outgoing]) -> None:
        """Publish copies, all or else an error: some may be there all the same.

        Raises:
            BrokerError: not all of them are confirmed.
        """
        for fate in await self.send(batch):
            if isinstance(fate, Unknown):
                raise BrokerUnavailable(str(fate))
            if isinstance(fate, Unrouted):
                raise BrokerError(f"a queue is gone: {fate}")
            if fate is not None:
                raise _error(fate)

    async def send_named(
        self, ids: Sequence[str], batch: Sequence[Outgoing], may_be_gone: Container[int] = ()
    ) -> list[int]:
        """Publish what has to be there.

        Parameters:
            ids: of the messages, as the error names them.
            may_be_gone: positions of those whose queue need not be there any more.

        Returns:
            Those of may_be_gone whose queue is gone.

        Raises:
            BrokerUnavailable, BrokerFull: not all of them are confirmed, and another try may succeed.
            PublishFailed: not all of them are confirmed; names which.
        """
        fates = await self.send(batch)
        gone = [place for place, fate in enumerate(fates) if isinstance(fate, Unrouted) and place in may_be_gone]
        for place in gone:
            fates[place] = None
        if all(fate is None or (isinstance(fate, Refused) and fate.for_now) for fate in fates):
            for fate in fates:
                if isinstance(fate, Refused):
                    raise _error(fate)
            return gone
        refused = {id_: str(fate) for id_, fate in zip(ids, fates, strict=True) if isinstance(fate, Refused | Unrouted)}
        unknown = {id_: str(fate) for id_, fate in zip(ids, fates, strict=True) if isinstance(fate, Unknown)}
        raise PublishFailed(refused, unknown)

    async def _confirmed(self, fates: list[Fate], under_way: list[tuple[int, asyncio.Future[None]]]) -> None:
        if len(under_way) == 1:
            [(position, only)] = under_way
            self._patience.watch(only)
            try:
                await only
            except AmqpError as error:
                fates[position] = _fate(error)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not only.cancelled() or (task is not None and task.cancelling()):
                    raise
                fates[position] = self._late()
            return
        futures = [future for _, future in under_way]
        try:
            await asyncio.wait(futures, timeout=CONFIRM_SECONDS)
        finally:
            for future in futures:
                if future.done():
                    future.cancelled() or future.exception()
                else:
                    future.cancel()
        for position, future in under_way:
            if future.cancelled() or not future.done():
                fates[position] = self._late()
            elif (failure := future.exception()) is not None:
                fates[position] = _fate(failure)

    def _late(self) -> Unknown:
        because = f"; it blocks publishers: {self.blocked}" if self.blocked else ""
        return Unknown(f"no confirm within {CONFIRM_SECONDS:g} s{because}")

    async def _room(self, channel: Channel) -> None:
        async with asyncio.timeout(BLOCKED_SECONDS):
            await channel.drain()

    async def _channel(self) -> Channel:
        channel = await self._link.session()
        if channel.closed.done():
            await self._link.again(channel)
            channel = await self._link.session()
        return channel

    async def _begin(self, connection: Connection) -> Channel:
        connection.on_blocked = _tell_blocked
        await self._prepare(connection)
        channel = await connection.channel()
        await channel.confirm_select()
        return channel


def _publish_shorter(channel: Channel, each: Outgoing) -> asyncio.Future[None] | None:
    """Publish what AMQP cannot carry without a part of its headers; None where that does not help, or is not ours to do."""
    shorter = shortened(each.properties, channel.connection.max_payload - HEADER_BYTES)
    if shorter is None:
        return None
    if shorter.left_out:
        log.warning("a copy for %s has no room for the header %s", each.routing_key, ", ".join(shorter.left_out))
    return channel.publish(each.exchange, each.routing_key, each.body, shorter.properties, mandatory=each.mandatory)


def _tell_blocked(reason: str | None) -> None:
    if reason is None:
        log.info("RabbitMQ takes publishes again")
    else:
        log.warning("RabbitMQ takes no publishes now: %s; they wait, and are refused as full after a while", reason)


def _fate(error: BaseException) -> Fate:
    match error:
        case Returned(code=code) if code == NO_ROUTE:
            return Unrouted(str(error))
        case Returned():
            return Refused(str(error))
        case Nacked():
            why = "a queue is full and rejects, or the server is in trouble; of several queues, others may have it"
            return Refused(f"the server refused it: {why}", full=True)
        case _:
            return Unknown(said(error))


def _error(refused: Refused) -> BrokerError:
    if refused.full:
        return BrokerFull(str(refused))
    return BrokerUnavailable(str(refused)) if refused.unsent else BrokerError(str(refused))


def told(
    messages: Sequence[Message], fates: Sequence[Fate]
) -> tuple[frozenset[str], dict[str, str], dict[str, str], list[str]]:
    """Which went nowhere, which are refused and why, which are unknown and why, and why there was no room."""
    if not any(fates):
        return frozenset(), {}, {}, []
    unrouted: set[str] = set()
    refused: dict[str, str] = {}
    unknown: dict[str, str] = {}
    full: list[str] = []
    for message, fate in zip(messages, fates, strict=True):
        match fate:
            case Unrouted():
                unrouted.add(message.id)
            case Refused():
                refused[message.id] = str(fate)
                if fate.full:
                    full.append(str(fate))
            case Unknown():
                unknown[message.id] = str(fate)
    return frozenset(unrouted), refused, unknown, full
