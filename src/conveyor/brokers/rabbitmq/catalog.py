"""The catalog: which queues there are. AMQP cannot list queues, so one message on the server does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final

import msgspec

from conveyor.brokers.rabbitmq.amqp import (
    AmqpError,
    Channel,
    ChannelClosed,
    Connection,
    ConnectionClosed,
    Incoming,
    Properties,
)
from conveyor.brokers.rabbitmq.envelope import PERSISTENT
from conveyor.brokers.rabbitmq.publisher import Outgoing
from conveyor.brokers.rabbitmq.spec import Spec
from conveyor.brokers.rabbitmq.topology import ACCESS_REFUSED, RESOURCE_LOCKED
from conveyor.errors import BrokerError, BrokerUnavailable

log: Final = logging.getLogger("conveyor.rabbitmq")

LOCK_SECONDS: Final = 15.0
"""How long to wait for another process that has the lock; it loses it with its connection."""
LOCK_AGAIN_SECONDS: Final = 0.01
RETURN_SECONDS: Final = 1.0
"""How long a message may take to be back in its queue after the one who had it has let go."""
PATIENCE_SECONDS: Final = 5.0
"""How long a catalog may give nothing that is known to be there: a queue's leader may be slow."""
INTERNAL_ERROR: Final = 541
TRIES: Final = 5
"""How often a server may fail, as it may at a catalog that another process creates in that moment: it says 541, and ends the
connection."""

OFTEN: Final = 10
"""Deliveries after which a message is replaced by a copy; a server gives one up after 20 (the default of RabbitMQ 4)."""

_decode: Final = msgspec.json.Decoder(dict[str, Spec])


class NotAlone(BrokerError):
    """The user may not create the lock, so others may be at work at the same time."""


class Turn:
    """Be the only one: among the tasks of this object, and over all connections.

    An exclusive queue is the lock: nobody else can declare it, and it goes with its connection. Who may not create one
    goes on without: a message that somebody has taken is nobody else's for that time, which is enough for reading and changing.

    Whoever is cancelled waits for no server. What it had asked for is given back beside, and the next one here waits for that: the lock
    is its connection's, so it could not tell its own from one that is about to be deleted.

    Parameters:
        spawn: does something beside, and ends it with the broker object at the latest.
    """

    def __init__(self, spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[Any]]) -> None:
        self._spawn = spawn
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def locked(self, connection: Connection, name: str, *, alone: bool = False) -> AsyncIterator[Channel]:
        """Be the only one between here and the end of the block; on a channel of one's own.

        Parameters:
            alone: never go on without.

        Raises:
            BrokerUnavailable: another one has it for too long.
            NotAlone: it cannot be had, and is needed.
        """
        await self._turn.acquire()
        channels: list[Channel] = []
        try:
            try:
                async with asyncio.timeout(LOCK_SECONDS):
                    await _take(connection, name, channels, alone=alone)
            except TimeoutError:
                raise BrokerUnavailable(f"another process has held {name!r} for {LOCK_SECONDS:g} s") from None
            yield channels[-1]
        finally:
            leaving = self._spawn(_leave(connection, name, channels), f"giving back {name}")
            leaving.add_done_callback(lambda _: self._turn.release())
            await asyncio.wait([leaving])


async def _take(connection: Connection, name: str, channels: list[Channel], *, alone: bool) -> None:
    """Take the lock on the channel that is in the list then, and is there before anything is asked for on it."""
    wait = LOCK_AGAIN_SECONDS
    while True:
        channels[:] = [channel := await connection.channel()]
        try:
            await channel.queue_declare(name, durable=False, exclusive=True, arguments={"x-queue-type": "classic"})
        except ChannelClosed as error:
            channels.clear()
            if error.code == ACCESS_REFUSED:
                if alone:
                    raise NotAlone(f"may not create {name!r}: {error.text}") from error
                channels.append(await connection.channel())
                return
            if error.code != RESOURCE_LOCKED:
                raise
            await asyncio.sleep(wait)
            wait = min(wait * 1.5, 0.2)
        else:
            return


async def _leave(connection: Connection, name: str, channels: list[Channel]) -> None:
    """Give the lock back. The server hears this after what it has not answered yet: a lock that is still being taken goes as well."""
    with contextlib.suppress(AmqpError):
        for channel in channels:
            still = await connection.channel() if channel.closed.done() else channel
            await still.queue_delete(name)
            await still.close()


