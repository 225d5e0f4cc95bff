"""Every command explains itself, ends with the code that it promises, and says in words what is wrong."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from conveyor.cli import COMMANDS, main

if TYPE_CHECKING:
    from tests.cli.conftest import Program

ALL = [
    *([name] for name in COMMANDS),
    *(["dead", name] for name in ("list", "show", "redrive", "discard")),
    *(["outbox", name] for name in ("list", "retry", "discard")),
    *(["queues", name] for name in ("pause", "resume")),
]


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_every_command_has_help_with_an_example_and_its_exit_codes(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"conveyor {' '.join(command)}" in shown
    assert "Examples:" in shown
    assert "Exit codes: 0 fine" in shown
    if command not in (["dead"], ["outbox"], ["top"]):
        assert "--json" in shown
        assert "--debug" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_what_help_says_below_its_tables_fits_80_columns(command: str) -> None:
    below = importlib.import_module(f"conveyor.cli.{command}").command.help_epilogue
    assert [line for line in below.splitlines() if len(line) > 80] == []


def test_help_names_every_command_and_loads_none_of_them(conveyor: Program) -> None:
    shown = conveyor.ok("--help")
    assert all(f" {name} " in shown for name in COMMANDS)
    code = (
        "import sys; from conveyor.cli import main; main(['--help']);"
        "loaded = [name for name in sys.modules if name.startswith('conveyor.cli.')];"
        "assert loaded == ['conveyor.cli.terminal'], loaded;"
        "assert not {'apsw', 'sqlalchemy', 'prometheus_client', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_it_tells_its_version(conveyor: Program) -> None:
    assert conveyor.ok("--version").startswith("conveyor ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chek", "shop:app"], 'Did you mean "check"'),
        (["check"], "conveyor check --help"),
        (["check", "shop:app", "--jsn"], "--json"),
        (["graph", "shop:app", "--format", "xml"], '"mermaid"'),
        (["check", "shp:app"], "did you mean shop?"),
        (["check", "shop:ap"], "did you mean shop:app?"),
        (["check", "shop:OrderCreated"], "not a Conveyor; did you mean shop:app?"),
        (["check", "shop.py:app"], "write shop:app"),
        (["check", "src/shop.py"], "write src.shop:app"),
        (["check", "json"], "holds no app"),
        (["check", "a b"], "write module:attribute"),
        (["queues"], "which broker?"),
        (["queues", "--broker", "kafka://host"], "unknown broker scheme 'kafka'"),
        (["queues", "--broker", "memory://"], "no other one can see it"),
        (["queues", "--broker", "shop.queue"], "no broker URL"),
        (["dead", "redrive", "--broker", "sqlite:///shop.queue"], "redrive what?"),
        (["dead", "redrive", "--all", "--queue", "x", "--broker", "sqlite:///shop.queue"], "leave it out"),
        (["dead", "discard", "--queue", "x", "--broker", "sqlite:///shop.queue"], "--yes"),
        (["publish", "shop:app"], "OrderCreated"),
        (["publish", "shop:app", "OrderCreted", "--data", "{}"], "did you mean OrderCreated?"),
        (["publish", "shop:app", "OrderCreated"], "--data"),
        (["publish", "shop:app", "OrderCreated", "--data", "{"], "no JSON"),
        (["publish", "shop:app", "OrderCreated", "--data", '{"order_id": "A-1", "total": '], "no JSON"),
        (["publish", "shop:app", "OrderCreated", "--data", '{"order_id": 1, "total": "2"}'], "order_id"),
        (["publish", "shop:app", "OrderCreated", "--data", "@none.json"], "No such file"),
        (["publish", "order.created", "--data", "nojson", "--broker", "sqlite:///shop.queue"], "no JSON"),
        (["publish", "order created", "--data", "1", "--broker", "sqlite:///shop.queue"], "is no topic"),
        (["publish", "a", "--data", "1", "--delay", "soon"], "is no duration"),
        (["publish", "a", "--data", "1", "--at", "2027-01-01T00:00"], "offset"),
        (["publish", "a", "--data", "1", "--at", "2027-01-01T00:00Z", "--delay", "1"], "not both"),
        (["publish", "a", "--data", "1", "--header", "x"], "NAME=VALUE"),
        (["publish", "a", "--data", "1", "--priority", "10"], "priority"),
        (["run", "shop:app", "--workers", "chrge"], "did you mean charge?"),
        (["run", "shop:app", "--processes", "0"], "--processes"),
        (["run", "shop:app", "--max-rss", "0"], "--max-rss"),
        (["run", "shop:app", "--http", "nowhere"], "host:port"),
        (["run", "shop:app", "--broker", "memory://", "--processes", "2"], "could not share it"),
        (["migrate"], "CONVEYOR_DATABASE"),
        (["migrate", "--database", "sqlite:///shop.db"], "sqlite+aiosqlite:///shop.db"),
        (["doctor", "--broker", "memory://x", "--only", "speed"], "the areas are"),
    ],
)
def test_wrong_usage_is_refused_in_words_with_code_2(conveyor: Program, arguments: list[str], said: str) -> None:
    assert said in " ".join(conveyor.refused(*arguments).split())


def test_an_app_that_does_not_import_shows_the_users_own_line(conveyor: Program) -> None:
    (conveyor.folder / "lines.py").write_text("x = 1\nimport shop\nshop.app.nothing(x)\n")
    said = conveyor.refused("check", "lines:app")
    assert "lines.py, line 3" in said
    assert "shop.app.nothing(x)" in said
    assert "AttributeError" in said


def test_an_app_with_a_missing_import_names_it_and_not_itself(conveyor: Program) -> None:
    (conveyor.folder / "lines.py").write_text("import no_such_module\n")
    said = conveyor.refused("check", "lines")
    assert "lines.py, line 1" in said
    assert "no_such_module" in said


def test_a_syntax_error_is_shown_with_its_line(conveyor: Program) -> None:
    (conveyor.folder / "lines.py").write_text("app = = 1\n")
    assert "line 1:\n    app = = 1" in conveyor.refused("check", "lines")


def test_a_handler_that_cannot_work_is_shown_with_its_line(conveyor: Program) -> None:
    (conveyor.folder / "lines.py").write_text(
        "from conveyor import Conveyor\napp = Conveyor('x')\n\n@app.worker\ndef work(order): ...\n"
    )
    said = conveyor.refused("check", "lines")
    assert "'order' has no annotation" in said
    assert "lines.py, line" in said


def test_a_module_that_exits_on_import_is_refused(conveyor: Program) -> None:
    (conveyor.folder / "lines.py").write_text("import sys\nsys.exit(3)\n")
    assert "__main__" in conveyor.refused("check", "lines")


def test_of_several_apps_one_has_to_be_named(conveyor: Program) -> None:
    (conveyor.folder / "two.py").write_text("from conveyor import Conveyor\na = Conveyor('a')\nb = Conveyor('b')\n")
    assert "two:a, two:b" in conveyor.refused("check", "two")


def test_debug_shows_the_traceback(conveyor: Program) -> None:
    done = conveyor.run("check", "nope:app", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "there is no module 'nope'" in done.stderr


def test_a_broker_that_cannot_be_opened_fails_with_code_1_and_no_file_is_made(conveyor: Program) -> None:
    assert "there is no queue file none.queue" in conveyor.refused("queues", "--broker", "sqlite:///none.queue", code=1)
    assert not (conveyor.folder / "none.queue").exists()
    (conveyor.folder / "no.queue").write_text("this is no database, but long enough to be taken for one" * 20)
    assert "no.queue" in conveyor.refused("queues", "--broker", "sqlite:///no.queue", code=1)


def test_a_missing_extra_says_what_to_install(conveyor: Program) -> None:
    (conveyor.folder / "sitecustomize.py").write_text("import sys\nsys.modules['sqlalchemy'] = None\n")
    said = conveyor.refused("migrate", "--database", "sqlite+aiosqlite:///x.db", PYTHONPATH=str(conveyor.folder))
    assert "pip install 'conveyor[ledger]'" in said


def test_a_queue_file_here_is_suggested(conveyor: Program) -> None:
    (conveyor.folder / "shop.queue").touch()
    assert "--broker sqlite:///shop.queue" in conveyor.refused("queues")


def test_passwords_are_never_shown(conveyor: Program) -> None:
    for arguments in (["queues", "--broker", "kafka://me:geheim@host"], ["run", "shop", "--broker", "x://a:geheim@h"]):
        done = conveyor.run(*arguments)
        assert done.returncode == 2
        assert "geheim" not in done.stdout + done.stderr


def test_a_reader_that_went_away_ends_it_quietly(conveyor: Program) -> None:
    line = " ".join(conveyor.command("graph", "shop:app")) + " | true"
    done = subprocess.run(line, shell=True, cwd=conveyor.folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_settings_come_from_a_file_in_the_current_directory(conveyor: Program) -> None:
    (conveyor.folder / "conveyor.toml").write_text('broker = "sqlite:///from-file.queue"\n')
    assert "from-file.queue" in conveyor.refused("queues", code=1)
    assert "from-variable.queue" in conveyor.refused("queues", code=1, CONVEYOR_BROKER="sqlite:///from-variable.queue")
    (conveyor.folder / "conveyor.toml").write_text("brokr = 1\n")
    assert "did you mean 'broker'" in conveyor.refused("queues")


def test_programs_that_are_no_command_use_the_file_of_settings_too(conveyor: Program) -> None:
    (conveyor.folder / "conveyor.toml").write_text(
        'broker = "sqlite:///real.queue"\ndatabase = "sqlite+aiosqlite:///real.db"\n'
    )
    (conveyor.folder / "script.py").write_text(
        """
