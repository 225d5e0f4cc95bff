"""The keeper: takes an application's journal in, keeps it in the archive, and answers questions about it."""

from __future__ import annotations

from typing import Final

from conveyor.broker import Broker, Clock

ASK_TOPIC: Final = "conveyor.journal.ask"
"""Questions are published under it (conveyor.core.questions); every keeper hears them in a temporary queue of its own."""
