"""The programs of the guide run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

GUIDE: Final = Path(__file__).parent.parent / "docs" / "guide.md"
MARK: Final = "# guide: run\n"
"""Begins the blocks that are complete programs."""
SECTION: Final = re.compile(r"^## \d+\. (.+?)\n(.*?)(?=^## |\Z)", flags=re.DOTALL | re.MULTILINE)
BLOCK: Final = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def programs() -> dict[str, list[str]]:
    """The complete programs of the guide by the title of their section."""
    return {
        title: [block for block in BLOCK.findall(text) if block.startswith(MARK)]
        for title, text in SECTION.findall(GUIDE.read_text())
    }


def test_every_section_of_the_guide_has_a_program() -> None:
    found = programs()
    assert len(found) == 10
    assert [title for title, blocks in found.items() if not blocks] == []


@pytest.mark.parametrize(
    "program", [pytest.param(block, id=title) for title, blocks in programs().items() for block in blocks]
)
def test_a_program_of_the_guide_runs(program: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CONVEYOR_")}
    command = [sys.executable, "-W", "error", "program.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
