"""A handler's signature, turned into a plan once, when it is registered."""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from conveyor.core.events import EventType, event_type, is_event
from conveyor.errors import HandlerError

REQUIRED: Final = inspect.Parameter.empty
"""Stands for "no default" in a field."""

_LISTS: Final = (list, tuple, abc.Sequence, abc.Iterable, abc.Collection)
_ITERATORS: Final = (abc.Iterator, abc.Generator, abc.Iterable)
_ASYNC_ITERATORS: Final = (abc.AsyncIterator, abc.AsyncGenerator, abc.AsyncIterable)


class Mode(enum.StrEnum):
    """Where a handler runs."""

    ASYNC = "async"
    """``async def``: in the runner's event loop."""
    THREAD = "thread"
    """``def``: in a thread of the runner."""
    PROCESS = "process"
    """``def`` with ``cpu=True``: in a process of a pool."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a handler by name and type; default is REQUIRED where it has none."""

    name: str
    type: Any
    default: Any = REQUIRED


@dataclass(frozen=True, slots=True)
class Plan:
    """How a handler is called, and what that does.

    Parameters:
        function: what the user wrote.
        mode: where it runs.
        yields: it is a generator: every value it yields is an event.
        receives: the events it receives; for a job, or a payload without a type of its own, empty.
        payload: the type of the whole payload (one type or a union); None for a job.
        batch: it receives a list of payloads.
        fields: a job's payload, parameter by parameter; None for a worker.
        injected: the parameters that the runner fills in by their type.
        emits: the events that it may return or yield.
        silent: it may also return None.
        returns: the type of a job's result; Any where its annotations do not say, or for a worker.
    """

    function: Callable[..., Any]
    mode: Mode
    yields: bool
    receives: tuple[EventType, ...]
    payload: Any
    batch: bool
    fields: tuple[Parameter, ...] | None
    injected: tuple[Parameter, ...]
    emits: tuple[EventType, ...]
    silent: bool = True
    returns: Any = Any


