"""The archive: what is kept of a journal, for how long, how much, and how it is found again."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor import brokers
from conveyor.core import questions
from conveyor.core.jobs import JobFilter, Status, Wish
from conveyor.core.journal import Entry, Kind, Successes, Told, each_of, in_order
from conveyor.core.questions import CUT, JobsOf, JourneyOf
from conveyor.errors import JournalError
from conveyor.runtime import archive as archives
from conveyor.runtime import tables
from conveyor.runtime.archive import Archive
from conveyor.runtime.journal import IN_MEMORY
from conveyor.testing.clock import TurnableClock


def entry(kind: Kind, id: str, at: float = 1.0, *, worker: str = "shop.charge", **more: object) -> Entry:
    given = {"correlation_id": None, "topic": "placed", **more}
    return Entry(kind=kind, at=at, message_id=id, worker="" if kind is Kind.PUBLISHED else worker, **given)  # type: ignore[arg-type]


WITHOUT = (None, None, None)
"""A success that began at no known time, and is on no journey but its own."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.journal"


def count(archive: Archive) -> int:
    return len(archive.jobs(JobFilter(), 100_000).jobs)


def test_what_is_written_is_read_again_whole(path: Path) -> None:
    told = [
        entry(Kind.PUBLISHED, "m", 1.25),
        entry(
            Kind.RETRIED, "m", 2.5, attempt=1, started=2.0, due=3.0, error="Ünicode \0 \ud7ff 'quoted'", traceback="…"
        ),
        entry(Kind.PROGRESSED, "m", 4.0, attempt=2, done=0.5, total=1e300, note="half"),
        entry(Kind.SUCCEEDED, "m", 5.0, attempt=2, result='{"a": [1, "ü"]}'),
    ]
    archive = Archive(path).open()
    archive.write([("batch", told)])
    archive.close()
    again = Archive(path).open(create=False)
    assert in_order(again.journey("m").entries) == told
    again.close()


IDS = [f"m{n}" for n in range(6)]
SUCCESSES = st.builds(
    Successes,
    st.sampled_from(["placed", "shop.charge"]),
    st.sampled_from(["shop.charge", "shop.mail"]),
    st.sampled_from(["host/1", "host/2"]),
    st.just("shop.charge"),
    st.integers(1, 3),
    st.integers(0, 2),
    st.lists(
        st.tuples(
            st.sampled_from(IDS),
            st.floats(0.0, 10.0),
            st.none() | st.floats(0.0, 10.0),
            st.none() | st.sampled_from(IDS),
            st.none() | st.sampled_from(IDS),
        ),
        max_size=25,
    ),
)
ENTRIES = st.builds(
    entry,
    st.sampled_from(Kind),
    st.sampled_from(IDS),
    st.floats(0.0, 10.0),
    topic=st.sampled_from(["placed", "shop.charge"]),
    correlation_id=st.none() | st.sampled_from(IDS),
)


@given(batches=st.lists(st.tuples(st.lists(ENTRIES, max_size=4), st.lists(SUCCESSES, max_size=3)), max_size=3))
def test_successes_are_kept_in_short_and_found_like_all_others(
    batches: list[tuple[list[Entry], list[Successes]]],
) -> None:
    in_short, at_length = Archive(IN_MEMORY).open(), Archive(IN_MEMORY).open()
    for number, (entries, successes) in enumerate(batches):
        successes.sort(key=lambda each: len(each.each) >= archives.FEW)  # the order in which they are written
        told: list[Told] = [*entries, *successes]
        in_short.write([(str(number), told)])
        at_length.write([(str(number), list(each_of(told)))])
    for status in (None, *Status):
        for which in (
            JobFilter(status=status),
            JobFilter(status=status, worker="mail"),
            JobFilter(status=status, topic="placed", since=5.0),
        ):
            for limit in (3, 1_000):
                assert in_short.jobs(which, limit) == at_length.jobs(which, limit)
    for id in IDS:
        assert in_order(in_short.of([id])) == in_order(at_length.of([id]))
        short, long = in_short.journey(id), at_length.journey(id)
        assert (in_order(short.entries), short.more) == (in_order(long.entries), long.more)
        assert set(short.others) == set(long.others)
    assert set(in_short.journey("m").others) == set(at_length.journey("m").others)
    assert in_short.cancelled(100) == at_length.cancelled(100)
    in_short.close()
    at_length.close()


