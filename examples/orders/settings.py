"""The shop's settings: one frozen value from the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints


class SettingError(ValueError):
    """A setting that makes no sense; says which one and what it may be."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long a simulated piece of work takes: any time between two."""

    least: float
    most: float

    @classmethod
    def parse(cls, text: str) -> Seconds:
        """Read "1-2" or "0.5"."""
        least, _, most = text.partition("-")
        try:
            span = cls(float(least), float(most or least))
        except ValueError:
            raise ValueError("it is a number of seconds such as 0.5, or two such as 1-2") from None
        if not 0 <= span.least <= span.most <= 3600:
            raise ValueError("the first number is not above the second one, and neither above 3600")
        return span

    def __str__(self) -> str:
        return f"{self.least:g}" if self.least == self.most else f"{self.least:g}-{self.most:g}"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known about one setting: its environment variables (the first that is set counts) and its meaning."""

    what: str
    variables: tuple[str, ...]
    read: Callable[[str], Any] = str


def _port(text: str) -> int:
    if not 0 <= int(text) < 65_536:
        raise ValueError("a port is at most 65535")
    return int(text)


def _count(text: str) -> int:
    if not 0 <= int(text) <= 64:
        raise ValueError("between 0 and 64 processes are sensible")
    return int(text)


def _lease(text: str) -> float:
    if not 0.5 <= float(text) <= 3600:
        raise ValueError("between 0.5 and 3600 seconds are sensible")
    return float(text)


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError("a share is between 0 and 1")
    return float(text)


def _flag(text: str) -> bool:
    if text.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("say 1 or 0")
    return text.lower() in ("1", "true", "yes", "on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the shop is set up; ``python -m examples.orders --help`` shows it."""

    data: Annotated[Path, Setting("folder of shop.queue and shop.db", ("SHOP_DATA",), Path)] = Path()
    broker: Annotated[str, Setting("broker URL; left out: sqlite:///DATA/shop.queue", ("CONVEYOR_BROKER",))] = ""
    database: Annotated[
        str, Setting("database URL; left out: sqlite+aiosqlite:///DATA/shop.db", ("CONVEYOR_DATABASE",))
    ] = ""
    host: Annotated[str, Setting("address to serve on", ("SHOP_HOST",))] = "127.0.0.1"
    port: Annotated[int, Setting("port to serve on; 0 takes a free one", ("SHOP_PORT", "PORT"), _port)] = 8000
    processes: Annotated[
        int, Setting("worker processes; 0 runs the workers in the web process", ("SHOP_PROCESSES",), _count)
    ] = 0
    web_only: Annotated[bool, Setting("run no workers here: others do", ("SHOP_WEB_ONLY",), _flag)] = False
    validation: Annotated[
        Seconds, Setting("seconds that validation takes", ("SHOP_VALIDATION_SECONDS",), Seconds.parse)
    ] = Seconds(1, 2)
    payment: Annotated[Seconds, Setting("seconds that payment takes", ("SHOP_PAYMENT_SECONDS",), Seconds.parse)] = (
        Seconds(2, 3)
    )
    inventory: Annotated[
        Seconds, Setting("seconds that the inventory check takes", ("SHOP_INVENTORY_SECONDS",), Seconds.parse)
    ] = Seconds(1, 2)
    shipping: Annotated[Seconds, Setting("seconds that shipping takes", ("SHOP_SHIPPING_SECONDS",), Seconds.parse)] = (
        Seconds(1, 2)
    )
    lease: Annotated[
        float,
        Setting("seconds after which the work of a silent process goes to others", ("SHOP_LEASE_SECONDS",), _lease),
    ] = 30.0
    decline_rate: Annotated[float, Setting("share of payments that are declined", ("SHOP_DECLINE_RATE",), _share)] = 0.1

    def __post_init__(self) -> None:
        folder = self.data.absolute()
        object.__setattr__(self, "broker", self.broker or f"sqlite:///{folder / 'shop.queue'}")
        object.__setattr__(self, "database", self.database or f"sqlite+aiosqlite:///{folder / 'shop.db'}")

    @property
    def runs_workers(self) -> bool:
        """Whether the web process runs the workers too."""
        return not self.web_only and self.processes == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """The settings in environment variables; an empty one is not set.

        Raises:
            SettingError: a value makes no sense.
        """
        values = {}
        for name, setting in SETTINGS.items():
            for variable in reversed(setting.variables):
                if text := environment.get(variable, "").strip():
                    values[name] = read(variable, setting, text)
        return cls(**values)


def read(said: str, setting: Setting, text: str) -> Any:
    """The value that a text means; said names where it was found."""
    try:
        return setting.read(text)
    except ValueError as error:
        raise SettingError(f"{said} cannot be {text!r}: {error}") from error


def shown(url: str) -> str:
    """A URL for people, without what may be secret: user, password and options."""
    scheme, _, rest = url.partition("?")[0].partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


_HINTS: Final = get_type_hints(Settings, include_extras=True)
SETTINGS: Final[Mapping[str, Setting]] = {f.name: _HINTS[f.name].__metadata__[0] for f in fields(Settings)}
