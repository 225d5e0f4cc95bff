"""Any program can take part: here a shell script with RabbitMQ's own tool."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from conveyor.broker import Queue, Settlement
from conveyor.brokers import from_url
from conveyor.core.message import Message
from conveyor.core.settle import DONE
from servers.rabbitmq import SMALL, RabbitMQ
from servers.server import find_free_port

SCRIPT: Final = r"""
set -euo pipefail
admin() { rabbitmqadmin --port="$PORT" --vhost="$VHOST" --username=guest --password=guest "$@"; }
admin publish routing_key=shop.charge payload='{"order_id": "by name"}' >&2
admin publish exchange=conveyor routing_key=order.created payload='{"order_id": "by topic"}' \
    properties='{"message_id": "from-a-shell", "delivery_mode": 2, "headers": {"cloudEvents:partitionkey": "A-1"}}' >&2
admin --format=raw_json get queue=mine ackmode=ack_requeue_false
"""


@pytest.fixture
def port() -> int:
    """Of the server's management interface."""
    return find_free_port()


@pytest.fixture
def managed(tmp_path: Path, port: int) -> Iterator[RabbitMQ]:
    """A node with the management interface, which rabbitmqadmin talks to."""
    server = RabbitMQ(tmp_path, SMALL, plugins=["rabbitmq_management"])
    server.configure("management.tcp.port", str(port))
    server.configure("management.tcp.ip", "127.0.0.1")
    yield server
    server.close()


async def test_a_shell_script_publishes_and_reads_with_the_servers_own_tool(managed: RabbitMQ, port: int) -> None:
    url = await asyncio.to_thread(managed.url)
    broker = from_url(url)
    await broker.open()
    charge = Queue(name="shop.charge", topics=("order.created",))
    await broker.declare([charge, Queue(name="mine", topics=("order.paid",))])
    await broker.publish([Message("m-1", "order.paid", b'{"total": "19.99"}', correlation_id="j-1")])

    environment = {"PORT": str(port), "VHOST": urlsplit(url).path[1:], "PATH": "/usr/sbin:/usr/bin:/bin"}
    command = ["bash", "-c", SCRIPT]
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr

    [read] = json.loads(done.stdout)
    assert (read["payload"], read["properties"]["correlation_id"]) == ('{"total": "19.99"}', "j-1")
    assert read["properties"]["headers"]["cloudEvents:id"] == "m-1"

    subscription = await broker.subscribe("shop.charge", 10)
    found: dict[bytes, Message] = {}
    while len(found) < 2:
        for delivery in await subscription.fetch(10):
            found[delivery.message.body] = delivery.message
            await broker.settle([Settlement(delivery, DONE)])
    assert found[b'{"order_id": "by name"}'].topic == "order.created"
    assert (found[b'{"order_id": "by topic"}'].id, found[b'{"order_id": "by topic"}'].key) == ("from-a-shell", "A-1")
    await broker.close()
