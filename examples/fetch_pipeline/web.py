"""The API: starts jobs, and shows where they are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import uuid4

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError

from conveyor import ConveyorError
from examples.fetch_pipeline.app import JOB_HEADER, app
from examples.fetch_pipeline.messages import HOPS, StartFetch
from examples.fetch_pipeline.tables import (
    HopRow,
    JobRow,
    ResultRow,
    State,
    create_tables,
    read_job,
    read_jobs,
    register,
)

PROBE_SECONDS: Final = 3.0
"""A broker or database that does not answer for so long is not there."""

log = logging.getLogger("fetch-pipeline.api")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Connect to the queues and the database."""
    async with app:
        await create_tables(app)
        yield


web = FastAPI(title="Fetch pipeline", lifespan=lifespan)


class NewJob(BaseModel):
    """What a job needs."""

    model_config = ConfigDict(extra="forbid")

    station: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9~:._-]{0,99}$")
    days: int = Field(7, ge=1, le=366)


class Attempt(BaseModel):
    """An attempt that failed."""

    attempt: int
    at: datetime
    error: str


class Hop(BaseModel):
    """A job at one queue; ``pending`` where it has not come to it yet."""

    queue: str
    state: str
    attempts: int = 0
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    errors: list[Attempt] = []


class Job(BaseModel):
    """Where a job is: ``hop`` is the queue that it has not left yet, null when it is completed."""

    id: str
    station: str
    status: str
    hop: str | None
    created_at: datetime
    hops: list[Hop]
    links: dict[str, str]
    result: dict[str, Any] | None = None


class Started(BaseModel):
    """The answer to a new job."""

    id: str
    status: str
    links: dict[str, str]


class Page(BaseModel):
    """Some jobs, newest first; next is what ``before`` has to be for the following page, null on the last one."""

    jobs: list[Job]
    next: str | None


@web.post("/jobs", status_code=202)
async def start_job(new: NewJob, response: Response) -> Started:
    """Put a job on the first queue. Its row and its message are one transaction: whoever got an id has a job."""
    job_id = str(uuid4())
    async with app.transaction() as tx:
        await register(tx.session, job_id, new.station)
        await tx.publish(StartFetch(new.station, new.days, job_id), id=job_id, headers={JOB_HEADER: job_id})
    response.headers["Location"] = f"/jobs/{job_id}"
    return Started(id=job_id, status=State.QUEUED, links=links_of(job_id))


@web.get("/jobs/{job_id}")
async def show_job(job_id: str) -> Job:
    """Where a job is: each hop with its times, attempts and errors; the result when there is one."""
    async with app.ledger.session() as session:
        found = await read_job(session, job_id)
    if found is None:
        raise HTTPException(404, "Job not found")
    return shown(*found)


@web.get("/jobs")
async def list_jobs(limit: Annotated[int, Query(ge=1, le=100)] = 20, before: str | None = None) -> Page:
    """Jobs, newest first."""
    async with app.ledger.session() as session:
        rows = await read_jobs(session, limit + 1, before)
    return Page(jobs=[shown(row) for row in rows[:limit]], next=rows[limit - 1].id if len(rows) > limit else None)


@web.get("/health")
async def health(response: Response) -> dict[str, str]:
    """Whether RabbitMQ and the database answer."""
    found = {"status": "healthy", "broker": "connected", "database": "connected"}
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await app.broker.queues()
    except (ConveyorError, TimeoutError):
        found |= {"status": "unhealthy", "broker": "disconnected"}
    try:
        async with asyncio.timeout(PROBE_SECONDS), app.ledger.session() as session:
            await read_jobs(session, 1, None)
    except (ConveyorError, SQLAlchemyError, TimeoutError):
        found |= {"status": "unhealthy", "database": "disconnected"}
    response.status_code = 200 if found["status"] == "healthy" else 503
    return found


@web.exception_handler(RequestValidationError)
async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """Say which field is wrong and why; what was sent is not repeated."""
    found = [{key: problem[key] for key in ("type", "loc", "msg")} for problem in error.errors()]
    return JSONResponse({"detail": found}, 422)


@web.exception_handler(ConveyorError)
@web.exception_handler(SQLAlchemyError)
async def unavailable(_: Request, error: Exception) -> JSONResponse:
    """Nothing was done, and trying again may help."""
    log.error("cannot serve: %s", error)
    return JSONResponse({"detail": "That is not possible right now; try again in a moment"}, 503, {"Retry-After": "2"})


def shown(job: JobRow, result: ResultRow | None = None) -> Job:
    """A job as the API shows it."""
    known = {hop.queue: hop for hop in job.hops}
    rows = [known.get(queue) for queue in HOPS]
    here = next((row for row in rows if row is not None and row.state != State.DONE), None)
    return Job(
        id=job.id,
        station=job.station,
        status="completed" if here is None else here.state,
        hop=None if here is None else here.queue,
        created_at=job.created_at,
        hops=[hop_of(queue, row) for queue, row in zip(HOPS, rows, strict=True)],
        links=links_of(job.id),
        result=None
        if result is None
        else {"unit": result.unit, **result.summary, "stored_at": result.stored_at.isoformat()},
    )


def hop_of(queue: str, row: HopRow | None) -> Hop:
    """A hop as the API shows it."""
    if row is None:
        return Hop(queue=queue, state="pending")
    return Hop(
        queue=queue,
        state=row.state,
        attempts=row.attempts,
        queued_at=row.queued_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        errors=[Attempt(**error) for error in row.errors],
    )


def links_of(job_id: str) -> dict[str, str]:
    """Where a job's status is."""
    return {"status": f"/jobs/{job_id}"}
