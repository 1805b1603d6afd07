"""The pass `sparse`: from artifact to artifact, through training and export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from deploycnn import schema
from deploycnn.core import Artifact
from deploycnn.errors import PassRequirementError, RecipeError
from deploycnn.models.artifact import load_model
from deploycnn.passes.export import Export
from deploycnn.passes.sparse import Sparse
from deploycnn.passes.train import Train
from deploycnn.training.settings import TrainingSettings
from tests.passes.test_prune import context, made_by
from tests.passes.training_support import DATA, QUICK, as_artifact, make_artifact


def sparse(source: Artifact, folder: Path, ctx: dict[str, Any] | None = None, **options: Any) -> Artifact:
    where = context(folder, **(ctx or {"data": DATA}))
    return as_artifact(Sparse(**options).run(source, where), where.output)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: layer.weight.detach()
        for name, layer in load_model(path).named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }


def zero_ratio(path: Path) -> float:
    found = weights(path).values()
    return sum(int((w == 0).sum()) for w in found) / sum(w.numel() for w in found)


def test_unstructured_zeros_survive_training_and_export(tmp_path: Path) -> None:
    made = sparse(
        make_artifact(tmp_path / "source"), tmp_path / "sparse", pattern="unstructured", sparsity=0.8
    )
    assert zero_ratio(made.path) == pytest.approx(0.8, abs=1e-4)
    record = made.facts.record["sparsity"]
    assert record["zeros_ratio"] == pytest.approx(0.8, abs=1e-4)
    assert "no speed-up" in record["speed_up"]
    assert made.facts.record["tables"][0]["title"] == "Zeros by layer"

    where = context(tmp_path / "train", data=DATA, lineage=(made,))
    trained = as_artifact(Train(**QUICK).run(made, where), where.output)
    before, after = weights(made.path), weights(trained.path)
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    assert not all(torch.equal(before[name], after[name]) for name in before)

    where = context(tmp_path / "onnx", data=DATA)
    Export().run(trained, where)
    graph = onnx.load(where.output / "model.onnx").graph
    stored = [numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) > 1]
    zeros = sum(int((w == 0).sum()) for w in stored) / sum(w.size for w in stored)
    assert zeros == pytest.approx(0.8, abs=1e-3)


def test_without_the_lineage_zeros_would_not_survive(tmp_path: Path) -> None:
    made = sparse(
        make_artifact(tmp_path / "source"), tmp_path / "sparse", pattern="unstructured", sparsity=0.8
    )
    where = context(tmp_path / "train", data=DATA)
    Train(**QUICK).run(made, where)
    assert zero_ratio(where.output / "model.safetensors") < 0.5


def test_gradual_sparsity_trains_to_its_goal(tmp_path: Path) -> None:
    settings = TrainingSettings(**QUICK)
    options: dict[str, Any] = {
        "pattern": "unstructured",
        "sparsity": 0.7,
        "gradual": settings,
        "scope": "layer",
    }
    assert Sparse(**options).needs_data
    made = sparse(make_artifact(tmp_path / "source"), tmp_path / "sparse", **options)
    assert all(
        float((w == 0).float().mean()) == pytest.approx(0.7, abs=0.6 / w.numel() + 1e-6)
        for w in weights(made.path).values()
    )
    epochs = made.facts.record["training"]["epochs"]
    assert len(epochs) == 2
    assert made.facts.record["training"]["kept_epoch"] == 2
    assert made.facts.classes == DATA.dataset.classes
    assert made.facts.preprocessing == DATA.preprocessing.to_json()


def test_two_four_of_a_cifar_resnet(tmp_path: Path) -> None:
    source = made_by("source", "zoo", {"name": "resnet20"}, context(tmp_path / "source"))
    made = sparse(source, tmp_path / "sparse", {}, pattern="2:4", gpu="T4")
    found = weights(made.path)
    for name, weight in found.items():
        if name == "conv1":
            assert int((weight == 0).sum()) == 0
        else:
            fours = (weight != 0).unflatten(1, (-1, 4)).sum(dim=2)
            assert int(fours.max()) == 2
    record = made.facts.record["sparsity"]
    assert record["zeros_ratio"] == 0.5
    assert "conv1" not in record["layers"]
    assert "compute capability 7.5 has no sparse tensor cores" in record["speed_up"]
    assert record["permutation"]["groups"] > 5
    assert record["permutation"]["kept_magnitude_gain_ratio"] > 0.005
    plain = sparse(source, tmp_path / "plain", {}, pattern="2:4", permute=False)
    assert "no speed-up on CPUs" in plain.facts.record["sparsity"]["speed_up"]

    def kept(path: Path) -> float:
        return sum(float(weight.abs().sum()) for weight in weights(path).values())

    assert kept(made.path) > 1.002 * kept(plain.path)


def test_protected_layers_stay_dense(tmp_path: Path) -> None:
    source = make_artifact(tmp_path / "source")
    first = next(iter(weights(source.path)))
    made = sparse(source, tmp_path / "sparse", pattern="unstructured", sparsity=0.9, protect=(first,))
    assert bool((weights(made.path)[first] != 0).all())
    with pytest.raises(PassRequirementError, match='sparse.protect: the model has no module "frist"'):
        sparse(source, tmp_path / "wrong", pattern="unstructured", sparsity=0.9, protect=("frist",))
    names = tuple(weights(source.path))
    with pytest.raises(PassRequirementError, match="no convolution or linear layer is left"):
        sparse(source, tmp_path / "all", pattern="unstructured", sparsity=0.9, protect=names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "unstructured"}, "sparsity: is needed for pattern unstructured"),
        ({"pattern": "2:4", "sparsity": 0.5}, "sparsity: does not go with pattern 2:4"),
        ({"pattern": "2:4", "gradual": {}}, "gradual: goes with pattern unstructured"),
        ({"pattern": "unstructured", "sparsity": 0.5, "gpu": "A100"}, "gpu: the forecast is for pattern 2:4"),
        ({"pattern": "unstructured", "sparsity": 1.0}, "less than 1"),
        ({"pattern": "unstructured", "sparsity": 0.5, "gradual": {"epoch": 3}}, 'did you mean "epochs"'),
        (
            {"pattern": "unstructured", "sparsity": 0.5, "gradual": {"max_minutes": 5}},
            "leave max_minutes and early_stopping_patience out",
        ),
        (
            {"pattern": "unstructured", "sparsity": 0.5, "gradual": {"early_stopping_patience": 2}},
            "leave max_minutes and early_stopping_patience out",
        ),
        ({"pattern": "4:8"}, "unstructured"),
        ({"pattern": "unstructured", "sparsity": 0.5, "permute": False}, "reordered for pattern 2:4 only"),
        ({"pattern": "2:4", "scope": "layer"}, "scope: goes with pattern unstructured"),
    ],
)
def test_wrong_options_are_recipe_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        schema.build(Sparse, options, "variants.sparse.0.sparse")
    assert message in str(caught.value)


def test_options_survive_the_recipe() -> None:
    options = {"pattern": "unstructured", "sparsity": 0.5, "gradual": {"epochs": 3}}
    step = schema.build(Sparse, options, "sparse")
    assert schema.build(Sparse, schema.to_json(step), "sparse") == step
    assert dataclasses.asdict(step)["gradual"]["epochs"] == 3
    assert np.isclose(step.sparsity or 0, 0.5)
