"""How ONNX operators change receptive fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import NodeProto, TensorProto

from deploycnn.graph.model import attribute
from deploycnn.models.receptive_field import Field, Span, union

Shape = tuple[int, ...]
Rule = Callable[["_Step"], Field | None]


@dataclass(slots=True)
class OnnxGraph:
    """Shapes of values and values of constants."""

    shapes: Mapping[str, Shape]
    constants: dict[str, TensorProto]

    def add_constant(self, node: NodeProto) -> None:
        """Learn the value of a ``Constant`` node."""
        held = attribute(node, "value")
        if isinstance(held, TensorProto):
            self.constants[node.output[0]] = held

    def numbers(self, name: str) -> list[int] | None:
        """The whole numbers in a constant, ``None`` where ``name`` is none."""
        if name not in self.constants:
            return None
        return [int(value) for value in onnx.numpy_helper.to_array(self.constants[name]).reshape(-1)]


@dataclass(slots=True)
class _Step:
    """One node with what is known of its first image input."""

    node: NodeProto
    seen: Field
    shape: Shape
    output: Shape
    graph: OnnxGraph

    def option(self, name: str, default: object) -> Any:
        return attribute(self.node, name, default)

    def argument(self, name: str, index: int) -> list[int] | None:
        """Numbers that are an attribute in older operator sets and an input in newer ones."""
        if len(self.node.input) > index and self.node.input[index]:
            return self.graph.numbers(self.node.input[index])
        held = attribute(self.node, name)
        return [int(value) for value in held] if isinstance(held, list | tuple) else None


def field_of_node(node: NodeProto, fields: Mapping[str, Field | None], graph: OnnxGraph) -> Field | None:
    """What the node's first output sees; ``None`` where no rule tells.

    Args:
        node: At least one of its inputs is in ``fields``.
        fields: What the values seen so far see.
        graph: Shapes and constants.
    """
    sources = [name for name in node.input if name in fields]
    seen = [fields[name] for name in sources]
    output = graph.shapes.get(node.output[0])
    if (
        output is None
        or any(one is None for one in seen)
        or any(name not in graph.shapes for name in sources)
    ):
        return None
    given = [(one, graph.shapes[name]) for one, name in zip(seen, sources, strict=True) if one is not None]
    op = node.op_type
    if op in _RULES and len(given) == 1:
        return _RULES[op](_Step(node, *given[0], output, graph))
    if op in {"Concat", "QLinearConcat"}:
        axis = attribute(node, "axis", 1)
        axis = axis % len(output) if isinstance(axis, int) else 1
        spatial = any(one.axes is not None and axis in one.axes for one, _ in given)
        return None if spatial else union(given, output)
    return union(given, output) if op in _KEEPS else None


def _span_pairs(step: _Step) -> list[tuple[Span, int, int, int, int, int]] | None:
    """For height and width: span, positions, kernel, stride, padding before, dilation."""
    if step.seen.axes != (2, 3) or len(step.shape) != 4:
        return None
    kernel = step.option("kernel_shape", None)
    if kernel is None:
        weight = step.node.input[3 if step.node.op_type == "QLinearConv" else 1]
        kernel = list(step.graph.shapes.get(weight, ()))[2:]
    if len(kernel) != 2:
        return None
    strides, dilations = step.option("strides", [1, 1]), step.option("dilations", [1, 1])
    pads = _pads(step, kernel, strides, dilations)
    return [
        (step.seen.spans[i], step.shape[2 + i], kernel[i], strides[i], pads[i], dilations[i])
        for i in range(2)
    ]


def _pads(step: _Step, kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """Padding before, along height and width."""
    mode = step.option("auto_pad", b"NOTSET")
    if mode in {b"SAME_UPPER", b"SAME_LOWER"}:
        whole = [
            max(
                (step.output[2 + i] - 1) * strides[i]
                + dilations[i] * (kernel[i] - 1)
                + 1
                - step.shape[2 + i],
                0,
            )
            for i in range(2)
        ]
        return [amount // 2 if mode == b"SAME_UPPER" else amount - amount // 2 for amount in whole]
    pads: list[int] = step.option("pads", [0, 0, 0, 0])
    return pads[:2]


def _window(step: _Step) -> Field | None:
    pairs = _span_pairs(step)
    if pairs is None:
        return None
    height, width = (span.window(k, s, p, d) for span, _, k, s, p, d in pairs)
    return Field((height, width), step.seen.axes)


def _transposed(step: _Step) -> Field | None:
    pairs = _span_pairs(step)
    if pairs is None:
        return None
    height, width = (span.transposed(k, s, p, d) for span, _, k, s, p, d in pairs)
    return Field((height, width), step.seen.axes)


def _global_pool(step: _Step) -> Field | None:
    return step.seen.collapsed(step.shape, keep_axes=True) if step.seen.axes == (2, 3) else None


def _reduce(step: _Step) -> Field | None:
    seen = step.seen
    if seen.axes is None:
        return seen
    axes = step.argument("axes", 1)
    reduced = {axis % len(step.shape) for axis in axes or range(len(step.shape))}
    keeps = bool(step.option("keepdims", 1))
    if reduced >= set(seen.axes):
        return seen.collapsed(step.shape, keep_axes=keeps)
    return seen if keeps and not reduced & set(seen.axes) else None


def _reshape(step: _Step) -> Field | None:
    seen, shape, output = step.seen, step.shape, step.output
    if seen.axes is None:
        return seen
    last_two = (len(shape) - 2, len(shape) - 1)
    if seen.axes == last_two and len(output) >= 2 and shape[-2:] == output[-2:]:
        return Field(seen.spans, (len(output) - 2, len(output) - 1))
    flat = len(output) == 2 and output[0] == shape[0]
    return seen.collapsed(shape) if flat or seen.positions(shape) == (1, 1) else None


def _transpose(step: _Step) -> Field | None:
    order = step.option("perm", list(reversed(range(len(step.shape)))))
    if step.seen.axes is None:
        return step.seen
    return Field(step.seen.spans, (order.index(step.seen.axes[0]), order.index(step.seen.axes[1])))


def _resize(step: _Step) -> Field | None:
    if step.seen.axes != (2, 3):
        return None
    blends = step.option("mode", b"nearest") != b"nearest"
    parts = zip(step.seen.spans, step.shape[2:], step.output[2:], strict=True)
    height, width = (span.resized(given, wanted, blends=blends) for span, given, wanted in parts)
    return Field((height, width), step.seen.axes)


def _pad(step: _Step) -> Field | None:
    amounts = step.argument("pads", 1)
    if step.seen.axes is None:
        return step.seen
    if amounts is None or len(amounts) != 2 * len(step.shape):
        return None
    height, width = (
        span.sliced(-amounts[axis], 1) for span, axis in zip(step.seen.spans, step.seen.axes, strict=True)
    )
    return Field((height, width), step.seen.axes)


def _slice(step: _Step) -> Field | None:
    seen = step.seen
    if seen.axes is None:
        return seen
    starts = step.argument("starts", 1)
    axes = step.argument("axes", 3) or list(range(len(starts or ())))
    steps = step.argument("steps", 4) or [1] * len(axes)
    if starts is None:
        return None
    spans = list(seen.spans)
    for start, axis, stride in zip(starts, (axis % len(step.shape) for axis in axes), steps, strict=True):
        if axis in seen.axes:
            index = seen.axes.index(axis)
            spans[index] = spans[index].sliced(start + step.shape[axis] if start < 0 else start, stride)
    return Field((spans[0], spans[1]), seen.axes)


def _split(step: _Step) -> Field | None:
    axis = step.option("axis", 0) % len(step.shape)
    return step.seen if step.seen.axes is None or axis not in step.seen.axes else None


def _matrix(step: _Step) -> Field | None:
    """A product with a constant matrix: works on the last axis alone."""
    seen = step.seen
    return seen if seen.axes is None or len(step.shape) - 1 not in seen.axes else None


#: Operators whose outputs see, position by position, what their inputs see.
_KEEPS = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Max",
        "Min",
        "Sum",
        "Mean",
        "Where",
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Elu",
        "Selu",
        "Celu",
        "Gelu",
        "Mish",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Tanh",
        "Softplus",
        "Clip",
        "Exp",
        "Log",
        "Sqrt",
        "Neg",
        "Abs",
        "Erf",
        "Reciprocal",
        "Swish",
        "QuickGelu",
        "Identity",
        "Dropout",
        "Cast",
        "CastLike",
        "QuantizeLinear",
        "DequantizeLinear",
        "BatchNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "GroupNormalization",
        "LRN",
        "QLinearAdd",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
    ]
)

_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Conv", "FusedConv", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool"), _window),
    "ConvTranspose": _transposed,
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "QLinearGlobalAveragePool"), _global_pool),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduce),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
    **dict.fromkeys(("Gemm", "MatMul", "FusedGemm", "MatMulInteger", "QLinearMatMul", "QGemm"), _matrix),
}
