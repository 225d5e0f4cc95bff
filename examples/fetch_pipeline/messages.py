"""What lies in the queues: plain JSON. Each topic is the name of its queue, so that anybody can send to it by name."""

from __future__ import annotations

import json
import re
import uuid
from datetime import datetime
from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from conveyor import Message, event

START_FETCH: Final = "start_fetch"
DATA_PROCESSING: Final = "data_processing"
DATA_STORAGE: Final = "data_storage"
HOPS: Final = (START_FETCH, DATA_PROCESSING, DATA_STORAGE)
"""The queues, in the order in which a job passes them."""

ID: Final = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
JobId = Annotated[str, Meta(pattern=ID)]
Station = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9~:._-]{0,99}\Z")]
Days = Annotated[int, Meta(ge=1, le=366)]


class Reading(Struct, frozen=True):
    """One measurement; value is None where the instrument was out of order."""

    at: datetime
    value: float | None


@event(START_FETCH)
class StartFetch(Struct, frozen=True):
    """A job: fetch a station's readings of so many days, and work them up. job_id may be left out: then one is given to it."""

    station: Station
    days: Days = 7
    job_id: JobId | None = None


@event(DATA_PROCESSING)
class Fetched(Struct, frozen=True):
    """What the external API has answered."""

    job_id: JobId
    station: Station
    unit: str
    readings: list[Reading]


class Summary(Struct, frozen=True):
    """What is computed from readings.

    Parameters:
        missing: readings without a value, which count nowhere else.
        deviation: the sample's standard deviation.
        low: a twentieth of the values are below; high: a twentieth are above.
        trend: by how much the values grow in a day, by least squares.
        days: the mean of each day (UTC).
    """

    count: int
    missing: int
    least: float
    most: float
    mean: float
    median: float
    deviation: float
    low: float
    high: float
    trend: float
    days: dict[str, float]


@event(DATA_STORAGE)
class Processed(Struct, frozen=True):
    """What was computed, ready to be stored."""

    job_id: JobId
    station: Station
    unit: str
    summary: Summary


def job_of(message: Message) -> str:
    """The id of the job that a message belongs to: the one in it, else one that comes from the message's own id."""
    try:
        body: Any = json.loads(message.body)
        known = str(body["job_id"] or message.id)
    except (ValueError, KeyError, TypeError, RecursionError):
        known = message.id
    return known if re.match(ID, known) else str(uuid.uuid5(uuid.NAMESPACE_OID, known))
