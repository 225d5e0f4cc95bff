from __future__ import annotations

import enum
import inspect
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NotRequired, TypedDict
from uuid import UUID

import msgspec
import pydantic
import pydantic.dataclasses
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor.core.codec import BYTES, LONGEST_EXPLANATION, Codec, codec_for, explain, struct_for
from conveyor.core.message import JSON
from conveyor.errors import HandlerError, PayloadError

WIRE_FORMAT = Path(__file__).parents[2] / "docs" / "wire-format.md"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True)
class Line:
    article: str
    price: Decimal
    count: int = 1


@dataclass
class Everything:
    text: str
    whole: int
    number: float
    flag: bool
    money: Decimal
    moment: datetime
    day: date
    hour: time
    span: timedelta
    id: UUID
    colour: Colour
    level: Level
    path: Path
    raw: bytes
    mode: Literal["fast", "slow"]
    lines: list[Line]
    by_name: dict[str, Line]
    tags: set[str]
    pair: tuple[int, str]
    maybe: Line | None
    either: int | str | list[int]
    anything: Any
    note: str = "none"
    more: list[int] = field(default_factory=list)


class Struct(msgspec.Struct, frozen=True):
    id: UUID
    paths: list[PurePosixPath]
    lines: tuple[Line, ...]
    when: datetime | None = None


class Model(pydantic.BaseModel):
    id: UUID
    money: Decimal
    when: datetime | None
    path: Path
    colour: Colour
    lines: list[Line]
    tags: set[str]
    renamed: int = pydantic.Field(alias="re-named", default=1)


@pydantic.dataclasses.dataclass
class ModelDataclass:
    count: int
    day: date


@dataclass
class Mixed:
    model: Model
    models: list[Model]
    name: str


class Visit(TypedDict):
    page: str
    at: datetime
    referrer: NotRequired[str]


@dataclass
class Tree:
    name: str
    children: list[Tree]