import logging
from shop import app, OrderCreated

logging.basicConfig(level="INFO")
ledger = app.new_ledger("me")
assert ledger is not None and ledger.database.file.name == "real.db"
app.database_url = "sqlite+aiosqlite:///code.db"
assert app.new_ledger("me").database.file.name == "code.db"
app.new_broker()
app.broker_url = "sqlite:///code.queue"
app.new_broker()
"""
    )
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=conveyor.folder,
        env=conveyor.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = conveyor.folder
    assert f"the messages of shop are in {folder / 'real.queue'}; its database is {folder / 'code.db'}" in done.stderr
    assert f"the messages of shop are in {folder / 'code.queue'}" in done.stderr


def test_check_finds_what_is_wrong_and_fails(conveyor: Program) -> None:
    (conveyor.folder / "bad.py").write_text(
        """
from dataclasses import dataclass
from conveyor import Conveyor, Transaction, event

app = Conveyor("bad", broker="memory://")

@event("paid")
@dataclass
class Paid:
    order_id: str

@event("paid")
@dataclass
class PaidAsRead:
    order_id: int

@dataclass
class Placed:
    order_id: str

@dataclass
class OrderFailed: ...

class Gateway: ...

@app.worker
async def pay(placed: Placed, gateway: Gateway) -> Paid | OrderFailed: ...

