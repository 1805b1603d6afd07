from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from deploycnn.errors import PassRequirementError
from deploycnn.graph.model import infer_shapes
from deploycnn.quantization.calibration import Calibration, calibrate, choose_ranges, values_of
from deploycnn.quantization.ranges import choose_range
from deploycnn.quantization.types import ActivationPlan, NumberFormat, Plan


def two_convolutions(gain: float = 1.0) -> ModelProto:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["images", "w1"], ["a"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="second"),
        helper.make_node("Sigmoid", ["c"], ["logits"], name="gate"),
    ]
    weights = [
        numpy_helper.from_array((rng.standard_normal(shape) * gain).astype(np.float32), name)
        for name, shape in (("w1", (6, 3, 3, 3)), ("w2", (4, 6, 1, 1)))
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4, 8, 8])],
        weights,
    )
    return infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8))


def images(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, size, size)).astype(np.float32)


def plan(*values: ActivationPlan, number: NumberFormat = NumberFormat()) -> Plan:  # noqa: B008 - frozen
    return Plan(
        target="test",
        activation=number,
        activations=values,
        weights=(),
        integer_bias=True,
        quantized_nodes=(),
        kept_float={},
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_ends_are_those_of_the_reference_evaluator(threads: int) -> None:
    model = two_convolutions()
    batch = images(50)
    seen = calibrate(model, np.array_split(batch, 7), threads=threads)
    assert seen.images == 50
    assert list(seen.values) == ["images", "a", "b", "c", "logits"]
    exposed = ModelProto.FromString(model.SerializeToString())
    exposed.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("a", "b", "c")
    )
    found = ReferenceEvaluator(exposed).run(["a", "b", "c"], {"images": batch})
    for name, content in zip(("a", "b", "c"), found, strict=True):
        assert seen.values[name].low == pytest.approx(min(content.min(), 0), rel=1e-5)
        assert seen.values[name].high == pytest.approx(content.max(), rel=1e-5)
        assert seen.values[name].counts.sum() + seen.values[name].zeros == content.size


def test_one_calibration_serves_plans_of_all_targets(tmp_path) -> None:
    model = two_convolutions()
    cpu = plan(ActivationPlan(value="images"), ActivationPlan(value="b"), ActivationPlan(value="c"))
    gpu = plan(
        ActivationPlan(value="images"),
        ActivationPlan(value="b", tied="group"),
        ActivationPlan(value="c", tied="group"),
        ActivationPlan(value="logits", fixed=(0.0, 1.0)),
        number=NumberFormat(dtype="int8", symmetric=True),
    )
    assert values_of(cpu, gpu) == ["images", "b", "c"]
    passes = itertools.count()

    def stream() -> Iterator[np.ndarray]:
        next(passes)
        yield images(40)

    seen = calibrate(model, stream(), values=values_of(cpu, gpu))
    assert next(passes) == 1
    seen.save(tmp_path / "calibration.npz")
    loaded = Calibration.load(tmp_path / "calibration.npz")
    assert loaded.images == 40
    for calibrator in ("minmax", "percentile", "mse", "entropy", "moving_average"):
        for wanted in (cpu, gpu):
            chosen = choose_ranges(wanted, seen, calibrator, 99.9)
            assert chosen == choose_ranges(wanted, loaded, calibrator, 99.9)
            assert list(chosen) == [activation.value for activation in wanted.activations]
            assert chosen["images"] == choose_range(
                seen.values["images"], calibrator, 99.9, wanted.activation
            )
        # The last one chosen is the GPU's.
        assert chosen["b"] == chosen["c"]
        assert chosen["logits"] == (0.0, 1.0)
    ends = [seen.values[name] for name in ("b", "c")]
    assert choose_ranges(gpu, seen)["b"] == (min(e.low for e in ends), max(e.high for e in ends))


def test_a_layer_with_infinite_activations_is_named() -> None:
    with pytest.raises(PassRequirementError, match='value "a" of node "first" \\(Conv\\) is NaN or infinite'):
        calibrate(two_convolutions(gain=1e38), [images(2)])


def test_nan_weights_are_named() -> None:
    model = two_convolutions()
    weight = numpy_helper.to_array(model.graph.initializer[1]).copy()
    weight[1, 2] = np.nan
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "w2"))
    with pytest.raises(PassRequirementError, match='value "c" of node "second"'):
        calibrate(model, [images(2)])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration images"),
        ([images(2, size=9)], r"images of shape \(2, 3, 9, 9\)"),
        ([images(2)[0]], "do not fit input"),
        ([images(2).astype(np.float64)], "float64"),
        ([np.full((1, 3, 8, 8), np.nan, np.float32)], "calibration image 0"),
    ],
)
def test_unfit_images_are_refused(batches: list[np.ndarray], message: str) -> None:
    with pytest.raises(PassRequirementError, match=message):
        calibrate(two_convolutions(), batches)


def test_what_is_kept_does_not_grow_with_the_images() -> None:
    few = calibrate(two_convolutions(), [images(4)])
    many = calibrate(two_convolutions(), [images(400)] * 3)
    sizes = [
        sum(array.nbytes for summary in seen.values.values() for array in summary.arrays().values())
        for seen in (few, many)
    ]
    assert sizes[0] == sizes[1] < 5 * 80_000
