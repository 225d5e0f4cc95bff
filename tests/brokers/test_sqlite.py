"""The SQLite broker beyond what every broker promises: its URL, its file, its commits, its wake-ups."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conveyor.broker import DeadFilter, Delivery, Queue, Settlement
from conveyor.brokers import from_url
from conveyor.brokers.sqlite import SqliteBroker, queue_file, writer
from conveyor.brokers.sqlite.queue_file import SQL, file_system
from conveyor.brokers.sqlite.store import DIED
from conveyor.core.message import Message
from conveyor.core.settle import DONE, Dead, Done, RetryAt
from conveyor.errors import (
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    PublishFailed,
    QueueConflict,
)

Open = Callable[..., Any]
WIRE_FORMAT = Path(__file__).parents[2] / "docs" / "wire-format.md"


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Open]:
    """Opens broker objects on one file, and closes them."""
    brokers: list[SqliteBroker] = []

    async def open_one(path: Path = tmp_path / "shop.queue", **options: Any) -> SqliteBroker:
        broker = SqliteBroker(path, **options)
        await broker.open()
        brokers.append(broker)
        return broker

    yield open_one
    for broker in brokers:
        await broker.close()


def message(name: str, **fields: Any) -> Message:
    return Message(**{"id": name, "topic": "t", "body": name.encode(), **fields})


def left(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*"))


def names(deliveries: list[Delivery]) -> list[str]:
    return [each.message.id for each in deliveries]


# The URL


def test_a_url_names_a_relative_or_an_absolute_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert from_url("sqlite:///shop.queue")._path == tmp_path / "shop.queue"  # type: ignore[attr-defined]
    assert from_url("sqlite:////var/lib/my%20shop.queue")._path == Path("/var/lib/my shop.queue")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite://shop.queue", "sqlite:///relative"),
        ("sqlite://", "sqlite:///relative"),
        ("sqlite:///", "sqlite:///relative"),
        ("sqlite:////var/lib/", "sqlite:///relative"),
        ("sqlite:///shop.queue?durability=some", "full or normal"),
        ("sqlite:///shop.queue?speed=high", "'speed'"),
        ("sqlite:///shop.queue?network_filesystem=yes", "refuse or allow"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused_with_what_to_write(url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(says)):
        from_url(url)


# The file


async def test_a_file_that_cannot_be_a_queue_is_refused_with_what_to_do(opened: Open, tmp_path: Path) -> None:
    text, other, later = tmp_path / "notes.txt", tmp_path / "other.db", tmp_path / "later.queue"
    await asyncio.to_thread(text.write_text, "no database at all, but long enough to look like one " * 50)
    apsw.Connection(str(other)).execute("CREATE TABLE customer (name)")
    await (await opened(later)).close()
    apsw.Connection(str(later)).execute("PRAGMA user_version = 99")
    for path, says in (
        (tmp_path / "missing" / "shop.queue", "create it"),
        (tmp_path, "is a folder"),
        (text, "no SQLite database"),
        (other, "another program"),
        (later, "upgrade Conveyor"),
    ):
        with pytest.raises(BrokerError, match=says):
            await opened(path)
    assert apsw.Connection(str(other)).execute("SELECT * FROM sqlite_schema").fetchall()[0][1] == "customer"


def test_a_folder_without_permission_is_refused() -> None:
    program = """
import asyncio, os, sys
from conveyor.brokers.sqlite import SqliteBroker
from conveyor.errors import BrokerError
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    asyncio.run(SqliteBroker(sys.argv[1]).open())
except BrokerError as error:
    print(error)
