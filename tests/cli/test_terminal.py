"""Nothing that a command prints can steer a terminal, and durations read like words."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor.cli.terminal import Output, complain, moment, out, payload_text, shortened, span, table

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_escape_sequences_and_markup_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    Output().say("[red]\x1b[31mname\u202e [link=http://x]y")
    assert capsys.readouterr().out == "[red]\\x1b[31mname\\u202e [link=http://x]y\n"


def test_names_in_tables_are_neither_markup_nor_commands(capsys: pytest.CaptureFixture[str]) -> None:
    out().print(table(("name",), [("[bold]\x1b]0;title\x07",)]))
    assert "[bold]\\x1b]0;title\\x07" in capsys.readouterr().out


@given(st.text(st.characters(categories=None)))
def test_no_text_steers_the_terminal(text: str) -> None:
    assert not STEERING.search(shortened(text, 1000))


@given(st.binary())
def test_any_payload_has_a_text(body: bytes) -> None:
    payload_text(body).encode()


def test_complaints_go_to_stderr_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    complain("cannot reach redis://me:geheim@host")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "cannot reach redis://***@host\n")


def test_with_json_words_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=True)
    output.say("words")
    output.line({"topic": "\x9b31m\u202e"})
    shown = capsys.readouterr()
    assert shown.err == "words\n"
    assert shown.out.isascii()
    assert json.loads(shown.out) == {"topic": "\x9b31m\u202e"}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"),
        (0.0123, "12 ms"),
        (1, "1 s"),
        (1.93, "1.9 s"),
        (9.96, "10 s"),
        (58.6, "59 s"),
        (59.9, "1 min"),
        (185, "3 min 5 s"),
        (7200, "2 h"),
        (90_000, "1 d 1 h"),
    ],
)
def test_a_span_reads_like_words(seconds: float | None, words: str) -> None:
    assert span(seconds) == words


def test_a_moment_that_is_none_is_shown_as_it_is() -> None:
    assert moment(0) == "1970-01-01T00:00:00Z"
    assert moment(1e300) == "1e+300"