def test_a_batch_that_comes_again_changes_nothing(path: Path) -> None:
    archive = Archive(path).open()
    for _ in range(3):
        archive.write([("batch", [entry(Kind.PUBLISHED, "a"), entry(Kind.PUBLISHED, "b")])])
    assert len(archive.of(["a", "b"])) == 2
    archive.close()


def test_a_journey_is_found_by_each_of_its_messages_and_by_its_own_id(path: Path) -> None:
    archive = Archive(path).open()
    archive.write(
        [
            ("1", [entry(Kind.PUBLISHED, "root-1"), entry(Kind.PUBLISHED, "child-1", correlation_id="root-1")]),
            ("2", [entry(Kind.SUCCEEDED, "child-1", correlation_id="root-1"), entry(Kind.PUBLISHED, "root-2")]),
        ]
    )
    for id in ("root-1", "child-1", "child", "root-1"):
        assert len(archive.journey(id).entries) == 3
    assert archive.journey("nobody").entries == []
    ambiguous = archive.journey("root")
    assert (ambiguous.entries, ambiguous.others) == ([], ("root-1", "root-2"))
    archive.close()


def test_of_a_journey_that_is_too_long_its_beginning_is_told_and_what_was_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "LONGEST_JOURNEY", 5)
    archive = Archive(path).open()
    children = [entry(Kind.PUBLISHED, f"child {n}", float(n), correlation_id="root") for n in range(10)]
    archive.write([("1", children[:4]), ("2", [entry(Kind.PUBLISHED, "root", -1.0)]), ("3", children[4:])])
    for asked, told in {
        "root": ["root", "child 0", "child 1", "child 2", "child 3"],
        "child 7": ["child 7", "root", "child 0", "child 1", "child 2"],
    }.items():
        found = archive.journey(asked)
        assert ([e.message_id for e in found.entries], found.more) == (told, True)
    archive.close()


def on_journey(kind: Kind, id: str, cause: str, **more: object) -> Entry:
    return msgspec.structs.replace(entry(kind, id), correlation_id="root", causation_id=cause, **more)


def test_of_a_long_journey_what_was_asked_for_is_told_with_its_causes_and_what_it_led_to(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "LONGEST_JOURNEY", 12)
    monkeypatch.setattr(archives, "NEARBY", 30)
    archive = Archive(path).open()
    ids = [f"{n:04}" for n in range(500)]
    archive.write([("0", [entry(Kind.PUBLISHED, "root"), *[on_journey(Kind.PUBLISHED, id, "root") for id in ids]])])
    for id in ids:  # each waited behind all others, and what it led to is told before it, and of another process
        led = on_journey(Kind.PUBLISHED, f"a{id}", id), on_journey(Kind.SUCCEEDED, f"b{id}", f"a{id}")
        archive.write([(id, [*led, on_journey(Kind.SUCCEEDED, id, "root")])])
    for asked, told in {
        "0400": ["0400", "0400", "root", "a0400", "b0400", *ids[:7]],
        "a0400": ["a0400", "root", "0400", "0400", "b0400", *ids[:7]],
        "b04": [*(f"b04{n:02}" for n in range(10)), "root", "a0400"],
        "b0401": ["b0401", "root", "a0401", "0401", "0401", *ids[:7]],
        "b0499": ["b0499", "root", "a0499", "0499", "0499", *ids[:7]],
    }.items():
        found = archive.journey(asked)
        assert ([e.message_id for e in found.entries], found.more) == (told, True)
        assert {e.message_id.startswith(asked) for e in found.entries[: found.own]} == {True}
        assert not any(e.message_id.startswith(asked) for e in found.entries[found.own :])
    archive.close()


