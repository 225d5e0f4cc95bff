"""The tables of the archive, and the statements that write and find what is in them."""

# ruff: noqa: S608 - what is put into the statements are the names of columns, and conditions with parameters
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from conveyor.core.jobs import JobFilter, Status
from conveyor.core.journal import OWN, Entry, Kind

APPLICATION_ID: Final = 0x436E764A
"""'CnvJ' in the file's header: it is a journal."""
SCHEMA_VERSION: Final = 2
"""Version 1 kept all entries at length, in one table."""
FIELDS: Final = Entry.__struct_fields__
COLUMNS: Final = ", ".join(FIELDS)
BRIEF: Final = COLUMNS.replace("traceback", "'' AS traceback").replace("result", "NULL AS result")
"""All columns, without what may be long."""


def _literal(value: str | float | None) -> str:
    return "NULL" if value is None else f"'{value}'" if isinstance(value, str) else repr(value)


AT_LENGTH: Final = "entries_at_length"
SUCCEEDED: Final = "succeeded"
"""A table and a view: every entry is in one of them, and both look alike."""
SHARED: Final = ("topic", "worker", "process", "queue")
"""The fields that successes of one origin have in common."""
COUNTS: Final = ("attempt", "crashes")
"""Those that successes which came together have in common, besides."""
_REST: Final = dict(zip(FIELDS[::-1], map(_literal, Entry.__struct_defaults__[::-1]), strict=False))
"""What all the others are in a success, as SQL."""
_SUCCESS: Final = {**_REST, "kind": _literal(Kind.SUCCEEDED.value), **{name: name for name in SHARED + COUNTS + OWN}}
SCHEMA: Final = f"""
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,    -- of the message that brought it: a repeat changes nothing
    arrived REAL NOT NULL,      -- Unix seconds
    last_entry INTEGER NOT NULL -- the seq of its last one: whole batches are pruned
);
-- What is rarer than a success, or has more to say. A seq is given once, to an entry here or to a success.
CREATE TABLE IF NOT EXISTS {AT_LENGTH} (seq INTEGER PRIMARY KEY, {COLUMNS});
CREATE INDEX IF NOT EXISTS entries_by_message ON {AT_LENGTH} (message_id);
CREATE INDEX IF NOT EXISTS entries_by_journey ON {AT_LENGTH} (correlation_id) WHERE correlation_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS entries_by_rare_kind ON {AT_LENGTH} (kind) WHERE kind NOT IN ('published', 'succeeded');
-- Successes are nearly all that there is: without what they share they take less time and less room.
CREATE TABLE IF NOT EXISTS origins (
    id INTEGER PRIMARY KEY, {", ".join(SHARED)},
    last_entry INTEGER NOT NULL, -- the seq of the last success that came from there
    UNIQUE ({", ".join(SHARED)})
);
CREATE TABLE IF NOT EXISTS successes (seq INTEGER PRIMARY KEY, origin INTEGER NOT NULL, {", ".join(COUNTS + OWN)});
CREATE INDEX IF NOT EXISTS successes_by_message ON successes (message_id);
CREATE INDEX IF NOT EXISTS successes_by_journey ON successes (correlation_id) WHERE correlation_id IS NOT NULL;
CREATE VIEW {SUCCEEDED} AS SELECT seq, {", ".join(f"{_SUCCESS[name]} AS {name}" for name in FIELDS)}
    FROM successes JOIN origins ON origins.id = successes.origin;
CREATE VIEW entries AS SELECT seq, {COLUMNS} FROM {AT_LENGTH} UNION ALL SELECT seq, {COLUMNS} FROM {SUCCEEDED};
"""


@functools.cache
def insert_entries(rows: int) -> str:
    """The statement that writes so many entries; its first value is the seq of the first one."""
    return _insert_into(AT_LENGTH, FIELDS, ", ?" * len(FIELDS), rows)


