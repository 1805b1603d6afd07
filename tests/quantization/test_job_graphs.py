from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import psutil
import pytest
from onnx import ModelProto, helper, numpy_helper

from deploycnn.errors import ArtifactError, PassRequirementError
from deploycnn.graph.export import export_onnx
from deploycnn.graph.metadata import get_metadata
from deploycnn.graph.model import is_quantized, load_onnx, opset_of, save_onnx, shape_of
from deploycnn.graph.parity import cpu_session, evaluator
from deploycnn.quantization import packs
from deploycnn.quantization.calibration import calibrate, choose_ranges, values_of
from deploycnn.quantization.insertion import build
from deploycnn.quantization.job import Job
from deploycnn.quantization.lint import lint_graph
from deploycnn.quantization.placement import place
from deploycnn.quantization.preparation import prepare
from deploycnn.quantization.quantize import Options
from deploycnn.quantization.types import NumberFormat
from tests.graph.nets import Residual, Shuffle, Weights, graph, images, operators, randomized

RNG = np.random.default_rng(4)


def normal(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


@pytest.fixture(scope="module")
def exported() -> ModelProto:
    return export_onnx(randomized(Residual()), (3, 12, 12), opset=18, classes=["a", "b"])


def run_job(
    source: Path,
    target: Path,
    calibration,
    *,
    calibrator="minmax",
    percentile: float = 99.999,
    exclude: tuple[str, ...] = (),
    per_channel: bool = True,
    reduce_range: bool = False,
    activation_type="uint8",
):
    pack = packs.get("cpu")
    pack = replace(
        pack,
        activation=NumberFormat(dtype=activation_type, symmetric=activation_type == "int8"),
        weight=replace(pack.weight, reduced=reduce_range),
        per_channel=per_channel,
    )
    return Job(
        source=source,
        output=target,
        pack=pack,
        options=Options(calibrator=calibrator, exclude=exclude),
        images=lambda: calibration,
        total=0,
        percentile=percentile,
    ).run()


def quantize(model: ModelProto, tmp_path: Path, calibration=None, **options: object):
    source, target = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    save_onnx(model, source)
    shape = shape_of(model.graph.input[0])
    assert shape is not None
    if calibration is None:
        calibration = [images(4, shape[1:], seed=seed) for seed in range(4)]  # type: ignore[arg-type]
    record = run_job(source, target, calibration, **options)  # type: ignore[arg-type]
    return load_onnx(target), record


# An independent fake-quantized network, step by step in float64, from the specification's formulas alone.


def round_half_even(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.rint(x)


def fake_activation(x: np.ndarray, low: float, high: float) -> np.ndarray:
    scale = np.float64(np.float32((high - low) / 255))
    zero = round_half_even(np.float64(-low) / scale)
    return (np.clip(round_half_even(x / scale) + zero, 0, 255) - zero) * scale


def fake_weight(weight: np.ndarray) -> np.ndarray:
    """Symmetric int8 per output channel (axis 0)."""
    peak = np.abs(weight).reshape(len(weight), -1).max(axis=1).astype(np.float64)
    scale = (peak * 2 / 254).astype(np.float32).astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(round_half_even(weight / scale), -127, 127) * scale


def conv3x3(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,mcij->nmhw", windows, weight) + bias[:, None, None]


def test_the_graph_computes_what_the_formulas_say(tmp_path) -> None:
    weights: Weights = {"w1": normal(6, 3, 3, 3), "b1": normal(6), "w2": normal(6, 6, 3, 3), "b2": normal(6)}
    weights |= {"w3": normal(6, 4), "b3": normal(4)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="c1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="r1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="c2", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r1"], ["a"], name="a"),
        helper.make_node("GlobalAveragePool", ["a"], ["g"], name="g"),
        helper.make_node("Flatten", ["g"], ["f"], name="f"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="y"),
    ]
    model, record = quantize(graph(nodes, weights), tmp_path)
    bounds = record.ranges
    x = images(5, (3, 8, 8), seed=9)

    q = fake_activation(x.astype(np.float64), *bounds["x"])
    r1 = fake_activation(np.maximum(conv3x3(q, fake_weight(weights["w1"]), weights["b1"]), 0), *bounds["r1"])
    c2 = fake_activation(conv3x3(r1, fake_weight(weights["w2"]), weights["b2"]), *bounds["c2"])
    a = fake_activation(c2 + r1, *bounds["a"])
    g = fake_activation(a.mean(axis=(2, 3)), *bounds["g"])
    expected = g @ fake_weight(weights["w3"].T).T + weights["b3"]

    session = cpu_session(model, optimize=False)
    (found,) = session.run(None, {"x": x})
    # A value on the border between two levels may fall to either side, then carries through: one level of g.
    level = (bounds["g"][1] - bounds["g"][0]) / 255
    allowed = level * np.abs(weights["w3"]).sum(axis=0).max()
    assert np.abs(found - expected).max() < allowed
    assert np.abs(found - expected).mean() < allowed / 10
    # As it really runs, in integers, rounding differs but stays within a few levels.
    (integer,) = evaluator(model)(x)
    assert np.abs(integer - expected).max() < 4 * allowed


def test_weights_are_stored_as_int8_per_channel_and_bias_as_int32(exported: ModelProto, tmp_path) -> None:
    model, _ = quantize(exported, tmp_path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    original = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.graph.initializer}
    assert not any(array.dtype == np.float32 and array.size > 8 for array in stored.values())
    weight = stored["stem.weight_quantized"] * stored["stem.weight_scale"].reshape(-1, 1, 1, 1)
    assert weight.shape == (8, 4, 3, 3)  # with a channel of zeros
    assert not weight[:, 3].any()
    assert stored["stem.weight_quantized"].dtype == np.int8
    assert len(stored["stem.weight_scale"]) == 8
    assert (
        np.abs(weight[:, :3] - original["stem.weight"]).max() <= stored["stem.weight_scale"].max() / 2 * 1.001
    )
    per_tensor, _ = quantize(exported, tmp_path, per_channel=False)
    scale = next(t for t in per_tensor.graph.initializer if t.name == "stem.weight_scale")
    assert numpy_helper.to_array(scale).size == 1


def test_reduced_range_weights_have_seven_bits(exported: ModelProto, tmp_path) -> None:
    model, record = quantize(exported, tmp_path, reduce_range=True)
    weight = next(t for t in model.graph.initializer if t.name == "stem.weight_quantized")
    assert np.abs(numpy_helper.to_array(weight)).max() <= 64
    assert "7-bit" in record.scheme


def test_symmetric_activations_have_no_zero_point(exported: ModelProto, tmp_path) -> None:
    model, _ = quantize(exported, tmp_path, activation_type="int8")
    points = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_zero_point")]
    assert points
    assert not any(point.any() for point in points)


def test_everything_fuses_and_is_counted(exported: ModelProto, tmp_path) -> None:
    model, record = quantize(exported, tmp_path)
    # conv, conv, add, global pool and the linear layer; max-pooling and reshaping work on 8 bits as they are.
    assert record.fused.quantized == 5
    assert record.fused.float_compute == 0
    assert record.fused.stray == 1, "only the input is quantized as such"
    assert record.kept_float == {}
    assert record.to_json()["fused"]["by_operator"]["QLinearConv"] == 2
    assert "Relu" not in operators(model), "it is the range of what it follows"


def test_shuffles_concatenations_and_splits_stay_in_8_bits(tmp_path) -> None:
    model = export_onnx(randomized(Shuffle()), (3, 12, 12), opset=18)
    _, record = quantize(model, tmp_path)
    assert record.fused.stray == 1
    assert record.fused.float_compute == 0


def test_metadata_names_and_dynamic_batch_survive(exported: ModelProto, tmp_path) -> None:
    model, record = quantize(exported, tmp_path)
    assert get_metadata(model) == get_metadata(exported)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    assert shape_of(model.graph.input[0]) == (None, 3, 12, 12)
    assert record.opset == opset_of(exported)
    run = evaluator(model)
    x = images(7, (3, 12, 12))
    assert np.allclose(run(x)[0][:1], run(x[:1])[0], atol=1e-5)
    onnx.checker.check_model(model, full_check=True)


def test_the_same_calibration_gives_the_same_bytes(exported: ModelProto, tmp_path) -> None:
    first, _ = quantize(exported, tmp_path, calibrator="entropy")
    regrouped = [np.concatenate([images(4, (3, 12, 12), seed=seed) for seed in range(4)])]
    second, record = quantize(exported, tmp_path, regrouped, calibrator="entropy")
    assert record.images == 16
    assert first.SerializeToString() == second.SerializeToString()


def test_entropy_and_percentile_are_not_minmax(exported: ModelProto, tmp_path) -> None:
    x = [images(16, (3, 12, 12), seed=seed) for seed in range(4)]
    x[0][0, 0, 0, 0] = 40.0
    ranges = {
        name: quantize(exported, tmp_path, x, calibrator=name, percentile=99.9)[1].ranges
        for name in ("minmax", "entropy", "percentile")
    }
    image = "stem/Conv/Pad_output"
    assert ranges["minmax"][image][1] == 40
    for name in ("entropy", "percentile"):
        assert ranges[name][image][1] < 20
        assert ranges[name] != ranges["minmax"]
    assert ranges["entropy"] != ranges["percentile"]


def test_excluded_nodes_stay_float(exported: ModelProto, tmp_path) -> None:
    model, record = quantize(exported, tmp_path, exclude=("conv/Conv",))
    assert record.kept_float == {"conv/Conv": "as asked"}
    assert record.fused.float_compute == 1
    node = next(node for node in model.graph.node if node.name == "conv/Conv")
    assert node.input[1] == "conv.weight"
    with pytest.raises(PassRequirementError, match='no node "conv/Con"; did you mean "conv/Conv"'):
        quantize(exported, tmp_path, exclude=("conv/Con",))


def test_what_follows_the_last_layer_stays_float(tmp_path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="c"),
        helper.make_node("Clip", ["c", "low", "high"], ["r"], name="r"),
        helper.make_node("Transpose", ["r"], ["t"], name="t", perm=[0, 2, 3, 1]),
        helper.make_node("Concat", ["t", "t"], ["y"], name="y", axis=3),
        helper.make_node("Conv", ["r", "v"], ["z"], name="z"),
        helper.make_node("Relu", ["x"], ["u"], name="u"),
    ]
    weights: Weights = {
        "w": normal(4, 3, 1, 1),
        "v": normal(2, 4, 1, 1),
        "low": np.float32(0),
        "high": np.float32(6),
    }
    plan = place(prepare(graph(nodes, weights, outputs=("y", "z", "u"))), packs.get("cpu"))
    assert plan.quantized_nodes == ("c", "r", "z")


def test_gates_and_zero_padded_shortcuts_run_on_integers(tmp_path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="c", pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["s"], name="s"),
        helper.make_node("Mul", ["c", "s"], ["silu"], name="silu"),
        helper.make_node("GlobalAveragePool", ["silu"], ["g"], name="g"),
        helper.make_node("Conv", ["g", "w2"], ["fc"], name="fc"),
        helper.make_node("HardSigmoid", ["fc"], ["gate"], name="gate"),
        helper.make_node("Mul", ["silu", "gate"], ["m"], name="m"),
        helper.make_node("Pad", ["m", "pads"], ["p"], name="p"),
        helper.make_node("Pad", ["m", "pads", "one"], ["p1"], name="p1"),
        helper.make_node("Conv", ["p", "w3"], ["d"], name="d"),
        helper.make_node("Conv", ["p1", "w3"], ["d1"], name="d1"),
        helper.make_node("Add", ["d", "d1"], ["y"], name="y"),
    ]
    weights: Weights = {
        "w": normal(4, 3, 3, 3), "w2": normal(4, 4, 1, 1), "w3": normal(2, 6, 1, 1), "one": np.float32(1),
        "pads": np.int64([0, 1, 0, 0, 0, 1, 0, 0]),
    }  # fmt: skip
    model = graph(nodes, weights)
    quantized, record = quantize(model, tmp_path)
    assert record.quantized_nodes == ("c", "s", "silu", "g", "fc", "gate", "m", "p", "d", "d1")
    assert record.fused.by_operator["QLinearMul"] == 2
    assert record.fused.by_operator["QLinearSigmoid"] == 1
    x = images(3, (3, 8, 8))
    (a,), (b,) = evaluator(model)(x), evaluator(quantized)(x)
    assert np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_a_clip_that_excludes_zero_and_computed_weights_stay_float() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="c"),
        helper.make_node("Clip", ["c", "low"], ["r"], name="r"),
        helper.make_node("Conv", ["r", "w2"], ["d"], name="d"),
        helper.make_node("MatMul", ["d", "d"], ["y"], name="y"),
    ]
    weights: Weights = {"w": normal(4, 3, 1, 1), "w2": normal(4, 4, 1, 1), "low": np.float32(0.5)}
    plan = place(prepare(graph(nodes, weights)), packs.get("cpu"))
    assert plan.quantized_nodes == ("c", "d")
    assert plan.kept_float == {"y": "its weights are not constant"}