def test_what_a_message_led_to_is_found_also_where_it_failed_long_before_it_succeeded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "LONGEST_JOURNEY", 7)
    monkeypatch.setattr(archives, "NEARBY", 10)
    archive = Archive(path).open()
    others = [on_journey(Kind.SUCCEEDED, f"other {n}", "root") for n in range(200)]
    led = [on_journey(Kind.PUBLISHED, f"led to {n}", "job") for n in (1, 0, 2)]
    succeeded = [*led[:2], on_journey(Kind.SUCCEEDED, "job", "root"), led[2]]
    for at, told in enumerate(
        (others[:50], [on_journey(Kind.RETRIED, "job", "root")], others[50:100], succeeded, others[100:])
    ):
        archive.write([(str(at), told)])
    told_first = ["job", "job", "led to 1", "led to 0", "led to 2", "other 0", "other 1"]
    assert [e.message_id for e in archive.journey("job").entries] == told_first
    archive.close()


def test_a_cause_with_much_to_tell_does_not_take_the_place_of_what_was_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "LONGEST_JOURNEY", 5)
    archive = Archive(path).open()
    archive.write([("1", [entry(Kind.PROGRESSED, "root", float(n), done=float(n)) for n in range(10)])])
    archive.write([("2", [on_journey(Kind.PUBLISHED, "job", "root"), on_journey(Kind.DEAD, "job", "root")])])
    assert [e.message_id for e in archive.journey("job").entries] == ["job", "job", "root", "root", "root"]
    archive.close()


def test_what_is_asked_for_by_its_whole_id_is_not_taken_for_what_only_begins_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "LONGEST_JOURNEY", 2)
    archive = Archive(path).open()
    archive.write([("1", [on_journey(Kind.PUBLISHED, id, "root") for id in ("job-11", "job-10", "job-1")])])
    found = archive.journey("job-1")
    assert ([e.message_id for e in found.entries], found.own) == (["job-1", "job-11"], 1)
    archive.close()


def test_messages_that_say_they_caused_each_other_are_told_once(path: Path) -> None:
    archive = Archive(path).open()
    archive.write([("1", [on_journey(Kind.PUBLISHED, "a", "b\0'\""), on_journey(Kind.PUBLISHED, "b\0'\"", "a")])])
    assert [e.message_id for e in archive.journey("b").entries] == ["b\0'\"", "a"]
    archive.close()


@contextlib.contextmanager
def steps(archive: Archive) -> Iterator[list[int]]:
    """How many hundreds of SQLite's steps are taken while the block lasts."""
    taken = [0]

    def step() -> bool:
        taken[0] += 1
        return False

    archive._db.set_progress_handler(step, 100, id="count")
    yield taken
    archive._db.set_progress_handler(None, id="count")


@pytest.mark.parametrize("asked", ["journey", "00000500", "0000050"])
def test_neither_the_beginning_of_a_journey_nor_a_message_on_it_is_looked_for_in_all_of_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr(archives, "NEARBY", 1_000)
    archive = Archive(path).open()

    def counted() -> int:
        with steps(archive) as taken:
            assert len(archive.journey(asked).entries) == archives.LONGEST_JOURNEY
        return taken[0]

    def more(times: int) -> None:
        for _ in range(times):
            successes = Successes("placed", "shop.charge", "host/1", "q", 1, 0, [])
            successes.each.extend((f"{next(numbers):08}", 1.0, None, "journey", "journey") for _ in range(10_000))
            archive.write([(successes.each[0][0], [successes])])

    numbers = itertools.count()
    more(1)
    few = counted()
    more(9)
    assert counted() < 2 * few
    archive.close()


def test_of_a_journey_that_is_too_large_for_an_answer_tracebacks_go_before_entries(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "LARGEST_ANSWER_BYTES", 10_000)
    archive = Archive(path).open()
    tries = [entry(Kind.RETRIED, "root", float(n), error="boom", traceback="x" * 1_000) for n in range(8)]
    archive.write([("1", tries), ("2", [entry(Kind.SUCCEEDED, "root", 9.0, result="y" * 4_000)])])
    answer = archive.answer("", JourneyOf("root"))
    assert (len(answer.entries), answer.more) == (9, False)
    assert {(e.error, e.traceback) for e in answer.entries} == {("boom", ""), ("", "")}
    assert answer.entries[-1].unkept == CUT
    archive.write([("3", [entry(Kind.PUBLISHED, "child", 10.0 + n, correlation_id="root") for n in range(40)])])
    answer = archive.answer("", JourneyOf("root"))
    assert (answer.entries[0].message_id, answer.more) == ("root", True)
    assert len(answer.entries) > 20
    archive.close()


