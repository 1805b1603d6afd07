"""The pass `to_torch`, and what follows it: foreign ONNX files are trained, pruned and exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper

import deploycnn
from deploycnn.core import MAIN_FILE, Artifact, Facts, TensorSpec
from deploycnn.errors import ArtifactError, PassRequirementError
from deploycnn.graph.bridge import to_torch
from deploycnn.graph.bridge.skeleton import from_skeleton, skeleton
from deploycnn.models.artifact import load_model, save_model
from deploycnn.passes.prune import Prune
from deploycnn.passes.to_torch import ToTorch
from tests.graph.bridge.support import convnet, model_of, noise, quantized, run
from tests.passes.onnx_support import context, pictures


def artifact_of(model: ModelProto, folder: Path, precision: str = "fp32") -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return Artifact(
        key="k",
        format="onnx",
        path=folder / "model.onnx",
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 3, 12, 12)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 5)),),
        parents=(),
        facts=Facts(precision=precision),
    )


def imported(model: ModelProto, folder: Path) -> Artifact:
    ctx = context(folder, pictures())
    draft = ToTorch().run(artifact_of(model, folder / "in"), ctx)
    return Artifact(
        key="t",
        format=draft.format,
        path=ctx.output / MAIN_FILE["torch"],
        inputs=draft.inputs,
        outputs=draft.outputs,
        parents=(),
        facts=draft.facts,
    )


RELOAD = """
import pickle, sys, numpy as np, torch
from deploycnn.models.artifact import load_model
def refuse(*_, **__):
    raise RuntimeError("a pickle was read")
pickle.load = pickle.loads = torch.load = refuse
torch.set_num_threads(1)
with torch.no_grad():
    np.save(sys.argv[3], load_model(sys.argv[1])(torch.from_numpy(np.load(sys.argv[2]))).numpy())
