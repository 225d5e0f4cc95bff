"""What the README and the other documents show is true: the example runs, the code parses, targets and files exist."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shlex
import signal
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
    """The program that makes an app, and the session on a terminal that follows it."""
    found = blocks(document)
    for (language, text), (next_language, session) in itertools.pairwise(found):
        if language == "python" and "= Conveyor(" in text and next_language == "console":
            return text, session
    raise AssertionError('README.md has no ```python block with "= Conveyor(" and a ```console block behind it')


def test_the_example_of_the_readme_does_what_it_shows(tmp_path: Path) -> None:
    program, session = example(README.read_text())
    commands = [shlex.split(line[2:]) for line in session.splitlines() if line.startswith("$ ")]
    shown = [line for line in session.splitlines() if not line.startswith("$ ")]
    assert [command[:2] for command in commands] == [["conveyor", "publish"], ["conveyor", "run"]]
    assert shown
    (tmp_path / "shop.py").write_text(program)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CONVEYOR_")}
    publish, run = ([sys.executable, "-W", "error", "-m", *command] for command in commands)
    subprocess.run(publish, cwd=tmp_path, env=environment, check=True, timeout=120)
    with subprocess.Popen(run, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            for line in shown:  # a test that waits in vain is ended by its time limit
                assert running.stdout.readline() == line + "\n"
        finally:
            running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0


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
