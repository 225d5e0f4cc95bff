from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor.core.message import Message
from conveyor.core.retry import NO_RETRY, RetryPolicy
from conveyor.core.settle import (
    LONGEST_ERROR,
    Dead,
    Done,
    Reason,
    Release,
    RetryAt,
    describe,
    verdict_on_arrival,
    verdict_on_error,
)
from conveyor.errors import (
    BrokerFull,
    BrokerUnavailable,
    JobCancelled,
    LedgerUnavailable,
    PayloadError,
    PublishFailed,
    Reject,
    Retry,
)

NOW = 1_000.0
MESSAGE = Message("1", "order.created", b"{}")

errors: st.SearchStrategy[BaseException] = st.one_of(
    st.builds(ValueError, st.text()),
    st.builds(OSError, st.text()),
    st.builds(PayloadError, st.text()),
    st.builds(Reject, st.text()),
    st.builds(Retry, st.text(), after=st.none() | st.floats(0, 1e6)),
    st.builds(SystemExit),
    st.builds(KeyboardInterrupt),
)
policies = st.builds(
    RetryPolicy,
    attempts=st.integers(1, 10),
    rules=st.dictionaries(st.sampled_from([ValueError, OSError, Exception]), st.just(NO_RETRY) | st.none()),
)


@given(errors, st.integers(0, 20), policies, st.floats(0, 1, exclude_max=True))
def test_every_error_gets_a_verdict_and_none_is_retried_for_ever(
    error: BaseException, attempts: int, policy: RetryPolicy, chance: float
) -> None:
    verdict = verdict_on_error(error, attempts=attempts, policy=policy, now=NOW, chance=chance, traceback="t")
    assert isinstance(verdict, (RetryAt, Dead))
    assert verdict.error
    assert verdict.traceback == "t"
    if isinstance(verdict, RetryAt):
        assert verdict.due >= NOW
        assert attempts + 1 < policy.attempts


@pytest.mark.parametrize(
    "error",
    [
        BrokerUnavailable("away"),
        BrokerFull("no memory left"),
        LedgerUnavailable("away"),
        PublishFailed(refused={}, unknown={"1": "the connection was lost before the answer"}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_outage_costs_no_attempt(error: Exception) -> None:
    verdict = verdict_on_error(error, attempts=9, policy=NO_RETRY, now=NOW, chance=0.0)
    assert isinstance(verdict, Release)
    assert verdict.due > NOW


def test_a_message_that_a_broker_refuses_costs_an_attempt() -> None:
    error = PublishFailed(refused={"1": "too long"}, unknown={"2": "lost"})
    assert isinstance(verdict_on_error(error, attempts=0, policy=RetryPolicy(), now=NOW, chance=0.0), RetryAt)


def test_the_last_attempt_that_fails_is_the_end() -> None:
    policy = RetryPolicy(attempts=3)
    verdicts = [
        verdict_on_error(OSError("no"), attempts=attempts, policy=policy, now=NOW, chance=0.0) for attempts in (0, 1, 2)
    ]
    assert verdicts[0] == RetryAt(NOW + 1, "OSError: no")
    assert verdicts[1] == RetryAt(NOW + 2, "OSError: no")
    assert verdicts[2] == Dead(Reason.EXHAUSTED, "OSError: no")


def test_reject_ends_it_at_once() -> None:
    verdict = verdict_on_error(Reject("no such card"), attempts=0, policy=RetryPolicy(), now=NOW, chance=0.0)
    assert verdict == Dead(Reason.REJECTED, "Reject: no such card")


def test_a_handler_has_its_own_job_cancelled_but_fails_with_that_of_another_one() -> None:
    for error in (JobCancelled(), JobCancelled("enough"), pickle.loads(pickle.dumps(JobCancelled("enough")))):
        verdict = verdict_on_error(error, attempts=0, policy=RetryPolicy(), now=NOW, chance=0.0)
        assert verdict == Done(cancelled=True, error=describe(error))
    for error in (JobCancelled("it was", "other"), pickle.loads(pickle.dumps(JobCancelled("it was", "other")))):
        assert isinstance(verdict_on_error(error, attempts=0, policy=RetryPolicy(), now=NOW, chance=0.0), RetryAt)


def test_an_error_without_retry_in_the_policy_ends_it_at_once() -> None:
    policy = RetryPolicy(rules={ValueError: None})
    verdict = verdict_on_error(ValueError("x"), attempts=0, policy=policy, now=NOW, chance=0.0)
    assert verdict == Dead(Reason.REJECTED, "ValueError: x")


def test_a_payload_error_burns_no_retries() -> None:
    verdict = verdict_on_error(PayloadError("x"), attempts=0, policy=RetryPolicy(), now=NOW, chance=0.0)
    assert verdict == Dead(Reason.INVALID, "PayloadError: x")


def test_retry_names_its_own_time_and_still_counts() -> None:
    policy = RetryPolicy(attempts=2, rules={Exception: None})
    first = verdict_on_error(Retry(after=30.0), attempts=0, policy=policy, now=NOW, chance=0.0)
    assert isinstance(first, RetryAt)
    assert first.due == NOW + 30
    last = verdict_on_error(Retry(after=30.0), attempts=1, policy=policy, now=NOW, chance=0.0)
    assert isinstance(last, Dead)
    assert last.reason == Reason.EXHAUSTED


@given(st.integers(0, 20), st.none() | st.floats(0, 2 * NOW), st.text())
def test_a_message_is_handled_unless_it_expired_or_kills_processes(
    crashes: int, expires: float | None, last: str
) -> None:
    message = Message("1", "t", b"", expires=expires)
    verdict = verdict_on_arrival(message, crashes=crashes, policy=RetryPolicy(crashes=5), now=NOW, last_error=last)
    reason = None if verdict is None else verdict.reason
    if crashes >= 5:
        assert reason == Reason.CRASHED
    elif expires is not None and expires <= NOW:
        assert reason == Reason.EXPIRED
    else:
        assert reason is None


def test_what_is_known_about_the_last_crash_is_told() -> None:
    verdict = verdict_on_arrival(MESSAGE, crashes=5, policy=RetryPolicy(), now=NOW, last_error="killed by signal 11")
    assert verdict is not None
    assert "signal 11" in verdict.error


@given(st.text(max_size=3 * LONGEST_ERROR))
def test_the_text_of_an_error_is_bounded(text: str) -> None:
    assert len(describe(ValueError(text))) <= LONGEST_ERROR


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("never")


@pytest.mark.parametrize(("error", "text"), [(KeyError(), "KeyError"), (ValueError("x"), "ValueError: x")])
def test_an_error_is_told_by_its_type_and_its_text(error: BaseException, text: str) -> None:
    assert describe(error) == text


def test_an_error_whose_text_cannot_be_had_hurts_nobody() -> None:
    assert describe(Mute()) == "Mute: (its text cannot be had: RuntimeError)"
