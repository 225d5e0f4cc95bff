"""When to try again: a policy is a value, its arithmetic is pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from conveyor.errors import ConfigurationError

DEFAULT_ATTEMPTS: Final = 5
"""A transient fault is over, or somebody has to look: 1 + 2 + 4 + 8 seconds of back-off."""
DEFAULT_CRASHES: Final = 5
"""A message at work in five processes that died is not there by accident, even where machines are killed daily."""


def _seconds(value: float | timedelta) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else float(value)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, how soon, and for which errors a handler is run again.

    The wait before attempt n + 1 is min(maximum, initial × factor^(n-1)), of which the share jitter is random
    ("equal jitter": M. Brooker, Exponential Backoff and Jitter, 2015).

    Parameters:
        attempts: runs of the handler at most, the first included.
        initial: seconds (or timedelta) before the second attempt.
        maximum: seconds (or timedelta) that no wait exceeds.
        factor: growth of the wait from one attempt to the next; at least 1.
        jitter: random share of the wait, 0 to 1.
        crashes: deliveries that may end with the death of the process before the message is given up; so often runs one that kills
            whoever runs it. From the third on it runs alone. Fewer than the default leave little room for bystanders.
        rules: exception type → the policy for it, or None for no retry; the type nearest in the exception's
            inheritance decides.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    attempts: int = DEFAULT_ATTEMPTS
    initial: float | timedelta = 1.0
    maximum: float | timedelta = 300.0
    factor: float = 2.0
    jitter: float = 0.5
    crashes: int = DEFAULT_CRASHES
    rules: Mapping[type[BaseException], RetryPolicy | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts: dict[str, Any] = {"attempts": self.attempts, "crashes": self.crashes}
        for name, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise ConfigurationError(f"RetryPolicy: {name} is a whole number from 1 on, not {count!r}")
        for kind, rule in self.rules.items():
            if rule is not None and not isinstance(rule, RetryPolicy):
                raise ConfigurationError(
                    f"RetryPolicy: the rule for {kind!r} is a RetryPolicy, or None for no retry, not {rule!r}"
                )
        if not (0 <= self.initial_seconds <= self.maximum_seconds):
            raise ConfigurationError("RetryPolicy: needs 0 <= initial <= maximum (seconds)")
        if not (self.factor >= 1 and 0 <= self.jitter <= 1):  # said so that NaN is refused, too
            raise ConfigurationError("RetryPolicy: factor is at least 1, jitter between 0 and 1")

    @property
    def initial_seconds(self) -> float:
        return _seconds(self.initial)

    @property
    def maximum_seconds(self) -> float:
        return _seconds(self.maximum)

    def policy_for(self, error: BaseException) -> RetryPolicy | None:
        """The policy that decides on this error; None where it is not to be retried."""
        for kind in type(error).__mro__:
            if kind in self.rules:
                return self.rules[kind]
        return self

    def wait_seconds(self, attempt: int, chance: float) -> float:
        """Seconds to wait after the attempt-th attempt (from 1) failed; chance is uniform in [0, 1)."""
        initial, maximum = self.initial_seconds, self.maximum_seconds
        try:
            wait = min(maximum, initial * self.factor ** (attempt - 1))
        except OverflowError:
            wait = maximum if initial else 0.0
        return wait * (1 - self.jitter * chance)


NO_RETRY: Final = RetryPolicy(attempts=1)
