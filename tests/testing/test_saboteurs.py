"""The conformance suite catches what it claims to: each saboteur by the promises that it breaks, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Final

import pytest

from conveyor.broker import Feature
from conveyor.brokers.memory import MemoryBroker, MemoryStore
from conveyor.testing import saboteurs as by
from conveyor.testing.clock import turned_memory
from conveyor.testing.promises import PROMISES, Ended, Makers, Result, World, promise, prove, run
from conveyor.testing.saboteurs import SABOTEURS, Honest, Saboteur, sabotage
from tests.brokers.modes import MODES

PATIENCE_SECONDS: Final = 0.5
"""Under a turned clock everything comes at once; waiting longer only makes the broken ones slow."""
SILENCE_SECONDS: Final = 5.0
"""How long what never comes is waited for on a real broker."""
SIDE_BY_SIDE: Final = 10
"""Saboteurs on one real broker at a time."""
REAL: Final = {mode: makers for mode, makers in MODES.items() if not mode.startswith("memory")}

CAUGHT_BY: Final[Mapping[type[Honest], str]] = {
    by.LosesSome: "a_large_batch_arrives_whole",
    by.RepeatsSome: "a_large_batch_arrives_whole",
    by.ReturnsTooSoon: "a_publish_that_returned_outlives_its_publisher",
    by.ReversesBatches: "a_batch_keeps_its_order",
    by.HidesTheUnheard: "a_message_that_no_queue_receives_is_reported",
    by.DropsHeaders: "every_field_of_the_envelope_survives",
    by.GivesATopicToOneQueue: "every_queue_of_a_topic_gets_a_copy",
    by.NeverWakes: "a_fetch_waits_for_a_message",
    by.FetchesOnWhenCancelled: "a_cancelled_fetch_leaves_nothing_behind",
    by.GivesOneTooMany: "a_fetch_gives_no_more_than_its_limit",
    by.CountsNothing: "a_retry_counts_as_an_attempt",
    by.ForgetsErrors: "a_retry_counts_as_an_attempt",
    by.KeepsWhatIsDone: "a_done_message_is_gone",
    by.LosesEmits: "a_done_publishes_what_it_emits",
    by.EmitsBeforeItLooks: "a_lost_lease_emits_nothing",
    by.CountsReleases: "a_release_does_not_count",
    by.TakesAFailureForARelease: "a_retry_counts_as_an_attempt",
    by.DropsTheDead: "a_dead_letter_is_kept_whole",
    by.ShortensTracebacks: "a_dead_letter_is_kept_whole",
    by.SettlesById: "a_lost_lease_cannot_settle",
    by.ExtendsById: "a_lost_lease_cannot_be_extended",
    by.AcceptsSilently: "a_second_settlement_is_lost_and_does_nothing",
    by.NeverExtends: "an_extended_lease_holds",
    by.LeasesForEver: "an_ended_lease_redelivers_and_counts",
    by.ReclaimsFromEverybody: "a_reclaim_touches_nobody_else",
    by.NeverReclaims: "what_a_dead_owner_held_is_reclaimed_at_once",
    by.IgnoresDueTimes: "what_is_not_due_lets_others_pass",
    by.RetriesAtOnce: "a_retry_comes_when_it_is_due",
    by.IgnoresPriorities: "higher_priorities_come_first",
    by.IgnoresOrder: "a_key_has_one_message_out_at_a_time",
    by.OrdersOnlyWhatIsReady: "order_is_kept_during_back_off",
    by.IgnoresBounds: "a_full_queue_drops_its_oldest",
    by.DropsTheNewest: "a_full_queue_drops_its_oldest",
    by.KeepsTemporaryQueues: "a_temporary_queue_vanishes_with_its_owner",
    by.RedrivesACopy: "a_redriven_message_starts_anew",
    by.RedrivesToTheTopic: "a_redriven_message_goes_to_its_own_queue_only",
    by.MatchesAnyError: "dead_letters_are_found_by_what_is_known",
    by.ForgetsThePage: "dead_letters_come_in_pages",
    by.PurgesTheHeld: "a_purge_deletes_what_waits",
    by.LosesTheHeldOnClose: "what_a_closed_broker_held_comes_back_uncounted",
    by.PublishesToEverybody: "a_message_for_one_queue_reaches_no_other",
    by.AcceptsForNobody: "a_queue_that_does_not_exist_is_refused",
    by.NobodyIsEarly: "an_early_receiver_gets_what_is_not_due",
    by.ForgetsDueTimes: "an_early_receiver_gets_what_is_not_due",
    by.HurriesWhatIsReleased: "what_was_taken_early_and_released_waits_for_its_time",
    by.ReversesFetches: "an_early_receiver_gets_a_key_in_its_order",
    by.BuriesWithoutReason: "a_dead_letter_from_elsewhere_is_kept_whole",
    by.BuriesAnywhere: "dead_letters_of_an_unknown_queue_are_refused",
    by.ForgetsDeclarations: "a_queue_tells_how_it_is_declared",
    by.HidesTheRemoved: "a_removed_queue_is_gone",
    by.KeepsWhatWasRemoved: "a_removed_queue_leaves_nothing_behind",
    by.RemovesTheDead: "dead_letters_keep_their_queue",
    by.PanicsWithoutReason: "risks_are_told_in_sentences",
}


async def the_suite_on(saboteur: Saboteur, patience_seconds: float) -> list[Result]:
    """All promises side by side, each on a store of its own."""
    makers = [sabotage(turned_memory(patience_seconds=patience_seconds), saboteur) for _ in PROMISES]
    return await asyncio.gather(*map(prove, PROMISES.values(), makers))


@pytest.mark.parametrize("saboteur", SABOTEURS, ids=lambda each: each.__name__)
async def test_a_saboteur_is_caught(saboteur: type[Honest]) -> None:
    results = await the_suite_on(saboteur, PATIENCE_SECONDS)
    failed = {result.promise.name for result in results if result.ended is Ended.FAILED}
    assert CAUGHT_BY[saboteur] in failed, f"{saboteur.__doc__} Caught by: {sorted(failed)}"


@pytest.mark.parametrize("makers", REAL.values(), ids=REAL)
async def test_every_saboteur_is_caught_on_a_real_broker(
    makers: Callable[[pytest.FixtureRequest], Makers], request: pytest.FixtureRequest
) -> None:
    """By the promise that catches it on memory. What the broker lacks, nobody can sabotage there."""
    here, turns = makers(request), asyncio.Semaphore(SIDE_BY_SIDE)
    missing = set(here.broker().missing)

    async def escapes(saboteur: type[Honest]) -> str | None:
        broken = PROMISES[CAUGHT_BY[saboteur]]
        if broken.needs & missing:
            return None
        # Only where the fault is a silence, it is caught by a wait that ends; a slow machine must not pass for a catch.
        on_memory = await prove(broken, sabotage(turned_memory(patience_seconds=PATIENCE_SECONDS), saboteur))
        silent = "waited" in on_memory.error
        for patience in (SILENCE_SECONDS, here.patience_seconds) if silent else (here.patience_seconds,):
            async with turns:
                result = await prove(broken, sabotage(replace(here, patience_seconds=patience), saboteur))
            if caught := result.ended is Ended.FAILED and "a broker to open" not in result.error:
                break
        return None if caught else f"{saboteur.__name__} at {broken.name}: {result.ended} {result.error}"

    found = await asyncio.gather(*map(escapes, SABOTEURS))
    assert [each for each in found if each is not None] == []


async def test_an_honest_broker_is_not_accused() -> None:
    for result in await the_suite_on(Honest, 30.0):
        assert result.ended is not Ended.FAILED, result.trace


async def test_the_suite_runs_areas_and_promises_by_name_and_tells_each_result() -> None:
    told: list[Result] = []
    results = await run(turned_memory(), ["priority", "a_done_message_is_gone"], tell=told.append)
    assert told == results
    assert {result.promise.area for result in results} == {"priority", "settling"}
    assert sum(result.promise.area == "settling" for result in results) == 1
    with pytest.raises(ValueError, match="neither a promise nor an area: no_such"):
        await run(turned_memory(), ["no_such"])


async def test_what_a_broker_lacks_is_skipped_with_its_reason_and_the_rest_is_not() -> None:
    class Forgetful(MemoryBroker):
        missing: Mapping[Feature, str] = MappingProxyType({Feature.DELAY: "this one has no clock"})

    results = await run(Makers(partial(Forgetful, store=MemoryStore())), ["delay", "priority"])
    for result in results:
        if result.promise.area == "delay":
            assert (result.ended, result.error) == (Ended.SKIPPED, "no delay: this one has no clock")
        else:
            assert result.ended is Ended.PASSED


async def test_a_missing_feature_that_is_not_refused_is_found() -> None:
    class Sloppy(MemoryBroker):
        missing: Mapping[Feature, str] = MappingProxyType({Feature.ORDER: "too hard"})

    [result] = await run(Makers(partial(Sloppy, store=MemoryStore())), ["what_is_missing_is_refused"])
    assert result.ended is Ended.FAILED
    assert "a queue that needs order was accepted" in result.error


async def test_a_broker_that_hangs_fails_with_what_was_waited_for() -> None:
    makers = sabotage(turned_memory(patience_seconds=0.05), by.LosesEmits)
    [result] = await run(makers, ["an_emitted_message_is_whole"])
    assert result.ended is Ended.FAILED
    assert "waited 0.05 s for 1 message(s)" in result.error


async def test_a_maker_that_no_other_process_can_use_is_told() -> None:
    class Durable(MemoryBroker):
        missing: Mapping[Feature, str] = MappingProxyType({})

    [result] = await run(Makers(Durable), ["what_was_published_survives_a_kill"])
    assert result.ended is Ended.FAILED
    assert "cannot be pickled" in result.error


def test_every_promise_is_a_sentence_with_an_area() -> None:
    for each in PROMISES.values():
        assert each.sentence.endswith("."), each.name
        assert each.area
    assert len(PROMISES) >= 100


async def test_a_promise_is_made_once() -> None:
    with pytest.raises(AssertionError, match="is made twice"):

        @promise("settling")
        async def a_done_message_is_gone(world: World) -> None:
            """Again."""
