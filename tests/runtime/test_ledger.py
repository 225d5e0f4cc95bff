"""A handler's effects, its inbox row and its events happen together and once, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import stat
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError, SQLAlchemyError

from conveyor.core.message import Message
from conveyor.core.retry import RetryPolicy
from conveyor.core.settle import Release, RetryAt, Verdict, verdict_on_error
from conveyor.errors import AlreadyHandled, ConfigurationError, LedgerBusy, LedgerError, LedgerUnavailable
from conveyor.runtime.database import trouble, wal_is_safe
from conveyor.runtime.ledger import Ledger
from conveyor.runtime.outbox import NEVER, Claimed, Outgoing
from conveyor.runtime.transaction import Transaction

if TYPE_CHECKING:
    from servers.postgres import Postgres

ADD = text("INSERT INTO effects (name) VALUES (:name)")


@dataclass
class World:
    """A database with Conveyor's tables and one of the application's own."""

    url: str
    ledgers: list[Ledger] = field(default_factory=list)

    @property
    def is_sqlite(self) -> bool:
        return self.url.startswith("sqlite")

    async def ledger(self, *, app: str = "shop", **options: Any) -> Ledger:
        """As another process would open it."""
        made = Ledger(self.url, app=app, owner=uuid.uuid4().hex, **options)
        self.ledgers.append(made)
        await made.open()
        return made

    async def effects(self) -> list[str]:
        async with self.ledgers[0].session() as session:
            return list((await session.execute(text("SELECT name FROM effects ORDER BY name"))).scalars())

    async def outbox(self) -> list[str]:
        async with self.ledgers[0].session() as session:
            return list((await session.execute(text("SELECT id FROM conveyor_outbox ORDER BY seq"))).scalars())


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.url()


async def prepare(url: str) -> None:
    ledger = Ledger(url, app="shop", owner="setup")
    await ledger.migrate()
    async with ledger.transaction() as tx:
        await tx.session.execute(text("CREATE TABLE effects (name varchar(100) NOT NULL)"))
        await tx.session.execute(text("CREATE TABLE once (name varchar(100) PRIMARY KEY)"))
    await ledger.close()


@pytest.fixture
async def world(url: str) -> AsyncIterator[World]:
    await prepare(url)
    made = World(url)
    yield made
    for ledger in made.ledgers:
        await ledger.close()


def message(id: str, key: str | None = None, **attributes: Any) -> Message:
    return Message(id=id, topic="thing.happened", body=b"{}", key=key, **attributes)


async def handle(ledger: Ledger, id: str, effect: str = "effect", *, worker: str = "w") -> Claimed:
    """A handler in miniature: one effect, one event."""
    async with ledger.transaction(inbox=(worker, id)) as tx:
        await tx.session.execute(ADD, {"name": effect})
        tx.add([message(f"{id}-emitted")])
    return tx.committed


# -- exactly once ----------------------------------------------------------------------------------------------------------------


async def test_a_repeat_is_unwound_where_it_touches_the_transaction(world: World) -> None:
    ledger = await world.ledger()
    await handle(ledger, "m")
    reached = []

    async def handler(tx: Transaction) -> None:
        reached.append("before")
        await tx.session.execute(ADD, {"name": "twice"})
        reached.append("after")

    with pytest.raises(AlreadyHandled) as caught:
        await handle_with(ledger, handler)
    assert reached == ["before"]
    assert (caught.value.worker, caught.value.message_ids) == ("w", ("m",))
    assert await world.effects() == ["effect"]
    assert await world.outbox() == ["m-emitted"]


async def test_a_repeat_that_never_touches_the_transaction_is_unwound_at_the_end(world: World) -> None:
    ledger = await world.ledger()
    await handle(ledger, "m")
    with pytest.raises(AlreadyHandled):
        async with ledger.transaction(inbox=("w", "m")) as tx:
            tx.add([message("again")])
    assert await world.outbox() == ["m-emitted"]


async def test_of_concurrent_repeats_in_several_processes_one_has_an_effect(world: World) -> None:
    ledgers = [await world.ledger() for _ in range(4)]
    results = await asyncio.gather(*(handle(ledger, "m") for ledger in ledgers * 2), return_exceptions=True)
    assert sum(isinstance(result, Claimed) for result in results) == 1
    assert sum(isinstance(result, AlreadyHandled) for result in results) == 7
    assert await world.effects() == ["effect"]


async def test_a_concurrent_repeat_waits_for_the_first_and_runs_when_that_fails(world: World) -> None:
    first, second = await world.ledger(), await world.ledger()
    touched, fail = asyncio.Event(), asyncio.Event()

    async def failing() -> None:
        async with first.transaction(inbox=("w", "m")) as tx:
            await tx.session.execute(ADD, {"name": "undone"})
            touched.set()
            await fail.wait()
            raise ZeroDivisionError

    async with asyncio.TaskGroup() as group:
        task = group.create_task(asyncio.wait_for(_raises(ZeroDivisionError, failing), 30))
        await touched.wait()
        repeat = group.create_task(handle(second, "m", "done"))
        done, _ = await asyncio.wait([repeat], timeout=0.2)
        assert not done
        fail.set()
        await task
    assert await world.effects() == ["done"]


async def handle_with(ledger: Ledger, handler: Callable[[Transaction], Awaitable[None]]) -> None:
    async with ledger.transaction(inbox=("w", "m")) as tx:
        await handler(tx)


async def _raises(kind: type[BaseException], body: Callable[[], Any]) -> None:
    with pytest.raises(kind):
        await body()


async def test_two_workers_each_handle_the_same_message(world: World) -> None:
    ledger = await world.ledger()
    await handle(ledger, "m", "a", worker="one")
    async with ledger.transaction(inbox=("two", "m")) as tx:
        await tx.session.execute(ADD, {"name": "b"})
    assert await world.effects() == ["a", "b"]


async def test_a_handled_message_is_seen_before_its_handler_runs(world: World) -> None:
    ledger = await world.ledger()
    assert not await ledger.seen("w", "m")
    await handle(ledger, "m")
    assert await ledger.seen("w", "m")
    assert not await ledger.seen("other", "m")


async def test_a_batch_with_some_repeats_is_undone_and_says_which(world: World) -> None:
    ledger = await world.ledger()
    await handle(ledger, "b")
    with pytest.raises(AlreadyHandled) as caught:
        async with ledger.transaction(inbox=("w", ["c", "b", "a"])) as tx:
            await tx.session.execute(ADD, {"name": "no"})
    assert caught.value.message_ids == ("b",)
    async with ledger.transaction(inbox=("w", ["c", "a"])) as tx:
        await tx.session.execute(ADD, {"name": "yes"})
    assert await world.effects() == ["effect", "yes"]
    assert [await ledger.seen("w", id) for id in "abc"] == [True, True, True]


# -- doomed, and staying so ------------------------------------------------------------------------------------------------------


async def _swallow_and_go_on(tx: Transaction) -> None:
    for _ in range(2):
        with contextlib.suppress(BaseException):
            await tx.session.execute(ADD, {"name": "no"})


async def _swallow_in_a_savepoint(tx: Transaction) -> None:
    with contextlib.suppress(BaseException):
        async with tx.session.begin_nested():
            await tx.session.execute(ADD, {"name": "no"})
    with contextlib.suppress(BaseException):
        await tx.session.execute(ADD, {"name": "no"})


async def _swallow_and_roll_back(tx: Transaction) -> None:
    with contextlib.suppress(BaseException):
        await tx.session.execute(ADD, {"name": "no"})
    await tx.session.rollback()
    with contextlib.suppress(BaseException):
        await tx.session.execute(ADD, {"name": "no"})


async def _swallow_and_commit(tx: Transaction) -> None:
    with contextlib.suppress(BaseException):
        await tx.session.execute(ADD, {"name": "no"})
    with contextlib.suppress(BaseException):
        await tx.session.commit()


async def _swallow_and_fail(tx: Transaction) -> None:
    with contextlib.suppress(BaseException):
        await tx.session.execute(ADD, {"name": "no"})
    raise ValueError("because of that")


@pytest.mark.parametrize(
    "handler",
    [_swallow_and_go_on, _swallow_in_a_savepoint, _swallow_and_roll_back, _swallow_and_commit, _swallow_and_fail],
)
async def test_a_handler_that_swallows_the_unwinding_changes_nothing_by_it(
    world: World, handler: Callable[[Transaction], Awaitable[None]]
) -> None:
    ledger = await world.ledger()
    await handle(ledger, "m")
    with pytest.raises(AlreadyHandled):
        await handle_with(ledger, handler)
    assert await world.effects() == ["effect"]
    await handle(ledger, "next", "next")
    assert await world.effects() == ["effect", "next"]


async def test_except_exception_does_not_take_the_unwinding_for_a_failure(world: World) -> None:
    ledger = await world.ledger()
    await handle(ledger, "m")
    made_up_for = []

    async def handler(tx: Transaction) -> None:
        try:
            await tx.session.execute(ADD, {"name": "no"})
        except Exception as error:
            made_up_for.append(error)

    with pytest.raises(AlreadyHandled):
        await handle_with(ledger, handler)
    assert made_up_for == []


async def test_a_failed_handler_leaves_neither_effect_nor_inbox_nor_outbox(world: World) -> None:
    ledger = await world.ledger()

    async def handler(tx: Transaction) -> None:
        await tx.session.execute(ADD, {"name": "no"})
        tx.add([message("no")])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await handle_with(ledger, handler)
    assert await world.effects() == []
    assert await world.outbox() == []
    assert not await ledger.seen("w", "m")
    await handle(ledger, "m")
    assert await world.effects() == ["effect"]


async def test_what_follows_a_rollback_is_a_whole_transaction_again(world: World) -> None:
    ledger = await world.ledger()
    async with ledger.transaction(inbox=("w", "m")) as tx:
        tx.add([message("before touch")])
        await tx.session.execute(ADD, {"name": "undone"})
        tx.add([message("undone")])
        await tx.session.rollback()
        tx.add([message("done")])
        await tx.session.execute(ADD, {"name": "done"})
    assert await world.effects() == ["done"]
    assert await world.outbox() == ["done"]
    assert await ledger.seen("w", "m")


async def test_a_rollback_to_a_savepoint_takes_back_what_was_published_since(world: World) -> None:
    ledger = await world.ledger()

    async def in_vain(tx: Transaction) -> None:
        async with tx.session.begin_nested():
            tx.add([message("no")])
            async with tx.session.begin_nested():
                await tx.session.execute(ADD, {"name": "no"})
                tx.add([message("no either")])
            raise ZeroDivisionError

    async with ledger.transaction(inbox=("w", "m")) as tx:
        tx.add([message("1")])
        with pytest.raises(ZeroDivisionError):
            await in_vain(tx)
        async with tx.session.begin_nested():
            await tx.session.execute(ADD, {"name": "yes"})
            tx.add([message("2")])
    assert await world.effects() == ["yes"]
    assert await world.outbox() == ["1", "2"]


@pytest.mark.parametrize("how", ["commit", "begin"])
async def test_a_handler_cannot_end_its_transaction_itself_and_is_told_so(world: World, how: str) -> None:
    ledger = await world.ledger()
    async with ledger.transaction(inbox=("w", "m")) as tx:
        await tx.session.execute(ADD, {"name": "kept"})
        with pytest.raises(InvalidRequestError, match="is committed when its block or handler ends"):
            await getattr(tx.session, how)()
        assert not await ledger.seen("w", "m")
    assert await world.effects() == ["kept"]


async def test_a_commit_behind_the_sessions_back_is_refused_and_undoes_everything(world: World) -> None:
    ledger = await world.ledger()

    async def handler(tx: Transaction) -> None:
        await tx.session.execute(ADD, {"name": "no"})
        with contextlib.suppress(SQLAlchemyError):
            await (await tx.session.connection()).commit()

    with pytest.raises(InvalidRequestError, match="committed from inside"):
        await handle_with(ledger, handler)
    assert await world.effects() == []
    await handle(ledger, "m")
    assert await world.effects() == ["effect"]


async def test_an_error_that_a_handler_swallowed_never_passes_for_a_commit(world: World) -> None:
    ledger = await world.ledger()
    async with ledger.transaction() as tx:
        await tx.session.execute(text("INSERT INTO once VALUES ('x')"))
    try:
        async with ledger.transaction(inbox=("w", "m")) as tx:
            await tx.session.execute(ADD, {"name": "effect"})
            with contextlib.suppress(SQLAlchemyError):
                await tx.session.execute(text("INSERT INTO once VALUES ('x')"))
        committed = True
    except SQLAlchemyError:
        committed = False  # PostgreSQL: its COMMIT would have been a silent rollback
    assert committed == world.is_sqlite
    assert await world.effects() == ["effect"] * committed
    assert await ledger.seen("w", "m") == committed


async def test_an_error_inside_a_savepoint_does_not_hurt_the_rest(world: World) -> None:
    ledger = await world.ledger()
    async with ledger.transaction(inbox=("w", "m")) as tx:
        await tx.session.execute(text("INSERT INTO once VALUES ('x')"))
        with contextlib.suppress(SQLAlchemyError):
            async with tx.session.begin_nested():
                await tx.session.execute(text("INSERT INTO once VALUES ('x')"))
        await tx.session.execute(ADD, {"name": "effect"})
    assert await world.effects() == ["effect"]


async def test_after_sqlite_rolled_back_by_itself_nothing_slips_out_of_the_transaction(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"
    await prepare(url)
    ledger = Ledger(url, app="shop", owner="me")

    async def rolled_back(tx: Transaction) -> None:
        await tx.session.execute(text("INSERT INTO once VALUES ('x')"))
        with contextlib.suppress(SQLAlchemyError):
            await tx.session.execute(text("INSERT OR ROLLBACK INTO once VALUES ('x')"))

    async def goes_on(tx: Transaction) -> None:
        await rolled_back(tx)
        with contextlib.suppress(LedgerError):
            await tx.session.execute(ADD, {"name": "outside"})

    async def begins_anew(tx: Transaction) -> None:
        await rolled_back(tx)
        await tx.session.rollback()
        await tx.session.execute(ADD, {"name": "anew"})

    with pytest.raises(LedgerError, match="rolled this transaction back"):
        await handle_with(ledger, goes_on)
    await handle_with(ledger, begins_anew)
    world = World(url, [ledger])
    assert await world.effects() == ["anew"]
    await ledger.close()


async def test_a_session_kept_beyond_its_transaction_cannot_be_used(world: World) -> None:
    ledger = await world.ledger()
    async with ledger.transaction() as tx:
        await tx.session.execute(ADD, {"name": "yes"})
    with pytest.raises(InvalidRequestError, match="closed"):
        await tx.session.execute(ADD, {"name": "no"})
    assert await world.effects() == ["yes"]


# -- opening late, holding little ------------------------------------------------------------------------------------------------


async def test_slow_work_before_the_first_touch_holds_no_lock(world: World) -> None:
    slow, other = await world.ledger(connections=1), await world.ledger()
    at_work, finish = asyncio.Event(), asyncio.Event()

    async def slow_handler() -> None:
        async with slow.transaction(inbox=("w", "slow")) as tx:
            tx.add([message("published before the slow work")])
            at_work.set()
            await finish.wait()
            await tx.session.execute(ADD, {"name": "slow"})

    async with asyncio.TaskGroup() as group:
        group.create_task(slow_handler())
        await at_work.wait()
        await handle(other, "quick", "other process")
        await handle(slow, "quick too", "same process, whose only connection is free")
        await handle(other, "slow", "even the same message", worker="another")
        finish.set()
    assert len(await world.effects()) == 4


async def test_a_transaction_that_does_nothing_does_nothing(world: World) -> None:
    ledger = await world.ledger()
    async with ledger.transaction() as tx:
        pass
    assert tx.committed == Claimed()


async def test_an_untouched_handler_still_notes_its_message_and_publishes(world: World) -> None:
    ledger = await world.ledger()
    async with ledger.transaction(inbox=("w", "m")) as tx:
        tx.add([message("emitted")])
    assert await ledger.seen("w", "m")
    assert await world.outbox() == ["emitted"]


async def test_a_cancelled_handler_leaves_nothing_locked(world: World) -> None:
    ledger = await world.ledger(connections=1)
    for _ in range(3):
        touched = asyncio.Event()

        async def stuck(touched: asyncio.Event = touched) -> None:
            async with ledger.transaction(inbox=("w", "m")) as tx:
                await tx.session.execute(ADD, {"name": "no"})
                touched.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(stuck())
        await touched.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await handle(ledger, "m")
    assert await world.effects() == ["effect"]


async def test_a_handler_cancelled_while_it_waits_for_the_lock_leaves_nothing_locked(world: World) -> None:
    holder, waiter = await world.ledger(), await world.ledger(connections=1)
    async with holder.transaction(inbox=("w", "m")) as tx:
        await tx.session.execute(ADD, {"name": "held"})
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await asyncio.create_task(handle(waiter, "m"))
    with pytest.raises(AlreadyHandled):
        await handle(waiter, "m")
    await handle(waiter, "n", "later")
    assert await world.effects() == ["held", "later"]


async def test_a_reading_session_cannot_write_and_sees_one_moment(world: World) -> None:
    ledger = await world.ledger()
    with pytest.raises(SQLAlchemyError):
        async with ledger.session() as session:
            await session.execute(ADD, {"name": "no"})
    assert await world.effects() == []


# -- publishing ------------------------------------------------------------------------------------------------------------------


async def test_publish_makes_the_message_and_stores_it_with_the_effects(world: World) -> None:
    def make(event: object, *, key: str | None = None) -> Message:
        return message(f"made of {event}", key=key)

    ledger = await world.ledger()
    async with ledger.transaction(make=make) as tx:
        made = await tx.publish("it", key="k")
        await tx.session.execute(ADD, {"name": "effect"})
    assert made == message("made of it", key="k")
    assert await world.outbox() == ["made of it"]


async def test_rows_are_claimed_for_the_hand_off_only_while_a_relay_is_at_work(world: World) -> None:
    ledger = await world.ledger()
    assert (await handle(ledger, "1")).left == 1
    ledger.hands_off = True
    committed = await handle(ledger, "2")
    assert [row.message.id for row in committed.rows] == ["2-emitted"]
    assert (committed.left, 0 < committed.seconds_left() <= 10) == (0, True)


async def test_rows_behind_an_unsent_one_of_their_key_are_left_to_the_relay(world: World) -> None:
    ledger = await world.ledger()
    ledger.hands_off = True
    async with ledger.transaction() as tx:
        tx.add([message("1", "k"), message("2", "k")])
    assert ([row.message.id for row in tx.committed.rows], tx.committed.left) == (["1", "2"], 0)
    async with ledger.transaction() as tx:
        tx.add([message("3", "k"), message("4", "other"), message("5")])
    assert ([row.message.id for row in tx.committed.rows], tx.committed.left) == (["4", "5"], 1)


async def test_more_messages_than_a_statement_takes_are_stored_in_order(world: World) -> None:
    ledger = await world.ledger()
    ids = [f"m{n}" for n in range(450)]
    async with ledger.transaction() as tx:
        tx.add(message(id, key=id) for id in ids)
    assert await world.outbox() == ids


async def test_an_id_that_is_published_twice_is_stored_once(world: World) -> None:
    ledger = await world.ledger()
    ledger.hands_off = True
    for _ in range(2):
        async with ledger.transaction() as tx:
            tx.add([message("same"), message("same")])
    assert tx.committed.rows == ()
    assert await world.outbox() == ["same"]


async def test_events_of_two_topics_may_have_one_id_and_both_are_kept(world: World) -> None:
    ledger = await world.ledger()
    paid = Message(id="order-1", topic="order.paid", body=b"{}")
    for sent in ([message("order-1"), paid], [paid], [message("order-1")]):
        async with ledger.transaction() as tx:
            tx.add(sent)
    assert [row.message for row in (await ledger.claim(10, 30.0)).rows] == [message("order-1"), paid]


async def test_a_repeat_within_a_transaction_is_handed_off_once(world: World) -> None:
    ledger = await world.ledger()
    ledger.hands_off = True
    async with ledger.transaction() as tx:
        tx.add([message("same"), message("same", created=5.0)])
    assert [row.message for row in tx.committed.rows] == [message("same")]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("other", [message("same", key="k"), Message(id="same", topic="thing.happened", body=b"[]")])
async def test_two_different_messages_of_one_id_are_refused_whole(world: World, other: Message, together: bool) -> None:
    ledger = await world.ledger()

    async def publish(*messages: Message) -> None:
        async with ledger.transaction() as tx:
            await tx.session.execute(ADD, {"name": "effect"})
            tx.add(messages)

    if together:
        with pytest.raises(LedgerError, match="an id names one message"):
            await publish(message("same"), other)
        assert (await world.outbox(), await world.effects()) == ([], [])
        return
    await publish(message("same"))
    with pytest.raises(LedgerError, match="an id names one message"):
        await publish(other)
    assert (await world.outbox(), await world.effects()) == (["same"], ["effect"])


NASTY = Message(
    id="i'd; --",
    topic="tøpic",
    body=bytes(range(256)),
    key="",
    headers={"a": "ü\n\\\"'", "": ""},
    content_type="x/y",
    correlation_id="c",
    causation_id="d",
    created=1732228496.123456789,
    due=1e-9,
    expires=0.1 + 0.2,
    priority=9,
)


async def test_every_field_of_a_message_is_stored_exactly(world: World) -> None:
    ledger = await world.ledger()
    sent = [NASTY, message("plain"), Message(id="big", topic="t", body=b"\x00" * 300_000)]
    async with ledger.transaction() as tx:
        tx.add(sent)
    assert [row.message for row in (await ledger.claim(10, 30.0)).rows] == sent


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
seconds = st.floats(0, 1e12, allow_nan=False)
messages = st.builds(
    Message,
    id=words,
    topic=words,
    body=st.binary(max_size=100),
    key=st.none() | words,
    headers=st.dictionaries(words, words, max_size=3),
    content_type=words,
    correlation_id=st.none() | words,
    causation_id=st.none() | words,
    created=seconds,
    due=seconds,
    expires=st.none() | seconds,
    priority=st.integers(0, 9),
)


@settings(max_examples=20)
@given(batch=st.lists(messages, max_size=5, unique_by=lambda made: made.id))
def test_any_message_is_stored_exactly_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, batch: list[Message]
) -> None:
    async def story() -> list[Message]:
        ledger = Ledger(f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('any') / 'app.db'}", app="shop", owner="me")
        await ledger.migrate()
        async with ledger.transaction() as tx:
            tx.add(batch)
        claimed = await ledger.claim(10, 30.0)
        await ledger.close()
        return [row.message for row in claimed.rows]

    assert asyncio.run(story()) == batch


# -- retention -------------------------------------------------------------------------------------------------------------------


async def test_the_inbox_forgets_after_its_days_and_not_before(world: World) -> None:
    now = time.time()
    ledger = await world.ledger(clock=lambda: now, inbox_days=2.0)
    await handle(ledger, "old", worker="w")
    now += 1.5 * 86_400
    async with ledger.transaction(inbox=("w", ["young", "young too"])):
        pass
    assert await ledger.purge_inbox() == 0
    now += 0.6 * 86_400
    assert await ledger.purge_inbox() == 1
    assert (await ledger.seen("w", "old"), await ledger.seen("w", "young")) == (False, True)
    now += 2 * 86_400
    assert [await ledger.purge_inbox(limit=1) for _ in range(3)] == [1, 1, 0]


# -- set-up ----------------------------------------------------------------------------------------------------------------------


async def test_without_its_tables_it_names_the_command_that_makes_them(url: str) -> None:
    ledger = Ledger(url, app="shop", owner="me")
    with pytest.raises(LedgerError, match="conveyor migrate"):
        await ledger.open()
    assert len(await ledger.migrate()) > 0
    await ledger.open()
    assert await ledger.migrate() == []
    await ledger.close()


async def test_two_applications_on_one_database_neither_see_nor_touch_each_others_rows(world: World) -> None:
    now = time.time()
    shop, billing = await world.ledger(), await world.ledger(app="billing", inbox_days=1.0, clock=lambda: now)
    await handle(shop, "m", "of shop")
    await handle(billing, "m", "of billing")
    assert await world.effects() == ["of billing", "of shop"]
    async with billing.transaction() as tx:
        tx.add([message("first", "k")])
    shop.hands_off = True
    async with shop.transaction() as tx:
        tx.add([message("second", "k")])
    assert [row.message.id for row in tx.committed.rows] == ["second"], "what billing has of this key is none of shop's"
    assert ((await shop.pending()).rows, (await billing.pending()).rows) == (2, 2)
    assert [row.message.id for row in (await billing.claim(10, 30.0)).rows] == ["m-emitted", "first"]
    assert [row.message.id for row in (await shop.claim(10, 30.0)).rows] == ["m-emitted"]
    await park(billing, "parked")
    assert ((await shop.pending()).parked, (await billing.pending()).parked) == (0, 1)
    assert await shop.parked() == []
    assert await shop.unpark(["parked"]) == await shop.discard(["parked"]) == await shop.reclaim(billing.owner) == 0
    assert await billing.discard(["parked"]) == 1
    now += 2 * 86_400
    assert await billing.purge_inbox() == 1
    assert await shop.seen("w", "m")
    assert not await billing.seen("w", "m")


async def park(ledger: Ledger, id: str) -> None:
    async with ledger.transaction() as tx:
        tx.add([message(id)])
    for row in (await ledger.claim(10, 30.0)).rows:
        await ledger.put_off(row.seq, "refused", NEVER)


async def test_of_one_key_two_applications_do_not_wait_for_each_other(postgres: Postgres) -> None:
    world = World(postgres.url())
    await prepare(world.url)
    shop, billing = await world.ledger(), await world.ledger(app="billing", lock_seconds=1.0)
    async with shop.transaction() as tx:
        connection = await tx.session.connection()
        await connection.run_sync(lambda sync: shop.write_outbox(sync, [Outgoing(message("1", "k"), required=False)]))
        async with billing.transaction() as other:
            other.add([message("2", "k")])
    assert await world.outbox() == ["1", "2"]
    for ledger in world.ledgers:
        await ledger.close()


async def test_two_prefixes_keep_apart_what_they_hold(url: str) -> None:
    await prepare(url)
    one, two = Ledger(url, app="shop", owner="me"), Ledger(url, app="shop", owner="me", prefix="other_")
    await two.migrate()
    async with one.transaction(inbox=("w", "m")) as tx:
        tx.add([message("a")])
    assert not await two.seen("w", "m")
    assert (await two.pending()).rows == 0
    await one.close()
    await two.close()


MIGRATE = """
import asyncio, sys
from conveyor.runtime.ledger import Ledger
async def main():
    ledger = Ledger(sys.argv[1], app="shop", owner="me")
    sys.stdin.readline()
    print(len(await ledger.migrate()))
    await ledger.open()
    await ledger.close()
