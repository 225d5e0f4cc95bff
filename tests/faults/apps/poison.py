"""Handlers that hurt whoever runs them, when the message says so."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conveyor import Conveyor, RetryPolicy

app = Conveyor("poison")
POLICY = RetryPolicy(attempts=2, initial=0.05, crashes=int(os.environ.get("CRASHES", "3")))
"""Three crashes: after the second one a message runs alone, and takes nobody with it."""


@dataclass(frozen=True)
class Dose:
    kind: str


@dataclass(frozen=True)
class ThreadDose:
    kind: str


@dataclass(frozen=True)
class CpuDose:
    kind: str


def note(kind: str) -> None:
    """Remember that this was handled, whatever becomes of the process."""
    with Path("handled").open("a") as handled:
        handled.write(f"{kind}\n")


def slice_of_memory() -> bytearray:
    """Five megabytes that are really there."""
    return bytearray(b"x" * 5_000_000)


def die(kind: str) -> None:
    """Do to this process what the message says; return where it says nothing bad."""
    match kind:
        case "exit":
            os._exit(7)
        case "segfault":
            ctypes.string_at(0)
        case "sys.exit":
            sys.exit(3)
        case "loop":
            while True:
                pass
        case "memory":
            hoard = []
            while True:
                hoard.append(slice_of_memory())
                time.sleep(0.02)


@app.worker(retry=POLICY, concurrency=4)
async def swallow(dose: Dose) -> None:
    await asyncio.sleep(0.01)  # time for the neighbours to begin
    if dose.kind == "memory":  # the event loop runs on: nothing but the memory is wrong
        hoard = []
        while True:
            hoard.append(slice_of_memory())
            await asyncio.sleep(0.02)
    die(dose.kind)
    note(dose.kind)


@app.worker(retry=POLICY, concurrency=4, timeout=0.5)
def swallow_in_thread(dose: ThreadDose) -> None:
    die(dose.kind)
    note(dose.kind)


@app.worker(retry=POLICY, concurrency=2, cpu=True, timeout=60.0)
def swallow_elsewhere(dose: CpuDose) -> None:
    die(dose.kind)
    note(dose.kind)


@app.worker(retry=POLICY, topic="plain")
async def swallow_anything(found: dict[str, Any]) -> None:
    note("plain")
