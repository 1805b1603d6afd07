"""The gate for external input: strict types, unknown and duplicate keys, readable errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Gt, Interval
from hypothesis import given
from hypothesis import strategies as st

from deploycnn import schema
from deploycnn.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Inner:
    probability: Annotated[float, Interval(ge=0, le=1), "Chance."] = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    epochs: Annotated[int, Gt(0), "How long."]
    method: Literal["a", "b"] = "a"
    rates: tuple[float, ...] = (0.1,)
    size: int | tuple[int, int] = 32
    threads: tuple[Annotated[int, Gt(0)] | Literal["all"], ...] = ("all",)
    inner: Inner = field(default_factory=Inner)
    weights: Path | None = None


def test_builds_nested_values_with_defaults() -> None:
    built = schema.build(
        Outer, {"epochs": 3, "inner": {"probability": 1}, "size": [4, 5], "rates": [1, 0.5]}, "x"
    )
    assert built == Outer(epochs=3, inner=Inner(probability=1.0), size=(4, 5), rates=(1.0, 0.5))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epocs": 3}, 'x.epocs: unknown key; did you mean "epochs"?'),
        (
            {"epochs": 3, "inner": {"probabilty": 1}},
            'x.inner.probabilty: unknown key; did you mean "probability"?',
        ),
        ({}, "x.epochs: required, but not given"),
        ({"epochs": "3"}, 'x.epochs: should be a valid integer, got "3"'),
        ({"epochs": True}, "x.epochs: should be a valid integer, got true"),
        ({"epochs": 0}, "x.epochs: should be greater than 0, got 0"),
        ({"epochs": 1, "method": "c"}, "x.method: should be 'a' or 'b', got \"c\""),
        (
            {"epochs": 1, "inner": {"probability": 2}},
            "x.inner.probability: should be less than or equal to 1, got 2",
        ),
        ({"epochs": 1, "size": "big"}, "x.size: should be a valid integer"),
        ({"epochs": 1, "threads": ["al"]}, "x.threads.0: should be a valid integer or 'all', got \"al\""),
        ({"epochs": 1, "threads": [0]}, "x.threads.0: should be greater than 0 or 'all', got 0"),
        ({"epochs": date(2020, 1, 2)}, "x: 2020-01-02 is read as a date; put it in quotes if text is meant"),
        (
            [1],
            "x: expected a mapping of options (epochs, method, rates, size, threads, inner, weights), got [1]",
        ),
    ],
)
def test_bad_values_name_place_value_and_mend(options: object, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        schema.build(Outer, options, "x")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_reads_exponents_as_numbers() -> None:
    assert schema.load_yaml("[1e-3, 5e4, 1.5, -2E+3, 7, .5]", "x") == [1e-3, 5e4, 1.5, -2e3, 7, 0.5]
    # As YAML 1.2 reads them: no number to base 60, whatever digits it has.
    assert schema.load_yaml("[2:4, 1:30.5, -7, 0x1F, 1_000, 0, +3]", "x") == [
        "2:4",
        "1:30.5",
        -7,
        31,
        1000,
        0,
        3,
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", 'line 3: key "a" is written twice'),
        ("a: [1", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_bad_yaml_is_refused(text: str, expected: str) -> None:
    with pytest.raises(RecipeError, match="recipe.yaml") as caught:
        schema.load_yaml(text, "recipe.yaml")
    assert expected in str(caught.value)


def test_an_anchor_inside_itself_is_refused() -> None:
    options = schema.load_yaml("&a {epochs: *a}", "x")
    with pytest.raises(RecipeError, match="x: refers to itself"):
        schema.build(Outer, options, "x")


@given(
    st.builds(
        Outer,
        epochs=st.integers(1, 10**6),
        method=st.sampled_from(["a", "b"]),
        rates=st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
        size=st.integers() | st.tuples(st.integers(), st.integers()),
        inner=st.builds(Inner, probability=st.floats(0, 1)),
        weights=st.none() | st.just(Path("a/b")),
    )
)
def test_plain_values_round_trip(value: Outer) -> None:
    assert schema.build(Outer, schema.to_json(value), "x") == value


def test_relative_paths_are_taken_from_the_base(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"x")
    resolved = schema.resolve_paths(Outer(epochs=1, weights=Path("w.pt")), tmp_path, "x")
    assert resolved.weights == tmp_path / "w.pt"
    with pytest.raises(RecipeError, match=r"x\.weights: no such file or folder: .*missing\.pt"):
        schema.resolve_paths(Outer(epochs=1, weights=Path("missing.pt")), tmp_path, "x")


def test_help_rows_come_from_the_fields() -> None:
    rows = {row[0]: row[1:] for row in schema.describe(Outer)}
    assert rows["epochs"] == ("int", "required", "How long.")
    assert rows["method"] == ("a|b", '"a"', "")
    assert rows["weights"] == ("file|null", "null", "")
