"""The order processor as a program beside a payment service, on a real RabbitMQ."""

from __future__ import annotations

import json

from tests.examples.order_processor.conftest import (
    APP,
    GIVEN,
    MailServer,
    StartService,
    WarehouseServer,
    paid,
    wait_for,
)


def test_a_plain_message_is_fulfilled_and_told_in_the_log(make_service: StartService) -> None:
    service = make_service()
    service.start()
    service.payments.send(GIVEN)
    said = service.says("order ORD-1702554000123 is fulfilled")
    for line in (
        "starting order-processor: connecting to amqp://***@127.0.0.1",
        "connected to amqp://***@127.0.0.1",
        "fulfil listens on order-processing, 10 at once",
        "order-processor is ready",
        "order ORD-1702554000123 of user 507f1f77bcf86cd799439011: total ₹1999",
        "Linux Administration x 1 = ₹1999",
        "e-mail (simulated): order ORD-1702554000123",
        "warehouse (simulated): send order ORD-1702554000123",
    ):
        assert line in said
    assert "guest" not in said
    assert service.end() == 0
    assert service.payments.count("order-processing") == (0, 0)
    assert service.payments.count("order-processing-dlq") == (0, 0)


def test_the_mail_server_and_the_warehouse_are_asked_once_though_the_order_comes_again(
    make_service: StartService, mail: MailServer, warehouse: WarehouseServer
) -> None:
    service = make_service(SMTP_URL=mail.url, WAREHOUSE_URL=warehouse.url)
    service.start("--processes", "2")
    service.payments.send(*[GIVEN] * 5, paid("ORD-2"))
    service.fulfilled(2)
    service.says("was fulfilled before; nothing is done again", times=3)
    service.payments.send(GIVEN)
    wait_for(lambda: service.payments.count("order-processing")[0] == 0, "all is fetched")
    assert service.end() == 0
    assert sorted(mail.accepted) == sorted(warehouse.requests) == ["ORD-1702554000123", "ORD-2"]
    letter = mail.envelopes[0]
    assert letter.rcpt_tos == ["507f1f77bcf86cd799439011@customers.skillupworks.example"]
    assert warehouse.bodies[0]["items"] == [{"sku": "Linux", "name": "Linux Administration", "quantity": 1}]


INVALID = {
    b"{not json": "no JSON",
    b"\xff\xfe": "JSON",
    b"": "no JSON",
    b"[]": "Expected `object`",
    json.dumps(paid(total=2000)).encode(): "₹2000 is not the sum of price x quantity, which is ₹1999",
    json.dumps(paid(items=[])).encode(): "an order has at least one",
    json.dumps({"orderId": "ORD-1"}).encode(): "missing required field",
}


def test_what_is_invalid_becomes_a_dead_letter_with_its_reason_and_its_body_untouched(
    make_service: StartService,
) -> None:
    service = make_service()
    service.start()
    service.payments.send(*INVALID)
    dead = service.payments.dead(len(INVALID))
    assert sorted(body for body, _ in dead) == sorted(INVALID)
    listed = json.loads(service.run("conveyor", "dead", "list", "--app", APP, "--json"))["dead"]
    assert len(listed) == len(INVALID)
    assert {letter["reason"] for letter in listed} == {"invalid"}
    for said in INVALID.values():
        assert any(said in letter["error"] for letter in listed), said
    assert service.end() == 0