"""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o555)
        command = [sys.executable, "-c", program, f"{folder}/shop.queue"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "no permission" in told.stdout, told.stderr


async def test_a_network_file_system_is_refused_unless_allowed(
    opened: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = file_system(tmp_path, Path("/proc/self/mountinfo"))
    monkeypatch.setattr(queue_file, "REMOTE", frozenset([here]))
    with pytest.raises(BrokerError, match="network file system"):
        await opened()
    await opened(network_filesystem=True)


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "30 22 0:40 / /data rw - nfs4 server:/data rw\n"
        "31 30 0:41 / /data/my\\040disk rw master:3 - xfs /dev/vdb rw\n"
        "32 22 0:42 / /home/me rw - fuse.sshfs host: rw\n"
    )
    assert file_system(Path("/database"), mounts) == "ext4"
    assert file_system(Path("/data/queues"), mounts) == "nfs4"
    assert file_system(Path("/data/my disk"), mounts) == "xfs"
    assert file_system(Path("/home/me/x"), mounts) == "fuse.sshfs"
    assert file_system(Path("/home"), tmp_path / "nothing") == ""


async def test_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    program = f"""
import asyncio, os
os.umask(0)
from conveyor.broker import Queue
from conveyor.brokers.sqlite import SqliteBroker
async def main():
    one, two = SqliteBroker({str(tmp_path / "a.queue")!r}), SqliteBroker({str(tmp_path / "a.queue")!r})
    await asyncio.gather(one.open(), two.open())
    await one.declare([Queue(name="q")])
    await asyncio.gather(one.subscribe("q", 1), two.subscribe("q", 1))
    for folder, _, files in os.walk({str(tmp_path)!r}):
        for file in files:
            print(oct(os.stat(os.path.join(folder, file)).st_mode & 0o777), file.removeprefix("a.queue") if "queue" in file else "socket")
    print(oct(os.stat({str(tmp_path / "a.queue.wake")!r}).st_mode & 0o777), "folder")
    await one.close(); await two.close()
