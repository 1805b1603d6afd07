from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.export import export_onnx
from deploycnn.quantization import judge as judging
from deploycnn.quantization.judge import EXACT_DB, Judge, Judgement, decibels, val_batches
from tests.graph.nets import Residual, images, randomized
from tests.passes.onnx_support import pictures

SHAPE = (3, 12, 12)


@pytest.fixture(scope="module")
def model() -> ModelProto:
    return export_onnx(randomized(Residual()), SHAPE, opset=18, classes=None)


def batches(count: int = 3, size: int = 5):
    rng = np.random.default_rng(7)
    held = [
        (images(size, SHAPE, seed=index), rng.integers(0, 5, size).astype(np.int64)) for index in range(count)
    ]
    return lambda: iter(held)


def disturbed(model: ModelProto, by: float) -> ModelProto:
    other = ModelProto()
    other.CopyFrom(model)
    for tensor in other.graph.initializer:
        if len(tensor.dims) == 4:
            weights = numpy_helper.to_array(tensor)
            noise = np.random.default_rng(3).standard_normal(weights.shape).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(weights + by * noise, tensor.name))
    return other


def test_a_twin_is_judged_exact(model: ModelProto) -> None:
    found = Judge(model, batches())(model)
    assert found == Judgement(top1_drop=0.0, agreement=1.0, sqnr_db=EXACT_DB, images=15)


def test_figures_are_those_of_numpy(model: ModelProto) -> None:
    from deploycnn.graph.parity import evaluator

    other = disturbed(model, 0.2)
    expected, found, labels = [], [], []
    for image, label in batches()():
        expected.append(evaluator(model)(image)[0].astype(np.float64))
        found.append(evaluator(other)(image)[0].astype(np.float64))
        labels.append(label)
    right, got, truth = np.concatenate(expected), np.concatenate(found), np.concatenate(labels)
    judged = Judge(model, batches())(other)
    assert judged.sqnr_db == pytest.approx(10 * np.log10((right**2).sum() / ((right - got) ** 2).sum()))
    assert judged.agreement == (right.argmax(1) == got.argmax(1)).mean()
    drop = (right.argmax(1) == truth).mean() - (got.argmax(1) == truth).mean()
    assert judged.top1_drop == pytest.approx(drop)
    assert judged.noise == pytest.approx(((right - got) ** 2).sum() / (right**2).sum())
    assert Judge(model, batches())(disturbed(model, 0.02)).sqnr_db > judged.sqnr_db


