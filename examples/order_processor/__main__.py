"""Runs the service: ``python -m examples.order_processor``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from examples.order_processor.settings import Settings
from examples.settings import SettingError, from_flags, parser

APP: Final = "examples.order_processor.app:app"
FLAGS: Final = parser(
    Settings,
    "python -m examples.order_processor",
    "Fulfils the orders that a payment service puts on RabbitMQ.",
    f"""examples:
  RABBITMQ_HOST=rabbit.example RABBITMQ_USER=orders RABBITMQ_PASS=… python -m examples.order_processor
  python -m examples.order_processor --processes 4 --prefetch 20 --http :9000
  python -m examples.order_processor.payments 3            sends three orders, as the payment service does
  python -m examples.order_processor.unclear               what may have been sent or not, because something died
  conveyor dead list --app {APP}
""",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Become ``conveyor run`` with these settings."""
    try:
        settings = from_flags(Settings, FLAGS, arguments)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    Path(settings.data).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "conveyor", "run", APP, "--processes", str(settings.processes)]
    # The service takes this process' place: whoever supervises it meets it, and nobody in between.
    os.execv(sys.executable, command)  # noqa: S606 - our own program


if __name__ == "__main__":
    main()
