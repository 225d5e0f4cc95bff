"""The media worker's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from examples.settings import setting

Part = Literal["all", "worker", "service"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How the media worker is set up; ``python -m examples.media_worker --help`` shows it."""

    broker: Annotated[str, setting("broker URL", variable="CONVEYOR_BROKER")] = "amqp://guest:guest@localhost:5672"
    queue_type: Annotated[
        Literal["classic", "quorum"],
        setting(
            "of media.process on RabbitMQ; a classic one is what other programs get who declare it with durable=true "
            "and nothing else",
            variable="MEDIA_QUEUE_TYPE",
        ),
    ] = "classic"
    media: Annotated[str, setting("folder of the files; nothing outside of it is read", variable="MEDIA_ROOT")] = (
        "media"
    )
    output: Annotated[str, setting("where thumbnails go; left out, MEDIA/processed", variable="MEDIA_OUTPUT")] = ""
    thumbnails: Annotated[
        str,
        setting(
            "their longest sides, in pixels", variable="MEDIA_THUMBNAILS", pattern=r"\A[0-9]{1,4}(,[0-9]{1,4}){0,7}\Z"
        ),
    ] = "128,512"
    largest_file_mb: Annotated[
        int, setting("larger files are refused", variable="MEDIA_LARGEST_FILE_MB", ge=1, le=100_000)
    ] = 500
    largest_image_megapixels: Annotated[
        int,
        setting(
            "larger images are refused: they could be decompression bombs; Pillow itself refuses those above 178",
            variable="MEDIA_LARGEST_IMAGE_MEGAPIXELS",
            ge=1,
            le=170,
        ),
    ] = 50
    service_url: Annotated[
        str,
        setting(
            "the data service; left out, the one that ships with this example is started", variable="DATA_SERVICE_URL"
        ),
    ] = ""
    service_port: Annotated[
        int, setting("port of the data service that ships", variable="DATA_SERVICE_PORT", ge=1, le=65_535)
    ] = 8091
    service_data: Annotated[str, setting("its file", variable="DATA_SERVICE_FILE")] = "users.db"
    service_timeout: Annotated[
        float,
        setting("seconds that an answer of the data service may take", variable="DATA_SERVICE_TIMEOUT", gt=0, le=300),
    ] = 5.0
    service_retries: Annotated[
        int,
        setting(
            "calls of it that are repeated at once, before the message waits",
            variable="DATA_SERVICE_RETRIES",
            ge=0,
            le=10,
        ),
    ] = 2
    service_retry_pause: Annotated[
        float,
        setting(
            "seconds before the first of these; then twice as long", variable="DATA_SERVICE_RETRY_PAUSE", ge=0, le=60
        ),
    ] = 0.2
    attempts: Annotated[
        int, setting("tries of a message before it is given up", variable="MEDIA_ATTEMPTS", ge=1, le=1000)
    ] = 12
    backoff: Annotated[
        float,
        setting(
            "seconds before the second try; then twice as long, to 5 minutes", variable="MEDIA_BACKOFF", gt=0, le=300
        ),
    ] = 1.0
    lease: Annotated[
        float,
        setting(
            "seconds after which the work of a silent process goes to others",
            variable="MEDIA_LEASE_SECONDS",
            ge=0.5,
            le=3600,
        ),
    ] = 30.0
    processes: Annotated[int, setting("worker processes", variable="MEDIA_PROCESSES", ge=1, le=64)] = 1
    only: Annotated[Part, setting("run one part: worker or service", variable="MEDIA_ONLY")] = "all"

    @property
    def root(self) -> Path:
        """The folder of the files."""
        return Path(self.media).absolute()

    @property
    def output_folder(self) -> Path:
        """Where thumbnails go."""
        return Path(self.output).absolute() if self.output else self.root / "processed"

    @property
    def sizes(self) -> list[int]:
        """The thumbnails' longest sides, smallest first."""
        return sorted({max(1, int(side)) for side in self.thumbnails.split(",")})

    @property
    def service(self) -> str:
        """Where the data service is."""
        return self.service_url or f"http://127.0.0.1:{self.service_port}"
