"""``conveyor move``: everything that is in one broker goes into another one, whatever kinds they are."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from cyclopts import App, Parameter

from conveyor import brokers
from conveyor.broker import Broker, DeadFilter, Delivery, Feature, Queue, QueueInfo, Receipt, Settlement
from conveyor.cli import EXIT_CODES
from conveyor.cli.connection import connected
from conveyor.cli.terminal import FAILED, INTERRUPTED, OK, Output, out, table
from conveyor.config import masked
from conveyor.core.settle import DONE, Release
from conveyor.errors import BrokerError, ConfigurationError, PublishFailed
from conveyor.runtime.control import internal

BATCH: Final = 500
"""Messages per step, and what a kill repeats at most: many enough that commits cost little, few enough that the bar moves."""
LOOK_SECONDS: Final = 1.0
"""A queue that gives nothing for so long is looked at, whether it is empty."""
FRUITLESS_LOOKS: Final = 5
"""So often a queue that is not empty may give nothing before it is left as it is: a broker needs a moment to see that whoever held
something is dead."""
LEASE_MARGIN_SECONDS: Final = 10.0
"""So long after a lease has ended, its message is given back everywhere."""
PLAIN = Output()

command = App(
    name="move",
    help_epilogue=f"""Examples:
  conveyor move --from sqlite:///shop.queue --to redis://localhost --dry-run
  conveyor move --from redis://localhost --to amqp://localhost --queue shop.pay
  conveyor move --from amqp://old --to amqp://new --json

Stop the applications first. Say --to as they will have it, with its options.

A queue that the new broker has is used as it is there; one that it lacks is
created as the old one has it. Only RabbitMQ knows its own settings (exchange,
dead-letter queue, queue type): where an application has some and comes from
another kind of broker, start it once on the new one, stop it, then move.

What is not due yet keeps its time, keys keep their order, dead letters their
reason; attempts that failed are counted from zero. A message leaves the old
broker when the new one has it: Ctrl-C ends after the batch that is on its
way, and after a kill at most {BATCH} messages are there twice, with the same
ids. Run it again to go on; of a queue with order it waits first until the
leases of what a killed move had are over.

{EXIT_CODES}""",
)


@command.default
def move(
    *,
    from_: Annotated[str, Parameter(name="--from")],
    to: str,
    queue: tuple[str, ...] = (),
    while_consuming: bool = False,
    dry_run: bool = False,
    output: Output = PLAIN,
) -> int:
    """Move queues, delayed messages and dead letters from one broker to another.

    Parameters:
        from_: URL of the broker that is emptied.
        to: URL of the broker that gets it all.
        queue: Only this queue; may be given several times. Default: every queue.
        while_consuming: Even where workers receive from these queues; they take what they can get meanwhile.
        dry_run: Only say what there is to move.
    """
    if is_same(from_, to):
        raise ConfigurationError("--from and --to are the same broker")
    return asyncio.run(_move(from_, to, queue, output, while_consuming=while_consuming, dry_run=dry_run))


PORTS: Final = {"amqp": 5672, "amqps": 5671, "redis": 6379, "rediss": 6379}
PLAIN_SCHEMES: Final = {"amqps": "amqp", "rediss": "redis"}
LOCAL: Final = frozenset({"", "localhost", "127.0.0.1", "::1"})


def is_same(one: str, other: str) -> bool:
    """Whether two URLs name the same queues, however they are spelled; a cluster is known by any of its hosts.

    Who enters, and over TLS or not, makes no difference, nor does another exchange on RabbitMQ: queues are known by name.
    """
    (place, hosts), (other_place, other_hosts) = _place(one), _place(other)
    return place == other_place and bool(hosts & other_hosts)


def _place(url: str) -> tuple[tuple[str, str, str], frozenset[str]]:
    """A URL's scheme, path and namespace in their one spelling, and its hosts."""
    parts = urlsplit(url)
    scheme = PLAIN_SCHEMES.get(parts.scheme, parts.scheme)
    path, namespace = unquote(parts.path), ""
    hosts = parts.netloc.rpartition("@")[2].split(",")
    if scheme in {"redis", "unix"}:
        options = parse_qs(parts.query)
        namespace = options.get("namespace", ["conveyor"])[0]
        database = (path.strip("/") if scheme == "redis" else options.get("db", [""])[0]).lstrip("0")
        path = os.path.realpath(path) if scheme == "unix" else ""
        path = f"{path}/{database}"
    elif scheme == "amqp":
        path = unquote(parts.path[1:]) or "/"
    elif scheme == "sqlite":
        path = os.path.realpath(path[1:])
    return (scheme, path, namespace), frozenset(_host(each, PORTS.get(parts.scheme)) for each in hosts)