@dataclass
class Positive:
    number: int

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"number must not be negative, and {self.number} is")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
decimals = st.decimals(allow_nan=False, allow_infinity=False)
lines = st.builds(Line, texts, decimals, st.integers())
paths = st.lists(st.from_regex(r"[a-z]{1,5}", fullmatch=True), max_size=3).map(lambda parts: Path(*parts))
moments = st.datetimes(timezones=st.none() | st.just(UTC))
floats = st.floats(allow_nan=False, allow_infinity=False)
json = st.recursive(
    st.none() | st.booleans() | st.integers() | texts | floats,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
everything = st.builds(
    Everything,
    text=texts,
    whole=st.integers(),
    number=floats,
    flag=st.booleans(),
    money=decimals,
    moment=moments,
    day=st.dates(),
    hour=st.times(),
    span=st.timedeltas(min_value=timedelta(days=-10_000), max_value=timedelta(days=10_000)),
    id=st.uuids(),
    colour=st.sampled_from(Colour),
    level=st.sampled_from(Level),
    path=paths,
    raw=st.binary(),
    mode=st.sampled_from(["fast", "slow"]),
    lines=st.lists(lines, max_size=2),
    by_name=st.dictionaries(texts, lines, max_size=2),
    tags=st.sets(texts, max_size=3),
    pair=st.tuples(st.integers(), texts),
    maybe=st.none() | lines,
    either=st.integers() | texts | st.lists(st.integers(), max_size=2),
    anything=json,
    note=texts,
    more=st.lists(st.integers(), max_size=2),
)
structs = st.builds(
    Struct, st.uuids(), st.lists(paths.map(PurePosixPath), max_size=2),
    st.lists(lines, max_size=2).map(tuple), st.none() | moments,
)  # fmt: skip
models = st.builds(
    Model,
    id=st.uuids(),
    money=st.decimals(-1e9, 1e9, places=2),
    when=st.none() | st.datetimes(datetime(1900, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - bounds are naive
    path=paths,
    colour=st.sampled_from(Colour),
    lines=st.lists(st.builds(Line, texts, st.decimals(-1e9, 1e9, places=2), st.integers(-(2**63), 2**63)), max_size=2),
    tags=st.sets(texts, max_size=3),
    **{"re-named": st.integers(-(2**63), 2**63)},
)
visits = st.fixed_dictionaries({"page": texts, "at": moments}, optional={"referrer": texts})
trees = st.recursive(
    st.builds(Tree, texts, st.just([])), lambda inner: st.builds(Tree, texts, st.lists(inner, max_size=2)), max_leaves=6
)
typed: st.SearchStrategy[tuple[Any, Any]] = st.one_of(
    st.tuples(st.just(Everything), everything),
    st.tuples(st.just(Struct), structs),
    st.tuples(st.just(Model), models),
    st.tuples(st.just(ModelDataclass), st.builds(ModelDataclass, st.integers(-(2**63), 2**63), st.dates())),
    st.tuples(st.just(Mixed), st.builds(Mixed, models, st.lists(models, max_size=2), texts)),
    st.tuples(st.just(Visit), visits),
    st.tuples(st.just(Tree), trees),
    st.tuples(st.just(dict), st.dictionaries(texts, json, max_size=4)),
    st.tuples(st.just(dict[str, int]), st.dictionaries(texts, st.integers(), max_size=4)),
    st.tuples(st.just(list[Line] | None), st.none() | st.lists(lines, max_size=3)),
    st.tuples(st.just(bytes), st.binary()),
)
KNOWN = [Everything, Struct, Model, ModelDataclass, Mixed, Visit, Tree, Positive, dict, bytes]


@given(typed)
def test_what_is_published_arrives_as_it_was(pair: tuple[Any, Any]) -> None:
    tp, payload = pair
    codec = codec_for(tp)
    assert codec.decode(codec.encode(payload)) == payload


def is_clear(sentence: str) -> bool:
    sentence.encode()
    return 0 < len(sentence) <= LONGEST_EXPLANATION


def outcome(codec: Codec, body: bytes) -> str:
    try:
        codec.decode(body)
    except Exception as error:
        return codec.explain(error)
    return "fine"


def broken_json() -> st.SearchStrategy[bytes]:
    """Bodies of known types with some bytes changed, beside arbitrary JSON and arbitrary bytes."""
    whole = typed.filter(lambda pair: pair[0] is not bytes).map(lambda pair: codec_for(pair[0]).encode(pair[1]))
    changed = st.builds(
        lambda body, at, new: body[: at % (len(body) + 1)] + new + body[at % (len(body) + 1) + len(new) :],
        whole, st.integers(0, 500), st.binary(max_size=3),
    )  # fmt: skip
    return st.binary() | changed | json.map(msgspec.json.encode)


@given(st.sampled_from(KNOWN), broken_json())
def test_bytes_of_any_kind_decode_or_raise_what_can_be_put_in_words(tp: Any, body: bytes) -> None:
    assert is_clear(outcome(codec_for(tp), body))


HOSTILE = {
    "empty": (b"", "no JSON: it is empty or ends too early"),
    "cut off": (b'{"name": "x', "no JSON: it is empty or ends too early"),
    "no JSON": (b"hello", "no JSON"),
    "an array": (b"[]", "Expected `object`, got `array`"),
    "trailing": (b'{"name":"x","children":[]} x', "no JSON"),
    "no UTF-8": (b'{"name":"\xff","children":[]}', "no UTF-8: invalid start byte at byte 0 of a text"),
    "lone surrogate": (b'{"name":"\\ud800","children":[]}', "no JSON"),
    "NaN": (b'{"name":NaN,"children":[]}', "no JSON"),
    "deep in a known field": (
        b'{"name":"x","children":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "at `$.children[0]`: Expected `object`, got `array`",
    ),
    "deep in itself": (b'{"name":"","children":[' * 100_000 + b"]}" * 100_000, "nested too deep"),
    "deep in an unknown field": (b'{"more":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested too deep"),
    "huge number": (b'{"name":' + b"9" * 100_000 + b',"children":[]}', "at `$.name`: Number out of range"),
    "wrong type": (
        b'{"name":"x","children":[{"name":1,"children":[]}]}',
        "at `$.children[0].name`: Expected `str`, got `int`",
    ),
    "missing": (b'{"name":"x"}', "Object missing required field `children`"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_body_ends_in_a_clear_sentence(case: str) -> None:
    body, words = HOSTILE[case]
    codec = codec_for(Tree)
    sentence = outcome(codec, body)
    assert sentence.startswith(words)
    assert is_clear(sentence)


@pytest.mark.parametrize("tp", KNOWN)
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_body_is_no_payload_of_any_type(case: str, tp: Any) -> None:
    assert is_clear(outcome(codec_for(tp), HOSTILE[case][0]))


def test_a_number_too_big_for_a_float_or_for_the_interpreter_is_refused() -> None:
    codec = codec_for(dict)
    for body in (b'{"a":1e999}', b'{"a":' + b"9" * 5_000 + b"}"):
        with pytest.raises(msgspec.ValidationError) as caught:
            codec.decode(body)
        assert "out of range" in codec.explain(caught.value)


def test_of_duplicate_keys_the_last_one_counts() -> None:
    assert codec_for(dict).decode(b'{"a":1,"a":2}') == {"a": 2}
    assert codec_for(Positive).decode(b'{"number":1,"number":2}') == Positive(2)


def test_ten_megabytes_decode_or_are_refused_without_a_dump() -> None:
    body = b'{"name":"' + b"x" * 10_000_000 + b'"}'
    assert len(codec_for(dict).decode(body)["name"]) == 10_000_000
    with pytest.raises(msgspec.ValidationError) as caught:
        codec_for(Tree).decode(body)
    assert is_clear(explain(caught.value))


def test_a_long_wrong_value_is_not_repeated_in_the_explanation() -> None:
    @dataclass
    class Painted:
        colour: Colour

    codec = codec_for(Painted)
    with pytest.raises(msgspec.ValidationError) as caught:
        codec.decode(b'{"colour":"' + b"secret" * 50 + b'"}')
    assert codec.explain(caught.value) == "at `$.colour`: Invalid enum value '…'"


def test_fields_that_a_type_does_not_know_are_ignored() -> None:
    assert codec_for(Positive).decode(b'{"number":1,"colour":"red"}') == Positive(1)
    assert codec_for(ModelDataclass).decode(b'{"count":1,"day":"2026-01-01","x":1}') == ModelDataclass(
        1, date(2026, 1, 1)
    )


@pytest.mark.parametrize("value", [b'"1"', b"1.5", b"true", b"null", b"[1]"])
@pytest.mark.parametrize(
    ("tp", "before"), [(Positive, b'{"number":'), (ModelDataclass, b'{"day":"2026-01-01","count":')]
)
def test_nothing_but_a_whole_number_is_an_int(tp: Any, before: bytes, value: bytes) -> None:
    with pytest.raises(ValueError, match=r"(?i)int"):
        codec_for(tp).decode(before + value + b"}")


def test_a_validation_of_the_payloads_own_speaks_on_both_sides() -> None:
    codec = codec_for(Positive)
    with pytest.raises(msgspec.ValidationError) as caught:
        codec.decode(b'{"number":-1}')
    assert codec.explain(caught.value) == "number must not be negative, and -1 is"
    payload = Positive(1)
    payload.number = -1
    with pytest.raises(PayloadError, match="Positive cannot be encoded: number must not be negative"):
        codec.encode(payload)


@pytest.mark.parametrize("number", ["NaN", "sNaN", "-NaN12", "Infinity", "-inf", "In\\u0066inity"])
def test_a_decimal_that_is_no_number_is_refused(number: str) -> None:
    codec = codec_for(Line)
    with pytest.raises(PayloadError) as caught:
        codec.decode(f'{{"article":"x","price":"{number}"}}'.encode())
    assert codec.explain(caught.value).startswith("at `$.price`: ")


def test_a_text_that_only_looks_like_no_number_is_fine() -> None:
    line = Line("NaN of \\ infinite finance", Decimal(1))
    codec = codec_for(Line)
    assert codec.decode(codec.encode(line)) == line


@dataclass
class Measured:
    value: float | None
    more: list[float | None] = field(default_factory=list)


class MeasuredModel(pydantic.BaseModel):
    value: float | None


@dataclass
class MeasuredInside:
    model: MeasuredModel


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("make", "place"),
    [
        (Measured, "$.value"),
        (lambda number: Measured(None, [1.0, None, number]), "$.more[2]"),
        (lambda number: MeasuredModel(value=number), "$.value"),
        (lambda number: MeasuredInside(MeasuredModel(value=number)), "$.model.value"),
        (lambda number: {"a": {"b": [None, number]}}, "$.a.b[1]"),
    ],
)
def test_nan_and_infinity_never_become_null(make: Callable[[float], Any], place: str, number: float) -> None:
    payload = make(number)
    with pytest.raises(PayloadError) as caught:
        codec_for(type(payload)).encode(payload)
    assert f"cannot be encoded: at `{place}`: {number} is no number" in str(caught.value)


def wrong(**values: Any) -> Any:
    fields: dict[str, Any] = {"article": "x", "price": Decimal(1), "count": 1}
    return Line(**fields | values)


class Unfit(pydantic.BaseModel):
    count: int


unfit = Unfit(count=1)
unfit.__dict__["count"] = "many"


@pytest.mark.parametrize(
    ("payload", "place"),
    [
        (wrong(article=7), "$.article"),
        (wrong(price="cheap"), "$.price"),
        (wrong(price=Decimal("NaN")), "$.price"),
        (wrong(count="1"), "$.count"),
        (wrong(count=None), "$.count"),
        (wrong(article=socket), "$.article"),
        (wrong(article="\ud800"), "$.article"),
        (Tree("x", [Tree("y", [wrong()])]), "$.children[0].children[0]"),
        (Tree("x", [Tree("y", [Tree("\ud800", [])])]), "$.children[0].children[0].name"),
        ({"a": [1, {"b": socket}]}, "$.a[1].b"),
        (unfit, "count"),
    ],
)  # fmt: skip
def test_a_payload_that_nobody_could_consume_is_refused_with_the_place_of_the_fault(payload: Any, place: str) -> None:
    tp = type(payload)
    with pytest.raises(PayloadError) as caught:
        codec_for(tp).encode(payload)
    assert str(caught.value).startswith(f"{tp.__name__} cannot be encoded: ")
    assert place in str(caught.value)
    assert len(str(caught.value)) < 2 * LONGEST_EXPLANATION


def test_a_payload_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with pytest.raises(PayloadError, match="nested too deep"):
        codec_for(dict).encode(loop)


def test_a_payload_of_another_kind_is_refused() -> None:
    for tp, payload in (
        (Tree, Positive(1)),
        (Unfit, Positive(1)),
        (dict, [1]),
        (bytes, "text"),
        (Visit, {"page": "/"}),
    ):
        with pytest.raises(PayloadError):
            codec_for(tp).encode(payload)


def test_bytes_travel_as_they_are() -> None:
    codec = codec_for(bytes)
    assert codec.content_type == BYTES
    assert codec.encode(b"\xff\x00") == b"\xff\x00"
    assert codec.encode(bytearray(b"\xff")) == b"\xff"
    assert codec.decode(b"\xff\x00") == b"\xff\x00"


def test_every_other_payload_is_json_in_utf_8() -> None:
    assert codec_for(Line).content_type == JSON
    assert (
        codec_for(Line).encode(Line("Käse", Decimal("1.50"))) == '{"article":"Käse","price":"1.50","count":1}'.encode()
    )


def test_a_dict_is_an_object_with_text_for_keys() -> None:
    assert codec_for(dict).decode(b'{"a":[1,2.5,null,"x"]}') == {"a": [1, 2.5, None, "x"]}
    with pytest.raises(msgspec.ValidationError):
        codec_for(dict).decode(b"7")


def test_decoding_a_plain_type_costs_what_msgspec_costs() -> None:
    assert type(codec_for(Positive).decode).__name__ == "builtin_function_or_method"
    assert isinstance(codec_for(Positive).decode.__self__, msgspec.json.Decoder)  # type: ignore[attr-defined]


def test_a_codec_is_made_once_per_type() -> None:
    assert codec_for(Tree) is codec_for(Tree)
    assert codec_for(dict[str, int]) is codec_for(dict[str, int])
    assert isinstance(codec_for(Tree), Codec)


@dataclass
class Socketed:
    socket: socket.socket


@dataclass
class DeepSocketed:
    parts: list[dict[str, Socketed]]


@dataclass
class Unresolved:
    thing: Nowhere  # type: ignore[name-defined]  # noqa: F821 - which is the point


@dataclass
class TwoKinds:
    either: Line | Tree


@dataclass
class TwoTexts:
    either: UUID | datetime


class UnresolvedModel(pydantic.BaseModel):
    thing: Nowhere  # type: ignore[name-defined]  # noqa: F821 - which is the point


@pytest.mark.parametrize(
    ("tp", "words"),
    [
        (Socketed, r"Socketed cannot be a payload: its field 'socket' is a socket, .* or leave it out"),
        (DeepSocketed, r"DeepSocketed cannot be a payload: its field 'parts\.socket' is a socket"),
        (Unresolved, r"Unresolved cannot be a payload: its annotation 'Nowhere' names nothing that can be found"),
        (UnresolvedModel, r"UnresolvedModel cannot be a payload: .*Nowhere"),
        (TwoKinds, r"TwoKinds cannot be a payload: its field 'either': .*more than one dataclass"),
        (TwoTexts, r"TwoTexts cannot be a payload: its field 'either': .*more than one str-like"),
        (complex, r"complex cannot be a payload: it is a complex"),
        (object, r"object cannot be a payload"),
        (Callable[[int], str], r"cannot be a payload"),
        ("Tree", r"cannot be a payload"),
    ],
)
def test_a_type_that_cannot_travel_is_refused_before_any_message_moves(tp: Any, words: str) -> None:
    with pytest.raises(HandlerError, match=words):
        codec_for(tp)


def test_a_jobs_parameters_become_a_payload() -> None:
    empty = inspect.Parameter.empty
    tp = struct_for(
        "resize", [("path", Path), ("width", int, empty), ("sizes", list[int], [1, 2]), ("note", str, "none")]
    )
    codec = codec_for(tp)
    body = codec.encode(tp(path=Path("cat.jpg"), width=800))
    assert body == b'{"path":"cat.jpg","width":800,"sizes":[1,2],"note":"none"}'
    first, second = codec.decode(b'{"path":"x","width":1}'), codec.decode(b'{"path":"x","width":1}')
    assert first.sizes == [1, 2]
    assert first.sizes is not second.sizes
    with pytest.raises(PayloadError, match=r"resize cannot be encoded: at `\$\.width`: Expected `int`, got `str`"):
        codec.encode(tp(path=Path("cat.jpg"), width="wide"))


def test_constraints_in_annotations_hold() -> None:
    tp = struct_for("resize", [("width", Annotated[int, msgspec.Meta(gt=0)])])
    with pytest.raises(msgspec.ValidationError, match=r">= 1"):
        codec_for(tp).decode(b'{"width":0}')


def test_an_annotation_with_something_unhashable_in_it_is_as_good_as_any() -> None:
    codec = codec_for(Annotated[dict[str, int], {"title": "counts"}])
    assert codec.decode(codec.encode({"a": 1})) == {"a": 1}


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("never")


@given(st.builds(ValueError, st.text()) | st.builds(KeyError, st.text()) | st.just(Mute()) | st.just(MemoryError()))
def test_any_error_whatever_can_be_put_in_words(error: BaseException) -> None:
    assert is_clear(explain(error))


def test_a_models_errors_name_their_places() -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        codec_for(Model).decode(b'{"id":7,"money":"1","when":null,"path":"x","colour":"green","lines":[{}],"tags":[1]}')
    sentence = explain(caught.value)
    assert sentence.startswith("at `$.id`: ")
    assert sentence.endswith(" more")
    assert "input" not in sentence.lower().replace("input should", "")


def test_a_models_errors_inside_another_type_name_their_places_without_the_payload() -> None:
    sentence = outcome(codec_for(Mixed), b'{"models":[],"name":"","model":{"id":"secret"}}')
    assert sentence.startswith("at `$.model`: at `.id`: Input should be a valid UUID")
    assert "secret" not in sentence
    sentence = outcome(codec_for(Everything), b'{"path":7}')
    assert sentence == "at `$.path`: Expected `str`, got `int`"


DOCUMENTED = {
    "str": str, "int": int, "float": float, "Decimal": Decimal, "datetime": datetime, "date": date, "time": time,
    "timedelta": timedelta, "UUID": UUID, "Enum": Colour, "Path": Path, "bytes": Annotated[bytes, "a field"],
    "list": list[int], "dict": dict[str, int],
}  # fmt: skip


def test_the_examples_in_the_documentation_are_read_as_it_says() -> None:
    table = WIRE_FORMAT.read_text().split("| in Python |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)`.*\| ([^|]*) \|$", table, re.MULTILINE)
    examples = [(name, text) for name, cell in rows for text in re.findall(r"`([^`]+)`", cell) if name in DOCUMENTED]
    assert {name for name, _ in examples} == DOCUMENTED.keys()
    for name, text in examples:
        codec = codec_for(DOCUMENTED[name])
        payload = codec.decode(text.encode())
        assert codec.decode(codec.encode(payload)) == payload
