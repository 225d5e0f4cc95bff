"""Questions about the journal, asked over the broker: whichever keepers there are answer."""

from __future__ import annotations

from collections.abc import Collection

from conveyor.broker import Broker, Clock
from conveyor.core.journal import Job, JobFilter
from conveyor.core.questions import Answer


class Asker:
    """Asks the keepers of the journal; answers come to a temporary queue of its own.

    Parameters:
        broker: open.
        clock: gives Unix seconds.
    """

    def __init__(self, broker: Broker, clock: Clock) -> None: ...

    async def journey(self, id: str, *, timeout_seconds: float = 5.0) -> Answer:
        """Everything that is known about a message and all that belongs to its journey.

        Parameters:
            id: a message's or a journey's, or the beginning of one.

        Raises:
            NoKeeper: nobody keeps a journal here, or nobody answers in time.
        """
        ...

    async def jobs(
        self, which: JobFilter = JobFilter(), *, limit: int = 100, timeout_seconds: float = 5.0
    ) -> list[Job]:
        """Jobs, the newest first, without their results.

        Raises:
            NoKeeper: nobody keeps a journal here, or nobody answers in time.
        """
        ...

    async def wait(self, ids: Collection[str], *, timeout_seconds: float) -> dict[str, Job]:
        """Wait until at least one of these jobs has ended, and give all that is known about any of them (with results) by id.

        A keeper that dies meanwhile, or comes later, makes no difference. What nothing is known about is missing.

        Returns:
            As they are when the first has ended, or after timeout_seconds.
        """
        ...

    async def close(self) -> None:
        """Ask no more."""
        ...
