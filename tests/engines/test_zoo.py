"""Engines of all the zoo's models in every precision, by the commands that users give.

Parity, ranges and accuracy are other tests' matter, so their passes get a few images each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import deploycnn
from deploycnn import recipes
from deploycnn.api import dry_run
from deploycnn.engines.auditing import audit_engine
from deploycnn.models.zoo import BUILDERS, INPUT_SIZE, build
from deploycnn.training.batchnorm import reestimate

EXPORT = {"export": {"parity_images": 5}}
INT8 = {"int8": {"calibration_images": 8}}
#: Random weights make logits so even that halves move them far.
HALF = {"fp16": {"relative_tolerance": 1.0, "calibration_images": 8, "parity_images": 5}}
VARIANTS: dict[str, list[Any]] = {
    "fp32": [EXPORT],
    "fp16": [EXPORT, HALF],
    "int8": [EXPORT, INT8],
    "int8_fp16": [EXPORT, INT8, HALF],
}
#: Precision of the variant's layers that INT8 leaves out.
REST = {"int8": "fp32", "int8_fp16": "fp16"}


#: One of each kind; the others differ from these in depth and width.
QUICK = ("lenet5", "resnet20", "resnet8x2", "resnet20b", "vgg16_bn", "mobilenet_v2_x0_5_s16", "efficientnet")
NETS = [net if net in QUICK else pytest.param(net, marks=pytest.mark.slow) for net in BUILDERS]


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("net", NETS)
def test_every_precision_of_a_zoo_model_becomes_the_engine_that_it_asks_for(net: str, tmp_path: Path) -> None:
    recipe = {
        "name": net,
        "source": {"zoo": net, "weights": str(weights_of(net, tmp_path / "weights.safetensors"))},
        "data": "digits",
        "preprocessing": {"size": INPUT_SIZE},
        "target": "tensorrt",
        "variants": VARIANTS,
    }
    run = tmp_path / "run"
    bundles = deploycnn.export(recipe, target="tensorrt-rtx", out=run)
    sizes = {}
    for name, folder in bundles.items():
        audited = audit_engine(folder)
        sizes[name] = (folder / "model.engine").stat().st_size
        assert audited.record is not None
        assert not audited.audit.unmatched, name
        assert audited.audit.as_asked > 0.99, name
        shares = audited.audit.shares
        if name in REST:
            assert deploycnn.lint(graph_of(run, name), "tensorrt").clean, name
            assert shares["int8"] > 0.4
            assert set(shares) <= {"int8", REST[name]}
        else:
            assert shares == {name: pytest.approx(1.0)}
    assert sizes["fp16"] < sizes["fp32"]
    assert {path.name for path in bundles["int8"].iterdir()} == {"model.engine", "layers.json", "deploy.json"}


def weights_of(net: str, path: Path) -> Path:
    """Random weights with the statistics of batch norms that have seen images.

    Without these, values of nets as deep as ResNet-110 grow beyond FP16's range, and the pass leaves such layers FP32.
    """
    torch.manual_seed(0)
    model = build(net)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, 0.0, 0.1)  # of zeros, some would be too small for FP16
    reestimate(model, [torch.randn(64, 3, *INPUT_SIZE)])
    save_file(model.state_dict(), path)
    return path


def graph_of(run: Path, variant: str) -> Path:
    """The ONNX file that a variant's engine was built from."""
    manifest = json.loads((run / "variants" / variant / "manifest.json").read_text())
    known = {
        json.loads(path.read_text())["key"]: path.parent for path in run.glob("artifacts/*/manifest.json")
    }
    return known[manifest["parents"][0]] / "model.onnx"


@pytest.mark.parametrize("name", [name for name in recipes.shipped() if name.startswith("tensorrt-")])
def test_recipes_for_gpus_are_planned_without_one(name: str, tmp_path: Path, images: Path) -> None:
    rows = dry_run(name, out=tmp_path / "run", data=images)
    last = {row.variant: row.step for row in rows}
    assert set(last.values()) == {"build_engine"}
    assert {"fp32", "fp16", "int8"} <= set(last)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image folder of two classes."""
    from PIL import Image

    for split in ("train", "val"):
        for label in ("ant", "bee"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
    return tmp_path / "images"
