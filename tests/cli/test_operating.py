"""Operators see and mend what is in a broker: publish, queues and dead letters on a real queue file."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from conveyor.broker import Queue
from conveyor.core.message import Message
from conveyor.core.settle import Dead

if TYPE_CHECKING:
    from tests.cli.conftest import Program

HERE = ("--broker", "sqlite:///shop.queue")
CHARGE = Queue(name="shop.charge", topics=("order.created",))
MAIL = Queue(name="shop.mail", topics=("mail",))


def dead_letters(number: int, topic: str = "order.created", reason: str = "exhausted") -> list[tuple[Message, Dead]]:
    verdict = Dead(reason, f"TimeoutError: {topic} took too long", "Traceback (most recent call last): …")
    return [(Message(f"{topic}-{n}", topic, b'{"n": %d}' % n), verdict) for n in range(number)]


def counts(conveyor: Program) -> dict[str, tuple[int, int]]:
    """Ready and dead, by queue."""
    found = conveyor.json("queues", *HERE)["queues"]
    return {queue["name"]: (queue["ready"], queue["dead"]) for queue in found}


@pytest.fixture
def graveyard(conveyor: Program) -> Program:
    """Three dead letters in shop.charge, two in shop.mail."""
    conveyor.bury(CHARGE, dead_letters(3))
    conveyor.bury(MAIL, dead_letters(2, "mail", "rejected"))
    return conveyor


def test_an_app_s_event_is_checked_and_gets_its_topic_and_key(conveyor: Program) -> None:
    data = '{"order_id": "A-1", "total": "19.990"}'
    sent = conveyor.json("publish", "shop:app", "OrderCreated", "--data", data)
    assert (sent["topic"], sent["key"], sent["received"]) == ("order.created", "A-1", True)
    assert counts(conveyor)["shop.charge"] == (1, 0)


def test_a_task_is_sent_by_its_name(conveyor: Program) -> None:
    assert conveyor.json("publish", "shop", "resize", "--data", '{"path": "cat.jpg"}')["topic"] == "shop.resize"
    assert counts(conveyor)["shop.resize"] == (1, 0)


def test_a_payload_may_come_from_a_file_or_from_stdin(conveyor: Program) -> None:
    conveyor.declare(CHARGE)
    (conveyor.folder / "order.json").write_text('{"order_id": "A-1"}')
    conveyor.ok("publish", "order.created", "--data", "@order.json", *HERE)
    conveyor.ok("publish", "order.created", "--data", "-", *HERE, stdin='{"order_id": "A-2"}')
    conveyor.ok("publish", "order.created", "--data", "-", "--content-type", "text/csv", *HERE, stdin=b"\xff;1")
    assert counts(conveyor)["shop.charge"] == (3, 0)


def test_a_message_may_be_due_later(conveyor: Program) -> None:
    conveyor.declare(CHARGE)
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    sent = conveyor.json("publish", "order.created", "--data", "1", "--at", later, "--id", "mine", *HERE)
    assert sent["id"] == "mine"
    assert sent["due"] == pytest.approx(time.time() + 86_400, abs=600)
    sent = conveyor.json("publish", "order.created", "--data", "-1", "--delay", "2h", *HERE)
    assert sent["due"] == pytest.approx(time.time() + 7_200, abs=600)
    [queue] = conveyor.json("queues", *HERE)["queues"]
    assert (queue["ready"], queue["delayed"], queue["oldest_seconds"]) == (0, 2, None)


def test_headers_and_priority_travel_with_a_message(conveyor: Program) -> None:
    conveyor.bury(CHARGE, [])
    conveyor.ok(
        "publish", "order.created", "--data", "{}", "--header", "a=1", "--header", "b=x=y", "--priority", "9", *HERE
    )
    assert counts(conveyor)["shop.charge"] == (1, 0)


def test_a_message_that_goes_nowhere_is_a_failure_with_a_suggestion(conveyor: Program) -> None:
    conveyor.declare(CHARGE)
    done = conveyor.run("publish", "order.create", "--data", "{}", "--json", *HERE)
    assert done.returncode == 1
    assert json.loads(done.stdout)["received"] is False
    assert "did you mean order.created?" in done.stderr


def test_queues_are_shown_to_people(graveyard: Program) -> None:
    shown = graveyard.ok("queues", *HERE)
    assert "order.created" in shown
    [line] = [line for line in shown.splitlines() if line.startswith("shop.charge")]
    assert line.split()[:5] == ["shop.charge", "0", "0", "0", "3"]


def test_a_queue_that_nobody_needs_is_removed(graveyard: Program) -> None:
    graveyard.declare(Queue(name="shop.empty", topics=("nothing",)))
    assert "1 queue with 0 messages and 0 dead letters would be removed" in graveyard.ok(
        "queues", "remove", "shop.empty", "--dry-run", *HERE
    )
    assert graveyard.json("queues", "remove", "shop.empty", "--yes", *HERE)["removed"] == ["shop.empty"]
    assert sorted(counts(graveyard)) == ["shop.charge", "shop.mail"]
    assert "did you mean shop.mail?" in graveyard.refused("queues", "remove", "shop.mial", "--yes", *HERE, code=1)


def test_a_queue_is_not_removed_with_what_is_in_it_unless_told(graveyard: Program) -> None:
    graveyard.ok("publish", "mail", "--data", "{}", *HERE)
    refused = ("queues", "remove", "shop.charge", "shop.mail")
    assert "say --yes" in graveyard.refused(*refused, *HERE)
    assert "3 dead letters of it would be lost" in graveyard.refused(*refused, "--yes", *HERE, code=1)
    said = graveyard.refused(*refused, "--with-dead", "--yes", *HERE, code=1)
    assert "1 message in it would be lost" in said
    assert "conveyor move" in said
    assert counts(graveyard) == {"shop.charge": (0, 3), "shop.mail": (1, 2)}
    assert "2 queues with 1 message and 5 dead letters removed" in graveyard.ok(
        *refused, "--with-dead", "--with-messages", "--yes", *HERE
    )
    assert counts(graveyard) == {}


def test_queues_can_be_watched_as_a_stream(graveyard: Program) -> None:
    with subprocess.Popen(
        graveyard.command("queues", "--watch", "--interval", "0.1", "--json", *HERE),
        cwd=graveyard.folder,
        env=graveyard.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        seen = [json.loads(program.stdout.readline()) for _ in range(2)]
        program.send_signal(2)
        assert program.wait(60) == 130
    assert [queue["dead"] for queue in seen[1]["queues"]] == [3, 2]


def test_a_reason_that_nobody_gives_is_refused(graveyard: Program) -> None:
    said = graveyard.refused("dead", "list", "--reason", "exausted", *HERE)
    assert "there are: rejected, exhausted, invalid, crashed, expired" in said
    assert "did you mean exhausted?" in said
    graveyard.refused("dead", "redrive", "--reason", "bogus", "--dry-run", *HERE)
    for known in ("crashed", "maxlen"):
        assert graveyard.json("dead", "list", "--reason", known, *HERE)["dead"] == []


def test_a_reason_that_another_program_gave_is_one(conveyor: Program) -> None:
    conveyor.bury(CHARGE, dead_letters(1, reason="too-late"))
    assert len(conveyor.json("dead", "list", "--reason", "too-late", *HERE)["dead"]) == 1
    assert conveyor.json("dead", "list", "--reason", "too-late", "--error", "nowhere", *HERE)["dead"] == []
    assert "too-late" in conveyor.refused("dead", "list", "--reason", "bogus", *HERE)


def test_dead_letters_are_listed_and_shown_whole(graveyard: Program) -> None:
    listed = graveyard.json("dead", "list", *HERE)
    assert [letter["id"] for letter in listed["dead"]] == [
        *("order.created-0", "order.created-1", "order.created-2"),
        *("mail-0", "mail-1"),
    ]
    assert listed["more"] is False
    assert graveyard.json("dead", "list", "--limit", "1", *HERE)["more"] is True
    assert "took too long" in graveyard.ok("dead", "list", *HERE)
    shown = graveyard.ok("dead", "show", "order.created-1", *HERE)
    assert "Traceback (most recent call last): …" in shown
    assert '{"n": 1}' in shown
    [letter] = graveyard.json("dead", "show", "order.created-1", *HERE)["dead"]
    assert (letter["payload"], letter["reason"], letter["queue"]) == ('{"n": 1}', "exhausted", "shop.charge")


def test_a_letter_that_is_not_there_is_a_failure(graveyard: Program) -> None:
    assert "no dead letter with the id 'x'" in graveyard.refused("dead", "show", "x", *HERE, code=1)
    assert graveyard.run("dead", "redrive", "--id", "x", *HERE).returncode == 1


def test_a_mistyped_queue_is_not_taken_for_an_empty_one(graveyard: Program) -> None:
    assert "did you mean shop.charge?" in graveyard.refused("dead", "list", "--queue", "shop.chrge", *HERE, code=1)


@pytest.mark.parametrize(
    ("filters", "redriven", "left"),
    [
        (["--queue", "shop.mail"], 2, {"shop.charge": (0, 3), "shop.mail": (2, 0)}),
        (["--id", "order.created-1"], 1, {"shop.charge": (1, 2), "shop.mail": (0, 2)}),
        (["--reason", "exhausted"], 3, {"shop.charge": (3, 0), "shop.mail": (0, 2)}),
        (["--error", "ORDER.created took"], 3, {"shop.charge": (3, 0), "shop.mail": (0, 2)}),
        (["--error", "too long", "--queue", "shop.mail"], 2, {"shop.charge": (0, 3), "shop.mail": (2, 0)}),
        (["--reason", "crashed"], 0, {"shop.charge": (0, 3), "shop.mail": (0, 2)}),
        (["--all"], 5, {"shop.charge": (3, 0), "shop.mail": (2, 0)}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_dead_letters_are_redriven_by_what_is_asked_for(
    graveyard: Program, filters: list[str], redriven: int, left: dict[str, Any]
) -> None:
    tried = graveyard.json("dead", "redrive", *filters, "--dry-run", *HERE)
    assert (tried["matched"], tried["redriven"]) == (redriven, 0)
    assert counts(graveyard) == {"shop.charge": (0, 3), "shop.mail": (0, 2)}
    done = graveyard.json("dead", "redrive", *filters, *HERE)
    assert (done["matched"], done["redriven"]) == (redriven, redriven)
    assert counts(graveyard) == left


def test_discarding_needs_a_yes_and_is_final(graveyard: Program) -> None:
    assert "--yes" in graveyard.refused("dead", "discard", "--queue", "shop.mail", *HERE)
    graveyard.ok("dead", "discard", "--queue", "shop.mail", "--dry-run", *HERE)
    assert graveyard.json("dead", "discard", "--queue", "shop.mail", "--yes", *HERE)["discarded"] == 2
    assert counts(graveyard) == {"shop.charge": (0, 3), "shop.mail": (0, 0)}


def test_names_and_payloads_cannot_steer_the_terminal(conveyor: Program) -> None:
    evil = Message("\x1b]0;id\x07", "mail", b"\x1b[2J[bold]\xff", headers={"[red]": "\x9b31m"})
    conveyor.bury(MAIL, [(evil, Dead("[link=x]\x1b[0m", "\x1b[31mred\u202e", "\x1b[5m"))])
    for shown in (conveyor.ok("dead", "list", *HERE), conveyor.ok("dead", "show", "\x1b]0;id\x07", *HERE)):
        assert not set("\x1b\x07\x9b\u202e") & set(shown)
        assert "\\x1b]0;id\\x07" in shown
    assert "\\x1b[2J[bold]\\xff" in conveyor.ok("dead", "show", "\x1b]0;id\x07", *HERE)


def test_twenty_thousand_letters_are_redriven_in_chunks_with_a_bar(conveyor: Program) -> None:
    conveyor.bury(CHARGE, dead_letters(20_000))
    mine, theirs = pty.openpty()
    seen = bytearray()

    def read() -> None:
        while True:
            try:
                part = os.read(mine, 65_536)
            except OSError:
                return
            if not part:
                return
            seen.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    done = subprocess.run(
        conveyor.command("dead", "redrive", "--all", *HERE),
        cwd=conveyor.folder,
        env=conveyor.environment | {"TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        check=True,
    )
    os.close(theirs)
    reader.join()
    os.close(mine)
    assert "20,000 of 20,000 redriven" in done.stdout
    assert b"/20000" in seen
    assert counts(conveyor)["shop.charge"] == (20_000, 0)


def test_a_terminal_is_asked_before_letters_are_discarded(graveyard: Program) -> None:
    for answer, left in (b"n\n", (0, 3)), (b"y\n", (0, 0)):
        mine, theirs = pty.openpty()
        with subprocess.Popen(
            graveyard.command("dead", "discard", "--queue", "shop.charge", *HERE),
            cwd=graveyard.folder,
            env=graveyard.environment,
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=theirs,
        ) as program:
            os.write(mine, answer)
            program.communicate(timeout=60)
            assert program.returncode == (1 if answer == b"n\n" else 0)
        os.close(theirs)
        os.close(mine)
        assert counts(graveyard)["shop.charge"] == left
