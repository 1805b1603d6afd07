"""What a runtime makes of a Q/DQ graph: counted on the graph that it really runs, and told layer by layer."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploycnn.errors import ArtifactError, one_line
from deploycnn.graph.model import load_onnx
from deploycnn.graph.onnxruntime_errors import onnxruntime_errors
from deploycnn.optional import require
from deploycnn.quantization.structure import COMPUTE

#: onnxruntime's names for float convolutions and matrix products, whatever layout they were moved to.
FLOAT_COMPUTE = frozenset(
    {
        "Conv",
        "FusedConv",
        "NhwcConv",
        "NhwcFusedConv",
        "ConvTranspose",
        "Gemm",
        "FusedGemm",
        "MatMul",
        "FusedMatMul",
    }
)

#: Integer operators of onnxruntime whose names do not begin with "QLinear".
_INTEGER = frozenset({"QGemm", "QAttention", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger"})

#: onnxruntime names what it moved to another layout ``<name>_token_<number>``.
_TOKEN = re.compile(r"_token_\d+$")

#: OpenVINO's layer types with weights, and what is left of Q/DQ that it could not fuse.
_OPENVINO_COMPUTE = frozenset({"Convolution", "FullyConnected", "MatMul", "Deconvolution"})
_OPENVINO_STRAY = frozenset({"FakeQuantize", "Convert"})
_OPENVINO_INTEGER = frozenset({"u8", "i8"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedCounts:
    """What a runtime makes of a Q/DQ graph on this machine.

    Attributes:
        quantized: Operators that compute on integers (``QLinearConv``, ``QGemm``, ...); for OpenVINO,
            convolutions and matrix products that do.
        stray: Q/DQ nodes left over.
        float_compute: Convolutions and matrix products left in float.
        by_operator: Count of every operator in the optimized graph.
        runtime: "onnxruntime" or "openvino".
        layers: Whether each convolution and matrix product of the file computes on integers, by node name.
    """

    quantized: int
    stray: int
    float_compute: int
    by_operator: Mapping[str, int]
    runtime: str = "onnxruntime"
    layers: Mapping[str, bool] = field(default_factory=dict)


def census(path: Path, target: str) -> FusedCounts | None:
    """Count on the runtime of a CPU target; ``None`` for a GPU, whose engines tell by their inspector.

    Raises:
        RuntimeUnavailable: the target's runtime is not installed.
        ArtifactError: it cannot load the model.
    """
    if target == "openvino":
        return count_fused_openvino(path)
    return count_fused(path) if target in {"cpu", "onnxruntime-cpu"} else None


def count_fused(path: Path) -> FusedCounts:
    """Optimize the model as onnxruntime does when it loads it on the CPU, and count what came out.

    Raises:
        RuntimeUnavailable: onnxruntime is not installed.
        ArtifactError: it cannot load the model.
    """
    runtime = require("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="deploycnn-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = runtime.SessionOptions()
        # The warning that it is silenced here says that the saved graph suits this machine only, as intended.
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(optimized)
        with onnxruntime_errors(path, runtime.__version__):
            runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = load_onnx(optimized).graph.node
    operators = collections.Counter(node.op_type for node in nodes)
    found = {node.name: node.op_type for node in nodes}
    for node in nodes:
        found.setdefault(_TOKEN.sub("", node.name), node.op_type)
    return FusedCounts(
        runtime="onnxruntime",
        quantized=sum(count for name, count in operators.items() if _is_integer(name)),
        stray=operators["QuantizeLinear"] + operators["DequantizeLinear"],
        float_compute=sum(operators[name] for name in FLOAT_COMPUTE),
        by_operator=dict(sorted(operators.items())),
        # Integer kernels keep the name of what they were made of; a float one may take that of its fused activation.
        layers={name: _is_integer(found.get(name, "")) for name in _layers(path)},
    )


def count_fused_openvino(path: Path) -> FusedCounts:
    """Compile the model as OpenVINO does on the CPU in f32, and count the layers that it executes.

    Raises:
        RuntimeUnavailable: OpenVINO is not installed.
        ArtifactError: it cannot read or compile the model.
    """
    openvino = require("openvino")
    core = openvino.Core()
    try:
        compiled = core.compile_model(
            core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        )
    except RuntimeError as error:
        raise ArtifactError(f"{path}: openvino cannot compile it: {one_line(error)}") from error
    aliases = _openvino_names(path)
    types: collections.Counter[str] = collections.Counter()
    quantized = stray = floats = 0
    layers: dict[str, bool] = {}
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(value.astype(str)) for key, value in op.get_rt_info().items()}
        kind, integer = info.get("layerType", ""), info.get("runtimePrecision") in _OPENVINO_INTEGER
        types[kind] += 1
        stray += kind in _OPENVINO_STRAY
        if kind in _OPENVINO_COMPUTE:
            quantized, floats = quantized + integer, floats + (not integer)
            parts = [part.partition("/WithoutBiases")[0] for part in info["originalLayersNames"].split(",")]
            layers.update({aliases[part]: integer for part in parts if part in aliases})
    return FusedCounts(
        runtime="openvino",
        quantized=quantized,
        stray=stray,
        float_compute=floats,
        by_operator=dict(sorted(types.items())),
        layers={name: layers[name] for name in _layers(path) if name in layers},
    )


def _openvino_names(path: Path) -> dict[str, str]:
    """The names that OpenVINO may call a layer by -> its node's name: the last layer is called after its output."""
    found: dict[str, str] = {}
    for node in load_onnx(path).graph.node:
        if node.op_type in COMPUTE:
            found |= dict.fromkeys((node.name, node.output[0], f"{node.output[0]}_original"), node.name)
    return found


def _layers(path: Path) -> list[str]:
    """Names of the convolutions and matrix products of a model, in graph order."""
    return [node.name for node in load_onnx(path).graph.node if node.op_type in COMPUTE]


def _is_integer(op_type: str) -> bool:
    return op_type.startswith("QLinear") or op_type in _INTEGER
