"""The shop's web process: takes orders, shows them, and tells watchers what changes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID, uuid4

from fastapi import FastAPI, Header, HTTPException, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from conveyor import ConveyorError, Watch
from examples.orders.app import app, record, settings
from examples.orders.events import OrderChanged, OrderCreated
from examples.orders.model import CATALOGUE, NewOrder, Order, OrderEvent, Product, Status
from examples.orders.tables import (
    OrderRow,
    count_active,
    create_tables,
    read_history,
    read_order,
    read_recent,
)

PAGE: Final = Path(__file__).parent / "page"
LARGEST_BODY: Final = 64 * 1024
"""Bytes; the largest order that the rules allow is smaller."""
PROBE_SECONDS: Final = 3.0
"""A broker or database that does not answer for so long is not there."""
LOOK_AGAIN_SECONDS: Final = 5.0
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

log = logging.getLogger("shop.web")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Connect, and run the workers unless other processes do."""
    async with app:
        await create_tables(app)
        async with app.running() if settings.runs_workers else app:
            yield


async def prepare() -> None:
    """Try whether broker and database can be used, and create what is missing in them.

    Raises:
        ConveyorError: says what is wrong, and what to do.
    """
    async with app:
        await create_tables(app)


class Guard:
    """Adds the security headers to every answer, and refuses bodies that no order needs."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > LARGEST_BODY:
                raise HTTPException(413, f"An order has at most {LARGEST_BODY} bytes")
            return message

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] == "http":
            await self._inner(scope, bounded, guarded)
        else:
            await self._inner(scope, receive, send)


web = FastAPI(title="Conveyor shop", lifespan=lifespan, docs_url=None, redoc_url=None)
web.add_middleware(Guard)
web.mount("/assets", StaticFiles(directory=PAGE))


class Details(BaseModel):
    """An order with its history, oldest entry first."""

    order: Order
    events: list[OrderEvent]


class Page(BaseModel):
    """Some orders, newest first; next is what ``before`` has to be for the following page, null on the last one."""

    orders: list[Order]
    next: str | None


class Health(BaseModel):
    """Whether the shop can do its work."""

    status: str
    event_bus: str
    active_orders: int | None


class Products(BaseModel):
    """What the shop sells."""

    products: list[Product]


class StatusUpdate(BaseModel):
    """What a watcher receives: at once, and after every change."""

    type: str = "status_update"
    order: Order


@web.post("/orders")
async def place_order(
    new: NewOrder,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200, pattern=r"^[!-~]+$")] = None,
) -> Order:
    """Take an order. A repeat with the same Idempotency-Key gets the first order, as it was created."""
    fingerprint = hashlib.sha256(new.model_dump_json().encode()).hexdigest()
    try:
        async with app.transaction() as tx:
            if first := await placed_before(tx.session, idempotency_key, fingerprint):
                return first
            now = datetime.now(UTC)
            row = OrderRow(
                id=str(uuid4()),
                customer_email=new.customer_email,
                items=tuple(new.items),
                total_amount=new.total_amount,
                status=Status.PENDING,
                created_at=now,
                updated_at=now,
                idempotency_key=idempotency_key,
                fingerprint=fingerprint,
            )
            tx.session.add(row)
            await tx.session.flush()
            await record(tx, row, "order_created", "Order placed")
            await tx.publish(OrderCreated(row.id))
            return Order.model_validate(row)
    except IntegrityError:  # the same key at the same moment: the other one was first
        async with app.ledger.session() as session:
            if first := await placed_before(session, idempotency_key, fingerprint):
                return first
        raise


async def placed_before(session: AsyncSession, idempotency_key: str | None, fingerprint: str) -> Order | None:
    """The order that was placed with this key, as it was then."""
    if idempotency_key is None:
        return None
    row = await session.scalar(select(OrderRow).where(OrderRow.idempotency_key == idempotency_key))
    if row is None:
        return None
    if row.fingerprint != fingerprint:
        why = "This Idempotency-Key was used for another order; use a new one"
        raise HTTPException(422, [{"type": "idempotency_key", "loc": ["header", "Idempotency-Key"], "msg": why}])
    return Order.model_validate(row).model_copy(update={"status": Status.PENDING, "updated_at": row.created_at})


@web.get("/orders/{order_id}")
async def show_order(order_id: str) -> Details:
    """An order and its history."""
    async with app.ledger.session() as session:
        order = await read_order(session, order_id) if is_id(order_id) else None
        if order is None:
            raise HTTPException(404, "Order not found")
        return Details(order=order, events=await read_history(session, order_id))


@web.get("/orders")
async def list_orders(limit: Annotated[int, Query(ge=1, le=100)] = 20, before: UUID | None = None) -> Page:
    """Recent orders, newest first."""
    async with app.ledger.session() as session:
        orders = await read_recent(session, limit + 1, None if before is None else str(before))
    return Page(orders=orders[:limit], next=orders[limit - 1].id if len(orders) > limit else None)


@web.get("/products")
async def list_products() -> Products:
    """What the shop sells."""
    return Products(products=list(CATALOGUE.values()))


@web.websocket("/ws/orders/{order_id}")
async def watch_order(socket: WebSocket, order_id: str) -> None:
    """Send an order's state at once, and after every change, until the watcher goes away."""
    await socket.accept()
    changes = app.watch(OrderChanged, where=lambda change: change.order_id == order_id, buffer=len(Status))
    async with changes:  # before the state is read, so that no change falls in between
        order = await find(order_id)
        if order is None:
            await socket.close(4404, "Order not found")
            return
        display = Display(socket, order)
        async with asyncio.TaskGroup() as tasks:
            sending = [tasks.create_task(display.follow(changes)), tasks.create_task(display.look_again())]
            while (await socket.receive())["type"] != "websocket.disconnect":
                pass  # a watcher has nothing to say
            for task in sending:
                task.cancel()


