"""``conveyor trace``, ``jobs`` and ``journal``: what happened is told while it happens, when all has ended, and after a kill."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conveyor import brokers
from conveyor.cli.jobs import as_table
from conveyor.cli.terminal import out
from conveyor.cli.trace import as_json, as_text, told
from conveyor.core.jobs import Job, Status
from conveyor.core.journal import Entry, Kind, Stop, stops
from conveyor.core.message import Message
from conveyor.core.questions import Answer, JobsOf
from conveyor.errors import JournalError, NoKeeper
from conveyor.runtime import keeper as keepers
from conveyor.runtime.archive import Archive
from conveyor.runtime.ask import Asker
from conveyor.runtime.journal import journal_queue, journal_queues
from conveyor.runtime.keeper import Keeper

if TYPE_CHECKING:
    from tests.cli.conftest import Program

PATIENCE_SECONDS = 90.0

SLOW = """
import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from conveyor import Conveyor, RetryPolicy

app = Conveyor("slow", journal=True)

@dataclass
class Job:
    name: str

@app.worker(retry=RetryPolicy(attempts=2, initial=0.0))
async def work(job: Job) -> None:
    if job.name == "bad":
        raise RuntimeError("it is bad")
    if not Path("go").exists():
        Path("pid").write_text(str(os.getpid()))
        await asyncio.sleep(1_000)
"""


@contextmanager
def running(conveyor: Program, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of the program at work, ended by SIGTERM in order."""
    log = conveyor.folder / "log"
    with (
        log.open("ab") as output,
        subprocess.Popen(
            conveyor.command(*arguments), cwd=conveyor.folder, env=conveyor.environment, stdout=output, stderr=output
        ) as program,
    ):
        try:
            yield program
            program.send_signal(signal.SIGTERM)
            assert program.wait(PATIENCE_SECONDS) == 0, log.read_text()
        finally:
            program.kill()


async def until(conveyor: Program, kinds: set[str], id: str, *, app: str = "shop", messages: int = 1) -> list[Stop]:
    """Wait until a journey has so many messages and entries of all these kinds; its messages, causes first."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        file = conveyor.folder / f"{app}.queue"
        while not file.exists():
            await asyncio.sleep(0.05)
        broker = brokers.from_url(f"sqlite:///{file}")
        await broker.open()
        asker = Asker(broker, time.time)
        try:
            while True:
                with contextlib.suppress(NoKeeper):
                    (stop,) = stops((await asker.journey(id)).entries) or [Stop(id, "", ())]
                    found = [stop, *stop.leads_to]
                    if len(found) >= messages and all(kinds <= {e.kind.value for e in each.entries} for each in found):
                        return found
                await asyncio.sleep(0.05)
        finally:
            await asker.close()
            await broker.close()


async def apps_that_answer(conveyor: Program) -> set[str]:
    """The applications whose keepers answer questions on the folder's broker."""
    broker = brokers.from_url(f"sqlite:///{conveyor.folder / 'shop.queue'}")
    await broker.open()
    asker = Asker(broker, time.time)
    try:
        answer = await asker.ask(JobsOf())
        return set(await journal_queues(broker)) - set(answer.silent)
    finally:
        await asker.close()
        await broker.close()


def publish(conveyor: Program, *arguments: str) -> str:
    """Publish; the message's id."""
    published: str = conveyor.json("publish", *arguments)["id"]
    return published


def order(conveyor: Program, name: str) -> str:
    return publish(conveyor, "shop", "OrderCreated", "--data", json.dumps({"order_id": name, "total": "1"}))


def keeper_of(program: subprocess.Popen[bytes]) -> int | None:
    """The process below a supervisor that keeps the journal."""
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    for pid in map(int, children):
        try:
            if b"journal" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
        except FileNotFoundError:
            pass
    return None


@pytest.fixture
def shop(conveyor: Program) -> Program:
    """The program, with its journal on."""
    conveyor.environment["CONVEYOR_JOURNAL"] = "1"
    (conveyor.folder / "slow.py").write_text(SLOW)
    return conveyor


