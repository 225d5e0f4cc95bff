"""A certificate for localhost and the authority that signed it, as files that a server and its clients are given."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

DAYS: Final = "2"
NEW_KEY: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True, slots=True)
class Certificate:
    """The files, in PEM; each certificate has an authority of its own.

    Parameters:
        authority: its certificate; whoever has it trusts ours.
        file: the certificate, for a server as well as for a client.
        key: belongs to the certificate.
    """

    authority: Path
    file: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> Self:
        """A new one in a folder; a tenth of a second."""

        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

        openssl(
            "req", "-x509", *NEW_KEY, "-days", DAYS, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"
        )
        openssl("req", *NEW_KEY, "-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "request.pem")
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", DAYS, "-extfile", "names")
        openssl("x509", "-req", *signing, "-in", "request.pem", "-out", "cert.pem")
        return cls(authority=folder / "ca.pem", file=folder / "cert.pem", key=folder / "key.pem")
