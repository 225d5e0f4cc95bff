"""Counts are said as people say them."""

from __future__ import annotations

import pytest

from conveyor.core.words import counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 processes"), (1, "1 process"), (2, "2 processes"), (1200, "1,200 processes")]
)
def test_a_count_has_its_noun_in_the_right_number(number: int, said: str) -> None:
    assert counted(number, "process", "processes") == said
    assert counted(number, "message") == said.replace("processes", "messages").replace("process", "message")
