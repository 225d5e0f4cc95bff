"""Wishes to cancel, and their ends, lead everywhere to the same state."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conveyor.core import wishes
from conveyor.core.wishes import Wishes, latest

TOLD = st.lists(
    st.tuples(st.sampled_from(("wish", "end")), st.dictionaries(st.sampled_from("ab"), st.integers(0, 3).map(float)))
)


def told(news: list[tuple[str, dict[str, float]]]) -> Wishes:
    known = Wishes()
    for kind, of in news:
        known.add(of) if kind == "wish" else known.end(of)
    return known


@given(st.data(), TOLD)
def test_what_is_cancelled_is_the_same_in_whichever_order_it_is_told_and_however_often(
    data: st.DataObject, news: list[tuple[str, dict[str, float]]]
) -> None:
    again = data.draw(st.permutations(news + (data.draw(st.lists(st.sampled_from(news))) if news else [])))
    assert told(again).cancelled == told(news).cancelled


@given(TOLD)
def test_what_one_tells_another_who_starts_leads_to_the_same(news: list[tuple[str, dict[str, float]]]) -> None:
    one, other = told(news), Wishes()
    other.add(one.cancelled)
    other.end(one.over)
    assert (other.cancelled, other.over) == (one.cancelled, one.over)


def test_a_wish_that_is_over_is_not_heeded_when_it_is_told_again_and_a_later_one_is() -> None:
    known = Wishes()
    assert known.add({"m": 1.0, "n": 1.0}) == {"m", "n"}
    known.end({"m": 1.0})
    assert known.add({"m": 1.0}) == set()
    assert known.cancelled == {"n": 1.0}
    assert known.add({"m": 2.0}) == {"m"}


def test_the_latest_ones_are_remembered() -> None:
    known = Wishes()
    known.add({str(number): 1.0 for number in range(wishes.MOST + 1)})
    known.end({f"x{number}": 1.0 for number in range(wishes.MOST + 1)})
    assert (len(known.cancelled), len(known.over)) == (wishes.MOST, wishes.MOST)
    assert "0" not in known.cancelled


def test_of_several_times_the_latest_counts() -> None:
    assert latest({"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 1.0}, {}) == {"a": 2.0, "b": 3.0}