def test_lone_batchnorms_are_quantized_as_depthwise_convolutions(tmp_path) -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2]),
        helper.make_node("BatchNormalization", ["p", "scale", "shift", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["y"]),
    ]
    weights: Weights = {
        "scale": np.float32([1, 2, 3]),
        "shift": normal(3),
        "mean": normal(3),
        "w": normal(4, 3, 1, 1),
    }
    weights["var"] = np.float32([0.5, 1, 2])
    float_model = graph(nodes, weights)
    model, record = quantize(float_model, tmp_path)
    assert record.fused.by_operator["QLinearConv"] == 2
    x = images(4, (3, 8, 8))
    (a,), (b,) = evaluator(float_model)(x), evaluator(model)(x)
    assert np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_openvino_computes_lone_batchnorms_between_integers_itself() -> None:
    """A dense block: what is concatenated are integers, what the next convolution reads are integers."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="a"),
        helper.make_node("Conv", ["a", "w2"], ["b"], name="b"),
        helper.make_node("Concat", ["a", "b"], ["c"], name="c", axis=1),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"], name="n"),
        helper.make_node("Relu", ["n"], ["r"], name="r"),
        helper.make_node("Conv", ["r", "w3"], ["y"], name="y"),
    ]
    ones = {name: np.ones(8, np.float32) for name in ("scale", "var")}
    zeros = {name: np.zeros(8, np.float32) for name in ("shift", "mean")}
    kernels = {"w1": normal(4, 3, 1, 1), "w2": normal(4, 4, 1, 1), "w3": normal(4, 8, 1, 1)}
    for target, kept, rounded in (
        ("openvino", True, {"x", "a", "b", "r", "y"}),
        ("onnxruntime-cpu", False, {"x", "a", "b", "c", "r", "y"}),
    ):
        pack = packs.get(target)
        model = prepare(graph(nodes, {**ones, **zeros, **kernels}), pack)
        assert ("BatchNormalization" in operators(model)) == kept
        plan = place(model, pack)
        assert {item.value for item in plan.activations} == rounded
        calibration = calibrate(model, [images(4, (3, 8, 8))], values=values_of(plan))
        quantized = build(model, plan, choose_ranges(plan, calibration))
        assert lint_graph(quantized, pack) == ()


def old_model() -> ModelProto:
    """As torch 1.0 wrote: opset 9, unnamed nodes, weights among the inputs, a static batch."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"]),
        helper.make_node("Clip", ["n"], ["r"], min=0.0, max=6.0),
        helper.make_node("Conv", ["r", "w2"], ["d"]),
        helper.make_node("Shape", ["d"], ["s"]),
        helper.make_node("Constant", [], ["first"], value=numpy_helper.from_array(np.int64([0]))),
        helper.make_node("Gather", ["s", "first"], ["n0"]),
        helper.make_node("Concat", ["n0", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["d", "target"], ["f"]),
        helper.make_node("Softmax", ["f"], ["y"], axis=1),
    ]
    weights: Weights = {
        "w": normal(6, 3, 3, 3), "w2": normal(2, 6, 1, 1), "rest": np.int64([-1]), "mean": normal(6),
        "scale": np.ones(6, np.float32), "shift": normal(6), "var": np.ones(6, np.float32),
    }  # fmt: skip
    return graph(
        nodes,
        weights,
        shape=(1, 3, 8, 8),
        opset=9,
        ir_version=3,
        weights_as_inputs=True,
        output_shape=(1, 128),
    )


