"""The shop as a command: its help, its settings, and what it says when they cannot work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.orders.settings import SETTINGS, Seconds, SettingError, Settings, shown

ROOT = Path(__file__).parents[3]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.orders", *arguments]
    env = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_help_shows_every_setting_with_its_environment_variable() -> None:
    said = run("--help", COLUMNS="500").stdout
    for name, setting in SETTINGS.items():
        assert f"--{name.replace('_', '-')}" in said
        assert f"${setting.variables[0]}" in said
    assert "conveyor run examples.orders.app:app" in said


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--decline-rate", "7", "--decline-rate cannot be '7': a share is between 0 and 1"),
        ("--port", "99999", "--port cannot be '99999': a port is at most 65535"),
        ("--processes", "-1", "--processes cannot be '-1': between 0 and 64 processes are sensible"),
        ("--payment", "soon", "it is a number of seconds such as 0.5, or two such as 1-2"),
        ("--payment", "3-1", "the first number is not above the second one"),
        ("--broker", "pigeon://loft", "unknown broker scheme 'pigeon'"),
        ("--broker", "sqlite:////nowhere/at/all/shop.queue", "/nowhere/at/all does not exist"),
        ("--database", "nonsense", "this is no database URL"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_words(tmp_path: Path, flag: str, value: str, said: str) -> None:
    done = run("--data", str(tmp_path), "--port", "0", f"{flag}={value}")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_readme_says_how_to_run_on_a_server() -> None:
    said = (ROOT / "examples" / "orders" / "README.md").read_text()
    assert "CONVEYOR_BROKER=redis://" in said
    assert "CONVEYOR_BROKER=amqp://" in said


def test_a_url_is_shown_without_its_password() -> None:
    assert shown("amqp://shop:s3cr@t@rabbit:5672/shop?password=s3cret") == "amqp://rabbit:5672/shop"
    assert shown("sqlite:////data/shop.queue") == "sqlite:////data/shop.queue"


def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    found = Settings.from_environment(
        {
            "SHOP_DATA": str(tmp_path),
            "SHOP_PAYMENT_SECONDS": "0.5-1.5",
            "SHOP_DECLINE_RATE": "0.25",
            "SHOP_WEB_ONLY": "1",
            "PORT": "9000",
            "CONVEYOR_BROKER": "memory://",
            "SHOP_HOST": "",
        }
    )
    assert found.payment == Seconds(0.5, 1.5)
    assert found.decline_rate == 0.25
    assert found.web_only
    assert not found.runs_workers
    assert found.port == 9000
    assert found.broker == "memory://"
    assert found.database == f"sqlite+aiosqlite:///{tmp_path}/shop.db"
    assert found.host == "127.0.0.1"


def test_the_shops_own_variable_goes_before_the_general_one() -> None:
    assert Settings.from_environment({"SHOP_PORT": "1", "PORT": "2"}).port == 1


def test_a_variable_that_makes_no_sense_is_named() -> None:
    with pytest.raises(SettingError, match="SHOP_DECLINE_RATE cannot be 'often'"):
        Settings.from_environment({"SHOP_DECLINE_RATE": "often"})