class Display:
    """What one watcher has been shown of an order."""

    def __init__(self, socket: WebSocket, order: Order) -> None:
        self._socket = socket
        self._shown = order

    async def follow(self, changes: Watch[OrderChanged]) -> None:
        """Show the order, then each change of it."""
        await self._send()
        async for change in changes:
            update = {"status": change.status, "updated_at": change.updated_at}
            await self._show(self._shown.model_copy(update=update))

    async def look_again(self) -> None:
        """Now and then look at the order's row, which is the truth: news of a change is lost when a broker fails."""
        while not self._shown.status.is_final:
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            await self._show(await find(self._shown.id) or self._shown)

    async def _show(self, order: Order) -> None:
        if order.status.rank > self._shown.status.rank:
            self._shown = order
            await self._send()

    async def _send(self) -> None:
        try:
            await self._socket.send_text(StatusUpdate(order=self._shown).model_dump_json())
        except WebSocketDisconnect:
            pass  # the watcher is gone, as whoever receives from it will see


async def find(order_id: str) -> Order | None:
    """An order as it is now."""
    if not is_id(order_id):
        return None
    async with app.ledger.session() as session:
        return await read_order(session, order_id)


def is_id(text: str) -> bool:
    """Whether text has the form of an order's id."""
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


@web.get("/health")
async def health(response: Response) -> Health:
    """Whether the broker and the database answer, and how many orders are under way."""
    connected, active = False, None
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await app.broker.queues()
        connected = True
    except (ConveyorError, TimeoutError) as error:
        log.warning("the broker does not answer: %s", error)
    try:
        async with asyncio.timeout(PROBE_SECONDS), app.ledger.session() as session:
            active = await count_active(session)
    except (SQLAlchemyError, TimeoutError) as error:
        log.warning("the database does not answer: %s", error)
    well = connected and active is not None
    response.status_code = 200 if well else 503
    return Health(
        status="healthy" if well else "unhealthy",
        event_bus="connected" if connected else "disconnected",
        active_orders=active,
    )


@web.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page."""
    return FileResponse(PAGE / "index.html")


@web.exception_handler(RequestValidationError)
async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """Say which field is wrong and why; what was sent is not repeated."""
    found: list[dict[str, Any]] = [{key: problem[key] for key in ("type", "loc", "msg")} for problem in error.errors()]
    return JSONResponse({"detail": found}, 422)


@web.exception_handler(ConveyorError)
@web.exception_handler(SQLAlchemyError)
async def unavailable(_: Request, error: Exception) -> JSONResponse:
    """Nothing was done, and trying again may help."""
    log.error("cannot serve: %s", error)
    return JSONResponse(
        {"detail": "The shop cannot do that right now; try again in a moment"}, 503, {"Retry-After": "2"}
    )
