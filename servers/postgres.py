"""PostgreSQL for tests: a cluster of its own."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Final

from servers.server import Server


class Postgres(Server):
    """A private PostgreSQL cluster on loopback; it dies with the test process.

    Parameters:
        folder: an empty folder that the server's user can reach.
        binaries: where initdb and postgres are.
    """

    NAME = "PostgreSQL"
    # SIGINT is PostgreSQL's fast shutdown.
    STOP = signal.SIGINT
    DEATH = "INT"
    # initdb and postgres refuse to run as root.
    USER = "postgres" if os.getuid() == 0 else None

    def __init__(self, folder: Path, binaries: Path) -> None:
        super().__init__(folder)
        self._binaries: Final = binaries
        if self.USER is not None:
            shutil.chown(folder, self.USER)
        self._run(
            binaries / "initdb", "--pgdata=data", "--username=conveyor", "--auth=trust", "--encoding=UTF8", "--no-sync"
        )

    def url(self, database_name: str = "test") -> str:
        """Start the server if it is down; the SQLAlchemy URL of a new, empty database, its name beginning as asked."""
        self.start()
        name = f"{database_name}_{uuid.uuid4().hex[:12]}"
        self._run(self._binaries / "createdb", "--host=127.0.0.1", f"--port={self.port}", "--username=conveyor", name)
        return f"postgresql+asyncpg://conveyor@127.0.0.1:{self.port}/{name}"

    def kill(self) -> None:
        """Let the server crash: all its processes die at once. start(), restart() or url() brings it back."""
        server, self._server = self._server, None
        if server is None or server.poll() is not None:
            return
        server.send_signal(signal.SIGSTOP)  # so that it starts no process while we list them
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        handles = [os.pidfd_open(int(pid)) for pid in children]
        server.kill()
        server.wait()
        for handle in handles:  # what outlives the server would hold its shared memory, and bar the next start
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [])
            os.close(handle)

    def _serve(self) -> subprocess.Popen[bytes]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "32MB",
            "fsync": "off",  # no test takes the machine's power away, and a killed server loses nothing by it
        }
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return self._spawn(self._binaries / "postgres", "-D", self.folder / "data", *flags)

    def _answers(self) -> bool:
        ready: list[str | Path] = [self._binaries / "pg_isready", "--quiet", "--host=127.0.0.1", f"--port={self.port}"]
        return subprocess.run(ready, check=False).returncode == 0
