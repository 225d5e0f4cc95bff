"""The order processor, which dies where the file $DIES_AT says: name:number, counted from when the next message arrives."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from conveyor.runtime import points
from examples.order_processor.app import app

__all__ = ["app"]

orders = Path(os.environ["DIES_AT"])
name, left = "", 0


def die(passed: str) -> None:
    global name, left  # noqa: PLW0603 - for the process
    if passed == "received" and orders.exists():
        name, _, number = orders.read_text().partition(":")
        left = int(number)
        orders.unlink()
    left -= passed == name
    if name and left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


points.arm(die)
