"""Batches that are sent one after the other, and again where their answer was lost, without being done twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from conveyor.brokers.redis.link import Closed, ForgottenScript, Link, NoConnection, NotNow
from conveyor.brokers.redis.scripts import Script
from conveyor.errors import BrokerUnavailable

AGAIN_SECONDS: Final = 10.0
"""A batch whose answer was lost is sent again for so long; the server knows it by its number. Longer than a short outage."""
PAUSE_SECONDS: Final = 0.2
"""Before a batch is sent again to a server that cannot do it now (it loads its file, or is a replica)."""
MOST_ARGUMENTS: Final = 30_000
"""Of one batch, unless one item alone has more: the server does nothing else while it works on it."""
MOST_BYTES: Final = 8 * 1024 * 1024

Item = TypeVar("Item")


@dataclass(eq=False, slots=True)
class _Waiting(Generic[Item]):
    item: Item
    cost: int
    answer: asyncio.Future[Any]


@dataclass(eq=False, slots=True)
class _Batch(Generic[Item]):
    """What is on its way, or could not be packed."""

    waiting: list[_Waiting[Item]]
    number: int
    arguments: list[Any] = field(default_factory=list)
    known: Any = None
    posted: asyncio.Future[Any] | None = None
    failed: Exception | None = None


class Unknown(BrokerUnavailable):
    """The batch was sent, and nobody can tell whether it arrived."""


class Lane(Generic[Item]):
    """What comes while a batch is on its way is the next batch, so that many small calls cost no more than a few large ones.

    Batches have numbers, which grow, and there is one at a time: a batch that the server has done before is not done again.

    Parameters:
        pack: the arguments of a batch of items, and what unpack needs to know of them.
        unpack: gives, for a batch, what pack knew and the script's answer, the answer to each item.
    """

    def __init__(
        self,
        link: Link,
        script: Script,
        sender: str,
        pack: Callable[[Sequence[Item]], tuple[list[Any], Any]],
        unpack: Callable[[Sequence[Item], Any, Any], list[Any]],
    ) -> None:
        self._link = link
        self._script = script
        self._sender_name = sender
        self._pack = pack
        self._unpack = unpack
        self._waiting: list[_Waiting[Item]] = []
        self._number = 0
        self._sender: asyncio.Task[None] | None = None

    async def put(self, item: Item, *, arguments: int, size: int = 0) -> Any:
        """Have an item sent; its answer. Whoever is cancelled meanwhile does not stop it.

        Raises:
            BrokerUnavailable: it was not sent.
            Unknown: it was sent, and its answer was lost.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(item, max(arguments, size * MOST_ARGUMENTS // MOST_BYTES), answer))
        if self._sender is None:
            # The lane is free: the batch leaves at once, and not when a task has its turn.
            self._sender = asyncio.create_task(self._send(self._start(self._next())), name="redis lane")
        return await answer

    async def close(self) -> None:
        """Wait until everything is sent, or has failed."""
        if self._sender is not None:
            await asyncio.wait([self._sender])

    async def _send(self, batch: _Batch[Item]) -> None:
        try:
            await self._finish(batch)
            while self._waiting:
                await self._finish(self._start(self._next()))
        finally:
            self._sender = None

    def _next(self) -> list[_Waiting[Item]]:
        batch, cost = [self._waiting[0]], self._waiting[0].cost
        for each in self._waiting[1:]:
            cost += each.cost
            if cost > MOST_ARGUMENTS:
                break
            batch.append(each)
        del self._waiting[: len(batch)]
        return batch

    def _start(self, waiting: list[_Waiting[Item]]) -> _Batch[Item]:
        """Number and send a batch, if there is a connection."""
        self._number += 1
        batch = _Batch(waiting, self._number)
        try:
            batch.arguments, batch.known = self._pack([each.item for each in waiting])
            if self._link.is_ready:
                batch.posted = self._link.post(self._script, self._sender_name, batch.number, *batch.arguments)
        except BrokerUnavailable:
            pass  # it was lost in this moment, and nothing was sent
        except Exception as error:
            batch.failed = error
        return batch

    async def _finish(self, batch: _Batch[Item]) -> None:
        """Hear the answer to a batch, and give it to who waits."""
        try:
            if batch.failed is not None:
                raise batch.failed
            items = [each.item for each in batch.waiting]
            answers = self._unpack(items, batch.known, await self._ask(batch))
        except BaseException as error:
            for each in batch.waiting:
                if not each.answer.done():
                    each.answer.set_exception(_copy(error))
                    each.answer.exception()  # its caller may be gone
            if not isinstance(error, Exception):
                raise
            return
        for each, answer in zip(batch.waiting, answers, strict=True):
            if not each.answer.done():
                each.answer.set_result(answer)

    async def _ask(self, batch: _Batch[Item]) -> Any:
        """The answer to a batch, which is sent again until it is there."""
        loop = asyncio.get_running_loop()
        until = loop.time() + AGAIN_SECONDS
        lost = False
        while True:
            try:
                posted, batch.posted = batch.posted, None
                if posted is not None:
                    with contextlib.suppress(ForgottenScript):
                        return await posted
                await self._link.connect()
                return await self._link.run_now(self._script, self._sender_name, batch.number, *batch.arguments)
            except NotNow as error:  # the server did nothing
                if loop.time() >= until:
                    raise (Unknown(str(error)) if lost else error) from error
                await asyncio.sleep(PAUSE_SECONDS)
            except Closed as error:
                raise (Unknown(str(error)) if lost else error) from error
            except NoConnection as error:
                if not lost:
                    raise
                if loop.time() >= until:
                    raise Unknown(str(error)) from error
            except BrokerUnavailable as error:
                lost = True
                if loop.time() >= until:
                    raise Unknown(str(error)) from error


def _copy(error: BaseException) -> BaseException:
    """One of its own for each who waits: an exception that several tasks raise would gather the traces of all of them."""
    return type(error)(str(error)) if isinstance(error, BrokerUnavailable) else error
