"""A mailbox goes with whoever had it, also while it was only about to be there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from conveyor.broker import Subscription
from conveyor.brokers.sqlite import SqliteBroker
from conveyor.runtime.mailbox import Mailbox


async def test_a_receiver_that_is_cancelled_while_it_subscribes_leaves_no_queue_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = SqliteBroker(tmp_path / "shop.queue")
    await broker.open()
    subscribe, subscribed, go_on = broker.subscribe, asyncio.Event(), asyncio.Event()

    async def slowly(queue: str, prefetch: int) -> Subscription:
        subscription = await subscribe(queue, prefetch)
        subscribed.set()
        await go_on.wait()
        return subscription

    monkeypatch.setattr(broker, "subscribe", slowly)
    mailbox = Mailbox(broker, "mailbox", ("topic",), bytes)

    async def receive() -> None:
        async with mailbox.receiving():
            raise AssertionError("it was cancelled before")

    receiving = asyncio.create_task(receive())
    await subscribed.wait()
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    go_on.set()
    await mailbox.remove()
    assert await broker.queues() == []
    await broker.close()