def _host(text: str, default_port: int | None) -> str:
    """A host and its port in their one spelling; ports that are the scheme's own are all the same."""
    try:
        parts = urlsplit(f"//{text}")
        name, port = (parts.hostname or "").rstrip("."), parts.port or default_port
    except ValueError:  # whoever opens it says so
        return text
    return f"{'localhost' if name in LOCAL else name}:{'' if port == default_port else port}"


@dataclass(slots=True)
class Moved:
    """What became of one queue."""

    queue: QueueInfo
    messages: int = 0
    dead: int = 0
    left: int = 0
    """Messages that could not be had: in the hands of a worker, or of a process that died."""
    waits: bool = False
    """Its messages stay, because somebody has some of them, and they would be overtaken."""
    twice: int = 0
    """Messages that the new broker has, and the old one may give out again: their leases had ended."""


async def _move(
    old: str, new: str, names: Sequence[str], output: Output, *, while_consuming: bool, dry_run: bool
) -> int:
    async with connected(old) as source:
        chosen = _chosen(await source.queues(), names, output)
        _check(chosen, brokers.from_url(new).missing, while_consuming=while_consuming or dry_run)
        moved = [Moved(each) for each in chosen]
        interrupted = False
        if not dry_run:
            async with connected(new, create=True) as destination:
                await _prepare(destination, chosen)
                with _told_to_stop() as told, output.progress() as bar:
                    task = bar.add_task("moving", total=sum(each.ready + each.delayed + each.dead for each in chosen))
                    mover = Mover(source, destination, told, lambda number: bar.advance(task, number))
                    for each in moved:
                        if each.queue.ordered and not while_consuming:
                            await mover.wait_until_still(each, output.note)
                        await mover.move(each)
                interrupted = told.is_set()
    if output.json:
        output.document(as_json(old, new, moved, dry_run=dry_run, interrupted=interrupted))
    else:
        _print(moved, output, dry_run=dry_run, interrupted=interrupted)
    if interrupted:
        return INTERRUPTED
    return FAILED if any(each.left for each in moved) else OK


