"""What every pass, source, dataset and runtime owes, whoever wrote it: a new file is tested the day it lands."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, get_args

import pytest

from deploycnn import registry, schema
from deploycnn.cli import main
from deploycnn.core import Format

COMPONENTS = [(kind, name) for kind in ("pass", "source", "data") for name in registry.names(kind)]
HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "sklearn", "timm")


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_fields_are_a_documented_schema(kind: str, name: str) -> None:
    cls = registry.get(kind, name)
    assert cls.__dataclass_params__.frozen
    for field, type_, default, text in schema.describe(cls):
        assert text.endswith((".", ")")), f"{name}.{field} has no help text"
        assert type_
        assert default


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_defaults_are_valid_values_of_the_schema(kind: str, name: str) -> None:
    cls = registry.get(kind, name)
    options: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            options[field.name] = "resnet20"
    if name == "prune":
        options["pruning_ratio"] = 0.5
    if name == "distill":
        options["teacher"] = "fp32"
    if name == "drop_blocks":
        options["count"] = 2
    if name == "sparse":
        options["pattern"] = "2:4"
    if name == "entrypoint":
        options["function"] = "package.module:function"
    built = schema.build(cls, options, name)
    assert schema.build(cls, schema.to_json(built), name) == built


@pytest.mark.parametrize("name", registry.names("pass"))
def test_passes_say_what_they_map(name: str) -> None:
    cls = registry.get("pass", name)
    assert cls.consumes in get_args(Format)
    assert cls.produces in get_args(Format)
    assert cls.version >= 1


@pytest.mark.parametrize("name", registry.names("runtime"))
def test_runtimes_answer_whether_they_work_here(name: str) -> None:
    cls = registry.get("runtime", name)
    for mode in cls.modes:
        found = cls(mode=mode).availability()
        assert found.ok or found.why


def test_importing_components_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom deploycnn import registry\n"
        "for kind in registry.KINDS:\n    for name in registry.names(kind):\n        registry.get(kind, name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("kind", "name"), [*COMPONENTS, *(("runtime", name) for name in registry.names("runtime"))]
)
def test_the_command_line_describes_each(kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", name]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name} ({kind}): ")
    wanted = (
        registry.get(kind, name).modes if kind == "runtime" else schema.field_names(registry.get(kind, name))
    )
    assert all(word in printed for word in wanted)