@functools.cache
def insert_successes(rows: int) -> str:
    """The statement that writes so many successes; its first values are the seq of the first one, and the origin and COUNTS of all."""
    return _insert_into("successes", ("origin", *COUNTS, *OWN), ", ?2, ?3, ?4" + ", ?" * len(OWN), rows)


def _insert_into(table: str, columns: Sequence[str], row: str, rows: int) -> str:
    # Without a seq SQLite gives the next one, and appends without a search.
    values = ", ".join([f"(?1{row})", *[f"(NULL{row})"] * (rows - 1)])
    return f"INSERT INTO {table} (seq, {', '.join(columns)}) VALUES {values}"


def in_order(columns: str, condition: str, order: str) -> str:
    """The selection of some entries in an order; its values are given twice, or have numbers.

    Each place is asked by itself, in the order in which it is stored: of the view SQLite would sort all that there is.

    Parameters:
        order: which, and how many.
    """
    each = (
        f"SELECT * FROM (SELECT {columns} FROM {table} AS entry WHERE {condition} ORDER BY {order})"
        for table in (AT_LENGTH, SUCCEEDED)
    )
    return f"SELECT * FROM ({' UNION ALL '.join(each)}) ORDER BY {order}"


JOURNEYS_FROM: Final = (
    " UNION ".join(
        f"SELECT coalesce(correlation_id, message_id) FROM {table} WHERE message_id >= ?1 AND message_id < ?2"
        f" UNION SELECT correlation_id FROM {table} WHERE correlation_id >= ?1 AND correlation_id < ?2"
        for table in (AT_LENGTH, "successes")
    )
    + " LIMIT 11"
)
"""The journeys that an id with this beginning may mean."""
MESSAGES_FROM: Final = " UNION ".join(
    f"SELECT * FROM (SELECT DISTINCT message_id AS id FROM {table} WHERE message_id >= ?1 AND message_id < ?2 LIMIT 10)"
    for table in (AT_LENGTH, "successes")
)
"""The messages whose ids begin so; of many, some."""
_CAUSE: Final = ", ".join(
    f"(SELECT causation_id FROM {table} WHERE message_id = cause.id AND causation_id IS NOT NULL LIMIT 1)"
    for table in (AT_LENGTH, "successes")
)
CAUSES: Final = f"""
WITH RECURSIVE cause (id, hops) AS (
    SELECT value, 0 FROM json_each(?1)
    UNION ALL SELECT coalesce({_CAUSE}), hops + 1 FROM cause WHERE cause.id IS NOT NULL AND hops < ?2)
SELECT id FROM cause WHERE id IS NOT NULL GROUP BY id ORDER BY min(hops)
"""
"""These messages and their causes, the nearest first, as far back as so many hops."""
_NEAR: Final = " UNION ALL ".join(
    f"SELECT * FROM ({in_order('message_id, causation_id, seq', f'correlation_id = ?2 AND {side}', f'{order} LIMIT ?3')})"
    for side, order in (("seq < (SELECT seq FROM told)", "seq DESC"), ("seq >= (SELECT seq FROM told)", "seq"))
)
CAUSED: Final = f"""
WITH RECURSIVE told (seq) AS MATERIALIZED (
    SELECT coalesce(min(seq) FILTER (WHERE kind = 'succeeded'), max(seq), 0)
    FROM entries WHERE message_id IN (SELECT value FROM json_each(?1))),
near AS MATERIALIZED ({_NEAR}),
caused (id) AS (
    SELECT value FROM json_each(?1)
    UNION SELECT near.message_id FROM caused JOIN near ON near.causation_id = caused.id)
SELECT message_id AS id FROM near WHERE message_id IN (SELECT id FROM caused)
GROUP BY message_id ORDER BY min(seq) LIMIT ?4
"""
"""What these messages led to, directly or not (and they themselves), in the order in which it was told, so many (?4) at
most. It is looked for among so many (?3) entries of their journey (?2) before their first success, and so many from it
on; where none succeeded, around the last that is told of them."""
ENTRIES_OF: Final = (
    " UNION ALL ".join(
        f"SELECT key, seq, {COLUMNS} FROM json_each(?1) CROSS JOIN {table} ON message_id = value"
        " WHERE ?2 IN (correlation_id, message_id)"
        for table in (AT_LENGTH, SUCCEEDED)
    )
    + " ORDER BY key, seq LIMIT ?3"
)
"""The entries of these messages on a journey, one message after the other. (A CROSS JOIN: no table is read whole.)"""
ORIGIN: Final = (
    f"INSERT INTO origins ({', '.join(SHARED)}, last_entry) VALUES (?, ?, ?, ?, ?)"
    " ON CONFLICT DO UPDATE SET last_entry = excluded.last_entry RETURNING id"
)
"""Gives the id of an origin, which is made where it is new."""
OLD: Final = (
    "SELECT coalesce((SELECT last_entry FROM batches WHERE seq < coalesce("
    "(SELECT seq FROM batches WHERE arrived >= ? ORDER BY seq LIMIT 1), 1 << 62) ORDER BY seq DESC LIMIT 1), 0)"
)
"""The last entry of the batches that arrived before a time; where a clock was turned, of those before the first that did not."""
LAST_ENTRY_FROM: Final = "SELECT (SELECT last_entry FROM batches WHERE last_entry >= ? ORDER BY seq LIMIT 1)"
"""The last entry of the batch in which this one is."""
FORGET_BATCHES: Final = (
    "DELETE FROM batches WHERE seq < (SELECT seq FROM batches WHERE last_entry > ? ORDER BY seq LIMIT 1)"
)
"""Ends the batches whose last entry is this one, or an earlier one; the last batch of all stays."""
FIRST_SEQ: Final = f"SELECT min(seq) FROM {AT_LENGTH} UNION ALL SELECT min(seq) FROM successes"

