from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor.core.retry import NO_RETRY, RetryPolicy
from conveyor.errors import ConfigurationError

chances = st.floats(0, 1, exclude_max=True)


@st.composite
def policies(draw: st.DrawFn, *, jitter: bool = True) -> RetryPolicy:
    initial = draw(st.floats(0, 1e6))
    return RetryPolicy(
        attempts=draw(st.integers(1, 50)),
        initial=initial,
        maximum=draw(st.floats(initial, 1e9)),
        factor=draw(st.floats(1, 1e6)),
        jitter=draw(st.floats(0, 1)) if jitter else 0.0,
    )


@given(policies(), st.integers(1, 10_000), chances)
def test_no_wait_is_negative_or_longer_than_the_maximum(policy: RetryPolicy, attempt: int, chance: float) -> None:
    wait = policy.wait_seconds(attempt, chance)
    assert 0 <= wait <= policy.maximum_seconds


@given(policies(jitter=False))
def test_without_jitter_waits_never_shrink(policy: RetryPolicy) -> None:
    waits = [policy.wait_seconds(attempt, 0.5) for attempt in range(1, 60)]
    assert all(earlier <= later for earlier, later in pairwise(waits))
    assert waits[0] == policy.initial_seconds


@given(policies(), st.integers(1, 100), chances)
def test_jitter_takes_away_its_share_at_most(policy: RetryPolicy, attempt: int, chance: float) -> None:
    full = policy.wait_seconds(attempt, 0.0)
    assert full * (1 - policy.jitter) * (1 - 1e-9) <= policy.wait_seconds(attempt, chance) <= full


def test_a_back_off_doubles_up_to_its_maximum() -> None:
    policy = RetryPolicy(initial=1, maximum=timedelta(seconds=5), jitter=0)
    assert [policy.wait_seconds(attempt, 0.0) for attempt in (1, 2, 3, 4, 5)] == [1, 2, 4, 5, 5]


def test_no_initial_wait_is_no_wait_for_ever() -> None:
    assert {RetryPolicy(initial=0).wait_seconds(attempt, 0.0) for attempt in (1, 2, 100, 2_000)} == {0}


def test_the_rule_nearest_in_the_inheritance_decides() -> None:
    soon = RetryPolicy(initial=0.1)
    policy = RetryPolicy(rules={OSError: soon, ConnectionError: None})
    assert policy.policy_for(FileNotFoundError()) is soon
    assert policy.policy_for(ConnectionResetError()) is None
    assert policy.policy_for(KeyError()) is policy


def test_no_retry_is_one_attempt() -> None:
    assert NO_RETRY.attempts == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"crashes": 0},
        {"initial": -1.0},
        {"initial": 2, "maximum": 1},
        {"factor": 0.5},
        {"jitter": 1.5},
        {"jitter": -0.1},
    ],
)
def test_a_policy_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"RetryPolicy: "):
        RetryPolicy(**wrong)


@pytest.mark.parametrize("field", ["initial", "maximum", "factor", "jitter"])
def test_a_policy_that_is_no_number_is_refused(field: str) -> None:
    values: dict[str, Any] = {field: float("nan")}
    with pytest.raises(ConfigurationError):
        RetryPolicy(**values)
