"""The external HTTP API, simulated: weather stations, some of which misbehave on request.

A station's name says how it behaves: ``berlin`` answers at once, ``berlin~slow:2`` after two seconds, ``berlin~fail:3`` says 503
three times before it answers, ``berlin~hang:1`` keeps its first caller waiting for a minute, ``berlin~nonsense`` answers with no JSON,
and ``berlin~unknown`` is not known. Failures are counted for each job, by its X-Job-ID.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

from fastapi import FastAPI, Header, HTTPException, Query, Response
from fastapi.responses import JSONResponse

HANG_SECONDS: Final = 60.0
LAST: Final = datetime(2026, 11, 1, tzinfo=UTC)
"""The latest reading; fixed, so that a repeated question has the same answer."""
MISSING: Final = 0.01
"""Share of readings that an instrument did not take."""

source = FastAPI(title="Weather stations (simulated)")
calls: Counter[str] = Counter()


@source.get("/stations/{station}/readings")
async def readings(
    station: str, days: Annotated[int, Query(ge=1, le=366)] = 7, x_job_id: Annotated[str, Header()] = ""
) -> Response:
    """A station's hourly readings of the last days."""
    name, _, behaviour = station.partition("~")
    what, _, number = behaviour.partition(":")
    calls[f"{station} {x_job_id}"] += 1
    time = calls[f"{station} {x_job_id}"]
    if what == "slow":
        await asyncio.sleep(float(number or 1))
    elif what == "fail" and time <= int(number or 1):
        raise HTTPException(503, f"out of order ({time} of {number or 1})")
    elif what == "hang" and time <= int(number or 1):
        await asyncio.sleep(HANG_SECONDS)
    elif what == "nonsense":
        return Response("<h1>It works!</h1>", media_type="text/html")
    elif what == "unknown":
        raise HTTPException(404, f"there is no station {name}")
    return JSONResponse({"station": name, "unit": "°C", "readings": measure(name, days)})


@source.get("/calls")
async def called() -> dict[str, int]:
    """How often each job has asked: ``"STATION JOB": times``."""
    return dict(calls)


def measure(station: str, days: int) -> list[dict[str, Any]]:
    """Temperatures of a day and a season, with some weather."""
    chance = random.Random(station)
    level = chance.uniform(-5, 25)
    found = []
    for hour in range(24 * days):
        at = LAST - timedelta(hours=24 * days - hour)
        weather = level + 4 * math.sin(math.tau * (at.hour - 9) / 24) + chance.gauss(0, 1)
        found.append({"at": at.isoformat(), "value": None if chance.random() < MISSING else round(weather, 1)})
    return found
