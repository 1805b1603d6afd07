"""What the runtimes share: checks of a model's input, and what precision an ONNX graph computes in."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycnn.errors import ArtifactError, DeployCNNError, RuntimeUnavailable
from deploycnn.runtimes.base import Availability

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploycnn.core import Artifact, Format

#: Layers that hold nearly all of a CNN's arithmetic, as ONNX and the runtimes call them.
COMPUTE_OPS = frozenset(
    {
        "Conv", "ConvTranspose", "ConvInteger", "FusedConv", "NhwcConv", "NhwcFusedConv", "QLinearConv",
        "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulInteger", "QGemm", "QLinearMatMul",
        "Convolution", "FullyConnected", "Deconvolution",
    }
)  # fmt: skip


def unavailable(error: DeployCNNError, version: str, mend: str) -> Availability:
    """The answer where something failed: messages read "what is wrong; how to mend it"."""
    why, _, own_mend = str(error).partition("; ")
    return Availability(ok=False, version=version, why=why, mend=own_mend or mend)


def check_file(artifact: Artifact, accepts: Sequence[Format], runtime: str) -> Path:
    """The artifact's main file.

    Raises:
        ArtifactError: wrong format for this runtime, missing or empty.
    """
    if artifact.format not in accepts:
        raise ArtifactError(
            f"{artifact.path}: {runtime} opens {' or '.join(accepts)} files, this is {artifact.format}; "
            "choose another runtime or add the pass that makes such a file"
        )
    if not artifact.path.is_file():
        raise ArtifactError(f"{artifact.path}: no such file")
    if artifact.path.stat().st_size == 0:
        raise ArtifactError(f"{artifact.path}: the file is empty; make or copy it again")
    return artifact.path


def check_request(batch_size: int, threads: int) -> None:
    """Refuse batch sizes and thread counts that mean nothing (or, as 0 threads would, "choose for me").

    Raises:
        RuntimeUnavailable: either is below 1.
    """
    for name, value in (("batch_size", batch_size), ("threads", threads)):
        if value < 1:
            raise RuntimeUnavailable(f"{name} is {value}; it must be 1 or more")


def check_batch(path: Path, fixed: object, batch_size: int) -> None:
    """Check the first axis of a model's input against the batch size.

    Raises:
        ArtifactError: the model was exported for another, fixed batch; says which.
    """
    if isinstance(fixed, int) and fixed > 0 and fixed != batch_size:
        raise ArtifactError(
            f"{path}: made for a fixed batch of {fixed}, but batches of {batch_size} were asked for; "
            f"ask for batch size {fixed} or export with a dynamic batch"
        )


def check_images(
    path: Path, shape: Sequence[object], images_NCHW: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """``images_NCHW`` as contiguous float32, once its shape fits the model's input ``shape``.

    ``shape`` holds integers for fixed axes and anything else for dynamic ones.

    Raises:
        ArtifactError: it does not fit.
    """
    import numpy as np

    given = images_NCHW.shape
    fixed = [axis if isinstance(axis, int) and axis > 0 else None for axis in shape]
    if len(given) != len(fixed) or any(
        want not in (None, have) for want, have in zip(fixed, given, strict=True)
    ):
        wanted = " x ".join("N" if axis is None else str(axis) for axis in fixed)
        raise ArtifactError(
            f"{path}: the input is {wanted}, but the images are {' x '.join(map(str, given))}; "
            "prepare them with the preprocessing that the model was made for"
        )
    return np.ascontiguousarray(images_NCHW, dtype=np.float32)


def precision_label(compute: Iterable[str], rest: Iterable[str] = ()) -> str:
    """One word for the arithmetic of a graph.

    Args:
        compute: Precisions of convolutions and matrix products: "int8", "f32", "f16", "bf16", "tf32".
        rest: Those of the other layers.

    Returns:
        The precision where there is one; "int8+f32" where integer layers stand among others. A graph with
        integer convolutions always has a rest: pooling, softmax, or scaling at its edges.
    """
    found, others = set(compute), set(rest)
    floats = sorted((found or others) - {"int8"}) or sorted(others - {"int8"}) or ["f32"]
    return "+".join(["int8", *floats] if "int8" in found else floats)


@functools.cache
def tiny_onnx() -> bytes:
    """A 1x1 convolution, as the smallest graph that shows whether a runtime computes."""
    from onnx import TensorProto, helper

    shape = [1, 1, 2, 2]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight"], ["logits"])],
        "probe",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [helper.make_tensor("weight", TensorProto.FLOAT, [1, 1, 1, 1], [1.0])],
    )
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return model


def graph_precision(model: Any) -> str:
    """The precision of the convolutions and matrix products in an (optimized) ONNX model."""
    import onnx

    floats = {
        onnx.TensorProto.FLOAT: "f32",
        onnx.TensorProto.FLOAT16: "f16",
        onnx.TensorProto.BFLOAT16: "bf16",
    }
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type not in COMPUTE_OPS:
            continue
        if node.op_type.startswith("Q") or node.op_type.endswith("Integer"):
            found.append("int8")
            continue
        source = made_by.get(node.input[1])
        kind = weights.get(node.input[1])
        if source is not None and source.op_type == "Cast":
            kind = next(item.i for item in source.attribute if item.name == "to")
        # a weight that is dequantized or computed on the fly is f32 in all graphs that ONNX Runtime makes
        found.append(floats.get(kind, "f32") if kind is not None else "f32")
    return precision_label(found, ["f32"])


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """What a session is set up by, read from an ONNX file.

    Attributes:
        half: It holds float16 or bfloat16 weights.
        quantized: It holds Q/DQ nodes or int8 weights.
        input_name: Of the image input; empty unless there is one input.
        input_shape: ``None`` is a dynamic axis.
    """

    half: bool
    quantized: bool
    input_name: str
    input_shape: tuple[int | None, ...]

    def profile(self, batch_size: int) -> tuple[str, tuple[int, ...]] | None:
        """The input and its whole shape at this batch size; ``None`` where the graph does not state it."""
        rest = [axis for axis in self.input_shape[1:] if axis is not None]
        if not self.input_name or len(rest) != len(self.input_shape) - 1:
            return None
        return self.input_name, (batch_size, *rest)


@functools.lru_cache(maxsize=256)
def graph_facts(path: Path, size: int, mtime_ns: int) -> GraphFacts:  # noqa: ARG001 - cache key
    """Read once for each file."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    kinds = {tensor.data_type for tensor in graph.initializer}
    quantized = any(node.op_type in {"QuantizeLinear", "DequantizeLinear"} for node in graph.node)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [item for item in graph.input if item.name not in weights]
    axes = inputs[0].type.tensor_type.shape.dim if len(inputs) == 1 else []
    return GraphFacts(
        half=bool(kinds & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}),
        quantized=quantized or onnx.TensorProto.INT8 in kinds,
        input_name=inputs[0].name if len(inputs) == 1 else "",
        input_shape=tuple(axis.dim_value if axis.dim_value > 0 else None for axis in axes),
    )
