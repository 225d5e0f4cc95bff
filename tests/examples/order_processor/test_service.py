"""The order processor as a program beside a payment service, on a real RabbitMQ."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys

import pytest
from pika import PlainCredentials

from examples.order_processor import payments
from servers.rabbitmq import RabbitMQ
from servers.server import find_free_port
from tests.examples.order_processor.conftest import (
    APP,
    GIVEN,
    ROOT,
    MailServer,
    StartService,
    WarehouseServer,
    paid,
    wait_for,
)

BEFORE = "was fulfilled before; nothing is done again"


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
    wait_for(lambda: service.said().count(" is fulfilled") + service.said().count(BEFORE) == 6, "all six are done")
    said = service.said().count(BEFORE)
    service.payments.send(GIVEN)
    service.says(BEFORE, times=said + 1)
    assert service.end() == 0
    assert sorted(mail.accepted) == sorted(warehouse.requests) == ["ORD-1702554000123", "ORD-2"]
    letter = mail.envelopes[0]
    assert letter.rcpt_tos == ["507f1f77bcf86cd799439011@customers.skillupworks.example"]
    assert warehouse.bodies[0]["items"] == [{"sku": "Linux", "name": "Linux Administration", "quantity": 1}]


def test_a_copy_that_comes_at_the_same_time_holds_up_nothing(
    make_service: StartService, mail: MailServer, warehouse: WarehouseServer
) -> None:
    mail.hold.clear()
    service = make_service(SMTP_URL=mail.url, WAREHOUSE_URL=warehouse.url, CALL_TIMEOUT_SECONDS="60")
    service.start()
    service.payments.send(GIVEN, GIVEN)
    service.says("the e-mail is being sent for another copy of it")
    assert warehouse.requests == []
    mail.hold.set()
    service.fulfilled(1)
    assert service.end() == 0
    assert len(mail.accepted) == len(warehouse.requests) == 1


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


def test_what_is_away_for_a_while_is_tried_again_ever_later_and_only_what_is_missing_is_done(
    make_service: StartService, mail: MailServer, warehouse: WarehouseServer
) -> None:
    warehouse.answers.extend([(503, {})] * 3)
    service = make_service(SMTP_URL=mail.url, WAREHOUSE_URL=warehouse.url, ORDER_LONGEST_RETRY_SECONDS="60")
    service.start()
    service.payments.send(GIVEN)
    service.fulfilled(1)
    waits = [float(wait) for wait in re.findall(r"failed, again in ([0-9.]+) s", service.said())]
    assert len(waits) == 3
    for wait, longest in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert longest / 2 <= wait <= longest + 0.05  # half of it is chance, the text rounds
    assert len(mail.accepted) == 1
    assert len(warehouse.sent) == 1
    assert service.end() == 0


def test_a_mail_server_and_a_warehouse_that_are_only_silent_are_tried_again_until_they_speak(
    make_service: StartService, warehouse: WarehouseServer
) -> None:
    mail = MailServer()
    with socket.create_server(("127.0.0.1", mail.port)), socket.create_server(("127.0.0.1", 0)) as deaf:
        service = make_service(
            SMTP_URL=mail.url,
            WAREHOUSE_URL=f"https://127.0.0.1:{deaf.getsockname()[1]}/",  # silent in the midst of TLS
            WAREHOUSE_KNOWS_KEYS="0",
            CALL_TIMEOUT_SECONDS="1",
            ORDER_ATTEMPTS="1000",
        )
        service.start()
        service.payments.send(GIVEN)
        service.says("failed, again in", times=2)
        assert service.end() == 0
    assert "may have been sent" not in service.said()
    assert service.payments.count("order-processing-dlq") == (0, 0)
    mail.start()
    try:
        service.environment.update(WAREHOUSE_URL=warehouse.url, CALL_TIMEOUT_SECONDS="60")
        service.start()
        service.fulfilled(1)
        assert service.end() == 0
    finally:
        mail.stop()
    assert mail.accepted == warehouse.requests == ["ORD-1702554000123"]


def test_what_still_fails_is_a_dead_letter_that_the_command_lists_shows_and_sends_back(
    make_service: StartService, mail: MailServer, warehouse: WarehouseServer
) -> None:
    warehouse.answers.extend([(503, {})] * 3)
    service = make_service(SMTP_URL=mail.url, WAREHOUSE_URL=warehouse.url, ORDER_ATTEMPTS="3")
    service.start()
    body = json.dumps(GIVEN, indent=3).encode()
    service.payments.send(body)
    ((dead, headers),) = service.payments.dead(1)
    assert dead == body
    assert any("the warehouse answered 503" in str(value) for value in headers.values())
    (letter,) = json.loads(service.run("conveyor", "dead", "list", "--app", APP, "--json"))["dead"]
    assert letter["reason"] == "exhausted"
    assert "the warehouse answered 503 Service Unavailable" in letter["error"]
    shown = service.run("conveyor", "dead", "show", letter["id"], "--app", APP)
    assert "ORD-1702554000123" in shown
    service.run("conveyor", "dead", "redrive", "--queue", "order-processing", "--app", APP)
    service.fulfilled(1)
    assert service.end() == 0
    assert len(mail.accepted) == 1
    assert list(warehouse.sent) == ["ORD-1702554000123"]
    assert service.payments.count("order-processing-dlq") == (0, 0)


def test_what_the_warehouse_refuses_is_not_tried_again(make_service: StartService, warehouse: WarehouseServer) -> None:
    warehouse.answers.append((422, {}))
    service = make_service(WAREHOUSE_URL=warehouse.url)
    service.start()
    service.payments.send(GIVEN)
    service.payments.dead(1)
    assert "dead letter (rejected): Reject: the warehouse answered 422" in service.said()
    assert len(warehouse.requests) == 1
    assert service.end() == 0


def test_another_order_under_the_same_id_is_refused(make_service: StartService) -> None:
    service = make_service()
    service.start()
    service.payments.send(GIVEN)
    service.fulfilled(1)
    service.payments.send(paid(userId="somebody-else"))
    service.payments.dead(1)
    assert "another order has the id ORD-1702554000123 already, with other contents" in service.said()
    assert service.end() == 0


def test_a_lost_answer_of_the_mail_server_is_left_to_the_operator_and_one_of_the_warehouse_is_repeated_under_its_key(
    make_service: StartService, mail: MailServer, warehouse: WarehouseServer
) -> None:
    mail.hold.clear()
    warehouse.after.append(500)
    service = make_service(SMTP_URL=mail.url, WAREHOUSE_URL=warehouse.url, CALL_TIMEOUT_SECONDS="1")
    service.start()
    service.payments.send(GIVEN)
    service.payments.dead(1)
    assert mail.accepted == ["ORD-1702554000123"]
    assert warehouse.requests == ["ORD-1702554000123"] * 2
    assert len(warehouse.sent) == 1
    assert service.run("examples.order_processor.unclear").startswith("ORD-1702554000123\te-mail\t")
    assert service.end() == 0


def test_a_warehouse_that_knows_no_keys_is_asked_no_second_time(
    make_service: StartService, warehouse: WarehouseServer
) -> None:
    warehouse.after.append(500)
    service = make_service(WAREHOUSE_URL=warehouse.url, WAREHOUSE_KNOWS_KEYS="0")
    service.start()
    service.payments.send(GIVEN)
    service.payments.dead(1)
    assert len(warehouse.requests) == 1
    assert "the warehouse-notice may have been sent" in service.said()
    assert service.end() == 0


def test_rabbitmq_may_be_down_at_the_start_and_later(
    make_service: StartService, rabbitmq: RabbitMQ, mail: MailServer
) -> None:
    url = rabbitmq.url()
    rabbitmq.stop()
    try:
        service = make_service(url, SMTP_URL=mail.url)
        service.start(ready=False)
        said = service.says("trying again in", times=2)
        assert f"127.0.0.1:{rabbitmq.port}" in said
        assert "Traceback" not in said
        assert service.end() == 0  # it need not be there for an end in order
        service.start(ready=False)
        service.says("trying again in")
        rabbitmq.start()
        service.says("order-processor is ready")
        service.payments.send(paid("ORD-1"))
        service.fulfilled(1)
        rabbitmq.kill()
        rabbitmq.start()
        service.payments.send(paid("ORD-2"))
        service.fulfilled(2)
        assert service.end() == 0
        assert "Traceback" not in service.said()
    finally:
        rabbitmq.start()
    assert mail.accepted == ["ORD-1", "ORD-2"]


def test_an_order_in_work_while_rabbitmq_dies_is_confirmed_once(
    make_service: StartService, rabbitmq: RabbitMQ, mail: MailServer, warehouse: WarehouseServer
) -> None:
    service = make_service(SMTP_URL=mail.url, WAREHOUSE_URL=warehouse.url, CALL_TIMEOUT_SECONDS="60")
    service.start()
    mail.hold.clear()
    service.payments.send(paid("ORD-1"))
    wait_for(lambda: mail.accepted, "the e-mail has arrived")
    rabbitmq.kill()
    mail.hold.set()
    assert service.fulfilled(1) == ["ORD-1"]
    rabbitmq.start()

    wait_for(lambda: BEFORE in service.said(), "it listens again, and meets the order again")
    assert service.end() == 0
    assert service.payments.count("order-processing") == (0, 0)
    assert mail.accepted == ["ORD-1"]
    assert list(warehouse.sent) == ["ORD-1"]


def test_sigterm_finishes_what_is_held_takes_nothing_new_and_ends_with_0(
    make_service: StartService, mail: MailServer
) -> None:
    service = make_service(SMTP_URL=mail.url, CALL_TIMEOUT_SECONDS="60")
    program = service.start("--prefetch", "2")
    mail.hold.clear()
    service.payments.send(*[paid(f"ORD-{number}") for number in range(6)])
    wait_for(lambda: len(mail.accepted) == 2, "two are in work")
    program.send_signal(signal.SIGTERM)
    service.says("stopping: SIGTERM")
    wait_for(lambda: service.payments.count("order-processing")[0] == 4, "what has not begun is given back")
    mail.hold.set()
    assert program.wait(60) == 0
    assert len(service.fulfilled(2)) == len(mail.accepted) == 2
    assert service.payments.count("order-processing") == (4, 0)


def test_two_instances_share_the_queue(make_service: StartService, mail: MailServer) -> None:
    service = make_service(SMTP_URL=mail.url)
    service.start("--prefetch", "1")
    service.start("--prefetch", "1")
    wait_for(lambda: service.payments.count("order-processing")[1] == 2, "two listen")
    ids = [f"ORD-{number}" for number in range(20)]
    service.payments.send(*[paid(each) for each in ids])
    assert service.fulfilled(20) == sorted(ids)
    assert service.end() == 0
    assert sorted(mail.accepted) == sorted(ids)
    assert all("is fulfilled" in service.said(number) for number in (0, 1))


def test_what_others_declared_is_shared_as_it_is(make_service: StartService) -> None:
    service = make_service()
    with service.payments.channel() as channel:
        channel.exchange_declare("skillupworks", "direct", durable=True)
        channel.queue_declare("order-processing", durable=True)
        channel.queue_bind("order-processing", "skillupworks", "order-processing")
        channel.basic_publish("", "order-processing", json.dumps(GIVEN).encode())
    service.start()
    service.fulfilled(1)
    assert service.end() == 0
    with service.payments.channel() as channel:  # nor does the service make anything that they could not declare
        channel.queue_declare("order-processing", durable=True)
        channel.queue_declare("order-processing-dlq", durable=True)
        channel.exchange_declare("skillupworks", "direct", durable=True)


def test_a_queue_of_another_kind_is_named_and_can_be_used_as_it_is(make_service: StartService) -> None:
    service = make_service()
    with service.payments.channel() as channel:
        channel.exchange_declare("skillupworks", "topic", durable=True)
        channel.queue_declare("order-processing", durable=True, arguments={"x-max-length": 1000})
        channel.queue_bind("order-processing", "skillupworks", "order-processing")
    program = service.start(ready=False)
    assert program.wait(60) != 0
    said = service.said()
    assert "the queue 'order-processing' exists, and is not as it is declared here" in said
    assert "x-max-length" in said
    assert "passive" in said
    assert "Traceback" not in said
    service.environment["RABBITMQ_PASSIVE"] = "1"
    service.start()
    service.payments.send(GIVEN)
    service.fulfilled(1)
    assert service.end() == 0


def test_it_tells_how_it_does_in_numbers(make_service: StartService, warehouse: WarehouseServer) -> None:
    warehouse.answers.append((422, {}))
    service = make_service(WAREHOUSE_URL=warehouse.url)
    port = find_free_port()
    service.start("--http", f"127.0.0.1:{port}", "--processes", "2")
    service.payments.send(paid("ORD-1"))
    service.payments.dead(1)
    service.payments.send(paid("ORD-2"), paid("ORD-3"))
    service.fulfilled(2)
    number = r"([0-9.e+-]+)"

    def value(metric: str) -> float:
        found = re.search(rf"^{re.escape(metric)} {number}$", service.get(port, "/metrics"), re.MULTILINE)
        return float(found[1]) if found else -1.0

    worker, queue = '{worker="fulfil"}', '{queue="order-processing"}'
    wait_for(lambda: value(f"conveyor_messages_succeeded_total{worker}") == 2, "two succeeded")
    assert value(f"conveyor_messages_failed_total{worker}") == 1
    assert value(f"conveyor_messages_dead_total{worker}") == 1
    assert value(f"conveyor_queue_ready{queue}") == 0
    assert value(f"conveyor_queue_dead{queue}") == 1
    wait_for(lambda: value(f"conveyor_queue_consumers{queue}") == 2, "two consumers are seen")
    assert value("conveyor_uptime_seconds") > 0
    assert '"ready": true' in service.get(port, "/readyz")
    assert service.end() == 0


def test_sample_orders_go_where_the_service_listens() -> None:
    there = payments.server({"CONVEYOR_BROKER": "amqp://u:p@h1:5673,h2/v?queue_type=classic", "RABBITMQ_HOST": "h3"})
    assert (there.host, there.port, there.virtual_host) == ("h1", 5673, "v")
    assert there.credentials == PlainCredentials("u", "p")
    there = payments.server({"RABBITMQ_HOST": "h3", "RABBITMQ_VHOST": "w"})
    assert (there.host, there.port, there.virtual_host) == ("h3", 5672, "w")
    assert there.credentials == PlainCredentials("guest", "guest")
    with pytest.raises(ValueError, match="no amqp:// URL") as refused:
        payments.server({"CONVEYOR_BROKER": "redis://:secret@h"})
    assert "secret" not in str(refused.value)


def test_sample_orders_are_sent_as_a_payment_service_sends_them(make_service: StartService) -> None:
    service = make_service()
    refused = subprocess.run(
        [sys.executable, "-m", "examples.order_processor.payments"],
        cwd=ROOT,
        env=service.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "nobody receives orders there yet" in refused.stderr
    service.start()
    sent = re.findall(r"sent (ORD-\d+): ₹\d+", service.run("examples.order_processor.payments", "3", "--twice"))
    assert service.fulfilled(3) == sorted(sent)
    service.run("examples.order_processor.payments", "--wrong")
    service.payments.dead(1)
    assert service.end() == 0
