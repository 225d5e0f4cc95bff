"""The steady application, whose loops are never taken for calm: when it is ready again, they have said themselves that all is well."""

from __future__ import annotations

from conveyor.runtime import loop
from tests.faults.apps.steady import app

__all__ = ["app"]

loop.CALM_SECONDS = float("inf")  # type: ignore[misc]
