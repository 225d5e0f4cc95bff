"""Where a Redis URL leads."""

from __future__ import annotations

import re
import ssl
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from conveyor.brokers.redis.link import Address
from conveyor.errors import ConfigurationError

_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
_TLS_OPTIONS: Final[tuple[str, ...]] = ("cafile", "certfile", "keyfile", "verify")


def address_of(url: str, default_namespace: str) -> tuple[Address, str]:
    """The server's address, and the namespace on it.

    Raises:
        ConfigurationError: the URL has parts that make no sense here; the text has no password in it.
    """
    parts = urlsplit(url)
    here = f"{parts.scheme}://{(parts.netloc.rpartition('@')[2] or parts.path)}"
    try:
        port = parts.port or 6379
    except ValueError:
        raise ConfigurationError(f"{here}: the port is no number from 1 to 65535") from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    namespace = options.pop("namespace", default_namespace)
    if not _NAMESPACE.fullmatch(namespace):
        raise ConfigurationError(f"{here}: a namespace is 1 to 100 letters, digits, _ . : or -, not {namespace!r}")
    tls = _tls(parts.scheme, {name: options.pop(name) for name in _TLS_OPTIONS if name in options}, here)
    path, database = None, parts.path.strip("/")
    if parts.scheme == "unix":
        path, database = unquote(parts.path), options.pop("db", "0")
    if parts.fragment or (parts.scheme == "unix" and len(path or "") < 2):
        raise ConfigurationError(
            f"{here}: a Redis URL is redis://[user:password@]host[:port][/database] or unix:///path/of/the/socket"
        )
    if options:
        known = f"namespace, {', '.join(_TLS_OPTIONS)}" if tls is not None else "namespace, and db of a unix socket"
        raise ConfigurationError(f"{here}: unknown parameter {next(iter(options))!r}; known are {known}")
    if not (database or "0").isdecimal():
        raise ConfigurationError(f"{here}: the database is a number, not {database!r}")
    address = Address(
        host=unquote(parts.hostname or "localhost"),
        port=port,
        path=path,
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password is not None else None,
        database=int(database or "0"),
        tls=tls,
    )
    return address, namespace


def _tls(scheme: str, options: dict[str, str], here: str) -> ssl.SSLContext | None:
    """How to encrypt and whom to trust: the system's authorities, or those of a file."""
    if scheme != "rediss":
        if options:
            raise ConfigurationError(f"{here}: {next(iter(options))} is for rediss://; {scheme}:// has no TLS")
        return None
    certfile, keyfile = options.get("certfile"), options.get("keyfile")
    if keyfile and not certfile:
        raise ConfigurationError(f"{here}: keyfile belongs to the certificate of a certfile, and there is none")
    verify = options.get("verify", "yes")
    if verify not in {"yes", "no"}:
        raise ConfigurationError(f"{here}: verify is yes or no, not {verify!r}")
    try:
        context = ssl.create_default_context(cafile=options.get("cafile"))
        if certfile:
            context.load_cert_chain(certfile, keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigurationError(f"{here}: the files for TLS cannot be used: {error}") from error
    if verify == "no":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
