"""Killed at any moment, with every order delivered again: no customer gets two e-mails, no warehouse sends twice, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.examples.order_processor.conftest import (
    APP,
    MailServer,
    Service,
    StartService,
    WarehouseServer,
    paid,
    wait_for,
)

NOTED = {
    # the transactions of an order, in order: what each of them notes
    1: "it has arrived",
    2: "the e-mail is being sent",
    3: "the e-mail was sent",
    4: "the notice is being sent",
    5: "the notice was sent",
    6: "it is fulfilled",
}
DEATHS = {
    # the point → whether the e-mail was sent, and whether that is known
    "received:1": (True, True),
    **{f"transaction.opening:{number}": (True, number != 3) for number in NOTED},
    **{f"committed:{number}": (number != 2, number != 2) for number in NOTED},
    "settled:1": (True, True),
}


def start_mortal(service: Service) -> None:
    """Start the service so that die() can end it where it likes."""
    service.environment["DIES_AT"] = str(service.folder / "dies-at")
    service.start(app="tests.examples.order_processor.mortal:app")


def die(service: Service, point: str, order_id: str) -> None:
    """Send an order, and let the process that gets it die at a point."""
    file = service.folder / "dies-at"
    file.write_text(point)
    (worker,) = wait_for(service.workers, "there is a process")
    service.payments.send(paid(order_id))
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), f"it dies at {point}")


def test_wherever_a_process_dies_nothing_is_sent_twice_and_nothing_lost(
    make_service: StartService, mail: MailServer, warehouse: WarehouseServer
) -> None:
    service = make_service(SMTP_URL=mail.url, WAREHOUSE_URL=warehouse.url, CALL_TIMEOUT_SECONDS="1")
    start_mortal(service)
    unclear: list[str] = []
    for number, (point, (_, known)) in enumerate(DEATHS.items(), 1):
        die(service, point, point)
        if not known:
            unclear.append(point)
        service.fulfilled(number - len(unclear))
        service.payments.dead(len(unclear))
    assert service.fulfilled(1) == sorted(DEATHS.keys() - set(unclear))
    service.says("order committed:6 was fulfilled before; nothing is done again")
    assert service.end() == 0
    assert sorted(mail.accepted) == sorted(point for point, (sent, _) in DEATHS.items() if sent)
    assert sorted(body["orderId"] for body in warehouse.sent.values()) == sorted(DEATHS)
    assert service.payments.count("order-processing") == (0, 0)
    for point in unclear:
        assert f"order {point}: nobody can tell whether the e-mail was sent, so it is not sent again" in service.said()


@pytest.mark.parametrize("sent", [True, False])
def test_the_operator_finds_out_what_nobody_knows_and_sends_the_order_back(
    sent: bool, make_service: StartService, mail: MailServer, warehouse: WarehouseServer
) -> None:
    service = make_service(SMTP_URL=mail.url, WAREHOUSE_URL=warehouse.url, CALL_TIMEOUT_SECONDS="1")
    start_mortal(service)
    die(service, "transaction.opening:3" if sent else "committed:2", "ORD-1")
    service.payments.dead(1)
    assert service.end() == 0
    assert service.run("examples.order_processor.unclear").split("\t")[:2] == ["ORD-1", "e-mail"]
    # Sent back without an answer, it is no wiser.
    service.start()
    service.run("conveyor", "dead", "redrive", "--all", "--app", APP)
    service.says("dead letter (rejected): Reject: the e-mail may have been sent")
    service.payments.dead(1)
    assert "no doubt" in service.run("examples.order_processor.unclear", "ORD-1", "letter", "sent", code=1)
    service.run("examples.order_processor.unclear", "ORD-1", "e-mail", "sent" if sent else "not-sent")
    service.run("conveyor", "dead", "redrive", "--queue", "order-processing", "--app", APP)
    assert service.fulfilled(1) == ["ORD-1"]
    assert service.run("examples.order_processor.unclear") == ""
    assert service.end() == 0
    assert mail.accepted == ["ORD-1"]
    assert list(warehouse.sent) == ["ORD-1"]


def test_killed_again_and_again_under_load_it_sends_nothing_twice_and_loses_nothing(
    make_service: StartService, mail: MailServer, warehouse: WarehouseServer
) -> None:
    service = make_service(
        SMTP_URL=mail.url, WAREHOUSE_URL=warehouse.url, CALL_TIMEOUT_SECONDS="1", ORDER_ATTEMPTS="20"
    )
    ids = [f"ORD-{number}" for number in range(60)]
    service.start("--processes", "2", "--prefetch", "4")
    service.payments.send(*[paid(each) for each in ids])
    service.payments.send(*[paid(each) for each in random.sample(ids, 30)])
    kills = 0
    deadline = time.monotonic() + 60
    while kills < 8 and time.monotonic() < deadline:
        for worker in random.sample(found := service.workers(), min(1, len(found))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
                kills += 1
        time.sleep(random.uniform(0.3, 0.9))

    def ended() -> set[str]:
        done = {str(row[0]) for row in service.query("SELECT order_id FROM orders WHERE fulfilled IS NOT NULL")}
        dead = service.payments.count("order-processing-dlq")[0]
        unclear = {str(row[0]) for row in service.query("SELECT order_id FROM sent WHERE state = 'unknown'")}
        return done | unclear if dead >= len(unclear) else set()

    wait_for(lambda: ended() == set(ids), "every order is fulfilled, or a dead letter")
    assert service.end() == 0
    assert len(mail.accepted) == len(set(mail.accepted))
    assert sorted(warehouse.sent) == sorted(ids)
    fulfilled = {str(row[0]) for row in service.query("SELECT order_id FROM orders WHERE fulfilled IS NOT NULL")}
    assert fulfilled <= set(mail.accepted)
