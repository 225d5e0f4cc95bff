"""The SQLite broker: many processes of one host on one queue file, with no server.

Every broker object has one thread with one connection (writer.py), which decides what goes into a commit; store.py applies
statements.sql to the queues, queue_file.py keeps the file, and wake.py wakes other processes.

The connection gives up the interpreter's lock at every step of a statement, and behind a busy event loop each return of it may
take milliseconds. So a batch is one step, however many rows it has: rows go in as many-row VALUES or as JSON, and come out as one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, cast, get_args
from urllib.parse import parse_qsl, unquote, urlsplit
from weakref import WeakSet

import apsw
import msgspec

from conveyor.broker import Clock, DeadFilter, DeadLetter, Delivery, Feature, Queue, QueueInfo, Settlement
from conveyor.brokers.sqlite.queue_file import SQL, Durability, QueueFile, explain, read
from conveyor.brokers.sqlite.store import Receipt, Store, letter_of
from conveyor.brokers.sqlite.wake import WakeSockets
from conveyor.brokers.sqlite.writer import Call, Fetch, Publish, Settle, Writer, resolve
from conveyor.core.message import Message
from conveyor.errors import BrokerError, BrokerUnavailable, ConfigurationError

__all__ = ["Durability", "SqliteBroker", "SqliteSubscription", "from_url"]

log: Final = logging.getLogger("conveyor.sqlite")

_Result = TypeVar("_Result")


def from_url(url: str, *, owner: str | None, clock: Clock) -> SqliteBroker:
    """``sqlite:///relative.queue`` or ``sqlite:////absolute.queue``, with ``?durability=full|normal&network_filesystem=allow``.

    Raises:
        ConfigurationError: the URL has parts that make no sense here.
    """
    parts = urlsplit(url)
    if parts.netloc or len(parts.path) < 2 or parts.path.endswith("/") or parts.fragment:
        raise ConfigurationError(
            f"{url!r}: a SQLite URL is sqlite:///relative/path.queue or sqlite:////absolute/path.queue"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    durability, remote = options.pop("durability", "full"), options.pop("network_filesystem", "refuse")
    if options:
        raise ConfigurationError(
            f"{url!r}: unknown parameter {next(iter(options))!r}; known are durability and network_filesystem"
        )
    if durability not in get_args(Durability):
        raise ConfigurationError(f"{url!r}: durability is full or normal, not {durability!r}")
    if remote not in {"refuse", "allow"}:
        raise ConfigurationError(f"{url!r}: network_filesystem is refuse or allow, not {remote!r}")
    return SqliteBroker(
        Path(unquote(parts.path[1:])),
        durability=cast("Durability", durability),
        owner=owner,
        clock=clock,
        network_filesystem=remote == "allow",
    )


class _Unsettled:
    """Which subscriptions have which deliveries in their hands."""

    def __init__(self) -> None:
        self._claims: dict[int, tuple[SqliteSubscription, set[int]]] = {}

    def add(self, subscription: SqliteSubscription, deliveries: Sequence[Delivery]) -> None:
        """A claim was delivered; all of it has one token."""
        receipts = [cast("Receipt", each.receipt) for each in deliveries]
        self._claims[receipts[0][1]] = subscription, {seq for seq, _ in receipts}

    def remove(self, deliveries: Iterable[Delivery]) -> None:
        """These are no longer in anybody's hands."""
        ended: dict[int, list[int]] = {}
        for delivery in deliveries:
            seq, token = cast("Receipt", delivery.receipt)
            if token in ended:
                ended[token].append(seq)
            else:
                ended[token] = [seq]
        for token, ends in ended.items():
            subscription, seqs = self._claims.get(token, (None, set()))
            if subscription is not None:
                before = len(seqs)
                seqs.difference_update(ends)
                subscription.lets_go(before - len(seqs))
                if not seqs:
                    del self._claims[token]


