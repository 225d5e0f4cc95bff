"""What handlers are given beside the message: opened once per process, in order of need, closed at the end."""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from conveyor.errors import ConfigurationError, HandlerError


@dataclass(frozen=True, slots=True)
class Provider:
    """A function that makes an object of one type, and, where it yields, cleans up behind it.

    Parameters:
        type: what it provides.
        function: plain, async, or a generator of either kind that yields once.
        needs: parameter name → the provided type that it needs itself.
    """

    type: Any
    function: Callable[..., Any]
    needs: Mapping[str, Any]


def provider_of(function: Callable[..., Any], names: Mapping[str, Any] | None = None) -> Provider:
    """The provider that a function is, by its annotations.

    Raises:
        HandlerError: the return annotation does not say what it provides, or a parameter has none.
    """
    who = f"provider {getattr(function, '__qualname__', function)}"
    hints = typing.get_type_hints(function, localns=dict(names or {}))
    provided = hints.pop("return", None)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        arguments = typing.get_args(provided)
        provided = arguments[0] if arguments else None
    if provided is None or provided is type(None):
        raise HandlerError(
            f"{who} needs a return annotation that says what it provides, such as -> AsyncIterator[httpx.AsyncClient]"
        )
    for name in inspect.signature(function).parameters:
        if name not in hints:
            raise HandlerError(
                f"{who}: parameter {name!r} has no annotation; it can only take what other providers provide"
            )
    return Provider(provided, function, hints)


async def open_all(
    providers: Mapping[Any, Provider],
    wanted: Iterable[Any],
    stack: contextlib.AsyncExitStack,
    instead: Mapping[Any, Any],
) -> dict[Any, Any]:
    """Open the wanted types and what they need.

    Parameters:
        stack: closes them, in reverse order.
        instead: objects that are there already, by type.

    Raises:
        ConfigurationError: something needs a type that nobody provides, or needs itself.
    """
    opened: dict[Any, Any] = dict(instead)

    async def open_one(kind: Any, asked_by: tuple[Any, ...]) -> Any:
        if kind in opened:
            return opened[kind]
        if kind in asked_by:
            raise ConfigurationError(
                f"providers need each other in a circle: {' → '.join(_name(k) for k in (*asked_by, kind))}"
            )
        provider = providers.get(kind)
        if provider is None:
            raise ConfigurationError(
                f"nobody provides {_name(kind)}; write a function that does and decorate it with @app.provide"
            )
        needs = {name: await open_one(need, (*asked_by, kind)) for name, need in provider.needs.items()}
        opened[kind] = await _open(provider.function, needs, stack)
        return opened[kind]

    for kind in wanted:
        await open_one(kind, ())
    return opened


async def _open(function: Callable[..., Any], needs: Mapping[str, Any], stack: contextlib.AsyncExitStack) -> Any:
    if inspect.isasyncgenfunction(function):
        return await stack.enter_async_context(contextlib.asynccontextmanager(function)(**needs))
    if inspect.isgeneratorfunction(function):
        return stack.enter_context(contextlib.contextmanager(function)(**needs))
    made = function(**needs)
    return await made if inspect.isawaitable(made) else made


def _name(kind: Any) -> str:
    return getattr(kind, "__qualname__", str(kind))
