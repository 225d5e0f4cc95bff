"""Decisions about pauses lead everywhere to the same state, whatever way they travel."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conveyor.core.pause import Switch, decided, merged, paused_in

SWITCHES = st.dictionaries(
    st.sampled_from(["charge", "mail", "ship"]), st.builds(Switch, order=st.integers(0, 5), paused=st.booleans())
)


@given(SWITCHES, SWITCHES, SWITCHES)
def test_in_whatever_order_and_however_often_decisions_come_all_end_alike(
    one: dict[str, Switch], two: dict[str, Switch], three: dict[str, Switch]
) -> None:
    assert merged(one, two) == merged(two, one)
    assert merged(merged(one, two), three) == merged(one, merged(two, three))
    assert merged(merged(one, two), two) == merged(one, two)


@given(SWITCHES, st.sampled_from(["charge", "mail"]), st.booleans(), st.floats(0, 1))
def test_a_new_decision_stands_though_the_clock_of_an_earlier_one_was_ahead(
    known: dict[str, Switch], queue: str, paused: bool, now: float
) -> None:
    after = merged(known, decided(known, queue, paused=paused, now=now / 1_000_000))
    assert (queue in paused_in(after)) == paused
    assert {other: switch for other, switch in after.items() if other != queue} == {
        other: switch for other, switch in known.items() if other != queue
    }
