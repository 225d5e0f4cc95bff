"""The tests' own servers and rules do what other tests rely on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

if TYPE_CHECKING:
    from servers.postgres import Postgres
    from tests.conftest import Chromium

ROOT: Final = Path(__file__).parent.parent


async def _answer(url: str, statement: str) -> object:
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            result = await connection.execute(text(statement))
            return result.scalar() if result.returns_rows else None
    finally:
        await engine.dispose()


async def test_every_database_of_the_test_server_is_a_new_one(postgres: Postgres) -> None:
    first, second = postgres.url("shop"), postgres.url("shop")
    assert first != second
    await _answer(first, "CREATE TABLE here (n int)")
    assert await _answer(second, "SELECT to_regclass('here')") is None


@pytest.mark.parametrize("fault", ["restart", "kill"])
async def test_the_test_server_keeps_its_data_over_a_restart_and_a_crash(postgres: Postgres, fault: str) -> None:
    url = postgres.url()
    await _answer(url, "CREATE TABLE kept AS SELECT 42 AS n")
    getattr(postgres, fault)()
    postgres.start()
    assert await _answer(url, "SELECT n FROM kept") == 42


def test_the_browser_renders_a_page(chromium: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<title>x</title><p id=here></p><script>here.textContent = 6 * 7</script>")
    profile = tmp_path / "profile"
    command = [chromium.path, *chromium.flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert '<p id="here">42</p>' in done.stdout


@pytest.mark.parametrize(
    "source",
    [
        "import pytest\ndef test_a(): pytest.skip('too hard')",
        "import pytest\n@pytest.mark.skip(reason='too hard')\ndef test_a(): pass",
        "import pytest\npytest.skip('too hard', allow_module_level=True)",
    ],
)
def test_a_skipped_test_fails_the_run_and_shows_its_reason(tmp_path: Path, source: str) -> None:
    (tmp_path / "test_skips.py").write_text(source)
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "1",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
        "--rootdir",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # conftest.py imports the servers from the checkout
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120, env=environment
    )
    assert done.returncode != 0
    assert "too hard" in done.stdout


def test_a_warning_fails_its_test(tmp_path: Path) -> None:
    source = """
        import warnings
        def test_a(): warnings.warn("careless")
    """
    (tmp_path / "test_warns.py").write_text(textwrap.dedent(source))
    config = str(ROOT / "pyproject.toml")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", config, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert "careless" in done.stdout


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").rglob("*.txt")), ids=lambda path: path.name)
def test_locked_requirements_have_exact_versions_and_hashes_and_no_address(lock: Path) -> None:
    text = "".join(line for line in lock.read_text().splitlines(keepends=True) if not line.startswith("#"))
    assert "://" not in text
    entries = re.split(r"\n(?=\S)", text.strip())
    assert [
        entry for entry in entries if not re.match(r"[\w.\[\]-]+==\S+ .*--hash=sha256:", entry, flags=re.DOTALL)
    ] == []


def test_every_requirement_of_the_project_is_locked_for_development() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [item for items in project["project"]["optional-dependencies"].values() for item in items]
    group = [item for item in project["dependency-groups"]["dev"] if isinstance(item, str)]
    wanted = {re.split(r"[\[<>=]", item)[0] for item in [*project["project"]["dependencies"], *extras, *group]}
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / "dev.txt").read_text(), flags=re.MULTILINE))
    assert wanted - {"conveyor"} <= locked
