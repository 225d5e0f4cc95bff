"""``conveyor migrate``: Conveyor's tables in an app's database."""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path

from cyclopts import App

from conveyor import config
from conveyor.cli import EXIT_CODES
from conveyor.cli.terminal import OK, Output
from conveyor.config import masked
from conveyor.core.words import counted
from conveyor.errors import ConfigurationError

PLAIN = Output()

command = App(
    name="migrate",
    help_epilogue=f"""Examples:
  conveyor migrate shop:app
  conveyor migrate --database postgresql+asyncpg://shop@db/shop
  conveyor migrate --database sqlite+aiosqlite:///shop.db --json

Any number of times, from any number of places at once: what is up to date is
left alone. Run it before the new version of an app starts.

{EXIT_CODES}""",
)


@command.default
def migrate(app: str | None = None, /, *, database: str | None = None, output: Output = PLAIN) -> int:
    """Create or update Conveyor's tables.

    Parameters:
        app: The app whose database is meant, as module:attribute.
        database: The SQLAlchemy URL. Default: the app's, else $CONVEYOR_DATABASE, else conveyor.toml's.
    """
    url = _url(app, database)
    done = asyncio.run(_migrate(url))
    if output.json:
        output.document({"database": masked(url), "statements": done})
    elif done:
        output.say(f"{masked(url)} is up to date now; {counted(len(done), 'statement')}:")
        for statement in done:
            output.say("  " + " ".join(statement.split()), "dim")
    else:
        output.say(f"{masked(url)} was up to date already")
    return OK


def _url(path: str | None, flag: str | None) -> str:
    if path is not None:
        from conveyor.cli.application import load_app  # only where an app is named

        app = load_app(path, database=flag)
        found, who = config.database_url(app.database_url), f"neither {app.name} nor a setting"
    else:
        found, who = config.load(Path.cwd(), os.environ, {"database": flag}).database, "nothing"
    if not found:
        raise ConfigurationError(
            f"{who} says which database; give --database URL (sqlite+aiosqlite:///shop.db, or "
            "postgresql+asyncpg://host/name), or set CONVEYOR_DATABASE"
        )
    return found


async def _migrate(url: str) -> list[str]:
    from conveyor.runtime.ledger import Ledger  # needs the extra `ledger`

    ledger = Ledger(url, app="", owner=uuid.uuid4().hex)
    try:
        return await ledger.migrate()
    finally:
        await ledger.close()
