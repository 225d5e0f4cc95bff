"""What is sent once is never sent twice, whatever happens in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor import Conveyor
from examples.order_processor.calls import AtWork, NotDone, Refused, Unclear
from examples.order_processor.order import Order
from examples.order_processor.records import Known, Records, State, Step, decide
from servers.postgres import Postgres
from tests.examples.order_processor.conftest import GIVEN

ORDER = msgspec.convert(GIVEN, type=Order)


@given(st.sampled_from(State), st.floats(0, 1000), st.booleans())
def test_only_what_was_certainly_not_sent_or_may_be_repeated_is_sent(
    state: State, age_seconds: float, repeatable: bool
) -> None:
    step = decide(state, age_seconds, longest_seconds=10, repeatable=repeatable)
    if step is Step.SEND:
        assert state is State.NOT_SENT or (repeatable and state is not State.SENT)
    assert (step is Step.SKIP) == (state is State.SENT)
    assert (step is Step.WAIT) == (state is State.SENDING and age_seconds < 10)


@pytest.fixture(params=["sqlite", "postgresql"])
async def app(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Conveyor]:
    """An application with a database, on each kind of them."""
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path / 'records.db'}"
    else:
        postgres: Postgres = request.getfixturevalue("postgres")
        url = postgres.url()
    found = Conveyor("records", broker="memory://", database=url, migrate=True)
    async with found:
        yield found


async def opened(app: Conveyor, *, longest_seconds: float = 60.0) -> Records:
    records = Records(app, longest_seconds=longest_seconds)
    await records.create()
    return records


class Calls:
    """Counts calls of a service, which behaves as it is told.

    Parameters:
        ends: what becomes of each call; None is success.
    """

    def __init__(self, *ends: Exception | None) -> None:
        self.count = 0
        self._ends = list(ends)

    async def __call__(self, order: Order) -> None:
        self.count += 1
        end = self._ends.pop(0) if self._ends else None
        if end is not None:
            raise end


async def test_what_was_sent_is_not_sent_again(app: Conveyor) -> None:
    records, calls = await opened(app), Calls()
    for _ in range(3):
        await records.send_once(ORDER, "e-mail", calls, repeatable=False)
    assert calls.count == 1


async def test_what_was_certainly_not_sent_is_tried_again(app: Conveyor) -> None:
    records, calls = await opened(app), Calls(NotDone("full"), Refused("unknown"), None)
    for error in (NotDone, Refused):
        with pytest.raises(error):
            await records.send_once(ORDER, "e-mail", calls, repeatable=False)
    await records.send_once(ORDER, "e-mail", calls, repeatable=False)
    assert calls.count == 3


async def test_a_lost_answer_is_not_asked_for_again_unless_a_repeat_is_harmless(app: Conveyor) -> None:
    records = await opened(app)
    once, often = Calls(Unclear("cut off")), Calls(Unclear("cut off", after_seconds=7.0))
    for _ in range(3):
        with pytest.raises(Unclear, match="may have been sent"):
            await records.send_once(ORDER, "e-mail", once, repeatable=False)
    with pytest.raises(NotDone) as later:
        await records.send_once(ORDER, "warehouse-notice", often, repeatable=True)
    assert later.value.after_seconds == 7.0
    await records.send_once(ORDER, "warehouse-notice", often, repeatable=True)
    assert (once.count, often.count) == (1, 2)
    assert await records.unclear() == [(ORDER.order_id, "e-mail", "cut off")]


async def test_a_call_that_takes_too_long_counts_as_a_lost_answer(app: Conveyor) -> None:
    records = await opened(app, longest_seconds=0.01)

    async def forever(order: Order) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Unclear, match="no end after"):
        await records.send_once(ORDER, "e-mail", forever, repeatable=False)


async def test_of_many_at_once_one_sends_and_the_others_wait(app: Conveyor) -> None:
    records, calls = await opened(app), Calls()
    tries = [records.send_once(ORDER, "e-mail", calls, repeatable=False) for _ in range(20)]
    ends = await asyncio.gather(*tries, return_exceptions=True)
    assert calls.count == 1
    assert {type(end) for end in ends} <= {type(None), AtWork}


@pytest.mark.parametrize("repeatable", [False, True])
async def test_what_a_dead_process_was_sending_is_repeated_only_where_that_is_harmless(
    app: Conveyor, repeatable: bool
) -> None:
    records, calls = await opened(app, longest_seconds=3600), Calls()
    entered = asyncio.Event()

    async def die(order: Order) -> None:
        entered.set()
        await asyncio.Event().wait()

    dying = asyncio.create_task(records.send_once(ORDER, "notice", die, repeatable=repeatable))
    await entered.wait()
    with pytest.raises(AtWork, match="being sent for another copy"):
        await records.send_once(ORDER, "notice", calls, repeatable=repeatable)
    later = await opened(app, longest_seconds=-10)  # as if a long time had passed
    if repeatable:
        await later.send_once(ORDER, "notice", calls, repeatable=True)
    else:
        with pytest.raises(Unclear, match="died, or lost the answer"):
            await later.send_once(ORDER, "notice", calls, repeatable=False)
    assert calls.count == repeatable
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)


async def test_a_process_that_stood_still_and_comes_late_is_believed_what_it_did(app: Conveyor) -> None:
    records, entered, go = await opened(app), asyncio.Event(), asyncio.Event()

    async def slow(order: Order) -> None:
        entered.set()
        await go.wait()

    late = asyncio.create_task(records.send_once(ORDER, "e-mail", slow, repeatable=False))
    await entered.wait()
    with pytest.raises(Unclear):
        await (await opened(app, longest_seconds=-10)).send_once(ORDER, "e-mail", Calls(), repeatable=False)
    go.set()
    await late
    assert await records.unclear() == []
    calls = Calls()
    await records.send_once(ORDER, "e-mail", calls, repeatable=False)
    assert calls.count == 0


async def test_a_process_that_comes_late_does_not_undo_what_others_did_since(app: Conveyor) -> None:
    records, entered, go = await opened(app), asyncio.Event(), asyncio.Event()

    async def slow(order: Order) -> None:
        entered.set()
        await go.wait()
        raise NotDone("nobody there")

    late = asyncio.create_task(records.send_once(ORDER, "e-mail", slow, repeatable=False))
    await entered.wait()
    with pytest.raises(Unclear):
        await (await opened(app, longest_seconds=-10)).send_once(ORDER, "e-mail", Calls(), repeatable=False)
    assert await records.settle(ORDER.order_id, "e-mail", sent=False)
    with pytest.raises(Unclear):
        await records.send_once(ORDER, "e-mail", Calls(Unclear("cut off")), repeatable=False)
    go.set()
    with pytest.raises(NotDone):
        await late
    assert await records.unclear() == [(ORDER.order_id, "e-mail", "cut off")]


@pytest.mark.parametrize("sent", [True, False])
async def test_the_operator_says_what_was_found_out(app: Conveyor, sent: bool) -> None:
    records, calls = await opened(app), Calls(Unclear("cut off"))
    assert not await records.settle(ORDER.order_id, "e-mail", sent=sent)
    with pytest.raises(Unclear):
        await records.send_once(ORDER, "e-mail", calls, repeatable=False)
    assert await records.settle(ORDER.order_id, "e-mail", sent=sent)
    assert not await records.settle(ORDER.order_id, "e-mail", sent=sent)
    await records.send_once(ORDER, "e-mail", calls, repeatable=False)
    assert calls.count == (1 if sent else 2)


async def test_an_order_is_known_again_and_another_one_with_its_id_too(app: Conveyor) -> None:
    records = await opened(app)
    known = await asyncio.gather(*(records.begin(ORDER) for _ in range(10)))
    assert sorted(each.name for each in known) == ["BEGUN"] * 9 + ["NEW"]
    assert await records.begin(msgspec.structs.replace(ORDER, user_id="another")) is Known.ANOTHER
    await records.finish(ORDER)
    assert await records.begin(ORDER) is Known.FULFILLED
