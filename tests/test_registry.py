"""Components are found by what they are, without importing them."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from deploycnn import registry
from deploycnn.errors import RecipeError

EXPECTED = {
    "pass": {
        "to_torch",
        "train",
        "prune",
        "distill",
        "export",
        "fp16",
        "int8",
        "qat",
        "build_engine",
        "sparse",
        "sparsify",
        "drop_blocks",
    },
    "source": {"zoo", "torchvision", "timm", "checkpoint", "entrypoint", "onnx"},
    "data": {"digits", "imagefolder", "cifar10"},
    "runtime": {"onnxruntime", "openvino", "pytorch", "tensorrt"},
}


@pytest.mark.parametrize("kind", sorted(registry.KINDS))
def test_names_are_the_components_and_no_helpers(kind: str) -> None:
    assert set(registry.names(kind)) == EXPECTED[kind]


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in EXPECTED for name in sorted(EXPECTED[kind])]
)
def test_each_is_one_documented_class_that_knows_its_name(kind: str, name: str) -> None:
    cls = registry.get(kind, name)
    assert registry.name_of(cls) == name
    assert inspect.getdoc(cls)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match='unknown pass "distil"; did you mean "distill"'):
        registry.get("pass", "distil")


def test_listing_names_imports_none_of_them() -> None:
    code = "import sys; from deploycnn import registry; registry.names('pass'); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "deploycnn.registry" in done.stdout
    assert "deploycnn.passes" not in done.stdout
