"""The relay: brings the messages of the outbox to the broker, right after their commit or whenever somebody left them behind.

Claim, publish, delete: no database transaction is open while the broker is asked. Messages of one key go one after the other, each
after the broker has confirmed the one before. What a dead process had claimed is sent when its claim has ended.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from conveyor.broker import Broker
from conveyor.core.retry import RetryPolicy
from conveyor.core.settle import describe
from conveyor.errors import BrokerError, BrokerUnavailable, LedgerError, PublishFailed
from conveyor.runtime.journal import Journal
from conveyor.runtime.ledger import Ledger
from conveyor.runtime.outbox import NEVER, Claimed, Row, steady
from conveyor.runtime.points import point

log = logging.getLogger("conveyor.relay")

POLL_SECONDS: Final = 1.0
"""How often the relay looks for what other processes left; what is left in its own process wakes it at once."""
CLAIM_SECONDS: Final = 30.0
CLAIM_ROWS: Final = 500
SAFETY_SECONDS: Final = 2.0
"""Publishing ends so long before its claim does: time enough to delete the rows before others may send them again."""
FIRST_POLL_SECONDS: Final = 0.005
"""After something was left here: the older message of its key is on its way in some process, and soon gone."""
PURGE_SECONDS: Final = 60.0
PURGE_ROWS: Final = 1000
FREE_SECONDS: Final = 5.0
"""At the end: longest wait for the database, to free what is still claimed."""
UNROUTED_TOPICS: Final = 1000
"""Topics remembered as warned about."""
CAUTIOUS_AFTER: Final = 3
"""Failures in a row after which messages go one by one, so that one that breaks the connection cannot hold up all others."""
GATHERED_AT_MOST: Final = 10_000
"""Messages that wait in memory for the hand-off; beyond that (the broker hangs) they are left in the outbox."""
DEFAULT_ATTEMPTS: Final = 10
"""Refusals of one message before it is parked: eight minutes, in which a queue may be declared or a limit raised."""
REFUSED: Final = RetryPolicy(initial=1.0, maximum=300.0, jitter=0.2)
"""Back-off of one message that the broker refused."""
UNREACHABLE: Final = RetryPolicy(initial=0.1, maximum=5.0, jitter=0.5)
"""Back-off of everything while the broker cannot be reached."""


class Outcome(msgspec.Struct):
    """What became of some rows that were published together."""

    sent: list[Row] = []
    refused: list[tuple[Row, str]] = []
    unknown: list[tuple[Row, str]] = []


def next_round(rows: Sequence[Row], stuck: set[str]) -> tuple[list[Row], list[Row]]:
    """Split rows into those that may be published together now, the first of every key and all without one, and the rest.

    Parameters:
        rows: in the order of their seq.
        stuck: keys of which a message could not be sent: the later ones stay behind it.
    """
    now: list[Row] = []
    later: list[Row] = []
    taken = set(stuck)
    for row in rows:
        key = row.message.key
        if key in taken:
            later.append(row)
            continue
        now.append(row)
        if key is not None:
            taken.add(key)
    return now, later


class Relay:
    """Sends what the ledger's outbox holds. Any number of them may run, in any number of processes.

    Parameters:
        journal: notes what was published; None where it is off.
        attempts: refusals by the broker after which a message is parked; a parked message blocks the later ones of its key.
        poll_seconds: how often it looks for what other processes left.
    """

    def __init__(
        self,
        ledger: Ledger,
        broker: Broker,
        *,
        journal: Journal | None = None,
        attempts: int = DEFAULT_ATTEMPTS,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.problem = ""
        """Why nothing can be sent now; "" while all is well."""
        self.sent = 0
        """Messages that the broker has taken."""
        self.unrouted = 0
        """Those of them that went nowhere, because no queue receives their topic."""
        self._ledger = ledger
        self._broker = broker
        self._journal = journal
        self._attempts = attempts
        self._poll_seconds = poll_seconds
        self._running = False
        self._failures = 0
        self._gathered: list[Claimed] = []
        self._gathered_rows = 0
        self._handing_off = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._left = asyncio.Event()
        self._behind = False
        self._unrouted_topics: set[str] = set()

    def hand_off(self, claimed: Claimed) -> None:
        """Send, in the background, what a transaction has just committed; what gathers meanwhile goes together. Waits for nothing."""
        if claimed.left:
            self._wake()
        if not claimed.rows or not self._running or self._gathered_rows > GATHERED_AT_MOST:
            return
        self._gathered.append(claimed)
        self._gathered_rows += len(claimed.rows)
        self._idle.clear()
        self._handing_off.set()

    async def flush(self) -> None:
        """Wait until everything that was handed off is with the broker, or left to be sent later."""
        await self._idle.wait()

    async def run(self) -> None:
        """Work until cancelled: hand off, look for what was left, and forget old inbox rows."""
        self._running = self._ledger.hands_off = True
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._hand_off_loop(), name="relay hand-off")
                group.create_task(self._sweep_loop(), name="relay sweep")
                group.create_task(self._purge_loop(), name="relay purge")
        finally:
            self._running = self._ledger.hands_off = False
            self._gathered, self._gathered_rows = [], 0
            self._idle.set()
            await self._free()

    # -- right after the commit

    async def _hand_off_loop(self) -> None:
        while True:
            await self._handing_off.wait()
            self._handing_off.clear()
            gathered, self._gathered, self._gathered_rows = self._gathered, [], 0
            await self._hand_off(gathered)
            if not self._gathered:
                self._idle.set()
            if self._behind:
                self._wake()

    async def _hand_off(self, gathered: Sequence[Claimed]) -> None:
        """Publish all in one go, delete all in one go; what fails is left to the sweep, which does not give up."""
        timely = [claimed for claimed in gathered if claimed.seconds_left() > SAFETY_SECONDS]
        rows = sorted((row for claimed in timely for row in claimed.rows), key=lambda row: row.seq)
        if rows:
            try:
                if self.problem:  # these were committed while it began
                    await self._ledger.release([row.seq for row in rows])
                    return
                await self._send(Claimed(tuple(rows), min(claimed.until for claimed in timely)), "handoff")
            except (BrokerError, LedgerError) as error:
                self._failed(error)

    # -- what was left

    async def _sweep_loop(self) -> None:
        looks = 0
        while True:
            self._left.clear()
            try:
                found = await self._sweep()
                self._succeeded()
            except (BrokerError, LedgerError) as error:
                self._failed(error)
                await asyncio.sleep(UNREACHABLE.wait_seconds(self._failures, random.random()))
                continue
            if found:
                looks = 0
                continue
            if self._idle.is_set():
                self._behind = False
            looks += 1
            if await self._waited(min(self._poll_seconds, FIRST_POLL_SECONDS * 2 ** min(looks, 20))):
                looks = 0

    async def _sweep(self) -> bool:
        claimed = await self._ledger.claim(CLAIM_ROWS, CLAIM_SECONDS)
        if not claimed.rows:
            return False
        point("relay.claimed")
        await self._send(claimed, "relay")
        return True

    async def _waited(self, seconds: float) -> bool:
        """Wait about so long; True where something was left in this process meanwhile."""
        try:
            async with asyncio.timeout(seconds * random.uniform(0.5, 1.5)):
                await self._left.wait()
        except TimeoutError:
            return False
        return True

    def _wake(self) -> None:
        self._behind = True
        self._left.set()

    # -- sending

    async def _send(self, claimed: Claimed, where: str) -> None:
        """Bring claimed rows to the broker, in rounds that each wait for the one before, and delete them.

        Raises:
            BrokerError: the broker cannot be reached, or hangs; what was not sent is free again.
            LedgerError: the rows could not be deleted; they will be sent again.
        """
        sent: list[Row] = []
        stuck: set[str] = set()
        rest: Sequence[Row] = claimed.rows
        trouble: BrokerError | None = None
        while trouble is None:
            now, rest = next_round(rest, stuck)
            if self._cautious:
                rest = sorted([*now[1:], *rest], key=lambda row: row.seq)
                now = now[:1]
            seconds = claimed.seconds_left() - SAFETY_SECONDS
            if not now or seconds <= 0:
                rest = [*now, *rest]
                break
            try:
                outcome = await self._publish(now, seconds, where)
            except BrokerError as error:
                trouble, rest = error, [*now, *rest]
                break
            sent += outcome.sent
            refused = outcome.refused
            if outcome.unknown:
                text = outcome.unknown[0][1]
                trouble = BrokerUnavailable(text)
                if self._cautious:  # alone, so it is this message that the broker cannot take
                    refused = outcome.unknown
                else:
                    rest = [*(row for row, _ in outcome.unknown), *rest]
            for row, why in refused:
                await self._put_off(row, why)
                if row.message.key is not None:
                    stuck.add(row.message.key)
        await self._ledger.sent([row.seq for row in sent])
        self.sent += len(sent)
        if where == "handoff" and sent:
            point("handoff.deleted")
        if rest:
            self._behind = True
            await self._ledger.release([row.seq for row in rest])
        if trouble is not None:
            raise trouble

    @property
    def _cautious(self) -> bool:
        return self._failures >= CAUTIOUS_AFTER

    async def _publish(self, rows: Sequence[Row], seconds: float, where: str) -> Outcome:
        """Publish some rows together, or, where that cannot be done and the broker does not say why, one by one.

        Raises:
            BrokerError: the broker is the problem, not these messages.
        """
        if where == "handoff":
            point("handoff.publishing")
        try:
            async with asyncio.timeout(seconds):
                nowhere = await self._broker.publish([row.message for row in rows])
        except PublishFailed as failed:
            outcome = _sorted_out(rows, failed)
        except BrokerError:
            raise
        except OSError as error:  # a TimeoutError is one
            raise BrokerUnavailable(describe(error)) from error
        except Exception as error:
            if len(rows) == 1:
                return Outcome(refused=[(rows[0], describe(error))])
            return await self._publish_one_by_one(rows, seconds, where)
        else:
            outcome = self._routed(rows, nowhere)
            if self._journal is not None:
                for row in rows:
                    self._journal.published(row.message, nowhere=row.message.id in nowhere)
        point(f"{where}.published")
        return outcome

    async def _publish_one_by_one(self, rows: Sequence[Row], seconds: float, where: str) -> Outcome:
        whole = Outcome()
        until = steady() + seconds
        for place, row in enumerate(rows):
            try:
                one = await self._publish([row], until - steady(), where)
            except BrokerError as error:
                whole.unknown += [(later, describe(error)) for later in rows[place:]]
                break
            whole.sent += one.sent
            whole.refused += one.refused
            whole.unknown += one.unknown
        return whole

    def _routed(self, rows: Sequence[Row], nowhere: Collection[str]) -> Outcome:
        """The broker took them all, and says which of them no queue receives."""
        outcome = Outcome()
        for row in rows:
            topic = row.message.topic
            if row.message.id not in nowhere:
                outcome.sent.append(row)
            elif row.required:
                outcome.refused.append((row, f"no queue receives topic {topic!r}"))
            else:
                outcome.sent.append(row)
                self.unrouted += 1
                if topic not in self._unrouted_topics and len(self._unrouted_topics) < UNROUTED_TOPICS:
                    self._unrouted_topics.add(topic)
                    log.info("no queue receives topic %r: its messages go nowhere (said once)", topic)
        return outcome

    async def _put_off(self, row: Row, why: str) -> None:
        attempt = row.attempts + 1
        if attempt < self._attempts:
            seconds = REFUSED.wait_seconds(attempt, random.random())
            log.warning("the broker refused message %s, again in %.0f s: %s", row.message.id, seconds, why)
        else:
            seconds = NEVER
            held_up = "" if row.message.key is None else " and holds up the later ones of its key"
            log.error(
                "the broker refused message %s %d times; it is parked%s (see: conveyor outbox list %s): %s",
                row.message.id,
                attempt,
                held_up,
                self._ledger.app,
                why,
            )
        await self._ledger.put_off(row.seq, why, seconds)

    # -- how it goes

    def _failed(self, error: BrokerError | LedgerError) -> None:
        """Nothing goes for now: from here on new rows are left to whoever gets through first."""
        if not self.problem:
            log.warning("messages stay in the outbox for now: %s", describe(error))
        self._failures += 1
        self.problem = describe(error)
        self._ledger.hands_off = False
        self._wake()

    def _succeeded(self) -> None:
        if self.problem:
            log.info("messages leave the outbox again")
        self._failures = 0
        self.problem = ""
        self._ledger.hands_off = True

    # -- housekeeping

    async def _purge_loop(self) -> None:
        while True:
            await asyncio.sleep(PURGE_SECONDS * random.uniform(0.5, 1.5))
            try:
                while await self._ledger.purge_inbox(PURGE_ROWS) == PURGE_ROWS:
                    pass
            except LedgerError as error:
                log.warning("the inbox could not be purged, trying again later: %s", describe(error))

    async def _free(self) -> None:
        """Let other relays have at once what this one still claims."""
        try:
            async with asyncio.timeout(FREE_SECONDS):
                await self._ledger.reclaim(self._ledger.owner)
        except (LedgerError, TimeoutError) as error:
            log.warning("claims of the outbox could not be freed, they end by themselves: %s", describe(error))


def _sorted_out(rows: Sequence[Row], failed: PublishFailed) -> Outcome:
    """What a failed publish says about each row; what it does not name, the broker owns."""
    outcome = Outcome()
    for row in rows:
        id = row.message.id
        if id in failed.refused:
            outcome.refused.append((row, failed.refused[id]))
        elif id in failed.unknown:
            outcome.unknown.append((row, failed.unknown[id]))
        else:
            outcome.sent.append(row)
    return outcome
