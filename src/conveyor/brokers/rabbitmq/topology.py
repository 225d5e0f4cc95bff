"""The exchanges and queues on the server: their names, their arguments, and how they come into being."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar

from conveyor.brokers.rabbitmq.amqp import Channel, ChannelClosed, Connection, FieldValue, QueueOk
from conveyor.brokers.rabbitmq.envelope import SLOTS, routing_key
from conveyor.brokers.rabbitmq.plain import SLOT
from conveyor.brokers.rabbitmq.spec import PARTITIONS, RUNGS, Spec, notes_of
from conveyor.errors import BrokerError, QueueConflict

NOT_FOUND: Final = 404
ACCESS_REFUSED: Final = 403
RESOURCE_LOCKED: Final = 405
PRECONDITION_FAILED: Final = 406
HIGHEST_PRIORITY: Final = 9
UNLIMITED_SINCE: Final = (4, 0)
"""From this version on, a quorum queue drops what was delivered 20 times, unless told otherwise; before, there was no limit."""

_Result = TypeVar("_Result")


class Topology:
    """Declares and counts, on a channel that is replaced whenever the server closes it.

    Parameters:
        connection: gives the living connection.
        exchange: the topic exchange of all of Conveyor's topics.
    """

    def __init__(self, connection: Callable[[], Awaitable[Connection]], exchange: str) -> None:
        self._connection = connection
        self.exchange = exchange
        self._channel: Channel | None = None
        self._turn = asyncio.Lock()
        self.version: tuple[int, int] = (0, 0)

    @property
    def later_exchange(self) -> str:
        """The topic exchange for what is not due yet."""
        return f"{self.exchange}.later"

    async def ask(self, what: Callable[[Channel], Awaitable[_Result]]) -> _Result:
        """Do something that the server may refuse by closing the channel.

        Raises:
            ChannelClosed: it did.
        """
        async with self._turn:
            connection = await self._connection()
            channel = self._channel
            if channel is None or channel.closed.done() or channel.connection is not connection:
                channel = self._channel = await connection.channel()
            return await what(channel)

    async def prepare(self, connection: Connection) -> None:
        """Make sure that the exchanges exist."""
        version = str(connection.server_properties.get("version", "0.0")).split(".")
        self.version = (_int(version[0]), _int(version[1]) if len(version) > 1 else 0)
        for exchange in (self.exchange, self.later_exchange):
            channel = await connection.channel()
            try:
                await channel.exchange_declare(exchange, "topic")
            except ChannelClosed as error:
                if error.code == PRECONDITION_FAILED:
                    raise QueueConflict(
                        f"the exchange {exchange!r} exists, and is no durable topic exchange: {error.text}; "
                        "choose another name with ?exchange= in the URL"
                    ) from error
                if error.code != ACCESS_REFUSED:
                    raise
                channel = await connection.channel()
                try:
                    await channel.exchange_declare(exchange, "topic", passive=True)
                except ChannelClosed as missing:
                    raise BrokerError(
                        f"the exchange {exchange!r} does not exist, and {connection.address.user!r} may not create it: "
                        f"{error.text}; have it created, or give the user the permission to configure"
                    ) from missing
            await channel.close()

    async def count(self, queue: str) -> QueueOk | None:
        """How many messages a queue has ready; None where there is no such queue (or it is another's own)."""
        try:
            return await self.ask(lambda channel: channel.queue_declare(queue, passive=True))
        except ChannelClosed as error:
            if error.code in {NOT_FOUND, RESOURCE_LOCKED}:
                return None
            raise

    async def counts(self, names: Sequence[str]) -> dict[str, tuple[int, int] | None]:
        """Messages ready and consumers of many queues; None where there is no such queue."""
        try:
            found = await self.ask(
                lambda channel: asyncio.gather(*(channel.queue_declare(name, passive=True) for name in names))
            )
        except ChannelClosed:  # one of them is not there: one by one, then
            single = {name: await self.count(name) for name in names}
            return {name: None if each is None else (each.messages, each.consumers) for name, each in single.items()}
        return {name: (each.messages, each.consumers) for name, each in zip(names, found, strict=True)}

    async def create(self, spec: Spec, there: Spec | None) -> None:
        """Create a queue and all that belongs to it, or make sure that it is as asked for.

        Parameters:
            there: how it was declared before, if it was.

        Raises:
            QueueConflict: it exists with other arguments.
        """
        if spec.passive:
            await self._must_exist(spec.name)
        elif there is not None and there.max_length != spec.max_length:
            await self._rebound(spec)
        else:
            await self._declare(spec, spec.name, self._arguments(spec, bounded=True))
        # Who names a dead-letter queue may mean one that others have made, as they made it.
        named = "dead_queue" in spec.native
        if not spec.temporary and (not named or await self.count(spec.dead) is None):
            await self._declare(spec, spec.dead, self._arguments(spec, own=not named))
        if not spec.passive:
            await self._declare(spec, spec.later, self._arguments(spec))
            await self._bind(spec)
            if there is not None:  # it may have been led elsewhere, by somebody who died in the midst of _rebound()
                await self._lead(spec, to=spec.name, away_from=spec.later)
            await self.raise_ladder(spec, max(spec.steps, there.steps if there is not None else 0))

    async def raise_ladder(self, spec: Spec, steps: int) -> bool:
        """Create the queues of the delay ladder up to so many; False where we may not."""
        for step, seconds in enumerate(RUNGS[:steps]):
            arguments = self._arguments(spec) | {
                "x-message-ttl": int(seconds * 1000),
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": spec.later,
            }
            if spec.replicated:
                arguments |= {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
            try:
                await self._declare(spec, spec.rung(step), arguments)
            except BrokerError:
                return False
        return True

    async def create_held(self, spec: Spec, queue: str, seconds: float, unused_seconds: float) -> None:
        """A queue whose messages go back to where they came from when nobody holds them for so long."""
        arguments = self._arguments(spec) | {
            "x-message-ttl": int(seconds * 1000),
            "x-expires": int(unused_seconds * 1000),
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": spec.name,
        }
        if spec.replicated:
            arguments |= {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        await self._declare(spec, queue, arguments)

    async def remove(self, spec: Spec, *, dead: bool) -> None:
        """A queue goes, with all that belongs to it; the queue itself last, so that a removal that breaks off can be done again.

        Parameters:
            dead: its dead letters go, too.
        """
        queues = [spec.later, *(spec.rung(step) for step in range(len(RUNGS)))]
        queues += [name for partition in spec.partitions for name in (partition, notes_of(partition))]
        queues += ([spec.dead] if dead else []) + ([] if spec.passive else [spec.name])

        async def forget(channel: Channel) -> None:
            for exchange in (spec.keyed, spec.unkeyed) if spec.ordered else ():
                await channel.exchange_delete(exchange)
            await asyncio.gather(*(channel.queue_delete(queue) for queue in queues))  # done in this order

        try:
            await self.ask(forget)
        except ChannelClosed as error:
            raise BrokerError(f"the server does not let the queue {spec.name!r} be removed: {error.text}") from error

    async def delete(self, queue: str) -> None:
        """A queue goes, with what is in it."""
        await self.ask(lambda channel: channel.queue_delete(queue))

    async def may_create(self, queue: str) -> bool:
        """Whether we have the permission to create a queue; it is asked for by deleting it, so nobody may have one of this name."""
        try:
            await self.delete(queue)
        except ChannelClosed as error:
            if error.code == ACCESS_REFUSED:
                return False
            raise
        return True

    async def purge(self, queue: str) -> int:
        """Delete what is ready in a queue; how many. One that does not exist has none."""
        try:
            return await self.ask(lambda channel: channel.queue_purge(queue))
        except ChannelClosed as error:
            if error.code == NOT_FOUND:
                return 0
            raise

    def _arguments(self, spec: Spec, *, bounded: bool = False, own: bool = True) -> dict[str, FieldValue]:
        arguments: dict[str, FieldValue] = {"x-queue-type": "quorum" if spec.replicated else "classic"}
        if spec.replicated and self.version >= UNLIMITED_SINCE:
            arguments["x-delivery-limit"] = -1
        if not spec.replicated and own and "queue_type" not in spec.native:
            # As all are since 3.12; before, what waits fills the server's memory, and is slower.
            arguments["x-queue-mode"] = "lazy"
        if bounded and spec.max_length is not None:
            arguments |= {"x-max-length": spec.max_length, "x-overflow": "drop-head"}
        if bounded and spec.queue_type == "priority":
            arguments["x-max-priority"] = HIGHEST_PRIORITY
        return arguments

    async def _declare(self, spec: Spec, name: str, arguments: dict[str, FieldValue]) -> None:
        if spec.temporary:
            arguments = arguments | {"x-queue-type": "classic"}
        try:
            await self.ask(
                lambda channel: channel.queue_declare(
                    name, durable=not spec.temporary, exclusive=spec.temporary, arguments=arguments
                )
            )
        except ChannelClosed as error:
            if error.code == ACCESS_REFUSED:
                await self._must_exist(name)
            elif error.code in {PRECONDITION_FAILED, RESOURCE_LOCKED}:
                raise QueueConflict(
                    f"the queue {name!r} exists, and is not as it is declared here ({_words(arguments)}): {error.text}; "
                    "rename it, change one of the two, or use it as it is with native={'passive': 'true'}"
                ) from error
            else:
                raise

    async def _must_exist(self, name: str) -> None:
        if await self.count(name) is None:
            raise BrokerError(
                f"there is no queue {name!r} on the server, and it is not for us to create it; "
                "have it created, or give the user the permission to configure"
            )

    async def _rebound(self, spec: Spec) -> None:
        """A queue's bound is fixed when it is created: it is created anew, which only an empty one allows.

        What a receiver has in its hands would go with the queue, and AMQP counts it nowhere: so nobody may receive from it. What is
        published meanwhile goes to where delayed messages wait, and from there to the new queue; create() ends that. A message of the
        moment in which both receive comes twice.
        """
        there, later = await self.count(spec.name), await self.count(spec.later)
        if there is not None and later is not None and later.consumers:
            raise QueueConflict(
                f"the queue {spec.name!r} has receivers under another bound than max_length={spec.max_length}; "
                "stop them, and start again"
            )
        if there is not None and later is not None and not there.messages:
            await self._lead(spec, to=spec.later, away_from=spec.name)
            there = await self.count(spec.name)
            if there is not None and there.messages:
                await self._lead(spec, to=spec.name, away_from=spec.later)
        if there is not None and there.messages:
            raise QueueConflict(
                f"the queue {spec.name!r} holds {there.messages} messages under another bound than max_length={spec.max_length}; "
                "let it run empty, or purge it, and start again"
            )
        await self.delete(spec.name)
        await self._declare(spec, spec.name, self._arguments(spec, bounded=True))

    async def _lead(self, spec: Spec, *, to: str, away_from: str) -> None:
        """Let what is published for a queue go to another one instead; in between, both get it."""
        sources = [(self.exchange, routing_key(topic)) for topic in spec.topics]
        if spec.ordered:
            sources = [(spec.unkeyed, "")]
        if foreign := spec.native.get("exchange"):
            sources += [(foreign, key) for key in _foreign_keys(spec)]

        async def lead(channel: Channel) -> None:
            for exchange, key in sources:
                await channel.queue_bind(to, exchange, key)
            for exchange, key in sources:
                await channel.queue_unbind(away_from, exchange, key)

        await self._unless_refused(lead)

    async def _bind(self, spec: Spec) -> None:
        """Let the topics in. What we may not bind is bound already, or another's business."""
        if spec.ordered:
            await self.create_partitions(spec)
        topics = {routing_key(topic) for topic in spec.topics}

        async def bind(channel: Channel) -> None:
            if spec.ordered:
                for source in (self.exchange, self.later_exchange):
                    for key in topics:
                        await channel.exchange_bind(spec.keyed, source, key)
            else:
                for key in topics:
                    await channel.queue_bind(spec.name, self.exchange, key)
                    await channel.queue_bind(spec.later, self.later_exchange, key)

        await self._unless_refused(bind)
        if foreign := spec.native.get("exchange"):
            await self._bind_to(spec, foreign)

    async def _bind_to(self, spec: Spec, exchange: str) -> None:
        """An exchange that others publish to: used as it is, created where it is missing."""
        kind = spec.native.get("exchange_type", "topic")
        try:
            await self.ask(lambda channel: channel.exchange_declare(exchange, kind, passive=True))
        except ChannelClosed as missing:
            if missing.code not in {NOT_FOUND, ACCESS_REFUSED}:
                raise
            try:
                await self.ask(lambda channel: channel.exchange_declare(exchange, kind))
            except ChannelClosed as error:
                raise QueueConflict(
                    f"the exchange {exchange!r} cannot be used as {kind}: {error.text}; see exchange_type in native"
                ) from error
        for key in _foreign_keys(spec):
            await self._unless_refused(
                lambda channel, key=key: channel.queue_bind(spec.name, exchange, key)  # type: ignore[misc]
            )

    async def create_partitions(self, spec: Spec) -> None:
        """Make sure that an ordered queue's partitions, their notes and bindings are there."""

        async def exchanges(channel: Channel) -> None:
            await channel.exchange_declare(spec.unkeyed, "fanout")
            await channel.exchange_declare(spec.keyed, "headers", arguments={"alternate-exchange": spec.unkeyed})
            await channel.queue_bind(spec.name, spec.unkeyed)

        await self._unless_refused(exchanges)
        for number, partition in enumerate(spec.partitions):
            await self._declare(spec, partition, self._arguments(spec) | {"x-single-active-consumer": True})
            await self._declare(
                spec, notes_of(partition), self._arguments(spec) | {"x-max-length": 1, "x-overflow": "drop-head"}
            )

            async def bind(channel: Channel, number: int = number, partition: str = partition) -> None:
                for slot in range(number, SLOTS, PARTITIONS):
                    await channel.queue_bind(partition, spec.keyed, "", {"x-match": "all", SLOT: slot})

            await self._unless_refused(bind)

    async def _unless_refused(self, what: Callable[[Channel], Awaitable[None]]) -> None:
        try:
            await self.ask(what)
        except ChannelClosed as error:
            if error.code != ACCESS_REFUSED:
                raise BrokerError(f"the server refuses a binding: {error.text}") from error


def _foreign_keys(spec: Spec) -> list[str]:
    """The routing keys under which others publish to an exchange of theirs what is for this queue."""
    own = spec.native.get("routing_key")
    return [own] if own is not None else [routing_key(topic) for topic in spec.topics]


def _words(arguments: Mapping[str, FieldValue]) -> str:
    return ", ".join(f"{name.removeprefix('x-')}={value!s}" for name, value in sorted(arguments.items()))


def _int(text: str) -> int:
    return int(text) if text.isdigit() else 0