class Mover:
    """Carries batches over, until it is told to stop."""

    def __init__(
        self, source: Broker, destination: Broker, told: asyncio.Event, advance: Callable[[int], object]
    ) -> None:
        self._source = source
        self._destination = destination
        self._told = told
        self._advance = advance

    async def wait_until_still(self, moved: Moved, say: Callable[[str], None]) -> None:
        """Wait until nobody has messages of the queue: what is behind the oldest of a key must not overtake it.

        Whoever died with some, a move that was killed for example, has them until their leases end. Who lives on keeps them: then
        the messages stay where they are.
        """
        name, loop = moved.queue.name, asyncio.get_running_loop()
        end = loop.time() + moved.queue.lease_seconds + LEASE_MARGIN_SECONDS
        said = False
        while (info := await _info(self._source, name)).in_flight and not self._told.is_set():
            if loop.time() > end:
                moved.left, moved.waits = info.ready + info.delayed + info.in_flight, True
                say(
                    f"{name}: somebody alive has {info.in_flight:,} of its messages; its order would be lost, so they all stay"
                )
                return
            if not said:
                said = True
                say(
                    f"{name}: waiting for up to {moved.queue.lease_seconds:g} s until the leases of {info.in_flight:,} messages end, "
                    "which somebody had who was killed, or has still: its keys are to keep their order"
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._told.wait()

    async def move(self, moved: Moved) -> None:
        """Everything of one queue."""
        if not moved.waits:
            await self._messages(moved)
        await self._dead_letters(moved)

    async def _messages(self, moved: Moved) -> None:
        name = moved.queue.name
        subscription = await self._source.subscribe(name, BATCH, early=True)
        fetching: asyncio.Task[list[Delivery]] | None = None
        try:
            fruitless = 0
            while not self._told.is_set() and fruitless < FRUITLESS_LOOKS:
                fetching = fetching or asyncio.create_task(subscription.fetch(BATCH), name=f"fetching from {name}")
                await asyncio.wait([fetching], timeout=LOOK_SECONDS)  # a server far away may need longer, and goes on
                if not fetching.done():
                    info = await _info(self._source, name)
                    moved.left = info.ready + info.delayed + info.in_flight
                    if not moved.left:
                        break
                    fruitless += 1
                    continue
                fruitless = 0
                batch, fetching = fetching.result(), None
                moved.twice += await self._carry(moved.queue, batch)
                moved.messages += len(batch)
                self._advance(len(batch))
        finally:
            if fetching is not None:
                fetching.cancel()
                await asyncio.wait([fetching])
            await subscription.close()

    async def _carry(self, queue: QueueInfo, batch: Sequence[Delivery]) -> int:
        """Put a batch into the new broker, and take it out of the old one; how many the old one may have none the less.

        What the new one refuses stays, and on an ordered queue what is behind it of its key.
        """
        async with held(self._source, batch, queue.lease_seconds):
            arrived, failed = await self._put(queue, batch)
        lost = await self._source.settle(
            [Settlement(each, DONE if each.receipt in arrived else Release(each.message.due)) for each in batch]
        )
        twice = sum(each.receipt in arrived for each in lost)
        if failed is not None:
            also = f"; the old broker may give out {twice} of the others again, under their ids" if twice else ""
            raise BrokerError(
                f"{queue.name}: {failed}; what the new broker does not have is still in the old one: mend it, and run this again{also}"
            ) from failed
        return twice

    async def _put(self, queue: QueueInfo, batch: Sequence[Delivery]) -> tuple[set[Receipt], BrokerError | None]:
        """Put a batch into the new broker; the receipts of what it has, and what went wrong."""
        arrived: set[Receipt] = set()
        stuck: set[str | None] = set()
        failed: BrokerError | None = None
        for turn in turns(batch, ordered=queue.ordered):
            going = [each for each in turn if each.message.key not in stuck]
            missing: set[str] = set()
            try:
                if going:
                    await self._destination.publish([each.message for each in going], queue=queue.name)
            except PublishFailed as error:
                failed, missing = error, {*error.refused, *error.unknown}
            except BrokerError as error:
                return arrived, error
            arrived |= {each.receipt for each in going if each.message.id not in missing}
            if queue.ordered:
                stuck |= {each.message.key for each in going if each.message.id in missing} - {None}
        return arrived, failed

    async def _dead_letters(self, moved: Moved) -> None:
        which = DeadFilter(queue=moved.queue.name)
        buried: set[str] = set()
        while not self._told.is_set() and (page := await self._source.dead_letters(which, limit=BATCH)):
            new = [letter for letter in page if letter.position not in buried]  # the old broker may keep some at first
            await self._destination.bury(new)
            buried.update(letter.position for letter in new)
            if not await self._source.discard(page):
                raise BrokerError(f"{moved.queue.name}: the old broker does not let go of its dead letters")
            moved.dead += len(new)
            self._advance(len(new))


def turns(batch: Sequence[Delivery], *, ordered: bool) -> list[list[Delivery]]:
    """A batch in parts, in each of which an id says which message is meant; where there is order, no two of a key are in one.

    Each key keeps its order, so that what refuses one message can stop the next.
    """
    found: list[list[Delivery]] = [[]]
    after_id: Counter[str] = Counter()
    after_key: Counter[str] = Counter()
    for each in batch:
        id, key = each.message.id, each.message.key if ordered else None
        turn = max(after_id[id], 0 if key is None else after_key[key])
        after_id[id] = turn + 1
        if key is not None:
            after_key[key] = turn + 1
        if turn == len(found):
            found.append([])
        found[turn].append(each)
    return found


@contextlib.asynccontextmanager
async def held(broker: Broker, batch: Sequence[Delivery], lease_seconds: float) -> AsyncIterator[None]:
    """The leases of a batch do not end inside the block, however slow the other broker is."""

    async def extend() -> None:
        while True:
            await asyncio.sleep(lease_seconds / 3)
            with contextlib.suppress(BrokerError):  # the next one may come through before the leases end
                await broker.extend(batch)

    beating = asyncio.create_task(extend())
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


@contextlib.contextmanager
def _told_to_stop() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C or SIGTERM sets, instead of ending the program in the middle of a batch."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    try:
        yield told
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _chosen(found: Sequence[QueueInfo], names: Sequence[str], output: Output) -> list[QueueInfo]:
    """The queues that are meant. A temporary one goes with its owner, not with its broker; Conveyor's own stay where they are."""
    known = [each.name for each in found if not internal(each.name)]
    for name in names:
        if internal(name):
            raise BrokerError(f"{name} is Conveyor's own, and of no use on another broker")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'none'}"
            raise BrokerError(f"there is no queue {name!r}; {hint}")
    chosen = [each for each in found if each.name in (names or known)]
    for each in chosen:
        if each.temporary:
            output.note(f"{each.name} is temporary: it stays with the process that has it")
    return [each for each in chosen if not each.temporary]