_KINDS: Final = {
    Status.DONE: (Kind.SUCCEEDED, Kind.DUPLICATE),
    Status.FAILED: (Kind.DEAD,),
    Status.DEAD: (Kind.DEAD,),
    Status.CANCELLED: (Kind.CANCELLED, Kind.CANCELLING),
    Status.RETRYING: (Kind.RETRIED,),
    Status.RUNNING: (Kind.STARTED, Kind.PROGRESSED),
    Status.WAITING: (Kind.PUBLISHED, Kind.RELEASED, Kind.REDRIVEN),
}
"""The kinds of the entries that make a job what it is."""


def conditions_of(which: JobFilter) -> tuple[list[str], list[object]]:
    """What an entry (in_order() calls it so) has to be for its job to be one that is meant, and the values in that."""
    conditions: list[str] = []
    values: list[object] = []
    if which.status is not None:
        kinds = _KINDS[which.status]
        if not {Kind.PUBLISHED, Kind.SUCCEEDED} & set(kinds):
            conditions.append("kind NOT IN ('published', 'succeeded')")  # so that its index is used
        conditions.append(f"kind IN ({', '.join('?' * len(kinds))})")
        values += kinds
    if which.status is Status.WAITING:
        conditions.append(
            "(kind <> 'published' OR NOT EXISTS (SELECT 1 FROM successes AS later WHERE later.message_id = entry.message_id)"
            f" AND NOT EXISTS (SELECT 1 FROM {AT_LENGTH} AS later WHERE later.message_id = entry.message_id"
            " AND later.kind NOT IN ('published', 'released')))"
        )
    if which.worker is not None:
        # A task's topic is its worker's identity.
        who = "CASE kind WHEN 'published' THEN topic WHEN 'cancelling' THEN topic ELSE worker END"
        # Whose dead letter it was that was put back, its job tells.
        conditions.append(f"(kind = 'redriven' OR substr('.' || {who}, -length(?)) = ?)")
        values += [f".{which.worker}"] * 2
    if which.topic is not None:
        conditions.append("topic = ?")
        values.append(which.topic)
    if which.since is not None:
        conditions.append("at >= ?")
        values.append(which.since)
    return conditions, values
