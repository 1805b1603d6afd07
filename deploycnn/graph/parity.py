"""Does a graph compute what its model computes? Measured on images, against a declared tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

from deploycnn.core import Json
from deploycnn.errors import ParityError
from deploycnn.graph.model import MAX_SELF_CONTAINED_BYTES, runtime_inputs
from deploycnn.graph.onnxruntime_errors import onnxruntime_errors
from deploycnn.optional import installed, require

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

Array = npt.NDArray[Any]

#: Preprocessed images (N, C, H, W) -> outputs in graph order, each with N first.
Evaluate = Callable[[npt.NDArray[np.float32]], list[Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What counts as equal: ``|a - b| <= absolute * min(1, p) + relative * max|b|``.

    The maximum is over one image's output: rounding errors grow with the largest terms of the sums that made an
    output, not with the output element itself, which may be near zero by cancellation. ``p`` is the largest
    ``|b|`` of all images: an absolute error means something for outputs of usual size only, and would let any graph
    pass whose outputs nearly vanish (deep nets with random weights).
    """

    absolute: float
    relative: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far two evaluations of one model lie apart.

    Attributes:
        max_abs_error: Largest ``|a - b|`` over all outputs and images.
        max_rel_error: Largest ``|a - b| / max|b|``, the maximum over one image's output.
        max_spread_error: Largest ``|a - b|`` as a share of how far outputs of different images lie apart (the largest
            distance of an output element from its mean over the images). Where outputs hardly depend on the image
            this alone tells that equality means little; ``None`` for a single image or equal outputs.
        worst_ratio: Largest ``|a - b|`` as a share of what is tolerated; above 1 is a failure; ``None``
            where nothing was demanded.
        top1_agreement: Share of images, in [0, 1], whose largest logit is the same; ``None`` where the output
            is not (N, classes).
        batch_sizes: Batch sizes that were run, each over all images.
        images: How many images.
        source: Where the images came from: "val images", "train images" or "random images".
        reference: What was taken as right: "pytorch" or "fp32 onnx".
        evaluator: What ran the graph: "onnxruntime" or "onnx.reference".
    """

    max_abs_error: float
    max_rel_error: float
    max_spread_error: float | None
    worst_ratio: float | None
    top1_agreement: float | None
    tolerance: Tolerance | None
    batch_sizes: tuple[int, ...]
    images: int
    source: str
    reference: Literal["pytorch", "fp32 onnx", "int8 onnx"]
    evaluator: str = field(default="onnxruntime")

    def to_json(self) -> Json:
        """The record kept with the artifact; ``None`` where an error is not finite, as its outputs are not."""
        found = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        return {**found, "batch_sizes": list(self.batch_sizes), "informative": self.informative}

    @property
    def informative(self) -> bool:
        """Whether outputs depend on the image by more than rounding, so that equal outputs mean equal graphs."""
        return self.max_spread_error is not None and self.max_spread_error < _WEAK

    def check(self, what: str) -> None:
        """Refuse a graph beyond the tolerance.

        Args:
            what: The graph, for the message.

        Raises:
            ParityError: beyond the tolerance, or not finite.
        """
        # Written so that NaN fails.
        if self.tolerance is None or self.worst_ratio is None or self.worst_ratio <= 1.0:
            return
        raise ParityError(
            f"{what} differs from its {self.reference} reference by {self.max_abs_error:.3g} (relative "
            f"{self.max_rel_error:.3g}; allowed {self.tolerance.absolute:g} (less for outputs below 1) + "
            f"{self.tolerance.relative:g} * max|output|) on {self.images} {self.source} at batch sizes "
            f"{list(self.batch_sizes)}, top-1 agreement {self.top1_agreement}; raise the tolerance if "
            "that is acceptable"
        )


_TINY = float(np.finfo(np.float32).tiny)
#: Beyond this share of the outputs' spread, an error says that the outputs hardly depend on the image.
_WEAK = 0.1


@np.errstate(invalid="ignore")  # infinity minus infinity is told as no number
def measure_parity(
    reference: Evaluate,
    candidate: Evaluate,
    images_NCHW: npt.NDArray[np.float32],
    *,
    batch_sizes: Sequence[int],
    tolerance: Tolerance | None,
    source: str,
    against: Literal["pytorch", "fp32 onnx", "int8 onnx"],
) -> Parity:
    """Compare two evaluations on the same images, at each batch size over all of them.

    Without a tolerance the errors are measured and nothing is demanded.
    """
    absolute = relative = worst = 0.0
    spread: float | None = None
    agreeing = total = 0
    for batch_size in batch_sizes:
        pairs = [(reference(batch), candidate(batch)) for batch in _chunks(images_NCHW, batch_size)]
        for expected, actual in pairs:
            if expected[0].ndim == 2 and expected[0].shape == actual[0].shape:
                agreeing += int((expected[0].argmax(axis=1) == actual[0].argmax(axis=1)).sum())
                total += len(expected[0])
        for index in range(len(pairs[0][0])):
            compared = [_errors(expected[index], actual[index]) for expected, actual in pairs]
            errors, peaks = (np.concatenate(parts) for parts in zip(*compared, strict=True))
            absolute = _largest(absolute, errors)
            relative = _largest(relative, errors / np.maximum(peaks, _TINY))
            apart = _spread([expected[index] for expected, _ in pairs])
            if apart > 0:
                spread = _largest(spread or 0.0, errors / apart)
            if tolerance is not None:
                allowed = tolerance.absolute * min(1.0, peaks.max()) + tolerance.relative * peaks
                worst = _largest(worst, errors / np.maximum(allowed, _TINY))
    return Parity(
        max_abs_error=absolute,
        max_rel_error=relative,
        max_spread_error=spread,
        worst_ratio=None if tolerance is None else worst,
        top1_agreement=agreeing / total if total else None,
        tolerance=tolerance,
        batch_sizes=tuple(batch_sizes),
        images=len(images_NCHW),
        source=source,
        reference=against,
        evaluator=evaluator_name(),
    )


def _errors(expected: Array, actual: Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Per image: the largest absolute error (infinite for a wrong shape) and largest expected magnitude."""
    right = _by_row(expected)
    peaks = np.abs(right).max(axis=1, initial=0.0)
    if expected.shape != actual.shape:
        return np.full(len(right), np.inf), peaks
    return np.abs(right - _by_row(actual)).max(axis=1, initial=0.0), peaks


