"""Where jobs in other processes meet their test."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path


class Meeting:
    """Where jobs meet the test: a socket whose address a job is given."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "meeting")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen()
        self._server.setblocking(False)

    async def arrival(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        line, _ = await asyncio.wait_for(loop.sock_accept(self._server), 60)
        return line

    async def pid(self) -> int:
        with await self.arrival() as line:
            return int(await asyncio.get_running_loop().sock_recv(line, 100))

    def close(self) -> None:
        self._server.close()


async def gone(pid: int) -> None:
    """Wait until a process has ended and is reaped."""
    async with asyncio.timeout(60):
        while os.path.exists(f"/proc/{pid}"):  # noqa: PTH110, ASYNC240 - /proc does not block
            await asyncio.sleep(0.01)
