"""Whatever is committed into the outbox reaches the broker, each key in its order, whoever dies and however the broker fails."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor.broker import Broker
from conveyor.core.message import Message
from conveyor.errors import BrokerUnavailable, PayloadTooLarge, PublishFailed
from conveyor.runtime import relay as relay_module
from conveyor.runtime.ledger import Ledger
from conveyor.runtime.outbox import Row
from conveyor.runtime.relay import Relay, next_round
from conveyor.runtime.transaction import Transaction

if TYPE_CHECKING:
    from servers.postgres import Postgres


class Tape:
    """A broker that writes down what it is given, and fails as it is told."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.taken: list[Message] = []
        self.changed = asyncio.Condition()
        self.before: Callable[[Sequence[Message]], Awaitable[None]] | None = None
        self.nowhere: frozenset[str] = frozenset()

    async def publish(self, messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        self.calls.append([message.id for message in messages])
        failure: BaseException | None = None
        try:
            if self.before is not None:
                await self.before(messages)
        except BaseException as error:
            failure = error
        left_out: set[str] = set()
        if isinstance(failure, PublishFailed):
            left_out = {*failure.refused, *failure.unknown}
        elif failure is not None:
            left_out = {message.id for message in messages}
        async with self.changed:
            self.taken += [message for message in messages if message.id not in left_out]
            self.changed.notify_all()
        if failure is not None:
            raise failure
        return self.nowhere.intersection(message.id for message in messages)

    @property
    def ids(self) -> list[str]:
        return [message.id for message in self.taken]

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(60), self.changed:
            await self.changed.wait_for(true)


class World:
    """A database, a broker, a clock, and any number of processes with a ledger and a relay each."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.tape = Tape()
        self.passed_seconds = 0.0
        self._stack = contextlib.AsyncExitStack()

    async def ledger(self, app: str = "shop") -> Ledger:
        made = Ledger(self.url, app=app, owner=uuid.uuid4().hex, clock=lambda: time.time() + self.passed_seconds)
        await made.migrate()
        self._stack.push_async_callback(made.close)
        return made

    async def relay(self, ledger: Ledger, **options: Any) -> Relay:
        """A relay at work."""
        made = Relay(ledger, cast("Broker", self.tape), **options)
        task = asyncio.create_task(made.run())
        self._stack.push_async_callback(stop, task)
        while not ledger.hands_off and not task.done():
            await asyncio.sleep(0)
        return made

    async def close(self) -> None:
        await self._stack.aclose()


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.fixture(params=["sqlite", "postgresql"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"
    else:
        postgres: Postgres = request.getfixturevalue("postgres")
        url = postgres.url()
    made = World(url)
    yield made
    await made.close()


def message(id: str, key: str | None = None) -> Message:
    return Message(id=id, topic=f"topic of {id}", body=b"{}", key=key)


async def commit(ledger: Ledger, relay: Relay | None, *messages: Message, required: bool = False) -> None:
    """A transaction that publishes, and its hand-off; without a relay its process dies before that."""
    async with ledger.transaction() as tx:
        tx.add(messages, require_subscriber=required)
    if relay is not None:
        relay.hand_off(tx.committed)


async def until_empty(ledger: Ledger) -> None:
    async with asyncio.timeout(60):
        while (await ledger.pending()).rows:
            await asyncio.sleep(0.01)


# -- hand-off --------------------------------------------------------------------------------------------------------------------


async def test_what_is_committed_reaches_the_broker_and_leaves_the_outbox(world: World) -> None:
    ledger = await world.ledger()
    relay = await world.relay(ledger)
    await commit(ledger, relay, message("1"), message("2", "k"))
    await relay.flush()
    assert world.tape.ids == ["1", "2"]
    assert (await ledger.pending()).rows == 0
    assert relay.sent == 2


async def test_what_gathers_while_the_broker_is_busy_goes_together(world: World) -> None:
    ledger = await world.ledger()
    relay = await world.relay(ledger)
    go_on = asyncio.Event()

    async def wait(_: Sequence[Message]) -> None:
        await go_on.wait()

    world.tape.before = wait
    await commit(ledger, relay, message("first"))
    while not world.tape.calls:
        await asyncio.sleep(0.001)
    for n in range(5):
        await commit(ledger, relay, message(f"m{n}"))
    go_on.set()
    await relay.flush()
    assert world.tape.calls == [["first"], [f"m{n}" for n in range(5)]]
    assert (await ledger.pending()).rows == 0


async def test_messages_of_one_key_go_one_after_the_other(world: World) -> None:
    ledger = await world.ledger()
    relay = await world.relay(ledger)
    await commit(
        ledger, relay, message("a1", "a"), message("b1", "b"), message("a2", "a"), message("x"), message("a3", "a")
    )
    await relay.flush()
    assert world.tape.calls == [["a1", "b1", "x"], ["a2"], ["a3"]]


async def test_rows_behind_their_key_are_sent_as_soon_as_it_is_free(world: World) -> None:
    ledger = await world.ledger()
    relay = await world.relay(ledger, poll_seconds=60.0)
    for n in range(20):
        await commit(ledger, relay, message(f"{n}", "k"))
    await world.tape.until(lambda: len(world.tape.taken) == 20)
    assert world.tape.ids == [str(n) for n in range(20)]
    await until_empty(ledger)


# -- what others left ------------------------------------------------------------------------------------------------------------


async def test_what_a_dead_process_had_claimed_is_sent_when_its_claim_has_ended(world: World) -> None:
    dead, alive = await world.ledger(), await world.ledger()
    dead.hands_off = True
    await commit(dead, None, message("1", "k"), message("2"))
    relay = await world.relay(alive, poll_seconds=0.01)
    await commit(alive, relay, message("3", "k"), message("4"))
    await world.tape.until(lambda: "4" in world.tape.ids)
    await relay.flush()
    assert world.tape.ids == ["4"], "the others are claimed, or behind what is claimed"
    world.passed_seconds += 11
    await world.tape.until(lambda: len(world.tape.taken) == 4)
    await until_empty(alive)
    assert world.tape.ids.index("1") < world.tape.ids.index("3")
    assert sorted(world.tape.ids) == ["1", "2", "3", "4"]


async def test_what_a_dead_process_left_is_not_sent_by_another_application(world: World) -> None:
    dead, other, heir = await world.ledger(), await world.ledger("billing"), await world.ledger()
    await commit(dead, None, message("left"))
    relay = await world.relay(other, poll_seconds=0.01)
    await commit(other, relay, message("own"))
    await world.tape.until(lambda: world.tape.ids == ["own"])
    await until_empty(other)
    assert await relay._sweep() is False
    assert (await heir.pending()).rows == 1
    await world.relay(heir)
    await world.tape.until(lambda: world.tape.ids == ["own", "left"])


async def test_what_a_dead_process_had_claimed_is_sent_at_once_where_its_death_was_seen(world: World) -> None:
    dead, alive = await world.ledger(), await world.ledger()
    dead.hands_off = True
    await commit(dead, None, message("1"))
    await world.relay(alive, poll_seconds=0.01)
    assert await alive.reclaim(dead.owner) == 1
    await world.tape.until(lambda: world.tape.ids == ["1"])


async def test_a_relay_that_ends_leaves_nothing_claimed(world: World) -> None:
    ledger = await world.ledger()
    relay = Relay(ledger, cast("Broker", world.tape))
    hanging = asyncio.Event()

    async def hang(_: Sequence[Message]) -> None:
        hanging.set()
        await asyncio.Event().wait()

    world.tape.before = hang
    task = asyncio.create_task(relay.run())
    await asyncio.sleep(0)
    await commit(ledger, relay, message("1"))
    await hanging.wait()
    await stop(task)
    await relay.flush()
    other = await world.ledger()
    assert [row.message.id for row in (await other.claim(10, 30.0)).rows] == ["1"]


async def test_a_transaction_that_commits_late_is_not_skipped(postgres: Postgres) -> None:
    world = World(postgres.url())
    ledger, late = await world.ledger(), await world.ledger()
    relay = await world.relay(ledger, poll_seconds=0.01)
    async with late.transaction() as tx:
        tx.add([message("late")])
        await write_outbox(late, tx)
        await commit(ledger, relay, message("early"))
        await world.tape.until(lambda: world.tape.ids == ["early"])
        await until_empty(ledger)
    await world.tape.until(lambda: world.tape.ids == ["early", "late"])
    await world.close()


async def write_outbox(ledger: Ledger, tx: Transaction) -> None:
    """As at the end of the transaction, whose COMMIT is then a while in coming."""
    connection = await tx.session.connection()
    await connection.run_sync(lambda sync: ledger.write_outbox(sync, tx._work._outgoing))
    tx._work._outgoing.clear()


async def test_of_one_key_a_later_seq_is_never_committed_first(world: World) -> None:
    first, second = await world.ledger(), await world.ledger()
    async with first.transaction() as tx:
        tx.add([message("1", "k")])
        await write_outbox(first, tx)
        other = asyncio.create_task(commit(second, None, message("2", "k")))
        done, _ = await asyncio.wait([other], timeout=0.2)
        assert not done
    await other
    claimed = await first.claim(10, 30.0)
    assert [row.message.id for row in claimed.rows] == ["1", "2"]


@pytest.mark.parametrize("seed", range(2))
async def test_several_relays_and_a_failing_broker_never_reorder_a_key(world: World, seed: int) -> None:
    chance = random.Random(seed)
    ledgers = [await world.ledger() for _ in range(3)]
    dead = await world.ledger()
    dead.hands_off = True
    failures = 15

    async def disturb(messages: Sequence[Message]) -> None:
        nonlocal failures
        await asyncio.sleep(chance.random() * 0.005)
        if failures and chance.random() < 0.5:
            failures -= 1
            if chance.random() < 0.5:
                raise BrokerUnavailable("gone for a moment")
            some = chance.sample(list(messages), 1)
            raise PublishFailed({}, {some[0].id: "the answer was lost"})

    world.tape.before = disturb
    relays = [await world.relay(ledger, poll_seconds=0.02) for ledger in ledgers]
    keys: list[str | None] = ["a", "b", None]
    written: dict[str | None, list[str]] = defaultdict(list)

    async def write(key: str | None) -> None:
        for n in range(20):
            ledger, relay = chance.choice([*zip(ledgers, relays, strict=True), (dead, None)])
            batch = [message(f"{key}-{n}-{part}", key) for part in range(chance.randrange(1, 3))]
            written[key] += [made.id for made in batch]
            await commit(ledger, relay, *batch)

    await asyncio.gather(*(write(key) for key in keys))
    await ledgers[0].reclaim(dead.owner)
    await until_empty(ledgers[0])
    assert set(world.tape.ids) == {id for ids in written.values() for id in ids}
    for key in ("a", "b"):
        first_time = list(dict.fromkeys(made.id for made in world.tape.taken if made.key == key))
        assert first_time == written[key]


# -- refusals and outages --------------------------------------------------------------------------------------------------------


async def test_a_message_that_the_broker_refuses_is_tried_again_then_parked_and_its_key_waits(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = await world.ledger()
    relay = await world.relay(ledger, attempts=3, poll_seconds=0.01)

    async def refuse(messages: Sequence[Message]) -> None:
        if bad := [made.id for made in messages if made.id == "bad"]:
            raise PublishFailed(dict.fromkeys(bad, "too large"))

    world.tape.before = refuse
    await commit(ledger, relay, message("bad", "k"), message("behind", "k"), message("free"))
    await world.tape.until(lambda: "free" in world.tape.ids)
    async with asyncio.timeout(60):
        while not (await ledger.pending()).parked:
            world.passed_seconds += 1
            await asyncio.sleep(0.02)
    assert sum("bad" in call for call in world.tape.calls) == 3
    [row] = await ledger.parked()
    assert (row.message.id, row.attempts, row.error) == ("bad", 3, "too large")
    assert world.tape.ids == ["free"]
    assert "holds up the later ones of its key (see: conveyor outbox list shop): too large" in caplog.text
    world.tape.before = None
    assert await ledger.unpark(["bad"]) == 1
    await world.tape.until(lambda: world.tape.ids == ["free", "bad", "behind"])


async def test_a_parked_message_that_is_discarded_lets_its_key_go_on(world: World) -> None:
    ledger = await world.ledger()
    relay = await world.relay(ledger, attempts=1, poll_seconds=0.01)

    async def refuse(messages: Sequence[Message]) -> None:
        if any(made.id == "bad" for made in messages):
            raise PayloadTooLarge("and does not say which")

    world.tape.before = refuse
    await commit(ledger, relay, message("bad", "k"), message("behind", "k"), message("other", "o"), message("free"))
    await world.tape.until(lambda: {"other", "free"} <= set(world.tape.ids))
    async with asyncio.timeout(60):
        while await ledger.discard(["bad"]) == 0:
            await asyncio.sleep(0.01)
    await world.tape.until(lambda: "behind" in world.tape.ids)
    await until_empty(ledger)


async def test_a_message_that_breaks_the_connection_each_time_does_not_hold_up_the_others(world: World) -> None:
    ledger = await world.ledger()
    relay = await world.relay(ledger, attempts=1, poll_seconds=0.01)

    async def break_connection(messages: Sequence[Message]) -> None:
        if any(made.id == "bad" for made in messages):
            raise PublishFailed({}, {made.id: "connection closed" for made in messages})

    world.tape.before = break_connection
    await commit(ledger, relay, *(message(id) for id in ("1", "2", "bad", "3")))
    await world.tape.until(lambda: {"1", "2", "3"} <= set(world.tape.ids))
    async with asyncio.timeout(60):
        while (await ledger.pending()).parked != 1:
            await asyncio.sleep(0.01)


async def test_without_a_queue_an_event_goes_nowhere_and_a_required_one_is_kept(world: World) -> None:
    ledger = await world.ledger()
    relay = await world.relay(ledger, attempts=1)
    world.tape.nowhere = frozenset({"event", "task"})
    await commit(ledger, relay, message("event"))
    await commit(ledger, relay, message("task"), required=True)
    await relay.flush()
    async with asyncio.timeout(60):
        while not (parked := await ledger.parked()):
            await asyncio.sleep(0.01)
    assert [(row.message.id, row.error) for row in parked] == [("task", "no queue receives topic 'topic of task'")]
    assert ((await ledger.pending()).rows, relay.unrouted) == (1, 1)


async def test_while_the_broker_is_away_messages_wait_and_then_all_go(world: World) -> None:
    ledger = await world.ledger()
    relay = await world.relay(ledger, poll_seconds=0.01)

    async def away(_: Sequence[Message]) -> None:
        raise BrokerUnavailable("nobody there")

    world.tape.before = away
    await commit(ledger, relay, message("1", "k"))
    await world.tape.until(lambda: len(world.tape.calls) >= 3)
    assert (relay.problem, ledger.hands_off) == ("BrokerUnavailable: nobody there", False)
    await commit(ledger, relay, message("2", "k"), message("3"))
    pending = await ledger.pending()
    assert (pending.rows, pending.parked) == (3, 0)
    assert pending.oldest_seconds > 0
    world.tape.before = None
    await until_empty(ledger)
    assert sorted(world.tape.ids) == ["1", "2", "3"]
    assert world.tape.ids.index("1") < world.tape.ids.index("2")
    await commit(ledger, relay, message("4"))
    await relay.flush()
    assert (relay.problem, ledger.hands_off) == ("", True)


async def test_a_broker_that_hangs_is_given_up_before_the_claim_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conveyor.runtime.ledger.HAND_OFF_SECONDS", relay_module.SAFETY_SECONDS + 0.1)
    ledger = await world.ledger()
    relay = await world.relay(ledger, poll_seconds=0.01)

    async def hang(_: Sequence[Message]) -> None:
        world.tape.before = None
        await asyncio.Event().wait()

    world.tape.before = hang
    await commit(ledger, relay, message("1"))
    await until_empty(ledger)
    assert world.tape.calls == [["1"], ["1"]]


async def test_claims_that_are_about_to_end_are_not_used(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = await world.ledger()
    relay = await world.relay(ledger, poll_seconds=60.0)
    monkeypatch.setattr("conveyor.runtime.ledger.HAND_OFF_SECONDS", relay_module.SAFETY_SECONDS / 2)
    await commit(ledger, relay, message("slept too long"))
    await relay.flush()
    assert world.tape.calls == []


async def test_a_database_server_that_dies_stops_the_relay_only_for_a_while(postgres: Postgres) -> None:
    world = World(postgres.url())
    ledger = await world.ledger()
    relay = await world.relay(ledger, poll_seconds=0.01)
    await commit(ledger, relay, message("1"))
    await relay.flush()
    await asyncio.to_thread(postgres.kill)
    async with asyncio.timeout(60):
        while not relay.problem:
            await asyncio.sleep(0.01)
    await asyncio.to_thread(postgres.start)
    async with asyncio.timeout(60):
        while relay.problem:
            await asyncio.sleep(0.01)
    await commit(ledger, relay, message("2"))
    await relay.flush()
    await until_empty(ledger)
    assert world.tape.ids == ["1", "2"]
    await world.close()


async def test_the_relay_forgets_old_inbox_rows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "PURGE_SECONDS", 0.01)
    ledger = await world.ledger()
    async with ledger.transaction(inbox=("w", ["1", "2", "3"])):
        pass
    world.passed_seconds += 8 * 86_400
    await world.relay(ledger)
    async with asyncio.timeout(60):
        while await ledger.seen("w", "1"):
            await asyncio.sleep(0.01)


# -- the rule --------------------------------------------------------------------------------------------------------------------

rows = st.lists(st.sampled_from(["a", "b", "c", None])).map(
    lambda keys: [Row(n, message(str(n), key)) for n, key in enumerate(keys)]
)


@given(rows, st.sets(st.sampled_from(["a", "b", "c"])))
def test_a_round_holds_the_oldest_of_every_key_that_is_not_stuck(rows: list[Row], stuck: set[str]) -> None:
    now, later = next_round(rows, stuck)
    assert sorted([*now, *later], key=lambda row: row.seq) == rows
    keys = [row.message.key for row in now if row.message.key is not None]
    assert len(keys) == len(set(keys))
    assert not stuck.intersection(keys)
    for row in later:
        assert row.message.key in stuck or any(
            other.seq < row.seq and other.message.key == row.message.key for other in now
        )
