"""Each operator against onnxruntime, with attributes drawn by hypothesis, in several operator sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from deploycnn.graph.bridge import to_torch
from tests.graph.bridge.support import Array, assert_same_as_onnxruntime, by_torch, model_of, noise, run

few = settings(max_examples=12, deadline=None, derandomize=True)


def assert_operator(
    kind: str,
    x: Array,
    weights: dict[str, Array] | None = None,
    *,
    opset: int = 17,
    outputs: tuple[str, ...] = ("y",),
    names: list[str] | None = None,
    tolerance: float = 1e-4,
    **attributes: Any,
) -> None:
    """One operator of ``x`` and constants gives what it gives in onnxruntime."""
    weights = weights or {}
    node = helper.make_node(kind, names or ["x", *weights], list(outputs), "node", **attributes)
    model = model_of([node], weights, inputs={"x": ["N", *x.shape[1:]]}, outputs=outputs, opset=opset)
    assert_same_as_onnxruntime(model, x, rtol=tolerance, atol=tolerance)


UNARY = {
    "Abs": 13, "Acos": 7, "Asin": 7, "Atan": 7, "Ceil": 13, "Cos": 7, "Cosh": 9, "Erf": 13, "Exp": 13, "Floor": 13,
    "HardSwish": 14, "Identity": 13, "IsNaN": 13, "Mish": 18, "Neg": 13, "Reciprocal": 13, "Relu": 14, "Round": 11,
    "Sigmoid": 13, "Sign": 13, "Sin": 7, "Sinh": 9, "Softplus": 17, "Softsign": 17, "Tan": 7, "Tanh": 13, "Elu": 17,
    "Celu": 12, "Selu": 17, "LeakyRelu": 16, "HardSigmoid": 17, "ThresholdedRelu": 10, "Shrink": 9, "Gelu": 20,
}  # fmt: skip


@pytest.mark.parametrize("kind", UNARY)
def test_functions_of_one_tensor(kind: str) -> None:
    opset = max(UNARY[kind], 9)
    x = noise(2, 3, 5) * (0.3 if kind in {"Acos", "Asin"} else 2.0)
    assert_operator(kind, x, opset=opset)


@pytest.mark.parametrize("kind", ["Sqrt", "Log"])
def test_functions_of_positive_numbers(kind: str) -> None:
    assert_operator(kind, np.abs(noise(2, 3, 5)) + 0.1, opset=13)


@few
@given(
    kind=st.sampled_from(["Elu", "Celu", "Selu", "LeakyRelu", "HardSigmoid", "ThresholdedRelu"]),
    alpha=st.floats(0.1, 2.0),
)
def test_activations_with_alpha(kind: str, alpha: float) -> None:
    assert_operator(kind, noise(2, 3, 5), alpha=alpha)


def test_activations_with_other_attributes() -> None:
    x = noise(2, 3, 5)
    assert_operator("Gelu", x, opset=20, approximate="tanh")
    assert_operator("Shrink", x, lambd=0.3, bias=0.2)
    assert_operator("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    assert_operator("Selu", x, alpha=1.1, gamma=0.9)


@few
@given(
    kind=st.sampled_from(["Add", "Sub", "Mul", "Div", "Pow"]),
    shape=st.sampled_from([(), (1,), (5,), (3, 1), (1, 3, 1), (2, 3, 5)]),
    first=st.booleans(),
)
def test_arithmetic_with_constants(kind: str, shape: tuple[int, ...], first: bool) -> None:
    constant = np.abs(noise(*shape, seed=1)).astype(np.float32) + np.float32(0.5)
    names = ["c", "x"] if first else ["x", "c"]
    assert_operator(kind, np.abs(noise(2, 3, 5)) + 0.5, {"c": constant}, names=names)


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean"])
def test_arithmetic_of_two_tensors(kind: str) -> None:
    model = model_of(
        [helper.make_node(kind, ["x", "z"], ["y"], "node")], {}, inputs={"x": ["N", 3, 5], "z": [3, 1]}
    )
    assert_same_as_onnxruntime(model, noise(2, 3, 5), noise(3, 1, seed=1))


@pytest.mark.parametrize("kind", ["Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal"])
def test_comparisons_choose(kind: str) -> None:
    nodes = [
        helper.make_node(kind, ["x", "half"], ["c"]),
        helper.make_node("Not", ["c"], ["n"]),
        helper.make_node("Or", ["c", "n"], ["o"]),
        helper.make_node("And", ["c", "o"], ["a"]),
        helper.make_node("Where", ["a", "x", "other"], ["y"]),
    ]
    weights = {"half": np.float32([0.5]), "other": noise(1, 3, 1, seed=2)}
    x = noise(2, 3, 5)
    x[0, 0, 0] = 0.5
    assert_same_as_onnxruntime(model_of(nodes, weights, inputs={"x": ["N", 3, 5]}), x)


def test_integers_divide_toward_zero() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=7),
        helper.make_node("Div", ["i", "three"], ["d"]),
        helper.make_node("Mod", ["i", "three"], ["m"]),
        helper.make_node("Mul", ["d", "m"], ["p"]),
        helper.make_node("Cast", ["p"], ["y"], to=1),
    ]
    assert_same_as_onnxruntime(
        model_of(nodes, {"three": np.int64([3])}, inputs={"x": ["N", 9]}), noise(2, 9) * 20
    )


@pytest.mark.parametrize("opset", [9, 13])
@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [None, 1, 2, -1])
def test_softmaxes(kind: str, axis: int | None, opset: int) -> None:
    assert_operator(kind, noise(2, 3, 4, 5), opset=opset, **({} if axis is None else {"axis": axis}))


def test_clip_in_old_and_new_form() -> None:
    x = noise(2, 3, 5) * 4
    assert_operator("Clip", x, opset=9, min=0.0, max=6.0)
    assert_operator("Clip", x, opset=9, min=-1.0)
    assert_operator("Clip", x, opset=9)
    assert_operator("Clip", x, {"low": np.float32(0), "high": np.float32(6)}, opset=13)
    assert_operator("Clip", x, {"high": np.float32(1)}, names=["x", "", "high"], opset=13)
    assert_operator("Clip", x, {"low": np.float32(1)}, names=["x", "low"], opset=13)


def test_dropout_is_left_out() -> None:
    assert_operator("Dropout", noise(2, 3), opset=9, ratio=0.5)
    assert_operator("Dropout", noise(2, 3), {"ratio": np.float32(0.5)}, opset=13)


@st.composite
def windows(draw: st.DrawFn, axes: int) -> dict[str, Any]:
    """Kernel, strides, dilations and paddings."""
    kernel = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    made: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes)),
        "dilations": draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes)),
    }
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto == "NOTSET":
        made["pads"] = [draw(st.integers(0, kernel[i % axes] - 1)) for i in range(2 * axes)]
    else:
        made["auto_pad"] = auto
    return made


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), axes=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]), bias=st.booleans())
def test_conv(data: st.DataObject, axes: int, groups: int, bias: bool) -> None:
    window = data.draw(windows(axes))
    if "auto_pad" in window and window["auto_pad"] != "VALID":
        window["dilations"] = [1] * axes  # onnxruntime refuses others
    weights = {"w": noise(8, 4 // groups, *window["kernel_shape"], seed=1)}
    if bias:
        weights["b"] = noise(8, seed=2)
    assert_operator("Conv", noise(2, 4, *[9, 7, 6][:axes]), weights, group=groups, **window)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), axes=st.integers(1, 2), groups=st.sampled_from([1, 2]))
def test_conv_transpose(data: st.DataObject, axes: int, groups: int) -> None:
    window = data.draw(windows(axes))
    form = data.draw(st.sampled_from(["plain", "output_padding", "output_shape"]))
    sizes = [6, 5][:axes]
    if form == "output_padding":
        window["output_padding"] = [data.draw(st.integers(0, stride - 1)) for stride in window["strides"]]
    if window.get("auto_pad", "VALID") != "VALID":
        window["dilations"] = [1] * axes
        assume(all(k >= s for k, s in zip(window["kernel_shape"], window["strides"], strict=True)))
    elif form == "output_shape":
        window.pop("pads", None)
        full = [
            s * (n - 1) + d * (k - 1) + 1
            for n, k, s, d in zip(
                sizes, window["kernel_shape"], window["strides"], window["dilations"], strict=True
            )
        ]
        window["output_shape"] = [n - data.draw(st.integers(0, min(2, n - 1))) for n in full]
        window.pop("auto_pad", None)
    weights = {"w": noise(4, 6 // groups, *window["kernel_shape"], seed=1), "b": noise(6, seed=2)}
    assert_operator("ConvTranspose", noise(2, 4, *sizes), weights, group=groups, **window)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    data=st.data(),
    axes=st.integers(1, 3),
    kind=st.sampled_from(["MaxPool", "AveragePool", "LpPool"]),
    ceil=st.booleans(),
    count=st.booleans(),
)
def test_pools(data: st.DataObject, axes: int, kind: str, ceil: bool, count: bool) -> None:
    window = data.draw(windows(axes))
    if window.get("auto_pad", "VALID") != "VALID":
        # onnxruntime pads by a negative amount here, which the specification does not.
        assume(all(k >= s for k, s in zip(window["kernel_shape"], window["strides"], strict=True)))
    if kind != "MaxPool" or window.get("auto_pad", "VALID") != "VALID":
        del window["dilations"]
    # onnxruntime's LpPool leaves ceil_mode out, and its SAME pads are another matter with it.
    if ceil and "auto_pad" not in window and kind != "LpPool":
        window["ceil_mode"] = 1
    if kind == "AveragePool":
        window["count_include_pad"] = int(count)
    if kind == "LpPool":
        window["p"] = data.draw(st.integers(1, 3))
    x = noise(2, 3, *[9, 7, 6][:axes])
    assert_operator(
        kind, np.abs(x) if kind == "LpPool" else x, opset=19 if kind == "AveragePool" else 18, **window
    )


@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 4), (2, 3, 4, 3, 2)])
def test_global_pools(kind: str, shape: tuple[int, ...]) -> None:
    assert_operator(kind, noise(*shape))


REDUCTIONS = [
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
]  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(REDUCTIONS),
    axes=st.sampled_from([None, [1], [-1], [2, 3], [0, -2]]),
    keepdims=st.booleans(),
    opset=st.sampled_from([11, 13, 18]),
)
def test_reductions(kind: str, axes: list[int] | None, keepdims: bool, opset: int) -> None:
    x = np.abs(noise(2, 3, 4, 5)) + 0.1
    if axes is None:
        assert_operator(kind, x, opset=opset, keepdims=int(keepdims))
    elif opset >= 18 or (kind == "ReduceSum" and opset >= 13):
        assert_operator(kind, x, {"axes": np.array(axes, np.int64)}, opset=opset, keepdims=int(keepdims))
    else:
        assert_operator(kind, x, opset=opset, axes=axes, keepdims=int(keepdims))


@few
@given(
    kind=st.sampled_from(["ArgMax", "ArgMin"]),
    axis=st.sampled_from([1, -1]),
    keepdims=st.integers(0, 1),
    last=st.integers(0, 1),
)
def test_indices_of_extremes(kind: str, axis: int, keepdims: int, last: int) -> None:
    x = np.round(noise(2, 4, 9))
    assert_operator(kind, x, axis=axis, keepdims=keepdims, select_last_index=last)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_batch_normalization(rank: int) -> None:
    weights = {
        "s": noise(3, seed=1), "b": noise(3, seed=2), "m": noise(3, seed=3), "v": np.abs(noise(3, seed=4)) + 0.1,
    }  # fmt: skip
    assert_operator(
        "BatchNormalization", noise(2, 3, 4, 5, 2)[(..., *[0] * (5 - rank))], weights, epsilon=1e-3, opset=9
    )
    assert_operator("BatchNormalization", noise(2, 3, 4, 5, 2)[(..., *[0] * (5 - rank))], weights, opset=15)


def test_other_norms() -> None:
    x = noise(2, 6, 4, 5)
    scale, bias = noise(6, seed=1), noise(6, seed=2)
    assert_operator("InstanceNormalization", x, {"s": scale, "b": bias}, epsilon=1e-3)
    assert_operator("LRN", x, size=3, alpha=0.5, beta=0.6, bias=1.5)
    # onnxruntime has odd sizes only; this is the specification's formula.
    even = model_of([helper.make_node("LRN", ["x"], ["y"], size=4, alpha=0.5)], {}, inputs={"x": x.shape})
    sums = np.stack([(x[:, max(c - 1, 0) : c + 3] ** 2).sum(axis=1) for c in range(6)], axis=1)
    np.testing.assert_allclose(by_torch(to_torch(even), x)[0], x / (1 + 0.5 / 4 * sums) ** 0.75, rtol=1e-5)
    assert_operator("LpNormalization", x, axis=1, p=1)
    assert_operator("LpNormalization", x, axis=-1, p=2)
    assert_operator("MeanVarianceNormalization", x, axes=[0, 2, 3])
    assert_operator("LayerNormalization", x, {"s": noise(5, seed=3), "b": noise(5, seed=4)}, epsilon=1e-3)
    assert_operator("LayerNormalization", x, {"s": noise(6, 4, 5, seed=3)}, axis=1)
    assert_operator(
        "GroupNormalization", x, {"s": noise(3, seed=3), "b": noise(3, seed=4)}, num_groups=3, opset=18
    )
    assert_operator("GroupNormalization", x, {"s": scale, "b": bias}, num_groups=3, opset=21)


@few
@given(
    trans_a=st.booleans(),
    trans_b=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5]),
    beta=st.sampled_from([1.0, 2.0]),
    bias=st.sampled_from([None, (4,), (1, 4), (1,), (3, 4), ()]),
)
def test_gemm(trans_a: bool, trans_b: bool, alpha: float, beta: float, bias: tuple[int, ...] | None) -> None:
    weights = {"w": noise(4, 5, seed=1) if trans_b else noise(5, 4, seed=1)}
    if bias is not None:
        weights["b"] = np.asarray(noise(*bias, seed=2))
    options: dict[str, Any] = {"transA": int(trans_a), "transB": int(trans_b), "alpha": alpha, "beta": beta}
    x = noise(5, 3) if trans_a else noise(3, 5)
    node = helper.make_node("Gemm", ["x", *weights], ["y"], "node", **options)
    assert_same_as_onnxruntime(model_of([node], weights, inputs={"x": x.shape}), x)


def test_matmul_with_and_without_bias() -> None:
    assert_operator("MatMul", noise(2, 3, 5), {"w": noise(5, 4, seed=1)})
    assert_operator("MatMul", noise(2, 3, 5), {"w": noise(2, 5, 4, seed=1)})
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "m"),
        helper.make_node("Add", ["b", "m"], ["y"], "a"),
    ]
    weights = {"w": noise(5, 4, seed=1), "b": noise(4, seed=2)}
    bridge = assert_same_as_onnxruntime(model_of(nodes, weights, inputs={"x": ["N", 3, 5]}), noise(2, 3, 5))
    assert bridge.module.get_submodule(bridge.module_of["m"]).bias is not None
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    assert_same_as_onnxruntime(model_of(nodes, {}, inputs={"x": ["N", 3, 5]}), noise(2, 3, 5))


def test_prelu() -> None:
    for slope in ((3, 1, 1), (1,), (1, 3, 1, 1), (3, 4, 5)):
        assert_operator("PRelu", noise(2, 3, 4, 5), {"s": noise(*slope, seed=1)}, opset=16)


@pytest.mark.parametrize("opset", [9, 13])
def test_shapes_by_constants(opset: int) -> None:
    x = noise(2, 4, 6)
    for shape in ([0, -1], [2, 24], [-1, 2, 12], [0, 0, 2, 3], [2, 3, 8]):
        assert_operator("Reshape", x, {"s": np.array(shape, np.int64)}, opset=opset)
    for axis in (0, 1, 2, 3):
        assert_operator("Flatten", x, axis=axis, opset=opset)
    assert_operator("Transpose", x, perm=[0, 2, 1], opset=opset)
    assert_operator("Transpose", x, opset=opset)
    y = noise(2, 1, 5, 1)
    if opset < 13:
        assert_operator("Squeeze", y, axes=[1], opset=opset)
        assert_operator("Unsqueeze", y, axes=[0, 3], opset=opset)
        assert_operator("Split", x, axis=1, split=[1, 3], outputs=("y", "z"), opset=opset)
        assert_operator("Split", x, axis=2, outputs=("y", "z"), opset=opset)
        assert_operator("Slice", x, axes=[1, 2], starts=[1, -4], ends=[10, -1], opset=opset)
        assert_operator("Upsample", noise(2, 3, 4, 5), {"s": np.float32([1, 1, 2, 3])}, opset=opset)
        assert_operator(
            "Upsample", noise(2, 3, 4, 5), {"s": np.float32([1, 1, 2, 2])}, mode="linear", opset=opset
        )
    else:
        assert_operator("Squeeze", y, {"a": np.int64([1, -1])}, opset=opset)
        assert_operator("Unsqueeze", y, {"a": np.int64([0, -1])}, opset=opset)
        assert_operator("Split", x, {"s": np.int64([1, 3])}, axis=1, outputs=("y", "z"), opset=opset)
        assert_operator("Split", x, axis=1, num_outputs=3, outputs=("y", "z", "u"), opset=18)


@few
@given(
    start=st.integers(-7, 7),
    end=st.sampled_from([-(2**31), -5, 0, 3, 7, 2**31 - 1]),
    step=st.sampled_from([1, 2, -1, -2]),
)
def test_slice(start: int, end: int, step: int) -> None:
    numbers = {"s": [start, 1], "e": [end, 3], "a": [2, 1], "t": [step, 1]}
    assume(len(range(6)[slice(start, None if step < 0 and end < -6 else end, step)]) > 0)
    assert_operator(
        "Slice", noise(2, 4, 6), {name: np.array(value, np.int64) for name, value in numbers.items()}
    )


@pytest.mark.parametrize("indices", [2, -1, [0, 2], [3, 0, -1], [[0, 1], [2, 3]], [1, 2, 3]])
def test_gather(indices: Any) -> None:
    assert_operator("Gather", noise(2, 4, 6), {"i": np.array(indices, np.int64)}, axis=1)
    assert_operator("Gather", noise(2, 4, 6), {"i": np.array(indices, np.int64)}, axis=-1)


def test_joining_and_repeating() -> None:
    x = noise(2, 3, 4)
    assert_operator("Concat", x, {"c": noise(2, 2, 4, seed=1)}, axis=1)
    assert_operator("Tile", x, {"r": np.int64([1, 2, 3])})
    assert_operator("Expand", noise(2, 1, 4), {"s": np.int64([2, 3, 1])})
    assert_operator("Expand", noise(2, 1, 4), {"s": np.int64([3, 1])})
    assert_operator(
        "GatherElements", x, {"i": np.array(np.arange(24).reshape(2, 3, 4) % 3, np.int64)}, axis=1
    )
    assert_operator("CumSum", x, {"a": np.int64(1)}, exclusive=1, reverse=1)
    assert_operator("Trilu", noise(2, 4, 4), {"k": np.int64(1)}, upper=0)
    assert_operator("Einsum", x, {"m": noise(4, 5, seed=1)}, equation="nij,jk->nki")


@few
@given(
    mode=st.sampled_from(["constant", "reflect", "edge", "wrap"]),
    pads=st.lists(st.integers(-1, 3), min_size=4, max_size=4),
)
def test_pad(mode: str, pads: list[int]) -> None:
    x = noise(2, 3, 5, 6)
    if mode != "constant":
        pads = [abs(amount) for amount in pads]
    whole = [0, 0, *pads[:2], 0, 0, *pads[2:]]
    weights = {"p": np.array(whole, np.int64), "v": np.float32(1.5)}
    assert_operator("Pad", x, weights if mode == "constant" else {"p": weights["p"]}, mode=mode, opset=19)
    if mode != "wrap":
        assert_operator("Pad", x, mode=mode, pads=whole, value=1.5, opset=9)
    if mode == "constant":
        some = {"p": np.array(pads, np.int64), "v": np.float32(1.5), "a": np.int64([2, -1])}
        assert_operator("Pad", x, some, opset=19)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space(mode: str) -> None:
    assert_operator("DepthToSpace", noise(2, 8, 3, 4), blocksize=2, mode=mode)
    assert_operator("SpaceToDepth", noise(2, 2, 4, 6), blocksize=2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    coordinates=st.sampled_from(
        ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric"]
    ),
    nearest=st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]),
    by=st.sampled_from(["scales", "sizes"]),
    factor=st.sampled_from([0.5, 0.7, 1.5, 2.0, 3.0]),
    exclude=st.booleans(),
)
def test_resize(mode: str, coordinates: str, nearest: str, by: str, factor: float, exclude: bool) -> None:
    x = noise(2, 3, 6, 8)
    if by == "scales":
        weights: dict[str, Array] = {"s": np.float32([1, 1, factor, 2.0])}
        names = ["x", "", "s"]
    else:
        weights = {"s": np.int64([2, 3, int(6 * factor), 11])}
        names = ["x", "", "", "s"]
    options: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "nearest":
        options["nearest_mode"] = nearest
    if mode == "cubic":
        options |= {"exclude_outside": int(exclude), "cubic_coeff_a": -0.5}
    node = helper.make_node("Resize", names, ["y"], "node", **options)
    model = model_of([node], weights, inputs={"x": [2, 3, 6, 8]}, opset=19)
    assert_same_as_onnxruntime(model, x, rtol=1e-4, atol=1e-4)


def test_resize_of_operator_set_10() -> None:
    assert_operator("Resize", noise(2, 3, 4, 5), {"s": np.float32([1, 1, 2, 2])}, mode="nearest", opset=10)
    assert_operator("Resize", noise(2, 3, 4, 5), {"s": np.float32([1, 1, 2, 2])}, mode="linear", opset=10)


def test_shapes_that_depend_on_the_input() -> None:
    """What the TorchScript exporter makes of ``view``, ``expand`` and ``interpolate``."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Unsqueeze", ["n"], ["n1"], axes=[0]),
        helper.make_node("Concat", ["n1", "two", "minus", "four"], ["v"], axis=0),
        helper.make_node("Reshape", ["x", "v"], ["r"]),
        helper.make_node("Slice", ["s", "one", "three"], ["hw"]),
        helper.make_node("Cast", ["hw"], ["hwf"], to=1),
        helper.make_node("Mul", ["hwf", "half"], ["hwh"]),
        helper.make_node("Cast", ["hwh"], ["hwi"], to=7),
        helper.make_node("ConstantOfShape", ["n1"], ["ones"], value=helper.make_tensor("v", 7, [1], [1])),
        helper.make_node("ReduceProd", ["hwi"], ["product"], keepdims=0),
        helper.make_node("Mul", ["product", "zero"], ["nothing"]),
        helper.make_node("Cast", ["nothing"], ["nothingf"], to=1),
        helper.make_node("Add", ["r", "nothingf"], ["y"]),
    ]
    weights: dict[str, Array] = {
        "zero": np.int64(0), "one": np.int64([1]), "three": np.int64([3]), "two": np.int64([2]),
        "minus": np.int64([-1]), "four": np.int64([4]), "half": np.float32([0.5]),
    }  # fmt: skip
    model = model_of(nodes, weights, inputs={"x": ["N", 4, 6]}, opset=11)
    for batch in (1, 3):
        assert_same_as_onnxruntime(model, noise(batch, 4, 6))


