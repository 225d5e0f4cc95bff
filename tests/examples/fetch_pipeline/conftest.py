"""The pipeline as its users run it: programs, on a RabbitMQ and with a folder of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from sqlalchemy import create_engine, text

from servers.rabbitmq import RabbitMQ
from servers.server import find_free_port
from tests.examples.beside import Foreigner, Program, wait_for

Job = dict[str, Any]
HOPS: Final = ("start_fetch", "data_processing", "data_storage")


class Pipeline:
    """The programs of a pipeline.

    Parameters:
        folder: for the database and the logs.
        url: of RabbitMQ.
        settings: environment variables.
    """

    def __init__(self, folder: Path, url: str, settings: dict[str, str]) -> None:
        parts = urlsplit(url)
        self.folder: Final = folder
        self.virtual_host: Final = unquote(parts.path[1:])
        self.foreigner: Final = Foreigner(url)
        self.api_port: Final = find_free_port()
        self.source_port: Final = find_free_port()
        self.programs: Final[list[Program]] = []
        self.environment: Final = {
            "RABBITMQ_HOST": f"{parts.hostname}:{parts.port}",
            "RABBITMQ_USER": str(parts.username),
            "RABBITMQ_PASSWORD": str(parts.password),
            "RABBITMQ_VHOST": self.virtual_host,
            "PIPELINE_DATA": str(folder),
            "API_PORT": str(self.api_port),
            "SOURCE_PORT": str(self.source_port),
            "SOURCE_URL": f"http://127.0.0.1:{self.source_port}",
            "FETCH_TIMEOUT": "20",
            "FETCH_BACKOFF": "0.1",
            "LEASE_SECONDS": "5",
            **settings,
        }
        self.http: Final = httpx.Client(base_url=f"http://127.0.0.1:{self.api_port}", timeout=30)

    def start(self, part: str, **settings: str) -> Program:
        """Start a part, and wait until it is ready."""
        program = Program(self.folder, self.environment | settings, "examples.fetch_pipeline", "--only", part)
        self.programs.append(program)
        program.until("Uvicorn running" if part in ("all", "api", "source") else "fetch-pipeline is ready")
        return program

    def run(self, *command: str) -> None:
        """Run a program to its end."""
        program = Program(self.folder, self.environment, *command)
        assert program.process.wait(60) == 0, program.said()

    def close(self) -> None:
        """Stop everything that was started."""
        self.http.close()
        for program in reversed(self.programs):
            program.close()

    def post(self, station: str, days: int = 2) -> str:
        """Start a job by the API; its id."""
        answer = self.http.post("/jobs", json={"station": station, "days": days})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> Job:
        """Where a job is."""
        answer = self.http.get(f"/jobs/{job_id}")
        return answer.json() if answer.status_code == 200 else {"status": None, "hops": []}

    def hop(self, job_id: str, queue: str) -> Job:
        """A job at one queue."""
        return next((hop for hop in self.job(job_id)["hops"] if hop["queue"] == queue), {"state": None})

    def when(self, job_id: str, status: str) -> Job:
        """Wait until a job has a status."""

        def look() -> Job | None:
            job = self.job(job_id)
            return job if job["status"] == status else None

        return wait_for(look, lambda: f"{self.job(job_id)}\n" + "\n".join(each.said() for each in self.programs))

    def at(self, job_id: str, queue: str, state: str) -> None:
        """Wait until a job is in a state at a queue."""
        wait_for(lambda: self.hop(job_id, queue)["state"] == state, lambda: self.job(job_id))

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Look into the database."""
        engine = create_engine(f"sqlite:///{self.folder / 'pipeline.db'}")
        try:
            with engine.connect() as connection:
                return [tuple(row) for row in connection.execute(text(sql))]
        finally:
            engine.dispose()

    def asked(self) -> dict[str, int]:
        """How often each job has asked the source."""
        return httpx.get(f"http://127.0.0.1:{self.source_port}/calls", timeout=30).json()  # type: ignore[no-any-return]


StartPipeline = Callable[..., Pipeline]


@pytest.fixture
def start_pipeline(tmp_path: Path, rabbitmq: RabbitMQ) -> Iterator[StartPipeline]:
    """Start these parts of a pipeline, with these environment variables."""
    made = []

    def start(*parts: str, **settings: str) -> Pipeline:
        pipeline = Pipeline(tmp_path, rabbitmq.url(), settings)
        made.append(pipeline)
        for part in parts:
            pipeline.start(part)
        return pipeline

    yield start
    for pipeline in made:
        pipeline.close()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, one_rabbitmq: RabbitMQ) -> Iterator[Pipeline]:
    """A whole pipeline that the tests of one file share: each asks for a station of its own."""
    found = Pipeline(tmp_path_factory.mktemp("pipeline"), one_rabbitmq.url(), {})
    try:
        for part in ("source", "workers", "api"):
            found.start(part)
        yield found
    finally:
        found.close()