async def test_the_journey_over_all_hops_is_told_while_runners_run_and_when_they_have_ended(shop: Program) -> None:
    with running(shop, "run", "shop", "--processes", "2"):
        id = order(shop, "A-1")
        first, second = await until(shop, {"published", "succeeded"}, id, messages=2)
        assert (first.topic, second.topic) == ("order.created", "payment_processed")
        document = shop.json("trace", id, "--app", "shop")
        assert [message["caused_by"] for message in document["messages"]] == [None, id]
        assert [entry["kind"] for entry in document["messages"][1]["entries"]] == ["published", "succeeded"]
        processes = {entry["process"] for entry in document["messages"][1]["entries"]}
        assert processes <= {f"{socket.gethostname()}/{number}" for number in (1, 2)}  # as logs and conveyor top say
        text = shop.run("trace", id[:30], "--app", "shop")
        assert text.returncode == 0
        assert text.stderr == ""
        assert "shop.charge: attempt 1 succeeded in" in text.stdout
        assert "published by shop.charge" in text.stdout
        assert "shop.ship: attempt 1 succeeded in" in text.stdout
    after = shop.run("trace", second.message_id, "--broker", shop.queue_url)
    assert after.stdout.count("succeeded") == 2
    assert "← you asked for it" in after.stdout
    assert "read from shop.queue.journal, as it was left" in after.stderr
    assert shop.run("trace", id).stdout == shop.run("trace", id, "--file", "shop.queue.journal").stdout
    listed = shop.json("queues", "--all", "--broker", shop.queue_url)["queues"]
    assert [(queue["ready"], queue["dead"]) for queue in listed if queue["name"] == "conveyor.journal.shop"] == [(0, 0)]


def test_progress_that_is_nothing_yet_is_told_to_programs() -> None:
    entry = Entry(Kind.PROGRESSED, 1.0, "m", "shop.count", "shop.count", attempt=1, done=0.0, total=10.0)
    [message] = as_json(Answer("q", (entry,)))["messages"]
    [told] = message["entries"]
    assert (told["done"], told["total"], told["attempt"]) == (0.0, 10.0, 1)
    assert told.keys() == {"kind", "at", "worker", "attempt", "done", "total"}


async def test_without_a_broker_said_the_keepers_of_the_journals_here_are_asked_and_that_is_said(shop: Program) -> None:
    with running(shop, "run", "shop"):
        id = order(shop, "A-1")
        await until(shop, {"succeeded"}, id, messages=2)
        done = shop.run("trace", id)
        assert (done.returncode, done.stdout.count("succeeded in")) == (0, 2)
        assert "asked whoever keeps shop.queue.journal" in done.stderr
        aside = shop.run("jobs", "--file", "shop.queue.journal")
        assert "somebody may be writing: the newest entries may not be in it yet" in aside.stderr
    after = shop.run("jobs")
    assert (after.returncode, after.stdout.count("done")) == (0, 2)
    assert "read from shop.queue.journal, as it was left" in after.stderr


@pytest.mark.parametrize(
    ("disk", "said"),
    [
        ("full", "the newest entries are not in this: the disk is full"),
        ("slow", "the keeper is behind: 100 batches of entries still wait for it"),
    ],
)
async def test_entries_that_the_keeper_has_not_kept_yet_are_not_missing_without_a_word(
    shop: Program, monkeypatch: pytest.MonkeyPatch, disk: str, said: str
) -> None:
    queue, well = journal_queue("shop"), threading.Event()
    write = Archive.write

    def writes(archive: Archive, batches: Iterable[tuple[str, Sequence[Entry]]]) -> None:
        if disk == "slow":
            well.wait(PATIENCE_SECONDS)
        elif not well.is_set():
            raise JournalError("the disk is full")
        write(archive, batches)

    monkeypatch.setattr(Archive, "write", writes)
    monkeypatch.setattr(keepers, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(keepers, "INTAKE_SECONDS", 0.0)
    broker = brokers.from_url(f"sqlite:///{shop.folder / 'shop.queue'}")
    await broker.open()
    try:
        await broker.declare([queue])
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            Keeper("shop", broker, Archive(shop.folder / "shop.queue.journal"), time.time) as keeper,
        ):
            batches = [Message(str(number), queue.name, b"\x90") for number in range(100)]
            await broker.publish(batches, queue=queue.name)
            while disk == "full" and keeper.problem is None:
                await asyncio.sleep(0.01)
            done = await asyncio.to_thread(shop.run, "jobs", "--broker", shop.queue_url)
            well.set()
            assert said in done.stderr
    finally:
        well.set()
        await broker.close()


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
async def test_who_keeps_a_journal_on_a_server_is_known_and_those_who_ask_are_not_among_them(
    kind: str, request: pytest.FixtureRequest
) -> None:
    broker = brokers.from_url(request.getfixturevalue(kind).url())
    await broker.open()
    asker = Asker(broker, time.time)
    try:
        assert await journal_queues(broker) == {}
        async with Keeper("shop", broker, Archive(":memory:"), time.time):
            assert (await asker.journey("nobody")).entries == ()
            assert set(await journal_queues(broker)) == {"shop"}
        assert await journal_queues(broker) == {"shop": 0}
    finally:
        await asker.close()
        await broker.close()


