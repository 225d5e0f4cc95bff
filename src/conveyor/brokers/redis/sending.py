"""Publishing and settling: what many callers want at the same time goes to the server as one step."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

from conveyor.broker import Delivery, Settlement
from conveyor.brokers.redis import scripts
from conveyor.brokers.redis.lane import MOST_ARGUMENTS, MOST_BYTES, Lane, Unknown
from conveyor.brokers.redis.link import Link
from conveyor.brokers.redis.wire import arguments_of, milliseconds, readable
from conveyor.core.message import Message
from conveyor.core.settle import Dead, Done, RetryAt
from conveyor.errors import BrokerError, PublishFailed

MOST_AT_ONCE: Final = 2_000
"""Leases of one command in a script: Lua hands no more than some 8,000 values to one."""


class _Chunk(NamedTuple):
    """Some messages of one call."""

    number: int
    arguments: list[Any]


class Publishing:
    """Publishes."""

    def __init__(self, link: Link, sender: str) -> None:
        self._lane = Lane[_Chunk](link, scripts.PUBLISH, sender, _pack_messages, _unpack_messages)
        self.close = self._lane.close

    async def publish(self, messages: Sequence[Message], queue: str | None) -> frozenset[str]:
        """See conveyor.broker.Broker.publish."""
        chunks, sent, refused = _chunks_of(messages, queue or "")
        if not sent:
            raise PublishFailed(refused=refused)
        if len(chunks) == 1:
            answers: list[Any] = [await self._put(*chunks[0])]
        else:
            answers = await asyncio.gather(*(self._put(*chunk) for chunk in chunks), return_exceptions=True)
        return _outcome(sent, refused, queue, chunks, answers)

    async def _put(self, chunk: _Chunk, size: int) -> Any:
        try:
            return await self._lane.put(chunk, arguments=len(chunk.arguments), size=size)
        except BrokerError as error:
            return error


def _chunks_of(
    messages: Sequence[Message], queue: str
) -> tuple[list[tuple[_Chunk, int]], list[Message], dict[str, str]]:
    """The messages in steps of bearable size, with each step's bytes; which ones these are, and why the others cannot be sent."""
    chunks: list[tuple[_Chunk, int]] = []
    sent: list[Message] = []
    refused: dict[str, str] = {}
    arguments: list[Any] = []
    count = size = 0
    for message in messages:
        try:
            said = arguments_of(message, queue)
        except ValueError as error:
            refused[message.id] = str(error)
            continue
        if count and (len(arguments) + len(said) > MOST_ARGUMENTS or size + len(message.body) > MOST_BYTES):
            chunks.append((_Chunk(count, arguments), size))
            arguments, count, size = [], 0, 0
        arguments += said
        count += 1
        size += len(message.body)
        sent.append(message)
    chunks.append((_Chunk(count, arguments), size))
    return chunks, sent, refused


def _outcome(
    sent: Sequence[Message],
    unfit: Mapping[str, str],
    queue: str | None,
    chunks: Sequence[tuple[_Chunk, int]],
    answers: Sequence[Any],
) -> frozenset[str]:
    """The ids of those that went nowhere; or the error that the answers make, and what could not be sent."""
    nowhere: set[str] = set()
    refused = dict(unfit)
    unknown: dict[str, str] = {}
    unsent: BrokerError | None = None
    start = 0
    for (chunk, _), answer in zip(chunks, answers, strict=True):
        here = sent[start : start + chunk.number]
        start += chunk.number
        if isinstance(answer, Unknown):
            unknown.update((message.id, str(answer)) for message in here)
        elif isinstance(answer, BrokerError):
            unsent = answer
            refused.update((message.id, str(answer)) for message in here)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            nobody, missing = answer
            if missing:
                raise BrokerError(f"there is no queue {queue!r}; declare it first")
            nowhere.update(here[position].id for position in nobody)
    if unsent is not None and not unfit and len(refused) == len({message.id for message in sent}):
        raise unsent
    if refused or unknown:
        raise PublishFailed(refused=refused, unknown=unknown)
    return frozenset(nowhere)


def _pack_messages(chunks: Sequence[_Chunk]) -> tuple[list[Any], Any]:
    if len(chunks) == 1:
        return chunks[0].arguments, None
    arguments: list[Any] = []
    for chunk in chunks:
        arguments += chunk.arguments
    return arguments, None


def _unpack_messages(chunks: Sequence[_Chunk], _: Any, answer: Any) -> list[Any]:
    nowhere, missing = answer
    if not nowhere and not missing:
        return [((), ())] * len(chunks)
    answers: list[Any] = []
    start = 0
    for chunk in chunks:
        end = start + chunk.number
        answers.append(tuple([each - start for each in found if start <= each < end] for found in (nowhere, missing)))
        start = end
    return answers


