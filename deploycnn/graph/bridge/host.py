"""Arithmetic on shapes, in Python numbers.

Sizes stay Python (or, while exporting, symbolic) integers instead of tensors: nothing waits for a GPU, and
``torch.export`` can follow them. A shape is a NumPy array of objects; constants come as nested lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Shape = npt.NDArray[np.object_]


def array(values: Any) -> Shape:
    """An array of Python numbers."""
    return values if isinstance(values, np.ndarray) else np.array(values, dtype=object)


def shape_of(x: Tensor, start: int, end: int | None) -> Shape:
    """Sizes of ``x``."""
    sizes = list(x.shape)[start:end]
    result = np.empty(len(sizes), dtype=object)
    for index, size in enumerate(sizes):
        result[index] = size
    return result


def size_of(x: Tensor) -> Shape:
    """Number of elements of ``x``."""
    return _scalar(math.prod(x.shape))


def _scalar(value: Any) -> Shape:
    result = np.empty((), dtype=object)
    result[()] = value
    return result


def as_tensor(values: Any) -> Tensor:
    """A shape as a tensor on the CPU: int64, float32 or bool."""
    content = array(values)
    flat = content.reshape(-1).tolist()
    kinds = {type(value) for value in flat}
    dtype = torch.bool if kinds == {bool} else torch.float32 if float in kinds else torch.int64
    return torch.tensor(flat, dtype=dtype).reshape(content.shape)


def integers(values: Any) -> list[Any]:
    """A shape, or a list, as a flat list of integers."""
    return array(values).reshape(-1).tolist()


def _map(function: Callable[..., Any], *arguments: Any) -> Shape:
    broadcast = np.broadcast_arrays(*(array(argument) for argument in arguments))
    result = np.empty(broadcast[0].shape, dtype=object)
    for index in np.ndindex(broadcast[0].shape):
        result[index] = function(*(argument[index] for argument in broadcast))
    return result


def elementwise(name: str, *arguments: Any) -> Shape:
    """An element-wise operator of ONNX on numbers."""
    return _map(_ELEMENTWISE[name], *arguments)


def _divide(one: Any, other: Any) -> Any:
    """ONNX divides integers toward zero."""
    if isinstance(one, float) or isinstance(other, float):
        return one / other
    if isinstance(one, int) and isinstance(other, int) and (one < 0) != (other < 0):
        return -(-one // other)
    return one // other


def _whole(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: float(function(value)) if isinstance(value, float) else value


_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "Mod": lambda a, b: a % b,
    "Neg": lambda a: -a,
    "Abs": abs,
    "Floor": _whole(math.floor),
    "Ceil": _whole(math.ceil),
    "Sqrt": math.sqrt,
    "Identity": lambda a: a,
    "Max": lambda *values: _extreme(values, largest=True),
    "Min": lambda *values: _extreme(values, largest=False),
    "Equal": lambda a, b: bool(a == b),
    "Greater": lambda a, b: bool(a > b),
    "Less": lambda a, b: bool(a < b),
    "GreaterOrEqual": lambda a, b: bool(a >= b),
    "LessOrEqual": lambda a, b: bool(a <= b),
    "Not": lambda a: not a,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
    "Where": lambda condition, a, b: a if condition else b,
}

ELEMENTWISE = frozenset(_ELEMENTWISE)


def _extreme(values: Sequence[Any], *, largest: bool) -> Any:
    best = values[0]
    for value in values[1:]:
        best = (torch.sym_max if largest else torch.sym_min)(best, value)
    return best


def clip(values: Any, low: Any, high: Any) -> Shape:
    """Numbers within bounds; ``None`` for a bound that is left out."""
    found = array(values)
    if low is not None:
        found = elementwise("Max", found, low)
    return found if high is None else elementwise("Min", found, high)


def transpose(values: Any, axes: Sequence[int] | None) -> Shape:
    """Axes in another order; reversed where ``axes`` is left out."""
    return np.transpose(array(values), axes)


def cast(values: Any, kind: str) -> Shape:
    """To "int", "float" or "bool"."""
    return _map(_CASTS[kind], values)


_CASTS: dict[str, Callable[[Any], Any]] = {
    # Symbolic sizes stay symbolic.
    "int": lambda value: value if isinstance(value, torch.SymInt) else torch.sym_int(value),
    "float": lambda value: value if isinstance(value, torch.SymFloat) else torch.sym_float(value),
    "bool": bool,
}


def gather(values: Any, indices: Any, axis: int) -> Shape:
    """Elements at ``indices``."""
    chosen = np.asarray(array(indices).astype(np.int64))
    return array(np.take(array(values), chosen, axis=axis)) if chosen.ndim else _pick(values, chosen, axis)


def _pick(values: Any, index: Any, axis: int) -> Shape:
    taken = np.take(array(values), int(index), axis=axis)
    return taken if isinstance(taken, np.ndarray) else _scalar(taken)


def concatenate(axis: int, *parts: Any) -> Shape:
    """Join shapes."""
    return np.concatenate([array(part) for part in parts], axis=axis)


def take_slice(values: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> Shape:
    """Cut a shape as ONNX's Slice does."""
    result = array(values)
    begin = integers(starts)
    for start, end, axis, step in zip(
        begin,
        integers(ends),
        integers(axes) if axes is not None else range(len(begin)),
        integers(steps) if steps is not None else [1] * len(begin),
        strict=True,
    ):
        index: list[Any] = [slice(None)] * result.ndim
        index[axis] = slice(start, None if step < 0 and end < -result.shape[axis] else end, step)
        result = result[tuple(index)]
    return result


def reshape(values: Any, shape: Any) -> Shape:
    """Another arrangement of the same numbers."""
    return array(values).reshape([int(size) for size in integers(shape)])


def unsqueeze(values: Any, axes: Sequence[int]) -> Shape:
    """With new axes of length 1."""
    return np.expand_dims(array(values), tuple(axes))


def squeeze(values: Any, axes: Sequence[int] | None) -> Shape:
    """Without axes of length 1."""
    return np.squeeze(array(values), None if axes is None else tuple(axes))


def product(values: Any, *, keepdims: bool) -> Shape:
    """Product of all numbers."""
    content = array(values)
    result = math.prod(content.reshape(-1).tolist())
    return np.full([1] * content.ndim, result, dtype=object) if keepdims else _scalar(result)


def filled(shape: Any, value: float | bool) -> Shape:
    """An array of one value."""
    return np.full([int(size) for size in integers(shape)], value, dtype=object)


def arange(start: Any, limit: Any, delta: Any) -> Shape:
    """Numbers from ``start`` up to ``limit``."""
    first, last, step = (array(value).reshape(-1)[0] for value in (start, limit, delta))
    return np.arange(int(first), int(last), int(step)).astype(object)
