"""RabbitMQ and Redis for a run: private servers on free ports of loopback, which end with it. Elsewhere nothing is touched.

They keep their makers' settings, but for where they listen and what makes them durable: RabbitMQ's queues and messages are durable by
what the clients say; Redis writes an append-only file, synced every second.
"""

from __future__ import annotations

import abc
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

START_SECONDS: Final = 60.0
PORTS: Final = range(20_000, 32_000)
"""Below those that the kernel gives to outgoing connections."""
VIRTUAL_HOST: Final = "bench"
HELLO_SECONDS: Final = 1.0


class ServerMissing(Exception):
    """A server's program is not on this machine, or does not come up; the text says what to do."""


def find_free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerMissing(f"none of a hundred ports of {PORTS} is free")


class Server(abc.ABC):
    """One server process, from entering to leaving the context.

    Parameters:
        folder: an empty folder, on the disk that is to be measured.
    """

    NAME: str
    HELLO: bytes
    GREETING: bytes
    """What a server that is up answers to the hello begins so."""

    def __init__(self, folder: Path) -> None:
        self.port: Final = find_free_port()
        self.folder: Final = folder
        self.version = ""
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._serve()
            deadline = time.monotonic() + START_SECONDS
            while not self._answers():
                if self._processes[-1].poll() is not None or time.monotonic() > deadline:
                    log = (self.folder / "log").read_text(errors="replace")
                    raise ServerMissing(f"{self.NAME} does not start:\n{log[-2000:]}")
                time.sleep(0.05)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end()

    @property
    @abc.abstractmethod
    def url(self) -> str:
        """Where clients find it."""

    @abc.abstractmethod
    def empty(self) -> None:
        """Forget everything that a subject left."""

    @abc.abstractmethod
    def _serve(self) -> None:
        """Start the process."""

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), HELLO_SECONDS) as hello:
                hello.sendall(self.HELLO)
                return hello.recv(len(self.GREETING)) == self.GREETING
        except OSError:
            return False

    def _spawn(self, *command: str | Path, environment: Mapping[str, str] | None = None) -> None:
        """Start a process that ends with this one, even by kill -9."""
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)

    def _end(self) -> None:
        while self._processes:
            process = self._processes.pop()
            process.send_signal(signal.SIGTERM)
            process.wait(START_SECONDS)


class RabbitMQ(Server):
    """A node of its own, with its own port mapper; emptied by a new virtual host."""

    NAME = "RabbitMQ"
    HELLO = b"AMQP\0\0\x09\x01"
    GREETING = b"\x01"  # the first frame is a method

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        installed = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin"))
        if not installed:
            raise ServerMissing(
                "RabbitMQ is not installed in /usr/lib/rabbitmq/lib; scripts/install-servers installs it"
            )
        self._scripts: Final = installed[-1]
        self.version = installed[-1].parent.name.partition("-")[2]
        self._cookie: Final = secrets.token_hex(20)
        self._node: Final = f"bench{self.port}@localhost"
        self._environment: Final[Mapping[str, str]] = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(find_free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP_BYTES": "0",
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the server, instead of waiting for it
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_DIST_PORT": str(find_free_port()),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "logs"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
            "RABBITMQ_SCHEMA_DIR": str(folder / "schema"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{VIRTUAL_HOST}"

    def empty(self) -> None:
        self._evaluate(
            f'catch rabbit_vhost:delete(<<"{VIRTUAL_HOST}">>, <<"bench">>), '
            f'rabbit_vhost:add(<<"{VIRTUAL_HOST}">>, <<"bench">>), '
            f'rabbit_auth_backend_internal:set_permissions(<<"guest">>, <<"{VIRTUAL_HOST}">>, '
            '<<".*">>, <<".*">>, <<".*">>, <<"bench">>)'
        )

    def _serve(self) -> None:
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "disk_free_limit.absolute": "50MB",
            "log.console": "true",
            "log.console.level": "warning",
            "log.file": "false",
        }
        (self.folder / "rabbitmq.conf").write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
        (self.folder / "rabbitmq-env.conf").touch()
        (self.folder / "enabled_plugins").write_text("[].")
        cookie = self.folder / ".erlang.cookie"
        cookie.write_text(self._cookie)
        cookie.chmod(0o400)
        self._spawn("epmd", environment=self._environment)
        self._spawn(self._scripts / "rabbitmq-server", environment=self._environment)

    def _evaluate(self, expressions: str) -> None:
        """Have the node do something, in Erlang; milliseconds each time, where rabbitmqctl takes seconds."""
        done = subprocess.run(
            ["erl_call", "-c", self._cookie, "-sname", self._node, "-e"],
            cwd=self.folder,
            env=self._environment,
            input=f"{expressions}.\n",
            capture_output=True,
            text=True,
            check=False,
        )
        if not done.stdout.startswith("{ok, "):
            raise ServerMissing(f"RabbitMQ does not do as told: {done.stdout}{done.stderr}")


class Redis(Server):
    """A server with an append-only file, synced every second, which is never rewritten while something is measured."""

    NAME = "Redis"
    HELLO = b"PING\r\n"
    GREETING = b"+PONG"  # not while it loads its file

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        binary = shutil.which("redis-server")
        if binary is None:
            raise ServerMissing("there is no redis-server on this machine; scripts/install-servers installs it")
        self._binary: Final = binary
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
        self.version = "".join(re.findall(r"v=(\S+)", said))

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def empty(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), START_SECONDS) as connection:
            connection.sendall(b"FLUSHALL SYNC\r\n")
            assert connection.recv(5) == b"+OK\r\n"

    def _serve(self) -> None:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "auto-aof-rewrite-percentage": "0",
            "save": "",
            "daemonize": "no",
        }
        self._spawn(self._binary, *(part for name, value in settings.items() for part in (f"--{name}", value)))


SERVERS: Final[Mapping[str, type[Server]]] = {"rabbitmq": RabbitMQ, "redis": Redis}