def test_old_models_with_static_batch_and_listed_weights_quantize(tmp_path) -> None:
    model = old_model()
    quantized, record = quantize(model, tmp_path, [images(5, (3, 8, 8)), images(2, (3, 8, 8), seed=1)])
    assert record.images == 7
    assert record.opset == 13
    assert record.fused.by_operator["QLinearConv"] == 2
    assert [value.name for value in quantized.graph.input] == ["x"]
    x = images(1, (3, 8, 8))
    (a,), (b,) = evaluator(model)(x), evaluator(quantized)(x)
    assert np.abs(a - b).max() < 0.02


def test_a_third_party_detector_quantizes(tmp_path) -> None:
    shared = os.environ.get("DEPLOYCNN_SHARED")
    if not shared:
        pytest.skip("DEPLOYCNN_SHARED is not set")
    path = Path(shared) / "data" / "onnx" / "ultraface-slim-320.onnx"
    record = run_job(
        path,
        tmp_path / "int8.onnx",
        [images(3, (3, 240, 320)).clip(-1, 1)],
        calibrator="percentile",
    )
    assert record.images == 3
    assert record.fused.float_compute == 0
    quantized = load_onnx(tmp_path / "int8.onnx")
    assert [value.name for value in quantized.graph.output] == ["scores", "boxes"]
    x = images(1, (3, 240, 320), seed=1).clip(-1, 1)
    for a, b in zip(evaluator(load_onnx(path))(x), evaluator(quantized)(x), strict=True):
        assert np.abs(a - b).mean() < 0.03


