"""Peers: what others use for the same work, each at the best sensible settings that are known for it.

All but Huey run in environments of their own (scripts/setup-peers), where nothing of Conveyor is installed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


def run(
    work: Coroutine[Any, Any, dict[str, float]], loop: Callable[[], asyncio.AbstractEventLoop] | None = None
) -> dict[str, float]:
    """The figures of a worker that is still running: its process ends with them, as a peer that is cancelled may hang."""
    return asyncio.Runner(loop_factory=loop).run(work)
