"""What the runtimes share: checks of a model's input, and what precision an ONNX graph computes in."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """A foreign library's message on one line, without source locations, at most ``limit`` characters."""
    text = re.sub(r"(?:Exception from |Check '.*?' failed at )\S+:\d+:?", "", str(error))
    text = re.sub(r"/\S*/(\S+\.(?:cc|cpp|h)):\d+ [^|]*?\)\s", "", text)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


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