def test_nan_and_infinity_are_refused_by_name(exported: ModelProto, tmp_path) -> None:
    bad = images(6, (3, 12, 12))
    bad[4, 1, 2, 3] = np.nan
    with pytest.raises(PassRequirementError, match=r"image 4 .*NaN"):
        quantize(exported, tmp_path, [bad])
    broken = ModelProto()
    broken.CopyFrom(exported)
    tensor = next(t for t in broken.graph.initializer if t.name == "conv.weight")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = np.inf
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(
        PassRequirementError, match=r'weights "conv.weight" of node "conv/Conv" hold NaN or infinity'
    ):
        quantize(broken, tmp_path)
    values.flat[0] = 3e38  # finite, but what it is multiplied by is not small enough
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(
        PassRequirementError, match=r'value "conv/Conv_output_0" of node "conv/Conv".*NaN or infinite'
    ):
        quantize(broken, tmp_path, [2 * images(6, (3, 12, 12))])
    last = next(t for t in exported.graph.initializer if t.name == "head.bias")
    broken.CopyFrom(exported)
    tensor = next(t for t in broken.graph.initializer if t.name == last.name)
    nans = np.full_like(numpy_helper.to_array(last), np.nan)
    tensor.CopyFrom(numpy_helper.from_array(nans, tensor.name))
    with pytest.raises(PassRequirementError, match=r'weights "head.bias" of node .* hold NaN'):
        quantize(broken, tmp_path)
    assert not (tmp_path / "int8.onnx").exists()


