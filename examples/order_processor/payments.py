"""A payment service as far as this service knows it: puts paid orders on RabbitMQ with pika, and knows nothing of Conveyor."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlsplit

import pika
import pika.exceptions

COURSES: Final = {
    "Linux": ("Linux Administration", 1999),
    "Docker": ("Docker and Containers", 2499),
    "Python": ("Python for Operations", 1499),
    "Go": ("Go in Production", 2999),
}


def paid_order(number: int) -> dict[str, Any]:
    """An order as the payment service writes it: nothing but this JSON."""
    skus = random.sample(sorted(COURSES), random.randint(1, 3))
    return {
        "orderId": f"ORD-{time.time_ns() // 1_000_000}{number:03}",
        "sessionId": f"user-session-{random.randint(100, 999)}",
        "userId": f"{random.getrandbits(96):024x}",
        "items": [{"sku": sku, "name": COURSES[sku][0], "price": COURSES[sku][1], "quantity": 1} for sku in skus],
        "total": sum(COURSES[sku][1] for sku in skus),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "paymentId": f"pay_{random.randint(10**9, 10**10 - 1)}",
    }


def server(environment: Mapping[str, str]) -> pika.connection.Parameters:
    """Where RabbitMQ is: as the order processor's own variables say it.

    Raises:
        ValueError: a variable makes no sense; the text has no password in it.
    """
    if url := environment.get("CONVEYOR_BROKER"):
        parts = urlsplit(url)
        if parts.scheme not in ("amqp", "amqps"):
            raise ValueError("CONVEYOR_BROKER is no amqp:// URL, and this client speaks with RabbitMQ only")
        credentials, at, hosts = parts.netloc.rpartition("@")
        first = credentials + at + hosts.partition(",")[0]  # pika knows one host, and none of Conveyor's options
        return pika.URLParameters(parts._replace(netloc=first, query="").geturl())
    return pika.ConnectionParameters(
        host=environment.get("RABBITMQ_HOST") or "localhost",
        port=int(environment.get("RABBITMQ_PORT") or 5672),
        virtual_host=environment.get("RABBITMQ_VHOST") or "/",
        credentials=pika.PlainCredentials(
            environment.get("RABBITMQ_USER") or "guest", environment.get("RABBITMQ_PASS") or "guest"
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Send some orders; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.order_processor.payments",
        description="Sends paid orders as the payment service would. Reads CONVEYOR_BROKER (amqp://…), or else "
        "RABBITMQ_HOST, _PORT, _USER, _PASS and _VHOST.",
    )
    parser.add_argument("count", nargs="?", type=int, default=1, help="so many (default 1)")
    parser.add_argument("--wrong", action="store_true", help="with a total that is not the sum")
    parser.add_argument("--twice", action="store_true", help="each of them two times, as after a fault")
    given = parser.parse_args(arguments)
    try:
        where = server(os.environ)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        connection = pika.BlockingConnection(where)
    except pika.exceptions.AMQPConnectionError as error:
        print(f"error: RabbitMQ at {where.host}:{where.port} cannot be reached: {error!r}", file=sys.stderr)
        return 1
    with connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for number in range(given.count):
            order = paid_order(number)
            if given.wrong:
                order["total"] += 1
            for _ in range(2 if given.twice else 1):
                try:
                    channel.basic_publish(
                        "skillupworks", "order-processing", json.dumps(order).encode(), mandatory=True
                    )
                except (pika.exceptions.ChannelClosedByBroker, pika.exceptions.UnroutableError):
                    print("error: nobody receives orders there yet; start the order processor once", file=sys.stderr)
                    return 1
            print(f"sent {order['orderId']}: ₹{order['total']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