asyncio.run(main())
"""
    told = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modes = sorted(set(told.stdout.splitlines()))
    assert modes == ["0o600 ", "0o600 -shm", "0o600 -wal", "0o600 .ballast", "0o600 socket", "0o700 folder"]
    assert left(tmp_path) == ["a.queue", "a.queue.wake"]


async def test_many_may_create_the_file_at_once(opened: Open) -> None:
    await asyncio.gather(*(opened() for _ in range(8)))


async def test_a_file_that_became_a_queue_since_the_first_look_is_one(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened()
    look = queue_file.QueueFile._is_ours
    looks: list[bool] = []

    def looked(file: queue_file.QueueFile) -> bool:
        looks.append(len(looks) > 0 and look(file))
        return looks[-1]

    monkeypatch.setattr(queue_file.QueueFile, "_is_ours", looked)
    await opened()
    assert looks[:2] == [False, True]


async def test_a_file_that_vanished_is_noticed_before_anything_is_written_to_it(opened: Open, tmp_path: Path) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    (tmp_path / "shop.queue").rename(tmp_path / "elsewhere")
    with pytest.raises(BrokerUnavailable, match="deleted or replaced"):
        await broker.publish([message("1")])
    (tmp_path / "elsewhere").rename(tmp_path / "shop.queue")
    assert await broker.publish([message("2")]) == frozenset()


async def test_a_deep_folder_is_no_obstacle_to_waking(opened: Open, tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()
    one, two = await opened(folder / "shop.queue"), await opened(folder / "shop.queue")
    await one.declare([Queue(name="q", topics=("t",))])
    fetch = asyncio.create_task((await one.subscribe("q", 1)).fetch(1))
    await two.publish([message("1")])
    assert names(await fetch) == ["1"]


async def test_a_broker_that_is_not_open_says_so(tmp_path: Path) -> None:
    broker = SqliteBroker(tmp_path / "shop.queue")
    with pytest.raises(BrokerUnavailable, match="not open"):
        await broker.publish([message("1")])
    await broker.close()


async def test_it_may_be_closed_twice_and_opened_again(opened: Open) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    await broker.publish([message("1")])
    await broker.close()
    await broker.close()
    await broker.open()
    assert names(await (await broker.subscribe("q", 1)).fetch(1)) == ["1"]


async def test_a_forked_child_is_refused(opened: Open) -> None:
    broker = await opened()

    def child(told: Any) -> None:
        try:
            broker._open_writer()
        except BrokerError as error:
            told.send(str(error))

    ours, theirs = multiprocessing.Pipe()
    context: Any = multiprocessing.get_context("fork")
    process = context.Process(target=child, args=(theirs,))
    process.start()
    assert "open one in each process" in await asyncio.to_thread(ours.recv)
    await asyncio.to_thread(process.join)
    await broker.declare([Queue(name="q")])


async def test_each_hot_question_has_its_index() -> None:
    db = apsw.Connection(":memory:")
    db.execute(SQL["schema"])
    hot = "keep_order drop_oldest next_of_keys next_at turned become_due expire claim fitting claimed held end"
    for name in [*hot.split(), "bury", "give_back", "extend", "purge"]:
        values = (None,) * max(int(number) for number in re.findall(r"\?(\d)", SQL[name]))
        plan = [str(row[3]) for row in db.execute(f"EXPLAIN QUERY PLAN {SQL[name]}", values)]
        assert not [step for step in plan if re.match(r"SCAN (message|older|queue)|USE TEMP", step)], (name, plan)


# Commits


async def test_a_message_that_cannot_be_stored_fails_alone(opened: Open) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    subscription = await broker.subscribe("q", 100)
    bad = [
        message("surrogate", key="\ud800"),
        message("text", body="no bytes"),
        message("priority", priority=10),
        message("never", due=float("inf")),
        message("nowhen", created=float("nan")),
        message("header", headers={"a": object()}),
    ]
    publishes = [asyncio.create_task(broker.publish([each])) for each in (message("a"), *bad, message("b"))]
    mixed = asyncio.create_task(broker.publish([message("c"), bad[0], message("d")]))
    ended = await asyncio.gather(*publishes, mixed, return_exceptions=True)
    assert ended[0] == ended[7] == frozenset()
    assert [list(each.refused) for each in ended[1:7] if isinstance(each, PublishFailed)] == [[each.id] for each in bad]
    assert isinstance(ended[8], PublishFailed)
    assert list(ended[8].refused) == ["surrogate"]
    assert sorted(names(await subscription.fetch(100))) == ["a", "b", "c", "d"]


async def test_an_emitted_message_that_cannot_be_stored_leaves_the_delivery_held(opened: Open) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    await broker.publish([message("1"), message("2")])
    first, second = await (await broker.subscribe("q", 10)).fetch(10)
    bad = broker.settle([Settlement(first, Done((message("good"), message("bad", key="\udfff"))))])
    good = broker.settle([Settlement(second, DONE)])
    ended = await asyncio.gather(bad, good, return_exceptions=True)
    assert isinstance(ended[0], PublishFailed)
    assert list(ended[0].refused) == ["bad"]
    assert ended[1] == []
    assert await broker.settle([Settlement(first, DONE)]) == []
    [info] = await broker.queues()
    assert (info.ready, info.in_flight) == (0, 0)


async def test_an_operation_that_fails_fails_alone(opened: Open) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    ended = await asyncio.gather(
        broker.publish([message("1")]),
        broker.declare([Queue(name="new", topics=("t",)), Queue(name="q", ordered=True)]),
        broker.declare([Queue(name="mine", topics=("t",), temporary=True)]),
        broker.subscribe("nothing", 1),
        broker.subscribe("q", 1),
        return_exceptions=True,
    )
    assert isinstance(ended[1], QueueConflict)
    assert "not ordered" in str(ended[1])
    assert isinstance(ended[3], BrokerError)
    assert [each.name for each in await broker.queues()] == ["mine", "q"], (
        "a declaration that failed left a part behind"
    )
    assert names(await ended[4].fetch(1)) == ["1"]  # type: ignore[union-attr]


async def test_errors_of_any_text_are_kept(opened: Open) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    await broker.publish([message("1")])
    subscription = await broker.subscribe("q", 10)
    [delivery] = await subscription.fetch(1)
    await broker.settle([Settlement(delivery, RetryAt(0.0, "half a smile \ud83d, and \0 'quotes'"))])
    [delivery] = await subscription.fetch(1)
    assert delivery.error == "half a smile ?, and \0 'quotes'"
    await broker.settle([Settlement(delivery, Dead("rejected", "x\udc00", "trace\udc00"))])
    [letter] = await broker.dead_letters(DeadFilter(error="X?"), limit=1)
    assert (letter.error, letter.traceback) == ("x?", "trace?")


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
seconds = st.floats(min_value=-1e14, max_value=1e14)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.builds(
            Message,
            id=text,
            topic=st.just("t"),
            body=st.binary(max_size=100),
            key=st.none() | text,
            headers=st.dictionaries(text, text, max_size=3),
            content_type=text.filter(bool),
            correlation_id=st.none() | text,
            causation_id=st.none() | text,
            created=seconds,
            due=st.floats(max_value=1e9, min_value=-1e14),
            expires=st.none() | seconds,
            priority=st.integers(0, 9),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_every_message_is_received_bit_for_bit(tmp_path: Path, messages: list[Message]) -> None:
    async def story() -> list[Message]:
        broker = SqliteBroker(tmp_path / "any.queue")
        await broker.open()
        await broker.declare([Queue(name="q", topics=("t",))])
        await broker.publish(messages)
        subscription = await broker.subscribe("q", 100)
        received = await subscription.fetch(100)
        await broker.settle([Settlement(each, DONE) for each in received])
        await broker.close()
        return [each.message for each in received]

    assert asyncio.run(story()) == sorted(messages, key=lambda each: -each.priority)


async def test_large_and_small_bodies_of_one_batch_keep_apart(opened: Open) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    bodies = [os.urandom(size) for size in (0, 10, 65_536, 65_537, 3, 300_000, 0, 1)]
    await broker.publish([message(str(number), body=body) for number, body in enumerate(bodies)])
    received = await (await broker.subscribe("q", 100)).fetch(100)
    assert [each.message.body for each in received] == bodies


async def test_a_claim_has_no_more_bytes_than_others_can_wait_for(opened: Open) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    await broker.publish([message(f"small{n}") for n in range(300)])
    subscription = await broker.subscribe("q", 1_000)
    assert len(await subscription.fetch(1_000)) == 300
    await broker.publish([message(f"large{n}", body=bytes(1_000_000)) for n in range(40)])
    sizes = [len(await subscription.fetch(500)) for _ in range(3)]
    assert sizes == [16, 16, 8]


async def test_what_another_program_wrote_badly_does_not_stop_the_queue(opened: Open, tmp_path: Path) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    insert = SQL["insert"].split(" VALUES")[0]
    rows = apsw.Connection(str(tmp_path / "shop.queue"))
    rows.execute(
        f"{insert} VALUES (1, 0, 0, 0, 0, 0, CAST(x'41ff' AS TEXT), 't', CAST(x'c328' AS TEXT), '[1', NULL, NULL, NULL, 0, 0, NULL, x'00')"
    )
    rows.close()
    await broker.publish([message("good")])
    strange, good = await (await broker.subscribe("q", 100)).fetch(100)
    assert strange.message.id == "A\ufffd"
    assert strange.message.headers == {"unreadable-headers": "[1"}
    assert good.message.id == "good"
    assert await broker.settle([Settlement(each, DONE) for each in (strange, good)]) == []


async def test_a_receipt_never_comes_twice_though_rows_do(opened: Open) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    subscription = await broker.subscribe("q", 10)
    receipts = set()
    for number in range(20):
        await broker.publish([message(str(number))])
        [delivery] = await subscription.fetch(10)
        receipts.add(delivery.receipt)
        await broker.settle([Settlement(delivery, DONE)])
    assert len(receipts) == 20
    assert len({receipt[0] for receipt in receipts}) == 1, "rows are used again: it is the token that tells"


async def test_a_bound_may_come_and_go(opened: Open) -> None:
    broker = await opened()
    for max_length in (None, 3, None, 2):
        await broker.declare([Queue(name="q", topics=("t",), max_length=max_length)])
        await broker.publish([message(f"{max_length}-{number}") for number in range(4)])
    assert names(await (await broker.subscribe("q", 100)).fetch(100)) == ["2-2", "2-3"]


async def test_a_dropped_head_frees_its_key(opened: Open) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",), ordered=True, max_length=2)])
    await broker.publish([message(str(number), key="k" if number != 2 else "other") for number in range(4)])
    subscription = await broker.subscribe("q", 100)
    assert names(await subscription.fetch(100)) == ["2", "3"]


# Waking


class HandClock:
    now = 1_000_000.25

    def __call__(self) -> float:
        return self.now


async def test_a_turned_clock_brings_what_is_due(opened: Open) -> None:
    clock = HandClock()
    broker = await opened(clock=clock)
    await broker.declare([Queue(name="q", topics=("t",), lease_seconds=10)])
    subscription = await broker.subscribe("q", 100)
    await broker.publish([message("later", due=clock.now + 1000)])
    fetch = asyncio.create_task(subscription.fetch(1))
    await broker.extend([])
    clock.now += 1000
    broker.clock_turned()
    [delivery] = await fetch
    clock.now += 10
    assert names(await subscription.fetch(1)) == ["later"]
    assert await broker.settle([Settlement(delivery, DONE)]) == [delivery]


async def test_a_waiting_fetch_finds_what_nobody_woke_it_for(opened: Open, tmp_path: Path) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    fetch = asyncio.create_task((await broker.subscribe("q", 1)).fetch(1))
    for socket in (tmp_path / "shop.queue.wake").iterdir():
        socket.unlink()
    other = await opened()
    await other.publish([message("1")])
    assert names(await fetch) == ["1"]


async def test_waiting_costs_no_processor(opened: Open) -> None:
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    fetch = asyncio.create_task((await broker.subscribe("q", 1)).fetch(1))
    await broker.publish([message("later", due=time.time() + 3600)])
    steps = 0
    step = broker._writer._step

    def counted() -> bool:
        nonlocal steps
        steps += 1
        return bool(step())

    broker._writer._step = counted
    await asyncio.sleep(1.0)
    assert steps <= 10
    fetch.cancel()


async def test_what_a_dead_owner_held_is_given_back_by_those_who_live(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "WITNESS_SECONDS", 0.05)
    program = f"""