class _Ends(NamedTuple):
    """The settlements of one call, and what each emits, as publish() in queue.lua takes it."""

    settlements: Sequence[Settlement]
    emits: Mapping[int, list[Any]]


class Settling:
    """Settles and extends."""

    def __init__(self, link: Link, sender: str) -> None:
        self._link = link
        self._lane = Lane[_Ends](link, scripts.SETTLE, sender, self._pack, _unpack_lost)
        self._unordered: set[str] = set()
        self.close = self._lane.close

    def knows(self, queue: str, *, ordered: bool) -> None:
        """What kind of queue it is, for good: settling takes a shorter way where keys do not matter."""
        if not ordered:
            self._unordered.add(queue)

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """See conveyor.broker.Broker.settle."""
        arguments, size = 3 * len(settlements), 0
        emits: dict[int, list[Any]] = {}
        refused: dict[str, str] = {}
        for place, settlement in enumerate(settlements):
            verdict = settlement.verdict
            if type(verdict) is Done:
                if verdict.emits:
                    emits[place] = emitted = []
                    for message in verdict.emits:
                        size += len(message.body)
                        try:
                            emitted += arguments_of(message)
                        except ValueError as error:
                            refused[message.id] = str(error)
                    arguments += len(emitted)
            elif isinstance(verdict, Dead):
                size += len(verdict.error) + len(verdict.traceback)
            elif isinstance(verdict, RetryAt):
                size += len(verdict.error)
        if refused:
            raise PublishFailed(refused=refused)
        lost = await self._lane.put(_Ends(settlements, emits), arguments=arguments, size=size)
        return [settlements[position].delivery for position in lost]

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """See conveyor.broker.Broker.extend."""
        groups: dict[str, list[Delivery]] = {}
        for delivery in deliveries:
            groups.setdefault(delivery.queue, []).append(delivery)
        lost: set[object] = set()
        for queue, group in groups.items():
            for start in range(0, len(group), MOST_AT_ONCE):
                part = group[start : start + MOST_AT_ONCE]
                gone = await self._link.run(scripts.EXTEND, queue, len(part), *(each.receipt for each in part))
                lost.update(part[position].receipt for position in gone)
        return [each for each in deliveries if each.receipt in lost] if lost else []

    def _pack(self, batches: Sequence[_Ends]) -> tuple[list[Any], list[int]]:
        """The arguments, and which settlement (counted over all batches) is at which place in them."""
        fast: dict[str, list[tuple[int, str]]] = {}
        slow: list[tuple[int, Settlement, list[Any]]] = []
        seen: set[object] = set()
        unordered = self._unordered
        place = 0
        for batch in batches:
            for number, settlement in enumerate(batch.settlements):
                delivery, verdict = settlement.delivery, settlement.verdict
                receipt = cast("str", delivery.receipt)
                # What is settled twice comes behind the fast ones, in its order: there the first counts.
                if (
                    type(verdict) is Done
                    and not verdict.emits
                    and receipt not in seen
                    and (delivery.queue in unordered or delivery.message.key is None)
                ):
                    fast.setdefault(delivery.queue, []).append((place, receipt))
                else:
                    slow.append((place, settlement, batch.emits.get(number, [])))
                seen.add(receipt)
                place += 1
        arguments: list[Any] = []
        order: list[int] = []
        for queue, group in fast.items():
            for start in range(0, len(group), MOST_AT_ONCE):
                part = group[start : start + MOST_AT_ONCE]
                arguments += (queue, "F", len(part))
                for place, receipt in part:
                    order.append(place)
                    arguments.append(receipt)
        for place, settlement, emits in slow:
            order.append(place)
            arguments += _arguments_of(settlement, emits)
        return arguments, order


def _unpack_lost(batches: Sequence[_Ends], order: list[int], answer: Any) -> list[Any]:
    if not answer:
        return [()] * len(batches)
    lost = sorted(order[position] for position in answer)
    answers: list[Any] = []
    start = 0
    for batch in batches:
        end = start + len(batch.settlements)
        answers.append([place - start for place in lost if start <= place < end])
        start = end
    return answers


def _arguments_of(settlement: Settlement, emits: list[Any]) -> list[Any]:
    """One settlement as settle.lua takes it."""
    delivery, verdict = settlement.delivery, settlement.verdict
    key = delivery.message.key
    which: list[Any] = [delivery.receipt, "-" if key is None else "+" + key]
    if isinstance(verdict, Done):
        return [delivery.queue, "D", *which, len(verdict.emits), *emits]
    if isinstance(verdict, RetryAt):
        return [delivery.queue, "R", *which, milliseconds(verdict.due), readable(verdict.error)]
    if isinstance(verdict, Dead):
        said = readable(str(verdict.reason)), readable(verdict.error), readable(verdict.traceback)
        return [delivery.queue, "X", *which, *said]
    return [delivery.queue, "L", *which, milliseconds(verdict.due)]