def _by_row(output: Array) -> npt.NDArray[np.float64]:
    """(rows, elements of each); a scalar is one row."""
    rows = np.atleast_1d(output).astype(np.float64)
    return rows.reshape(len(rows), int(np.prod(rows.shape[1:])))


def _spread(outputs: Sequence[Array]) -> float:
    """Largest distance of an output element from its mean over all images; 0 for a single image.

    And 0 where the number of elements depends on the image: there is no mean then.
    """
    rows = [_by_row(output) for output in outputs]
    if len({row.shape[1] for row in rows}) > 1:
        return 0.0
    values = np.concatenate(rows)
    if not len(values):
        return 0.0
    return float(np.abs(values - values.mean(axis=0)).max(initial=0.0))


def _largest(so_far: float, values: npt.NDArray[np.float64]) -> float:
    """Maximum that lets NaN through."""
    return float(np.maximum(so_far, values.max(initial=0.0)))


def _chunks(images: npt.NDArray[np.float32], size: int) -> Iterator[npt.NDArray[np.float32]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def evaluator_name() -> str:
    """What ``evaluator`` uses here."""
    return "onnxruntime" if installed("onnxruntime") else "onnx.reference"


def evaluator(
    model: ModelProto | Path,
    *,
    threads: int = 1,
    outputs: Sequence[str] | None = None,
    integers: bool = True,
) -> Evaluate:
    """A function that runs an ONNX model with one image input.

    By onnxruntime where it is installed, else by the slow reference implementation of ONNX. Where the batch size is
    fixed, images are cut into such batches, and the last one is filled up with copies that do not count.

    Args:
        model: The model, or its file (needed above 2 GB).
        threads: CPU threads.
        outputs: Values to return; all graph outputs by default.
        integers: Let onnxruntime fuse Q/DQ into integer kernels. Where not, what is between DQ and Q is
            computed in float32, which is what a quantized graph means, whatever this CPU's arithmetic does.
    """
    if installed("onnxruntime"):
        session = cpu_session(model, threads=threads, integers=integers)
        name = session.get_inputs()[0].name
        wanted = list(outputs) if outputs is not None else None

        def by_onnxruntime(images: npt.NDArray[np.float32]) -> list[Array]:
            with onnxruntime_errors("the model", require("onnxruntime").__version__):
                found: list[Array] = session.run(wanted, {name: images})
            return found

        batch = session.get_inputs()[0].shape[0]
        return _in_batches(by_onnxruntime, batch) if isinstance(batch, int) else by_onnxruntime
    reference = ReferenceEvaluator(model if isinstance(model, ModelProto) else str(model))
    proto = reference.proto_
    assert isinstance(proto, ModelProto)  # noqa: S101 - for the type checker; a file always holds a model
    images_input = runtime_inputs(proto)[0]
    name, size = images_input.name, images_input.type.tensor_type.shape.dim[0].dim_value
    names = list(outputs) if outputs is not None else [value.name for value in proto.graph.output]

    def by_reference(images: npt.NDArray[np.float32]) -> list[Array]:
        return [np.asarray(value) for value in reference.run(names, {name: images})]

    return _in_batches(by_reference, size) if size else by_reference


def _in_batches(run: Evaluate, size: int) -> Evaluate:
    """``run``, which takes ``size`` images, for any number of them."""

    def whole(images: npt.NDArray[np.float32]) -> list[Array]:
        if len(images) == size:
            return run(images)
        parts = []
        for piece in _chunks(images, size):
            missing = size - len(piece)
            filled = np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)]) if missing else piece
            parts.append([_without_copies(output, len(piece), size) for output in run(filled)])
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    return whole


