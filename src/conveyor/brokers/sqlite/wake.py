"""Wake-up between processes: a datagram socket for every owner, in a folder beside the queue file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from conveyor.errors import BrokerError

CLOCK_TICK_NANOSECONDS: Final = 50_000_000
"""A folder's time of change has at least this resolution."""
LONGEST_ADDRESS: Final = 100
"""Bytes of a unix socket's path (sun_path has 108, on some systems 104)."""


class WakeSockets:
    """Who is alive, and how to wake them. That something came is all that a socket says; its content is nothing."""

    def __init__(self, path: Path) -> None:
        self.name = secrets.token_hex(8)
        """Our own socket, once it listens."""
        self._folder = path.with_name(path.name + ".wake")
        self._folder_handle = -1
        self._others: list[str] = []
        self._listed = 0
        """The folder's time of change when the others were listed."""
        self._listening: socket.socket | None = None
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.setblocking(False)

    @property
    def listening(self) -> bool:
        """Whether others can wake us, and see that we live."""
        return self._listening is not None

    def listen(self, woken: Callable[[], None]) -> None:
        """Have a socket of our own; woken is called on this event loop when somebody sent to it."""
        if self._listening is None:
            self._listening = self._bind()
            asyncio.get_running_loop().add_reader(self._listening, _drain, self._listening, woken)

    def _bind(self) -> socket.socket:
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(0o700)
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        bound.setblocking(False)
        place = self._folder / self.name
        try:
            bound.bind(self._address(self.name))
        except OSError as error:
            bound.close()
            raise BrokerError(f"cannot create the wake socket {place}: {error.strerror or error}") from error
        place.chmod(0o600)
        return bound

    def close(self) -> None:
        """Take our socket away."""
        (self._folder / self.name).unlink(missing_ok=True)
        self._sender.close()
        if self._listening is not None:
            asyncio.get_running_loop().remove_reader(self._listening)
            self._listening.close()
            self._listening = None
        if self._folder_handle >= 0:
            os.close(self._folder_handle)
            self._folder_handle = -1

    def wake_others(self) -> bool:
        """Wake everybody else; False where somebody turned out to be dead."""
        try:
            changed = self._folder.stat().st_mtime_ns
        except FileNotFoundError:
            return True
        if changed != self._listed:
            self._others = [each.name for each in self._folder.iterdir() if each.name != self.name]
            # A change within the same tick of the kernel's clock would not show.
            self._listed = changed if time.time_ns() - changed > CLOCK_TICK_NANOSECONDS else 0
        all_alive = True
        for name in self._others:
            try:
                self._sender.sendto(b"", self._address(name))
            except BlockingIOError:
                pass  # it has not even looked at the earlier ones
            except OSError:
                all_alive = False
        return all_alive

    def is_alive(self, name: str) -> bool:
        """Whether the process of a socket lives; the socket of a dead one is removed."""
        if name == self.name:
            return True
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(self._address(name))
            except (FileNotFoundError, ConnectionRefusedError):
                (self._folder / name).unlink(missing_ok=True)
                return False
            except OSError:
                return True  # whoever may not be asked is not declared dead
        return True

    def _address(self, name: str) -> str:
        """Addresses are short. Where the path is too long, Linux has a shorter one, through an open handle of the folder."""
        path = str(self._folder / name)
        if len(os.fsencode(path)) <= LONGEST_ADDRESS or not sys.platform.startswith("linux"):
            return path
        if self._folder_handle < 0:
            self._folder_handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._folder_handle}/{name}"


def _drain(listening: socket.socket, woken: Callable[[], None]) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            listening.recv(1)
    woken()