class Catalog:
    """Every lasting queue that Conveyor declared on this server, as one message in a queue.

    Whoever changes it, or finds that it was given out often, puts a fresh copy there before the one it took is acknowledged: so
    there is always one, and never one that was delivered so often that a server gives it up. Should there be two, after a crash
    in between, they are merged.

    Parameters:
        connection: gives the living connection.
        send: publishes, and returns when it is confirmed.
        name: the queue's name.
        replicated: the list is in a quorum queue.
        turn: one at a time, in all processes.
    """

    def __init__(
        self,
        connection: Callable[[], Awaitable[Connection]],
        send: Callable[[list[Outgoing]], Awaitable[None]],
        name: str,
        replicated: bool,
        turn: Turn,
    ) -> None:
        self._connection = connection
        self._send = send
        self._name = name
        self._queue_type = "quorum" if replicated else "classic"
        self._turn = turn
        self.available = True
        """There is one; else every broker object knows its own queues only."""

    async def open(self) -> None:
        """Make sure that there is one."""
        tries = 0
        while True:
            try:
                await self._open()
            except ConnectionClosed as error:
                tries += 1
                if error.code != INTERNAL_ERROR or tries == TRIES:
                    raise
                log.info(
                    "the server failed (is another process creating the catalog of queues?); trying again: %s", error
                )
            else:
                return

    async def _open(self) -> None:
        connection = await self._connection()
        channel = await connection.channel()
        try:
            there = await channel.queue_declare(self._name, arguments={"x-queue-type": self._queue_type})
        except ChannelClosed as error:
            channel = await connection.channel()
            try:
                there = await channel.queue_declare(self._name, passive=True)
            except ChannelClosed:
                log.warning("there is no catalog of queues, and we may not create one: %s", error.text)
                self.available = False
                return
        await channel.close()
        if not there.messages:
            # Somebody may have it in his hands. Who cannot keep others out does not begin anew: beside theirs, an empty one would be read.
            with contextlib.suppress(NotAlone):
                async with self._turn.locked(connection, f"{self._name}.lock", alone=True) as channel:
                    if not await self._take_all(channel, RETURN_SECONDS):
                        await self._put({})

    async def read(self) -> dict[str, Spec]:
        """All queues by name, as they are now."""
        async with self.changing() as specs:
            return dict(specs)

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[dict[str, Spec]]:
        """All queues by name; what the block changes is written at its end. Nobody else changes it meanwhile.

        Raises:
            BrokerUnavailable: the server does not give it out, and what is not known cannot be compared.
        """
        if not self.available:
            yield {}
            return
        connection = await self._connection()
        async with self._turn.locked(connection, f"{self._name}.lock") as channel:
            taken = await self._take_all(channel, PATIENCE_SECONDS)
            if not taken:
                raise BrokerUnavailable(
                    f"the server gives nothing out of {self._name!r}, which is never empty: it is slow, "
                    "or somebody has purged it, and the next process that starts begins it anew"
                )
            before = _merged([_specs(each.body) for each in taken])
            specs = dict(before)
            try:
                yield specs
            finally:
                # Who only reads gives back what it took, which works though the server accepts no publish.
                if specs == before and len(taken) == 1 and _count(taken[0]) < OFTEN:
                    channel.nack(taken[0].delivery_tag)
                else:
                    await self._put(specs)
                    for each in taken:
                        channel.ack(each.delivery_tag)
                await channel.qos(0)

    async def _take_all(self, channel: Channel, patience_seconds: float) -> list[Incoming]:
        taken: list[Incoming] = []
        deadline = asyncio.get_running_loop().time() + patience_seconds
        while True:
            message = await channel.get(self._name)
            if message is not None:
                taken.append(message)
            elif taken or asyncio.get_running_loop().time() > deadline:
                return taken
            else:
                await asyncio.sleep(LOCK_AGAIN_SECONDS)

    async def _put(self, specs: Mapping[str, Spec]) -> None:
        body = msgspec.json.encode(specs)
        properties = Properties(content_type="application/json", delivery_mode=PERSISTENT)
        await self._send([Outgoing("", self._name, body, properties)])


def _specs(body: bytes) -> dict[str, Spec]:
    try:
        return _decode.decode(body)
    except msgspec.MsgspecError as error:
        raise BrokerError(f"the catalog of queues on the server cannot be read: {error}") from error


def _count(taken: Incoming) -> int:
    count = (taken.properties.headers or {}).get("x-delivery-count", 0)
    return count if isinstance(count, int) else OFTEN


def _merged(found: list[dict[str, Spec]]) -> dict[str, Spec]:
    merged: dict[str, Spec] = {}
    for specs in found:
        for name, spec in specs.items():
            if name not in merged or merged[name].version < spec.version:
                merged[name] = spec
    return merged
