"""The arrows between the parts, the purity of the core, and what `import conveyor` loads and offers."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

import conveyor

ROOT: Final = Path(__file__).parent.parent
PACKAGE: Final = ROOT / "src" / "conveyor"

API: Final = "conveyor"
"""The package itself: what `from conveyor import …` offers."""

# Who may import whom within the package; every part may import itself, and a broker of brokers/ only its own files.
BELOW_RUNTIME: Final = frozenset({"errors", "core", "broker", "config", "brokers"})
ARROWS: Final[dict[str, frozenset[str]]] = {
    "errors": frozenset(),
    "core": frozenset({"errors"}),
    "broker": frozenset({"errors", "core"}),
    "config": frozenset({"errors", "core", "broker"}),
    "brokers": frozenset({"errors", "core", "broker"}),
    "runtime": BELOW_RUNTIME,
    "middleware": BELOW_RUNTIME | {"runtime"},
    "app": BELOW_RUNTIME | {"runtime", "middleware"},
    API: frozenset({"errors", "core", "broker", "runtime", "app"}),
    "testing": BELOW_RUNTIME | {"runtime", "app", API},
    "console": BELOW_RUNTIME | {"runtime", "app", API},
    "cli": BELOW_RUNTIME | {"runtime", "app", "testing", "console", API},
    "__main__": frozenset({"cli"}),
}

# What would let a decision read a clock, roll dice, do I/O, or share state between threads.
IMPURE: Final = frozenset(
    """
    apsw asyncio concurrent contextvars ctypes fcntl glob http logging mmap multiprocessing os platform queue random
    resource sched secrets select selectors shutil signal socket sqlite3 ssl subprocess tempfile threading time urllib
    uvloop
    """.split()
)
IMPURE_CALLS: Final = frozenset(
    """
    open input print breakpoint exec eval now utcnow today uuid1 uuid4 cwd home exists is_file is_dir read_text
    read_bytes write_text write_bytes unlink mkdir
    """.split()
)
CORE_PACKAGES: Final = frozenset({"msgspec", "pydantic"})
"""What the core may use beside the standard library; pydantic only where a payload is made with it already."""

PUBLIC: Final = frozenset({API, "errors", "middleware", "testing"})
"""What the documentation shows to applications."""

# None of these may cost the start-up of a program that only says `import conveyor`.
HEAVY: Final = """
    aiosqlite apsw asyncpg cyclopts fastapi hypothesis pamqp prometheus_client pydantic pytest
    redis rich sqlalchemy starlette textual uvicorn
""".split()


@dataclass(frozen=True)
class Import:
    """A module that is imported, or a name out of one; early where this happens as soon as the importing module is."""

    name: str
    early: bool

    @property
    def part(self) -> str:
        """The part of Conveyor that it belongs to."""
        return part_of(self.name)


def part_of(module: str) -> str:
    """conveyor.core.retry → core; a name that is no module of ours belongs to the package itself."""
    second = module.split(".")[1:2]
    return second[0] if second and second[0] in ARROWS else API


def imports_of(source: str) -> list[Import]:
    """Everything that a source imports, also inside functions and for the type checker only."""
    found: list[Import] = []

    def visit(node: ast.AST, *, early: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, early) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            found.extend(Import(f"{'.' * node.level}{node.module or ''}.{alias.name}", early) for alias in node.names)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            early = False
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            early = False
        for child in ast.iter_child_nodes(node):
            visit(child, early=early)

    visit(ast.parse(source), early=True)
    return found


def wrong_arrows(module: str, source: str) -> list[str]:
    """What a module of the package imports and must not."""
    part = part_of(module)
    wrong = []
    for found in imports_of(source):
        if found.name.split(".")[0] not in {"conveyor", ""}:
            continue
        if part == "brokers" and found.part == "brokers":
            broker = ".".join(module.split(".")[:3])
            right = f"{found.name}.".startswith(f"{broker}.")
        else:
            right = found.part == part or found.part in ARROWS[part]
        if not right:
            wrong.append(f"{module} ({part}) imports {found.name}")
    return wrong


def impurities(source: str) -> list[str]:
    """What a source does that has no place in the core."""
    wrong = []
    for found in imports_of(source):
        package = found.name.split(".")[0]
        standard = package in sys.stdlib_module_names and package not in IMPURE
        if not (standard or found.name == "urllib.parse" or package == "conveyor" or package in CORE_PACKAGES):
            wrong.append(f"imports {found.name}")
        if package == "pydantic" and found.early:
            wrong.append("imports pydantic before anybody needs it")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await):
            wrong.append(f"line {node.lineno} is asynchronous")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).split(".")[-1]
            if called in IMPURE_CALLS:
                wrong.append(f"line {node.lineno} calls {ast.unparse(node.func)}")
    return wrong


def private_imports(source: str) -> list[str]:
    """What an application imports of Conveyor that is not public."""
    ours = [found for found in imports_of(source) if found.name.split(".")[0] == "conveyor"]
    return [found.name for found in ours if found.part not in PUBLIC]


def modules(folder: Path) -> list[Path]:
    """All Python files below a folder, by name."""
    return sorted(folder.rglob("*.py"))


def name_of(path: Path) -> str:
    """src/conveyor/core/__init__.py → conveyor.core"""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def shown(path: Path) -> str:
    """A path as a test's name."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", modules(PACKAGE), ids=shown)
