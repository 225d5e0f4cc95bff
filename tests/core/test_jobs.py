"""What the entries of the journal add up to, in whichever order they arrive."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from conveyor.core.jobs import JobFilter, Status, Wish, job_of, jobs_of, wish_of
from conveyor.core.journal import NOWHERE, Entry, Kind, in_order, stops

MOMENTS = st.integers(0, 5).map(float)
ENTRIES = st.builds(
    Entry,
    kind=st.sampled_from(Kind),
    at=MOMENTS,
    message_id=st.just("m"),
    topic=st.just("t"),
    worker=st.just("shop.charge"),
    attempt=st.integers(0, 3),
    crashes=st.integers(0, 2),
    started=st.none() | MOMENTS,
    reason=st.sampled_from(("", "rejected", "exhausted")),
    error=st.sampled_from(("", "boom", "bang")),
    done=st.none() | MOMENTS,
    result=st.none() | st.just("1"),
)


def entry(kind: Kind, at: float = 1.0, id: str = "m", worker: str = "shop.charge", **more: object) -> Entry:
    made = Entry(kind, at, id, "placed", "" if kind is Kind.PUBLISHED else worker)
    return msgspec.structs.replace(made, **more)


def history(kinds: str) -> list[Entry]:
    """What happened, one second after the other; the attempts are counted as brokers do."""
    told, attempt = [], 1
    for at, kind in enumerate(map(Kind, kinds.split()), 1):
        told.append(entry(kind, float(at), attempt=attempt))
        attempt = {Kind.RETRIED: attempt + 1, Kind.DEAD: 1}.get(kind, attempt)
    return told


@given(st.data(), st.lists(ENTRIES, min_size=1, max_size=8))
def test_a_job_is_the_same_in_whichever_order_its_entries_arrive_and_however_often(
    data: st.DataObject, entries: list[Entry]
) -> None:
    shuffled = data.draw(st.permutations(entries + data.draw(st.lists(st.sampled_from(entries), max_size=4))))
    assert job_of(shuffled) == job_of(entries)
    assert jobs_of(shuffled) == jobs_of(entries)
    assert in_order(shuffled) == in_order(entries)


@pytest.mark.parametrize(
    ("kinds", "status"),
    [
        ("published", Status.WAITING),
        ("published started", Status.RUNNING),
        ("published started progressed", Status.RUNNING),
        ("published started retried", Status.RETRYING),
        ("published started retried started", Status.RUNNING),
        ("published started released", Status.WAITING),
        ("published started succeeded", Status.DONE),
        ("published duplicate", Status.DONE),
        ("published succeeded started", Status.DONE),
        ("published dead", Status.DEAD),
        ("published dead started", Status.RUNNING),
        ("published dead started succeeded", Status.DONE),
        ("published cancelled", Status.CANCELLED),
        ("published cancelling", Status.CANCELLED),
        ("published retried cancelling", Status.CANCELLED),
        ("published started cancelling", Status.RUNNING),
        ("published started cancelling released", Status.CANCELLED),
        ("published started cancelling cancelled", Status.CANCELLED),
        ("published started cancelling succeeded", Status.DONE),
        ("published dead cancelling", Status.DEAD),
        ("published dead cancelling retried", Status.RETRYING),
        ("published started cancelling dead released", Status.WAITING),
        ("published dead retried cancelling", Status.CANCELLED),
        ("published cancelling dead retried cancelling released", Status.CANCELLED),
    ],
)
def test_a_job_is_what_its_last_word_says_but_success_stays(kinds: str, status: Status) -> None:
    job = job_of(history(kinds))
    assert job.status is status
    assert (job.ended is not None) == status.ended


@pytest.mark.parametrize(
    ("kinds", "let_go"),
    [
        ("published", False),
        ("published cancelling", True),
        ("published started cancelling", True),
        ("published retried cancelling started released", True),
        ("published started cancelling cancelled", False),
        ("published started succeeded cancelling", False),
        ("published cancelling dead", False),
        ("published dead cancelling", False),
        ("published dead cancelling retried", False),
        ("published cancelling dead retried", False),
        ("published cancelling dead retried cancelling", True),
        ("published dead started cancelling", True),
        ("published dead redriven cancelling", True),
        ("published cancelling dead redriven", False),
        ("published dead redriven dead cancelling", False),
        ("published dead redriven cancelling dead", False),
    ],
)
def test_a_message_is_to_be_let_go_from_the_wish_to_its_end_and_not_when_it_is_redriven(
    kinds: str, let_go: bool
) -> None:
    job = [entry(Kind(kind), at, topic="shop.charge") for at, kind in enumerate(kinds.split(), 1)]
    wish = wish_of(job)
    assert (wish is not None and wish.holds) is let_go
    if wish is not None:
        assert wish.at == max(each.at for each in job if each.kind is Kind.CANCELLING)
        assert wish.over == ({"shop.charge"} if not let_go and "dead" in kinds.split() else set())


def test_an_event_is_let_go_by_whoever_comes_to_it_but_those_that_had_given_it_up() -> None:
    wish = entry(Kind.CANCELLING, 3.0, worker="")
    of_two = [entry(Kind.DEAD, 2.0, worker="shop.mail"), entry(Kind.STARTED, 1.0, worker="shop.charge"), wish]
    known = Wish(3.0, holds=True, over=frozenset({"shop.mail"}))
    assert wish_of(of_two) == known
    assert wish_of([*of_two, entry(Kind.CANCELLED, 4.0, worker="shop.charge")]) == known  # there may be a third one
    assert wish_of(of_two[:2]) is None


@pytest.mark.parametrize("reason", ["rejected", "invalid"])
def test_what_no_attempt_could_change_has_failed_and_is_not_dead(reason: str) -> None:
    assert job_of([entry(Kind.DEAD, reason=reason)]).status is Status.FAILED


def test_a_wish_to_cancel_is_for_every_worker_and_makes_no_job_of_its_own() -> None:
    wish = entry(Kind.CANCELLING, 3.0, worker="")
    done, waiting = entry(Kind.SUCCEEDED, 2.0), entry(Kind.RETRIED, 2.0, worker="shop.ship")
    found = {job.worker: job.status for job in jobs_of([entry(Kind.PUBLISHED), done, waiting, wish])}
    assert found == {"shop.charge": Status.DONE, "shop.ship": Status.CANCELLED}
    assert [job.status for job in jobs_of([entry(Kind.PUBLISHED), wish])] == [Status.CANCELLED]


def test_a_job_tells_of_its_last_attempt() -> None:
    job = job_of(
        [
            entry(Kind.PUBLISHED, 1.0),
            entry(Kind.RETRIED, 3.0, attempt=1, started=2.0, error="boom", due=4.0, process="a/1"),
            entry(Kind.STARTED, 5.0, attempt=2, started=5.0, process="b/2"),
            entry(Kind.PROGRESSED, 6.0, attempt=2, done=3.0, total=10.0, note="halfway", process="b/2"),
        ]
    )
    assert (job.status, job.attempts, job.started, job.process) == (Status.RUNNING, 2, 5.0, "b/2")
    assert (job.done, job.total, job.note, job.error, job.created) == (3.0, 10.0, "halfway", "boom", 1.0)


def test_what_an_earlier_attempt_said_of_its_progress_is_not_said_of_a_later_one() -> None:
    known = [
        entry(Kind.STARTED, 1.0, attempt=1, started=1.0),
        entry(Kind.PROGRESSED, 2.0, attempt=1, done=9.0, total=10.0, note="nearly"),
    ]
    assert job_of(known).done == 9.0
    known.append(entry(Kind.RETRIED, 3.0, attempt=1, started=1.0, error="boom"))
    assert job_of(known).done == 9.0
    known.append(entry(Kind.STARTED, 4.0, attempt=2, started=4.0))
    job = job_of(known)
    assert (job.done, job.total, job.note) == (None, None, "")
    known.append(entry(Kind.PROGRESSED, 5.0, attempt=2, done=1.0))
    assert (job_of(known).done, job_of(known).note) == (1.0, "")
    known.append(entry(Kind.STARTED, 6.0, attempt=2, crashes=1, started=6.0))
    assert job_of(known).done is None


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[Entry], list[Entry]]:
    """What happened to a message from one hand-over to the next, as one clock tells it, and as those of three machines do."""
    hand_overs = draw(st.lists(st.sampled_from(("crashed", "retried", "released")), max_size=5))
    end = draw(st.sampled_from(("succeeded", "dead", "cancelled", "retried", "given up")))
    ahead = draw(st.tuples(*[st.integers(-1_000, 1_000)] * 3))
    told: list[Entry] = []
    attempt, crashes = 1, 0
    for number, outcome in enumerate([*hand_overs, end]):
        machine = draw(st.integers(0, 2))
        at = 2.0 * number
        more: dict[str, Any] = {"attempt": attempt, "crashes": crashes, "process": str(machine)}
        if outcome == "given up":
            told.append(
                entry(Kind.DEAD, at + 1, **more | {"attempt": attempt - 1}, reason="crashed", error=str(number))
            )
            break
        if outcome == "crashed" or draw(st.booleans()):
            told.append(entry(Kind.STARTED, at, started=at, **more))
        if outcome == "crashed":
            crashes += 1
            continue
        error = str(number) if outcome in ("retried", "dead") else ""
        told.append(entry(Kind(outcome), at + 1, started=at, error=error, **more))
        attempt += outcome == "retried"
    skewed = [
        msgspec.structs.replace(
            each,
            at=each.at + ahead[int(each.process)],
            started=None if each.started is None else each.started + ahead[int(each.process)],
        )
        for each in told
    ]
    return told, skewed


@given(lives())
def test_no_clock_that_is_ahead_puts_an_earlier_attempt_behind_a_later_one(
    told: tuple[list[Entry], list[Entry]],
) -> None:
    straight, skewed = map(job_of, told)
    given_back = any(each.kind is Kind.RELEASED for each in told[0])
    # A dead letter and somebody who gave it back: which was first, only their clocks tell, for it may have been redriven.
    assume(not (given_back and straight.status is Status.DEAD))
    assert straight.process == told[0][-1].process
    for field in ("status", "attempts", "crashes", "error", "process"):
        assert getattr(skewed, field) == getattr(straight, field)


@pytest.mark.parametrize("ahead", [-100.0, 100.0])
def test_a_job_whose_last_attempt_ran_where_the_clock_is_behind_has_ended(ahead: float) -> None:
    retried = [entry(Kind.RETRIED, n + ahead, attempt=n, started=n - 0.5 + ahead, error=str(n)) for n in (1, 2)]
    dead = entry(Kind.DEAD, 3.0, attempt=3, started=2.5, error="3", reason="exhausted")
    job = job_of([*retried, dead])
    assert (job.status, job.error, job.started, job.attempts) == (Status.DEAD, "3", 2.5, 3)
    again = job_of([*retried, dead, entry(Kind.STARTED, 1_000.0, attempt=1, started=1_000.0)])  # it is redriven
    assert (again.status, again.started) == (Status.RUNNING, 1_000.0)


def test_a_dead_letter_that_was_put_back_waits_until_it_is_handled() -> None:
    dead = entry(Kind.DEAD, 3.0, attempt=2, started=2.5, error="boom", reason="exhausted", queue="shop.charge")
    back = entry(Kind.REDRIVEN, 4.0, worker="", queue="shop.charge")
    job = job_of([dead, back])
    assert (job.status, job.ended, job.reason, job.error) == (Status.WAITING, None, "", "boom")
    assert job_of([dead, msgspec.structs.replace(back, queue="shop.mail")]).status is Status.DEAD  # another worker's
    assert job_of([dead, back, entry(Kind.STARTED, 5.0, attempt=1, queue="shop.charge")]).status is Status.RUNNING
    again = msgspec.structs.replace(dead, at=6.0, started=5.0)
    assert job_of([dead, back, again]).status is Status.DEAD
    assert [job.status for job in jobs_of([dead, back])] == [Status.WAITING]
    assert job_of([dead, back, entry(Kind.STARTED, 5.0, attempt=2, queue="shop.charge")]).status is Status.RUNNING
    assert jobs_of([back]) == []  # somebody else knows of it


def test_what_others_died_of_is_given_up_and_runs_again_when_it_is_redriven() -> None:
    died = [entry(Kind.STARTED, float(n), attempt=1, crashes=n, started=float(n)) for n in range(3)]
    dead = entry(Kind.DEAD, 5.0, attempt=0, crashes=3, reason="crashed", error="its process died")
    assert job_of([*died, dead]).status is Status.DEAD
    assert job_of([*died, msgspec.structs.replace(dead, at=-5.0)]).status is Status.DEAD  # the clock there is behind
    assert job_of([*died, dead, entry(Kind.STARTED, 9.0, attempt=1, started=9.0)]).status is Status.RUNNING
    assert job_of([*died, dead, entry(Kind.RETRIED, 9.0, attempt=1, started=8.0)]).status is Status.RETRYING


def test_what_the_broker_did_not_take_as_done_is_a_dead_letter_until_it_is_redriven() -> None:
    done = entry(Kind.SUCCEEDED, 5.0, attempt=1, started=4.0, result="1", process="a/1")
    refused = entry(Kind.DEAD, 5.5, attempt=1, reason="rejected", error="the broker refuses it", process="a/1")
    job = job_of([done, refused])
    assert (job.status, job.error, job.result, job.ended) == (Status.FAILED, "the broker refuses it", None, 5.5)
    again = entry(Kind.SUCCEEDED, 9.0, attempt=1, started=8.0, result="2", process="a/1")
    assert (job_of([done, refused, again]).status, job_of([done, refused, again]).result) == (Status.DONE, "2")
    elsewhere = [msgspec.structs.replace(refused, process="b/1"), msgspec.structs.replace(refused, crashes=1)]
    assert all(job_of([done, other]).status is Status.DONE for other in elsewhere)  # what is repeated changes nothing


def test_the_result_is_that_of_the_last_attempt_that_was_done() -> None:
    first = entry(Kind.SUCCEEDED, 5.0, attempt=1, result="1")  # its lease was lost, and its clock is ahead
    second = entry(Kind.SUCCEEDED, 3.0, attempt=1, crashes=1, result="2", process="b/1")
    job = job_of([first, second])
    assert (job.result, job.ended, job.process) == ("2", 3.0, "b/1")


def test_success_leaves_no_error_behind_and_has_the_result() -> None:
    job = job_of([entry(Kind.RETRIED, 1.0, error="boom"), entry(Kind.SUCCEEDED, 2.0, attempt=2, result="[1]")])
    assert (job.error, job.result, job.ended, job.attempts) == ("", "[1]", 2.0, 2)


def test_several_workers_of_one_message_are_several_jobs_and_none_is_one_that_waits() -> None:
    jobs = jobs_of(
        [
            entry(Kind.PUBLISHED, 1.0),
            entry(Kind.SUCCEEDED, 2.0, worker="shop.charge"),
            entry(Kind.DEAD, 3.0, worker="shop.mail", reason="exhausted"),
            entry(Kind.PUBLISHED, 1.5, "other"),
        ]
    )
    assert {(job.id, job.worker, job.status) for job in jobs} == {
        ("m", "shop.charge", Status.DONE),
        ("m", "shop.mail", Status.DEAD),
        ("other", "", Status.WAITING),
    }
    assert jobs[0].worker == "shop.mail"


def test_what_no_queue_received_is_no_job_unless_it_was_published_again() -> None:
    nowhere = entry(Kind.PUBLISHED, reason=NOWHERE)
    assert jobs_of([nowhere]) == []
    assert [job.status for job in jobs_of([nowhere, entry(Kind.PUBLISHED, 2.0)])] == [Status.WAITING]
    assert [job.status for job in jobs_of([nowhere, entry(Kind.SUCCEEDED, 2.0)])] == [Status.DONE]
    assert [stop.message_id for stop in stops([nowhere])] == ["m"]


@pytest.mark.parametrize(("told", "journey"), [(None, "m"), ("root", "root")])
def test_a_job_names_its_journey_also_where_it_began_it(told: str | None, journey: str) -> None:
    assert job_of([entry(Kind.PUBLISHED, correlation_id=told)]).correlation_id == journey


def test_of_nothing_there_is_no_job() -> None:
    with pytest.raises(ValueError, match="nothing is known"):
        job_of([])
    assert jobs_of([]) == []


@pytest.mark.parametrize("name", ["charge", "shop.charge"])
def test_a_worker_may_be_named_without_its_application(name: str) -> None:
    job = job_of([entry(Kind.SUCCEEDED)])
    assert JobFilter(worker=name).fits(job)
    assert not JobFilter(worker="harge").fits(job)
