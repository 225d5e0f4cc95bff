"""What the entries of the journal make of a journey: a tree of messages."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from conveyor.core.journal import Entry, Kind, Stop, stops


def entry(kind: Kind, at: float, id: str, **more: object) -> Entry:
    return msgspec.structs.replace(Entry(kind, at, id, "placed", ""), **more)


def test_a_journey_is_a_tree_by_causation() -> None:
    tree = stops(
        [
            entry(Kind.SUCCEEDED, 5.0, "grandchild", causation_id="child"),
            entry(Kind.PUBLISHED, 1.0, "root"),
            entry(Kind.PUBLISHED, 3.0, "child", causation_id="root"),
            entry(Kind.PUBLISHED, 4.0, "second", causation_id="root"),
            entry(Kind.RETRIED, 2.0, "root", attempt=1),
        ]
    )
    assert [shape(stop) for stop in tree] == ["root(child(grandchild()) second())"]
    assert [e.kind for e in tree[0].entries] == [Kind.PUBLISHED, Kind.RETRIED]


def shape(stop: Stop) -> str:
    return f"{stop.message_id}({' '.join(shape(each) for each in stop.leads_to)})"


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.sampled_from("abcdefz")), max_size=12))
def test_every_message_is_in_the_tree_once_whatever_their_causes_claim(claims: list[tuple[str, str | None]]) -> None:
    tree = stops(entry(Kind.PUBLISHED, at, id, causation_id=cause) for at, (id, cause) in enumerate(claims))
    found: list[str] = []
    waiting = list(tree)
    while waiting:
        stop = waiting.pop()
        found.append(stop.message_id)
        waiting.extend(stop.leads_to)
    assert sorted(found) == sorted({id for id, _ in claims})


def test_a_journey_of_very_many_hops_is_no_trouble() -> None:
    tree = stops(entry(Kind.PUBLISHED, at, str(at), causation_id=str(at - 1)) for at in range(5_000))
    hops, stop = 1, tree[0]
    while stop.leads_to:
        (stop,) = stop.leads_to
        hops += 1
    assert hops == 5_000