def test_the_arrows_between_the_parts_go_one_way(path: Path) -> None:
    assert wrong_arrows(name_of(path), path.read_text()) == []


@pytest.mark.parametrize("path", modules(PACKAGE / "core"), ids=shown)
def test_the_core_is_pure(path: Path) -> None:
    assert impurities(path.read_text()) == []


@pytest.mark.parametrize("path", modules(ROOT / "examples"), ids=shown)
def test_an_example_stands_on_the_public_names_only(path: Path) -> None:
    assert private_imports(path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("conveyor.core.retry", "from conveyor.broker import Delivery"),
        ("conveyor.errors", "import conveyor.core.message"),
        ("conveyor.broker", "def later():\n    from conveyor.brokers.memory import MemoryBroker"),
        ("conveyor.brokers.redis", "from conveyor.brokers.sqlite import SqliteBroker"),
        ("conveyor.brokers.redis", "from conveyor.brokers import sqlite"),
        ("conveyor.brokers.redis.client", "from conveyor.brokers.sqlite.wake import WakeSockets"),
        ("conveyor.brokers.redis.client", "from conveyor.brokers.redis_cluster import Slots"),
        ("conveyor.brokers.redis.client", "from conveyor.brokers import from_url"),
        ("conveyor.brokers.redis", "from conveyor.runtime.loop import Loops"),
        (
            "conveyor.runtime.runner",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from conveyor.app import Conveyor",
        ),
        ("conveyor.runtime.runner", "from conveyor import Conveyor"),
        ("conveyor.app", "import conveyor.cli"),
        ("conveyor.testing.harness", "from conveyor.cli.run import run"),
        ("conveyor.core.retry", "from .message import Message"),
    ],
)
def test_a_wrong_arrow_is_caught(module: str, source: str) -> None:
    assert len(wrong_arrows(module, source)) == 1


def test_the_files_of_one_broker_may_import_each_other() -> None:
    source = "from conveyor.brokers.redis.client import Client"
    assert (
        wrong_arrows("conveyor.brokers.redis", source) == wrong_arrows("conveyor.brokers.redis.scripts", source) == []
    )


@pytest.mark.parametrize(
    "source",
    [
        "import asyncio",
        "def f():\n    import time",
        "from os import environ",
        "import random as dice",
        "from pydantic import BaseModel",
        "import sqlalchemy.ext.asyncio",
        "from datetime import datetime\nx = datetime.now()",
        "from pathlib import Path\nx = Path('x').read_text()",
        "x = open('x')",
        "async def f() -> None: ...",
    ],
)
def test_an_impure_core_is_caught(source: str) -> None:
    assert len(impurities(source)) == 1


def test_an_example_that_reaches_inside_is_caught() -> None:
    reaching = (
        "from conveyor import Conveyor\nfrom conveyor.testing import run\nfrom conveyor.runtime.ledger import Ledger\n"
    )
    assert private_imports(reaching) == ["conveyor.runtime.ledger.Ledger"]


def test_importing_conveyor_loads_no_driver_and_no_framework() -> None:
    program = f"import sys, conveyor; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


OFFERED: Final = frozenset(conveyor.__all__)
PROMISED: Final = frozenset(
    """
    Conveyor Task event Message Context Transaction Retry Reject RetryPolicy NO_RETRY Call Middleware Next carried Watch
    Pull Pulled
    ConveyorError ConfigurationError HandlerError PayloadError NoSubscriber BrokerError BrokerUnavailable
    BrokerFull PublishFailed carried Ticket Job JobError JobFailed JobCancelled JobTimeout ResultNotKept
    """.split()
)


def test_the_exported_names_are_the_promised_ones() -> None:
    assert OFFERED == PROMISED


def test_every_exported_name_is_there_and_says_what_it_is_for() -> None:
    for name in OFFERED:
        exported = getattr(conveyor, name)
        if inspect.isclass(exported) or inspect.isroutine(exported):
            assert inspect.getdoc(exported), name


def test_nothing_else_of_ours_looks_public() -> None:
    ours = {name for name, value in vars(conveyor).items() if getattr(value, "__module__", "").startswith("conveyor.")}
    assert {name for name in ours if not name.startswith("_")} <= OFFERED
