"""The line between a supervisor and its child: signs of life go up, requests come down, and neither outlives the other."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from typing import Final, NoReturn

import msgspec

from conveyor.core.pause import Switch, Switches
from conveyor.runtime.health import Health
from conveyor.runtime.metrics import Snapshot

OWNER: Final = "CONVEYOR_OWNER"
CHANNEL: Final = "CONVEYOR_CHANNEL"
CHILD: Final = "CONVEYOR_CHILD"
PAUSED: Final = "CONVEYOR_PAUSED"
HEARTBEAT_SECONDS: Final = 1.0
"""Between two signs of life."""
EAGER_SECONDS: Final = 0.1
"""Between two signs of life while it is not ready, so that it is known at once when it is."""
GOODBYE_SECONDS: Final = 1.0
"""How long a last word may take to get out."""
PR_SET_PDEATHSIG: Final = 1
"""prctl(2): the kernel sends a signal when the thread that started this process ends."""


class Beat(msgspec.Struct, frozen=True, omit_defaults=True):
    """A sign of life.

    Parameters:
        goodbye: the last one: it has finished what it had and holds nothing any more.
        switches: what it knows of paused queues: its successor has to know it, too.
    """

    health: Health
    snapshot: Snapshot
    goodbye: bool = False
    switches: Mapping[str, Switch] = {}


class Ask(msgspec.Struct, frozen=True):
    """A supervisor's request to drain and end.

    Parameters:
        grace_seconds: release what has not finished by then; None: release nothing that runs, and take the time it takes
            (the supervisor will end it: what made the process grow must not be handed on uncounted).
    """

    why: str
    grace_seconds: float | None


class ChildLink:
    """A child's end of the line. From its creation on the process ends, at once, with its supervisor.

    Parameters:
        owner: the identity under which this process has to hold leases: the supervisor gives them back by this name.
        process: this process' name among its siblings.
        switches: what earlier processes knew of paused queues.
    """

    def __init__(self, owner: str, process: str, line: socket.socket, switches: Switches | None = None) -> None:
        self.owner = owner
        self.process = process
        self.switches: Switches = dict(switches or {})
        self._line = line
        self._unsent = bytearray()
        self._lock = threading.Lock()
        self._asks: list[Ask] = []
        self._hear: Callable[[Ask], object] | None = None
        die_with_parent()
        # A thread, so that it sees the end of the supervisor also while the event loop stands still.
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> ChildLink | None:
        """The line that this process' supervisor left in the environment; None where there is no supervisor.

        Call it first of all, before the application is imported. The variables are taken out of the environment, so that
        programs started from here do not take them for theirs; a crash from now on leaves its stacks on stderr.
        """
        if CHANNEL not in environment:
            return None
        line = socket.socket(fileno=int(environment.pop(CHANNEL)))
        line.set_inheritable(False)
        faulthandler.enable()
        switches = msgspec.json.decode(environment.pop(PAUSED, "{}"), type=dict[str, Switch])
        return cls(environment.pop(OWNER), environment.pop(CHILD), line, switches)

    async def run(
        self,
        health: Callable[[], Health],
        snapshot: Callable[[], Snapshot],
        drain: Callable[[Ask], object],
        switches: Callable[[], Switches] = dict,
    ) -> None:
        """Give signs of life from this event loop until cancelled.

        Parameters:
            drain: called in this loop when the supervisor asks; it returns at once and lets the process drain.
            switches: gives what is known of paused queues.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            self._hear = lambda ask: loop.call_soon_threadsafe(drain, ask)
            early, self._asks = self._asks, []
        for ask in early:
            drain(ask)
        while True:
            state = health()
            self._send(Beat(state, snapshot(), switches=switches()))
            await asyncio.sleep(HEARTBEAT_SECONDS if state.ready else EAGER_SECONDS)

    def goodbye(self, health: Health, snapshot: Snapshot) -> None:
        """Say that this process drained; without it, its end counts as a crash. Call it last, then exit with 0."""
        self._unsent += msgspec.json.encode(Beat(health, snapshot, goodbye=True)) + b"\n"
        with contextlib.suppress(OSError):
            while self._unsent and select.select([], [self._line], [], GOODBYE_SECONDS)[1]:
                del self._unsent[: self._line.send(self._unsent, socket.MSG_DONTWAIT)]

    def _send(self, beat: Beat) -> None:
        """Send without waiting; while an earlier beat has not got out, a new one is not worth queueing."""
        if not self._unsent:
            self._unsent += msgspec.json.encode(beat) + b"\n"
        with contextlib.suppress(OSError):  # full, or the supervisor is gone: _listen() knows
            del self._unsent[: self._line.send(self._unsent, socket.MSG_DONTWAIT)]

    def _listen(self) -> NoReturn:
        with contextlib.suppress(OSError), self._line.makefile("rb") as lines:
            for line in lines:
                ask = msgspec.json.decode(line, type=Ask)
                with self._lock:
                    if self._hear is None:
                        self._asks.append(ask)
                        continue
                with contextlib.suppress(RuntimeError):  # the loop has ended already
                    self._hear(ask)
        os._exit(1)


def die_with_parent() -> None:
    """Let the kernel end this process with the one that started it (Linux); whoever calls it watches a pipe as well."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
