"""The confirmation e-mail, against a real mail server: what was sent, what certainly was not, and what nobody can tell."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from email import message_from_bytes
from email.policy import default
from pathlib import Path

import msgspec
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from examples.order_processor.calls import CallFailed, NotDone, Refused, Unclear
from examples.order_processor.mail import SmtpMailer
from examples.order_processor.order import Order
from servers.server import find_free_port
from tests.examples.order_processor.conftest import GIVEN, MailServer

ORDER = msgspec.convert(GIVEN, type=Order)


def mailer(url: str, *, timeout_seconds: float = 30.0, recipient: str = "{userId}@customers.example") -> SmtpMailer:
    return SmtpMailer(url, sender="orders@example.com", recipient=recipient, timeout_seconds=timeout_seconds)


def content(envelope: Envelope) -> bytes:
    assert isinstance(envelope.content, bytes)
    return envelope.content


async def test_it_tells_the_customer_what_was_bought(mail: MailServer) -> None:
    await mailer(mail.url).confirm(ORDER)
    (envelope,) = mail.envelopes
    assert envelope.mail_from == "orders@example.com"
    assert envelope.rcpt_tos == ["507f1f77bcf86cd799439011@customers.example"]
    letter = message_from_bytes(content(envelope), policy=default)
    assert letter["Subject"] == "Your order ORD-1702554000123 is confirmed"
    text = letter.get_content()
    assert "Linux Administration x 1 at ₹1999" in text
    assert "Total: ₹1999" in text


async def test_a_repeat_would_have_the_same_message_id(mail: MailServer) -> None:
    for _ in range(2):
        await mailer(mail.url).confirm(ORDER)
    ids = {message_from_bytes(content(each), policy=default)["Message-ID"] for each in mail.envelopes}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("answer", "kind"), [("451 greylisted", NotDone), ("452 full", NotDone), ("554 no spam here", Refused)]
)
async def test_an_e_mail_that_the_server_refuses_was_not_sent(
    mail: MailServer, answer: str, kind: type[CallFailed]
) -> None:
    mail.answers.append(answer)
    with pytest.raises(kind, match=answer):
        await mailer(mail.url).confirm(ORDER)


@pytest.mark.parametrize(("answer", "kind"), [("550 no such user", Refused), ("450 mailbox busy", NotDone)])
async def test_a_customer_that_the_server_does_not_know_gets_nothing(
    mail: MailServer, answer: str, kind: type[CallFailed]
) -> None:
    mail.recipient_answers.append(answer)
    with pytest.raises(kind, match=answer):
        await mailer(mail.url).confirm(ORDER)
    assert mail.tried == 0


async def test_a_server_that_is_away_was_asked_nothing() -> None:
    with pytest.raises(NotDone, match="takes no e-mail"):
        await mailer(f"smtp://127.0.0.1:{find_free_port()}").confirm(ORDER)


async def test_a_server_without_encryption_is_not_trusted_with_what_should_be_encrypted(mail: MailServer) -> None:
    with pytest.raises(NotDone, match="STARTTLS"):
        await mailer(mail.url.replace("smtp:", "smtp+starttls:")).confirm(ORDER)
    assert mail.tried == 0


async def test_an_answer_that_does_not_come_leaves_it_open(mail: MailServer) -> None:
    mail.hold.clear()
    with pytest.raises(Unclear, match="did not say what became of it"):
        await mailer(mail.url, timeout_seconds=0.5).confirm(ORDER)
    assert mail.accepted == ["ORD-1702554000123"]


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *answers: str) -> None:
    """Say hello, answer so many commands, then hang up."""
    for answer in answers:
        writer.write(f"{answer}\r\n".encode())
        await reader.readline()
    writer.close()


@asynccontextmanager
async def serving(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_server_that_hangs_up_before_it_has_the_e_mail_was_told_nothing() -> None:
    async with serving(lambda reader, writer: talk(reader, writer, "220 hello", "250 hello")) as url:
        with pytest.raises(NotDone):
            await mailer(url).confirm(ORDER)


async def test_a_server_that_hangs_up_when_it_has_the_e_mail_leaves_it_open() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await talk_until_data(reader, writer)
        writer.close()

    async def talk_until_data(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in ("220 hello", "250 hello", "250 sender", "250 recipient", "354 go on"):
            writer.write(f"{answer}\r\n".encode())
            await reader.readline()
        while await reader.readline() != b".\r\n":
            pass

    async with serving(serve) as url:
        with pytest.raises(Unclear):
            await mailer(url).confirm(ORDER)


async def test_a_silent_server_costs_no_more_than_the_time_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"smtp://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(NotDone):
            await mailer(url, timeout_seconds=0.2).confirm(ORDER)


async def test_a_silent_server_is_given_up_while_others_are_still_patient() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"smtp://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(NotDone, match="it is silent, or slow"):
            async with asyncio.timeout(5):
                await mailer(url, timeout_seconds=5).confirm(ORDER)


@pytest.mark.parametrize("user", ["ümlaut", "日本"])
async def test_a_user_who_cannot_be_addressed_is_said_to_be_so(mail: MailServer, user: str) -> None:
    with pytest.raises(Refused, match="no e-mail can be addressed to user"):
        await mailer(mail.url).confirm(msgspec.structs.replace(ORDER, user_id=user))


async def test_an_id_cannot_add_a_recipient_or_a_header(mail: MailServer) -> None:
    order = msgspec.structs.replace(ORDER, user_id='a>,b"c\\d<x@evil.example', order_id="1 Bcc: x@evil.example")
    await mailer(mail.url).confirm(order)
    (envelope,) = mail.envelopes
    assert len(envelope.rcpt_tos) == 1
    assert envelope.rcpt_tos[0].endswith("@customers.example")


class Guard:
    """Lets one user in, and notes who asked."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def __call__(
        self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, auth_data: LoginPassword
    ) -> AuthResult:
        self.asked.append(auth_data == LoginPassword(b"orders", b"s3:cret"))
        return AuthResult(success=self.asked[-1], handled=False)


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[tuple[Guard, str, Path]]:
    """A mail server that speaks TLS from the first byte; its guard, where it is, and its certificate."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    request += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(request, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    guard, port = Guard(), find_free_port()
    controller = Controller(
        MailServer(),
        hostname="127.0.0.1",
        port=port,
        ssl_context=context,
        authenticator=guard,
        auth_require_tls=False,  # it is below the protocol here, so the protocol does not know
    )
    controller.start()
    yield guard, f"127.0.0.1:{port}", certificate
    controller.stop()


async def hung_up(place: str) -> None:
    """Wait until no connection to the server is left."""
    there = f":{int(place.split(':')[1]):04X} 01"  # a peer's port, and ESTABLISHED (proc_net_tcp)
    async with asyncio.timeout(30):
        while there in await asyncio.to_thread(Path("/proc/net/tcp").read_text):
            await asyncio.sleep(0.01)


async def test_it_logs_in_over_tls(encrypted: tuple[Guard, str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    guard, place, certificate = encrypted
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    await mailer(f"smtps://orders:s3%3Acret@{place}").confirm(ORDER)
    await hung_up(place)
    assert guard.asked == [True]


async def test_a_wrong_password_is_no_fault_of_the_order(
    encrypted: tuple[Guard, str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, place, certificate = encrypted
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(NotDone, match="535") as refused:
        await mailer(f"smtps://orders:wrong@{place}").confirm(ORDER)
    await hung_up(place)
    assert "wrong" not in str(refused.value)


async def test_a_server_that_nobody_vouches_for_is_told_nothing(encrypted: tuple[Guard, str, Path]) -> None:
    guard, place, _ = encrypted
    with pytest.raises(NotDone, match="certificate"):
        await mailer(f"smtps://orders:s3%3Acret@{place}").confirm(ORDER)
    await hung_up(place)
    assert guard.asked == []
