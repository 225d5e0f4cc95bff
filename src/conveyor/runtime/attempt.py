"""An attempt of a cpu=True handler on its way to a process of the pool, where its payload is decoded and its function is run."""

from __future__ import annotations

import functools
import inspect
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from conveyor.core.codec import Codec, codec_for, struct_for
from conveyor.core.handler import Parameter
from conveyor.core.message import Message
from conveyor.errors import HandlerError, PayloadError
from conveyor.runtime import frames
from conveyor.runtime.context import Context
from conveyor.runtime.outgoing import Emitter, Outgoing


class Undecodable(PayloadError):
    """The body is no payload of the handler; the text says why."""


class Form(msgspec.Struct, frozen=True):
    """What a body decodes into.

    Parameters:
        type: of the payload; or
        name, fields: of a job, whose parameters are the payload.
    """

    type: Any = None
    name: str = ""
    fields: tuple[Parameter, ...] | None = None

    def codec(self) -> Codec:
        """What decodes it."""
        if self.fields is None:
            return codec_for(self.type)
        return codec_for(struct_for(self.name, [(field.name, field.type, field.default) for field in self.fields]))

    def pickled(self) -> bytes | None:
        """As it travels; None where it cannot, because its type has no place in a module."""
        try:
            data = pickle.dumps(self, pickle.HIGHEST_PROTOCOL)
            pickle.loads(data)  # noqa: S301 - our own
        except Exception:  # whatever a user's type raises: it is decoded here, then
            return None
        return data


def target_of(function: Callable[..., Any]) -> str:
    """Where a process of the pool finds a handler: "module:qualified name".

    Raises:
        HandlerError: it could not be found there; says what to change.
    """
    target = f"{function.__module__}:{function.__qualname__}"
    found: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    if function.__module__ == "__main__" and not _has_file(sys.modules["__main__"]):
        raise HandlerError(
            f"handler {target} has cpu=True, but the program that defines it is no file that its processes could import; "
            "put it into a module"
        )
    if getattr(found, "function", found) is not function:  # a task has its function there
        raise HandlerError(
            f"handler {target} has cpu=True, and its processes find it by this name, but what has it is {_in_short(found)}; "
            "give it a name of its own in its module, and put @app.worker or @app.task above all other decorators"
        )
    return target


def _has_file(main: ModuleType) -> bool:
    """Whether a new process can import the main program: not where it was typed in, or came by ``-c`` or standard input."""
    return main.__spec__ is not None or Path(getattr(main, "__file__", None) or "").is_file()


def _in_short(found: object) -> str:
    return "nothing" if found is None else f"another {type(found).__name__}"


def portable(message: Message, **changes: Any) -> Message:
    """The same message, with headers that can be pickled."""
    return msgspec.structs.replace(message, headers=dict(message.headers), **changes)


@functools.cache
def _known(pickled: bytes) -> tuple[Codec, tuple[str, ...] | None]:
    """What decodes, and the names of a job's parameters."""
    form: Form = pickle.loads(pickled)  # noqa: S301 - written by our own process
    return form.codec(), None if form.fields is None else tuple(field.name for field in form.fields)


class Wanted(msgspec.Struct, frozen=True):
    """What the runner fills in.

    Parameters:
        context: names of the parameters that take the Context.
        message: of those that take the Message.
        worker: the worker's name.
        identity: names it among all applications.
        attempt: 1 on the first run.
        ahead_seconds: the runner's clock, against that of the machine.
        body_limit: bytes that no payload of an event may exceed.
    """

    context: tuple[str, ...]
    message: tuple[str, ...]
    worker: str
    identity: str
    attempt: int
    ahead_seconds: float
    body_limit: int


class Unsendable(HandlerError):
    """Stands for what a handler returned, and what cannot leave its process; it is done all the same."""


class Ran(msgspec.Struct, frozen=True):
    """What a handler with a Context returned, and what it published."""

    result: Any
    emits: Sequence[Message]


class Attempt(msgspec.Struct, frozen=True):
    """Calls a handler in a process of the pool.

    Parameters:
        form: how the payload is decoded there; None: it has been decoded, and is args and kwargs.
        body: the message's; None where nothing in the process needs it.
        message: the one being handled, without its body, which travels beside it; None where nobody needs it.
        wanted: what else the handler takes; None where that is nothing.
    """

    form: bytes | None
    body: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    message: Message | None = None
    wanted: Wanted | None = None

    def __call__(self, function: Callable[..., Any]) -> Any:
        """What the function returns or yields; a Ran where it is also given a Context or a Message."""
        args, kwargs = self.args, dict(self.kwargs)
        if self.form is not None:
            args, kwargs = _decoded(self.form, self.body)
        if self.wanted is None or self.message is None:
            return _outcome(function(*args, **kwargs))
        message, wanted = msgspec.structs.replace(self.message, body=self.body), self.wanted
        emitter = Emitter(
            Outgoing(lambda: time.time() + wanted.ahead_seconds, wanted.body_limit), message, wanted.identity
        )
        context = _context(message, wanted, emitter)
        injected = dict.fromkeys(wanted.context, context) | dict.fromkeys(wanted.message, message)
        result = _outcome(function(*args, **kwargs, **injected))
        return Ran(frames.lent(result), [portable(emitted) for emitted in emitter.messages])


def _outcome(result: Any) -> Any:
    """What a generator yields is a list on its way to the other process."""
    return list(result) if inspect.isgenerator(result) else result


def _decoded(form: bytes, body: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    codec, names = _known(form)
    try:
        payload = codec.decode(body)
    except Exception as error:
        raise Undecodable(codec.explain(error)) from None
    return ((payload,), {}) if names is None else ((), {name: getattr(payload, name) for name in names})


def _context(message: Message, wanted: Wanted, emitter: Emitter) -> Context:
    from conveyor.runtime.pool import inside

    assert inside is not None
    return Context(
        message,
        wanted.attempt,
        wanted.worker,
        wanted.identity,
        emitter,
        inside.shutting_down.is_set,
        inside.tell(),
        None,
    )
