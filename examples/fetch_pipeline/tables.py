"""The database: where each job is, and the results.

A job only ever moves forward. A worker reports three things: that an attempt begins, that it failed, and that the hop is done –
the last one after the job has gone on, so that no job is ever shown behind the queue in which it is. Whatever is reported twice,
late or by a process that had been given up changes nothing that a later report said.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from sqlalchemy import JSON, DateTime, Dialect, ForeignKey, String, Text, TypeDecorator, select, text, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

from conveyor import Conveyor
from examples.fetch_pipeline.messages import HOPS, Processed

SETUP_LOCK: Final = 0xFE7C4
"""Names, on a PostgreSQL server, the advisory lock of whoever sets up the tables."""
ERRORS_KEPT: Final = 20
"""Of a hop, the latest ones."""
LONGEST_ERROR: Final = 500


class State(enum.StrEnum):
    """What is going on at a hop."""

    QUEUED = "queued"
    """The job is in the hop's queue."""
    RUNNING = "running"
    RETRYING = "retrying"
    """An attempt failed; the next one will come."""
    FAILED = "failed"
    """Given up: the message is a dead letter. A redrive starts it again."""
    DONE = "done"


class Moment(TypeDecorator[datetime]):
    """A moment in UTC, also on databases that know no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """The pipeline's tables."""

    type_annotation_map = {datetime: Moment, list[dict[str, Any]]: JSON, dict[str, Any]: JSON}  # noqa: RUF012 - SQLAlchemy's way


class HopRow(Base):
    """A job at one of the queues; rows of queues that it has not reached do not exist yet."""

    __tablename__ = "hops"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    queue: Mapped[str] = mapped_column(String(40), primary_key=True)
    state: Mapped[str] = mapped_column(String(10))
    attempts: Mapped[int] = mapped_column(default=0)
    queued_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    errors: Mapped[list[dict[str, Any]]] = mapped_column(default=list)


class JobRow(Base):
    """A job."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    station: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[datetime] = mapped_column(index=True)
    hops: Mapped[list[HopRow]] = relationship(viewonly=True)


class ResultRow(Base):
    """What came out of a job: one row for a job, written once."""

    __tablename__ = "results"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    station: Mapped[str] = mapped_column(String(100))
    unit: Mapped[str] = mapped_column(Text)
    summary: Mapped[dict[str, Any]]
    stored_at: Mapped[datetime]


async def create_tables(app: Conveyor) -> None:
    """Create what is missing; any number of processes may do so at once."""
    async with app.transaction() as tx:
        connection = await tx.session.connection()
        if connection.dialect.name == "postgresql":  # SQLite has one writer at a time anyway
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": SETUP_LOCK})
        await connection.run_sync(Base.metadata.create_all)


# -- what the API and the workers report -----------------------------------------------------------------------------------------


async def register(session: AsyncSession, job_id: str, station: str) -> None:
    """A job exists, and is on its way to the first queue."""
    now = datetime.now(UTC)
    await _insert(session, JobRow, id=job_id, station=station, created_at=now)
    await _insert(
        session, HopRow, job_id=job_id, queue=HOPS[0], state=State.QUEUED, queued_at=now, attempts=0, errors=[]
    )


async def begin(session: AsyncSession, job_id: str, station: str, queue: str) -> int | None:
    """An attempt begins: its number, or None where this hop is done already and the message is a repeat.

    That the job is here says that it has left the hops before, whatever was reported of them.
    """
    await register(session, job_id, station)
    for earlier in HOPS[: HOPS.index(queue)]:
        await finish(session, job_id, earlier)
    hop = await _locked(session, job_id, queue)
    if hop.state == State.DONE:
        return None
    if hop.state == State.RUNNING:
        _note(hop, "no end was reported: its process died, or a repeat of the message runs beside it")
    now = datetime.now(UTC)  # not before it was queued, which may be noted only here
    hop.state, hop.attempts, hop.started_at = State.RUNNING, hop.attempts + 1, hop.started_at or now
    return hop.attempts


async def fail(session: AsyncSession, job_id: str, queue: str, attempt: int, error: str, state: State) -> None:
    """An attempt failed; said by an attempt that is not the latest one, it is only noted."""
    hop = await _locked(session, job_id, queue)
    if hop.state == State.DONE:
        return
    _note(hop, error, attempt)
    if hop.attempts == attempt:
        hop.state = state


async def finish(session: AsyncSession, job_id: str, queue: str) -> None:
    """The job has left this hop, for the next one where there is one."""
    now = datetime.now(UTC)
    hop = await _locked(session, job_id, queue)
    if hop.state != State.DONE:
        hop.state, hop.finished_at = State.DONE, now
    if queue != HOPS[-1]:
        following = HOPS[HOPS.index(queue) + 1]
        await _insert(
            session, HopRow, job_id=job_id, queue=following, state=State.QUEUED, queued_at=now, attempts=0, errors=[]
        )


async def store(session: AsyncSession, result: Processed) -> None:
    """Write a job's result, once: what is there stays."""
    await _insert(
        session,
        ResultRow,
        job_id=result.job_id,
        station=result.station,
        unit=result.unit,
        summary=msgspec.to_builtins(result.summary),
        stored_at=datetime.now(UTC),
    )


def _note(hop: HopRow, error: str, attempt: int | None = None) -> None:
    entry = {"attempt": attempt or hop.attempts, "at": datetime.now(UTC).isoformat(), "error": error[:LONGEST_ERROR]}
    hop.errors = [*hop.errors, entry][-ERRORS_KEPT:]


async def _insert(session: AsyncSession, table: type[Base], **values: Any) -> None:
    """Insert a row unless there is one with this key."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    await session.execute(insert(table).values(**values).on_conflict_do_nothing())


async def _locked(session: AsyncSession, job_id: str, queue: str) -> HopRow:
    """A hop's row, as it is now, and nobody else's until the transaction ends."""
    key = {"job_id": job_id, "queue": queue}
    await session.flush()
    await _insert(session, HopRow, **key, state=State.QUEUED, queued_at=datetime.now(UTC), attempts=0, errors=[])
    return await session.get_one(HopRow, key, with_for_update=True, populate_existing=True)


# -- what the API shows ----------------------------------------------------------------------------------------------------------


async def read_job(session: AsyncSession, job_id: str) -> tuple[JobRow, ResultRow | None] | None:
    """A job with its hops, and its result."""
    job = await session.get(JobRow, job_id, options=[selectinload(JobRow.hops)])
    return None if job is None else (job, await session.get(ResultRow, job_id))


async def read_jobs(session: AsyncSession, limit: int, before: str | None) -> Sequence[JobRow]:
    """A page of jobs, newest first: those before a given one."""
    page = select(JobRow).options(selectinload(JobRow.hops)).order_by(JobRow.created_at.desc(), JobRow.id.desc())
    if before is not None:
        mark = await session.get(JobRow, before)
        if mark is None:
            return []
        page = page.where(tuple_(JobRow.created_at, JobRow.id) < (mark.created_at, mark.id))
    return (await session.scalars(page.limit(limit))).all()