def test_what_was_asked_for_is_told_whole_of_a_journey_that_is_too_large_for_an_answer(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "LARGEST_ANSWER_BYTES", 10_000)
    archive = Archive(path).open()
    own = [on_journey(Kind.RETRIED, "job", "root", error="boom", traceback="x" * 1_000)]
    own += [on_journey(Kind.SUCCEEDED, "job", "root", result="y" * 1_000)]
    others = [on_journey(Kind.RETRIED, f"other {n}", "root", error="z" * 500, traceback="x") for n in range(40)]
    archive.write([("1", [entry(Kind.PUBLISHED, "root"), *others, *own])])
    answer = archive.answer("", JourneyOf("job"))
    assert (list(answer.entries[:2]), answer.entries[2].message_id, answer.more) == (own, "root", True)
    assert {e.traceback for e in answer.entries[2:]} == {""}
    archive.write([("2", [on_journey(Kind.RETRIED, "job", "root", traceback="x" * 1_000)] * 12)])
    answer = archive.answer("", JourneyOf("job"))
    # Each attempt is worth more than some of them whole.
    assert [e.message_id for e in answer.entries[:15]] == [*["job"] * 14, "root"]
    assert {e.traceback for e in answer.entries} == {""}
    archive.write([("3", [failed := entry(Kind.DEAD, "root", error="boom", traceback="x" * 1_000)])])
    answer = archive.answer("", JourneyOf("root"))
    assert (answer.entries[1], {e.traceback for e in answer.entries[2:]}) == (failed, {""})
    archive.close()


def test_jobs_are_found_by_status_worker_topic_and_age_the_newest_first(path: Path) -> None:
    archive = Archive(path).open()
    archive.write(
        [
            (
                "batch",
                [
                    entry(Kind.PUBLISHED, "done"),
                    entry(Kind.SUCCEEDED, "done", 2.0, result="1"),
                    entry(Kind.PUBLISHED, "waits", topic="shop.resize"),
                    entry(Kind.STARTED, "runs", 3.0, started=3.0),
                    entry(Kind.RETRIED, "again", 4.0, error="boom"),
                    entry(Kind.RETRIED, "ran", 4.0, error="boom"),
                    entry(Kind.SUCCEEDED, "ran", 5.0),
                    entry(Kind.DEAD, "dead", 6.0, reason="exhausted"),
                    entry(Kind.DEAD, "failed", 7.0, reason="rejected", worker="shop.mail"),
                    entry(Kind.CANCELLED, "cancelled", 8.0),
                ],
            )
        ]
    )

    def found(**which: object) -> list[str]:
        return [job.id for job in archive.jobs(JobFilter(**which), 10).jobs]  # type: ignore[arg-type]

    assert found() == ["cancelled", "failed", "dead", "ran", "again", "runs", "waits", "done"]
    for status, ids in {
        Status.DONE: ["ran", "done"],
        Status.WAITING: ["waits"],
        Status.RUNNING: ["runs"],
        Status.RETRYING: ["again"],
        Status.DEAD: ["dead"],
        Status.FAILED: ["failed"],
        Status.CANCELLED: ["cancelled"],
    }.items():
        assert found(status=status) == ids
    assert found(worker="mail") == found(worker="shop.mail") == ["failed"]
    assert found(worker="resize") == found(topic="shop.resize") == ["waits"]
    assert found(since=6.5) == ["cancelled", "failed"]
    assert found(ids=("dead", "done")) == ["dead", "done"]
    assert archive.jobs(JobFilter(), 10).jobs[-1].result is None  # whoever waits for it gets it
    page = archive.jobs(JobFilter(), 3)
    assert ([job.id for job in page.jobs], page.more) == (["cancelled", "failed", "dead"], True)
    archive.close()


def test_what_is_cancelled_is_told_until_it_has_ended(path: Path) -> None:
    archive = Archive(path).open()
    told = {
        "waits": [Kind.PUBLISHED],
        "dead": [Kind.PUBLISHED, Kind.DEAD],
        "redriven": [Kind.DEAD, Kind.RETRIED],
        "done": [Kind.SUCCEEDED],
    }
    topic = "shop.charge"
    entries = [entry(kind, id, float(at), topic=topic) for id, kinds in told.items() for at, kind in enumerate(kinds)]
    archive.write([("1", entries), ("2", [entry(Kind.CANCELLING, id, 9.0, worker="", topic=topic) for id in told])])
    assert list(archive.cancelled(10)) == ["redriven", "waits"]
    assert list(archive.cancelled(2)) == ["redriven"]
    archive.close()


