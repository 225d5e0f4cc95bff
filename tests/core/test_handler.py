from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import pytest

from conveyor.core.events import EventType, event
from conveyor.core.handler import REQUIRED, Mode, Parameter, plan_task, plan_worker
from conveyor.errors import ConfigurationError, HandlerError


@event("order.created", key="order_id")
@dataclass(frozen=True)
class OrderCreated:
    order_id: str


@dataclass(frozen=True)
class PaymentTaken:
    order_id: str


class OrderFailed(msgspec.Struct):
    why: str


class Visit(TypedDict):
    page: str


class Client:
    """Something that the application hands in."""


CREATED = EventType(OrderCreated, "order.created", "order_id")
TAKEN = EventType(PaymentTaken, "payment_taken")
FAILED = EventType(OrderFailed, "order_failed")


async def charge(order: OrderCreated) -> PaymentTaken | OrderFailed | None: ...


def ship(payment: PaymentTaken, client: Client) -> None: ...


async def watch(event: OrderCreated | PaymentTaken) -> None: ...


async def import_all(orders: list[OrderCreated]) -> list[PaymentTaken]: ...  # type: ignore[empty-body]


async def stream(order: OrderCreated) -> AsyncIterator[PaymentTaken | OrderFailed]:
    yield PaymentTaken(order.order_id)


def generate(order: OrderCreated) -> Generator[PaymentTaken, None, None]:
    yield PaymentTaken(order.order_id)


def raw(body: bytes) -> None: ...


def plain(body: dict[str, Any]) -> None: ...


def page(visit: Visit) -> None: ...


def inside() -> Callable[[], None]:
    def hidden() -> None: ...

    return hidden


def silent(order: OrderCreated):  # type: ignore[no-untyped-def]  # noqa: ANN201 - people write this
    return None


def test_a_worker_receives_its_first_parameter_and_emits_what_it_returns() -> None:
    plan = plan_worker(charge)
    assert plan.function is charge
    assert (plan.mode, plan.yields, plan.batch) == (Mode.ASYNC, False, False)
    assert plan.receives == (CREATED,)
    assert plan.payload is OrderCreated
    assert plan.emits == (TAKEN, FAILED)
    assert plan.injected == ()
    assert plan.fields is None


def test_a_plain_function_runs_in_a_thread_or_on_request_in_a_process() -> None:
    assert plan_worker(ship).mode is Mode.THREAD
    assert plan_worker(page, cpu=True).mode is Mode.PROCESS


def test_the_other_parameters_are_injected() -> None:
    assert plan_worker(ship).injected == (Parameter("client", Client, REQUIRED),)


def test_a_union_of_events_is_received_under_all_their_topics() -> None:
    assert plan_worker(watch).receives == (CREATED, TAKEN)


def test_a_batch_is_a_list_of_payloads() -> None:
    plan = plan_worker(import_all, batch=True)
    assert plan.batch
    assert plan.payload is OrderCreated
    assert plan.receives == (CREATED,)
    assert plan.emits == (TAKEN,)


@pytest.mark.parametrize(
    ("function", "mode", "emits"), [(stream, Mode.ASYNC, (TAKEN, FAILED)), (generate, Mode.THREAD, (TAKEN,))]
)
def test_a_generator_emits_what_it_yields(
    function: Callable[..., Any], mode: Mode, emits: tuple[EventType, ...]
) -> None:
    plan = plan_worker(function)
    assert plan.yields
    assert (plan.mode, plan.emits) == (mode, emits)


@pytest.mark.parametrize(("function", "payload"), [(raw, bytes), (plain, dict[str, Any])])
def test_a_payload_without_a_name_of_its_own_is_received_under_a_topic_by_hand(
    function: Callable[..., Any], payload: Any
) -> None:
    assert plan_worker(function, topic="in.coming").receives == (EventType(payload, "in.coming"),)
    with pytest.raises(HandlerError, match=r"names no topic; say @app\.worker\(topic="):
        plan_worker(function)


def test_a_topic_by_hand_replaces_the_events_own_and_keeps_its_key() -> None:
    assert plan_worker(charge, topic="legacy.orders").receives == (
        EventType(OrderCreated, "legacy.orders", "order_id"),
    )


