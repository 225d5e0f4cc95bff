"""How a delivery ends: the verdicts, and the one pure function that decides on them."""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from conveyor.core.message import Message
from conveyor.core.retry import RetryPolicy
from conveyor.core.words import counted, keepable
from conveyor.errors import JobCancelled, PayloadError, Reject, Retry, is_outage

SUSPECT_AFTER_CRASHES: Final = 2
"""One death may be anybody's (a deployment, the kernel); after a second one the message runs alone."""
OUTAGE_SECONDS: Final = 2.0
"""How long a message waits, at least, when the broker or the database could not be reached for it."""
LONGEST_ERROR: Final = 4_000
"""Characters of an error's text that are kept with a message."""


class Reason(enum.StrEnum):
    """Why a message became a dead letter."""

    REJECTED = "rejected"
    """The handler raised Reject, or the policy has no retry for its error."""
    EXHAUSTED = "exhausted"
    """Every attempt failed."""
    INVALID = "invalid"
    """The body does not decode into what the handler takes."""
    CRASHED = "crashed"
    """Nobody ever said how its handling ended: the processes died, lost their connection, or slept past the lease."""
    EXPIRED = "expired"
    """Its time to be handled was over."""


class Done(msgspec.Struct, frozen=True, gc=False):
    """The handler succeeded; emits are published with it, or it is not done.

    Parameters:
        result: what a job returned, as JSON text, for the journal; brokers do not care. None where nothing is kept of it.
        unkept: why nothing is kept of it; "" where it is, or where it returned nothing.
        repeated: nothing was done: the ledger knew the message already.
        cancelled: somebody cancelled it, before it began or while it ran; or its handler did.
        error: what the handler said when it did.
    """

    emits: tuple[Message, ...] = ()
    result: str | None = None
    unkept: str = ""
    repeated: bool = False
    cancelled: bool = False
    error: str = ""


class RetryAt(msgspec.Struct, frozen=True, gc=False):
    """The attempt failed and counts; deliver again at due (Unix seconds)."""

    due: float
    error: str
    traceback: str = ""


class Release(msgspec.Struct, frozen=True, gc=False):
    """Not started, or not to be counted: give it back, for anyone from due (Unix seconds; 0.0 is at once) on.

    Neither this delivery nor an attempt is counted.
    """

    due: float = 0.0


class Dead(msgspec.Struct, frozen=True, gc=False):
    """Given up: keep the message whole, with the reason."""

    reason: str
    error: str
    traceback: str = ""


Verdict = Done | RetryAt | Release | Dead
DONE: Final = Done()
REPEATED: Final = Done(repeated=True)
CANCELLED: Final = Done(cancelled=True)


def verdict_on_error(
    error: BaseException, *, attempts: int, policy: RetryPolicy, now: float, chance: float, traceback: str = ""
) -> Verdict:
    """What becomes of a message whose handler raised error.

    Parameters:
        attempts: attempts that failed before this one.
        policy: the worker's policy.
        now: Unix seconds.
        chance: uniform in [0, 1), for the jitter.
        traceback: kept beside the error.
    """
    text = describe(error)
    if is_outage(error):
        # It is not the message's fault, and may outlast any number of attempts.
        return Release(now + OUTAGE_SECONDS * (1 + chance))
    if isinstance(error, JobCancelled) and not error.id:
        return Done(cancelled=True, error=text)
    if isinstance(error, Reject):
        return Dead(Reason.REJECTED, text, traceback)
    if isinstance(error, PayloadError):
        return Dead(Reason.INVALID, text, traceback)
    rule = policy if isinstance(error, Retry) else policy.policy_for(error)
    if rule is None:
        return Dead(Reason.REJECTED, text, traceback)
    attempt = attempts + 1
    if attempt >= rule.attempts:
        return Dead(Reason.EXHAUSTED, text, traceback)
    if isinstance(error, Retry) and error.after_seconds is not None:
        return RetryAt(now + error.after_seconds, text, traceback)
    return RetryAt(now + rule.wait_seconds(attempt, chance), text, traceback)


def verdict_on_arrival(
    message: Message, *, crashes: int, policy: RetryPolicy, now: float, last_error: str = ""
) -> Dead | None:
    """What becomes of a message before it is handled: None to go on, or the end of it.

    Parameters:
        crashes: earlier deliveries that ended without a settlement.
        last_error: what is known about the last one.
    """
    if crashes >= policy.crashes:
        return Dead(
            Reason.CRASHED,
            f"{counted(crashes, 'delivery', 'deliveries')} of it ended without a word: the process died, "
            "lost its connection to the broker, or slept past its lease"
            + (f"; last: {last_error}" if last_error else ""),
        )
    if message.expires is not None and message.expires <= now:
        return Dead(Reason.EXPIRED, f"expired {now - message.expires:.1f} s before it was delivered")
    return None


def describe(error: BaseException) -> str:
    """An error as one text, bounded, that every store can keep: its type and what it says."""
    try:
        said = str(error)
    except Exception as broken:  # a __str__ that raises must not hurt the runner
        said = f"(its text cannot be had: {type(broken).__name__})"
    text = keepable(f"{type(error).__name__}: {said}" if said else type(error).__name__)
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 1] + "…"
