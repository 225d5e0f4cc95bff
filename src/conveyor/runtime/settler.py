"""Settlements on their way to the broker, in batches: what has gathered while one batch was under way is the next one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from conveyor.broker import Broker, Delivery, Settlement
from conveyor.core.retry import RetryPolicy
from conveyor.core.settle import Dead, Reason, Verdict, describe
from conveyor.core.words import counted
from conveyor.errors import BrokerError, BrokerFull, BrokerUnavailable, PublishFailed
from conveyor.runtime.points import point

log = logging.getLogger("conveyor.settle")

AGAIN: Final = RetryPolicy(initial=0.05, maximum=5.0)
"""How soon a settlement is tried again while the broker is away."""
LARGEST_BATCH: Final = 2_000
"""Settlements in one call: enough to make the fixed cost vanish, few enough that nobody waits long behind them."""
TRIES: Final = 4
"""So often a single settlement is tried that fails as no broker should fail; what passes by itself has passed by then."""


class Settler:
    """Settles for all workers of a runner.

    Parameters:
        broker: who carries the settlements out.
        lost: called with each delivery whose lease was lost.
        refused: called with each delivery whose verdict the broker did not take, with that one and with the one that it took instead.
    """

    def __init__(
        self,
        broker: Broker,
        lost: Callable[[Delivery], None],
        refused: Callable[[Delivery, Verdict, Dead], None] = lambda *_: None,
    ) -> None:
        self._broker = broker
        self._lost = lost
        self._refused = refused
        self._waiting: list[Settlement] = []
        self._wanted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.problem: str | None = None
        """Why settling does not succeed now, in words; None while it does."""

    def add(self, delivery: Delivery, verdict: Verdict) -> None:
        """Settle soon. Returns at once."""
        self._waiting.append(Settlement(delivery, verdict))
        if len(self._waiting) == 1:
            self._wanted.set()
            self._idle.clear()

    async def flush(self) -> None:
        """Wait until everything that was added is settled."""
        await self._idle.wait()

    async def run(self) -> None:
        """The loop: takes what has gathered, settles it, and tries for as long as the broker is away."""
        self._wanted.set()  # it may be started anew, after a failure
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while self._waiting:
                batch, self._waiting = self._waiting[:LARGEST_BATCH], self._waiting[LARGEST_BATCH:]
                for delivery in await self._settle(batch):
                    self._lost(delivery)
                del batch  # while it waits, it holds nothing of what is settled
                point("settled")
            self._idle.set()

    async def _settle(self, batch: list[Settlement]) -> list[Delivery]:
        """Settle these, whatever the broker raises; the deliveries whose lease is lost."""
        failures = 0
        refused: tuple[Delivery, Verdict, Dead] | None = None
        while True:
            try:
                lost = await self._broker.settle(batch)
            except (BrokerUnavailable, BrokerFull) as error:
                failures += 1
                self.problem = f"settling fails: {describe(error)}"
                if failures == 1:
                    log.warning(
                        "cannot settle %s, trying on: %s",
                        counted(len(batch), "delivery", "deliveries"),
                        describe(error),
                    )
                await asyncio.sleep(AGAIN.wait_seconds(failures, 0.5))
            except (
                Exception
            ) as error:  # the work of many processes may hang on this loop: it outlives its broker's mistakes, too
                self.problem = f"settling fails: {describe(error)}"
                failures += 1
                if isinstance(error, PublishFailed) and error.unknown:
                    await asyncio.sleep(AGAIN.wait_seconds(1, 0.5))
                elif len(batch) > 1:  # one of them is at fault, and the others must not wait for it
                    middle = len(batch) // 2
                    return [*await self._settle(batch[:middle]), *await self._settle(batch[middle:])]
                elif not isinstance(error, BrokerError) and failures < TRIES:
                    await asyncio.sleep(AGAIN.wait_seconds(failures, 0.5))
                elif isinstance(batch[0].verdict, Dead):  # nothing simpler is left; its lease will end
                    log.exception("message %s cannot be settled", batch[0].delivery.message.id)
                    self.problem = None  # it is its own, and said; the next settlement shows how the broker is
                    return [settlement.delivery for settlement in batch]
                else:
                    why = f"the broker refuses what its handler decided: {describe(error)}"
                    log.error("dead letter (%s): %s", Reason.REJECTED, why)
                    (settlement,) = batch
                    refused = settlement.delivery, settlement.verdict, Dead(Reason.REJECTED, why)
                    batch = [Settlement(settlement.delivery, refused[-1])]
                    failures = 0
            else:
                if failures:
                    log.info("settling works again after %s", counted(failures, "try", "tries"))
                self.problem = None
                if refused is not None and not lost:
                    self._refused(*refused)
                return lost
