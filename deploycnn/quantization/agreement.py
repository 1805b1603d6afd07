"""Does onnxruntime's integer graph compute what the fake-quantized module computes? Measured in output steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import fx, nn

from deploycnn.errors import ParityError
from deploycnn.graph.bridge.integer_kernels import IntegerKernels
from deploycnn.graph.model import initializers, producers
from deploycnn.graph.observe import image_input
from deploycnn.graph.parity import evaluator
from deploycnn.quantization.isa import detect_isa

_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How near two sets of logits are.

    Attributes:
        within_one_step: Share of all values, in [0, 1], that differ by no more than one step.
        max_steps: Largest difference, in steps.
        step: One quantization step of the output: its own scale where it is quantized, else a 255th of the range of
            the logits that were seen.
        step_is: Which of the two: "scale" or "range / 255".
        top1_agreement: Share of images whose largest logit is the same.
        images: How many.
        source: Where they came from.
        integers: Whether onnxruntime ran its integer kernels. Not where this CPU's saturate: there it computed in
            float between the same roundings.
    """

    within_one_step: float
    max_steps: float
    step: float
    step_is: str
    top1_agreement: float
    images: int
    source: str
    integers: bool

    def check(self, least: float, what: str) -> None:
        """Refuse a graph that does not compute what was trained.

        Raises:
            ParityError: less than ``least`` of the values are within one step.
        """
        # Written so that NaN fails.
        if not self.within_one_step >= least:
            raise ParityError(
                f"{what}: onnxruntime's logits are within one step ({self.step:.3g}) of the trainable graph's on "
                f"{100 * self.within_one_step:.2f}% of values ({self.images} {self.source}), at least "
                f"{100 * least:.2f}% are demanded; the largest difference is {self.max_steps:.1f} steps; lower "
                "`min_agreement` if that is acceptable"
            )


def measure_agreement(
    module: nn.Module,
    model: ModelProto,
    images_NCHW: npt.NDArray[np.float32],
    *,
    source: str,
    threads: int,
    integers: bool,
) -> Agreement:
    """Run both on the same images.

    Args:
        module: The fake-quantized graph, on the CPU. It computes as onnxruntime's integer kernels do where these run.
        model: The Q/DQ graph.
        images_NCHW: Preprocessed.
        source: Where they came from.
        threads: CPU threads.
        integers: Whether onnxruntime may use its integer kernels.
    """
    run = evaluator(model, threads=threads, integers=integers)
    graph = next((part for part in module.modules() if isinstance(part, fx.GraphModule)), None)
    compute = IntegerKernels(graph) if integers and graph is not None else module
    size = image_input(model)[1][0] or _BATCH
    trained, deployed = [], []
    module.eval()
    with torch.inference_mode():
        for start in range(0, len(images_NCHW) - len(images_NCHW) % size or len(images_NCHW), size):
            batch = images_NCHW[start : start + size]
            trained.append(compute(torch.from_numpy(batch)).numpy())
            deployed.append(run(batch)[0])
    ours, theirs = (np.concatenate(parts).astype(np.float64) for parts in (trained, deployed))
    scale = output_scale(model)
    step = scale if scale is not None else float(theirs.max() - theirs.min()) / 255
    steps = np.abs(ours - theirs) / max(step, float(np.finfo(np.float32).tiny))
    return Agreement(
        # A step is a multiple of a float32 scale; its last bit must not count.
        within_one_step=float((steps <= 1 + 1e-4).mean()),
        max_steps=float(steps.max()),
        step=step,
        step_is="scale" if scale is not None else "range / 255",
        top1_agreement=float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
        images=len(ours),
        source=source,
        integers=integers,
    )


def output_scale(model: ModelProto) -> float | None:
    """Scale of the first output where it is quantized per tensor."""
    weights = initializers(model.graph)
    node = producers(model.graph).get(model.graph.output[0].name)
    if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in weights:
        return None
    scale = numpy_helper.to_array(weights[node.input[1]])
    return float(scale.item()) if scale.size == 1 else None


def saturates_here(model: ModelProto) -> bool:
    """Whether this CPU's 8-bit multiply-add may overflow on the model's weights."""
    if not detect_isa().saturates:
        return False
    tensors = [item for item in model.graph.initializer if item.data_type == TensorProto.INT8 and item.dims]
    return any(
        int(np.abs(numpy_helper.to_array(item).astype(np.int32)).max(initial=0)) > 64 for item in tensors
    )