def test_what_cannot_be_calibrated_is_refused(exported: ModelProto, tmp_path) -> None:
    with pytest.raises(PassRequirementError, match="no calibration images"):
        quantize(exported, tmp_path, [])
    with pytest.raises(PassRequirementError, match="do not fit"):
        quantize(exported, tmp_path, [images(2, (3, 16, 12))])
    quantized, _ = quantize(exported, tmp_path)
    with pytest.raises(PassRequirementError, match="already quantized"):
        quantize(quantized, tmp_path)
    with pytest.raises(PassRequirementError, match="no convolution"):
        quantize(graph([helper.make_node("Relu", ["x"], ["y"])], {}), tmp_path, [images(1, (3, 8, 8))])
    with pytest.raises(PassRequirementError, match="one input"):
        two = graph([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": normal(4, 3, 1, 1)})
        two.graph.input.append(helper.make_tensor_value_info("extra", 1, [1]))
        quantize(two, tmp_path, [images(1, (3, 8, 8))])
    with pytest.raises(ArtifactError):
        run_job(tmp_path / "missing.onnx", tmp_path / "out.onnx", [])


def test_values_that_never_move_get_a_usable_scale(tmp_path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["y"]),
    ]
    weights: Weights = {"w": normal(4, 3, 1, 1), "b": np.full(4, -100, np.float32), "w2": normal(2, 4, 1, 1)}
    model, _ = quantize(graph(nodes, weights), tmp_path)
    (y,) = evaluator(model)(images(2, (3, 8, 8)))
    assert np.isfinite(y).all()
    assert not y.any()


class _Peak:
    """Largest resident memory of this process while the block runs."""

    def __enter__(self) -> _Peak:
        self.process, self.running = psutil.Process(), True
        self.start = self.top = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.top = max(self.top, self.process.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self.growth = self.top - self.start


@pytest.mark.parametrize("calibrator", ["minmax", "entropy"])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch, calibrator: str) -> None:
    # Four images at a time: buffers that are merely reused then make little noise.
    monkeypatch.setattr("deploycnn.graph.observe.ACTIVATION_BUDGET_BYTES", 8_000_000)
    shape = (3, 96, 96)
    convolution = helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1])
    nodes = [convolution, helper.make_node("Relu", ["c"], ["r"]), helper.make_node("Conv", ["r", "v"], ["y"])]
    model = graph(nodes, {"w": normal(24, 3, 3, 3), "v": normal(8, 24, 1, 1)}, shape=("N", *shape))

    def stream(count: int) -> Iterator[np.ndarray]:
        for seed in range(count):
            yield images(4, shape, seed=seed)

    quantize(model, tmp_path, stream(10), calibrator=calibrator)
    growth = []
    for count in (10, 100):
        with _Peak() as peak:
            quantize(model, tmp_path, stream(count), calibrator=calibrator)
        growth.append(peak.growth)
    # One image's activations are about 2 MB here: 360 more of them would be 700 MB.
    assert growth[1] < growth[0] + 150e6


def test_int8_files_are_quantized_by_every_measure(exported: ModelProto, tmp_path) -> None:
    model, record = quantize(exported, tmp_path)
    assert is_quantized(model)
    assert not is_quantized(exported)
    assert record.quantized_nodes[:2] == ("stem/Conv/Pad", "stem/Conv")
    assert record.to_json()["ranges"]["values"] == len(record.ranges)