def test_a_fixed_batch_becomes_free() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "c"),
        helper.make_node("Reshape", ["c", "s"], ["r"], "r"),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3, 4]),
        helper.make_node("Reshape", ["t", "back"], ["y"], "b"),
    ]
    weights = {"w": noise(4, 3, 1, 1), "s": np.int64([1, 2, 2, 5, 5]), "back": np.int64([1, 4, 5, 5])}
    fixed = assert_same_as_onnxruntime(
        model_of(nodes, weights, inputs={"x": [1, 3, 5, 5]}), noise(1, 3, 5, 5)
    )
    weights |= {"s": np.int64([-1, 2, 2, 5, 5]), "back": np.int64([-1, 4, 5, 5])}
    free = model_of(nodes, weights, inputs={"x": ["N", 3, 5, 5]})
    x = noise(4, 3, 5, 5)
    np.testing.assert_allclose(by_torch(fixed, x)[0], run(free, x)[0], rtol=1e-4, atol=1e-5)


def test_nothing_is_left_on_another_device() -> None:
    """Shapes are computed without tensors, and constants follow the module: on the meta device a mix would fail."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("Gather", ["c", "shuffle"], ["g"], axis=1),
        helper.make_node("Mul", ["g", "gamma"], ["m"]),
        helper.make_node("Shape", ["m"], ["s"]),
        helper.make_node("Gather", ["s", "one"], ["channels"], axis=0),
        helper.make_node("Cast", ["channels"], ["f"], to=1),
        helper.make_node("Div", ["m", "f"], ["d"]),
        helper.make_node("Pad", ["d", "pads"], ["p"], mode="reflect"),
        helper.make_node("Resize", ["p", "", "scales"], ["r"], mode="cubic"),
        helper.make_node("Slice", ["r", "last", "first", "axis", "back"], ["f1"]),
        helper.make_node("Where", ["condition", "f1", "zero"], ["y"]),
    ]
    weights: dict[str, Array] = {
        "w": noise(4, 3, 1, 1), "shuffle": np.int64([2, 0, 3, 1]), "gamma": noise(4, 1, 1), "one": np.int64(1),
        "pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1]), "scales": np.float32([1, 1, 1.5, 2.5]), "last": np.int64([-1]),
        "first": np.int64([-100]), "axis": np.int64([3]), "back": np.int64([-1]), "zero": np.float32(0),
        "condition": np.array([True, False, True, True]).reshape(4, 1, 1),
    }  # fmt: skip
    model = model_of(nodes, weights, inputs={"x": ["N", 3, 6, 6]})
    bridge = assert_same_as_onnxruntime(model, noise(2, 3, 6, 6))
    found = bridge.module.to("meta")(torch.empty(5, 3, 6, 6, device="meta"))
    assert found.shape == (5, *run(model, noise(2, 3, 6, 6))[0].shape[1:])
    assert found.device.type == "meta"
