"""An application with a ledger: an order is confirmed, then delivered; every step leaves its effect in the database.

What goes wrong, and where, is said by the environment: $CONVEYOR_CRASH kills a process at a named point, $STOP_AT stops the first
process that passes a point, $CLAIM_SECONDS is how long rows of the outbox belong to the process that wrote or claimed them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text

from conveyor import Conveyor, RetryPolicy, Transaction, event
from conveyor.runtime import ledger, points, relay
from conveyor.testing import crash

STEADFAST = RetryPolicy(crashes=1000, initial=0.05)
LEASE_SECONDS = float(os.environ.get("LEASE_SECONDS", "30"))

if seconds := os.environ.get("CLAIM_SECONDS"):
    ledger.HAND_OFF_SECONDS = relay.CLAIM_SECONDS = float(seconds)  # type: ignore[misc] # shorter than is sensible

app = Conveyor("trade", migrate=True)


@event("order.placed", key="order_id")
@dataclass(frozen=True)
class Placed:
    order_id: str


@event("order.confirmed", key="order_id")
@dataclass(frozen=True)
class Confirmed:
    order_id: str


@app.worker(retry=STEADFAST, lease=LEASE_SECONDS)
async def confirm(placed: Placed, tx: Transaction) -> Confirmed:
    with Path("begun").open("a") as begun:
        begun.write(f"{os.getpid()}\n")
    await leave_effect(tx, "confirm", placed.order_id)
    return Confirmed(placed.order_id)


@app.worker(retry=STEADFAST, lease=LEASE_SECONDS)
async def deliver(confirmed: Confirmed, tx: Transaction) -> None:
    await leave_effect(tx, "deliver", confirmed.order_id)


async def leave_effect(tx: Transaction, worker: str, order_id: str) -> None:
    values = {"worker": worker, "order_id": order_id}
    await tx.session.execute(text("INSERT INTO effect (worker, order_id) VALUES (:worker, :order_id)"), values)


# Stops its parent while it holds the write lock of the queue file itself: a process that stops with that lock holds up all others.
STOPPER = """
import os, signal, sys, time
import apsw
parent = os.getppid()
db = apsw.Connection(sys.argv[1])
db.set_busy_timeout(60_000)
db.execute("BEGIN IMMEDIATE")
os.kill(parent, signal.SIGSTOP)
while open(f"/proc/{parent}/stat").read().rpartition(")")[2].split()[0] != "T":
    time.sleep(0.001)
"""


def stop_once(wanted: str) -> None:
    """Stop (SIGSTOP) the first process in this folder that passes a point, which then finds itself a zombie."""

    def hook(passed: str) -> None:
        if passed != wanted:
            return
        try:
            os.close(os.open("stopped", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        subprocess.run([sys.executable, "-c", STOPPER, "test.queue"], check=True)

    points.arm(hook)


crash.arm()
if point := os.environ.get("STOP_AT"):
    stop_once(point)
