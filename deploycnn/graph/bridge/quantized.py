"""QuantizeLinear and DequantizeLinear.

The integers between the two are never made: a value keeps the real numbers that its integers stand for, and
is marked. Reordering operators and pools work on those as they do on integers, because a scale is positive.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx

from deploycnn.graph.bridge.builder import UnsupportedError, to_torch_tensor
from deploycnn.graph.bridge.site import Site, operator
from deploycnn.graph.bridge.values import (
    INTEGER_RANGES,
    Array,
    Broken,
    Constant,
    RoundedConstant,
    Rounding,
    Value,
)

#: Operators that move or choose elements, and so may stand between a Q and its DQ.
KEEP_INTEGERS = frozenset(
    {
        "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Slice",
        "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip


def rounding_of(site: Site, dtype: str | None = None) -> Rounding:
    """Scale, zero point and type of a Q or DQ node.

    Args:
        site: The node.
        dtype: Of the integers, where the node does not say.
    """
    scale, zero = site.value(1), site.value(2)
    if not isinstance(scale, Constant) or not (zero is None or isinstance(zero, Constant)):
        raise UnsupportedError("its scale or zero point is computed")
    if zero is not None:
        dtype = zero.array.dtype.name
    named = {2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 21: "uint4", 22: "int4"}
    dtype = dtype or named.get(site.integer("output_dtype", 0), "uint8")
    if dtype not in INTEGER_RANGES:
        raise UnsupportedError(f"it rounds to {dtype}, which is no integer type")
    values = scale.array.astype(np.float32)
    block = site.integer("block_size", 0)
    single = values.size == 1
    return Rounding(
        scale=values.reshape(()) if single else values,
        zero_point=_zero_points(zero, values.shape if not single else ()),
        scale_origin=scale.origin,
        zero_origin=zero.origin if zero is not None else "",
        dtype=dtype,
        axis=None if single else site.integer("axis", 1),
        block_size=0 if single else block,
    )


def _zero_points(zero: Constant | None, shape: tuple[int, ...]) -> Array:
    if zero is None:
        return np.zeros(shape, np.int32)
    return np.broadcast_to(zero.array.astype(np.int32).reshape(shape or ()), shape)


@operator("QuantizeLinear")
def quantize(site: Site) -> Value:
    """Q: of a constant, the start of a rounded constant; else a quantizer."""
    source = site.value(0)
    rounding = rounding_of(site)
    if isinstance(source, Constant):
        return RoundedConstant(
            master=source.array.astype(np.float32),
            origin=source.origin,
            stored_as_integers=False,
            rounding=rounding,
            undo=source.undo,
        )
    path = site.builder.root_quantizer(rounding, site.node.name, weight=False)
    site.builder.module_of[site.node.name] = path
    called = site.builder.call_module(path, site.tensor(0))
    site.builder.integers[called] = (rounding, path)
    return called


@operator("DequantizeLinear")
def dequantize(site: Site) -> Value:
    """DQ: of stored integers, a rounded constant; of a quantizer's output, that output."""
    source = site.value(0)
    if isinstance(source, RoundedConstant):
        if not rounding_of(site, source.rounding.dtype).equals(source.rounding):
            raise UnsupportedError(
                "it does not undo the QuantizeLinear before it: scale or zero point differ"
            )
        return source
    if isinstance(source, Constant):
        return _stored(site, source)
    assert source is not None  # noqa: S101 - for the type checker; the operator has this input
    assert not isinstance(source, Broken)  # noqa: S101 - the importer leaves such nodes out
    if source not in site.builder.integers:
        return _from_integers(site, source)
    made, path = site.builder.integers[source]
    rounding = rounding_of(site, made.dtype)
    if not rounding.equals(made):
        return _reread(site, source, path, rounding)
    if rounding.key != made.key:
        site.builder.note_rounding(rounding, path)
    # A node of its own, because the integers may have other readers.
    called = site.call(real, source)
    site.builder.on_grid[called] = path
    return called


def real(x: Tensor) -> Tensor:
    """The values of a quantizer as real numbers, which they are already."""
    return x


def _stored(site: Site, source: Constant) -> RoundedConstant:
    """Integers of the file; their master is given by the caller, or else what they stand for."""
    rounding = rounding_of(site, source.array.dtype.name)
    scale, zero = to_torch_tensor(rounding.scale), to_torch_tensor(rounding.zero_point)
    integers = source.array.astype(np.int64)
    shape = [1] * integers.ndim
    if rounding.axis is not None and rounding.block_size:
        axis, length = rounding.axis % integers.ndim, integers.shape[rounding.axis % integers.ndim]
        scale = scale.repeat_interleave(rounding.block_size, axis).narrow(axis, 0, length)
        zero = zero.repeat_interleave(rounding.block_size, axis).narrow(axis, 0, length)
    elif rounding.axis is not None:
        shape[rounding.axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    master = ((integers - zero.numpy()).astype(np.float32) * scale.numpy()).astype(np.float32)
    given = site.builder.given_master(source.origin, site.node.output[0], master.shape)
    return RoundedConstant(
        master=master if given is None else given,
        origin=source.origin,
        stored_as_integers=True,
        rounding=rounding,
        undo=source.undo,
        given=given is not None,
    )


def _from_integers(site: Site, source: fx.Node) -> fx.Node:
    """DQ of integers that no quantizer made: integer graph inputs."""
    rounding = rounding_of(site)
    if rounding.axis is not None:
        raise UnsupportedError("it dequantizes computed integers per channel")
    return site.call(from_integers, source, float(rounding.scale), int(rounding.zero_point))


def from_integers(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """``(x - zero_point) * scale`` in float32."""
    return (x.to(torch.float32) - zero_point) * scale


def _reread(site: Site, source: fx.Node, path: str, rounding: Rounding) -> fx.Node:
    """DQ with another scale than its Q: read the integers anew."""
    if rounding.axis is not None or rounding.block_size:
        raise UnsupportedError("it reads integers with another scale than they were made with, per channel")
    quantizer = site.builder.root.get_submodule(path)
    if getattr(quantizer, "axis", None) is not None:
        raise UnsupportedError("it reads per-channel integers with another scale than they were made with")
    scale, zero = (
        site.builder.graph.get_attr(f"{path}.scale"),
        site.builder.graph.get_attr(f"{path}.zero_point"),
    )
    return site.call(reread, source, scale, zero, float(rounding.scale), int(rounding.zero_point))


def reread(x: Tensor, scale: Tensor, zero_point: Tensor, new_scale: float, new_zero_point: int) -> Tensor:
    """The integers behind ``x`` under another scale and zero point."""
    return (x / scale + zero_point - new_zero_point) * new_scale


def to_integers(x: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """The integers behind ``x``, for a graph that returns them."""
    return ((x / scale).round() + zero_point).to(dtype)