def _without_copies(output: Array, count: int, size: int) -> Array:
    """What the first ``count`` of ``size`` images made: as many rows for each image, or nothing that could be cut."""
    rows = np.atleast_1d(output)
    return rows[: count * (len(rows) // size)] if len(rows) % size == 0 else rows


def module_evaluator(module: nn.Module) -> Evaluate:
    """A function that runs a PyTorch module of one output, which is on the CPU and in evaluation mode."""
    import torch

    def evaluate(images_NCHW: npt.NDArray[np.float32]) -> list[Array]:
        with torch.inference_mode():
            return [module(torch.from_numpy(images_NCHW)).numpy()]

    return evaluate


def cpu_session(
    model: ModelProto | Path, *, threads: int = 1, optimize: bool = True, integers: bool = True
) -> Any:
    """An onnxruntime session on the CPU, quiet, for a model or (needed above 2 GB) its file.

    Args:
        model: The model, or its file.
        threads: CPU threads.
        optimize: Whether the graph may be rewritten at all.
        integers: Whether Q/DQ may be fused into integer kernels.

    Raises:
        RuntimeUnavailable: onnxruntime is not installed.
        ArtifactError: it lacks the model's opset or an operator.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Waiting threads would take the cores of whatever else runs (training, decoding).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if isinstance(model, ModelProto) and model.ByteSize() >= MAX_SELF_CONTAINED_BYTES:
        raise ValueError("a model above 2 GB must be given as a file")
    content = model.SerializeToString() if isinstance(model, ModelProto) else str(model)
    where = f'the graph "{model.graph.name}"' if isinstance(model, ModelProto) else model
    with onnxruntime_errors(where, runtime.__version__):
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
