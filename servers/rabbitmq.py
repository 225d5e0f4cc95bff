"""RabbitMQ: a node of its own, with its own port mapper, cookie and folders."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from servers.server import Server, ServerMissing, find_free_port

USER: Final = "guest"
PROTOCOL_HEADER: Final = b"AMQP\0\0\x09\x01"
HELLO_SECONDS: Final = 1.0
"""A server that is up says its first frame at once."""
SMALL: Final[Mapping[str, str]] = {
    # One scheduler that sleeps when idle: several test processes share the machine.
    "RABBITMQ_SERVER_ERL_ARGS": "+S 1:1 +SDcpu 1:1 +sbwt none +sbwtdcpu none +sbwtdio none +A 4",
    # consumer_timeout is looked at so often (milliseconds).
    "RABBITMQ_SERVER_START_ARGS": "-rabbit channel_tick_interval 500",
}
"""How the tests' node runs."""


def _installed() -> Path:
    found = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin"))
    if not found:
        raise ServerMissing("RabbitMQ is not installed in /usr/lib/rabbitmq/lib; run scripts/install-servers")
    return found[-1]


class RabbitMQ(Server):
    """A private RabbitMQ node on loopback; it dies with the process that started it, and so does its port mapper.

    Parameters:
        folder: an empty folder.
        tuning: variables of rabbitmq-env.conf; left out, it runs as its makers set it.
        plugins: those that are enabled.
    """

    NAME = "RabbitMQ"

    def __init__(
        self, folder: Path, tuning: Mapping[str, str] = MappingProxyType({}), plugins: Sequence[str] = ()
    ) -> None:
        super().__init__(folder)
        self._scripts: Final = _installed()
        self.version: Final = self._scripts.parent.name.partition("-")[2]
        self._mapper: subprocess.Popen[bytes] | None = None
        self._cookie: Final = secrets.token_hex(20)
        self.hosts: set[str] = set()
        """The virtual hosts of the URLs that were given."""
        # The host's part is localhost, so that no name of the machine has to resolve.
        self._node: Final = f"conveyor{self.port}@localhost"
        self._settings: dict[str, str] = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "loopback_users": "none",
            "disk_free_limit.absolute": "50MB",
            "log.console": "true",
            "log.console.level": "info",
            "log.file": "false",
        }
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
            **tuning,
        }
        cookie = folder / ".erlang.cookie"
        cookie.write_text(self._cookie)
        cookie.chmod(0o400)
        (folder / "rabbitmq-env.conf").touch()
        (folder / "enabled_plugins").write_text(f"[{','.join(plugins)}].")

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it answers."""
        if self._server is not None and self._server.poll() is None:
            return
        super().start()
        # On a single node, RabbitMQ 3.8 to 3.10 leave a recovered quorum queue without a leader now and then, for ever: nobody is there
        # who would vote (github.com/rabbitmq/rabbitmq-server/issues/10070, with this remedy). Clusters elect by themselves.
        self.evaluate("catch [ra:trigger_election({Name, node()}) || {Name, follower} <- ets:tab2list(ra_state)]")

    def url(self, *, port: int | None = None) -> str:
        """Start the server if it is down; the URL of a new, empty virtual host.

        Parameters:
            port: of a proxy that stands before the server.
        """
        self.start()
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.hosts.add(name)
        self.evaluate(
            f'rabbit_vhost:add(<<"{name}">>, <<"tests">>), '
            f'rabbit_auth_backend_internal:set_permissions(<<"{USER}">>, <<"{name}">>, '
            '<<".*">>, <<".*">>, <<".*">>, <<"tests">>)'
        )
        return f"amqp://{USER}:{USER}@127.0.0.1:{port or self.port}/{name}"

    def forget(self, hosts: Collection[str]) -> None:
        """Delete virtual hosts: a server that comes back with hundreds of them takes minutes."""
        self.hosts.difference_update(hosts)
        if hosts and self._server is not None and self._server.poll() is None:
            names = ", ".join(f'<<"{name}">>' for name in hosts)
            self.evaluate(f'[catch rabbit_vhost:delete(Name, <<"tests">>) || Name <- [{names}]]')

    def ctl(self, *arguments: str) -> str:
        """What rabbitmqctl prints, run against this node; a second or two each time."""
        return self._run(
            self._scripts / "rabbitmqctl",
            "--quiet",
            "--node",
            self._node,
            *arguments,
            environment=self._environment,
        )

    def evaluate(self, expressions: str) -> str:
        """What the node makes of Erlang expressions, separated by commas: the value of the last one; milliseconds each time."""
        command = ["erl_call", "-c", self._cookie, "-sname", self._node, "-e"]
        answer = self._run(*command, environment=self._environment, said=f"{expressions}.\n")
        if not answer.startswith("{ok, "):
            raise RuntimeError(f"{expressions}: {answer}")
        return answer[len("{ok, ") : -1]

    def set(self, name: str, value: str) -> None:
        """Change a parameter of the running server, as Erlang terms: ``set("consumer_timeout", "2000")``; until its next start."""
        self.evaluate(f"application:set_env(rabbit, {name}, {value})")

    def configure(self, name: str, value: str) -> None:
        """A line of rabbitmq.conf, in force from the next start on."""
        self._settings[name] = value

    def kill(self) -> None:
        """Let the server crash, and all its processes with it. start(), restart() or url() brings it back."""
        super().kill()
        self._end_mapper()

    def close(self) -> None:
        """Stop it for good."""
        self.stop()
        self._end_mapper()
        super().close()

    def _end_mapper(self) -> None:
        mapper, self._mapper = self._mapper, None
        if mapper is not None:
            mapper.kill()
            mapper.wait()

    def _serve(self) -> subprocess.Popen[bytes]:
        if self._mapper is None:
            # Erlang would start one as a daemon that stays behind.
            self._mapper = self._spawn("epmd", environment=self._environment)
        lines = [f"{name} = {value}\n" for name, value in self._settings.items()]
        (self.folder / "rabbitmq.conf").write_text("".join(lines))
        return self._spawn(self._scripts / "rabbitmq-server", environment=self._environment)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), HELLO_SECONDS) as hello:
                hello.sendall(PROTOCOL_HEADER)
                return bool(hello.recv(1))
        except OSError:
            return False
