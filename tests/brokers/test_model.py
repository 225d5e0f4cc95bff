"""Whatever happens in whatever order, every broker does what the model does."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from conveyor.broker import Broker, Clock
from conveyor.brokers import from_url
from conveyor.brokers.memory import MemoryBroker, MemoryStore
from conveyor.testing import saboteurs as by
from conveyor.testing.model import Store, machine
from conveyor.testing.saboteurs import Honest, Plot


@contextlib.contextmanager
def memory(clock: Clock) -> Iterator[Callable[[], Broker]]:
    yield partial(MemoryBroker, store=MemoryStore(), clock=clock)


@contextlib.contextmanager
def sqlite(clock: Clock) -> Iterator[Callable[[], Broker]]:
    with tempfile.TemporaryDirectory() as folder:
        yield partial(from_url, f"sqlite:///{folder}/x.queue?durability=normal", clock=clock)


# To play another broker against the model, add one line: its store, and how many games are worth their time.
STORES: Final[dict[str, tuple[Store, int]]] = {"memory": (memory, 150), "sqlite": (sqlite, 30)}


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_a_broker_does_what_the_model_does(store: tuple[Store, int]) -> None:
    make, games = store
    run_state_machine_as_test(
        machine(make),
        settings=settings(
            max_examples=games, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


SABOTEURS: Final[list[type[Honest]]] = [
    by.SettlesById,
    by.ExtendsById,
    by.CountsReleases,
    by.TakesAFailureForARelease,
    by.OrdersOnlyWhatIsReady,
    by.RedrivesToTheTopic,
    by.ReclaimsFromEverybody,
]


@pytest.mark.parametrize("saboteur", SABOTEURS, ids=lambda each: each.__name__)
def test_a_saboteur_does_not_do_what_the_model_does(saboteur: type[Honest]) -> None:
    @contextlib.contextmanager
    def sabotaged(clock: Clock) -> Iterator[Callable[[], Broker]]:
        store, plot = MemoryStore(), Plot()
        yield lambda: saboteur(MemoryBroker(store=store, clock=clock), plot)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            machine(sabotaged),
            settings=settings(
                max_examples=300,
                stateful_step_count=40,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],  # that there is a difference is enough; nobody reads the shortest
                suppress_health_check=list(HealthCheck),
            ),
        )