class SqliteSubscription:
    """One receiver of one queue; made by SqliteBroker.subscribe()."""

    def __init__(
        self, writer: Writer, unsettled: _Unsettled, queue: str, prefetch: int, number: int, *, early: bool
    ) -> None:
        self._writer = writer
        self._unsettled = unsettled
        self._queue = queue
        self._prefetch = prefetch
        self._number = number
        self._early = early
        self._taken = 0
        self._room = asyncio.Event()
        self._fetches: set[asyncio.Future[Any]] = set()
        self._closed: BrokerError | None = None

    async def fetch(self, limit: int) -> list[Delivery]:
        """See conveyor.broker.Subscription. Waits, too, while prefetch deliveries are unsettled."""
        if limit < 1:
            raise ValueError("a fetch is for at least one message")
        while self._closed is None and self._taken >= self._prefetch:
            self._room.clear()
            await self._room.wait()
        if self._closed is not None:
            raise self._closed
        room = min(limit, self._prefetch - self._taken)
        future = self._writer.ask(Fetch(self._queue, room, self._early))
        self._fetches.add(future)
        self._taken += room
        got = 0
        try:
            deliveries: list[Delivery] = await future
            got = len(deliveries)
            self._unsettled.add(self, deliveries)
            return deliveries
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._writer.release(future.result())
            raise
        finally:
            self._fetches.discard(future)
            self.lets_go(room - got)

    def lets_go(self, number: int) -> None:
        """So many deliveries are no longer in its hands."""
        self._taken -= number
        if number:
            self._room.set()

    async def close(self) -> None:
        """See conveyor.broker.Subscription."""
        if self._closed is None:
            number = self._number
            self.end(BrokerUnavailable(f"this subscription of {self._queue!r} is closed"))
            await self._writer.ask(Call(lambda store: store.unsubscribe(number)))

    def end(self, why: BrokerError) -> None:
        """Take part no more; a fetch that waits raises why."""
        self._closed = self._closed or why
        self._room.set()
        for future in self._fetches:
            resolve(future, why)