def test_a_topic_by_hand_must_be_a_topic() -> None:
    with pytest.raises(ConfigurationError, match="is no topic"):
        plan_worker(raw, topic="a b")


def test_a_function_without_a_return_annotation_emits_nothing() -> None:
    assert plan_worker(silent).emits == ()


def test_types_that_are_local_to_a_function_are_found_where_they_are_handed_in() -> None:
    @dataclass
    class Local:
        name: str

    def handle(local: Local) -> None: ...

    assert plan_worker(handle, names={"Local": Local}).payload is Local
    with pytest.raises(HandlerError, match=r"handle: the annotation 'Local' names nothing that can be found"):
        plan_worker(handle)


def test_a_jobs_own_parameters_are_its_payload_and_the_others_are_injected() -> None:
    def resize(path: Path, client: Client, width: int = 100, *, crop: bool = False) -> None: ...

    plan = plan_task(resize, injectable={Client})
    assert plan.fields == (Parameter("path", Path), Parameter("width", int, 100), Parameter("crop", bool, False))
    assert plan.injected == (Parameter("client", Client),)
    assert plan.receives == ()
    assert plan.payload is None


def no_parameter() -> None: ...
def unannotated(order) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001 - people write this
def second_unannotated(order: OrderCreated, client) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001 - the same
def stars(order: OrderCreated, *others: int) -> None: ...
def two_stars(order: OrderCreated, **others: int) -> None: ...
def number(order: int) -> None: ...
def half_a_union(order: OrderCreated | int) -> None: ...
def returns_number(order: OrderCreated) -> int: ...  # type: ignore[empty-body]
def returns_dict(order: OrderCreated) -> dict[str, Any]: ...  # type: ignore[empty-body]
def returns_numbers(order: OrderCreated) -> list[int]: ...  # type: ignore[empty-body]
def positional_only(order: OrderCreated, client: Client, /) -> None: ...
def unknown(order: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821 - which is the point


def yields_silently(order: OrderCreated):  # type: ignore[no-untyped-def]  # noqa: ANN201 - people write this
    yield 1


def yields_wrongly(order: OrderCreated) -> PaymentTaken:  # type: ignore[misc]
    yield 1


def yields_numbers(order: OrderCreated) -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (no_parameter, "takes no parameter; the first one says what it receives"),
        (unannotated, "parameter 'order' has no annotation"),
        (second_unannotated, "parameter 'client' has no annotation"),
        (stars, "others cannot be filled in"),
        (two_stars, "others cannot be filled in"),
        (number, "order: int, is no payload; use a dataclass"),
        (half_a_union, "is no payload; use a dataclass"),
        (returns_number, "returns int, which is no event"),
        (returns_dict, r"returns dict\[str, .*Any\], which is no event"),
        (returns_numbers, "returns int, which is no event"),
        (positional_only, "'client' is positional-only"),
        (unknown, "'Nowhere' names nothing that can be found"),
        (yields_silently, "needs a return annotation such as Iterator"),
        (yields_wrongly, r"write Iterator\[…\] or AsyncIterator"),
        (yields_numbers, "returns int, which is no event"),
        (functools.partial(ship, client=Client()), "is no function"),
        (Client, "is no function"),
    ],
)
def test_a_signature_that_cannot_work_is_refused_with_what_to_change(function: Any, words: str) -> None:
    with pytest.raises(HandlerError, match=words) as caught:
        plan_worker(function)
    assert str(caught.value).startswith("handler ")


def test_options_that_do_not_fit_the_signature_are_refused() -> None:
    with pytest.raises(HandlerError, match="first parameter must be a list"):
        plan_worker(charge, batch=True)
    with pytest.raises(HandlerError, match="is async and has cpu=True"):
        plan_worker(charge, cpu=True)
    with pytest.raises(HandlerError, match="'client' cannot be handed in"):
        plan_worker(ship, cpu=True)
    for out_of_reach in (inside(), lambda: None):
        with pytest.raises(
            HandlerError, match="could not find it by this name; define it with def at the top of its module"
        ):
            plan_task(out_of_reach, injectable=(), cpu=True)
    with pytest.raises(HandlerError, match="several types, so topic='x' cannot stand for all"):
        plan_worker(watch, topic="x")
    with pytest.raises(HandlerError, match="is a task and yields"):
        plan_task(generate, injectable=())