async def test_of_two_applications_on_one_broker_the_one_whose_keeper_stands_still_is_named(shop: Program) -> None:
    (shop.folder / "conveyor.toml").write_text(f'broker = "{shop.queue_url}"\n')
    with running(shop, "run", "shop"), running(shop, "run", "slow:app", "--grace", "1") as slow:
        await until(shop, {"succeeded"}, order(shop, "a"), messages=2)
        while (keeper := keeper_of(slow)) is None or "slow" not in await apps_that_answer(shop):
            await asyncio.sleep(0.05)
        os.kill(keeper, signal.SIGSTOP)
        try:
            done = await asyncio.to_thread(shop.run, "jobs")
        finally:
            os.kill(keeper, signal.SIGCONT)
    assert "shop.charge" in done.stdout
    assert "nobody who keeps the journal of slow answered" in done.stderr


async def test_a_killed_runner_and_a_killed_keeper_leave_a_journey_that_tells_of_it(shop: Program) -> None:
    with running(shop, "run", "slow:app", "--grace", "1") as program:
        id = publish(shop, "slow:app", "Job", "--data", '{"name": "a"}')
        await until(shop, {"started"}, id, app="slow")
        (shop.folder / "go").touch()
        keeper = keeper_of(program)
        assert keeper is not None
        os.kill(keeper, signal.SIGKILL)
        os.kill(int((shop.folder / "pid").read_text()), signal.SIGKILL)
        (stop,) = await until(shop, {"started", "succeeded"}, id, app="slow")
        last = stop.entries[-1]
        assert (last.kind, last.attempt, last.crashes) == (Kind.SUCCEEDED, 1, 1)
        text = shop.ok("trace", id, "--app", "slow:app")
        assert "slow.work: attempt 1 began; its end is not known (its process died?)" in text
        assert "slow.work: attempt 1 succeeded in" in text
        assert "(after 1 crash)" in text
        assert keeper_of(program) not in (None, keeper)


async def test_what_was_kept_is_read_after_everything_was_killed(shop: Program) -> None:
    with subprocess.Popen(
        shop.command("run", "slow:app"), cwd=shop.folder, env=shop.environment, stderr=subprocess.DEVNULL
    ) as program:
        id = publish(shop, "slow:app", "Job", "--data", '{"name": "bad"}')
        (stop,) = await until(shop, {"dead"}, id, app="slow")
        program.kill()  # its children end with it
    assert [entry.kind for entry in stop.entries][-2:] == [Kind.RETRIED, Kind.DEAD]
    done = shop.run("trace", id, "--app", "slow:app")
    assert done.returncode == 0
    assert done.stdout.count("RuntimeError: it is bad") == 2
    assert "dead letter (exhausted)" in done.stdout
    assert "as it was left" in done.stderr


async def test_without_a_keeper_entries_wait_for_one_that_comes_later(shop: Program) -> None:
    with running(shop, "run", "shop", "--no-keeper") as program:
        assert keeper_of(program) is None
        id = order(shop, "A-1")
        done = shop.run("trace", id, "--app", "shop")
        assert "still wait for a keeper" in done.stderr
        assert done.returncode == 1
        assert "nobody keeps a journal on this broker now" in done.stderr
        with running(shop, "journal", "shop"):
            await until(shop, {"succeeded"}, id)


async def test_a_journal_that_cannot_be_kept_is_said_and_work_goes_on(shop: Program) -> None:
    shop.environment["CONVEYOR_JOURNAL"] = str(shop.folder / "nowhere" / "shop.journal")
    with running(shop, "run", "shop"):
        order(shop, "A-1")
        shipped, log = shop.folder / "shipped", shop.folder / "log"
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not shipped.exists() or "cannot keep the journal" not in log.read_text():
                await asyncio.sleep(0.05)
    lines = log.read_text().splitlines()
    assert not [
        line for line in lines if not line.startswith("{")
    ]  # also what its keeper says is one JSON object a line
    said = [json.loads(line) for line in lines if "cannot keep the journal" in line]
    assert said[0]["level"] == "error"
    assert "the folder" in said[0]["message"]