class SqliteBroker:
    """A Broker (see conveyor.broker) on a file.

    Parameters:
        path: the queue file; its folder must exist. Beside it are its -wal, -shm and .ballast, and the folder .wake.
        durability: "full" survives a power cut, "normal" only the death of processes, and is several times faster on slow disks.
        owner: the identity under which it holds leases; made up where None.
        clock: gives Unix seconds. Whoever turns the clock by hand calls clock_turned() afterwards.
        network_filesystem: allow a file system whose locks do not hold between hosts; safe only where one host uses it.
    """

    missing: Mapping[Feature, str] = {}

    def __init__(
        self,
        path: str | Path,
        *,
        durability: Durability = "full",
        owner: str | None = None,
        clock: Clock = time.time,
        network_filesystem: bool = False,
    ) -> None:
        self.owner = owner or uuid.uuid4().hex
        self._path = Path(path).absolute()
        self._durability: Durability = durability
        self._network_filesystem = network_filesystem
        self._clock = clock
        self._writer: Writer | None = None
        self._subscriptions: WeakSet[SqliteSubscription] = WeakSet()
        self._process = 0

    async def open(self) -> None:
        """See conveyor.broker.Broker."""
        if self._writer is not None:
            return
        file = QueueFile(self._path, self._durability, network_filesystem=self._network_filesystem)
        self._sockets = WakeSockets(self._path)
        writer = Writer(Store(file, self.owner, self._sockets, self._clock), self._sockets, self._clock)
        try:
            await writer.start()
        except BaseException:
            self._sockets.close()
            raise
        self._writer, self._process = writer, os.getpid()
        self._unsettled = _Unsettled()
        writer.sweep_soon()

    async def close(self) -> None:
        """See conveyor.broker.Broker."""
        writer, self._writer = self._writer, None
        if writer is None or self._process != os.getpid():
            return
        for subscription in tuple(self._subscriptions):
            subscription.end(BrokerUnavailable("the broker is closed"))
        try:
            if self._sockets.listening:
                await writer.ask(Call(Store.leave))
        except BrokerError as error:
            log.warning(
                "%s was closed without giving back what it held; it comes back when its leases end: %s",
                self._path,
                error,
            )
        finally:
            await writer.stop()
            self._sockets.close()

    def clock_turned(self) -> None:
        """The clock was turned by hand: look what is due."""
        self._open_writer().wake()

    async def declare(self, queues: Sequence[Queue]) -> None:
        """See conveyor.broker.Broker."""
        if any(each.temporary for each in queues):
            self._listen()

        def declare(store: Store) -> None:
            for each in queues:
                if each.temporary:
                    store.register()
                store.declare(each)

        await self._call(declare)

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        """See conveyor.broker.Broker."""
        unheard: frozenset[str] = await self._open_writer().ask(Publish(messages, queue))
        return unheard

    async def subscribe(self, queue: str, prefetch: int, *, early: bool = False) -> SqliteSubscription:
        """See conveyor.broker.Broker."""
        writer = self._listen()

        def subscribe(store: Store) -> int:
            store.register()
            return store.subscribe(queue)

        number = await self._call(subscribe)
        subscription = SqliteSubscription(writer, self._unsettled, queue, prefetch, number, early=early)
        self._subscriptions.add(subscription)
        return subscription

    async def settle(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """See conveyor.broker.Broker. Raises PublishFailed, with nothing done, where an emitted message cannot be stored."""
        lost: list[Delivery] = await self._open_writer().ask(Settle(settlements))
        self._unsettled.remove([each.delivery for each in settlements])
        return lost

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """See conveyor.broker.Broker."""
        lost = await self._call(lambda store: store.extend(deliveries))
        self._unsettled.remove(lost)
        return lost

    async def reclaim(self, owner: str, why: str) -> int:
        """See conveyor.broker.Broker."""
        return await self._call(lambda store: store.reclaim(owner, why))

    async def queues(self) -> list[QueueInfo]:
        """See conveyor.broker.Broker."""
        now = self._clock()

        def info(row: tuple[Any, ...]) -> QueueInfo:
            (
                name,
                ordered,
                max_length,
                owner,
                lease_seconds,
                topics,
                ready,
                due,
                leased,
                expired,
                delayed,
                dead,
                since,
                since_due,
                sockets,
            ) = row
            sinces = [each for each in (since, since_due) if each is not None] or ([now] if expired else [])
            return QueueInfo(
                name=name,
                topics=tuple(msgspec.json.decode(topics)),
                ordered=bool(ordered),
                max_length=max_length,
                temporary=owner is not None,
                lease_seconds=lease_seconds,
                ready=ready + due + expired,
                in_flight=leased,
                delayed=delayed,
                dead=dead,
                oldest_seconds=max(0.0, now - min(sinces)) if sinces else None,
                consumers=sum(map(self._sockets.is_alive, msgspec.json.decode(sockets))),
            )

        return [info(row) for row in await self._read(SQL["info"], (now,))]

    async def dead_letters(self, which: DeadFilter, *, limit: int, after: str | None = None) -> list[DeadLetter]:
        """See conveyor.broker.Broker."""
        values = (int(after or 0), which.queue, which.id, which.reason, which.error, limit)
        return [letter_of(row) for row in await self._read(SQL["dead_letters"], values)]

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """See conveyor.broker.Broker."""
        await self._call(lambda store: store.bury(letters))

    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker. They wait behind what is in the queue already."""
        return await self._call(lambda store: store.redrive(letters))

    async def discard(self, letters: Sequence[DeadLetter]) -> int:
        """See conveyor.broker.Broker."""
        return await self._call(lambda store: store.discard(letters))

    async def purge(self, queue: str) -> int:
        """See conveyor.broker.Broker."""
        purged = 0
        while number := await self._call(lambda store: store.purge(queue)):
            purged += number
        return purged

    async def remove(self, queue: str, *, discard_dead: bool = False) -> None:
        """See conveyor.broker.Broker."""
        await self._call(lambda store: store.check_unused(queue, discard_dead=discard_dead))
        await self.purge(queue)  # in parts: others have their turn between them
        await self._call(lambda store: store.remove(queue, discard_dead=discard_dead))

    async def risks(self) -> list[str]:
        """See conveyor.broker.Broker. Of a broker that is not open, only what its settings say."""
        risks: list[str] = []
        if self._durability == "normal":
            risks.append(
                "durability=normal: the last messages may be lost when the machine loses power; leave it out, or accept that"
            )
        if self._network_filesystem:
            risks.append(
                "network_filesystem=allow: where locks do not hold between hosts, messages are lost; use the file from one host only"
            )
        if self._writer is not None and (full := await self._call(lambda store: store.file.low_disk())):
            risks.append(full)
        return risks

    def _open_writer(self) -> Writer:
        if self._writer is None:
            raise BrokerUnavailable(f"the broker on {self._path} is not open")
        if self._process != os.getpid():
            raise BrokerError(
                f"the broker on {self._path} was opened in another process, and SQLite's connections do not survive a fork;"
                " open one in each process (and start processes by spawn or forkserver)"
            )
        return self._writer

    def _listen(self) -> Writer:
        """Be seen alive, and wakeable, by the other processes."""
        writer = self._open_writer()
        self._sockets.listen(writer.wake)
        return writer

    async def _call(self, function: Callable[[Store], _Result]) -> _Result:
        result: _Result = await self._open_writer().ask(Call(function))
        return result

    async def _read(self, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        self._open_writer()
        try:
            return await asyncio.to_thread(read, self._path, statement, values)
        except apsw.Error as error:
            raise explain(error, self._path) from error
