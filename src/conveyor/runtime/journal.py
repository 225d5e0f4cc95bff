"""The journal of one process: notes what happens to messages, and ships the notes in batches to the keeper."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from conveyor.broker import Broker, Clock, Delivery, Queue
from conveyor.core.journal import Batch, Entry, Kind
from conveyor.core.message import Message, uuid7
from conveyor.core.settle import Dead, Done, Release, RetryAt, Verdict, describe
from conveyor.errors import BrokerError, BrokerFull, BrokerUnavailable
from conveyor.runtime.loop import Loops
from conveyor.runtime.metrics import Metrics

log = logging.getLogger("conveyor.journal")

TOPIC: Final = "conveyor.journal"
"""Begins the names of the journal's queues and topics."""
CONTENT_TYPE: Final = "application/msgpack"
FLUSH_SECONDS: Final = 0.25
"""How long an entry waits for others to travel with; what a killed process had noted since then is lost."""
SOON_SECONDS: Final = 0.01
"""How long the end of a job waits: somebody may be waiting for its result."""
CAPACITY: Final = 20_000
"""Entries that wait to be shipped at most; beyond, they are dropped and counted."""
CAPACITY_BYTES: Final = 16 * 1024 * 1024
"""Bytes of results and tracebacks among them at most."""
LARGEST_BATCH: Final = 2_000
"""Entries in one message at most."""
LARGEST_BATCH_BYTES: Final = 256 * 1024
"""Bytes of results and tracebacks after which a batch is full."""
QUEUE_LENGTH: Final = 2_000
"""Batches that wait for a keeper at most; beyond, the broker drops the oldest."""
RUNNING_SECONDS: Final = 0.1
"""An attempt that runs for so long is noted while it runs; what ends sooner is noted by its end alone."""
LAST_FLUSH_SECONDS: Final = 2.0
"""How long the last batches may take when everything else has ended."""


def journal_queue(app: str) -> Queue:
    """Where the entries of an application's processes wait for its keeper."""
    name = f"{TOPIC}.{app}"
    return Queue(name=name, topics=(name,), max_length=QUEUE_LENGTH)


class Running(msgspec.Struct, frozen=True):
    """An attempt that runs now.

    Parameters:
        worker: its identity.
        started: Unix seconds.
    """

    worker: str
    delivery: Delivery
    started: float


class Journal:
    """Gathers entries and ships them; never waits, never raises, and drops what there is no room for.

    Parameters:
        app: whose keeper gets them.
        broker: open; the journal's queue is declared.
        metrics: counts what is dropped.
        clock: gives Unix seconds.
    """

    def __init__(self, app: str, broker: Broker, metrics: Metrics, clock: Clock) -> None:
        self.clock: Final = clock
        self.process: Final = f"{socket.gethostname()}/{os.getpid()}"
        self.at_work: list[Callable[[], Iterable[Running]]] = []
        """Each gives what runs now; runners add themselves."""
        self._queue = journal_queue(app)
        self._broker = broker
        self._metrics = metrics
        self._entries: list[Entry] = []
        self._bytes = 0
        self._progress: dict[str, Entry] = {}
        """The latest of each message since the last flush."""
        self._told: set[object] = set()
        """The receipts of what was running at the last flush, and has been noted."""
        self._unsent: list[Message] = []
        self._encode = msgspec.msgpack.Encoder().encode
        self._soon = asyncio.Event()
        self._loops = Loops()

    # --- noting -------------------------------------------------------------------------------------------------------

    def note(self, entry: Entry, *, soon: bool = False) -> None:
        """Take an entry in.

        Parameters:
            soon: somebody may be waiting for it: ship it at once.
        """
        weight = len(entry.traceback) if entry.result is None else len(entry.result)
        if len(self._entries) >= CAPACITY or self._bytes + weight > CAPACITY_BYTES:
            self._drop(1)
            return
        self._bytes += weight
        self._entries.append(entry)
        if soon:
            self._soon.set()

    def published(self, message: Message, worker: str = "") -> None:
        """A message was published.

        Parameters:
            worker: the identity of the worker whose handler did it; "" is a program.
        """
        ...

    def settled(self, worker: str, delivery: Delivery, verdict: Verdict, started: float | None, *, soon: bool) -> None:
        """A delivery has ended, and so (unless it is released or tried again) has the message.

        Parameters:
            worker: the identity of the worker that had it.
            started: Unix seconds when the attempt began; None where none was made.
            soon: somebody may be waiting for its result.
        """
        ...

    def progressed(self, worker: str, delivery: Delivery, done: float, total: float | None, note: str) -> None:
        """The attempt that runs says how far it is; of several between two flushes the last one counts."""
        ...

    # --- shipping -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to ship."""
        ...

    async def flush(self) -> None:
        """Ship now what has gathered."""
        ...

    async def close(self) -> None:
        """Ship what is left, without waiting long, and end."""
        ...
