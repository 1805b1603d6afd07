import numpy as np
import pytest
from onnx import TensorProto, helper

from deploycnn.core import TensorSpec
from deploycnn.errors import ArtifactError
from deploycnn.models.onnx_import import precision_of
from deploycnn.models.onnx_macs import count_onnx, onnx_specs
from tests.models import onnx_graphs
from tests.models.onnx_graphs import MACS, PARAMS, array, model_of
from tests.models.shared import SHARED, needs_shared

IMAGES = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 8, 8])


@pytest.mark.parametrize("form", ["fp32", "fp16", "qdq", "qlinear"])
def test_the_same_network_counts_the_same_in_every_number_format(form):
    counts = count_onnx(getattr(onnx_graphs, form)())
    assert (counts.params, counts.macs) == (PARAMS, MACS)


@pytest.mark.parametrize(
    ("form", "precision"), [("fp32", "fp32"), ("fp16", "fp16"), ("qdq", "int8"), ("qlinear", "int8")]
)
def test_precision(form, precision):
    assert precision_of(getattr(onnx_graphs, form)()) == precision


def test_macs_are_per_image_whatever_the_fixed_batch():
    assert count_onnx(onnx_graphs.fp32(batch=4)).macs == MACS


def test_open_height_and_width_need_a_shape():
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, "H", "W"])
    model = onnx_graphs.fp32()
    model.graph.input[0].CopyFrom(images)
    assert count_onnx(model).macs is None
    assert count_onnx(model, (3, 8, 8)).macs == MACS


def single(node, weights=(), output=("y", TensorProto.FLOAT, None)):
    return model_of([node], list(weights), inputs=[IMAGES], output=output)


@pytest.mark.parametrize(
    ("node", "weights", "macs", "params"),
    [
        (
            helper.make_node("ConvTranspose", ["images", "w"], ["y"], strides=[2, 2]),
            [array("w", np.zeros((3, 4, 2, 2), np.float32))],
            8 * 8 * 3 * 4 * 4,
            48,
        ),
        (
            helper.make_node("Conv", ["images", "w"], ["y"], group=3),
            [array("w", np.zeros((6, 1, 3, 3), np.float32))],
            6 * 6 * 6 * 9,
            54,
        ),
        (
            helper.make_node("MatMul", ["images", "w"], ["y"]),
            [array("w", np.zeros((8, 5), np.float32))],
            3 * 8 * 5 * 8,
            40,
        ),
        (
            helper.make_node("Einsum", ["images", "w"], ["y"], equation="nchw,wk->nchk"),
            [array("w", np.zeros((8, 5), np.float32))],
            3 * 8 * 5 * 8,
            0,
        ),
        (
            helper.make_node("BatchNormalization", ["images", *"abcd"], ["y"]),
            [array(name, np.ones(3, np.float32)) for name in "abcd"],
            0,
            6,
        ),
        (helper.make_node("Mul", ["images", "w"], ["y"]), [array("w", np.float32(2))], 0, 0),
        (helper.make_node("Add", ["images", "w"], ["y"]), [array("w", np.ones((3, 1, 1), np.float32))], 0, 3),
    ],
)
def test_single_nodes_by_hand(node, weights, macs, params):
    counts = count_onnx(single(node, weights))
    assert (counts.macs, counts.params) == (macs, params)


def test_unknown_costs_are_none_not_zero():
    weight = array("w", np.zeros((4, 3, 3, 3), np.float32))
    custom = helper.make_node("Mystery", ["images"], ["m"], domain="com.microsoft")
    conv = helper.make_node("Conv", ["m", "w"], ["y"])
    assert count_onnx(model_of([custom, conv], [weight], output=("y", TensorProto.FLOAT, None))).macs is None
    attention = helper.make_node("MultiHeadAttention", ["images"], ["y"], domain="com.microsoft")
    assert count_onnx(single(attention)).macs is None


def test_specs_leave_out_initializers_among_the_inputs(tmp_path):
    model = onnx_graphs.fp32()
    model.graph.input.append(helper.make_tensor_value_info("fc.bias", TensorProto.FLOAT, [5]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    inputs, outputs = onnx_specs(tmp_path / "m.onnx")
    assert inputs == (TensorSpec(name="images", dtype="float32", shape=(None, 3, 8, 8)),)
    assert outputs == (TensorSpec(name="logits", dtype="float32", shape=(None, 5)),)


def test_damaged_file(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model at all")
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        count_onnx(tmp_path / "m.onnx")


@needs_shared
def test_ultraface():
    """Parameters by the file's own names: all stored tensors but batch-norm statistics and counters."""
    path = SHARED / "data" / "onnx" / "ultraface-slim-320.onnx"
    counts = count_onnx(path)
    assert counts.params == 260_188
    inputs, outputs = onnx_specs(path)
    assert [spec.shape for spec in inputs] == [(1, 3, 240, 320)]
    assert [spec.name for spec in outputs] == ["scores", "boxes"]
    assert counts.macs == 81_410_560