@app.worker
async def read(paid: PaidAsRead, tx: Transaction) -> None: ...

@app.worker(queue="bad.read")
async def reread(paid: Paid) -> Placed: ...
"""
    )
    found = conveyor.json("check", "bad", code=1)
    errors = {
        (each["subject"], each["text"].partition(";")[0]) for each in found["findings"] if each["level"] == "error"
    }
    assert errors == {
        (
            "paid",
            "pay publishes Paid, read receives PaidAsRead: order_id is published as string and expected as integer",
        ),
        ("pay", "needs Gateway, which nobody provides"),
        ("read", "takes a Transaction, and there is no database"),
        ("bad.read", "is the queue of read, reread: each message would reach only one of them"),
    }
    warnings = [each["subject"] for each in found["findings"] if each["level"] == "warning"]
    assert warnings == ["order_failed"]
    notes = [each["text"] for each in found["findings"] if each["level"] == "note"]
    assert any("placed → paid → placed" in note for note in notes)
    assert found["ok"] is False


def test_check_is_content_with_a_sound_app_and_strict_is_stricter(conveyor: Program) -> None:
    assert "3 workers" in conveyor.ok("check", "shop:app", "--broker", "memory://")
    assert conveyor.json("check", "shop", "--broker", "memory://")["ok"] is True
    text = (conveyor.folder / "shop.py").read_text().replace("-> None:\n    with", "-> Shipped:\n    with")
    text = text.replace("app = Conveyor", "@dataclass\nclass Shipped: ...\n\napp = Conveyor", 1)
    (conveyor.folder / "shop.py").write_text(text)
    assert conveyor.run("check", "shop", "--broker", "memory://").returncode == 0
    done = conveyor.run("check", "shop", "--broker", "memory://", "--strict")
    assert done.returncode == 1
    assert "shipped: is published by ship, and no worker of this app receives it" in done.stdout


def test_check_takes_topics_that_are_nearly_the_same_for_a_typing_error(conveyor: Program) -> None:
    text = (conveyor.folder / "shop.py").read_text()
    text = text.replace("async def ship(payment: PaymentProcessed)", "async def ship(payment: PaymentProcesed)")
    text = text.replace("@app.worker\n", "@dataclass\nclass PaymentProcesed:\n    order_id: str\n\n@app.worker\n", 1)
    (conveyor.folder / "shop.py").write_text(text)
    warnings = [each["text"] for each in conveyor.json("check", "shop")["findings"] if each["level"] == "warning"]
    assert any("did you mean payment_procesed?" in each for each in warnings)
    assert any("payment_processed is published: is that it?" in each for each in warnings)


def test_check_tells_what_the_broker_lacks(conveyor: Program) -> None:
    (conveyor.folder / "lacking.py").write_text(
        """
