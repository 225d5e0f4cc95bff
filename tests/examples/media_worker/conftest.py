"""The media worker as its users run it: programs, on a RabbitMQ and with a folder of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from PIL import Image

from servers.rabbitmq import RabbitMQ
from servers.server import find_free_port
from tests.examples.beside import Foreigner, Program, wait_for


class Media:
    """The programs of a media worker, and the files of its users.

    Parameters:
        folder: for the files, the data and the logs.
        url: of RabbitMQ.
        settings: environment variables.
    """

    def __init__(self, folder: Path, url: str, settings: dict[str, str]) -> None:
        self.folder: Final = folder
        self.root: Final = folder / "media"
        self.root.mkdir(exist_ok=True)
        self.foreigner: Final = Foreigner(url, declares=settings.get("MEDIA_QUEUE_TYPE") != "quorum")
        self.port: Final = find_free_port()
        self.programs: Final[list[Program]] = []
        self.environment: Final = {
            "CONVEYOR_BROKER": url,
            "MEDIA_ROOT": str(self.root),
            "MEDIA_BACKOFF": "0.1",
            "MEDIA_LEASE_SECONDS": "5",
            "DATA_SERVICE_PORT": str(self.port),
            "DATA_SERVICE_FILE": str(folder / "users.db"),
            "DATA_SERVICE_TIMEOUT": "2",
            "DATA_SERVICE_RETRY_PAUSE": "0.05",
            **settings,
        }
        self.http: Final = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def start(self, part: str) -> Program:
        """Start a part, and wait until it is ready."""
        program = Program(self.folder, self.environment, "examples.media_worker", "--only", part)
        self.programs.append(program)
        program.until("Uvicorn running" if part == "service" else "media is ready")
        return program

    def close(self) -> None:
        """Stop everything that was started."""
        self.http.close()
        for program in reversed(self.programs):
            program.close()

    def image(self, name: str = "cat.jpg", size: tuple[int, int] = (800, 600), **options: Any) -> Path:
        """Put an image into the media folder."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 60).convert("RGB").save(path, **options)
        return path

    def send(self, path: str, user_id: int = 1, *, headers: dict[str, str] | None = None, **info: Any) -> None:
        """Ask for a file to be processed, as another program does."""
        self.foreigner.send("media.process", {"user_id": user_id, "file_info": {"path": path, **info}}, headers=headers)

    def files(self, user_id: int = 1) -> list[str]:
        """The paths of a user's files that the data service knows."""
        found = self.http.get(f"/api/v1/users/{user_id}/files").json()["files"]
        assert all(file["status"] == "processed" for file in found)
        return [file["path"] for file in found]

    def calls(self) -> list[dict[str, Any]]:
        """The PATCH requests that the data service got: request_id, key and status of the answer."""
        return self.http.get("/calls").json()  # type: ignore[no-any-return]

    def misbehave(self, **faults: object) -> None:
        """Let the data service fail from now on."""
        self.http.put("/faults", json={"times": 1, **faults}).raise_for_status()

    def known(self, number: int, user_id: int = 1) -> list[str]:
        """Wait until the data service knows so many files of a user."""
        wait_for(lambda: len(self.files(user_id)) >= number, self.said)
        return self.files(user_id)

    def dead(self, number: int) -> list[tuple[Any, dict[str, Any]]]:
        """Wait for so many dead letters; what is in them."""

        def look() -> list[tuple[Any, dict[str, Any]]] | None:
            found = self.foreigner.peek("media.process.dead")
            return [(json.loads(body), headers) for body, headers in found] if len(found) >= number else None

        return wait_for(look, self.said)

    def said(self) -> str:
        """What all programs wrote."""
        return "\n".join(program.said() for program in self.programs)


StartMedia = Callable[..., Media]


@pytest.fixture
def start_media(tmp_path: Path, rabbitmq: RabbitMQ) -> Iterator[StartMedia]:
    """Start these parts, with these environment variables."""
    made = []

    def start(*parts: str, **settings: str) -> Media:
        media = Media(tmp_path, rabbitmq.url(), settings)
        made.append(media)
        for part in parts:
            media.start(part)
        return media

    yield start
    for media in made:
        media.close()


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory, one_rabbitmq: RabbitMQ) -> Iterator[Media]:
    """A worker with its data service that the tests of one file share: each works for a user of its own."""
    found = Media(tmp_path_factory.mktemp("media"), one_rabbitmq.url(), {"MEDIA_ATTEMPTS": "4"})
    try:
        found.start("service")
        found.start("worker")
        yield found
    finally:
        found.close()
