"""A child for the tests of the supervisor: it holds no messages, and misbehaves as its arguments say.

    python standin.py FOLDER [MANNER …]

It writes "up PID OWNER" to FOLDER/log when it is ready, and "drain WHY" when it is asked to end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conveyor.runtime.channel import Ask, ChildLink
from conveyor.runtime.health import STARTING, Health
from conveyor.runtime.metrics import Metrics

FOLDER = Path(sys.argv[1])
MANNERS = sys.argv[2:]
DRAINING = Health(unready=("draining",))


def note(text: str) -> None:
    with (FOLDER / "log").open("a") as log:
        log.write(text + "\n")


def forever(folder: str) -> None:
    with (Path(folder) / "log").open("a") as log:
        log.write(f"pool {os.getpid()}\n")
    while True:
        time.sleep(60)


async def main(link: ChildLink) -> int:
    metrics = Metrics(link.process)
    drained = asyncio.Event()
    health = STARTING

    def drain(why: str) -> None:
        note(f"drain {why}")
        drained.set()

    def asked(ask: Ask) -> None:
        drain(f"{ask.why} grace={ask.grace_seconds}")

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, drain, "SIGTERM")
    beats = asyncio.create_task(link.run(lambda: health, metrics.snapshot, asked))
    extra = None
    if "pool" in MANNERS:
        from conveyor.runtime.attempt import Attempt
        from conveyor.runtime.pool import CpuPool

        pool = CpuPool(2)
        extra = [
            asyncio.create_task(pool.call("__main__:forever", Attempt(None, args=(str(FOLDER),)))) for _ in range(2)
        ]
    if "spawns" in MANNERS:
        helper = subprocess.Popen(["sleep", "3600"])
        note(f"helper {helper.pid}")
    if "never-ready" not in MANNERS:
        health = Health()
    if "unwell" in MANNERS:
        health = Health(unhealthy=("shop.charge stalls",))
    note(f"up {os.getpid()} {link.owner}")
    if "busy" in MANNERS:
        metrics.worker("charge").received = 100
    if "blocks" in MANNERS:
        await asyncio.sleep(0.2)
        time.sleep(3600)
    if "eats" in MANNERS:
        await asyncio.sleep(0.3)
        memory = bytearray(os.urandom(1024) * 200 * 1024)
        note(f"ate {len(memory)}")
    if "dies-soon" in MANNERS:
        await asyncio.sleep(0.2)
        os._exit(3)
    if "leaves" in MANNERS:
        await asyncio.sleep(0.2)
        os._exit(0)
    await drained.wait()
    health = DRAINING
    if "never-drains" in MANNERS:
        await asyncio.Event().wait()
    beats.cancel()
    if extra is not None:
        for task in extra:
            task.cancel()
        await asyncio.gather(*extra, return_exceptions=True)
        await pool.close()
    link.goodbye(DRAINING, metrics.snapshot())
    return 1 if "cuts" in MANNERS else 0


if __name__ == "__main__":
    found = ChildLink.from_environment()
    assert found is not None
    if "misconfigured" in MANNERS:
        print("this application does not import", file=sys.stderr)
        sys.exit(2)
    if "dies-early" in MANNERS:
        note("early")
        os._exit(3)
    sys.exit(asyncio.run(main(found)))
