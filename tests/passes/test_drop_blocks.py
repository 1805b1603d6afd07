"""The pass `drop_blocks`: from artifact to artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploycnn import schema
from deploycnn.core import Artifact
from deploycnn.errors import PassRequirementError, RecipeError
from deploycnn.models.artifact import load_model
from deploycnn.models.macs import count_macs
from deploycnn.passes.drop_blocks import DropBlocks
from tests.passes.conftest import FreshLogits
from tests.passes.test_prune import context, made_by, noise


@pytest.fixture
def resnet(tmp_path: Path) -> Artifact:
    return made_by("source", "zoo", {"name": "resnet20"}, context(tmp_path / "source", data=noise()))


@pytest.mark.usefixtures("one_thread")
def test_dropped_then_pruned_and_exported_reloads_bit_for_bit(
    resnet: Artifact, fresh_logits: FreshLogits, tmp_path: Path
) -> None:
    options = {"count": 2, "importance_images": 40}
    shallow = made_by("pass", "drop_blocks", options, context(tmp_path / "d", data=noise()), resnet)
    record = shallow.facts.record["blocks"]
    assert len(record["dropped"]) == 2
    assert set(record["dropped"]) < set(record["candidates"])
    assert shallow.facts.macs == record["macs_after"] < 0.85 * record["macs_before"]
    assert shallow.facts.macs == count_macs(load_model(shallow.path), (3, 32, 32))
    assert [row[2] for row in shallow.facts.record["tables"][0]["rows"]] == [True] * 2 + [False] * 5

    pruned = made_by("pass", "prune", {"pruning_ratio": 0.5}, context(tmp_path / "p", data=noise()), shallow)
    exported = made_by("pass", "export", {}, context(tmp_path / "e"), pruned)
    assert exported.path.exists()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = load_model(pruned.path)(images).numpy()
    np.testing.assert_array_equal(fresh_logits(pruned.path, images), expected)


def test_blocks_by_name_need_no_data(resnet: Artifact, tmp_path: Path) -> None:
    step = DropBlocks(names=("layer2.1",))
    assert not step.needs_data
    draft = step.run(resnet, context(tmp_path / "d"))
    assert draft.facts.record["blocks"]["dropped"] == ["layer2.1"]


def test_more_blocks_than_there_are(resnet: Artifact, tmp_path: Path) -> None:
    with pytest.raises(PassRequirementError, match="count: 9, but the model has 7 residual blocks"):
        DropBlocks(count=9).run(resnet, context(tmp_path / "d", data=noise()))
    with pytest.raises(PassRequirementError, match="count: 5, but the model has 4"):
        DropBlocks(count=5, protect=("layer1",)).run(resnet, context(tmp_path / "p", data=noise()))


def test_names_that_the_model_does_not_have_are_refused(resnet: Artifact, tmp_path: Path) -> None:
    with pytest.raises(PassRequirementError, match='drop_blocks.protect: the model has no module "layr1"'):
        DropBlocks(count=1, protect=("layr1",)).run(resnet, context(tmp_path / "d", data=noise()))
    with pytest.raises(RecipeError, match="drop_blocks.protect: goes with count"):
        DropBlocks(names=("layer1.0",), protect=("layer1",))


@pytest.mark.parametrize("options", [{}, {"count": 1, "names": ["layer1.0"]}])
def test_one_of_count_and_names(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="exactly one of count and names"):
        schema.build(DropBlocks, options, "drop_blocks")
