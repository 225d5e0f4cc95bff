"""``conveyor journal``: the process that keeps an app's journal."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from pathlib import Path
from typing import Final

from cyclopts import App

from conveyor import config
from conveyor.app import Conveyor
from conveyor.cli import EXIT_CODES
from conveyor.cli.application import load_app
from conveyor.cli.run import GIVEN, Knocking, end_soon, heard_signals
from conveyor.cli.terminal import FAILED, OK, Output
from conveyor.config import LogFormat, LogLevel
from conveyor.errors import ConfigurationError, JournalError
from conveyor.runtime import logs
from conveyor.runtime.channel import Ask, ChildLink
from conveyor.runtime.health import Health
from conveyor.runtime.keeper import Keeper
from conveyor.runtime.metrics import Metrics, Snapshot

log = logging.getLogger("conveyor.journal")

PLAIN = Output()
OBJECTS_BETWEEN_COLLECTIONS: Final = 20_000
"""New objects after which the youngest are looked through; Python has it at 700."""

command = App(
    name="journal",
    help_epilogue=f"""Examples:
  conveyor journal shop:app
  CONVEYOR_JOURNAL=/var/lib/shop/shop.journal conveyor journal shop:app

Where the journal is on (Conveyor(…, journal=True) or CONVEYOR_JOURNAL=1),
conveyor run starts this by itself. Start it by hand where all your runners
have --no-keeper, or run inside programs of your own on several machines. A
path in CONVEYOR_JOURNAL is where it is kept, unless the code names a file
itself.

{EXIT_CODES}""",
)


@command.default
def journal(
    app: str,
    /,
    *,
    broker: str | None = None,
    log_level: LogLevel | None = None,
    log_format: LogFormat | None = None,
    output: Output = PLAIN,
) -> int:
    """Keep an app's journal until SIGTERM or Ctrl-C.

    Parameters:
        app: The app, as module:attribute.
        broker: The broker's URL. Default: the app's, else $CONVEYOR_BROKER, else a SQLite file.
        log_level: The least severe entries that are written. Default: info.
        log_format: human, json, or auto: human on a terminal, else json. Default: auto.
    """
    link = ChildLink.from_environment()
    if link is not None:
        broker, _ = (os.environ.pop(variable, None) for variable in GIVEN.values())
    flags = {"broker": broker, "log_level": log_level, "log_format": "json" if output.json else log_format}
    settings = config.load(Path.cwd(), os.environ, flags)
    as_json = {"auto": None, "human": False, "json": True}[settings.log_format]
    stream = sys.stdout if output.json else sys.stderr
    logs.configure(settings.log_level, as_json, process="journal" if link is None else link.process, stream=stream)
    loaded = load_app(app, broker=broker)
    if link is not None:
        loaded.owner = link.owner
        loaded.metrics = Metrics(link.process)
    return asyncio.run(_keep(loaded, link))


def _collect_seldom() -> None:
    """Have garbage looked for less often: entries come and go by the ten thousand, and none of them is in a cycle."""
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)


async def _keep(app: Conveyor, link: ChildLink | None) -> int:
    """Keep the journal until a signal or the supervisor asks to end; gives the exit code."""
    asked = asyncio.Event()
    knocking = Knocking(asked)
    keeper: Keeper | None = None

    def health() -> Health:
        return knocking.health if keeper is None else keeper.health()

    def snapshot() -> Snapshot:
        return app.metrics.snapshot()

    def end(_: Ask | str) -> None:
        asked.set()

    broker = app.new_broker(app.owner)
    if app.journal_place(broker) is None:
        raise ConfigurationError(
            f"{app.name} keeps no journal; say Conveyor({app.name!r}, journal=True) or set CONVEYOR_JOURNAL=1"
        )
    beats = None if link is None else asyncio.create_task(link.run(health, snapshot, end), name="signs of life")
    try:
        with heard_signals(end):
            await knocking.until_done(broker.open)
            try:
                if not asked.is_set():
                    _collect_seldom()
                    async with app.keeper(broker) as keeper:
                        await asked.wait()
            except JournalError as error:
                if link is None:
                    raise
                log.error("no journal is kept: %s", error)  # among the lines of the supervisor's other processes
                return FAILED
            finally:
                await broker.close()
    finally:
        if beats is not None:
            beats.cancel()
    if link is not None:
        link.goodbye(health(), snapshot())
        end_soon(OK)
    return OK
