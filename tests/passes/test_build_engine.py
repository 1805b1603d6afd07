"""The pass: an artifact's files and record, from real builds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto

from deploycnn.core import Artifact, Facts, TensorSpec
from deploycnn.engines.settings import EngineRecord
from deploycnn.errors import PassRequirementError, RuntimeUnavailable
from deploycnn.passes.build_engine import BuildEngine
from tests.engines import graphs
from tests.passes.onnx_support import context

pytest.importorskip("tensorrt_rtx_bindings", reason='needs pip install "deploycnn[tensorrt-rtx]"')


def onnx_artifact(proto: ModelProto, folder: Path, precision: str = "fp32") -> Artifact:
    return Artifact(
        key="onnx",
        format="onnx",
        path=graphs.saved(proto, folder),
        inputs=(TensorSpec(name="images", dtype="float32", shape=(None, 8, 12, 12)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(None, 5)),),
        parents=(),
        facts=Facts(macs=1, precision=precision),
    )


def test_the_artifact_holds_engine_layers_and_log(tmp_path: Path) -> None:
    log, lines = logging.getLogger("test.build_engine"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    ctx = context(tmp_path, None, target="tensorrt-rtx", log=log)
    draft = BuildEngine(max_batch=8, opt_batch=4).run(onnx_artifact(graphs.net(), tmp_path), ctx)
    assert draft.format == "engine"
    assert draft.facts.precision == "fp32"
    assert {path.name for path in ctx.output.iterdir()} == {"model.engine", "layers.json"}
    assert draft.facts.size_bytes == (ctx.output / "model.engine").stat().st_size
    record = EngineRecord.from_json(draft.facts.record["engine"], "record")
    assert record.batch == (1, 4, 8)
    kept = json.loads((ctx.output / "layers.json").read_text())
    assert kept["source"] == "builder log"
    assert {item["node"] for item in kept["asked"]} == {"conv1", "conv2", "fc"}
    assert draft.facts.record["audit"]["metrics"]["fp32_macs"] == 1.0
    assert any("Parsing node: conv2" in line for line in lines)
    assert draft.inputs[0].shape == (None, 8, 12, 12)


def test_tf32_and_a_single_batch_are_told(tmp_path: Path) -> None:
    ctx = context(tmp_path, None, target="tensorrt-rtx")
    draft = BuildEngine(min_batch=2, opt_batch=2, max_batch=2, tf32=True).run(
        onnx_artifact(graphs.net(), tmp_path), ctx
    )
    assert draft.facts.precision == "tf32"
    assert draft.inputs[0].shape == (2, 8, 12, 12)


def test_the_flavour_can_be_named_against_the_target(tmp_path: Path) -> None:
    ctx = context(tmp_path, None, target="tensorrt")
    draft = BuildEngine(flavour="tensorrt-rtx", profiling_verbosity="none").run(
        onnx_artifact(graphs.net(), tmp_path), ctx
    )
    assert draft.facts.record["engine"]["flavour"] == "tensorrt-rtx"
    assert not (ctx.output / "layers.json").exists()


def test_other_targets_have_no_engines(tmp_path: Path) -> None:
    ctx = context(tmp_path, None, target="onnxruntime-cpu")
    with pytest.raises(PassRequirementError, match=r'target "onnxruntime-cpu" has no engines'):
        BuildEngine().run(onnx_artifact(graphs.net(), tmp_path), ctx)
    assert list(ctx.output.iterdir()) == []


def test_tensorrt_that_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploycnn.engines import flavour

    monkeypatch.setattr(flavour, "installed", lambda _: False)
    flavour.find.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    ctx = context(tmp_path, None, target="tensorrt")
    with pytest.raises(RuntimeUnavailable, match="tensorrt"):
        BuildEngine().run(onnx_artifact(graphs.net(), tmp_path), ctx)
    flavour.find.cache_clear()


def test_a_failed_build_leaves_nothing_but_its_log(tmp_path: Path) -> None:
    ctx = context(tmp_path, None, target="tensorrt-rtx")
    with pytest.raises(PassRequirementError, match="workspace"):
        BuildEngine(workspace_mib=1, max_batch=64).run(onnx_artifact(big(), tmp_path), ctx)
    assert list(ctx.output.iterdir()) == []


def big() -> ModelProto:
    proto = graphs.net(shape=("N", 8, 96, 96))
    assert isinstance(proto, ModelProto)
    return proto


@pytest.mark.parametrize("sizes", [{"min_batch": 4}, {"opt_batch": 100}])
def test_batches_must_grow(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must grow"):
        BuildEngine(**sizes)


def test_versions_of_the_library_are_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploycnn.engines import flavour

    before = BuildEngine().extra_identity()
    monkeypatch.setattr(flavour, "version_of", lambda _: "99.0")
    assert BuildEngine().extra_identity() != before
    assert BuildEngine.uses_environment


def test_a_batch_that_no_axis_holds_is_refused_with_the_key() -> None:
    from deploycnn import schema
    from deploycnn.errors import RecipeError

    with pytest.raises(RecipeError, match=r"step\.workspace_mib: should be less than or equal to 1073741824"):
        schema.build(BuildEngine, {"workspace_mib": 2**44}, "step")
    with pytest.raises(RecipeError, match=r"step\.max_batch: should be less than or equal to 2147483647"):
        schema.build(BuildEngine, {"max_batch": 2**31}, "step")
    assert schema.build(BuildEngine, {"max_batch": 2**31 - 1}, "step").max_batch == 2**31 - 1