asyncio.run(main())
"""


def test_of_four_processes_that_migrate_at_once_one_does_it(url: str) -> None:
    command = [sys.executable, "-W", "error", "-c", MIGRATE, url]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    done = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    assert sorted(count > 0 for count in done) == [False, False, False, True]


async def test_a_database_file_that_it_creates_is_private(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    ledger = Ledger(f"sqlite+aiosqlite:///{path}", app="shop", owner="me")
    await ledger.migrate()

    def modes() -> set[int]:
        return {stat.S_IMODE(found.stat().st_mode) for found in tmp_path.iterdir()}

    assert await asyncio.to_thread(modes) == {0o600}
    await ledger.close()


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 45, 1), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 52, 0), False),
        ((3, 52, 1), True),
        ((3, 54, 1), True),
    ],
)
def test_wal_is_used_only_where_it_cannot_lose_commits(version: tuple[int, int, int], safe: bool) -> None:
    assert wal_is_safe(version) is safe


async def test_a_sqlite_ledger_is_durable_and_in_the_safe_journal_mode(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    sqlite3.connect(path).execute("PRAGMA journal_mode = WAL").connection.close()
    ledger = Ledger(f"sqlite+aiosqlite:///{path}", app="shop", owner="me")
    await ledger.migrate()
    async with ledger.transaction() as tx:
        found = [
            (await tx.session.execute(text(f"PRAGMA {name}"))).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    await ledger.close()
    assert found == ["wal" if wal_is_safe(sqlite3.sqlite_version_info) else "truncate", 2, 1]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("postgresql://joe:secret@db/shop", "write postgresql+asyncpg://joe:***@db/shop"),
        ("postgresql+psycopg2://db/shop", "write postgresql+asyncpg://db/shop"),
        ("postgres://db/shop", "write postgresql+asyncpg://db/shop"),
        ("sqlite:///shop.db", "write sqlite+aiosqlite:///shop.db"),
        ("sqlite+pysqlite:///shop.db", "write sqlite+aiosqlite:///shop.db"),
        ("sqlite+aiosqlite://", "needs a file"),
        ("sqlite+aiosqlite:///:memory:", "needs a file"),
        ("mysql+aiomysql://db/shop", "PostgreSQL and SQLite"),
        ("shop.db", "no database URL, it has no driver://"),
        ("joe:secret@db/shop", "no database URL, it has no driver://"),
        ("postgresql+asyncpg:/joe:secret@db/shop", "no database URL, it has no driver://"),
        ("postgresql+asyncpg://joe:secret@db:secret/shop", "no database URL, its port is no number"),
    ],
)
def test_a_url_that_cannot_work_is_refused_with_what_to_write_instead(wrong: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(hint)) as caught:
        Ledger(wrong, app="shop", owner="me")
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_a_prefix_that_is_no_plain_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="prefix"):
        Ledger("sqlite+aiosqlite:///x.db", app="shop", owner="me", prefix="a; DROP TABLE b")


def test_without_sqlalchemy_the_extra_to_install_is_named() -> None:
    code = "import sys; sys.modules['sqlalchemy'] = None\nimport conveyor.runtime.ledger"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'conveyor[ledger]'" in done.stderr


@pytest.mark.parametrize("where", ["no/such/folder/app.db", "."])
async def test_a_file_that_cannot_be_created_is_a_clear_error(tmp_path: Path, where: str) -> None:
    ledger = Ledger(f"sqlite+aiosqlite:///{tmp_path / where}", app="shop", owner="me")
    with pytest.raises(LedgerError, match=re.escape(str(tmp_path))):
        await ledger.migrate()
    await ledger.close()


# -- faults of the database ------------------------------------------------------------------------------------------------------


async def test_a_database_locked_for_too_long_is_busy_and_then_works_again(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'app.db'}"
    await prepare(url)
    ledger = Ledger(url, app="shop", owner="me", lock_seconds=0.2)
    other = sqlite3.connect(tmp_path / "app.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerBusy, match="locked"):
        await handle(ledger, "m")
    other.execute("ROLLBACK")
    other.close()
    await handle(ledger, "m")
    await ledger.close()


async def test_a_server_that_is_not_there_is_unavailable(free_port: int) -> None:
    ledger = Ledger(f"postgresql+asyncpg://joe:secret@127.0.0.1:{free_port}/x", app="shop", owner="me")
    with pytest.raises(LedgerUnavailable) as caught:
        await ledger.open()
    assert "secret" not in str(caught.value)
    await ledger.close()


@pytest.mark.parametrize("fault", ["kill", "restart"])
async def test_a_server_that_dies_under_a_handler_takes_its_transaction_along_and_the_next_one_works(
    postgres: Postgres, fault: str
) -> None:
    world = World(postgres.url())
    await prepare(world.url)
    ledger = await world.ledger()
    await handle(ledger, "before", "before")

    async def handler(tx: Transaction) -> None:
        await tx.session.execute(ADD, {"name": "no"})
        await asyncio.to_thread(getattr(postgres, fault))

    with pytest.raises(LedgerUnavailable):
        await handle_with(ledger, handler)
    await asyncio.to_thread(postgres.start)
    await handle(ledger, "m", "after")
    assert await world.effects() == ["after", "before"]
    await ledger.close()


async def test_a_handler_that_falls_silent_in_its_transaction_is_cut_off(postgres: Postgres) -> None:
    world = World(postgres.url())
    await prepare(world.url)
    silent, other = await world.ledger(idle_seconds=0.2), await world.ledger()

    async def handler(tx: Transaction) -> None:
        await tx.session.execute(ADD, {"name": "no"})
        await handle(other, "m", "yes")  # waits until the silent one is cut off

    with pytest.raises(LedgerBusy, match="nothing was asked of it"):
        await handle_with(silent, handler)
    assert await world.effects() == ["yes"]
    for ledger in world.ledgers:
        await ledger.close()


class CommitCutter:
    """A proxy that lets COMMIT through, and cuts the line before the answer comes back."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._pumps: set[asyncio.Task[None]] = set()
        self.armed = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        cut = asyncio.Event()

        async def forth() -> None:
            while data := await reader.read(65536):
                if self.armed and b"COMMIT;" in data:
                    self.armed = False
                    cut.set()
                server_writer.write(data)
                await server_writer.drain()

        async def back() -> None:
            while data := await server_reader.read(65536):
                if cut.is_set():  # the server has answered: it is committed
                    break
                writer.write(data)
                await writer.drain()

        tasks = {asyncio.create_task(forth()), asyncio.create_task(back())}
        with contextlib.suppress(OSError):
            _, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        server_writer.close()
        writer.close()


