"""Plans: shared prefixes, keys that follow their inputs, chains and references that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploycnn import recipe as recipes
from deploycnn.errors import RecipeError
from deploycnn.plan import Plan, plan

pytestmark = pytest.mark.usefixtures("fake_components")

VARIANTS: dict[str, Any] = {
    "fp32": ["tune", "export"],
    "small": ["tune", {"tune": {"amount": 2, "teacher": "fp32"}}, "export"],
}


def make(changes: dict[str, Any] | None = None, data: str | None = "d", environment: str = "e") -> Plan:
    raw = {"source": {"model": "m"}, "variants": VARIANTS, **(changes or {})}
    return plan(recipes.parse(raw, base=Path()), data_fingerprint=data, environment_fingerprint=environment)


def test_shared_prefixes_are_one_step_and_order_is_executable() -> None:
    result = make()
    assert [step.name for step in result.steps] == ["model", "tune", "export", "tune", "export"]
    assert result.steps[1].variants == ("fp32", "small")
    seen: set[str] = set()
    for step in result.steps:
        assert {step.parent, *step.references.values()} - {None} <= seen
        seen.add(step.key)


def test_a_teacher_is_the_last_torch_model_of_its_variant() -> None:
    result = make()
    assert result.steps[3].references == {"fp32": result.steps[1].key}


def test_a_reference_may_come_later_in_the_recipe() -> None:
    result = make({"variants": dict(reversed(VARIANTS.items()))})
    assert list(result.chains) == ["small", "fp32"]
    assert result.steps[0].name == "model"


def keys(result: Plan) -> list[str]:
    return [step.key for step in result.steps]


def test_keys_change_with_all_that_matters_and_with_nothing_else(tmp_path: Path) -> None:
    base = keys(make())
    assert keys(make()) == base
    assert keys(make({"name": "other", "profile": {"budget_s": 1}, "target": "cpu"})) == base
    assert keys(make(environment="other")) == base
    for other in (make({"seed": 1}), make(data="other"), make({"source": {"model": "n"}})):
        assert not set(keys(other)) & set(base)
    changed = {**VARIANTS, "small": ["tune", {"tune": {"amount": 3, "teacher": "fp32"}}, "export"]}
    assert [a == b for a, b in zip(keys(make({"variants": changed})), base, strict=True)] == [True] * 3 + [
        False
    ] * 2


def test_files_enter_keys_by_content(tmp_path: Path) -> None:
    one, two = tmp_path / "1.pt", tmp_path / "2.pt"
    one.write_bytes(b"same")
    two.write_bytes(b"same")
    first = keys(make({"source": {"model": "m", "weights": str(one)}}))
    assert keys(make({"source": {"model": "m", "weights": str(two)}})) == first
    one.write_bytes(b"other")
    assert keys(make({"source": {"model": "m", "weights": str(one)}})) != first


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"profile": {"batch_sizes": [3]}}, False),
        ({"profile": {"threads": [7]}}, False),
        ({"target": "cpu", "profile": {"runtimes": ["onnxruntime"]}}, False),
        ({"profile": {"budget_s": 1}}, True),
    ],
)
def test_what_timing_decides_depends_on_where_and_how_is_timed(changes: dict[str, Any], same: bool) -> None:
    variants = {"variants": {"a": ["export", "timed"]}, "target": "onnxruntime-cpu"}
    base = keys(make(variants))
    assert [a == b for a, b in zip(keys(make({**variants, **changes})), base, strict=True)] == [
        True,
        True,
        same,
    ]
    assert keys(make(variants, environment="other"))[2] != base[2]


def test_engines_depend_on_machine_and_target() -> None:
    variants = {"variants": {"a": ["export", "engine"]}}
    base = keys(make(variants))
    for other in (
        make(variants, environment="other"),
        make({**variants, "target": "cpu", "profile": {"runtimes": ["onnxruntime"]}}),
    ):
        assert [a == b for a, b in zip(keys(other), base, strict=True)] == [True, True, False]


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        (
            {"a": ["export", "tune"]},
            'needs a model in torch format, but "export" before it gives onnx; move it before',
        ),
        (
            {"a": ["engine"]},
            'needs a model in onnx format, but "model" before it gives torch; add `export` before it',
        ),
        (
            {"a": ["tune"]},
            "variants.a: ends in torch format, which none of the runtimes onnxruntime:cpu opens",
        ),
        ({"a": [{"tune": {"teacher": "b"}}, "export"]}, 'variants.a.0.tune: no variant "b"'),
        ({"a": [{"tune": {"teacher": "a"}}, "export"]}, "in a circle: a -> a"),
        (
            {"a": [{"tune": {"teacher": "b"}}, "export"], "b": [{"tune": {"teacher": "a"}}, "export"]},
            "in a circle: a -> b -> a",
        ),
    ],
)
def test_chains_that_do_not_fit(variants: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make({"variants": variants})
    assert expected in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=4))
def test_step_count_is_the_number_of_distinct_prefixes(chains: list[list[int]]) -> None:
    variants = {
        f"v{i}": [*({"tune": {"amount": n}} for n in chain), "export"] for i, chain in enumerate(chains)
    }
    prefixes = {tuple(chain[:length]) for chain in chains for length in range(len(chain) + 1)}
    exported = {tuple(chain) for chain in chains}
    assert len(make({"variants": variants}).steps) == len(prefixes) + len(exported)