def test_that_an_event_is_cancelled_is_told_also_when_one_of_its_workers_has_ended_it(path: Path) -> None:
    archive = Archive(path).open()
    for kind in (Kind.SUCCEEDED, Kind.CANCELLED, Kind.DEAD):
        wish = entry(Kind.CANCELLING, kind.value, 9.0, worker="")
        archive.write([(kind.value, [wish, entry(kind, kind.value, 10.0, worker="shop.mail")])])
    found = archive.cancelled(10)
    assert found == {
        "dead": Wish(9.0, holds=True, over=frozenset({"shop.mail"})),
        "cancelled": Wish(9.0, holds=True),
        "succeeded": Wish(9.0, holds=True),
    }
    archive.close()


def test_many_jobs_are_read_page_by_page(path: Path) -> None:
    archive = Archive(path).open()
    archive.write([("batch", [entry(Kind.SUCCEEDED, f"{n:04}", float(n)) for n in range(3 * archives.PAGE)])])
    assert count(archive) == 3 * archives.PAGE
    archive.close()


def test_what_is_too_old_goes(path: Path) -> None:
    clock = TurnableClock(1_000.0)
    archive = Archive(path, age_seconds=100.0, clock=clock).open()
    archive.write([("old", [entry(Kind.PUBLISHED, "old")])])
    clock.turn(60.0)
    archive.write([("new", [entry(Kind.PUBLISHED, "new")])])
    while archive.prune():
        pass
    assert count(archive) == 2
    clock.turn(60.0)
    while archive.prune():
        pass
    assert [job.id for job in archive.jobs(JobFilter(), 10).jobs] == ["new"]
    clock.turn(1_000.0)
    while archive.prune():
        pass
    assert count(archive) == 0
    archive.write([("newer", [entry(Kind.PUBLISHED, "newer")])])
    while archive.prune():
        pass
    assert count(archive) == 1  # it is not taken for what went before
    archive.close()


def test_pruning_looks_at_what_is_old_however_much_is_young() -> None:
    def pruned(young: int) -> int:
        clock = TurnableClock(1_000.0)
        archive = Archive(IN_MEMORY, age_seconds=100.0, clock=clock).open()
        archive.write([(f"old {n}", [entry(Kind.DEAD, "m")]) for n in range(50)])
        clock.turn(101.0)
        archive.write([(f"young {n}", [entry(Kind.DEAD, "m")]) for n in range(young)])
        with steps(archive) as taken:
            assert not archive.prune()
        assert archive._rows("SELECT count(*), min(id) FROM batches") == [(young, "young 0")]
        archive.close()
        return taken[0]

    assert pruned(20_000) < 2 * pruned(200)


def test_of_successes_that_are_too_old_nothing_is_left(path: Path) -> None:
    clock = TurnableClock(1_000.0)
    archive = Archive(path, age_seconds=100.0, clock=clock).open()
    for process in ("host/1", "host/2"):
        successes = Successes("placed", "shop.charge", process, "q", 1, 0, [("m", 1.0, None, "j", None)] * 300)
        archive.write([(process, [successes, entry(Kind.DEAD, process)])])
        clock.turn(60.0)
    while archive.prune():
        pass
    assert count(archive) == 2
    assert {found.process for found in archive.of(["m"])} == {"host/2"}
    assert archive._rows("SELECT process FROM origins") == [("host/2",)]
    clock.turn(60.0)
    while archive.prune():
        pass
    assert [archive._rows(f"SELECT count(*) FROM {table}") for table in ("entries", "successes", "origins")] == [
        [(0,)]
    ] * 3
    assert archive.journey("j").entries == []
    archive.close()


