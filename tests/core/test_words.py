"""Counts are said as people say them, and texts are kept as stores can keep them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor.core.words import counted, far, is_keepable, keepable


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 processes"), (1, "1 process"), (2, "2 processes"), (1200, "1,200 processes")]
)
def test_a_count_has_its_noun_in_the_right_number(number: int, said: str) -> None:
    assert counted(number, "process", "processes") == said
    assert counted(number, "message") == said.replace("processes", "messages").replace("process", "message")


def test_progress_is_said_as_far_as_it_is_known() -> None:
    assert far(None, 4.0, "note") == ""
    assert far(3.0, None, "") == "3"
    assert far(1_234_567.0, 1e16, "") == "1,234,567 of 1e+16"
    assert far(1.5, 4.0, "the third step") == "1.5 of 4, the third step"


ANY_TEXT = st.text(st.characters(exclude_categories=[]) | st.just("\0") | st.characters(categories=["Cs"]))


@given(ANY_TEXT)
def test_every_text_becomes_one_that_every_store_can_keep(text: str) -> None:
    kept = keepable(text)
    assert "\0" not in kept
    assert kept.encode().decode() == kept
    assert is_keepable(kept)
    assert (kept == text) == is_keepable(text)


def test_what_cannot_be_kept_is_written_as_an_escape() -> None:
    assert keepable("caf\udce9\0é") == r"caf\udce9\x00é"
