"""What an application has open while it is connected: its broker, its ledger with the relay, its live tails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from conveyor.broker import Broker, Clock, Queue
from conveyor.runtime.ask import Asker
from conveyor.runtime.journal import Journal, journal_queue
from conveyor.runtime.loop import Loops
from conveyor.runtime.metrics import Metrics
from conveyor.runtime.watch import Watches

if TYPE_CHECKING:
    from conveyor.runtime.ledger import Ledger
    from conveyor.runtime.relay import Relay


class Connection:
    """An open broker and, where there is a database, an open ledger whose outbox is being relayed. Made by open()."""

    def __init__(
        self,
        broker: Broker,
        ledger: Ledger | None,
        relay: Relay | None,
        watches: Watches,
        journal: Journal | None,
        asker: Asker,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.broker = broker
        self.ledger = ledger
        self.relay = relay
        self.watches = watches
        self.journal = journal
        """None where the journal is off."""
        self.asker = asker
        """Asks the journal, this application's and those of the others on the broker."""
        self._stack = contextlib.AsyncExitStack()

    @classmethod
    async def open(
        cls,
        name: str,
        broker: Broker,
        queues: Sequence[Queue],
        ledger: Ledger | None,
        *,
        owns_broker: bool,
        migrate: bool | None,
        metrics: Metrics,
        clock: Clock,
        journal: bool,
        number: str | None,
    ) -> Self:
        """Open everything, and declare the queues.

        Parameters:
            name: the application's.
            owns_broker: open the broker here, and close it at the end; else it is open, and stays so.
            migrate: bring the ledger's tables up to date; None does it on SQLite only.
            journal: note what happens to messages.
            number: of this process below its supervisor; None where there is none.
        """
        async with contextlib.AsyncExitStack() as stack:
            if owns_broker:
                await broker.open()
                stack.push_async_callback(broker.close)
            await broker.declare([*queues, journal_queue(name)] if journal else queues)
            asker = Asker(broker, clock, name if journal else None)
            stack.push_async_callback(asker.close)
            noting = None
            if journal:
                noting = Journal(name, broker, metrics, clock, number)
                noting.start()
                stack.push_async_callback(noting.close)
            relay = None
            if ledger is not None:
                stack.push_async_callback(ledger.close)
                relay = await _relaying(ledger, broker, noting, stack, migrate=migrate)
            watches = Watches(broker, name)
            stack.push_async_callback(watches.close)
            connection = cls(broker, ledger, relay, watches, noting, asker)
            connection._stack = stack.pop_all()
        return connection

    async def close(self) -> None:
        """Close it all, last opened first; what was committed is handed to the broker before."""
        await self._stack.aclose()


async def _relaying(
    ledger: Ledger, broker: Broker, journal: Journal | None, stack: contextlib.AsyncExitStack, *, migrate: bool | None
) -> Relay:
    from conveyor.runtime.relay import Relay

    if migrate if migrate is not None else ledger.database.dialect == "sqlite":
        await ledger.migrate()
    await ledger.open()
    relay, loops = Relay(ledger, broker, journal=journal), Loops()
    stack.push_async_callback(loops.stop)
    stack.push_async_callback(relay.flush)
    loops.start("relay", relay.run)
    return relay
