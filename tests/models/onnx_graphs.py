"""Small ONNX graphs, written by hand: the same convolution and classifier in several number formats."""

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

#: Of the network below for one 3x8x8 image: 8 filters of 3x3x3 on 8x8 positions, then 8 -> 5.
MACS = 8 * 8 * 8 * 27 + 8 * 5
PARAMS = 8 * 27 + 8 + 8 * 5 + 5


def array(name, value):
    return numpy_helper.from_array(np.asarray(value), name)


def model_of(
    nodes, weights, *, batch="N", inputs=None, output=("logits", TensorProto.FLOAT, ["N", 5]), opset=17
):
    inputs = inputs or [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 8, 8])]
    graph = helper.make_graph(nodes, "test", inputs, [helper.make_tensor_value_info(*output)], weights)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def weights_of(dtype):
    rng = np.random.default_rng(0)
    return [
        array("conv.weight", rng.standard_normal((8, 3, 3, 3)).astype(dtype)),
        array("conv.bias", rng.standard_normal(8).astype(dtype)),
        array("fc.weight", rng.standard_normal((5, 8)).astype(dtype)),
        array("fc.bias", rng.standard_normal(5).astype(dtype)),
    ]


TAIL = [
    helper.make_node("Relu", ["c"], ["r"], "relu"),
    helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
    helper.make_node("Flatten", ["p"], ["f"], "flatten"),
]
GEMM = helper.make_node("Gemm", ["f", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1)


def fp32(batch="N", opset=17) -> ModelProto:
    conv = helper.make_node("Conv", ["images", "conv.weight", "conv.bias"], ["c"], "conv", pads=[1, 1, 1, 1])
    return model_of([conv, *TAIL, GEMM], weights_of(np.float32), batch=batch, opset=opset)


def fp16() -> ModelProto:
    nodes = [
        helper.make_node("Cast", ["images"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "conv.weight", "conv.bias"], ["c"], "conv", pads=[1, 1, 1, 1]),
        *TAIL,
        helper.make_node("Gemm", ["f", "fc.weight", "fc.bias"], ["h"], "fc", transB=1),
        helper.make_node("Cast", ["h"], ["logits"], to=TensorProto.FLOAT),
    ]
    return model_of(nodes, weights_of(np.float16))


def qdq() -> ModelProto:
    weights = [
        array("conv.weight", np.ones((8, 3, 3, 3), np.int8)),
        array("conv.scale", np.full(8, 0.1, np.float32)),
        array("conv.zero", np.zeros(8, np.int8)),
        array("conv.bias", np.ones(8, np.int32)),
        array("bias.scale", np.full(8, 0.01, np.float32)),
        array("x.scale", np.float32(0.1)),
        array("x.zero", np.uint8(0)),
        *weights_of(np.float32)[2:],
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "x.scale", "x.zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x.scale", "x.zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["conv.weight", "conv.scale", "conv.zero"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["conv.bias", "bias.scale"], ["bd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["c"], "conv", pads=[1, 1, 1, 1]),
        *TAIL,
        GEMM,
    ]
    return model_of(nodes, weights)


def qlinear() -> ModelProto:
    scalars = {name: array(name, np.float32(0.1)) for name in ("x.scale", "w.scale", "y.scale")}
    zeros = {name: array(name, np.uint8(0)) for name in ("x.zero", "y.zero")}
    weights = [
        array("conv.weight", np.ones((8, 3, 3, 3), np.int8)),
        array("w.zero", np.int8(0)),
        array("conv.bias", np.ones(8, np.int32)),
        *scalars.values(),
        *zeros.values(),
        *weights_of(np.float32)[2:],
    ]
    arguments = [
        "xq",
        "x.scale",
        "x.zero",
        "conv.weight",
        "w.scale",
        "w.zero",
        "y.scale",
        "y.zero",
        "conv.bias",
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "x.scale", "x.zero"], ["xq"]),
        helper.make_node("QLinearConv", arguments, ["yq"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("DequantizeLinear", ["yq", "y.scale", "y.zero"], ["c"]),
        *TAIL,
        GEMM,
    ]
    return model_of(nodes, weights)


def with_external_data(folder, location="weights.bin", name="model.onnx"):
    """The FP32 model with its weights in another file."""
    path = folder / name
    onnx.save_model(
        fp32(),
        str(path),
        save_as_external_data=True,
        location=location,
        size_threshold=0,
        convert_attribute=False,
    )
    return path
