"""Runs the service: ``python -m examples.order_processor``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Final

from examples.order_processor.settings import SETTINGS, SettingError, Settings, read

APP: Final = "examples.order_processor.app:app"


def parser() -> argparse.ArgumentParser:
    """A flag for every setting that everybody may see in a command line, and the environment variable of each."""
    found = argparse.ArgumentParser(
        prog="python -m examples.order_processor",
        description="Fulfils the orders that a payment service puts on RabbitMQ.",
        epilog=f"""only in the environment, as they may hold passwords:
{chr(10).join(f"  ${s.variable:<20} {s.what}" for s in SETTINGS.values() if s.secret)}

examples:
  RABBITMQ_HOST=rabbit.example RABBITMQ_USER=orders RABBITMQ_PASS=… python -m examples.order_processor
  python -m examples.order_processor --processes 4 --prefetch 20 --http :9000
  python -m examples.order_processor.payments 3                      sends three orders
  conveyor dead list --app {APP}     what was given up
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = {field.name: field.default for field in fields(Settings)}
    for name, setting in SETTINGS.items():
        if setting.secret:
            continue
        default = defaults[name]
        shown = int(default) if isinstance(default, bool) else default
        what = f"{setting.what} (${setting.variable}" + (f"; default {shown})" if str(shown) not in ("", ".") else ")")
        found.add_argument(f"--{name.replace('_', '-')}", metavar=name.split("_")[-1].upper(), help=what)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Become ``conveyor run`` with these settings."""
    flags = {name: value for name, value in vars(parser().parse_args(arguments)).items() if value is not None}
    try:
        for name, value in flags.items():
            read("--" + name.replace("_", "-"), SETTINGS[name], value)
            os.environ[SETTINGS[name].variable] = value  # where every process of the service looks
        settings = Settings.from_environment()
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    settings.data.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CONVEYOR_LOG_FORMAT", "human")  # with ₹ as ₹, also in a journal
    command = [sys.executable, "-m", "conveyor", "run", APP, "--processes", str(settings.processes)]
    # The service takes this process' place: whoever supervises it meets it, and nobody in between.
    os.execv(sys.executable, command)  # noqa: S606 - our own program


if __name__ == "__main__":
    main()
