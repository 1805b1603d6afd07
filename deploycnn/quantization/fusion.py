"""What onnxruntime makes of a Q/DQ graph: counted on the graph that it really runs."""

from __future__ import annotations

import collections
import tempfile
from pathlib import Path

from deploycnn.graph.model import load_onnx
from deploycnn.optional import require
from deploycnn.quantization.settings import FusedCounts

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


def count_fused(path: Path) -> FusedCounts:
    """Optimize the model as onnxruntime does when it loads it, and count what came out.

    Raises:
        RuntimeUnavailable: onnxruntime is not installed.
    """
    runtime = require("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="deploycnn-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = runtime.SessionOptions()
        # The warning that it is silenced here says that the saved graph suits this machine only, as intended.
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(optimized)
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = load_onnx(optimized)
    operators = collections.Counter(node.op_type for node in model.graph.node)
    return FusedCounts(
        quantized=sum(
            n
            for name, n in operators.items()
            if name.startswith("QLinear") or name in {"QGemm", "QAttention"}
        ),
        stray=operators["QuantizeLinear"] + operators["DequantizeLinear"],
        float_compute=sum(operators[name] for name in FLOAT_COMPUTE),
        by_operator=dict(sorted(operators.items())),
    )
