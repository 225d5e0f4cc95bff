"""The order processor as a command: its help, its settings, and what it says when they cannot work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from examples.order_processor.settings import Settings
from examples.settings import SettingError, from_environment
from tests.examples.order_processor.conftest import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.order_processor", *arguments]
    env = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_help_shows_every_setting_with_its_environment_variable() -> None:
    said = run("--help", COLUMNS="500").stdout
    for field in msgspec.structs.fields(Settings):
        variable = {"prefetch": "ORDER_PREFETCH", "processes": "ORDER_PROCESSES", "data": "ORDER_DATA"}.get(field.name)
        variable = variable or {
            "http": "CONVEYOR_HTTP",
            "database": "CONVEYOR_DATABASE",
            "broker": "CONVEYOR_BROKER",
        }.get(field.name)
        assert f"${variable or field.name.upper()}" in said
    assert "--rabbitmq-pass " not in said  # everybody can read a command line


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ORDER_PREFETCH", "0", "ORDER_PREFETCH cannot be '0'"),
        ("ORDER_PROCESSES", "many", "ORDER_PROCESSES cannot be 'many'"),
        ("RABBITMQ_PORT", "99999", "RABBITMQ_PORT cannot be '99999'"),
        ("RABBITMQ_EXCHANGE_TYPE", "round", "RABBITMQ_EXCHANGE_TYPE cannot be 'round'"),
        ("SMTP_URL", "mail.example", "SMTP_URL is not as it must be: smtp://host:port"),
        ("WAREHOUSE_URL", "ftp://warehouse", "WAREHOUSE_URL is not as it must be: http://host:port"),
        ("MAIL_TO", "nobody", "MAIL_TO cannot be 'nobody': it is no e-mail address"),
        ("ORDER_RETRY_SECONDS", "100", "ORDER_RETRY_SECONDS cannot be more than ORDER_LONGEST_RETRY_SECONDS"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_words(variable: str, value: str, said: str) -> None:
    done = run(**{variable: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert "Traceback" not in done.stderr


def test_a_refused_address_is_not_shown_as_it_may_hold_a_password() -> None:
    with pytest.raises(SettingError) as refused:
        from_environment(Settings, {"SMTP_URL": "stmp://me:hunter2@mail.example"})
    assert "hunter2" not in str(refused.value)


def test_the_brokers_url_is_made_of_its_parts() -> None:
    found = from_environment(
        Settings,
        {
            "RABBITMQ_HOST": "one.example, two.example:5673",
            "RABBITMQ_USER": "orders",
            "RABBITMQ_PASS": "p@ss/word",
            "RABBITMQ_VHOST": "/shop",
            "RABBITMQ_TLS": "1",
        },
    )
    assert found.broker_url == (
        "amqps://orders:p%40ss%2Fword@one.example:5672,two.example:5673/%2Fshop?queue_type=classic"
    )


def test_a_brokers_url_counts_more_than_its_parts() -> None:
    found = from_environment(Settings, {"CONVEYOR_BROKER": "redis://cache.example:6379/0", "RABBITMQ_HOST": "rabbit"})
    assert found.broker_url == "redis://cache.example:6379/0"


def test_the_database_lies_in_the_data_folder_unless_another_one_is_named(tmp_path: Path) -> None:
    own = from_environment(Settings, {"ORDER_DATA": str(tmp_path)})
    assert own.database_url == f"sqlite+aiosqlite:///{tmp_path}/order-processor.db"
    shared = from_environment(Settings, {"CONVEYOR_DATABASE": "postgresql+asyncpg://db/orders"})
    assert shared.database_url == "postgresql+asyncpg://db/orders"
