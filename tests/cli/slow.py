"""An application whose handlers take their time."""

from __future__ import annotations

from dataclasses import dataclass

from conveyor import Conveyor

app = Conveyor("slow")


@dataclass(frozen=True)
class Video:
    path: str


@app.worker(timeout=7_200)
async def encode(video: Video) -> None: ...


@app.worker(timeout=120)
async def resize(video: Video) -> None: ...


@app.worker(timeout=5)
async def note(video: Video) -> None: ...


@app.worker(timeout=None)
async def watch(video: Video) -> None: ...
