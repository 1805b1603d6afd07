"""The house rules: who may import whom, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deploycnn
from deploycnn import registry

PACKAGE = Path(deploycnn.__file__).parent
LIBRARIES = {
    "pruning",
    "quantization",
    "graph",
    "models",
    "data",
    "tasks",
    "training",
    "engines",
    "gpu",
    "latency",
}
COMMON = {"cache", "core", "errors", "optional", "registry", "files", "targets"}

#: Room -> rooms of this package that it may import at any level of its code.
ALLOWED: dict[str, set[str]] = {
    "core": {"data"},  # for a type only: Context.data
    "errors": set(),
    "events": set(),
    "optional": {"errors"},
    "registry": {"errors"},
    "targets": {"errors"},
    "files": {"errors"},
    "schema": {"errors"},
    "recipes": {"errors"},
    "overrides": {"errors", "schema"},
    "retarget": {"recipe", "targets"},
    "profile_engines": {"core", "engines", "errors", "evidence", "files", "runtimes"},
    "components": {"core", "data", "errors", "registry", "schema", "targets"},
    "recipe": {"core", "errors", "schema", "targets", "overrides", "components", "data", "runtimes"},
    "plan": {"core", "errors", "files", "registry", "schema", "recipe", "runtimes"},
    "store": {"core", "errors", "files", "schema", "plan", "deploycnn"},
    "execute": {"core", "errors", "events", "plan", "recipe", "store", "data", "profiling", "runtimes"},
    "profiling": COMMON
    | {"runtimes", "data", "models", "gpu", "engines", "graph", "environment", "deploycnn"},
    "report": {"core", "errors", "files", "deploycnn"},
    **dict.fromkeys(LIBRARIES, COMMON | LIBRARIES),
    **dict.fromkeys(("passes", "sources"), COMMON | LIBRARIES),
    "runtimes": COMMON | LIBRARIES,
    # Tables, and in which arithmetic training is fastest, belong to a machine.
    **dict.fromkeys(("latency", "training"), COMMON | LIBRARIES | {"environment"}),
}


def imports_of(path: Path) -> set[str]:
    """Rooms of this package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deploycnn"):
            rest = (node.module or "").split(".")[1:]
            names = [rest[0]] if rest else [alias.name for alias in node.names]
            found |= {name if name != "__version__" else "deploycnn" for name in names}
        elif isinstance(node, ast.Import):
            found |= {
                ".".join(alias.name.split(".")[1:2])
                for alias in node.names
                if alias.name.startswith("deploycnn.")
            }
            found |= {"deploycnn" for alias in node.names if alias.name == "deploycnn"}
    return found


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_import_only_what_they_may(room: str) -> None:
    folder = PACKAGE / room
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]
    assert paths
    for path in paths:
        own = {room} if folder.is_dir() else set()
        assert imports_of(path) <= ALLOWED[room] | own, path


@pytest.mark.parametrize("room", ["passes", "sources", "runtimes"])
def test_components_do_not_know_one_another(room: str) -> None:
    helpers = {"base", "common", "onnxruntime_sessions"}
    kind = {"passes": "pass", "sources": "source", "runtimes": "runtime"}[room]
    assert not helpers & set(registry.names(kind)), "a helper is no component"
    for path in sorted((PACKAGE / room).glob("*.py")):
        text = path.read_text()
        for other in (PACKAGE / room).glob("*.py"):
            if other != path and other.stem not in helpers | {"__init__"}:
                assert f"deploycnn.{room}.{other.stem} " not in text, (path, other)


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after ``code`` ran in a fresh interpreter."""
    script = (
        f"{code}\nimport sys\nprint(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split())


HEAVY = {
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "openvino",
    "numpy",
    "sklearn",
    "scipy",
    "PIL",
    "pydantic",
    "rich",
}


@pytest.mark.parametrize(
    "code",
    [
        "import deploycnn",
        "import deploycnn.cli",
        "from deploycnn.cli import main; main(['--help'])",
        "from deploycnn.cli import main; main(['compress', '--help'])",
        "from deploycnn.cli import main; main(['profile', '--help'])",
    ],
)
def test_the_command_line_starts_light(code: str) -> None:
    assert not loaded_by(code) & HEAVY


def test_help_is_quick() -> None:
    script = (
        "import resource; from deploycnn.cli import main; main(['--help']);"
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime)"
    )
    best = min(
        float(
            subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=True
            ).stdout.split()[-1]
        )
        for _ in range(3)
    )
    assert best < 0.3  # CPU seconds, so other programs do not matter


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("source: {zoo: resnet20}\nvariants: {fp32: [export]}\n")
    code = (
        "from deploycnn import recipe, plan\n"
        f"plan.plan(recipe.load({str(recipe)!r}), data_fingerprint=None)\n"
    )
    assert not loaded_by(code) & {"torch", "onnx", "onnxruntime", "openvino"}


def test_public_names_are_these_and_all_load() -> None:
    assert sorted(deploycnn.__all__) == [
        "DeployCNNError", "Recipe", "Run", "__version__", "compress", "export", "inspect", "lint", "profile",
    ]  # fmt: skip
    assert all(getattr(deploycnn, name) is not None for name in deploycnn.__all__)
    with pytest.raises(AttributeError):
        _ = deploycnn.no_such_name
