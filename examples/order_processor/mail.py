"""The confirmation e-mail: sent by SMTP where there is a server, else only written to the log."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from datetime import UTC, datetime
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.utils import format_datetime
from typing import Final, Protocol
from urllib.parse import unquote, urlsplit

import aiosmtplib

from examples.order_processor.calls import NotDone, Refused, Unclear
from examples.order_processor.order import Order, rupees

log = logging.getLogger("order-processor")

PORTS: Final = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
REFUSED_FOR_GOOD: Final = range(500, 600)
"""Answers that another try would get as well (RFC 5321, 4.2.1)."""


class Mailer(Protocol):
    """Sends confirmations."""

    async def confirm(self, order: Order) -> None:
        """Tell the customer that the order is on its way.

        Raises:
            NotDone: no e-mail was sent.
            Refused: none can be sent to this customer.
            Unclear: perhaps one was sent.
        """
        ...


class SimulatedMailer:
    """Says in the log what it would send."""

    async def confirm(self, order: Order) -> None:
        log.info("e-mail (simulated): order %s of user %s is confirmed", order.order_id, order.user_id)


class SmtpMailer:
    """Sends through a mail server, one connection for each e-mail.

    Parameters:
        url: ``smtp://user:password@host:port``; smtp+starttls and smtps are encrypted.
        sender: the address that it comes from.
        recipient: the address that it goes to; ``{userId}`` in it stands for the customer, whose address only the mail server knows.
        timeout_seconds: how long the server may take; half of it until it asks for the e-mail.
    """

    def __init__(self, url: str, *, sender: str, recipient: str, timeout_seconds: float) -> None:
        parts = urlsplit(url)
        self._host: Final = parts.hostname or "localhost"
        self._port: Final = parts.port or PORTS[parts.scheme]
        self._user: Final = unquote(parts.username) if parts.username else None
        self._password: Final = unquote(parts.password) if parts.password else None
        self._place: Final = f"{self._host}:{self._port}"
        self._scheme: Final = parts.scheme
        self._sender: Final = sender
        self._recipient: Final = recipient
        self._timeout_seconds: Final = timeout_seconds

    async def confirm(self, order: Order) -> None:
        to = self._address(order)
        message = self._message(order, to)
        server = aiosmtplib.SMTP(
            hostname=self._host,
            port=self._port,
            use_tls=self._scheme == "smtps",
            start_tls=self._scheme == "smtp+starttls",
            timeout=self._timeout_seconds,
        )
        try:
            await self._hand_over(server, message, to.addr_spec)
        finally:
            # Nothing more has to be said. A QUIT could fail, and TLS may wait long for the other side's goodbye.
            if isinstance(server.transport, asyncio.WriteTransport):
                server.transport.abort()
            server.close()

    async def _hand_over(self, server: aiosmtplib.SMTP, message: EmailMessage, to: str) -> None:
        try:
            # Well before anybody above loses patience, who could not tell that nothing was sent yet.
            async with asyncio.timeout(self._timeout_seconds / 2):
                await server.connect()
                if self._user is not None:
                    await server.login(self._user, self._password or "")
                await server.mail(self._sender)
                await server.rcpt(to)
        except (aiosmtplib.SMTPException, OSError) as error:
            # A sender or a password that the server does not like is not the order's fault.
            for_good = isinstance(error, aiosmtplib.SMTPRecipientRefused) and error.code in REFUSED_FOR_GOOD
            kind = Refused if for_good else NotDone
            raise kind(f"the mail server {self._place} takes no e-mail to {to}: {_said(error)}") from error
        try:
            await server.data(message.as_bytes(policy=SMTP_POLICY))
        except aiosmtplib.SMTPResponseException as error:
            kind = Refused if error.code in REFUSED_FOR_GOOD else NotDone
            raise kind(f"the mail server {self._place} refused the e-mail to {to}: {_said(error)}") from error
        except (aiosmtplib.SMTPException, OSError) as error:
            raise Unclear(f"the mail server {self._place} did not say what became of it: {_said(error)}") from error

    def _address(self, order: Order) -> Address:
        local, _, domain = self._recipient.replace("{userId}", order.user_id).rpartition("@")
        try:
            address = Address(username=local, domain=domain)
            address.addr_spec.encode("ascii")
        except (ValueError, MessageError) as error:
            raise Refused(f"no e-mail can be addressed to user {order.user_id!r}: {error}") from error
        return address

    def _message(self, order: Order, to: Address) -> EmailMessage:
        message = EmailMessage(policy=SMTP_POLICY)
        message["To"] = to
        message["From"] = self._sender
        message["Subject"] = f"Your order {order.order_id} is confirmed"
        message["Date"] = format_datetime(datetime.now(UTC))
        # The same on every attempt, so that mail systems can tell a repeat, too.
        message["Message-ID"] = f"<{hashlib.sha256(order.order_id.encode()).hexdigest()[:32]}@order-processor>"
        lines = [f"  {item.name} x {item.quantity} at {rupees(item.price)}" for item in order.items]
        text = ["Thank you for your order.", "", *lines, "", f"Total: {rupees(order.total)}"]
        message.set_content(
            "\n".join([*text, f"Order: {order.order_id}", f"Payment: {order.payment_id}", ""]), cte="quoted-printable"
        )
        return message


def _said(error: Exception) -> str:
    if isinstance(error, aiosmtplib.SMTPResponseException):
        return f"{error.code} {error.message}"
    return str(error) or ("it is silent, or slow" if isinstance(error, TimeoutError) else type(error).__name__)
