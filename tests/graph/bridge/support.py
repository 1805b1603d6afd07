"""Small ONNX graphs for the bridge, and onnxruntime as the judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploycnn.graph.bridge import Bridge, to_torch

Array = npt.NDArray[Any]
IR = {
    9: 4,
    10: 5,
    11: 6,
    12: 7,
    13: 7,
    14: 7,
    15: 8,
    16: 8,
    17: 8,
    18: 8,
    19: 9,
    20: 9,
    21: 10,
    22: 10,
    23: 11,
}


def model_of(
    nodes: Sequence[NodeProto],
    weights: dict[str, Array],
    *,
    inputs: dict[str, Sequence[int | str | None]],
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
) -> ModelProto:
    """A graph with float inputs; the types of its outputs are left to the runtime."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR[opset])
    return onnx.shape_inference.infer_shapes(model)


def run(model: ModelProto, *inputs: Array, optimize: bool = True) -> list[Array]:
    """Outputs by onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    return list(session.run(None, dict(zip(names, inputs, strict=True))))


def by_torch(bridge: Bridge, *inputs: Array) -> list[Array]:
    with torch.no_grad():
        found = bridge.module(*(torch.from_numpy(array) for array in inputs))
    outputs = found if isinstance(found, tuple) else (found,)
    return [output.numpy() for output in outputs]


def assert_same_as_onnxruntime(
    model: ModelProto, *inputs: Array, rtol: float = 1e-4, atol: float = 1e-5
) -> Bridge:
    """The bridge computes what onnxruntime computes, and writes back the same bytes untrained."""
    bridge = to_torch(model)
    for expected, found in zip(run(model, *inputs), by_torch(bridge, *inputs), strict=True):
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)
    written = bridge.write_back()
    assert written.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    return bridge


def noise(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def convnet(
    opset: int = 17, *, norm: bool = False, image: int = 12, channels: int = 3, classes: int = 5
) -> ModelProto:
    """Convolutions (one depthwise), a residual Add, pools and a Gemm: (N, 3, 12, 12) -> (N, 5)."""
    nodes = [
        helper.make_node("Conv", ["x", "stem.w", "stem.b"], ["c0"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"], "relu"),
        helper.make_node("Conv", ["r0", "dw.w", "dw.b"], ["c1"], "dw", pads=[1, 1, 1, 1], group=8),
        helper.make_node("Clip", ["c1", "zero", "six"], ["r1"], "relu6"),
        helper.make_node("Conv", ["r1", "pw.w", "pw.b"], ["c2"], "pw"),
        helper.make_node("Add", ["c2", "r0"], ["a"], "add"),
        helper.make_node("Relu", ["a"], ["r2"], "relu2"),
        helper.make_node("MaxPool", ["r2"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["p"], ["g"], "gap"),
        helper.make_node("Flatten", ["g"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "head.w", "head.b"], ["y"], "head", transB=1),
    ]
    rng = np.random.default_rng(3)

    def weight(*shape: int) -> Array:
        return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)

    weights: dict[str, Array] = {
        "stem.w": weight(8, channels, 3, 3),
        "stem.b": weight(8, 4)[:, 0],
        "dw.w": weight(8, 1, 3, 3),
        "dw.b": weight(8, 4)[:, 0],
        "pw.w": weight(8, 8, 1, 1),
        "pw.b": weight(8, 4)[:, 0],
        "head.w": weight(classes, 8),
        "head.b": weight(classes, 4)[:, 0],
        "zero": np.array(0, np.float32),
        "six": np.array(6, np.float32),
    }
    if norm:
        nodes[0] = helper.make_node("Conv", ["x", "stem.w"], ["pre"], "stem", pads=[1, 1, 1, 1])
        nodes.insert(
            1,
            helper.make_node(
                "BatchNormalization", ["pre", "bn.s", "bn.b", "bn.m", "bn.v"], ["c0"], "bn", momentum=0.8
            ),
        )
        del weights["stem.b"]
        weights |= {"bn.s": rng.uniform(0.5, 1.5, 8).astype(np.float32), "bn.b": weight(8, 4)[:, 0]}
        weights |= {"bn.m": weight(8, 4)[:, 1], "bn.v": rng.uniform(0.5, 1.5, 8).astype(np.float32)}
    return model_of(nodes, weights, inputs={"x": ["N", channels, image, image]}, opset=opset)


class _Reader:
    """Calibration data for onnxruntime's quantizer."""

    def __init__(self, batches: Sequence[Array], name: str) -> None:
        self.rest: Iterator[Array] = iter(batches)
        self.name = name

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self.rest, None)
        return None if batch is None else {self.name: batch}


def quantized(
    model: ModelProto, folder: Path, *, shape: tuple[int, ...] = (3, 12, 12), **options: Any
) -> ModelProto:
    """``model`` with Q/DQ by onnxruntime's own quantizer, 7-bit weights so that no CPU saturates."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(_Reader, CalibrationDataReader):  # type: ignore[misc]
        pass

    source, target = folder / "float.onnx", folder / "int8.onnx"
    onnx.save(model, source)
    quantize_static(
        source,
        target,
        Reader([noise(16, *shape, seed=seed) for seed in range(2)], model.graph.input[0].name),
        quant_format=QuantFormat.QDQ,
        **{
            "per_channel": True,
            "reduce_range": True,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            **options,
        },
    )
    return onnx.load(target)
