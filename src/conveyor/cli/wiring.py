"""An app's wiring as plain values: which worker receives and publishes what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from conveyor.core.events import EventType
from conveyor.runtime.worker import Worker


@dataclass(frozen=True, slots=True)
class Wiring:
    """Who receives and who publishes which topic.

    Parameters:
        workers: every worker that receives events, by name.
        tasks: every worker that is a job, by name.
        receivers: topic → the workers that receive it.
        publishers: topic → the workers that publish it.
    """

    workers: tuple[Worker, ...]
    tasks: tuple[Worker, ...]
    receivers: dict[str, tuple[Worker, ...]]
    publishers: dict[str, tuple[Worker, ...]]

    @property
    def topics(self) -> tuple[str, ...]:
        """Every topic, in the order of the flow: what comes from outside first."""
        waiting = [topic for topic in self.receivers if topic not in self.publishers]
        waiting += [topic for topic in (*self.receivers, *self.publishers) if topic not in waiting]
        seen: dict[str, None] = {}
        while waiting:
            topic = waiting.pop(0)
            if topic in seen:
                continue
            seen[topic] = None
            waiting[:0] = [event.topic for worker in self.receivers.get(topic, ()) for event in worker.plan.emits]
        return tuple(seen)

    def types(self, topic: str) -> list[EventType]:
        """The types that travel under a topic, without repetition."""
        found = [
            event for worker in self.publishers.get(topic, ()) for event in worker.plan.emits if event.topic == topic
        ]
        found += [
            event for worker in self.receivers.get(topic, ()) for event in worker.plan.receives if event.topic == topic
        ]
        return list(dict.fromkeys(found))

    def circles(self) -> list[tuple[str, ...]]:
        """Topics that lead back to themselves, each circle once."""
        found: dict[frozenset[str], tuple[str, ...]] = {}

        def walk(path: tuple[str, ...], done: set[str]) -> None:
            for worker in self.receivers.get(path[-1], ()):
                for event in worker.plan.emits:
                    if event.topic in path:
                        circle = path[path.index(event.topic) :]
                        found.setdefault(frozenset(circle), circle)
                    elif event.topic not in done:
                        walk((*path, event.topic), done)
            done.add(path[-1])

        done: set[str] = set()
        for topic in self.receivers:
            if topic not in done:
                walk((topic,), done)
        return list(found.values())


def wiring(workers: Iterable[Worker]) -> Wiring:
    """The wiring of these workers."""
    receivers: dict[str, tuple[Worker, ...]] = {}
    publishers: dict[str, tuple[Worker, ...]] = {}
    events: list[Worker] = []
    tasks: list[Worker] = []
    for worker in workers:
        (events if worker.plan.fields is None else tasks).append(worker)
        for event in worker.plan.receives:
            receivers[event.topic] = (*receivers.get(event.topic, ()), worker)
        for event in worker.plan.emits:
            publishers[event.topic] = (*publishers.get(event.topic, ()), worker)
    return Wiring(tuple(events), tuple(tasks), receivers, publishers)
