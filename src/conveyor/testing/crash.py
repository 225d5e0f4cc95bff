"""Crashes on demand: kills this process at the n-th passing of a named point."""

from __future__ import annotations

import os
import signal
from typing import Final

from conveyor.errors import ConfigurationError
from conveyor.runtime import points

VARIABLE: Final = "CONVEYOR_CRASH"


def arm(wanted: str | None = None) -> None:
    """Arm a point: with ``outbox.inserted:3`` the process kills itself (SIGKILL) when it passes that for the third time.

    Parameters:
        wanted: name and number; None takes it from $CONVEYOR_CRASH, and does nothing where that is unset.

    Raises:
        ConfigurationError: there is no such point, or the number is none.
    """
    text = wanted if wanted is not None else os.environ.get(VARIABLE, "")
    if not text:
        return
    name, _, number = text.partition(":")
    if name not in points.POINTS or not (number or "1").isdecimal() or number == "0":
        raise ConfigurationError(
            f"{VARIABLE}={text!r}: needs name:number, with one of these names: {', '.join(points.POINTS)}"
        )
    left = int(number or "1")

    def hook(passed: str) -> None:
        nonlocal left
        if passed == name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    points.arm(hook)
