from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from deploycnn import schema
from deploycnn.errors import ParityError, PassRequirementError, PreprocessingError, RecipeError
from deploycnn.graph.metadata import CLASSES as CLASSES_KEY
from deploycnn.graph.metadata import PREPROCESSING, get_metadata
from deploycnn.graph.model import load_onnx
from deploycnn.passes.export import Export
from tests.graph.nets import Residual, operators, randomized
from tests.passes.onnx_support import CLASSES, context, minted, pictures, torch_artifact


def test_export_writes_a_checked_graph_and_records_parity_on_validation_images(tmp_path, monkeypatch) -> None:
    data = pictures()
    source = torch_artifact(randomized(Residual()), monkeypatch, preprocessing=data.preprocessing.to_json())
    ctx = context(tmp_path, data)
    draft = Export().run(source, ctx)
    model = load_onnx(ctx.output / "model.onnx")
    assert "BatchNormalization" not in operators(model)
    assert draft.inputs[0].shape == (None, 3, 12, 12)
    assert draft.outputs[0].name == "logits"
    assert draft.facts.size_bytes == (ctx.output / "model.onnx").stat().st_size
    assert (draft.facts.params, draft.facts.macs, draft.facts.precision) == (7, 11, "fp32")
    parity = draft.facts.record["parity"]
    assert parity["source"] == "val images"
    assert parity["reference"] == "pytorch"
    assert parity["batch_sizes"] == [1, 5]
    assert parity["images"] == 16
    assert 0 <= parity["max_abs_error"] < 1e-4
    assert parity["tolerance"] == {"absolute": 1e-4, "relative": 1e-4}
    assert draft.facts.record["export"] == {"opset": 18, "nodes": 9, "batchnorms_left": 0}
    metadata = get_metadata(model)
    assert json.loads(metadata[PREPROCESSING]) == json.loads(json.dumps(data.preprocessing.to_json()))
    assert json.loads(metadata[CLASSES_KEY]) == list(CLASSES)
    json.dumps(dict(draft.facts.record))


def test_parity_takes_training_images_without_validation_and_noise_without_data(
    tmp_path, monkeypatch
) -> None:
    source = torch_artifact(randomized(Residual()), monkeypatch)
    for data, expected in ((pictures(val=0), "train images"), (None, "random images")):
        ctx = context(tmp_path / expected, data)
        record = Export(parity_images=6).run(source, ctx).facts.record["parity"]
        assert (record["source"], record["images"]) == (expected, 6)


def test_a_graph_that_computes_something_else_is_refused(tmp_path, monkeypatch) -> None:
    model = randomized(Residual())
    source = torch_artifact(model, monkeypatch)
    from deploycnn.graph import export

    def fault(*arguments: object, **options: object) -> object:
        graph = real(*arguments, **options)
        with torch.no_grad():
            model.conv.weight[0, 0, 0, 0] += 0.05
        return graph

    real = export.export_onnx
    monkeypatch.setattr(export, "export_onnx", fault)
    with pytest.raises(ParityError, match="differs from its pytorch reference by .*16 random images"):
        Export().run(source, context(tmp_path, None))


def test_other_preprocessing_is_refused(tmp_path, monkeypatch) -> None:
    other = dataclasses.replace(pictures().preprocessing, channels="bgr")
    source = torch_artifact(randomized(Residual()), monkeypatch, preprocessing=other.to_json())
    with pytest.raises(PreprocessingError, match="export.*channels"):
        Export().run(source, context(tmp_path, pictures()))


def test_requirements_are_checked_without_loading(monkeypatch) -> None:
    source = torch_artifact(randomized(Residual()), monkeypatch)
    Export().requires(source)
    with pytest.raises(PassRequirementError, match="two different positive sizes"):
        Export(parity_batch_sizes=(3, 3)).requires(source)
    with pytest.raises(PassRequirementError, match="one batch of images"):
        Export().requires(dataclasses.replace(source, inputs=source.inputs * 2))


def test_an_unknown_image_size_is_refused(tmp_path, monkeypatch) -> None:
    source = torch_artifact(randomized(Residual()), monkeypatch, size=None)
    with pytest.raises(PassRequirementError, match="name data"):
        Export().run(source, context(tmp_path, None))


@pytest.mark.parametrize("options", [{"opset": 16}, {"relative_tolerance": -1}, {"parity_batch_sizes": [1]}])
def test_fields_out_of_range_are_refused(options) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        schema.build(Export, options, "export")


def test_equal_runs_write_equal_bytes(tmp_path, monkeypatch) -> None:
    source = torch_artifact(randomized(Residual()), monkeypatch)
    files = []
    for name in ("first", "second"):
        ctx = context(tmp_path / name, pictures())
        artifact = minted(Export().run(source, ctx), ctx)
        files.append(artifact.path.read_bytes())
    assert files[0] == files[1]
    assert np.frombuffer(files[0], np.uint8).size > 1000
