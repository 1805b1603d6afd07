"""Does onnxruntime compute what the fake-quantized module computes? Measured in steps.

End to end, in the arithmetic of onnxruntime's integer kernels, where all is in integers. Elsewhere the last bits of
float32 decide which way values near the middle of two steps are rounded, and over many layers both drift apart by what
rounding itself does. There each rounding is compared for itself, given what onnxruntime made before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import fx, nn

from deploycnn.errors import ParityError
from deploycnn.graph.bridge import Bridge, FakeQuantize
from deploycnn.graph.bridge.integer_kernels import IntegerKernels
from deploycnn.graph.model import initializers, producers
from deploycnn.graph.observe import exposing, image_input
from deploycnn.graph.parity import evaluator
from deploycnn.quantization.isa import detect_isa

_BATCH = 64

#: Every rounded value of a batch is kept.
_BATCH_BY_LAYER = 8

#: A step is a multiple of a float32 scale; its last bit must not count.
_ONE_STEP = 1 + 1e-4


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
        by_layer: Whether each rounding was given what onnxruntime made before it. ``within_one_step`` is then the
            smallest share of any, the logits included, and ``max_steps`` the largest difference of any.
        worst: With ``by_layer``: where the share is smallest, the name of a QuantizeLinear or of the output.
    """

    within_one_step: float
    max_steps: float
    step: float
    step_is: str
    top1_agreement: float
    images: int
    source: str
    integers: bool
    by_layer: bool = False
    worst: str = ""

    def check(self, least: float, what: str) -> None:
        """Refuse a graph that does not compute what was trained.

        Raises:
            ParityError: less than ``least`` of the values are within one step.
        """
        # Written so that NaN fails.
        if not self.within_one_step >= least:
            which = (
                f"given onnxruntime's values before it, \"{self.worst}\" is within one step of onnxruntime's on "
                if self.by_layer
                else f"onnxruntime's logits are within one step ({self.step:.3g}) of the trainable graph's on "
            )
            raise ParityError(
                f"{what}: {which}{100 * self.within_one_step:.2f}% of values ({self.images} {self.source}), at least "
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
    trained, deployed = [], []
    module.eval()
    with torch.inference_mode():
        for batch in _batches(images_NCHW, model, _BATCH):
            trained.append(compute(torch.from_numpy(batch)).numpy())
            deployed.append(run(batch)[0])
    ours, theirs = (np.concatenate(parts).astype(np.float64) for parts in (trained, deployed))
    step = _step(model, theirs)
    steps = np.abs(ours - theirs) / step
    return Agreement(
        within_one_step=_share(steps),
        max_steps=float(steps.max()),
        step=step,
        step_is=_step_is(model),
        top1_agreement=float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
        images=len(ours),
        source=source,
        integers=integers,
    )


def measure_by_layer(
    bridge: Bridge, model: ModelProto, images_NCHW: npt.NDArray[np.float32], *, source: str, threads: int
) -> Agreement:
    """Compare each rounding, and the logits, given what onnxruntime made before them, in float between roundings.

    Args:
        bridge: The fake-quantized graph, its module on the CPU.
        model: The Q/DQ graph.
        images_NCHW: Preprocessed.
        source: Where they came from.
        threads: CPU threads.
    """
    quantizers = _calls(bridge, model)
    zeros, logits = initializers(model.graph), model.graph.output[0].name
    kinds = {
        node.output[0]: zeros[node.input[2]].data_type if len(node.input) > 2 else TensorProto.UINT8
        for node in quantizers.values()
    }
    wanted = [logits, *(node.output[0] for node in quantizers.values())]
    run = evaluator(exposing(model, kinds, kinds), threads=threads, outputs=wanted, integers=False)
    led, ours, theirs = _Led(bridge.module.eval()), [], []
    with torch.inference_mode():
        for batch in _batches(images_NCHW, model, _BATCH_BY_LAYER):
            expected, *integers = run(batch)
            led.given = dict(zip(quantizers, integers, strict=True))
            found = led.run(torch.from_numpy(batch))
            ours.append((found[0] if isinstance(found, tuple) else found).numpy())
            theirs.append(expected)
    ends = [np.concatenate(parts).astype(np.float64) for parts in (ours, theirs)]
    step = _step(model, ends[1])
    steps = np.abs(ends[0] - ends[1]) / step
    shares = {quantizers[call].name: within / total for call, (within, total) in led.within.items()}
    shares[logits] = _share(steps)
    worst = min(shares, key=lambda name: shares[name])
    return Agreement(
        within_one_step=shares[worst],
        max_steps=max(led.max_steps, float(steps.max())),
        step=step,
        step_is=_step_is(model),
        top1_agreement=float((ends[0].argmax(axis=1) == ends[1].argmax(axis=1)).mean()),
        images=len(ends[0]),
        source=source,
        integers=False,
        by_layer=True,
        worst=worst,
    )


def _calls(bridge: Bridge, model: ModelProto) -> dict[fx.Node, NodeProto]:
    """Where the module calls a quantizer -> the QuantizeLinear that it is. Equal ones share a module."""
    nodes: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.name in bridge.module_of:
            nodes.setdefault(bridge.module_of[node.name], []).append(node)
    calls: dict[str, list[fx.Node]] = {}
    for call in bridge.module.graph.nodes:
        if call.op == "call_module" and call.target in nodes:
            calls.setdefault(call.target, []).append(call)
    # Both are in the order of the file; the module lacks calls that nobody reads.
    alike = [(found, nodes[path]) for path, found in calls.items() if len(found) == len(nodes[path])]
    return {call: node for found, named in alike for call, node in zip(found, named, strict=True)}


class _Led(fx.Interpreter):
    """Runs a module, compares what each quantizer makes with given integers, and goes on with these.

    Attributes:
        given: Call of a quantizer -> its integers.
        within: Call -> how many values were within one step so far, and of how many.
        max_steps: The largest difference so far.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.given: dict[fx.Node, npt.NDArray[np.generic]] = {}
        self.within: dict[fx.Node, tuple[int, int]] = {}
        self.max_steps = 0.0

    def run_node(self, n: fx.Node) -> object:
        """Compute one node."""
        value = super().run_node(n)
        if n not in self.given:
            return value
        quantizer = self.module.get_submodule(str(n.target))
        assert isinstance(quantizer, FakeQuantize)  # noqa: S101 - for the type checker
        length = value.shape[quantizer.axis] if quantizer.axis is not None else 1
        scale = quantizer.spread(quantizer.scale, value.ndim, length)
        zero = quantizer.spread(quantizer.zero_point, value.ndim, length)
        theirs = (torch.from_numpy(self.given[n].astype(np.float32)) - zero) * scale
        steps = ((value - theirs).abs() / scale).numpy()
        within, total = self.within.get(n, (0, 0))
        self.within[n] = within + int((steps <= _ONE_STEP).sum()), total + steps.size
        self.max_steps = max(self.max_steps, float(steps.max(initial=0.0)))
        return theirs


def _batches(
    images: npt.NDArray[np.float32], model: ModelProto, size: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Batches of ``size``, or of the graph's own, of which only whole ones count where there is one."""
    fixed = image_input(model)[1][0]
    size = fixed or size
    end = len(images) - len(images) % size if fixed and len(images) >= size else len(images)
    for start in range(0, end, size):
        yield images[start : min(start + size, end)]


def _share(steps: npt.NDArray[np.float64]) -> float:
    return float((steps <= _ONE_STEP).mean())


def _step(model: ModelProto, logits: npt.NDArray[np.float64]) -> float:
    scale = output_scale(model)
    step = scale if scale is not None else float(logits.max() - logits.min()) / 255
    return max(step, float(np.finfo(np.float32).tiny))


def _step_is(model: ModelProto) -> str:
    return "scale" if output_scale(model) is not None else "range / 255"


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
