"""The warehouse: notified over HTTP where it has an address, else only in the log."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, Protocol
from urllib.parse import quote

import httpx

from examples.order_processor.calls import NotDone, Refused, Unclear
from examples.order_processor.order import Order

log = logging.getLogger("order-processor")

LATER: Final = frozenset({408, 409, 423, 425, 429, 503})
"""Answers that ask for another try: too slow, at work on the same key, locked, too early, too many, not now."""
LONGEST_PAUSE_SECONDS: Final = 3600.0


class Warehouse(Protocol):
    """Sends goods."""

    async def notify(self, order: Order) -> None:
        """Ask the warehouse to send an order.

        Raises:
            NotDone: it does not know of the order.
            Refused: it will not take the order.
            Unclear: perhaps it knows of the order.
        """
        ...


class SimulatedWarehouse:
    """Says in the log what it would ask for."""

    async def notify(self, order: Order) -> None:
        count = len(order.items)
        log.info(
            "warehouse (simulated): send order %s, %d %s", order.order_id, count, "item" if count == 1 else "items"
        )


class HttpWarehouse:
    """Posts orders to an API, each with a key of its own, by which the API knows a repeat.

    Parameters:
        url: where orders are posted to.
        http: has its time-outs, as timeouts() gives them.
    """

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self._url: Final = url
        self._http: Final = http

    async def notify(self, order: Order) -> None:
        lines = [{"sku": item.sku, "name": item.name, "quantity": item.quantity} for item in order.items]
        try:
            answer = await self._http.post(
                self._url,
                json={"orderId": order.order_id, "userId": order.user_id, "items": lines},
                headers={"Idempotency-Key": key(order)},
            )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NotDone(f"the warehouse cannot be reached: {str(error) or type(error).__name__}") from error
        except httpx.TransportError as error:
            raise Unclear(f"the warehouse did not answer: {str(error) or type(error).__name__}") from error
        if answer.is_success:
            return
        said = f"the warehouse answered {answer.status_code} {answer.reason_phrase}".rstrip()
        after_seconds = pause_seconds(answer.headers.get("Retry-After", ""), datetime.now(UTC))
        if answer.status_code in LATER:
            raise NotDone(said, after_seconds=after_seconds)
        if answer.is_server_error:
            raise Unclear(said, after_seconds=after_seconds)
        raise Refused(said)


def timeouts(seconds: float) -> httpx.Timeout:
    """How long each part of a call may take, where whoever calls waits for so long.

    What comes before the request (a free connection, the way there, TLS) ends well before that: then it is known that nothing was sent.
    """
    return httpx.Timeout(seconds, pool=seconds / 4, connect=seconds / 4)


def key(order: Order) -> str:
    """The order's key in the warehouse: its id, in characters that a header can carry."""
    return quote(order.order_id, safe="")


def pause_seconds(text: str, now: datetime) -> float | None:
    """What a Retry-After header asks for (RFC 9110, 10.2.3); None where it asks for nothing sensible."""
    try:
        wait = float(text) if text.isdecimal() else (parsedate_to_datetime(text) - now).total_seconds()
    except (TypeError, ValueError):
        return None
    return min(max(0.0, wait), LONGEST_PAUSE_SECONDS)