async def test_a_broker_in_memory_has_its_journal_kept_where_its_messages_are(shop: Program) -> None:
    shop.environment["CONVEYOR_BROKER"] = "memory://"
    with running(shop, "run", "shop") as program:
        log = shop.folder / "log"
        async with asyncio.timeout(PATIENCE_SECONDS):
            while "the journal of shop is kept in :memory:" not in log.read_text():
                await asyncio.sleep(0.05)
        assert keeper_of(program) is None


def test_a_list_of_jobs_says_how_many_processes_died_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    out().print(as_table([Job(id="a", topic="t", attempts=2, crashes=1), Job(id="b", topic="t", attempts=1)], 0.0))
    said = capsys.readouterr().out
    assert "2 + 1 crash " in said
    assert said.count("crash") == 1


def test_what_a_handler_says_of_its_progress_stays_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    note = "row 1\nrow 2\r\n\x1b[2Jrow 3"
    job = Job(id="m", topic="t", status=Status.RUNNING, worker="w", done=1.0, total=3.0, note=note)
    out().print(as_table([job], 0.0))
    _, _, row = capsys.readouterr().out.splitlines()
    assert "1 of 3, row 1 row 2 \\x1b[2Jrow 3" in row
    entry = Entry(Kind.PROGRESSED, 1.0, "m", "t", "w", done=1.0, total=3.0, note=note)
    assert [line for _, line in told(Stop("m", "t", (entry,)))] == ["w: 1 of 3, row 1 row 2 \\x1b[2Jrow 3"]
    kept = Entry(Kind.SUCCEEDED, 1.0, "m", "t", "w", unkept="too\nlarge")
    ((_, line),) = told(Stop("m", "t", (kept,)))
    assert line.endswith("; too large")


async def test_jobs_are_listed_and_filtered(shop: Program) -> None:
    (shop.folder / "go").touch()
    with running(shop, "run", "slow:app"):
        good = publish(shop, "slow:app", "Job", "--data", '{"name": "good"}')
        bad = publish(shop, "slow:app", "Job", "--data", '{"name": "bad"}')
        await until(shop, {"succeeded"}, good, app="slow")
        await until(shop, {"dead"}, bad, app="slow")
        where = ("--app", "slow:app")
        text = shop.ok("jobs", *where)
        assert bad in text
        assert "exhausted: RuntimeError: it is bad" in text
        for filters, ids in {
            (): {good, bad},
            ("--status", "dead"): {bad},
            ("--status", "done", "--worker", "work"): {good},
            ("--worker", "nobody"): set(),
            ("--topic", "Job"): set(),
            ("--since", "1h"): {good, bad},
            ("--since", "0s"): set(),
        }.items():
            assert {job["id"] for job in shop.json("jobs", *where, *filters)["jobs"]} == ids, filters
        page = shop.json("jobs", *where, "--limit", "1")
        assert (len(page["jobs"]), page["more"]) == (1, True)
        (job,) = shop.json("jobs", *where, "--status", "dead")["jobs"]
        assert (job["attempts"], job["worker"], job["reason"]) == (2, "slow.work", "exhausted")
        shop.ok("queues", "pause", "slow.work", *where)
        assert shop.json("dead", "redrive", "--all", *where)["redriven"] == 1
        await until(shop, {"dead", "redriven"}, bad, app="slow")
        assert [job["id"] for job in shop.json("jobs", *where, "--status", "waiting")["jobs"]] == [bad]
        assert shop.json("jobs", *where, "--status", "dead")["jobs"] == []
        assert "somebody put it back into slow.work" in shop.ok("trace", bad, *where)
        shop.ok("queues", "resume", "slow.work", *where)
    assert "no such jobs" in shop.run("jobs", "--status", "waiting").stderr
    assert "choose" in shop.refused("jobs", "--status", "sleeping").lower()


def test_what_nobody_knows_is_said_with_what_to_do(shop: Program) -> None:
    assert "which broker?" in shop.refused("trace", "x")
    assert "there is no queue file" in shop.refused("trace", "x", "--broker", shop.queue_url, code=1)
    assert "there is no journal" in shop.refused("jobs", "--file", "no.journal", code=1)
    archive = Archive(shop.folder / "shop.journal").open()
    archive.write([("1", [Entry(Kind.PUBLISHED, time.time(), id, "t") for id in ("same-1", "same-2")])])
    archive.close()
    assert "the journal knows nothing of x" in shop.refused("trace", "x", code=1)
    assert "trace which message?" in shop.refused("trace", "")
    assert "cannot read the journal" in shop.refused("trace", "x", "--file", ".", code=1)
    assert "nothing of x\\ny" in shop.refused("trace", "x\ny", code=1)
    said = shop.refused("trace", "same", code=1)
    assert "several journeys" in said
    assert "same-1" in said
    assert "keeps no journal; say Conveyor('shop', journal=True)" in shop.refused(
        "journal", "shop", CONVEYOR_JOURNAL="0"
    )


