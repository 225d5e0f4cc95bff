"""The pipeline's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

import msgspec

from examples.settings import setting

Part = Literal["all", "api", "source", "workers", "fetch", "processing", "storage"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How the pipeline is set up; ``python -m examples.fetch_pipeline --help`` shows it."""

    rabbitmq_host: Annotated[str, setting("RabbitMQ: HOST, HOST:PORT, or several with commas")] = "localhost"
    rabbitmq_port: Annotated[int, setting("its port, where the host names none", ge=1, le=65_535)] = 5672
    rabbitmq_user: Annotated[str, setting("who logs in there")] = "guest"
    rabbitmq_password: Annotated[str, setting("with which password; default guest", secret=True)] = "guest"  # noqa: S105 - RabbitMQ's own default
    rabbitmq_vhost: Annotated[str, setting("its virtual host")] = "/"
    rabbitmq_queue_type: Annotated[
        Literal["classic", "quorum"],
        setting(
            "of the queues; classic ones are what other programs get who declare them with durable=true and nothing else"
        ),
    ] = "classic"
    broker: Annotated[str, setting("URL of another broker instead", variable="CONVEYOR_BROKER")] = ""
    data: Annotated[str, setting("folder of pipeline.db", variable="PIPELINE_DATA")] = "."
    database: Annotated[
        str, setting("database URL instead of sqlite+aiosqlite:///DATA/pipeline.db", variable="CONVEYOR_DATABASE")
    ] = ""
    host: Annotated[str, setting("address to serve the API on", variable="API_HOST")] = "127.0.0.1"
    port: Annotated[
        int, setting("port to serve the API on; 0 takes a free one", variable="API_PORT", ge=0, le=65_535)
    ] = 8000
    source_url: Annotated[str, setting("the external API; left out, the simulated one is started")] = ""
    source_port: Annotated[int, setting("port of the simulated external API", ge=1, le=65_535)] = 8090
    only: Annotated[
        Part, setting("run one part: api, source, workers, fetch, processing or storage", variable="PIPELINE_ONLY")
    ] = "all"
    processes: Annotated[int, setting("worker processes", variable="PIPELINE_PROCESSES", ge=1, le=64)] = 1
    fetch_timeout: Annotated[float, setting("seconds that one fetch may take", gt=0, le=300)] = 5.0
    fetch_attempts: Annotated[int, setting("tries of each worker before a job has failed", ge=1, le=100)] = 6
    fetch_backoff: Annotated[
        float, setting("seconds before the second try; then twice as long each time", gt=0, le=60)
    ] = 0.5
    processing_seconds: Annotated[
        float, setting("seconds that processing takes beside its computing", ge=0, le=600)
    ] = 0.0
    storage_seconds: Annotated[float, setting("seconds that storing takes beside its writing", ge=0, le=600)] = 0.0
    lease_seconds: Annotated[
        float, setting("seconds after which the work of a silent process goes to others", ge=0.5, le=3600)
    ] = 30.0

    @property
    def broker_url(self) -> str:
        """Where the queues are."""
        user, password = quote(self.rabbitmq_user, safe=""), quote(self.rabbitmq_password, safe="")
        hosts = [host if ":" in host else f"{host}:{self.rabbitmq_port}" for host in self.rabbitmq_host.split(",")]
        return self.broker or f"amqp://{user}:{password}@{','.join(hosts)}/{quote(self.rabbitmq_vhost, safe='')}"

    @property
    def database_url(self) -> str:
        """Where the results and the status are."""
        return self.database or f"sqlite+aiosqlite:///{Path(self.data).absolute() / 'pipeline.db'}"

    @property
    def source(self) -> str:
        """Where the external API is."""
        return self.source_url or f"http://127.0.0.1:{self.source_port}"
