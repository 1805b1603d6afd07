"""Values that do not depend on the input are computed while importing.

Where the computation only rearranges a tensor, it is remembered how to put a trained tensor back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import numpy_helper

from deploycnn.graph.bridge.builder import UnsupportedError
from deploycnn.graph.bridge.site import Site
from deploycnn.graph.bridge.values import Array, Constant, RoundedConstant, Value
from deploycnn.graph.cleanup import evaluate

_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def folded(site: Site) -> Sequence[Value] | None:
    """Outputs of a node whose inputs are all constant; ``None`` where it must be computed at run time."""
    node = site.node
    if node.op_type in {"QuantizeLinear", "DequantizeLinear"} or node.op_type in _RANDOM:
        return None
    given = [value for value in site.inputs if value is not None]
    first = given[0] if given else None
    if isinstance(first, RoundedConstant):
        return _rearranged_rounded(site, first)
    if not given or not all(isinstance(value, Constant) for value in given):
        return None
    assert isinstance(first, Constant)  # noqa: S101 - for the type checker
    rearranged = _rearranged(site, first)
    if rearranged is not None:
        return [rearranged]
    tensors = {
        name: numpy_helper.from_array(value.array, name)
        for name, value in zip(node.input, site.inputs, strict=True)
        if isinstance(value, Constant)
    }
    try:
        arrays = evaluate(node, tensors, site.opset)
    except Exception as error:  # whatever a third-party evaluator raises for a node that it lacks
        raise UnsupportedError(f"its constant inputs cannot be evaluated ({error})") from error
    site.builder.evaluated |= {value.origin for value in given if isinstance(value, Constant)}
    # The node itself is the origin: a trained tensor would replace it.
    return [Constant(array=array, origin=name) for name, array in zip(node.output, arrays, strict=True)]


def _new_shape(site: Site, array: Array) -> tuple[int, ...] | None:
    """Shape after an operator that only reshapes ``array``; ``None`` for another operator."""
    kind = site.node.op_type
    if kind == "Identity":
        return array.shape
    if kind == "Flatten":
        axis = site.integer("axis", 1)
        axis = axis + array.ndim if axis < 0 else axis
        return (int(np.prod(array.shape[:axis])), int(np.prod(array.shape[axis:])))
    if kind == "Reshape":
        wanted = site.fixed_numbers(1) or []
        keep_zero = site.integer("allowzero", 0)
        sizes = [
            array.shape[index] if size == 0 and not keep_zero else int(size)
            for index, size in enumerate(wanted)
        ]
        return array.reshape(sizes).shape
    if kind == "Squeeze":
        axes = site.axes("axes", 1)
        return np.squeeze(array, None if axes is None else tuple(axes)).shape
    if kind == "Unsqueeze":
        return np.expand_dims(array, tuple(site.axes("axes", 1) or ())).shape
    return None


def _permutation(site: Site, array: Array) -> list[int] | None:
    if site.node.op_type != "Transpose":
        return None
    return site.ints("perm") or list(range(array.ndim))[::-1]


def _rearranged(site: Site, value: Constant) -> Constant | None:
    before = value.array.shape
    permutation = _permutation(site, value.array)
    if permutation is not None:
        back = [int(index) for index in np.argsort(permutation)]
        return value.changed(
            f"transpose {permutation}",
            lambda array: np.ascontiguousarray(array.transpose(permutation)),
            lambda array: np.ascontiguousarray(array.transpose(back)),
        )
    shape = _new_shape(site, value.array)
    if shape is None:
        return None
    return value.changed(
        f"reshape {shape}", lambda array: array.reshape(shape), lambda array: array.reshape(before)
    )


def _rearranged_rounded(site: Site, value: RoundedConstant) -> Sequence[Value] | None:
    """A rounded constant that is transposed stays one."""
    permutation = _permutation(site, value.master)
    if site.node.op_type == "Identity":
        return [value]
    if permutation is None or value.rounding.block_size:
        return None
    back = [int(index) for index in np.argsort(permutation)]
    axis = value.rounding.axis
    moved = None if axis is None else permutation.index(axis % value.master.ndim)
    return [
        value.changed(
            f"transpose {permutation}",
            lambda array: np.ascontiguousarray(array.transpose(permutation)),
            lambda array: np.ascontiguousarray(array.transpose(back)),
            moved,
        )
    ]
