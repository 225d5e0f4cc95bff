"""Background loops: they end when they are told to, whatever their last words are."""

from __future__ import annotations

import asyncio

from conveyor.errors import BrokerFull
from conveyor.runtime.loop import Loops
from tests.examples.beside import PATIENCE_SECONDS


async def test_a_loop_that_cannot_put_its_things_in_order_ends_all_the_same() -> None:
    loops, begun = Loops(), asyncio.Event()

    async def listen() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            raise BrokerFull("the disk is full")

    async with asyncio.timeout(PATIENCE_SECONDS):
        loops.start("listen", listen)
        await begun.wait()
        await loops.stop()
    assert "listen" not in loops
