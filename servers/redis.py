"""Redis: a server of its own, with an append-only file."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Final, Literal

from servers.certificate import Certificate
from servers.server import Server, ServerMissing, find_free_port

HELLO_SECONDS: Final = 1.0
"""A server that is up answers at once."""


class Redis(Server):
    """A private Redis on loopback; it dies with the process that started it.

    Parameters:
        folder: an empty folder.
        fsync: when what was written reaches the disk; a killed server loses nothing either way.
    """

    NAME = "Redis"

    def __init__(self, folder: Path, fsync: Literal["always", "everysec"] = "everysec") -> None:
        super().__init__(folder)
        binary = shutil.which("redis-server")
        if binary is None:
            raise ServerMissing("there is no redis-server on this machine; run scripts/install-servers")
        self._settings: Final = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(folder),
            "appendonly": "yes",
            "appendfsync": fsync,
            "save": "",
            "daemonize": "no",
        }
        self._binary: Final = binary

    @property
    def version(self) -> str:
        """Of the program."""
        said = subprocess.run([self._binary, "--version"], capture_output=True, text=True, check=True).stdout
        return "".join(re.findall(r"v=(\S+)", said))

    def url(self, *, port: int | None = None) -> str:
        """Start the server if it is down; the URL of a new namespace.

        Parameters:
            port: of a proxy that stands before the server.
        """
        self.start()
        return f"redis://127.0.0.1:{port or self.port}/0?namespace=test-{uuid.uuid4().hex[:12]}"

    def configure(self, name: str, value: str) -> None:
        """A directive of redis.conf, in force from the next start on."""
        self._settings[name] = value

    def serve_tls(self, certificate: Certificate, *, ask_clients: bool = False) -> int:
        """Speak TLS from the next start on, on a port of its own beside the plain one; that port.

        Parameters:
            ask_clients: let in only who has a certificate of the same authority.
        """
        port = find_free_port()
        self.configure("tls-port", str(port))
        self.configure("tls-cert-file", str(certificate.file))
        self.configure("tls-key-file", str(certificate.key))
        self.configure("tls-ca-cert-file", str(certificate.authority))
        self.configure("tls-auth-clients", "yes" if ask_clients else "no")
        return port

    def _serve(self) -> subprocess.Popen[bytes]:
        flags = [part for name, value in self._settings.items() for part in (f"--{name}", value)]
        return self._spawn(self._binary, *flags)

    def _answers(self) -> bool:
        """It refuses commands while it loads its file."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), HELLO_SECONDS) as hello:
                hello.sendall(b"PING\r\n")
                return hello.recv(5) == b"+PONG"
        except OSError:
            return False
