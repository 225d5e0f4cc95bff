"""What the server's settings and state mean for messages, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from conveyor.brokers.redis.link import Link, Refused, text
from conveyor.errors import BrokerError

OLDEST_VERSION: Final = (6, 2)
FULL: Final = 0.9
"""Of maxmemory."""
LAG_SECONDS: Final = 10
"""A replica that has not been heard for so long would lack that much."""

CLOCKS_DIFFER_SECONDS: Final = 5


async def said_by(link: Link) -> dict[str, str]:
    """What the server tells of itself: INFO, and of CONFIG what matters; less where it is forbidden."""
    told: dict[str, str] = {}
    try:
        for line in text(await link.send("INFO")).splitlines():
            name, _, value = line.partition(":")
            told[name] = value
    except Refused:
        pass
    for name in ("appendfsync", "min-replicas-to-write"):
        try:
            pair = await link.send("CONFIG", "GET", name)
            told[name] = text(pair[1]) if pair else ""
        except Refused:
            pass
    return told


def refuse_danger(told: Mapping[str, str]) -> None:
    """Stop where messages would be lost in ordinary use.

    Raises:
        BrokerError: the server evicts, or is too old.
    """
    version = told.get("redis_version", "")
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if parts and parts < OLDEST_VERSION:
        raise BrokerError(f"this is Redis {version}, and Conveyor needs 6.2 or later; upgrade the server")
    policy = told.get("maxmemory_policy", "noeviction")
    if _number(told, "maxmemory") and policy != "noeviction":
        raise BrokerError(
            f"Redis deletes messages when its memory is full (maxmemory-policy {policy}): set it to noeviction, or use another server"
        )


def risks_of(told: Mapping[str, str], now: float) -> list[str]:
    """What endangers messages or work: sentences that say what to do."""
    if not told:
        return [
            "Redis does not let us see its settings (INFO is forbidden): make sure of appendonly yes and maxmemory-policy noeviction."
        ]
    found: list[str] = []
    if told.get("aof_enabled") == "0":
        found.append(
            "Redis keeps no append-only file: what was accepted since its last snapshot is lost when it stops. Set appendonly yes."
        )
        if told.get("rdb_last_bgsave_status", "ok") != "ok":
            found.append("The last snapshot of Redis failed: look into the server's log.")
    else:
        fsync = told.get("appendfsync")
        if fsync == "no":
            found.append(
                "Redis leaves it to the system when messages reach the disk (appendfsync no): a power cut may lose half a minute. "
                "Set appendfsync always, or everysec."
            )
        elif fsync == "everysec":
            found.append(
                "Redis writes to the disk once a second (appendfsync everysec): its own crash loses nothing, a power cut up to two "
                "seconds of what was accepted. Set appendfsync always where that is too much."
            )
        if told.get("aof_last_write_status", "ok") != "ok":
            found.append("Redis cannot write its append-only file: look for a full disk.")
    limit, used = _number(told, "maxmemory"), _number(told, "used_memory")
    policy = told.get("maxmemory_policy", "noeviction")
    if limit and policy != "noeviction":
        found.append(
            f"Redis deletes messages when its memory is full (maxmemory-policy {policy}): set it to noeviction."
        )
    if limit and used >= FULL * limit:
        found.append(
            f"Redis has used {used / limit:.0%} of its maxmemory; when it is full it refuses messages. Give it more, or find out "
            "which queue grows."
        )
    if told.get("role", "master") != "master":
        found.append("This server is a replica, and refuses to be written to: name the master in the URL.")
    found += _replicas(told)
    if told.get("loading") == "1":
        found.append("Redis still loads its file.")
    if "server_time_usec" in told and abs(now - _number(told, "server_time_usec") / 1e6) > CLOCKS_DIFFER_SECONDS:
        found.append(
            f"The clocks of Redis and of this machine differ by more than {CLOCKS_DIFFER_SECONDS} seconds: due times are the server's."
        )
    return found


def _replicas(told: Mapping[str, str]) -> list[str]:
    found: list[str] = []
    wanted, there = _number(told, "min-replicas-to-write"), _number(told, "connected_slaves")
    if wanted and there < wanted:
        found.append(
            f"Redis wants {wanted:.0f} replica(s) before it accepts a message (min-replicas-to-write), and {there:.0f} are connected."
        )
    elif there and not wanted:
        found.append(
            "Redis does not wait for its replicas: a fail-over loses what they do not have yet. Set min-replicas-to-write 1."
        )
    for name, value in told.items():
        if name.startswith("slave") and name[5:].isdecimal():
            state = dict(part.partition("=")[::2] for part in value.split(","))
            lag = state.get("lag", "0")
            if state.get("state", "online") != "online" or (lag.isdecimal() and int(lag) > LAG_SECONDS):
                found.append(
                    f"The replica {state.get('ip')}:{state.get('port')} is {lag} s behind ({state.get('state')}): "
                    "a fail-over to it would lose that."
                )
    return found


def _number(told: Mapping[str, str], name: str) -> float:
    try:
        return float(told.get(name, "0") or 0)
    except ValueError:
        return 0.0