"""


def reloaded(folder: Path, x: np.ndarray, scratch: Path) -> np.ndarray:
    """Logits in a fresh process that may read no pickle."""
    np.save(scratch / "x.npy", x)
    command = [sys.executable, "-c", RELOAD, str(folder), str(scratch / "x.npy"), str(scratch / "y.npy")]
    subprocess.run(command, check=True)
    found: np.ndarray = np.load(scratch / "y.npy")
    return found


@pytest.mark.parametrize("norm", [False, True])
def test_the_artifact_is_the_graph(tmp_path: Path, norm: bool) -> None:
    model = convnet(norm=norm)
    made = imported(model, tmp_path)
    assert made.facts.record["parity"]["worst_ratio"] <= 1
    x = noise(4, 3, 12, 12)
    np.testing.assert_allclose(
        reloaded(made.path.parent, x, tmp_path), run(model, x)[0], rtol=1e-4, atol=1e-5
    )
    assert sorted(path.name for path in made.path.parent.iterdir()) == [
        "architecture.json",
        "model.safetensors",
    ]
    assert made.facts.params == sum(p.numel() for p in load_model(made.path).parameters())
    assert made.facts.macs == 8 * 27 * 144 + 8 * 9 * 144 + 8 * 8 * 144 + 8 * 5


def test_pruned_it_reloads_bit_exactly(tmp_path: Path) -> None:
    made = imported(convnet(norm=True), tmp_path)
    ctx = context(tmp_path / "pruned", pictures())
    draft = Prune(pruning_ratio=0.5, round_to=2).run(made, ctx)
    assert draft.facts.macs is not None
    assert made.facts.macs is not None
    assert draft.facts.macs < 0.6 * made.facts.macs
    model = load_model(ctx.output)
    assert model.stem.weight.shape[0] == 4
    x = noise(4, 3, 12, 12)
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(reloaded(ctx.output, x, tmp_path), expected)


def test_a_final_softmax_is_left_out(tmp_path: Path) -> None:
    model = convnet()
    model.graph.node[-1].output[0] = "logits"
    model.graph.node.append(helper.make_node("Softmax", ["logits"], ["y"], "softmax", axis=1))
    made = imported(model, tmp_path)
    assert made.facts.record["to_torch"]["final_softmax_dropped"]
    x = noise(4, 3, 12, 12)
    logits = load_model(made.path)(torch.from_numpy(x))
    np.testing.assert_allclose(logits.softmax(1).detach().numpy(), run(model, x)[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(logits.detach().numpy(), run(convnet(), x)[0], rtol=1e-4, atol=1e-5)


def test_the_stored_graph_holds_no_weights_but_all_constants() -> None:
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["c"], "sub"),
        helper.make_node("Conv", ["c", "w"], ["d"], "conv"),
        helper.make_node("Mul", ["v", "two"], ["v2"], "double"),
        helper.make_node("Conv", ["d", "v2"], ["e"], "conv2"),
        helper.make_node("Conv", ["e", "v"], ["y"], "conv3"),
    ]
    weights = {
        "mean": noise(1, 3, 1, 1),
        "w": noise(256, 3, 3, 3),
        "v": noise(256, 256, 1, 1),
        "two": np.float32([2]),
    }
    bridge = to_torch(model_of(nodes, weights, inputs={"x": ["N", 3, 8, 8]}))
    again = from_skeleton(skeleton(bridge))
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in again.graph.initializer}
    assert not held["w"].any()
    np.testing.assert_array_equal(held["mean"], weights["mean"])
    np.testing.assert_array_equal(held["v"], weights["v"])  # conv2's weight is computed from it
    twin = to_torch(again).module
    assert twin.code == bridge.module.code
    assert {n: t.shape for n, t in twin.state_dict().items()} == {
        n: t.shape for n, t in bridge.module.state_dict().items()
    }
    with pytest.raises(ArtifactError, match="damaged"):
        from_skeleton(skeleton(bridge)[:-8])


def test_a_changed_graph_is_no_change_of_widths(tmp_path: Path) -> None:
    made = imported(convnet(), tmp_path)
    model = load_model(made.path)
    for node in model.graph.nodes:
        if node.target is torch.relu:
            node.target = torch.sigmoid
    model.recompile()
    with pytest.raises(ArtifactError, match="computes something else than its architecture"):
        save_model(model, tmp_path)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    int8 = quantized(convnet(), tmp_path)
    with pytest.raises(PassRequirementError, match="to_torch: the model is int8"):
        ToTorch().requires(artifact_of(int8, tmp_path, "int8"))
    maps = model_of(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        {"w": noise(4, 3, 1, 1)},
        inputs={"x": ["N", 3, 12, 12]},
    )
    with pytest.raises(PassRequirementError, match=r"must return one tensor of logits .* \[1, 4, 12, 12\]"):
        imported(maps, tmp_path / "maps")


def test_a_foreign_file_goes_the_whole_way(tmp_path: Path) -> None:
    model = convnet(norm=True, image=32, classes=10)
    onnx.save(model, tmp_path / "foreign.onnx")
    recipe = {
        "name": "foreign",
        "source": {"onnx": str(tmp_path / "foreign.onnx")},
        "data": "digits",
        "target": "onnxruntime-cpu",
        "variants": {
            "fp32": ["to_torch", {"train": {"epochs": 1}}, "export"],
            "small": [
                "to_torch",
                {"train": {"epochs": 1}},
                {"prune": {"pruning_ratio": 0.25, "round_to": 2}},
                {"distill": {"teacher": "fp32", "epochs": 1}},
                "export",
                # What this machine's timing says of so small a net is not what is tested.
                {"int8": {"calibration_images": 64, "do_no_harm": False}},
            ],
        },
        "profile": {
            "runtimes": ["onnxruntime"],
            "batch_sizes": [1],
            "threads": [1],
            "budget_s": 0.05,
            "rounds": 6,
            "memory": False,
        },
    }
    done = deploycnn.compress(recipe, out=tmp_path / "run")
    rows = {row["name"]: row for row in json.loads((done.path / "report.json").read_text())["variants"]}
    assert rows["small"]["params"] < rows["fp32"]["params"]
    assert rows["small"]["precision"] == "int8+f32"
    assert 0 <= rows["small"]["top1"] <= 1
