"""The pipeline's workers, each of which can run in a process of its own, anywhere.

    start_fetch → [fetch] → data_processing → [processing] → data_storage → [storage] → results

A worker hands the job on to the next queue, waits until RabbitMQ has it, reports that, and only then is its own message
acknowledged. So a worker may die at any moment: the message comes again, and what was done already is recognised by the
job's id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

import httpx
import msgspec

from conveyor import (
    Call,
    Context,
    Conveyor,
    ConveyorError,
    Next,
    PayloadError,
    Reject,
    RetryPolicy,
    carried,
)
from conveyor.errors import is_outage
from examples.fetch_pipeline import tables
from examples.fetch_pipeline.messages import (
    DATA_PROCESSING,
    DATA_STORAGE,
    START_FETCH,
    Fetched,
    Processed,
    Reading,
    StartFetch,
    job_of,
)
from examples.fetch_pipeline.settings import Settings
from examples.fetch_pipeline.summary import summarise
from examples.fetch_pipeline.tables import State
from examples.settings import from_environment

JOB_HEADER: Final = "X-Job-ID"
LARGEST_ANSWER: Final = 4 * 1024 * 1024
"""Bytes; a year of hourly readings is smaller."""
AGAIN: Final = frozenset({408, 429, *range(500, 600)})
"""Answers after which another try may help."""

log = logging.getLogger("fetch-pipeline")

settings = from_environment(Settings)
app = Conveyor("fetch-pipeline", broker=settings.broker_url, database=settings.database_url, migrate=True)
app.carry(JOB_HEADER, log="job", make=job_of)
RETRY: Final = RetryPolicy(attempts=settings.fetch_attempts, initial=settings.fetch_backoff, maximum=60.0, crashes=20)


class Job(Protocol):
    """What all messages have in common."""

    @property
    def job_id(self) -> str | None: ...
    @property
    def station(self) -> str: ...


class Answer(msgspec.Struct):
    """What the external API says."""

    unit: str
    readings: list[Reading]


class Source:
    """The external API as its client sees it.

    Parameters:
        http: with the API's address.
        timeout_seconds: how long the whole of an answer may take.
    """

    def __init__(self, http: httpx.AsyncClient, timeout_seconds: float) -> None:
        self._http = http
        self._timeout_seconds = timeout_seconds

    async def readings(self, station: str, days: int) -> Answer:
        """A station's readings.

        Raises:
            Reject: there are none, and asking again will not help.
            OSError, httpx.HTTPError, ValueError: another time it may help.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                body = await self._get(f"/stations/{station}/readings", {"days": days})
        except (TimeoutError, httpx.TimeoutException):
            raise TimeoutError(f"the source gave no answer within {self._timeout_seconds:g} s") from None
        try:
            return msgspec.json.decode(body, type=Answer)
        except msgspec.DecodeError as error:
            raise ValueError(f"the source's answer cannot be read: {error}") from error

    async def _get(self, path: str, params: dict[str, int]) -> bytes:
        async with self._http.stream("GET", path, params=params, headers=carried()) as answer:
            if answer.status_code in AGAIN:
                raise httpx.HTTPStatusError(
                    f"the source says {answer.status_code}", request=answer.request, response=answer
                )
            body = b""
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > LARGEST_ANSWER:
                    raise Reject(f"the source's answer has more than {LARGEST_ANSWER:,} bytes")
            if answer.status_code != httpx.codes.OK:
                raise Reject(f"the source says {answer.status_code}: {body[:200].decode(errors='replace')}")
            return body


@app.provide
async def source() -> AsyncIterator[Source]:
    """The client of the external API."""
    async with httpx.AsyncClient(base_url=settings.source, timeout=settings.fetch_timeout) as http:
        yield Source(http, settings.fetch_timeout)


@app.worker(
    queue=START_FETCH,
    retry=RETRY,
    timeout=2 * settings.fetch_timeout + 60,
    lease=settings.lease_seconds,
    queue_type=settings.rabbitmq_queue_type,
)
async def fetch(start: StartFetch, source: Source, context: Context) -> None:
    """Get a station's readings from the external API."""
    if (
        start.job_id is None
    ):  # from a program that gave no id: the job gets one, by which even a crash does not double it
        named = msgspec.structs.replace(start, job_id=job_of(context.message))
        await context.publish_now(named, require_subscriber=True)
        context.log.info("a job came without an id; it is %s", named.job_id)
        return
    answer = await source.readings(start.station, start.days)
    fetched = Fetched(start.job_id, start.station, answer.unit, answer.readings)
    await context.publish_now(fetched, require_subscriber=True)
    context.log.info("fetched %d readings of %s", len(answer.readings), start.station)


@app.worker(
    queue=DATA_PROCESSING,
    retry=RETRY,
    timeout=settings.processing_seconds + 60,
    lease=settings.lease_seconds,
    queue_type=settings.rabbitmq_queue_type,
)
async def processing(fetched: Fetched, context: Context) -> None:
    """Compute the summary."""
    await asyncio.sleep(settings.processing_seconds)
    try:
        summary = await asyncio.to_thread(summarise, fetched.readings)
    except ValueError as error:
        raise Reject(str(error)) from error
    processed = Processed(fetched.job_id, fetched.station, fetched.unit, summary)
    await context.publish_now(processed, require_subscriber=True)
    context.log.info("computed the summary of %d readings", summary.count)


@app.worker(
    queue=DATA_STORAGE,
    retry=RETRY,
    timeout=settings.storage_seconds + 60,
    lease=settings.lease_seconds,
    queue_type=settings.rabbitmq_queue_type,
)
async def storage(processed: Processed, context: Context) -> None:
    """Write the result, once."""
    await asyncio.sleep(settings.storage_seconds)
    async with app.transaction() as tx:
        await tables.store(tx.session, processed)
    context.log.info("stored the result")


async def follow(call: Call, next: Next) -> Any:
    """Report each attempt: where the job is, and what happened to it there. A repeat of what is done is not done again."""
    job: Job = call.payload
    delivery, job_id = call.deliveries[0], job.job_id
    if job_id is None:
        return await next(call)
    async with app.transaction() as tx:
        attempt = await tables.begin(tx.session, job_id, job.station, delivery.queue)
    if attempt is None:
        log.info("a repeat of what is done")
        return None
    try:
        result = await next(call)
    except asyncio.CancelledError:  # a shutdown, or the worker's timeout: the message goes back to its queue
        with contextlib.suppress(ConveyorError):
            await _failed(job_id, delivery.queue, attempt, "interrupted", State.QUEUED)
        raise
    except Exception as error:
        last = isinstance(error, Reject | PayloadError) or delivery.attempts + 1 >= RETRY.attempts
        given_up = last and not is_outage(error)  # a broker that is away costs no attempt
        await _failed(
            job_id, delivery.queue, attempt, str(error) or repr(error), State.FAILED if given_up else State.RETRYING
        )
        raise
    async with app.transaction() as tx:  # the job has gone on by now, and only now it is said
        await tables.finish(tx.session, job_id, delivery.queue)
    return result


async def _failed(job_id: str, queue: str, attempt: int, error: str, state: State) -> None:
    async with app.transaction() as tx:
        await tables.fail(tx.session, job_id, queue, attempt, error, state)


app.use(follow)