from conveyor.broker import Feature
from conveyor.brokers.memory import MemoryBroker
import shop

class NoOrder(MemoryBroker):
    missing = {Feature.ORDER: "it shuffles"}

app = shop.app
app._given_broker = NoOrder()
"""
    )
    [error] = [each for each in conveyor.json("check", "lacking", code=1)["findings"] if each["level"] == "error"]
    assert error == {
        "level": "error",
        "subject": "shop.ship",
        "text": "asks for ordered=True, and the broker has none: it shuffles",
    }


def test_graph_draws_the_flow_as_text(conveyor: Program) -> None:
    assert conveyor.ok("graph", "shop").splitlines() == [
        "shop",
        "",
        "  order.created  (published from outside)",
        "    → charge  publishes payment_processed",
        "",
        "  payment_processed  (charge)",
        "    → ship",
        "",
        "  tasks",
        "    resize(path, width)",
    ]


def test_graph_draws_the_flow_as_mermaid(conveyor: Program) -> None:
    assert conveyor.ok("graph", "shop", "--format", "mermaid").splitlines() == [
        "flowchart LR",
        '  e0(["order.created"])',
        '  e1(["payment_processed"])',
        '  w0["charge"]',
        '  w1["ship"]',
        '  w2["resize"]',
        "  e0 --> w0",
        "  w0 --> e1",
        "  e1 --> w1",
    ]


def test_graph_draws_the_flow_for_programs(conveyor: Program) -> None:
    drawn = conveyor.json("graph", "shop")
    assert drawn == json.loads(conveyor.ok("graph", "shop", "--format", "json"))
    assert drawn["events"][0] == {
        "topic": "order.created",
        "types": ["OrderCreated"],
        "published_by": [],
        "received_by": ["charge"],
    }
    assert [worker["queue"] for worker in drawn["workers"]] == ["shop.charge", "shop.ship"]
    assert drawn["tasks"][0]["parameters"] == ["path", "width"]


def test_doctor_says_which_promises_a_broker_keeps(conveyor: Program) -> None:
    found = conveyor.json("doctor", "--broker", "memory://here", "--only", "publishing")
    assert found["ok"] is True
    assert {promise["verdict"] for promise in found["promises"]} == {"passed"}
    assert "durable" in found["missing"]
    assert any("lost with its process" in risk for risk in found["risks"])


def test_doctor_leaves_nothing_behind_on_sqlite(conveyor: Program) -> None:
    before = sorted(conveyor.folder.iterdir())
    found = conveyor.json("doctor", "--broker", "sqlite:///shop.queue?durability=normal", "--only", "publishing,killed")
    assert found["ok"] is True
    assert sorted(conveyor.folder.iterdir()) == before
    [risk] = found["risks"]
    assert "durability=normal: the last messages may be lost when the machine loses power" in risk


def test_doctor_names_handlers_that_may_outlast_what_the_server_allows() -> None:
    from conveyor.cli.doctor import long_handlers

    def said(url: str) -> list[str]:
        return [risk.split()[1] for risk in long_handlers("tests.cli.slow:app", url)]

    assert said("amqp://localhost") == ["encode", "watch"]
    assert said("amqps://localhost/?consumer_timeout=60") == ["encode", "resize", "watch"]
    assert said("amqp://localhost/shop?consumer_timeout=86400") == ["watch"]
    assert said("redis://localhost") == []


def test_doctor_fails_on_a_broken_promise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from conveyor.brokers.memory import MemoryBroker

    async def publish(self: MemoryBroker, messages: object) -> frozenset[str]:
        return frozenset()

    monkeypatch.setattr(MemoryBroker, "publish", publish)
    assert main(["doctor", "--broker", "memory://here", "--only", "a_message_that_no_queue_receives_is_reported"]) == 1
    assert "BROKEN" in capsys.readouterr().out
