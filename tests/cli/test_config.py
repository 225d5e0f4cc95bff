"""Settings come from one file, the environment and flags, and none of them lets a mistake pass."""

from __future__ import annotations

import contextlib
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor.config import Config, address, load, masked, place, read_environment, read_file
from conveyor.errors import ConfigurationError


def test_flags_overrule_the_environment_which_overrules_the_file(tmp_path: Path) -> None:
    (tmp_path / "conveyor.toml").write_text('broker = "memory://file"\nprocesses = 2\ngrace_seconds = 5\n')
    found = load(
        tmp_path, {"CONVEYOR_BROKER": "memory://environment", "CONVEYOR_PROCESSES": "3"}, {"broker": "memory://flag"}
    )
    assert found == Config(broker="memory://flag", processes=3, grace_seconds=5.0)


def test_a_flag_that_was_not_given_leaves_what_was_set_before(tmp_path: Path) -> None:
    assert load(tmp_path, {"CONVEYOR_PROCESSES": "3"}, {"processes": None}).processes == 3


def test_settings_may_live_in_pyproject(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n[tool.conveyor]\nhttp = ":9000"\n')
    assert load(tmp_path, {}, {}).http_address == ("0.0.0.0", 9000)


def test_two_files_with_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "conveyor.toml").write_text("processes = 2")
    (tmp_path / "pyproject.toml").write_text("[tool.conveyor]\nprocesses = 3")
    with pytest.raises(ConfigurationError, match="keep one of them"):
        load(tmp_path, {}, {})


def test_an_unknown_setting_is_refused_with_the_nearest_known_name(tmp_path: Path) -> None:
    (tmp_path / "conveyor.toml").write_text("grace-second = 5")
    with pytest.raises(ConfigurationError, match=r"conveyor\.toml.*did you mean 'grace_seconds'"):
        read_file(tmp_path)


def test_an_environment_variable_that_is_nearly_right_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="did you mean CONVEYOR_BROKER"):
        read_environment({"CONVEYOR_BROKRE": "memory://"})


def test_variables_of_others_are_left_alone() -> None:
    assert read_environment({"CONVEYOR_PORT": "tcp://10.0.0.1:80", "CONVEYOR_OWNER": "x", "HOME": "/"}) == {}


def test_an_empty_variable_is_not_set_and_none_is_no_limit() -> None:
    assert read_environment({"CONVEYOR_BROKER": " ", "CONVEYOR_MAX_RSS_MB": "none"}) == {"max_rss_mb": None}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CONVEYOR_PROCESSES", "0", ">= 1"),
        ("CONVEYOR_PROCESSES", "four", "CONVEYOR_PROCESSES: processes cannot be 'four'"),
        ("CONVEYOR_GRACE_SECONDS", "nan", "cannot be 'nan'"),
        ("CONVEYOR_GRACE_SECONDS", "-1", ">= 0"),
        ("CONVEYOR_LOG_LEVEL", "loud", "choose one of debug, info, warning, error"),
        ("CONVEYOR_HTTP", "a:b:1", "host:port"),
        ("CONVEYOR_HANG_LIMIT_SECONDS", "0", "> 0"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_place(variable: str, value: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_environment({variable: value})
    assert said in str(caught.value)


def test_a_value_is_checked_wherever_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--max-rss: max_rss_mb cannot be 0"):
        load(tmp_path, {}, {"max_rss_mb": 0})
    with pytest.raises(ConfigurationError, match=r"Config\(processes"):
        Config(processes=0)
    (tmp_path / "conveyor.toml").write_text('processes = "4"')
    with pytest.raises(ConfigurationError, match=r"conveyor\.toml"):
        load(tmp_path, {}, {})


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "conveyor.toml").write_text("processes = ")
    with pytest.raises(ConfigurationError, match=r"conveyor\.toml is no valid TOML"):
        read_file(tmp_path)


def test_an_address_is_a_port_here_or_everywhere_or_on_one_host() -> None:
    assert address("9000") == ("127.0.0.1", 9000)
    assert address(":9000") == ("0.0.0.0", 9000)
    assert address("[::1]:9000") == ("::1", 9000)
    assert address("example.org:80") == ("example.org", 80)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("amqp://user:p/w@rabbit/v?x=1", "amqp://***@rabbit/v?x=1"),
        ("redis://:secret@host", "redis://***@host"),
        ("sqlite:////home/me@work/a.queue?durability=full", "sqlite:////home/me@work/a.queue?durability=full"),
        ("cannot open redis://h?password=geheim&db=1: no", "cannot open redis://h?password=***&db=1: no"),
        ("postgresql+asyncpg://u:p@h/db?sslpassword=x", "postgresql+asyncpg://***@h/db?sslpassword=***"),
    ],
)
def test_secrets_in_urls_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


@given(st.text("".join(set(string.printable) - set(string.whitespace) - set("'\"&")), min_size=12))
def test_no_password_survives_masking(password: str) -> None:
    text = f"BrokerError: redis://me:{password}@host:6379/0?token={password} is gone"
    assert password not in masked(text)


@given(st.dictionaries(st.text(), st.text()))
def test_no_environment_is_refused_but_in_words(environment: dict[str, str]) -> None:
    with contextlib.suppress(ConfigurationError):
        read_environment({f"CONVEYOR_{name}": value for name, value in environment.items()})


def test_a_place_is_a_whole_path_or_a_url_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place("sqlite:///a%20b.queue?durability=normal") == str(tmp_path / "a b.queue")
    assert place("sqlite+aiosqlite:////var/shop.db") == "/var/shop.db"
    assert place("postgresql+asyncpg://me:geheim@db/shop") == "postgresql+asyncpg://***@db/shop"
    for url in ("sqlite+aiosqlite:///:memory:", "sqlite+aiosqlite:///file:x?uri=true", "memory://x"):
        assert place(url) == url
