"""The data service as its client sees it: one call, which may be repeated because it carries a key."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Final

import httpx

from conveyor import Reject, Retry, carried

REQUEST_ID: Final = "X-Request-ID"
WAITING: Final = frozenset({408, 425, 429, *range(500, 600)})
"""Answers after which another try may help."""
LONGEST_HEADER: Final = 200
LONGEST_PAUSE_SECONDS: Final = 600.0

log = logging.getLogger("media.data-service")


class ServiceUnavailable(Exception):
    """The data service cannot be reached, or is out of order: another time it may help."""


class DataService:
    """Tells the data service about files.

    Parameters:
        http: with the service's address and time-out.
        retries: repetitions of a call at once.
        pause_seconds: before the first of them; then twice as long.
    """

    def __init__(self, http: httpx.AsyncClient, *, retries: int, pause_seconds: float) -> None:
        self._http = http
        self._retries = retries
        self._pause_seconds = pause_seconds

    async def add_file(self, user_id: int, path: str, *, idempotency_key: str) -> None:
        """Enter a processed file for a user, once for a key.

        A PATCH may have been done although no answer came; it is safe to repeat because the service knows a repeat by its key.

        Raises:
            Reject: there is no such user, or the service refuses for another reason that lasts.
            Retry: the service asked to be left alone for a while.
            ServiceUnavailable: it could not be reached, or failed.
        """
        url = f"/api/v1/users/{user_id}/files"
        body = {"new_file": {"status": "processed", "path": path}}
        for repeat in range(self._retries + 1):
            try:
                answer = await self._http.patch(url, json=body, headers={"Idempotency-Key": idempotency_key})
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}".strip()
            else:
                if answer.is_success:
                    return
                if answer.status_code not in WAITING:
                    raise Reject(_refusal(answer, user_id))
                if (pause := _retry_after(answer)) is not None:
                    raise Retry(f"the data service says {answer.status_code}, and to come back later", after=pause)
                problem = f"it says {answer.status_code}"
            if repeat < self._retries:
                log.warning("the data service failed (%s), trying again", problem)
                await asyncio.sleep(self._pause_seconds * 2**repeat)
        raise ServiceUnavailable(f"the data service failed {self._retries + 1} times; the last time: {problem}")


async def add_request_id(request: httpx.Request) -> None:
    """Put what the message carries on onto a request; for the client's event hooks."""
    for name, value in carried().items():
        request.headers[name] = value[:LONGEST_HEADER]


def _refusal(answer: httpx.Response, user_id: int) -> str:
    if answer.status_code == httpx.codes.NOT_FOUND:
        return f"no such user: {user_id}"
    return f"the data service refuses with {answer.status_code}: {answer.text[:200]}"


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds, where the service says how long (RFC 9110, section 10.2.3); the form with a date is not used by services."""
    said = answer.headers.get("Retry-After", "").strip()
    return min(float(said), LONGEST_PAUSE_SECONDS) if re.fullmatch(r"\d{1,9}", said) else None
