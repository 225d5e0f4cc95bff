"""What the README and the other documents show is true: the example runs, the code parses, targets and files exist."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
README: Final = ROOT / "README.md"
DOCUMENTS: Final = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: str) -> list[tuple[str, str]]:
    """The fenced blocks of a document, in order: (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", document, flags=re.DOTALL | re.MULTILINE)


def example(document: str) -> tuple[str, str]:
    """The program that makes an app, and what the block after it shows as its output ("" where there is none)."""
    found = blocks(document)
    for position, (language, text) in enumerate(found):
        if language == "python" and "= Conveyor(" in text:
            following = found[position + 1 : position + 2]
            return text, next((shown for kind, shown in following if kind == "text"), "")
    raise AssertionError('README.md has no ```python block with "= Conveyor("')


def test_the_example_of_the_readme_runs_to_its_last_message(tmp_path: Path) -> None:
    program, shown = example(README.read_text())
    (tmp_path / "shop.py").write_text(program)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CONVEYOR_")}
    command = [sys.executable, "-W", "error", "shop.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert shown.strip() in done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_piece_of_python_in_a_document_parses(document: Path) -> None:
    for language, text in blocks(document.read_text()):
        if language == "python":
            ast.parse(text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_in_a_document_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = document.read_text()
    # Commands stand in code: `make x`, or a line of a block, with or without a remark.
    named = re.findall(r"`make ([a-z-]+)", text) + re.findall(
        r"^(?: {4}|\$ )?make ([a-z-]+) *(?:#.*)?$", text, flags=re.MULTILINE
    )
    assert set(named) <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_links_to_exists(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not re.match(r"[a-z]+:|#", target):
            assert (document.parent / target.split("#")[0]).exists(), target
