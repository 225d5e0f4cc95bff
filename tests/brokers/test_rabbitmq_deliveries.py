"""Deliveries on RabbitMQ when something goes wrong beside them: each is counted, settled or given back, and none is forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from conveyor.broker import Queue, Settlement
from conveyor.brokers.rabbitmq import RabbitBroker, work
from conveyor.core.message import Message
from conveyor.core.settle import DONE
from tests.brokers.test_rabbitmq import PATIENCE_SECONDS, one, opened

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ


@pytest.fixture(params=["quorum", "classic"])
def url(rabbitmq: RabbitMQ, request: pytest.FixtureRequest) -> str:
    return f"{rabbitmq.url()}?queue_type={request.param}"


# --- crashes ----------------------------------------------------------------------------------------------------------


def abort(broker: RabbitBroker) -> None:
    """As the server sees the death of its process."""
    for connection in (broker._link.connection, broker.publisher.connection):
        assert connection is not None
        connection._abort()


async def test_the_crashes_of_others_are_counted_by_a_survivor_whose_fetches_were_small(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "DOUBT_SECONDS", PATIENCE_SECONDS)
    async with opened(url) as survivor:
        await survivor.declare([Queue(name="q", topics=("t",))])
        await survivor.publish([Message("poison", "t", b"{}")])
        for crash in range(1, 5):
            async with opened(url) as victim:
                taken = await one(victim, "q")
                assert (taken.message.id, taken.crashes) == ("poison", crash - 1)
                subscription = await survivor.subscribe("q", 10)
                await survivor.publish([Message("fine", "t", b"{}")])
                [fine] = await subscription.fetch(10)  # more was allowed to come than came
                assert await survivor.settle([Settlement(fine, DONE)]) == []
                await subscription.close()
                abort(victim)
        survived = await one(survivor, "q")
        assert (survived.message.id, survived.crashes) == ("poison", 4)