import asyncio, os, signal
from conveyor.broker import Queue
from conveyor.core.message import Message
from conveyor.brokers.sqlite import SqliteBroker
async def main():
    broker = SqliteBroker({str(tmp_path / "shop.queue")!r})
    await broker.open()
    await broker.declare([Queue(name="q", topics=("t",)), Queue(name="mine", topics=("t",), temporary=True)])
    await broker.publish([Message("1", "t", b"")])
    await (await broker.subscribe("q", 1)).fetch(1)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program])
    broker = await opened()
    [delivery] = await (await broker.subscribe("q", 1)).fetch(1)
    assert (delivery.deliveries, delivery.error) == (2, DIED)
    assert [each.name for each in await broker.queues()] == ["q"]
    assert len(list((tmp_path / "shop.queue.wake").iterdir())) == 1


async def test_an_owner_lives_once(opened: Open) -> None:
    one, two = await opened(owner="me/too"), await opened(owner="me/too")
    await one.declare([Queue(name="q")])
    await one.subscribe("q", 1)
    with pytest.raises(BrokerError, match="in use"):
        await two.subscribe("q", 1)
    await one.close()
    await two.subscribe("q", 1)


# Tidiness


async def test_a_grown_wal_and_unused_pages_are_given_back_in_a_quiet_moment(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_file, "WAL_LIMIT_BYTES", 100_000)
    monkeypatch.setattr(queue_file, "FREE_PAGES", 10)
    monkeypatch.setattr(writer, "POLL_SECONDS", (0.01, 0.02))
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("t",))])
    await broker.publish([message(str(number), body=bytes(10_000)) for number in range(200)])
    assert await broker.purge("q") == 200
    async with asyncio.timeout(60):
        while (tmp_path / "shop.queue-wal").stat().st_size > 100_000 or (
            tmp_path / "shop.queue"
        ).stat().st_size > 500_000:
            await asyncio.sleep(0.02)


