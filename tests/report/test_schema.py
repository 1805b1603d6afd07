"""The schema: what it accepts, what it refuses, and in which words."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploycnn.errors import ArtifactError
from deploycnn.report.schema import PROBABILITIES, summarize_samples, validate
from tests.report.example import example_report


def test_the_example_survives_json_unchanged() -> None:
    report = example_report()
    assert validate(json.loads(json.dumps(report, allow_nan=False))) == report


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_a_foreign_schema_version_is_named_before_anything_else(version: object) -> None:
    report: dict[str, Any] = {"schema_version": version, "nothing": "else fits"}
    with pytest.raises(ArtifactError, match=r"old\.json: schema_version is .*this deploycnn reads 1"):
        validate(report, "old.json")


def _drop(report: dict[str, Any]) -> None:
    del report["variants"][1]["top1"]


def _misspell(report: dict[str, Any]) -> None:
    report["budget"]["max_top1_dorp"] = 0.1


def _wrong_type(report: dict[str, Any]) -> None:
    report["variants"][0]["top1"] = "0.98"


def _percent(report: dict[str, Any]) -> None:
    report["variants"][0]["top1"] = 98.4


def _nan(report: dict[str, Any]) -> None:
    report["measurements"][0]["median_ms"] = float("nan")


def _status(report: dict[str, Any]) -> None:
    report["variants"][0]["status"] = "ok"


def _no_variants(report: dict[str, Any]) -> None:
    report["variants"] = []


def _unknown_winner(report: dict[str, Any]) -> None:
    report["winner"]["variant"] = "int4"


def _unknown_reference(report: dict[str, Any]) -> None:
    report["measurements"][3]["reference"] = "nobody"


def _twice(report: dict[str, Any]) -> None:
    report["variants"].append(report["variants"][0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"variants\.1\.top1 is missing"),
        (_misspell, r"unknown key budget\.max_top1_dorp"),
        (_wrong_type, r"variants\.0\.top1: .*found '0\.98'"),
        (_percent, r"variants\.0\.top1: .*less than or equal to 1"),
        (_nan, r"measurements\.0\.median_ms: .*finite"),
        (_status, r"variants\.0\.status: .*'measured'"),
        (_no_variants, r"variants: .*at least 1"),
        (_unknown_winner, r'winner\.variant: "int4" is not in this report'),
        (_unknown_reference, r'reference: "nobody" is not in this report'),
        (_twice, r'variants: "fp32" stands there twice'),
    ],
)
def test_each_fault_is_refused_in_one_line_that_names_it(damage: Any, message: str) -> None:
    report: dict[str, Any] = dict(example_report())
    damage(report)
    with pytest.raises(ArtifactError, match=message) as caught:
        validate(report)
    assert "\n" not in str(caught.value)


def test_a_report_that_is_no_object_is_refused() -> None:
    with pytest.raises(ArtifactError, match="expected a JSON object, found list"):
        validate([])  # type: ignore[arg-type]


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=60))
def test_sample_quantiles_are_those_of_numpy(samples: list[float]) -> None:
    found = summarize_samples(samples, "raw.json")
    assert found["count"] == len(samples)
    np.testing.assert_allclose(found["quantiles_ms"], np.quantile(samples, PROBABILITIES), rtol=1e-12)


@pytest.mark.parametrize("samples", [[], [1.0, float("inf")]])
def test_samples_that_are_none_are_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="finite and not empty"):
        summarize_samples(samples)
