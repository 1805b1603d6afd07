"""What ``build`` makes, against formulas in float64 and onnxruntime."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.model import load_onnx, opset_of, save_onnx
from deploycnn.graph.parity import cpu_session
from deploycnn.quantization import packs
from deploycnn.quantization.fusion import census, count_fused
from deploycnn.quantization.grids import activation_parameters
from deploycnn.quantization.insertion import build, ranges_needed
from deploycnn.quantization.isa import Isa
from deploycnn.quantization.packs import RulePack
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.types import IntegerWeight, NumberFormat, Range, is_balanced
from deploycnn.quantization.weights import quantize_weight
from tests.graph.nets import Weights, graph, images, operators
from tests.quantization.test_placement import conv, inception, model, node, residual

Array = npt.NDArray[np.float64]
CPU = packs.get("cpu")
OPENVINO = packs.get("openvino")


def spread(model: ModelProto, pack: RulePack, bounds: Range = (-2.0, 3.0)) -> dict[str, Range]:
    return dict.fromkeys(ranges_needed(place(model, pack)), bounds)


def quantized(
    model: ModelProto, pack: RulePack, bounds: Range = (-2.0, 3.0), *, keep_float: Collection[str] = ()
) -> ModelProto:
    plan = place(model, pack, keep_float)
    made = build(model, plan, dict.fromkeys(ranges_needed(plan), bounds))
    onnx.checker.check_model(made, full_check=True)
    return made


def run(model: ModelProto, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    (found,) = cpu_session(model, optimize=False).run(None, {model.graph.input[0].name: x})
    return np.asarray(found)


# The reference: the specification's formulas in float64, none of this package's code.


def fake(x: Array, low: float, high: float, dtype: str, symmetric: bool) -> tuple[Array, float]:
    """``x`` rounded, and the step."""
    first, last = (0, 255) if dtype == "uint8" else (-128, 127)
    if symmetric:
        scale, zero = float(np.float32(max(-low, high) / 127)), 0.0  # QuantizeLinear itself clips at -128
    else:
        scale = float(np.float32((high - low) / 255))
        zero = float(np.clip(np.round(first - low / scale), first, last))
    return (np.clip(np.round(x / scale) + zero, first, last) - zero) * scale, scale


def row_scales(weight: Array, levels: int) -> Array:
    """The largest weight over the levels; for 4 bits, of 71 shares of that down to 0.3, the one of least error."""
    widest = (np.abs(weight).max(axis=1) / levels).astype(np.float32)
    if levels != 7:
        return widest.astype(np.float64)
    tried = [(widest * share).astype(np.float32).astype(np.float64) for share in np.linspace(1, 0.3, 71)]
    errors = [
        np.square(np.clip(np.round(weight / scale[:, None]), -7, 7) * scale[:, None] - weight).sum(axis=1)
        for scale in tried
    ]
    return np.stack(tried)[np.argmin(errors, axis=0), np.arange(len(weight))]


def fake_rows(weight: Array, levels: int) -> Array:
    scale = row_scales(weight, levels)[:, None]
    return np.clip(np.round(weight / scale), -levels, levels) * scale


def fake_layer(x: Array, step: float, weight: np.ndarray, bias: np.ndarray, levels: int) -> Array:
    """A 1x1 convolution of rounded weights, with a bias in steps of input scale x weight scale."""
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    scale = step * row_scales(rows, levels)
    return fake_rows(rows, levels) @ x + (np.round(bias / scale) * scale)[:, None]


@given(
    seed=st.integers(0, 2**16),
    low=st.floats(-4, 0),
    high=st.floats(0.1, 6),
    cut=st.floats(0.05, 7),
    scheme=st.sampled_from([("uint8", False), ("int8", False), ("int8", True)]),
    levels=st.sampled_from([127, 63, 7]),
)
@settings(max_examples=30, deadline=None)
def test_the_graph_computes_what_the_formulas_say(
    seed: int, low: float, high: float, cut: float, scheme: tuple[str, bool], levels: int
) -> None:
    rng = np.random.default_rng(seed)
    w1, w2 = rng.standard_normal((6, 3)), rng.standard_normal((4, 6))
    b1, b2 = rng.standard_normal(6), rng.standard_normal(4)
    weights: Weights = {
        "w1": w1.astype(np.float32).reshape(6, 3, 1, 1), "w2": w2.astype(np.float32).reshape(4, 6, 1, 1),
        "b1": b1.astype(np.float32), "b2": b2.astype(np.float32), "lo": np.float32(0), "hi": np.float32(cut),
    }  # fmt: skip
    made = model(
        [node("Conv", "x w1 b1", "c"), node("Clip", "c lo hi", "r"), node("Conv", "r w2 b2", "y")], weights
    )
    dtype, symmetric = scheme
    number = NumberFormat(
        dtype={127: "int8", 63: "int8", 7: "int4"}[levels], symmetric=True, reduced=levels == 63
    )  # type: ignore[arg-type]
    pack = replace(CPU, activation=NumberFormat(dtype=dtype, symmetric=symmetric), weight=number)  # type: ignore[arg-type]
    found = run(quantized(made, pack, (low, high)), x := images(2, (3, 8, 8), seed=seed))

    flat = np.moveaxis(x.astype(np.float64), 1, 0).reshape(3, -1)
    q, step0 = fake(flat, low, high, dtype, symmetric)
    r = fake_layer(q, step0, weights["w1"], weights["b1"], levels)
    if symmetric:  # the clip cannot be the range then, so the convolution's result is rounded on its own
        r, _ = fake(r, low, high, dtype, symmetric)
    r, step1 = fake(np.clip(r, 0, cut), 0.0, min(high, cut), dtype, symmetric)
    y, step2 = fake(fake_layer(r, step1, weights["w2"], weights["b2"], levels), low, high, dtype, symmetric)
    flat_found = np.moveaxis(found.astype(np.float64), 1, 0).reshape(4, -1)
    # Float32 may put a value on the border of two levels to the other side: rarely, and then it carries on.
    off = np.abs(flat_found - y) > step2 * 0.01
    assert off.mean() < 0.02
    carried = np.abs(w2).sum(axis=1).max() * max(step1, step0) * 2 + step2
    assert np.abs(flat_found - y).max() <= carried


def test_clips_are_left_out_only_where_rounding_does_the_same() -> None:
    made = residual()
    assert "Relu" not in operators(quantized(made, CPU))
    assert operators(quantized(made, packs.get("tensorrt"))).count("Relu") == 3
    symmetric = replace(CPU, activation=NumberFormat(dtype="int8", symmetric=True))
    both = quantized(made, symmetric)
    assert operators(both).count("Relu") == 3
    plan = place(made, symmetric)
    assert [item.value for item in plan.activations] == ["x", "stem", "r", "a", "ar", "b", "sum", "y1", "y"]


def padded_shortcut(pads: tuple[int, ...] = (0, 1, 0, 0, 0, 2, 0, 0)) -> ModelProto:
    """A residual block whose shortcut is padded with channels of zeros, as in the ResNets of CIFAR."""
    weights: Weights = {"pads": np.array(pads, np.int64)}
    nodes = [
        conv("x", "stem", weights, (8, 3, 3, 3)),
        node("Relu", "stem", "r"),
        node("Pad", "r pads", "wide"),
        conv("r", "a", weights, (11, 8, 3, 3)),
        node("Add", "a wide", "sum"),
        node("Relu", "sum", "s"),
        conv("s", "y", weights, (4, 11, 1, 1)),
    ]
    return model(nodes, weights)


@given(low=st.floats(-4, 0), high=st.floats(0.1, 6), dtype=st.sampled_from(["uint8", "int8"]))
@settings(max_examples=15, deadline=None)
def test_padding_on_integers_is_padding(low: float, high: float, dtype: str) -> None:
    made = padded_shortcut()
    pack = replace(CPU, activation=NumberFormat(dtype=dtype))  # type: ignore[arg-type]
    between = quantized(made, replace(pack, on_integers=frozenset()), (low, high))
    on_integers = quantized(made, pack, (low, high))
    x = images(2, (3, 8, 8))
    np.testing.assert_array_equal(run(on_integers, x), run(between, x))
    assert operators(on_integers).count("QuantizeLinear") == operators(between).count("QuantizeLinear") - 1
    (pad,) = (held for held in on_integers.graph.node if held.op_type == "Pad")
    assert pad.input[0].endswith("QuantizeLinear_Output")


def test_padding_between_other_operators_leaves_no_float_behind(tmp_path: Path) -> None:
    counts = {}
    for name, pack in {"between": replace(CPU, on_integers=frozenset()), "on integers": CPU}.items():
        save_onnx(quantized(padded_shortcut(), pack), tmp_path / f"{name}.onnx")
        counts[name] = count_fused(tmp_path / f"{name}.onnx")
    assert counts["between"].stray == counts["on integers"].stray + 2
    assert counts["on integers"].by_operator["Pad"] == 1


def test_padding_with_other_numbers_or_of_what_is_float_stays() -> None:
    made = padded_shortcut()
    made.graph.initializer.append(numpy_helper.from_array(np.float32(1.0), "one"))
    (pad,) = (held for held in made.graph.node if held.op_type == "Pad")
    pad.input.append("one")
    assert not any(
        held.op_type == "Pad" and held.input[0].endswith("QuantizeLinear_Output")
        for held in quantized(made, CPU).graph.node
    )


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [((-2.0, 3.0), "int8"), ((-3.0, 1.5), "int8"), ((-1.0, 3.0), "uint8"), ((-0.28, 6.0), "uint8")],
)
def test_openvino_gets_balanced_values_without_a_zero_point(bounds: Range, expected: str) -> None:
    made = residual()
    grids = activation_parameters(made, place(made, OPENVINO), spread(made, OPENVINO, bounds))
    assert {grids[value].number.dtype for value in ("x", "b")} == {expected}
    assert {grids[value] for value in ("r", "ar")} == {(np.float32(bounds[1] / 255), 0, OPENVINO.activation)}
    if expected == "int8":
        assert grids["x"][:2] == (np.float32(max(-bounds[0], bounds[1]) / 127), 0)
    stored = {tensor.name: tensor.data_type for tensor in quantized(made, OPENVINO, bounds).graph.initializer}
    assert stored["x_zero_point"] == (TensorProto.INT8 if expected == "int8" else TensorProto.UINT8)
    assert stored["r_zero_point"] == TensorProto.UINT8


@given(low=st.floats(-9, 0), high=st.floats(0, 9))
def test_a_symmetric_format_costs_at_most_a_third_of_a_step(low: float, high: float) -> None:
    symmetric, _ = NumberFormat(dtype="int8", symmetric=True).scale_and_zero_point((low, high))
    free, _ = NumberFormat().scale_and_zero_point((low, high))
    assert not is_balanced((low, high)) or symmetric <= free * 4 / 3 * 255 / 254 * 1.001


def test_a_range_does_not_exceed_what_a_clip_lets_through() -> None:
    weights: Weights = {"lo": np.float32(0), "hi": np.float32(6)}
    nodes = [
        conv("x", "c", weights, (4, 3, 1, 1)),
        node("Clip", "c lo hi", "r"),
        conv("r", "y", weights, (4, 4, 1, 1)),
    ]
    made = model(nodes, weights)
    plan = place(made, CPU)
    parameters = activation_parameters(made, plan, dict.fromkeys(ranges_needed(plan), (-1.0, 8.0)))
    assert parameters["r"] == (np.float32(6 / 255), 0, CPU.activation)
    assert parameters["y"].zero_point > 0


def test_tied_values_share_their_scale_as_one_constant() -> None:
    made = inception()
    plan = place(made, CPU)
    ranges = {value: (-1.0, 1.0 + index) for index, value in enumerate(ranges_needed(plan))}
    parameters = activation_parameters(made, plan, ranges)
    assert parameters["r"] == parameters["p"]
    assert parameters["j"] == parameters["ar"] == parameters["qr"]
    result = build(made, plan, ranges)
    scales = {item.name: item.input[1] for item in result.graph.node if item.op_type == "QuantizeLinear"}
    assert scales["r_QuantizeLinear"] == scales["p_QuantizeLinear"]
    assert len({scales[f"{value}_QuantizeLinear"] for value in ("ar", "qr", "j")}) == 1


def test_each_constant_is_stored_once_and_readers_share_a_pair() -> None:
    weights: Weights = {"w": np.float32(np.ones((3, 3, 1, 1)))}
    nodes = [
        node("Conv", "x w", "a"),
        node("Conv", "x w", "b"),
        node("Add", "a b", "s"),
        node("Conv", "s w", "y"),
    ]
    result = quantized(model(nodes, weights), CPU)
    counted = Counter(item.op_type for item in result.graph.node)
    assert counted["QuantizeLinear"] == 5  # x, a, b, s, y
    assert counted["DequantizeLinear"] == 6  # and w
    assert not any(tensor.name == "w" for tensor in result.graph.initializer)


def test_outputs_keep_their_names_and_metadata_stays() -> None:
    made = residual()
    made.metadata_props.add(key="classes", value="a,b")
    result = quantized(made, CPU)
    assert [item.name for item in result.graph.output] == ["y"]
    assert result.graph.node[-1].op_type == "DequantizeLinear"
    assert result.metadata_props[0].value == "a,b"
    assert any(item.op_type == "Relu" for item in made.graph.node), "the float graph is left as it is"


def test_everything_fuses_in_onnxruntime(tmp_path: Path) -> None:
    made = inception()
    pack = packs.get("onnxruntime-cpu", Isa(name="avx512_vnni", saturates=False))
    path = tmp_path / "q.onnx"
    save_onnx(quantized(made, pack), path)
    found = count_fused(path)
    assert (found.stray, found.float_compute) == (1, 0)
    assert found.layers == dict.fromkeys(["c", "q", "a", "z", "y"], True)
    assert found.by_operator["QLinearConcat"] == 1


def test_the_census_tells_what_did_not_fuse(tmp_path: Path) -> None:
    made = inception()
    plan = place(made, CPU, keep_float=("a",))
    path = tmp_path / "q.onnx"
    save_onnx(build(made, plan, dict.fromkeys(ranges_needed(plan), (-1.0, 2.0))), path)
    found = census(path, "cpu")
    assert found is not None
    assert found.layers == {"c": True, "q": True, "a": False, "z": True, "y": True}
    assert found.float_compute == 1
    assert census(path, "tensorrt") is None


def test_openvino_computes_on_integers_and_is_counted(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    made = inception()
    path = tmp_path / "q.onnx"
    save_onnx(quantized(made, packs.get("openvino"), (-6.0, 6.0)), path)
    found = census(path, "openvino")
    assert found is not None
    assert found.runtime == "openvino"
    assert found.layers == dict.fromkeys(["c", "q", "a", "z", "y"], True)
    assert found.float_compute == 0


@pytest.mark.parametrize(("dtype", "kind"), [("int8", TensorProto.INT8), ("int4", TensorProto.INT4)])
def test_weights_only_files_are_small_and_compute_in_float(dtype, kind: int) -> None:
    made = residual()
    result = quantized(made, packs.weights_only(CPU, dtype))
    held = {tensor.name: tensor for tensor in result.graph.initializer}
    assert held["a.w_quantized"].data_type == kind
    assert len(held["a.w_quantized"].raw_data) == 16 * 16 * 9 // (2 if dtype == "int4" else 1)
    assert "QuantizeLinear" not in operators(result)
    assert opset_of(result) == (21 if dtype == "int4" else 18)
    x = images(2, (3, 8, 8))
    rounded = ModelProto()
    rounded.CopyFrom(made)
    for tensor in rounded.graph.initializer:
        if len(tensor.dims) == 4:
            # The first and the last layer keep 8 bits.
            levels = 7 if held[f"{tensor.name}_quantized"].data_type == TensorProto.INT4 else 127
            array = numpy_helper.to_array(tensor)
            rows = fake_rows(array.reshape(len(array), -1).astype(np.float64), levels)
            tensor.CopyFrom(
                numpy_helper.from_array(rows.reshape(array.shape).astype(np.float32), tensor.name)
            )
    assert np.allclose(run(result, x), run(rounded, x), atol=1e-5)


def test_given_integers_are_stored_as_they_are() -> None:
    made = residual()
    plan = place(made, CPU)
    array = numpy_helper.to_array(next(t for t in made.graph.initializer if t.name == "a.w"))
    nearest = quantize_weight(array, next(item for item in plan.weights if item.initializer == "a.w"))
    other = replace(nearest, integers=np.roll(nearest.integers, 1))
    result = build(made, plan, spread(made, CPU), {"a.w": other})
    stored = next(t for t in result.graph.initializer if t.name == "a.w_quantized")
    assert np.array_equal(numpy_helper.to_array(stored), other.integers)
    wrong = IntegerWeight(integers=other.integers[:2], scale=other.scale, axis=0)
    with pytest.raises(PassRequirementError, match=r'integer weights for "a.w" have shape'):
        build(made, plan, spread(made, CPU), {"a.w": wrong})


def test_a_huge_bias_beside_tiny_weights_is_kept() -> None:
    w = np.full((4, 3, 1, 1), 1e-12, np.float32)
    w[1:] = 0.5
    weights: Weights = {"w": w, "b": np.float32([100, 1, -1, 0])}
    made = model([node("Conv", "x w b", "y")], weights)
    found = run(quantized(made, CPU, (-120.0, 120.0)), np.zeros((1, 3, 8, 8), np.float32))
    assert np.abs(found[0, :, 0, 0] - [100, 1, -1, 0]).max() < 240 / 255


def test_missing_and_infinite_ranges_are_refused_by_name() -> None:
    made = residual()
    plan = place(made, CPU)
    ranges = spread(made, CPU)
    with pytest.raises(PassRequirementError, match='value "ar" is to be quantized and has no range'):
        build(made, plan, {name: bounds for name, bounds in ranges.items() if name != "ar"})
    with pytest.raises(PassRequirementError, match='value "ar" has the range'):
        build(made, plan, {**ranges, "ar": (0.0, float("nan"))})


def test_an_old_third_party_file_quantizes_for_every_target() -> None:
    shared = os.environ.get("DEPLOYCNN_SHARED")
    if not shared:
        pytest.skip("DEPLOYCNN_SHARED is not set")
    made = prepare(load_onnx(Path(shared) / "data" / "onnx" / "ultraface-slim-320.onnx"))
    for target in packs.PACKS:
        result = quantized(made, packs.get(target))
        assert [item.name for item in result.graph.output] == ["scores", "boxes"]


def test_names_that_are_taken_are_not_given_again() -> None:
    weights: Weights = {
        "w": np.float32(np.ones((3, 3, 1, 1))),
        "w_quantized": np.float32(np.ones((3, 3, 1, 1))),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["x_scale"]),
        helper.make_node("Conv", ["x_scale", "w_quantized"], ["y"]),
    ]
    result = quantized(prepare(graph(nodes, weights)), CPU)
    names = [tensor.name for tensor in result.graph.initializer]
    assert len(names) == len(set(names))