# --- words ------------------------------------------------------------------------------------------------------------


def lines(*entries: Entry) -> list[str]:
    (stop,) = stops(entries)
    return [line for _, line in told(stop)]


def test_every_kind_of_entry_has_its_words() -> None:
    def entry(kind: Kind, at: float, **more: Any) -> Entry:
        return Entry(kind, at, "m", "t", worker=more.pop("worker", "w"), **more)

    assert lines(
        entry(Kind.PUBLISHED, 0.0, worker="", due=60.0),
        entry(Kind.RELEASED, 1.0, attempt=1, started=0.5),
        entry(Kind.RETRIED, 2.0, attempt=1, started=1.99, due=3.0, process="host/1"),
        entry(Kind.DEAD, 4.0, attempt=2, crashes=2, reason="crashed"),
        entry(Kind.CANCELLED, 5.0),
        entry(Kind.DUPLICATE, 6.0),
        entry(Kind.SUCCEEDED, 200.0, attempt=3, started=7.0, unkept="its result is too large"),
        entry(Kind.STARTED, 201.0, attempt=4, started=201.0),
        entry(Kind.PROGRESSED, 202.0, attempt=4, done=1.0),
        entry(Kind.PROGRESSED, 203.0, attempt=4, done=2.0, total=4.0, note="half"),
        entry(Kind.REDRIVEN, 204.0, worker="", queue="shop.charge", process="host/7"),
    ) == [
        "published, due 1970-01-01T00:01:00.000Z",
        "w: attempt 1 was given back after 0.50 s, uncounted",
        "w: attempt 1 failed after 10.0 ms, again at 1970-01-01T00:00:03.000Z  [host/1]",
        "w: dead letter (crashed) (after 2 crashes)",
        "w: cancelled",
        "w: a duplicate; it had been done before",
        "w: attempt 3 succeeded in 3 min 13 s; its result is too large",
        "w: attempt 4 is running",
        "w: 2 of 4, half",
        "somebody put it back into shop.charge  [host/7]",
    ]


def test_what_was_asked_for_is_marked_by_its_whole_id_and_else_by_its_beginning() -> None:
    ids = ("order-1", "order-10", "order-11")
    on_journey = [Entry(Kind.PUBLISHED, 1.0, id, "t", correlation_id="order", causation_id="order") for id in ids]
    answer = Answer("", entries=(Entry(Kind.PUBLISHED, 0.0, "order", "t"), *on_journey))
    for asked, marked in {"order-1": ids[:1], "order-10": ids[1:2], "order-": ids, "order": ()}.items():
        text = [line.plain.strip() for line in as_text(answer, asked)]
        assert [line for line in text if "←" in line] == [f"t {id}  ← you asked for it" for id in marked]


def test_an_attempt_that_was_given_back_and_runs_again_is_running() -> None:
    def entry(kind: Kind, at: float, **more: Any) -> Entry:
        return Entry(kind, at, "m", "t", "w", attempt=1, **more)

    again = [
        entry(Kind.STARTED, 1.0, started=1.0),
        entry(Kind.PROGRESSED, 1.5, done=5.0),
        entry(Kind.RELEASED, 2.0, started=1.0),
        entry(Kind.STARTED, 3.0, started=3.0),
        entry(Kind.PROGRESSED, 4.0, done=1.0),
    ]
    given_back = "w: attempt 1 was given back after 1.00 s, uncounted"
    assert lines(*again) == [given_back, "w: attempt 1 is running", "w: 1"]
    assert lines(*again, entry(Kind.SUCCEEDED, 5.0, started=3.0)) == [given_back, "w: attempt 1 succeeded in 2.00 s"]


def test_what_steers_terminals_is_taken_out() -> None:
    entry = Entry(Kind.DEAD, 1.0, "m\nn", "t\x1b[31m", worker="w", error="\x1b]0;title\x07boom\nsecond")
    text = "\n".join(line.plain for line in as_text(Answer("", entries=(entry,)), "m"))
    assert "\x1b" not in text
    assert "m\\nn" in text
    assert "boom" in text
    assert "second" in text
    assert isinstance(stops([entry])[0], Stop)
