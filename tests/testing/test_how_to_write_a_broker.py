"""The document on writing a broker is true: the broker in it passes the suite, by the programs in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs/how-to-write-a-broker.md"


def unpacked(folder: Path) -> Path:
    """The files of the document, in a folder."""
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        (folder / name).write_text(code)
    return folder


def test_the_documented_broker_passes_the_documented_proof(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "prove.py"], cwd=unpacked(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") > 70
    assert "no delay: lists know no time" in done.stdout
    assert "failed" not in done.stdout


def test_the_documented_test_runs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "settle or prefetch",
        "test_listbroker.py",
    ]
    done = subprocess.run(command, cwd=unpacked(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def test_the_documented_broker_is_a_broker_to_the_type_checker(tmp_path: Path) -> None:
    (unpacked(tmp_path) / "use.py").write_text(
        "from conveyor.broker import Broker\nfrom listbroker import ListBroker, Store\n\nbroker: Broker = ListBroker(Store())\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "listbroker.py", "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
