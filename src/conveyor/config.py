"""The settings of a process as one frozen value: file ← environment ← flags."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_type_hints
from urllib.parse import unquote, urlsplit

import msgspec

from conveyor.errors import ConfigurationError

PREFIX: Final = "CONVEYOR_"
"""Environment variables are named like the settings: CONVEYOR_BROKER, CONVEYOR_GRACE_SECONDS, …"""
FILE: Final = "conveyor.toml"
LONGEST_SECONDS: Final = 1e9
"""About thirty years; keeps infinity and typing errors out of timers."""

Count = Annotated[int, msgspec.Meta(ge=1, le=10**12)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_SECONDS)]
Days = Annotated[float, msgspec.Meta(gt=0, le=100_000)]
Limit = Annotated[float, msgspec.Meta(gt=0, le=LONGEST_SECONDS)]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "human", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How a process of an app is set up; whatever is left out keeps its default.

    Parameters:
        broker: the broker's URL; None leaves it to the app.
        database: the ledger's SQLAlchemy URL; None leaves it to the app.
        processes: runner processes that the supervisor keeps alive.
        grace_seconds: how long running handlers may take to finish after SIGTERM.
        http: host:port (or :port) of health and metrics; None serves none.
        log_level: the least severe entries that are written.
        log_format: human, json, or auto: human on a terminal and JSON lines elsewhere.
        max_rss_mb: a runner process above so many megabytes is replaced; None is no limit.
        max_messages: a runner process that handled so many is replaced; None is no limit.
        hang_limit_seconds: a runner process that stood still for so long is killed; None leaves it to the supervisor.
        journal: whether what happens to messages is kept, for `conveyor trace`, `conveyor jobs` and tickets; or the file where, such
            as ./shop.journal (a name with a dot or a slash in it). None leaves it to the app.
        journal_days: for how long.
        journal_max_mb: how large the file may become; then the oldest goes.

    Raises:
        ConfigurationError: a value makes no sense.
    """

    broker: str | None = None
    database: str | None = None
    processes: Count = 1
    grace_seconds: Seconds | None = None
    http: str | None = None
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    max_rss_mb: Count | None = None
    max_messages: Count | None = None
    hang_limit_seconds: Limit | None = None
    journal: str | bool | None = None
    journal_days: Days = 7.0
    journal_max_mb: Count = 1024

    def __post_init__(self) -> None:
        for name in SETTINGS:
            _checked(name, getattr(self, name), f"Config({name}=…)", strict=True)

    @property
    def http_address(self) -> tuple[str, int] | None:
        """Where health and metrics are served: host and port; None is nowhere."""
        return None if self.http is None else address(self.http)


SETTINGS: Final = tuple(field.name for field in fields(Config))
_TYPES: Final = get_type_hints(Config, include_extras=True)


def load(directory: Path, environment: Mapping[str, str], flags: Mapping[str, object]) -> Config:
    """The settings of this process: the file in a directory, overruled by the environment, overruled by flags.

    Parameters:
        directory: where conveyor.toml, or pyproject.toml with a table [tool.conveyor], may lie.
        flags: only those that were given; what is missing or None is not set.

    Raises:
        ConfigurationError: names the place, the setting and what it may be.
    """
    values = read_file(directory) | read_environment(environment)
    for name, value in flags.items():
        if value is not None:
            flag = "--" + name.removesuffix("_seconds").removesuffix("_mb").replace("_", "-")
            values[name] = _checked(name, value, flag, strict=True)
    return Config(**values)


def broker_url(app: str, said: str | None) -> str:
    """Where the messages of an app are.

    Parameters:
        app: its name; without a setting, its messages are in a SQLite file of this name in the current directory.
        said: what its code or a flag says, which overrules the settings of this process.

    Raises:
        ConfigurationError: the settings make no sense.
    """
    return said or _settings().broker or f"sqlite:///{app}.queue"


def database_url(said: str | None) -> str | None:
    """Where an app's ledger is: what its code or a flag says, else the settings of this process; None is nowhere.

    Raises:
        ConfigurationError: the settings make no sense.
    """
    return said or _settings().database


def journal(said: str | Path | bool | None) -> str | Path | bool:
    """Whether an app's journal is kept, or the file where.

    What its code says overrules the settings of this process; but where that is only yes, a setting may name the file.

    Raises:
        ConfigurationError: the settings make no sense, or what the code says names no file.
    """
    if isinstance(said, Path):
        return said
    if isinstance(said, str):
        _check_journal(said, "Conveyor(journal=…)")
    if said is not None and (meant := _meaning(said)) is not True:
        return meant
    setting = _meaning(_settings().journal)
    return setting if said is None or isinstance(setting, str) else True


def _meaning(said: str | bool | None) -> str | bool:
    """A word for yes or no as what it means, anything else as it is."""
    if not isinstance(said, str):
        return bool(said)
    word = said.strip().lower()
    return word in _YES if word in _YES | _NO else said


