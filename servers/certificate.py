"""Certificates and the authority that signed them, as files that a server and its clients are given."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

DAYS: Final = "2"
NEW_KEY: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True, slots=True)
class Certificate:
    """The files, in PEM.

    Parameters:
        authority: its certificate; whoever has it trusts ours.
        file: the certificate, for a server as well as for a client.
        key: belongs to the certificate.
    """

    authority: Path
    file: Path
    key: Path

    @classmethod
    def make(cls, folder: Path, *, names: str = "DNS:localhost,IP:127.0.0.1", beside: Self | None = None) -> Self:
        """A new one in a folder; a tenth of a second.

        Parameters:
            names: whose it is, as OpenSSL writes them.
            beside: one of the authority that is to sign this one, too; None is an authority of its own.
        """

        def openssl(*arguments: str | Path) -> None:
            subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

        authority = folder / "ca.pem" if beside is None else beside.authority
        signature = authority.with_suffix(".key")
        if beside is None:
            itself = ("-x509", *NEW_KEY, "-days", DAYS, "-subj", "/CN=authority")
            openssl("req", *itself, "-keyout", signature, "-out", authority)
        openssl("req", *NEW_KEY, "-subj", "/CN=server", "-keyout", "key.pem", "-out", "request.pem")
        (folder / "names").write_text(f"subjectAltName={names}\n")
        signing = ("-CA", authority, "-CAkey", signature, "-CAcreateserial", "-days", DAYS, "-extfile", "names")
        openssl("x509", "-req", *signing, "-in", "request.pem", "-out", "cert.pem")
        return cls(authority=authority, file=folder / "cert.pem", key=folder / "key.pem")