def test_the_file_stays_within_its_size_and_the_newest_stay(path: Path) -> None:
    archive = Archive(path, size_bytes=1_000_000).open()
    for batch in range(60):
        archive.write([(str(batch), [entry(Kind.PUBLISHED, f"{batch}-{n}", error="x" * 400) for n in range(100)])])
        while archive.prune(always=False):
            pass
    while archive.prune():
        pass
    assert len(archive.of(["59-99"])) == 1
    assert archive.of(["0-0"]) == []
    assert 1_000 < count(archive) < 3_000
    archive.close()
    assert path.stat().st_size < 1_500_000


def test_nobody_else_may_read_the_file(path: Path) -> None:
    archive = Archive(path).open()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    archive.close()


def test_keepers_that_make_the_file_at_the_same_time_share_it(path: Path) -> None:
    opened: list[Archive] = []
    threads = [threading.Thread(target=lambda: opened.append(Archive(path).open())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, archive in enumerate(opened):
        archive.write([(str(number), [entry(Kind.PUBLISHED, str(number))])])
    assert [count(archive) for archive in opened] == [4] * 4
    for archive in opened:
        archive.close()


def test_a_file_that_was_deleted_is_begun_anew(path: Path) -> None:
    archive = Archive(path).open()
    archive.write([("1", [entry(Kind.PUBLISHED, "lost")])])
    for file in path.parent.glob("shop.journal*"):
        file.unlink()
    archive.write([("2", [entry(Kind.PUBLISHED, "kept")])])
    assert [job.id for job in archive.jobs(JobFilter(), 10).jobs] == ["kept"]
    assert path.exists()
    archive.close()


def test_a_full_disk_is_said_in_words_and_over_when_there_is_room(path: Path) -> None:
    archive = Archive(path).open()
    many = [entry(Kind.PUBLISHED, str(n), error="x" * 1_000) for n in range(200)]
    archive._db.execute("PRAGMA max_page_count = 20")
    with pytest.raises(JournalError, match=r"disk of .* is full: the journal waits, work goes on"):
        archive.write([("batch", many)])
    archive._db.execute("PRAGMA max_page_count = 1000000")
    archive.write([("batch", many)])
    assert count(archive) == 200
    archive.close()


def test_the_last_of_the_disk_is_left_to_the_queues(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive(path).open()
    monkeypatch.setattr(archives, "KEPT_FREE_BYTES", 2**62)
    monkeypatch.setattr(archives, "KEPT_FREE_SHARE", 1.0)
    with pytest.raises(JournalError, match="almost full"):
        archive.write([("batch", [entry(Kind.PUBLISHED, "m")])])
    archive.close()


def test_a_question_that_takes_too_long_is_answered_with_what_was_found(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Archive(path).open()
    archive.write([(str(n), [entry(Kind.SUCCEEDED, f"{n}-{m}") for m in range(500)]) for n in range(20)])
    monkeypatch.setattr(archives, "QUESTION_SECONDS", 0.0)
    assert archive.jobs(JobFilter(worker="nobody"), 10) == ([], True)
    monkeypatch.undo()
    assert archive.jobs(JobFilter(worker="nobody"), 10) == ([], False)
    archive.close()


def test_an_answer_is_bounded_and_says_that_there_is_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive(path).open()
    archive.write([("batch", [entry(Kind.RETRIED, "m", float(n), error="x" * 4_000) for n in range(50)])])
    monkeypatch.setattr(questions, "LARGEST_ANSWER_BYTES", 40_000)
    answer = archive.answer("", JourneyOf("m"))
    assert 5 < len(answer.entries) < 15
    assert answer.more
    monkeypatch.setattr(archives, "LONGEST_JOURNEY", 10)
    assert archive.journey("m").more
    assert not archive.answer("", JobsOf()).more
    archive.close()


def test_what_is_no_journal_is_left_alone_and_refused_in_words(path: Path) -> None:
    with pytest.raises(JournalError, match="there is no journal"):
        Archive(path).open(create=False)
    assert not path.exists()
    path.write_bytes(b"certainly no database" * 100)
    with pytest.raises(JournalError, match="is no journal; move it away"):
        Archive(path).open()
    path.unlink()
    other = apsw.Connection(str(path))
    other.execute("CREATE TABLE somebody (else_s)")
    other.close()
    with pytest.raises(JournalError, match="a database of another program"):
        Archive(path).open()


async def test_of_a_queue_file_it_is_said_that_it_is_one_and_where_its_journal_is(tmp_path: Path) -> None:
    file = tmp_path / "lab.queue"
    broker = brokers.from_url(f"sqlite:///{file}")
    await broker.open()
    await broker.close()
    for create in (True, False):
        with pytest.raises(JournalError, match=r"it is a queue file of Conveyor.* would be .*/lab\.queue\.journal$"):
            Archive(file).open(create=create)
    Archive(tmp_path / "lab.queue.journal").open().close()
    with pytest.raises(JournalError, match=r"no journal; its journal is .*/lab\.queue\.journal$"):
        Archive(file).open(create=False)


def test_what_is_no_regular_file_is_refused_in_words(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(JournalError, match="cannot keep the journal .*: it is no regular file"):
            Archive(place).open()
    for place in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(JournalError, match="cannot read the journal .*: it is no file"):
            Archive(place).open(create=False)


def test_a_place_that_cannot_be_says_so(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="does not exist"):
        Archive(tmp_path / "nowhere" / "x.journal").open()
    with pytest.raises(JournalError, match="it is a folder"):
        Archive(tmp_path).open()


def test_a_file_of_the_first_version_is_taken_over_with_all_that_is_in_it(path: Path) -> None:
    old = apsw.Connection(str(path))
    old.execute("PRAGMA auto_vacuum = incremental; PRAGMA journal_mode = wal")
    old.execute(f"""
        CREATE TABLE batches (
            seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, arrived REAL NOT NULL, last_entry INTEGER NOT NULL
        );
        CREATE TABLE entries (seq INTEGER PRIMARY KEY AUTOINCREMENT, {tables.COLUMNS});
        CREATE INDEX entries_by_message ON entries (message_id);
        CREATE INDEX entries_by_journey ON entries (correlation_id) WHERE correlation_id IS NOT NULL;
        CREATE INDEX entries_by_rare_kind ON entries (kind) WHERE kind NOT IN ('published', 'succeeded');
        PRAGMA application_id = {tables.APPLICATION_ID}; PRAGMA user_version = 1;
    """)
    known = entry(Kind.SUCCEEDED, "old", 5.0)
    marks = ", ".join("?" * len(tables.FIELDS))
    old.execute(f"INSERT INTO entries ({tables.COLUMNS}) VALUES ({marks})", msgspec.structs.astuple(known))
    old.execute("INSERT INTO batches (id, arrived, last_entry) VALUES ('1', 1000.0, 1)")
    old.close()
    with pytest.raises(
        JournalError, match="an earlier version of Conveyor made it; it is brought up to date by the keeper"
    ):
        Archive(path).open(create=False)
    archive = Archive(path, age_seconds=100.0, clock=lambda: 1_200.0).open()
    reader = Archive(path).open(create=False)
    assert reader.journey("old").entries == [known]
    reader.close()
    new = Successes("placed", "shop.charge", "", "", 1, 0, [(id, 6.0, *WITHOUT) for id in ("a", "b", "c")])
    archive.write([("1", [known]), ("2", [new])])
    assert [job.id for job in archive.jobs(JobFilter(status=Status.DONE), 10).jobs] == ["c", "b", "a", "old"]
    still_running = apsw.Connection(str(path))  # its batches stay in the queue: none is lost, or taken for another
    with pytest.raises(apsw.SQLError, match="is a view"):
        still_running.execute("INSERT INTO entries (kind, message_id) VALUES ('succeeded', 'lost')")
    still_running.close()
    while archive.prune():
        pass
    assert [job.id for job in archive.jobs(JobFilter(), 10).jobs] == ["c", "b", "a"]
    archive.close()


def test_a_file_of_a_later_version_is_left_alone(path: Path) -> None:
    archive = Archive(path).open()
    archive._db.execute("PRAGMA user_version = 99")
    archive.close()
    with pytest.raises(JournalError, match="a later version of Conveyor"):
        Archive(path).open()


def test_in_memory_it_goes_with_its_object() -> None:
    archive = Archive(IN_MEMORY).open()
    archive.write([("batch", [entry(Kind.PUBLISHED, "m")])])
    assert count(archive) == 1
    archive.close()
    archive.open()
    assert count(archive) == 0
    archive.close()
