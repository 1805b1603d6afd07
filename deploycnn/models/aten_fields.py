"""How PyTorch's basic operators change receptive fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from deploycnn.models.receptive_field import Field, Span, union


class _Unknown:
    """What a tensor sees where no rule tells."""


UNKNOWN: Final = _Unknown()

FieldOrUnknown = Field | _Unknown
Shape = tuple[int, ...]
Given = Sequence[tuple[Field, Shape]]
Rule = Callable[[Mapping[str, Any], Field, Shape, Shape], Field | None]


def field_after(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    given: Given,
    output_shape: Shape,
) -> FieldOrUnknown:
    """Field of an operator's output.

    Args:
        func: The ``OpOverload`` that ran.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        given: Field and shape of every input that depends on the image.
        output_shape: Shape of the output.
    """
    op = func._overloadpacket.__name__.rstrip("_")  # noqa: SLF001 - no public name
    schema = func._schema.arguments  # noqa: SLF001
    bound = {item.name: item.default_value for item in schema}
    bound.update({item.name: value for item, value in zip(schema, args, strict=False)})
    bound.update(kwargs)
    seen, shape = given[0]
    if op == "cat":
        return _cat(bound["dim"], given, output_shape)
    if op in _RULES and len(given) == 1:
        return _RULES[op](bound, seen, shape, output_shape) or UNKNOWN
    if op in _KEEPS or torch.Tag.pointwise in func.tags:
        return union(given, output_shape) or UNKNOWN
    return UNKNOWN


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


def _windows(
    seen: Field,
    kernel: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> Field:
    parts = zip(seen.spans, _pair(kernel), _pair(stride), _pair(padding), _pair(dilation), strict=True)
    height, width = (span.window(k, s, p, d) for span, k, s, p, d in parts)
    return Field((height, width), seen.axes)


def _convolution(bound: Mapping[str, Any], seen: Field, shape: Shape, _: Shape) -> Field | None:
    if len(shape) != 4 or seen.axes != (2, 3):
        return None
    kernel = tuple(bound["weight"].shape[2:])
    stride, padding, dilation = bound["stride"], bound["padding"], bound["dilation"]
    if not bound["transposed"]:
        return _windows(seen, kernel, stride, padding, dilation)
    parts = zip(seen.spans, kernel, _pair(stride), _pair(padding), _pair(dilation), strict=True)
    height, width = (span.transposed(k, s, p, d) for span, k, s, p, d in parts)
    return Field((height, width), seen.axes)


def _pool(bound: Mapping[str, Any], seen: Field, shape: Shape, _: Shape) -> Field | None:
    if len(shape) != 4 or seen.axes != (2, 3):
        return None
    kernel = bound["kernel_size"]
    return _windows(seen, kernel, bound["stride"] or kernel, bound["padding"], bound.get("dilation", 1))


def _adaptive_pool(_: Mapping[str, Any], seen: Field, shape: Shape, output: Shape) -> Field | None:
    if seen.axes != (2, 3):
        return None
    height, width = (
        span.adaptive(given, wanted)
        for span, given, wanted in zip(seen.spans, shape[2:], output[2:], strict=True)
    )
    return Field((height, width), seen.axes)


def _resize(*, blends: bool) -> Rule:
    def rule(_: Mapping[str, Any], seen: Field, shape: Shape, output: Shape) -> Field | None:
        if seen.axes != (2, 3):
            return None
        parts = zip(seen.spans, shape[2:], output[2:], strict=True)
        height, width = (span.resized(given, wanted, blends=blends) for span, given, wanted in parts)
        return Field((height, width), seen.axes)

    return rule


def _reduce(bound: Mapping[str, Any], seen: Field, shape: Shape, _: Shape) -> Field | None:
    dims = bound.get("dim")
    reduced = {axis % len(shape) for axis in ([dims] if isinstance(dims, int) else dims or range(len(shape)))}
    keeps = bool(bound.get("keepdim"))
    if seen.axes is None:
        return seen
    if reduced >= set(seen.axes):
        return seen.collapsed(shape, keep_axes=keeps)
    return seen if keeps and not reduced & set(seen.axes) else None


def _slice(bound: Mapping[str, Any], seen: Field, shape: Shape, _: Shape) -> Field | None:
    axis = bound["dim"] % len(shape)
    if seen.axes is None or axis not in seen.axes:
        return seen
    start = bound.get("start") or 0
    start = start + shape[axis] if start < 0 else start
    return _replace(seen, axis, seen.spans[seen.axes.index(axis)].sliced(start, bound.get("step") or 1))


def _replace(seen: Field, axis: int, span: Span) -> Field:
    height, width = seen.spans
    return Field((span, width) if seen.axes and axis == seen.axes[0] else (height, span), seen.axes)


def _pad(bound: Mapping[str, Any], seen: Field, shape: Shape, _: Shape) -> Field | None:
    amounts = bound.get("pad", bound.get("padding"))
    if seen.axes is None or amounts is None:
        return seen
    for index, axis in enumerate(reversed(range(len(shape)))):
        if axis in seen.axes and 2 * index < len(amounts):
            span = seen.spans[seen.axes.index(axis)].sliced(-amounts[2 * index], 1)
            seen = _replace(seen, axis, span)
    return seen


def _permute(bound: Mapping[str, Any], seen: Field, shape: Shape, _: Shape) -> Field | None:
    order = list(range(len(shape)))
    if "dims" in bound:
        order = [axis % len(shape) for axis in bound["dims"]]
    else:
        one, two = bound.get("dim0", 0) % len(shape), bound.get("dim1", 1) % len(shape)
        order[one], order[two] = order[two], order[one]
    if seen.axes is None:
        return seen
    return Field(seen.spans, (order.index(seen.axes[0]), order.index(seen.axes[1])))


def _view(_: Mapping[str, Any], seen: Field, shape: Shape, output: Shape) -> Field | None:
    if seen.axes is None:
        return seen
    last_two = (len(shape) - 2, len(shape) - 1)
    if seen.axes == last_two and len(output) >= 2 and shape[-2:] == output[-2:]:
        return Field(seen.spans, (len(output) - 2, len(output) - 1))
    if (len(output) == 2 and output[0] == shape[0]) or seen.positions(shape) == (1, 1):
        return seen.collapsed(shape)
    return None


def _as_strided(_: Mapping[str, Any], seen: Field, shape: Shape, output: Shape) -> Field | None:
    # Global pooling fixes its output's memory layout by it.
    return seen if shape == output else None


def _split(bound: Mapping[str, Any], seen: Field, shape: Shape, _: Shape) -> Field | None:
    axis = bound.get("dim", 0) % len(shape)
    return seen if seen.axes is None or axis not in seen.axes else None


def _matrix(_: Mapping[str, Any], seen: Field, __: Shape, ___: Shape) -> Field | None:
    return seen if seen.axes is None else None


def _cat(dim: int, given: Given, output: Shape) -> FieldOrUnknown:
    axis = dim % len(output)
    if any(seen.axes is not None and axis in seen.axes for seen, _ in given):
        return UNKNOWN
    return union(given, output) or UNKNOWN


#: Operators besides PyTorch's pointwise ones whose outputs see, position by position, what their inputs see.
#: Normalization belongs here: its statistics are constants at inference (batch norm) or, by convention, do
#: not count (layer and group norm).
_KEEPS = frozenset(
    [
        "clone",
        "detach",
        "alias",
        "_to_copy",
        "contiguous",
        "native_dropout",
        "copy",
        "lift_fresh",
        "native_batch_norm",
        "_native_batch_norm_legit_no_training",
        "cudnn_batch_norm",
        "native_layer_norm",
        "native_group_norm",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "silu",
        "gelu",
        "mish",
        "elu",
        "celu",
        "selu",
        "leaky_relu",
        "_prelu_kernel",
        "threshold",
        "softplus",
    ]
)

_RULES: Mapping[str, Rule] = {
    "convolution": _convolution,
    "_convolution": _convolution,
    "max_pool2d_with_indices": _pool,
    "avg_pool2d": _pool,
    "_adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool,
    "upsample_nearest2d": _resize(blends=False),
    "_upsample_nearest_exact2d": _resize(blends=False),
    "upsample_bilinear2d": _resize(blends=True),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var"), _reduce),
    "slice": _slice,
    **dict.fromkeys(("constant_pad_nd", "reflection_pad2d", "replication_pad2d"), _pad),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze"), _view),
    "as_strided": _as_strided,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("addmm", "mm"), _matrix),
}

#: Operators that need not be taken apart into simpler ones.
KNOWN = _KEEPS | _RULES.keys()
