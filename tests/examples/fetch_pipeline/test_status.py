"""Where a job is shown to be, whatever is reported of it: late, twice, by the dead, and out of order."""

from __future__ import annotations

import asyncio
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import StaticPool

from examples.fetch_pipeline import tables
from examples.fetch_pipeline.messages import HOPS
from examples.fetch_pipeline.tables import Base, State

Report = tuple[str, str, int]
REPORTS = st.tuples(st.sampled_from(["begin", "fail", "give up", "finish"]), st.sampled_from(HOPS), st.integers(1, 3))


async def shown_after(reports: list[Report]) -> list[dict[str, tuple[str, int]]]:
    """What the hops are after each report: queue → state and attempts."""
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
    seen = []
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine, expire_on_commit=False) as session:
            await tables.register(session, "j", "berlin")
            for kind, queue, attempt in reports:
                if kind == "begin":
                    await tables.begin(session, "j", "berlin", queue)
                elif kind == "finish":
                    await tables.finish(session, "j", queue)
                else:
                    state = State.RETRYING if kind == "fail" else State.FAILED
                    await tables.fail(session, "j", queue, attempt, "broken", state)
                await session.commit()
                session.expire_all()
                found = await tables.read_job(session, "j")
                assert found is not None
                seen.append({hop.queue: (hop.state, hop.attempts) for hop in found[0].hops})
    finally:
        await engine.dispose()
    return seen


def place(hops: dict[str, tuple[str, int]]) -> int:
    """The number of the first hop that is not done."""
    return next((n for n, queue in enumerate(HOPS) if hops.get(queue, ("", 0))[0] != "done"), len(HOPS))


@given(st.lists(REPORTS, max_size=8))
@settings(max_examples=40)
def test_a_job_only_ever_moves_forward(reports: list[Report]) -> None:
    seen = asyncio.run(shown_after(reports))
    for before, after in itertools.pairwise(seen):
        assert place(after) >= place(before)
        for queue, (state, attempts) in before.items():
            assert after[queue][1] >= attempts
            if state == "done":
                assert after[queue] == (state, attempts)


def test_that_an_attempt_begins_says_that_the_hops_before_are_done() -> None:
    (seen,) = asyncio.run(shown_after([("begin", "data_storage", 1)]))
    assert seen == {"start_fetch": ("done", 0), "data_processing": ("done", 0), "data_storage": ("running", 1)}


def test_a_failure_that_an_earlier_attempt_reports_late_does_not_stop_the_one_that_runs() -> None:
    begin, late = ("begin", "start_fetch", 1), ("give up", "start_fetch", 1)
    assert asyncio.run(shown_after([begin, begin, late]))[-1] == {"start_fetch": ("running", 2)}
    assert asyncio.run(shown_after([begin, late]))[-1] == {"start_fetch": ("failed", 1)}
    assert asyncio.run(shown_after([begin, late, begin]))[-1] == {"start_fetch": ("running", 2)}
