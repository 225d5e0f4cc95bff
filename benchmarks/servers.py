"""RabbitMQ and Redis for a run: private servers, started where they are first needed, emptied before each subject.

They keep their makers' settings, but for where they listen and what makes them durable: RabbitMQ's queues and messages are durable by
what the clients say; Redis writes an append-only file, synced every second, which is never rewritten while something is measured.
"""

from __future__ import annotations

import socket
from pathlib import Path

from servers.rabbitmq import RabbitMQ
from servers.redis import Redis

ANSWER_SECONDS = 60.0


def make(name: str, folder: Path) -> RabbitMQ | Redis:
    """A server, not started yet: rabbitmq or redis.

    Parameters:
        folder: an empty folder, on the disk that is to be measured.

    Raises:
        ServerMissing: its program is not on this machine.
    """
    server: RabbitMQ | Redis
    if name == "rabbitmq":
        server = RabbitMQ(folder)
        server.configure("log.console.level", "warning")
    else:
        server = Redis(folder)
        server.configure("auto-aof-rewrite-percentage", "0")
    return server


def emptied(server: RabbitMQ | Redis) -> str:
    """Forget everything that a subject left; the URL where the next one finds the server."""
    if isinstance(server, RabbitMQ):
        server.forget(set(server.hosts))
        return server.url()
    server.start()
    with socket.create_connection(("127.0.0.1", server.port), ANSWER_SECONDS) as connection:
        connection.sendall(b"FLUSHALL SYNC\r\n")
        assert connection.recv(5) == b"+OK\r\n"
    return f"redis://127.0.0.1:{server.port}/0"