def _check(chosen: Sequence[QueueInfo], missing: Mapping[Feature, str], *, while_consuming: bool) -> None:
    """Refuse what would go wrong, before anything moves."""
    busy = [each for each in chosen if each.consumers]
    if busy and not while_consuming:
        raise BrokerError(
            "workers receive from "
            + ", ".join(f"{each.name} ({each.consumers})" for each in busy)
            + "; stop their applications, or say --while-consuming (what was killed, a move for example, counts as one for up to a minute)"
        )
    for feature, needing in (
        (Feature.DELAY, [each.name for each in chosen if each.delayed]),
        (Feature.ORDER, [each.name for each in chosen if each.ordered]),
        (Feature.BOUND, [each.name for each in chosen if each.max_length is not None]),
    ):
        if needing and feature in missing:
            raise BrokerError(
                f"{', '.join(needing)}: the new broker lacks {feature} ({missing[feature]}); choose another one, or leave these out"
            )


async def _prepare(destination: Broker, chosen: Sequence[QueueInfo]) -> None:
    """Create the queues that the new broker lacks. One that it has is as its application wants it there, and stays so.

    Raises:
        BrokerError: one that it has cannot hold what would come.
    """
    there = {each.name: each for each in await destination.queues()}
    for each in chosen:
        if each.name in there:
            _check_fits(each, there[each.name])
    lacking = [each for each in chosen if each.name not in there]
    if lacking:
        await destination.declare([_declaration(each) for each in lacking])


def _check_fits(coming: QueueInfo, there: QueueInfo) -> None:
    """Refuse a queue of the new broker in which messages would lose their order, or be dropped, or vanish."""
    number = coming.ready + coming.delayed + coming.in_flight
    wrong = ""
    if there.ordered != coming.ordered:
        kinds = {True: "ordered by key", False: "not ordered"}
        wrong = f"it is {kinds[there.ordered]} there, and {kinds[coming.ordered]} on the old one"
    elif there.temporary:
        wrong = "it is temporary there"
    elif there.max_length is not None and there.max_length < number:
        wrong = f"it holds {there.max_length:,} messages there at most, and {number:,} would come"
    if wrong:
        raise BrokerError(
            f"the new broker has a queue {coming.name!r} that does not fit: {wrong}; remove it, or leave this one out"
        )


def _declaration(info: QueueInfo) -> Queue:
    return Queue(
        name=info.name,
        topics=info.topics,
        ordered=info.ordered,
        max_length=info.max_length,
        lease_seconds=info.lease_seconds,
        native=info.native,
    )


async def _info(broker: Broker, name: str) -> QueueInfo:
    return next(each for each in await broker.queues() if each.name == name)


def _print(moved: Sequence[Moved], output: Output, *, dry_run: bool, interrupted: bool) -> None:
    if not moved:
        output.say("there is no queue to move")
        return
    if dry_run:
        numbers = ("ready", "delayed", "in flight", "dead")
        rows = [
            (each.name, f"{each.ready:,}", f"{each.delayed:,}", f"{each.in_flight:,}", f"{each.dead:,}")
            for each in (moved_one.queue for moved_one in moved)
        ]
        out().print(table(("queue", *numbers), rows, right=numbers))
        output.say("nothing was moved: this was --dry-run")
        return
    counted = ("messages", "dead letters", "left")
    carried = [(each.queue.name, f"{each.messages:,}", f"{each.dead:,}", f"{each.left:,}") for each in moved]
    out().print(table(("queue", *counted), carried, right=counted))
    if interrupted:
        output.note("stopped on the way: every message is in one of the two brokers; run it again to go on", "yellow")
    elif any(each.left for each in moved):
        output.note("what is left is in somebody's hands; run it again when that is over", "yellow")
    if twice := sum(each.twice for each in moved):
        output.note(
            f"{twice:,} messages may be there twice, with the same ids: their leases had ended when the new broker had them",
            "yellow",
        )


def as_json(old: str, new: str, moved: Sequence[Moved], *, dry_run: bool, interrupted: bool) -> dict[str, Any]:
    """What --json prints."""
    return {
        "from": masked(old),
        "to": masked(new),
        "dry_run": dry_run,
        "interrupted": interrupted,
        "queues": [
            {
                "name": each.queue.name,
                "ready": each.queue.ready,
                "delayed": each.queue.delayed,
                "in_flight": each.queue.in_flight,
                "dead": each.queue.dead,
                "moved": each.messages,
                "moved_dead": each.dead,
                "left": each.left,
                "twice": each.twice,
            }
            for each in moved
        ],
    }
