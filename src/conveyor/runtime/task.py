"""A task: a function that others have run by a worker."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Final, Generic, ParamSpec, Protocol, TypeVar, Unpack, overload

from conveyor.core.message import Message
from conveyor.runtime.outgoing import NO_OPTIONS, Options, Publishing
from conveyor.runtime.ticket import Office, Ticket
from conveyor.runtime.worker import Worker

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Publisher(Office, Protocol):
    """What a task needs of its application."""

    async def publish(
        self, event: object, *, require_subscriber: bool = False, **options: Unpack[Publishing]
    ) -> Message:
        """See Conveyor.publish."""
        ...


class Task(Generic[P, R]):
    """A job: a function whose own parameters are the payload. Call it to run it here, send it to have it run by a worker."""

    def __init__(self, app: Publisher, name: str, function: Callable[P, R], make: Callable[[], Worker]) -> None:
        self.name: Final = name
        self.function: Final = function
        self._app = app
        self._make = make
        self._options = NO_OPTIONS
        self.__doc__ = function.__doc__
        self.__name__ = getattr(function, "__name__", name)
        self.__wrapped__ = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here and now, as if it were no task."""
        return self.function(*args, **kwargs)

    def options(self, **options: Unpack[Publishing]) -> Task[P, R]:
        """The same task, sent with these options (delay, key, priority …); see Conveyor.publish."""
        other = Task(self._app, self.name, self.function, self._make)
        other._options = Options(**options)
        return other

    @overload
    async def send(self: Task[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> Ticket[T]: ...
    @overload
    async def send(self: Task[P, T], *args: P.args, **kwargs: P.kwargs) -> Ticket[T]: ...
    async def send(self, *args: P.args, **kwargs: P.kwargs) -> Ticket[Any]:
        """Have a worker run it with these arguments; returns when the broker durably has it.

        Raises:
            PayloadError: an argument does not fit its parameter's type.
            NoSubscriber: no queue exists for this task.
        """
        payload = self._payload(args, kwargs)
        message = await self._app.publish(payload, require_subscriber=True, **self._publishing())
        return Ticket(self._app, message.id, message)

    @overload
    def send_sync(self: Task[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> Ticket[T]: ...
    @overload
    def send_sync(self: Task[P, T], *args: P.args, **kwargs: P.kwargs) -> Ticket[T]: ...
    def send_sync(self, *args: P.args, **kwargs: P.kwargs) -> Ticket[Any]:
        """send() for code without an event loop."""
        payload = self._payload(args, kwargs)
        work = self._app.publish(payload, require_subscriber=True, **self._publishing())
        message = self._app.wait_here(work, "send_sync", f"{self.name}.send(…)")
        return Ticket(self._app, message.id, message)

    @overload
    def ticket(self: Task[P, Coroutine[Any, Any, T]], id: str) -> Ticket[T]: ...
    @overload
    def ticket(self: Task[P, T], id: str) -> Ticket[T]: ...
    def ticket(self, id: str) -> Ticket[Any]:
        """The ticket of a job that was sent before, perhaps by another program.

        Parameters:
            id: the job's: Ticket.id.
        """
        return Ticket(self._app, id, topic=self._topic)

    def _publishing(self) -> Publishing:
        return {name: getattr(self._options, name) for name in Publishing.__annotations__ if name != "topic"} | {
            "topic": self._topic
        }  # type: ignore[return-value]

    @property
    def _topic(self) -> str:
        return next(iter(self._make().codecs))

    def _payload(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        worker = self._make()
        struct = next(iter(worker.codecs.values())).type
        signature = inspect.signature(self.function)
        payload_names = set(struct.__struct_fields__)
        parameters = [parameter for name, parameter in signature.parameters.items() if name in payload_names]
        bound = signature.replace(parameters=parameters).bind(
            *args, **{k: v for k, v in kwargs.items() if k in payload_names or k not in signature.parameters}
        )
        bound.apply_defaults()
        return struct(**bound.arguments)