async def test_the_documented_statement_publishes_from_any_language(opened: Open, tmp_path: Path) -> None:
    documented = re.search(r"^    INSERT INTO message.*?;$", WIRE_FORMAT.read_text(), re.MULTILINE | re.DOTALL)
    assert documented is not None
    broker = await opened()
    await broker.declare([Queue(name="q", topics=("order.created",))])
    fetch = asyncio.create_task((await broker.subscribe("q", 1)).fetch(1))
    db = apsw.Connection(str(tmp_path / "shop.queue"))
    db.set_busy_timeout(5_000)
    db.execute(documented[0])
    db.close()
    [delivery] = await fetch
    assert json.loads(delivery.message.body) == {"order_id": "A-1", "total": "19.99"}
    assert delivery.message.content_type == "application/json"


async def test_the_file_can_be_read_by_other_programs(opened: Open, tmp_path: Path) -> None:
    broker = await opened()
    await broker.declare([Queue(name="shop.charge", topics=("order_created",))])
    await broker.publish([Message("1", "order_created", b'{"total": "19.99"}', headers={"tenant": "blau"})])
    db = apsw.Connection(str(tmp_path / "shop.queue"), flags=apsw.SQLITE_OPEN_READONLY)
    [[name, headers, body]] = db.execute("SELECT id, headers, body FROM message").fetchall()
    assert (name, json.loads(str(headers)), json.loads(bytes(body))) == ("1", {"tenant": "blau"}, {"total": "19.99"})  # type: ignore[arg-type]
    assert stat.S_IMODE((tmp_path / "shop.queue").stat().st_mode) == 0o600
    db.close()