def _check_journal(said: str, where: str) -> None:
    """Refuse what is neither yes nor no and looks like no file: it may be a yes that was mistyped."""
    if isinstance(_meaning(said), str) and not any(part in said for part in _OF_FILES):
        raise ConfigurationError(
            f"{where}: journal cannot be {said!r}: say yes or no (1, true, yes, on; 0, false, no, off), or name a file,"
            " such as ./shop.journal"
        )


def journal_limits() -> tuple[float, int]:
    """For how many seconds a journal is kept, and how many bytes of it at most.

    Raises:
        ConfigurationError: the settings make no sense.
    """
    settings = _settings()
    return settings.journal_days * 86_400, settings.journal_max_mb * 1_000_000


_YES: Final = frozenset({"1", "true", "yes", "on"})
_NO: Final = frozenset({"0", "false", "no", "off", ""})
_OF_FILES: Final = (".", "/", os.sep, ":memory:")
"""One of these is in what names a journal's file, or none, which goes with its process."""


def _settings() -> Config:
    return load(Path.cwd(), os.environ, {})


def read_file(directory: Path) -> dict[str, Any]:
    """The settings in a directory's conveyor.toml, or in pyproject.toml under [tool.conveyor]; empty without either."""
    own = _toml(directory / FILE)
    shared = (_toml(directory / "pyproject.toml") or {}).get("tool", {}).get("conveyor")
    if own is not None and shared is not None:
        raise ConfigurationError(
            f"{directory} has settings in {FILE} and in pyproject.toml ([tool.conveyor]); keep one of them"
        )
    where, found = (FILE, own) if own is not None else ("[tool.conveyor] in pyproject.toml", shared or {})
    if not isinstance(found, dict):
        raise ConfigurationError(f"{where} is no table of settings")
    unknown = [name for name in found if name not in SETTINGS]
    if unknown:
        raise ConfigurationError(
            f"{where}: unknown setting {unknown[0]!r}{_meant(unknown[0])}; there are {', '.join(SETTINGS)}"
        )
    return {name: _checked(name, value, where, strict=True) for name, value in found.items()}


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings in CONVEYOR_… variables; an empty one is not set, "none" is no limit.

    A variable that is nearly one of ours is a typing error and refused; others with our prefix belong to somebody else
    (Kubernetes makes CONVEYOR_PORT for a service of that name).
    """
    values = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or not text.strip():
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name in SETTINGS:
            value = None if text.strip().lower() == "none" else text.strip()
            values[name] = _checked(name, value, variable, strict=False)
        elif near := difflib.get_close_matches(name, SETTINGS, 1, 0.75):
            raise ConfigurationError(
                f"the environment has {variable}, which means nothing; did you mean {PREFIX}{near[0].upper()}?"
            )
    return values


def address(text: str) -> tuple[str, int]:
    """Host and port from "host:port", "[::1]:port", ":port" (all IPv4 addresses) or "port" (this machine only).

    Raises:
        ConfigurationError: it is none of these.
    """
    host, colon, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 65_536) or (
        ":" in host and not re.fullmatch(r"\[[0-9a-fA-F:.]+\]", host)
    ):
        raise ConfigurationError(
            f"{text!r} is no address to serve on; write host:port or :port, for example 127.0.0.1:9000"
        )
    return (host.strip("[]") or ("0.0.0.0" if colon else "127.0.0.1")), int(port)  # noqa: S104 - asked for by ":port"


_USERINFO: Final = re.compile(r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?!/)[^\s'"]*@""")
_SECRET: Final = re.compile(
    r"""(?P<name>[?&][^=&\s'"]*(?:pass|pwd|secret|token|key|auth|cred|sig)[^=&\s'"]*=)[^&\s'"]+""", re.IGNORECASE
)


def masked(text: str) -> str:
    """A text in which the secrets of URLs (user and password, and query parameters named like secrets) are stars."""
    return _USERINFO.sub(r"\g<scheme>***@", _SECRET.sub(r"\g<name>***", text))


def place(url: str) -> str:
    """A URL for people: without its secrets, and a SQLite file by its whole path."""
    parts = urlsplit(url)
    file = unquote(parts.path.removeprefix("/"))
    if parts.scheme.partition("+")[0] != "sqlite" or parts.netloc or file.startswith((":", "file:")) or not file:
        return masked(url)
    return str(Path(file).absolute())


def _toml(path: Path) -> dict[str, Any] | None:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is no valid TOML: {error}") from error


def _checked(name: str, value: object, where: str, *, strict: bool) -> object:
    try:
        found = msgspec.convert(value, _TYPES[name], strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigurationError(
            f"{where}: {name} cannot be {masked(repr(value))}: {_expected(name, str(error))}"
        ) from error
    if name == "http" and isinstance(found, str):
        address(found)
    if name == "journal" and isinstance(found, str):
        _check_journal(found, where)
    return found


def _expected(name: str, said: str) -> str:
    if name in ("log_level", "log_format"):
        choices = _TYPES[name].__args__
        return "choose one of " + ", ".join(choices)
    return said[:1].lower() + said[1:].replace("`", "")


def _meant(name: str) -> str:
    near = difflib.get_close_matches(name.lower().replace("-", "_"), SETTINGS, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
