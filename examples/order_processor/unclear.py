"""For the operator: ``python -m examples.order_processor.unclear`` lists what may have been sent, and notes what was found out."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from conveyor import ConveyorError
from examples.order_processor.app import app, settings
from examples.order_processor.records import Records


def main(arguments: Sequence[str] | None = None) -> int:
    """List, or note; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.order_processor.unclear",
        description="What may have been sent or not, because a process died or an answer got lost. Without arguments: the list. "
        "Say what you found out, then send the order back: conveyor dead redrive --queue order-processing --error ORDER",
    )
    parser.add_argument("order", nargs="?", help="the order's id")
    parser.add_argument("what", nargs="?", help="e-mail or warehouse-notice")
    parser.add_argument("found", nargs="?", choices=["sent", "not-sent"], help="what you found out")
    given = parser.parse_args(arguments)
    if given.order is not None and given.found is None:
        parser.error("say what was sent or not: ORDER e-mail sent")
    try:
        return asyncio.run(
            _list() if given.order is None else _settle(given.order, given.what, sent=given.found == "sent")
        )
    except ConveyorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


async def _list() -> int:
    async with app:
        records = await _records()
        for order_id, what, why in await records.unclear():
            print(f"{order_id}\t{what}\t{why}")
    return 0


async def _settle(order_id: str, what: str, *, sent: bool) -> int:
    async with app:
        records = await _records()
        if await records.settle(order_id, what, sent=sent):
            print(f"noted: the {what} of order {order_id} was {'sent' if sent else 'not sent'}")
            return 0
    print(f"error: there is no doubt about the {what} of order {order_id}", file=sys.stderr)
    return 1


async def _records() -> Records:
    records = Records(app, longest_seconds=settings.call_timeout_seconds)
    await records.create()
    return records


if __name__ == "__main__":
    sys.exit(main())
