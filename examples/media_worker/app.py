"""The media worker: a file comes in by message, is processed, and the data service is told."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import httpx

from conveyor import Context, Conveyor, Message, Reject, RetryPolicy
from examples.media_worker import files
from examples.media_worker.data_service import REQUEST_ID, DataService, add_request_id
from examples.media_worker.files import Facts, Limits, Refused
from examples.media_worker.messages import MEDIA_PROCESS, FileInfo, FileProcessed, ProcessMedia
from examples.media_worker.settings import Settings
from examples.settings import from_environment

PREFETCH: Final = 10
DECODERS: Final = min(4, os.cpu_count() or 1)
"""Images decoded at once: each may take four bytes for every pixel that is allowed."""

P = ParamSpec("P")
R = TypeVar("R")

settings = from_environment(Settings)
app = Conveyor("media", broker=settings.broker)
app.carry(REQUEST_ID, log="request_id", make=lambda message: message.id)
RETRY: Final = RetryPolicy(attempts=settings.attempts, initial=settings.backoff, maximum=300.0, crashes=20)
LIMITS: Final = Limits(settings.largest_file_mb * 1024 * 1024, settings.largest_image_megapixels * 1_000_000)


class Threads:
    """A few threads for work with files; what they log is about the message that it is for."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function there, and give its result."""
        call = functools.partial(contextvars.copy_context().run, functools.partial(function, *args, **kwargs))
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)


@app.provide
def threads() -> Iterator[Threads]:
    """The threads of this process."""
    with ThreadPoolExecutor(DECODERS, "files") as pool:
        yield Threads(pool)


@app.provide
async def data_service() -> AsyncIterator[DataService]:
    """The client of the data service."""
    async with httpx.AsyncClient(
        base_url=settings.service, timeout=settings.service_timeout, event_hooks={"request": [add_request_id]}
    ) as http:
        yield DataService(http, retries=settings.service_retries, pause_seconds=settings.service_retry_pause)


@app.worker(
    queue=MEDIA_PROCESS,
    prefetch=PREFETCH,
    concurrency=PREFETCH,
    retry=RETRY,
    lease=settings.lease,
    queue_type=settings.queue_type,
)
async def process(media: ProcessMedia, context: Context, threads: Threads, data_service: DataService) -> FileProcessed:
    """Process a file, tell the data service, and then whoever listens."""
    try:
        done = await threads.run(work_on, media.user_id, media.file_info)
    except Refused as error:
        raise Reject(str(error)) from error
    context.log.info(
        "processed %s: %s, %d bytes, %d thumbnails",
        media.file_info.path,
        done.media_type,
        done.size,
        len(done.thumbnails),
    )
    key = idempotency_key(context.message, media.user_id, done)
    await data_service.add_file(media.user_id, done.path, idempotency_key=key)
    context.log.info("the data service knows %s of user %d", done.path, media.user_id)
    return done


def work_on(user_id: int, info: FileInfo) -> FileProcessed:
    """Look at a file, and make its thumbnails. Doing it again makes the same.

    Raises:
        Refused: this file will not do, now or later.
        OSError: another time it may; also when the file is not there yet.
    """
    file = files.find(settings.root, info.path)
    facts = files.examine(file, LIMITS)
    differing = _differing(info, facts)
    if differing:
        raise Refused(differing)
    made: dict[int, Path] = {}
    if facts.media_type.startswith("image/"):
        folder = settings.output_folder / str(user_id) / facts.sha256[:32]
        made = files.thumbnails(file, folder, settings.sizes, LIMITS)
    paths = {str(side): _shown(path) for side, path in made.items()}
    path = paths[str(max(made))] if made else info.path
    return FileProcessed(user_id, path, facts.media_type, facts.size, facts.sha256, paths)


def idempotency_key(message: Message, user_id: int, done: FileProcessed) -> str:
    """The same for a repeat of a message, also for one of those that carry no id of their own: it names what is to be done.

    What the sender calls another request is another one.
    """
    given = next((value for name, value in message.headers.items() if name.lower() == REQUEST_ID.lower()), "")
    return hashlib.sha256("\0".join([given, str(user_id), done.path, done.sha256]).encode()).hexdigest()


def _differing(info: FileInfo, facts: Facts) -> str:
    if info.size is not None and info.size != facts.size:
        return f"the file has {facts.size} bytes, and not {info.size} as the message says"
    if info.sha256 is not None and info.sha256.lower() != facts.sha256:
        return f"the file's SHA-256 is {facts.sha256}, and not what the message says"
    return ""


def _shown(path: Path) -> str:
    """A path as others see it: below the media folder where it is there."""
    root = settings.root
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