async def test_a_commit_whose_answer_was_lost_is_unknown_and_its_repeat_is_told(postgres: Postgres) -> None:
    world = World(postgres.url())
    await prepare(world.url)
    cutter = CommitCutter(postgres.port)
    async with await asyncio.start_server(cutter.serve, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        ledger = Ledger(world.url.replace(f":{urlsplit(world.url).port}", f":{port}"), app="shop", owner="me")
        await handle(ledger, "before", "before")
        cutter.armed = True
        with pytest.raises(LedgerUnavailable, match="COMMIT") as caught:
            await handle(ledger, "m")
        assert caught.value.unknown
        with pytest.raises(AlreadyHandled):
            await handle(ledger, "m")
        await ledger.close()
    await world.ledger()
    assert await world.effects() == ["before", "effect"]
    await world.ledgers[0].close()


async def test_a_transaction_inside_one_that_has_begun_is_refused_on_sqlite_instead_of_waiting_for_ever(
    tmp_path: Path,
) -> None:
    ledger = Ledger(f"sqlite+aiosqlite:///{tmp_path}/app.db", app="shop", owner="o")
    await ledger.migrate()
    try:
        async with ledger.transaction() as outer:
            async with ledger.transaction() as early:  # nothing has begun around it
                await early.session.execute(text("SELECT 1"))
            await outer.session.execute(text("SELECT 1"))
            with pytest.raises(LedgerError, match="use the outer transaction"):
                async with ledger.transaction() as inner:
                    await inner.session.execute(text("SELECT 1"))
        async with ledger.transaction() as later:
            await later.session.execute(text("SELECT 1"))
    finally:
        await ledger.close()


async def test_a_transaction_inside_another_that_finds_no_connection_says_why(postgres: Postgres) -> None:
    world = World(postgres.url())
    await prepare(world.url)
    ledger = await world.ledger(connections=2, lock_seconds=0.5)
    inside = asyncio.Barrier(2)

    async def handler() -> None:
        async with ledger.transaction() as outer:
            await outer.session.execute(ADD, {"name": "outer"})
            await inside.wait()
            async with ledger.transaction() as inner:
                await inner.session.execute(ADD, {"name": "inner"})

    found = await asyncio.gather(handler(), handler(), return_exceptions=True)
    busy = [error for error in found if isinstance(error, LedgerBusy)]
    assert busy
    assert "opens a transaction inside another" in str(busy[0])
    await ledger.close()


async def test_a_deadlock_is_busy_and_not_an_outage(postgres: Postgres) -> None:
    world = World(postgres.url())
    await prepare(world.url)
    ledger = await world.ledger()
    async with ledger.transaction() as tx:
        await tx.session.execute(text("INSERT INTO once VALUES ('a'), ('b')"))
    both = asyncio.Barrier(2)

    async def lock(*names: str) -> None:
        async with ledger.transaction() as tx:
            for name in names:
                await tx.session.execute(text("UPDATE once SET name = name WHERE name = :name"), {"name": name})
                if name == names[0]:
                    await both.wait()

    found = await asyncio.gather(lock("a", "b"), lock("b", "a"), return_exceptions=True)
    assert [type(error) for error in found if error is not None] == [LedgerBusy]
    await ledger.close()


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        *((state, LedgerUnavailable) for state in ("08006", "57P01", "57P03", "53300", "53100")),
        *((state, LedgerBusy) for state in ("40001", "40P01", "53200", "55P03", "25P03")),
        *((state, None) for state in ("23505", "42P01", "57014")),
    ],
)
def test_only_an_outage_is_one(state: str, kind: type[LedgerError] | None) -> None:
    class FromServer(Exception):
        sqlstate = state

    assert trouble(FromServer()) is kind


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_FULL, LedgerUnavailable),
        (sqlite3.SQLITE_IOERR_FSYNC, LedgerUnavailable),
        (sqlite3.SQLITE_BUSY, LedgerBusy),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, LedgerBusy),
        (sqlite3.SQLITE_CONSTRAINT_UNIQUE, None),
    ],
)
def test_only_an_outage_is_one_on_sqlite(code: int, kind: type[LedgerError] | None) -> None:
    error = sqlite3.OperationalError()
    error.sqlite_errorcode = code
    assert trouble(error) is kind


def test_being_busy_counts_as_an_attempt_and_an_outage_does_not() -> None:
    def verdict(error: LedgerError) -> Verdict:
        return verdict_on_error(error, attempts=0, policy=RetryPolicy(), now=0.0, chance=0.0)

    assert isinstance(verdict(LedgerBusy("deadlock")), RetryAt)
    assert isinstance(verdict(LedgerUnavailable("gone")), Release)


async def test_a_block_that_ends_in_another_task_than_it_began_in_is_committed_like_any(world: World) -> None:
    ledger = await world.ledger()
    block = ledger.transaction(inbox=("w", "m"))
    tx = await asyncio.create_task(begin(block))
    await tx.session.execute(ADD, {"name": "effect"})
    await asyncio.create_task(end(block))
    assert await world.effects() == ["effect"]
    await handle(ledger, "n", "later")


async def begin(block: contextlib.AbstractAsyncContextManager[Transaction]) -> Transaction:
    return await block.__aenter__()


async def end(block: contextlib.AbstractAsyncContextManager[Transaction]) -> None:
    await block.__aexit__(None, None, None)
