"""Axes of slices and paddings: written out, they say the same, and onnxruntime's optimizer takes them right."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper

from deploycnn.graph.axes import spell_out_axes
from deploycnn.graph.cleanup import simplify
from deploycnn.graph.parity import cpu_session
from deploycnn.quantization import packs
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from tests.graph.nets import Weights, graph, images
from tests.quantization.test_insertion import quantized

RNG = np.random.default_rng(5)


def between(nodes: list, weights: Weights, channels: int = 8, **options: object) -> ModelProto:
    """A node from "c" to "m" between two convolutions."""
    weights |= {
        "w": RNG.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "w2": RNG.standard_normal((4, channels, 1, 1)).astype(np.float32),
    }
    around = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="c", pads=[1] * 4),
        *nodes,
        helper.make_node("Conv", ["m", "w2"], ["y"], name="y"),
    ]
    return graph(around, weights, **options)  # type: ignore[arg-type]


def padded(amounts: list[int], axes: list[int], channels: int) -> ModelProto:
    weights: Weights = {"amounts": np.int64(amounts), "axes": np.int64(axes)}
    return between(
        [helper.make_node("Pad", ["c", "amounts", "", "axes"], ["m"], name="m")], weights, channels
    )


def sliced(inputs: list[str]) -> ModelProto:
    weights: Weights = {
        "starts": np.int64([0, 0, 1, 0]), "ends": np.int64([9, 9, 8, 9]), "steps": np.int64([1, 1, 2, 3])
    }  # fmt: skip
    return between([helper.make_node("Slice", ["c", "starts", "ends", *inputs], ["m"], name="m")], weights)


def resized(axes: list[int], **attributes: object) -> ModelProto:
    weights: Weights = {"scales": np.float32([2, 3] if len(axes) == 2 else [2])}
    made = helper.make_node("Resize", ["c", "", "scales"], ["m"], name="m", axes=axes, **attributes)
    return between([made], weights)


def averaged(dilation: int) -> ModelProto:
    pool = helper.make_node(
        "AveragePool", ["c"], ["m"], kernel_shape=[2, 2], dilations=[dilation] * 2, name="m"
    )
    return between([pool], {}, opset=19)


CASES = {
    "channels": padded([4, 4], [1], 16),
    "rows and columns": padded([1, 2, 3, 0], [2, 3], 8),
    "from behind": padded([1, 0, 2, 3], [-1, -2], 8),
    "slice without axes": sliced(["", "steps"]),
    "slice without axes and steps": sliced([]),
    "resized rows and columns": resized([2, 3]),
    "resized from behind": resized([-1], mode="linear"),
    "average": averaged(1),
    "dilated average": averaged(2),
}


@pytest.mark.parametrize("model", CASES.values(), ids=CASES)
def test_written_out_it_computes_the_same(model: ModelProto) -> None:
    x = images(2, (3, 8, 8))
    expected = cpu_session(model, optimize=False).run(None, {"x": x})[0]
    clean = simplify(model)
    (held,) = (node for node in clean.graph.node if node.op_type != "Conv")
    assert len(held.input) <= 3 if held.op_type != "Slice" else held.input[3]
    assert (
        not {"axes", "dilations"} & {item.name for item in held.attribute}
        or model is CASES["dilated average"]
    )
    for optimize in (False, True):
        found = cpu_session(clean, optimize=optimize).run(None, {"x": x})[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino"])
@pytest.mark.parametrize("model", CASES.values(), ids=CASES)
def test_quantized_it_runs(model: ModelProto, target: str) -> None:
    pack, x = packs.get(target), images(2, (3, 8, 8))
    expected = cpu_session(model, optimize=False).run(None, {"x": x})[0]
    bound = float(np.abs(expected).max()) * 1.1
    made = quantized(prepare(model, pack), pack, (-bound, bound))
    meant, found = (cpu_session(made, optimize=optimize).run(None, {"x": x})[0] for optimize in (False, True))
    assert found.shape == expected.shape
    assert np.abs(found - meant).max() < 0.04 * bound
    assert np.abs(meant - expected).max() < 0.3 * bound


def test_what_is_computed_stays() -> None:
    weights: Weights = {"four": np.int64([0, 4]), "zero": np.int64([0]), "axes": np.int64([1])}
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="s", start=1, end=2),
        helper.make_node("Concat", ["zero", "s"], ["amounts"], name="amounts", axis=0),
        helper.make_node("Pad", ["c", "amounts", "", "axes"], ["m"], name="m"),
    ]
    model = between(nodes, weights, 11, shape=("N", "C", 8, 8))
    (held,) = (node for node in simplify(model).graph.node if node.op_type == "Pad")
    assert list(held.input) == ["c", "amounts", "", "axes"]


@pytest.mark.parametrize(
    ("sizes", "attributes"),
    [([16, 12], {}), ([5, 7], {}), ([16, 12], {"keep_aspect_ratio_policy": "not_larger"})],
    ids=["larger", "smaller", "aspect kept"],
)
def test_a_resize_to_sizes_becomes_one_by_scales_where_they_say_the_same(
    sizes: list[int], attributes: dict[str, str]
) -> None:
    resize = helper.make_node("Resize", ["c", "", "", "sizes"], ["m"], name="m", axes=[2, 3], **attributes)
    model = between([resize], {"sizes": np.int64(sizes)})
    x = images(2, (3, 8, 8))
    expected = cpu_session(model).run(None, {"x": x})[0]
    pack = packs.get("onnxruntime-cpu")
    ready = prepare(model, pack)
    (held,) = (node for node in ready.graph.node if node.op_type == "Resize")
    if attributes:
        assert [item.name for item in held.attribute if item.name == "axes"]
        assert "m" not in place(ready, pack).quantized_nodes
        return
    np.testing.assert_allclose(cpu_session(ready).run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)
    bound = float(np.abs(expected).max()) * 1.1
    found = cpu_session(quantized(ready, pack, (-bound, bound))).run(None, {"x": x})[0]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.3 * bound


@pytest.mark.parametrize(("amounts", "axes"), [([4], [1]), ([4, 4], [4])], ids=["too few", "no such axis"])
def test_what_is_wrong_stays(amounts: list[int], axes: list[int]) -> None:
    model = padded([4, 4], [1], 16)
    for name, content in (("amounts", amounts), ("axes", axes)):
        held = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        held.CopyFrom(numpy_helper.from_array(np.int64(content), name))
    assert spell_out_axes(model) == 0
    (pad,) = (node for node in model.graph.node if node.op_type == "Pad")
    assert list(pad.input) == ["c", "amounts", "", "axes"]
