"""What operators see and do: queues and their counts, dead letters, and what endangers messages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from conveyor.broker import DeadFilter, DeadLetter, QueueInfo
from conveyor.brokers.rabbitmq import dead
from conveyor.brokers.rabbitmq.catalog import Turn
from conveyor.brokers.rabbitmq.settle import end
from conveyor.brokers.rabbitmq.spec import Spec
from conveyor.core.message import redriven
from conveyor.errors import QueueInUse

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq import RabbitBroker

log: Final = logging.getLogger("conveyor.rabbitmq")

OLDEST_VERSION: Final = (3, 10)


class Operating:
    """The operators' side of a broker object."""

    def __init__(self, broker: RabbitBroker) -> None:
        self._broker = broker
        self._reading = Turn(broker.spawn)

    async def queues(self) -> list[QueueInfo]:
        """Every queue there is; what is in flight, and temporary, as far as this object knows."""
        for subscription in list(self._broker.subscriptions):
            await subscription.quiet()
        specs = await self._broker.all_specs()
        names = [name for spec in specs for name in (spec.name, spec.later, spec.dead, *spec.ladder, *spec.partitions)]
        counts = await self._broker.topology.counts(names)
        infos: list[QueueInfo] = []
        for spec in specs:
            if counts[spec.name] is None:
                continue  # somebody deleted it
            ready = sum((counts[name] or (0, 0))[0] for name in (spec.name, *spec.partitions))
            keyed = self._broker.keys.get(spec.name)
            receivers = [each for each in self._broker.subscriptions if each.queue == spec.name]
            ready += sum(each.stream.waiting for each in receivers)
            held = sum(1 for each in self._broker.leases.all() if each.queue == spec.name and not each.work.lost)
            moving = sum(each.mover.waiting for each in receivers if each.mover)
            later = sum((counts[name] or (0, 0))[0] for name in (spec.later, *spec.ladder))
            infos.append(
                QueueInfo(
                    name=spec.name,
                    topics=spec.topics,
                    ordered=spec.ordered,
                    max_length=spec.max_length,
                    temporary=spec.temporary,
                    lease_seconds=spec.lease_seconds,
                    ready=ready,
                    in_flight=held,
                    delayed=later + moving + sum(each.aside for each in receivers) + (keyed.waiting if keyed else 0),
                    dead=(counts[spec.dead] or (0, 0))[0],
                    oldest_seconds=None,
                    consumers=(counts[spec.later] or (0, None))[1],
                    native=spec.native,
                )
            )
        return sorted(infos, key=lambda info: info.name)

    async def purge(self, spec: Spec) -> int:
        """Delete what waits in a queue; how many."""
        queue = spec.name
        deleted = 0
        for subscription in [each for each in self._broker.subscriptions if each.queue == queue]:
            deleted += await subscription.purge()
        if queue in self._broker.keys:
            deleted += await self._broker.keys[queue].purge()
        for name in (spec.name, spec.later, *spec.ladder, *spec.partitions):
            deleted += await self._broker.topology.purge(name)
        return deleted

    async def remove(self, spec: Spec, *, discard_dead: bool) -> None:
        """A queue goes, with all that belongs to it and to nobody else."""
        broker = self._broker
        receivers = [each for each in broker.subscriptions if each.queue == spec.name]
        if not receivers and (keyed := broker.keys.pop(spec.name, None)) is not None:
            await keyed.close()
        # A quorum queue counts a consumer that is gone as long as something is in its hands: so the movers are counted, as in queues().
        movers = await broker.topology.count(spec.name if spec.passive else spec.later)
        if consumers := max(movers.consumers if movers is not None else 0, len(receivers)):
            raise QueueInUse(spec.name, consumers=consumers)
        own_dead = not spec.temporary and "dead_queue" not in spec.native
        async with self._reading.locked(await broker.connection(), f"{spec.dead}.lock"):
            dead = await broker.topology.count(spec.dead) if own_dead else None
            if dead is not None and dead.messages and not discard_dead:
                raise QueueInUse(spec.name, dead=dead.messages)
            await broker.topology.remove(spec, dead=own_dead)
        for held in [each for each in broker.leases.all() if each.queue == spec.name]:
            end(held)

    async def dead_letters(self, which: DeadFilter, limit: int, after: str) -> list[DeadLetter]:
        """A page of dead letters, oldest first, beginning behind the position after."""
        found: list[DeadLetter] = []
        for spec in await self._broker.all_specs():
            if not spec.temporary and which.queue in {None, spec.name}:
                found += await self._cemetery(spec).page(which, limit, after)
                found = sorted(found, key=lambda letter: letter.position)[:limit]
        return found

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters that came from elsewhere."""
        specs = {queue: await self._broker.known(queue) for queue in {letter.queue for letter in letters}}
        now, positions = self._broker.clock(), self._broker.positions
        batch = [dead.buried(letter, specs[letter.queue], positions.next(now)) for letter in letters]
        await self._broker.publisher.send_all(batch)

    async def redrive(self, letters: Sequence[DeadLetter]) -> int:
        """Put dead letters back into their queues; how many there still were."""

        async def put_back(taken: list[DeadLetter], spec: Spec) -> None:
            now = self._broker.clock()
            await self._broker.publisher.send_all(
                [self._broker.outgoing(redriven(letter.message), now, spec) for letter in taken]
            )

        return await self._take(letters, put_back)

    async def discard(self, letters: Sequence[DeadLetter]) -> int:
        """Delete dead letters for good; how many there still were."""

        async def forget(taken: list[DeadLetter], spec: Spec) -> None:
            log.info("%d dead letter(s) of %s discarded", len(taken), spec.name)

        return await self._take(letters, forget)

    def risks(self) -> list[str]:
        """What endangers messages or work, in sentences that say what to do."""
        found: list[str] = []
        if (complaint := old_version(self._broker.topology.version)) is not None:
            found.append(complaint)
        if self._broker.publisher.blocked is not None:
            found.append(
                f"The server takes no publishes now ({self._broker.publisher.blocked}): free memory or disk on it, "
                "or raise vm_memory_high_watermark or disk_free_limit."
            )
        movers = [(each.queue, each.mover.problem) for each in self._broker.subscriptions if each.mover is not None]
        found += [
            f"What is delayed in {queue} stays there for now: {problem}. After a crash, a single node may leave a quorum queue without "
            "a leader (rabbitmq-server#10070); have it elect one, or restart it."
            for queue, problem in movers
            if problem is not None
        ]
        if not self._broker.options.replicated and len(self._broker.options.addresses) > 1:
            found.append(
                "Classic queues live on one node of the cluster: when it is down they cannot be used, and what it loses is lost. "
                "Use quorum queues (leave ?queue_type away)."
            )
        return found

    async def _take(self, letters: Sequence[DeadLetter], use: dead.Use) -> int:
        by_queue: dict[str, set[str]] = {}
        for letter in letters:
            by_queue.setdefault(letter.queue, set()).add(letter.position)
        taken = 0
        known = {spec.name: spec for spec in await self._broker.all_specs()} if letters else {}
        for queue, positions in by_queue.items():
            if queue in known:
                taken += await self._cemetery(known[queue]).take(positions, use)
        return taken

    def _cemetery(self, spec: Spec) -> dead.Cemetery:
        return dead.Cemetery(
            spec,
            self._broker.connection,
            lambda incoming, nameless: self._broker.read(incoming, spec, nameless),
            self._reading,
        )


def old_version(version: tuple[int, int]) -> str | None:
    """What to say of a server that is too old; None of one that is not."""
    if version >= OLDEST_VERSION:
        return None
    return (
        f"RabbitMQ {'.'.join(map(str, version))} is older than {'.'.join(map(str, OLDEST_VERSION))}: its quorum queues cannot hold "
        "delayed messages safely. Update the server, or use ?queue_type=classic."
    )
