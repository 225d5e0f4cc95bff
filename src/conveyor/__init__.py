"""Event-driven workers that lose nothing and repeat nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conveyor.app import Conveyor
from conveyor.core.events import event
from conveyor.core.jobs import Job
from conveyor.core.message import Message
from conveyor.core.retry import NO_RETRY, RetryPolicy
from conveyor.errors import (
    BrokerError,
    BrokerFull,
    BrokerUnavailable,
    ConfigurationError,
    ConveyorError,
    HandlerError,
    JobCancelled,
    JobError,
    JobFailed,
    JobTimeout,
    NoSubscriber,
    PayloadError,
    PublishFailed,
    Reject,
    ResultNotKept,
    Retry,
)
from conveyor.runtime.call import Call, Middleware, Next
from conveyor.runtime.carry import carried
from conveyor.runtime.context import Context
from conveyor.runtime.pull import Pull, Pulled
from conveyor.runtime.task import Task
from conveyor.runtime.ticket import Ticket
from conveyor.runtime.watch import Watch

if TYPE_CHECKING:
    from conveyor.runtime.transaction import Transaction

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - by concept
    # the application
    "Conveyor",
    "Task",
    "event",
    # jobs that were sent
    "Ticket",
    "Job",
    # what handlers take
    "Message",
    "Context",
    "Transaction",
    # what handlers decide
    "Retry",
    "Reject",
    "RetryPolicy",
    "NO_RETRY",
    # around handlers
    "Call",
    "Middleware",
    "Next",
    "carried",
    # taking messages one by one
    "Pull",
    "Pulled",
    # looking on
    "Watch",
    # errors
    "ConveyorError",
    "ConfigurationError",
    "HandlerError",
    "PayloadError",
    "NoSubscriber",
    "BrokerError",
    "BrokerUnavailable",
    "BrokerFull",
    "PublishFailed",
    "JobError",
    "JobFailed",
    "JobCancelled",
    "JobTimeout",
    "ResultNotKept",
]


def __getattr__(name: str) -> Any:
    """Transaction comes with SQLAlchemy, so it is imported when it is asked for."""
    if name != "Transaction":
        raise AttributeError(f"module 'conveyor' has no attribute {name!r}")
    try:
        from conveyor.runtime.transaction import Transaction
    except ModuleNotFoundError as error:
        from conveyor.errors import MissingExtra

        raise MissingExtra("Transaction", "ledger") from error
    return Transaction