def test_a_fixed_batch_is_filled_and_the_filling_not_counted(model: ModelProto) -> None:
    fixed = ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    del fixed.graph.value_info[:]
    other = disturbed(model, 0.2)
    free = Judge(model, batches())(other)
    for value in (*other.graph.input, *other.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    del other.graph.value_info[:]
    bound = Judge(fixed, batches())(other)
    assert bound.images == 15
    assert bound.sqnr_db == pytest.approx(free.sqnr_db, abs=1e-3)
    assert (bound.top1_drop, bound.agreement) == (free.top1_drop, free.agreement)


def test_images_beyond_the_limit_are_made_again(model: ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    make = batches()

    def counted():
        calls.append(1)
        return make()

    held = Judge(model, counted)
    held(model)
    assert len(calls) == 1
    monkeypatch.setattr(judging, "HELD_BYTES", 3000)
    calls.clear()
    streamed = Judge(model, counted)
    assert streamed(disturbed(model, 0.1)) == held(disturbed(model, 0.1))
    assert len(calls) == 2


def test_no_images_is_refused(model: ModelProto) -> None:
    with pytest.raises(PassRequirementError, match="no validation images"):
        Judge(model, lambda: iter([]))


def test_a_model_that_is_no_classifier_has_no_top1(model: ModelProto) -> None:
    other = ModelProto()
    other.CopyFrom(model)
    pooled = next(node for node in other.graph.node if node.op_type == "GlobalAveragePool")
    del other.graph.output[:]
    from onnx import TensorProto, helper

    other.graph.output.append(helper.make_tensor_value_info(pooled.output[0], TensorProto.FLOAT, None))
    found = Judge(other, batches())(other)
    assert found.top1_drop is None
    assert found.agreement is None
    assert not found.within(1.0)


def test_images_without_classes_rank_by_noise_and_agreement_alone(model: ModelProto) -> None:
    other = disturbed(model, 0.05)
    known = Judge(model, batches())(other)
    judge = Judge(model, lambda: ((content, None) for content, _ in batches()()))
    assert judge.top1 is None
    found = judge(other)
    assert found.top1_drop is None
    assert (found.agreement, found.sqnr_db, found.images) == (known.agreement, known.sqnr_db, known.images)


def test_no_more_images_are_looked_at_than_give_so_many_outputs(model: ModelProto) -> None:
    other = disturbed(model, 0.05)
    one, all_of_them = Judge(model, batches(count=1))(other), Judge(model, batches(count=3))(other)
    assert one.sqnr_db != all_of_them.sqnr_db
    # Five images of five float32 in each batch.
    for most, expected in ((1, one), (100, one), (201, all_of_them), (10_000, all_of_them)):
        judge = Judge(model, batches(count=3), most_bytes=most)
        assert [judge(other), judge(other)] == [expected, expected]


def test_images_beyond_the_last_one_are_not_made_again(model: ModelProto) -> None:
    made = []

    def counted():
        for batch in batches(count=3)():
            made.append(1)
            yield batch

    judge = Judge(model, counted, most_bytes=100)
    for _ in range(3):
        judge(disturbed(model, 0.05))
    assert len(made) == 2, "once for the float model, once to be kept"


def faked(monkeypatch: pytest.MonkeyPatch, *outputs: list[np.ndarray]):
    """Judgements of the second to the last of ``outputs`` against the first, for two images."""
    content = np.zeros((2, 3, 12, 12), np.float32)
    monkeypatch.setattr(judging, "evaluator", lambda which, **_: lambda _: outputs[which])
    monkeypatch.setattr(judging, "packed", lambda which: which)
    judge = Judge(0, lambda: iter([(content, None)]))  # type: ignore[arg-type]
    return [judge(which) for which in range(1, len(outputs))]  # type: ignore[arg-type]


def test_classes_tell_of_noise_only_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    real, classes = np.float32([[3, 4], [0, 0]]), np.int64([7, 9])
    other = [real + np.float32([[0.5, 0], [0, 0]]), np.int64([7, 1])]
    assert faked(monkeypatch, [real, classes], other)[0].sqnr_db == pytest.approx(20.0)
    assert faked(monkeypatch, [classes], [np.int64([7, 1])])[0].sqnr_db == pytest.approx(10 * np.log10(2))
    assert faked(monkeypatch, [classes], [classes])[0].sqnr_db == EXACT_DB


def test_what_is_not_finite_in_the_float_model_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    right = np.float32([[3, -np.inf], [np.nan, 4]])
    near, broken = np.float32([[3.5, -5], [1, 4]]), np.float32([[np.nan, -5], [1, 4]])
    found, worst = faked(monkeypatch, [right], [near], [broken])
    assert found.sqnr_db == pytest.approx(20.0)
    assert worst.sqnr_db == -EXACT_DB


def test_batches_of_large_images_hold_few() -> None:
    def sizes(size: int) -> list[int]:
        return [len(content) for content, _ in val_batches(pictures(val=100, size=size), None, 0)()]

    assert sizes(12) == [64, 36]
    large = sizes(256)
    assert sum(large) == 100
    assert max(large) * 3 * 256 * 256 * 4 <= 2**22


def test_decibels() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20.0)
    assert decibels(1.0, 0.0) == EXACT_DB
    assert decibels(0.0, 1.0) == -EXACT_DB
    for broken in (float("nan"), float("inf")):
        assert decibels(1.0, broken) == decibels(broken, 1.0) == -EXACT_DB


def test_as_many_boxes_as_are_found_need_not_be_equally_many(monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.zeros((3, 3, 12, 12), np.float32)
    outputs = {5: np.ones((5, 4), np.float32), 7: np.full((7, 4), 9, np.float32)}
    monkeypatch.setattr(judging, "evaluator", lambda model, **_: lambda _: [outputs[model]])
    monkeypatch.setattr(judging, "packed", lambda model: model)
    judge = Judge(5, lambda: iter([(content, np.zeros(3, np.int64))]))  # type: ignore[arg-type]
    assert judge.top1 is None
    assert judge.images == 3
    assert judge(5).sqnr_db == EXACT_DB  # type: ignore[arg-type]
    assert judge(7).sqnr_db == 0.0  # type: ignore[arg-type]
    assert judge(7).agreement is None  # type: ignore[arg-type]


def test_what_would_saturate_is_computed_as_the_graph_says() -> None:
    """Products of 255 and 127 overflow 16 bits in pairs, which is how CPUs without VNNI add them."""
    from onnx import TensorProto, helper

    from deploycnn.graph.parity import evaluator

    weight = np.full((1, 8, 1, 1), 127, np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "one", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "one", "wz"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "coarse", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "coarse", "zero"], ["out"]),
    ]
    constants = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "wz": np.int8(0),
        "w": weight,
        "coarse": np.float32(2000),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 2, 2])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 1, 2, 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.full((1, 8, 2, 2), 255, np.float32)
    (found,) = evaluator(built, integers=False)(x)
    assert (found == np.rint(8 * 255 * 127 / 2000) * 2000).all()


def test_a_drop_of_exactly_the_budget_is_within_it(model: ModelProto) -> None:
    """1800/2000 - 1796/2000 is above 0.002 in floating point."""
    rng = np.random.default_rng(0)
    labels = np.zeros(2000, np.int64)
    right, wrong = np.float32([[1, 0]]), np.float32([[0, 1]])
    held = [(images(1, SHAPE), labels[:1])]
    judge = Judge(model, lambda: iter(held))
    judge._images = [(np.zeros((2000, 1), np.float32), labels)]  # type: ignore[assignment]
    judge.images, judge._hits = 2000, 1800
    judge._outputs = [[np.where(rng.permutation(2000)[:, None] < 1800, right, wrong)]]
    other = np.where(np.arange(2000)[:, None] < 1796, right, wrong)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "evaluator", lambda *_args, **_options: lambda _images: [other])
        judgement = judge(model)
    assert judgement.top1_drop == 0.002
    assert judgement.within(0.002)
    assert not judgement.within(0.0019)
