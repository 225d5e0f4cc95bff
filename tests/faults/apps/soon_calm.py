"""The steady application, whose loops are taken for calm sooner: a test need not wait for what only shows that nothing flaps."""

from __future__ import annotations

from conveyor.runtime import loop
from tests.faults.apps.steady import app

__all__ = ["app"]

loop.CALM_SECONDS = 1.0  # type: ignore[misc]