def plan_worker(
    function: Callable[..., Any],
    *,
    topic: str | None = None,
    batch: bool = False,
    cpu: bool = False,
    portable: abc.Container[Any] = (),
    names: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a worker: its first parameter is the payload, its return type what it publishes.

    Parameters:
        function: ``def``, ``async def`` or a generator of either kind.
        topic: given by hand; a payload of dict or bytes needs one.
        batch: the first parameter is a list of payloads.
        cpu: it runs in a process of its own.
        portable: types that can be handed in there.
        names: what annotations may name beside the function's globals (types local to another function).

    Raises:
        HandlerError: the signature cannot work; says what to change.
    """
    who = _who(function)
    parameters, returns = _signature(function, who, names)
    if not parameters:
        raise HandlerError(
            f"{who} takes no parameter; the first one says what it receives: def {function.__name__}(order: OrderCreated)"
        )
    first, *others = parameters
    if inspect.signature(function).parameters[first.name].kind is inspect.Parameter.KEYWORD_ONLY:
        raise HandlerError(
            f"{who}: its first parameter, {first.name!r}, is keyword-only; the payload is handed in by position"
        )
    injected = [Parameter(p.name, _plain(p.type), p.default) for p in others]
    payload = _bare(first.type)
    if batch:
        payload = _item_of(payload, _LISTS)
        if payload is None:
            raise HandlerError(f"{who} has batch=…, so its first parameter must be a list: {first.name}: list[…]")
    receives = _received(payload, who, first.name, topic)
    mode, yields = _mode(function, who, cpu=cpu)
    if mode is Mode.PROCESS:
        _check_process(function, injected, who, portable)
    emits = _emitted(returns, who, yields=yields)
    silent = yields or not emits or type(None) in _members(_bare(returns))
    return Plan(function, mode, yields, receives, payload, batch, None, tuple(injected), emits, silent)


def plan_task(
    function: Callable[..., Any],
    *,
    injectable: abc.Container[Any],
    cpu: bool = False,
    portable: abc.Container[Any] = (),
    names: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a job: its own parameters are the payload, except those of an injectable type.

    What it returns is its result: it is kept for whoever sent it, and not published.

    Raises:
        HandlerError: the signature cannot work; says what to change.
    """
    who = _who(function)
    parameters, returns = _signature(function, who, names)
    fields = tuple(p for p in parameters if not _is_in(_plain(p.type), injectable))
    injected = [Parameter(p.name, _plain(p.type), p.default) for p in parameters if _is_in(_plain(p.type), injectable)]
    mode, yields = _mode(function, who, cpu=cpu)
    if yields:
        raise HandlerError(f"{who} is a task and yields; a task returns its result (a worker may yield events)")
    if mode is Mode.PROCESS:
        _check_process(function, injected, who, portable)
    if "return" not in function.__annotations__:
        returns = Any
    return Plan(function, mode, False, (), None, False, fields, tuple(injected), (), returns=returns)


def _signature(function: Callable[..., Any], who: str, names: Mapping[str, Any] | None) -> tuple[list[Parameter], Any]:
    if not inspect.isroutine(function) or inspect.isclass(function):
        raise HandlerError(f"{who} is no function; decorate a def or async def")
    try:
        hints = typing.get_type_hints(function, localns=dict(names or {}), include_extras=True)
    except NameError as error:
        raise HandlerError(
            f"{who}: the annotation {error.name!r} names nothing that can be found; import or define it above"
        ) from error
    except TypeError as error:
        raise HandlerError(f"{who}: an annotation is no type: {error}") from error
    parameters: list[Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise HandlerError(f"{who}: {stars}{parameter.name} cannot be filled in; name every parameter")
        if parameter.name not in hints:
            raise HandlerError(
                f"{who}: parameter {parameter.name!r} has no annotation; its type says what is handed in: {parameter.name}: SomeType"
            )
        if parameters and parameter.kind is parameter.POSITIONAL_ONLY:
            raise HandlerError(f"{who}: parameter {parameter.name!r} is positional-only; only the first one may be")
        parameters.append(Parameter(parameter.name, hints[parameter.name], parameter.default))
    return parameters, hints.get("return", type(None))


def _mode(function: Callable[..., Any], who: str, *, cpu: bool) -> tuple[Mode, bool]:
    if inspect.isasyncgenfunction(function) or inspect.iscoroutinefunction(function):
        if cpu:
            raise HandlerError(f"{who} is async and has cpu=True; CPU work in a process is a plain def")
        return Mode.ASYNC, inspect.isasyncgenfunction(function)
    return (Mode.PROCESS if cpu else Mode.THREAD), inspect.isgeneratorfunction(function)


def _received(payload: Any, who: str, name: str, topic: str | None) -> tuple[EventType, ...]:
    members = _members(payload)
    if all(is_event(member) for member in members):
        if topic is not None and len(members) > 1:
            raise HandlerError(f"{who} receives several types, so topic={topic!r} cannot stand for all; leave it out")
        found = tuple(event_type(member) for member in members)
        if len({event.topic for event in found}) < len(found):
            raise HandlerError(
                f"{who} receives several types of one topic ({found[0].topic}), which it could not tell apart"
            )
        return found if topic is None else (EventType(found[0].type, topic, found[0].key),)
    if payload is bytes or payload is dict or typing.get_origin(payload) is dict:
        if topic is None:
            raise HandlerError(f'{who} receives {_name(payload)}, which names no topic; say @app.worker(topic="…")')
        return (EventType(payload, topic, None),)
    raise HandlerError(
        f"{who}: the first parameter, {name}: {_name(payload)}, is no payload; "
        "use a dataclass, msgspec.Struct, pydantic model or TypedDict (or dict or bytes with topic=…)"
    )


def _emitted(returns: Any, who: str, *, yields: bool) -> tuple[EventType, ...]:
    leaf = _bare(returns)
    if yields:
        leaf = _item_of(returns, _ITERATORS + _ASYNC_ITERATORS)
        if leaf is None:
            if returns is type(None):
                raise HandlerError(f"{who} yields, so it needs a return annotation such as Iterator[OrderCreated]")
            raise HandlerError(
                f"{who} yields, but is annotated -> {_name(returns)}; write Iterator[…] or AsyncIterator[…]"
            )
    emits = []
    for member in _members(leaf):
        item = _item_of(member, _LISTS) if not yields else None
        for event in _members(item if item is not None else member):
            if event is type(None):
                continue
            if not is_event(event):
                raise HandlerError(
                    f"{who} returns {_name(event)}, which is no event; what a worker returns is published. "
                    "Return a dataclass, Struct, model or TypedDict, or nothing"
                )
            emits.append(event_type(event))
    if len([event for event in dict.fromkeys(emits) if issubclass(event.type, dict)]) > 1:
        raise HandlerError(
            f"{who} returns several TypedDicts, which are plain dicts when it runs and cannot be told apart; "
            "use dataclasses, or context.publish(event, topic=…)"
        )
    return tuple(dict.fromkeys(emits))


def _check_process(
    function: Callable[..., Any], injected: abc.Sequence[Parameter], who: str, portable: abc.Container[Any]
) -> None:
    for parameter in injected:
        if not _is_in(parameter.type, portable):
            raise HandlerError(
                f"{who} has cpu=True and runs in another process, so {parameter.name!r} cannot be handed in; "
                "take the payload, the Message and the Context only"
            )
    if "<" in function.__qualname__:  # <locals>, <lambda>
        raise HandlerError(
            f"{who} has cpu=True, and its processes could not find it by this name; define it with def at the top of its module"
        )


def _bare(kind: Any) -> Any:
    """The T of Annotated[T, …]."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def _plain(kind: Any) -> Any:
    """The T of T | None and of Annotated[T, …]: how a parameter may be written that is filled in here, and left out elsewhere."""
    members = [member for member in _members(_bare(kind)) if member is not type(None)]
    return _bare(members[0]) if len(members) == 1 else kind


def _members(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _item_of(kind: Any, containers: tuple[Any, ...]) -> Any:
    """The T of list[T], Iterator[T], AsyncGenerator[T, None]; None where kind is no such thing."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    return arguments[0] if origin in containers and arguments else None


def _is_in(kind: Any, injectable: abc.Container[Any]) -> bool:
    try:
        return kind in injectable
    except TypeError:  # an unhashable annotation is no injectable type
        return False


def _name(kind: Any) -> str:
    return getattr(kind, "__qualname__", None) or str(kind) if not typing.get_args(kind) else str(kind)


def _who(function: Callable[..., Any]) -> str:
    return f"handler {getattr(function, '__qualname__', None) or repr(function)}"
