"""Named points: the places where a process may die, each by a name that tests arm to kill it just there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

POINTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        # name: what is true when it is passed; row(s) of the crash table: P producer, H hand-off, R relay, C consumer
        "transaction.opening": "nothing was written, no database transaction is open (P1)",
        "received": "a delivery was fetched; its handler has not begun (C1)",
        "inbox.inserted": "the message is noted as handled, uncommitted (C2)",
        "work.written": "the application's writes are in the transaction, the outbox rows are not (P2, C3)",
        "outbox.inserted": "work, inbox and outbox rows are written; COMMIT has not been sent (P3, C4)",
        "committed": "COMMIT succeeded; the delivery is not settled, nothing is handed off (P4, C5)",
        "settled": "the delivery is settled; its outbox rows are not handed off (C6)",
        "handoff.publishing": "about to give claimed rows to the broker (H1)",
        "handoff.published": "the broker owns the messages; their rows are still there (H2, C7)",
        "handoff.deleted": "the rows are gone (H3)",
        "relay.claimed": "the relay holds rows that another process left (R1)",
        "relay.published": "the broker owns the messages; their rows are still there (R2)",
    }
)
"""Every point, with the state it stands for; "received" and "settled" are passed by the runner, the others by ledger and relay."""

Hook = Callable[[str], None]
_hook: Hook | None = None


def point(name: str) -> None:
    """Pass a named point; nothing happens unless a test has armed one."""
    if _hook is not None:
        _hook(name)


def arm(hook: Hook | None) -> None:
    """Have hook called with the name of every point that this process passes; None ends it."""
    global _hook  # noqa: PLW0603 - one hook a process: a point must cost nothing where none is armed
    _hook = hook
