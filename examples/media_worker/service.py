"""The data service, small: users and their files, in a SQLite file. It knows nothing of Conveyor, and a repeat by its key.

``PUT /faults`` makes it misbehave, for tests and demonstrations.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Annotated, Any, Final, Literal

from fastapi import FastAPI, Header, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, Field

USERS: Final = 100
"""There are users 1 to so many."""
TABLES: Final = """
CREATE TABLE IF NOT EXISTS file (number INTEGER PRIMARY KEY, user_id INTEGER NOT NULL, status TEXT NOT NULL, path TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS request (key TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, answer TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS call (number INTEGER PRIMARY KEY, request_id TEXT NOT NULL, key TEXT NOT NULL, status INTEGER NOT NULL);
"""

log = logging.getLogger("uvicorn.error.data-service")
service = FastAPI(title="Data service")


class NewFile(BaseModel):
    """A file to enter."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["processed"]
    path: str = Field(min_length=1, max_length=2000)


class FilesPatch(BaseModel):
    """What changes about a user's files."""

    model_config = ConfigDict(extra="forbid")

    new_file: NewFile


class Faults(BaseModel):
    """How the next calls misbehave.

    Parameters:
        times: so many of them.
        status: what they answer.
        seconds: how long they take.
        after: only after having done what was asked for.
    """

    times: int = 0
    status: int | None = None
    seconds: float = 0.0
    after: bool = False
    retry_after: int | None = None


faults = Faults()


@contextmanager
def database() -> Iterator[sqlite3.Connection]:
    """The file, for one transaction."""
    with closing(sqlite3.connect(os.environ.get("DATA_SERVICE_FILE") or "users.db", timeout=10)) as connection:
        connection.executescript(TABLES)
        with connection:
            yield connection


@service.middleware("http")
async def noted(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    """Log each call with its X-Request-ID, remember those that change something, and misbehave if that is wished for."""
    request_id = request.headers.get("X-Request-ID", "-")
    fault = faults.model_copy() if request.method == "PATCH" and faults.times > 0 else Faults()
    faults.times -= bool(fault.times)
    if fault.times and not fault.after:
        await asyncio.sleep(fault.seconds)
    response = Response(status_code=500)
    if fault.status is None or fault.after or not fault.times:
        response = await answer(request)
    if fault.times and fault.after:
        await asyncio.sleep(fault.seconds)
    if fault.times and fault.status is not None:
        headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        response = Response(status_code=fault.status, headers=headers)
    log.info("%s %s: %d (request %s)", request.method, request.url.path, response.status_code, ascii(request_id))
    response.headers["X-Request-ID"] = request_id
    if request.method == "PATCH":
        await asyncio.to_thread(remember, request_id, request.headers.get("Idempotency-Key", ""), response.status_code)
    return response


@service.patch("/api/v1/users/{user_id}/files")
def patch_files(
    user_id: int,
    patch: FilesPatch,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> dict[str, Any]:
    """Enter a file for a user. A repeat with the same Idempotency-Key gets the first answer, and changes nothing."""
    if not 1 <= user_id <= USERS:
        raise HTTPException(404, "User not found")
    fingerprint = hashlib.sha256(f"{user_id} {patch.model_dump_json()}".encode()).hexdigest()
    with database() as connection:
        connection.execute("BEGIN IMMEDIATE")
        if idempotency_key is not None:
            known = connection.execute(
                "SELECT fingerprint, answer FROM request WHERE key = ?", (idempotency_key,)
            ).fetchone()
            if known is not None and known[0] != fingerprint:
                raise HTTPException(422, "This Idempotency-Key was used for another request")
            if known is not None:
                return dict(json.loads(known[1]))
        added = connection.execute(
            "INSERT INTO file (user_id, status, path) VALUES (?, ?, ?) RETURNING number",
            (user_id, patch.new_file.status, patch.new_file.path),
        ).fetchone()
        answer = {"id": added[0], "user_id": user_id, **patch.new_file.model_dump()}
        if idempotency_key is not None:
            connection.execute(
                "INSERT INTO request VALUES (?, ?, ?)", (idempotency_key, fingerprint, json.dumps(answer))
            )
    return answer


@service.get("/api/v1/users/{user_id}/files")
def list_files(user_id: int) -> dict[str, Any]:
    """A user's files, oldest first."""
    if not 1 <= user_id <= USERS:
        raise HTTPException(404, "User not found")
    with database() as connection:
        rows = connection.execute(
            "SELECT number, status, path FROM file WHERE user_id = ? ORDER BY number", (user_id,)
        ).fetchall()
    return {"files": [{"id": number, "status": status, "path": path} for number, status, path in rows]}


@service.get("/calls")
def list_calls() -> list[dict[str, Any]]:
    """The calls that were to change something, oldest first: what they carried, and how they were answered."""
    with database() as connection:
        rows = connection.execute("SELECT request_id, key, status FROM call ORDER BY number").fetchall()
    return [{"request_id": request_id, "key": key, "status": status} for request_id, key, status in rows]


@service.put("/faults")
def set_faults(wanted: Faults) -> Faults:
    """Misbehave from now on."""
    for name, value in wanted:
        setattr(faults, name, value)
    return faults


def remember(request_id: str, key: str, status: int) -> None:
    """Note a call."""
    with database() as connection:
        connection.execute("INSERT INTO call (request_id, key, status) VALUES (?, ?, ?)", (request_id, key, status))
