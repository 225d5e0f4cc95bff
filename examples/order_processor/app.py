"""The worker that fulfils orders: checks them, logs them, confirms them by e-mail, and has the warehouse send them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from conveyor import Conveyor, PayloadError, Reject, Retry, RetryPolicy
from examples.order_processor.calls import AtWork, NotDone, Refused, Unclear
from examples.order_processor.mail import Mailer, SimulatedMailer, SmtpMailer
from examples.order_processor.order import Order, described, problems
from examples.order_processor.records import Known, Records
from examples.order_processor.settings import DEAD_QUEUE, EXCHANGE, QUEUE, Settings
from examples.order_processor.warehouse import HttpWarehouse, SimulatedWarehouse, Warehouse, timeouts
from examples.settings import from_environment

log = logging.getLogger("order-processor")

settings = from_environment(Settings)
app = Conveyor("order-processor", broker=settings.broker_url, database=settings.database_url, migrate=True)


@dataclass(frozen=True, slots=True)
class Desk:
    """What fulfilling an order needs."""

    records: Records
    mailer: Mailer
    warehouse: Warehouse


@app.provide
async def desk() -> AsyncIterator[Desk]:
    """Opened once in each process."""
    records = Records(app, longest_seconds=settings.call_timeout_seconds)
    await records.create()
    mailer: Mailer = SimulatedMailer()
    if settings.smtp_url:
        mailer = SmtpMailer(
            settings.smtp_url,
            sender=settings.mail_from,
            recipient=settings.mail_to,
            timeout_seconds=settings.call_timeout_seconds,
        )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the address that it logs may hold a secret
    async with httpx.AsyncClient(timeout=timeouts(settings.call_timeout_seconds)) as http:
        yield Desk(
            records,
            mailer,
            HttpWarehouse(settings.warehouse_url, http) if settings.warehouse_url else SimulatedWarehouse(),
        )


@app.worker(
    queue=QUEUE,
    dead_queue=DEAD_QUEUE,
    exchange=EXCHANGE,
    exchange_type=settings.rabbitmq_exchange_type,
    routing_key=settings.rabbitmq_routing_key,
    queue_type=settings.rabbitmq_queue_type,
    passive=settings.rabbitmq_passive,
    retry=RetryPolicy(
        attempts=settings.order_attempts,
        initial=settings.order_retry_seconds,
        maximum=settings.order_longest_retry_seconds,
    ),
    concurrency=settings.prefetch,
    prefetch=settings.prefetch,
    lease=settings.lease_seconds,
)
async def fulfil(order: Order, desk: Desk) -> None:
    """Do everything that a paid order calls for; the message is acknowledged when all of it is done."""
    if wrong := problems(order, datetime.now(UTC)):
        raise PayloadError("; ".join(wrong))
    log.info(described(order))
    known = await desk.records.begin(order)
    if known is Known.FULFILLED:
        log.info("order %s was fulfilled before; nothing is done again", order.order_id)
        return
    if known is Known.ANOTHER:
        raise Reject(f"another order has the id {order.order_id} already, with other contents")
    await _send_all(order, desk)
    await desk.records.finish(order)
    log.info("order %s is fulfilled", order.order_id)


async def _send_all(order: Order, desk: Desk) -> None:
    """Send everything, each thing once; trouble with one does not hold up the others.

    Raises:
        Retry: something was not sent, and may be later.
        Reject: something cannot be sent, or nobody can tell whether it was.
    """
    later: list[NotDone] = []
    never: list[Refused | Unclear] = []
    for what, send, repeatable in (
        ("e-mail", desk.mailer.confirm, False),
        ("warehouse-notice", desk.warehouse.notify, settings.warehouse_knows_keys),
    ):
        try:
            await desk.records.send_once(order, what, send, repeatable=repeatable)
        except AtWork as error:  # the rest is left to it, too, or each would wait for the other
            raise Retry(str(error), after=error.after_seconds) from error
        except NotDone as error:
            later.append(error)
        except (Refused, Unclear) as error:
            never.append(error)
    if later:
        pauses = [error.after_seconds for error in later if error.after_seconds is not None]
        raise Retry("; ".join(map(str, [*later, *never])), after=max(pauses, default=None))
    if never:
        raise Reject("; ".join(map(str, never)))
