"""Operators that rearrange, split, join and repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from deploycnn.graph.bridge import host
from deploycnn.graph.bridge.builder import UnsupportedError
from deploycnn.graph.bridge.padding import pad_tensor
from deploycnn.graph.bridge.site import Site, operator
from deploycnn.graph.bridge.values import Array, Rounding, Value
from deploycnn.graph.model import attribute


def reshape(x: Tensor, shape: Any, keep_zero: bool) -> Tensor:
    """ONNX's Reshape: a 0 is the input's size there, unless ``keep_zero``."""
    sizes = host.integers(shape)
    if not keep_zero:
        sizes = [x.shape[index] if _is_zero(size) else size for index, size in enumerate(sizes)]
    return x.reshape(sizes)


def _is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0


def reshape_batch(x: Tensor, shape: Sequence[int], keep_zero: bool) -> Tensor:
    """A reshape whose first axis is the batch, whatever the file says of its size."""
    return reshape(x, [x.shape[0], *shape[1:]], keep_zero)


@operator("Reshape")
def reshape_operator(site: Site) -> Value:
    """Reshape; those that only flatten are written so, which lets widths change."""
    keep_zero = bool(site.integer("allowzero", 0))
    wanted = site.numbers(1)
    shape = site.shape(0)
    source = site.tensor(0)
    if isinstance(wanted, fx.Node) or wanted is None or not shape or not wanted:
        return site.call(reshape, source, wanted, keep_zero)
    if _flattens(shape, wanted):
        return site.call(torch.flatten, source, 1)
    if wanted[0] > 0 and wanted[0] == shape[0]:
        return site.call(reshape_batch, source, wanted, keep_zero)
    return site.call(reshape, source, wanted, keep_zero)


def _flattens(shape: Sequence[int | None], wanted: Sequence[int]) -> bool:
    """Whether (N, ...) becomes (N, the product of the rest)."""
    if len(wanted) != 2 or len(shape) < 2:
        return False
    rest = None if None in shape[1:] else int(np.prod([int(size or 0) for size in shape[1:]]))
    keeps_batch = wanted[0] == 0 or (wanted[0] > 0 and wanted[0] == shape[0])
    if keeps_batch:
        return wanted[1] == -1 or (rest is not None and wanted[1] == rest)
    return wanted[0] == -1 and rest is not None and wanted[1] == rest


def flatten_to_matrix(x: Tensor, axis: int) -> Tensor:
    """(product of the axes before, product of the rest)."""
    split = axis % x.ndim if axis < 0 else axis
    if split == 0:
        return x.reshape(1, -1)
    if split == x.ndim:
        return x.reshape(-1, 1)
    return x.flatten(split).flatten(0, split - 1)


@operator("Flatten")
def flatten(site: Site) -> Value:
    """Flatten."""
    axis = site.integer("axis", 1)
    if axis == 1 and (site.shape(0) is None or site.rank(0) > 1):
        return site.call(torch.flatten, site.tensor(0), 1)
    return site.call(flatten_to_matrix, site.tensor(0), axis)


def transpose_all(x: Tensor) -> Tensor:
    """Axes in reverse order."""
    return x.permute(*reversed(range(x.ndim)))


@operator("Transpose")
def transpose(site: Site) -> Value:
    """Transpose."""
    order = site.ints("perm")
    return (
        site.call(transpose_all, site.tensor(0))
        if order is None
        else site.call(torch.permute, site.tensor(0), order)
    )


def squeeze_axes(x: Tensor, axes: Sequence[int] | None) -> Tensor:
    """Without axes of length 1."""
    return x.squeeze() if axes is None else x.squeeze([axis % x.ndim for axis in axes])


@operator("Squeeze")
def squeeze(site: Site) -> Value:
    """Squeeze: axes are an attribute, since operator set 13 an input."""
    axes = site.axes("axes", 1)
    if axes is None and site.shape(0) is not None:
        # The batch axis stays, whatever size the file gives it.
        axes = [i for i, size in enumerate(site.shape(0) or ()) if size == 1 and i > 0] or None
    return site.call(squeeze_axes, site.tensor(0), axes)


def unsqueeze_axes(x: Tensor, axes: Sequence[int]) -> Tensor:
    """With new axes of length 1, counted in the result."""
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Unsqueeze")
def unsqueeze(site: Site) -> Value:
    """Unsqueeze: axes are an attribute, since operator set 13 an input."""
    axes = site.axes("axes", 1)
    if axes is None:
        raise UnsupportedError("it has no axes")
    return site.call(unsqueeze_axes, site.tensor(0), axes)


def concatenate(axis: int, *tensors: Tensor) -> Tensor:
    """Join along an axis."""
    return torch.cat(tensors, axis)


@operator("Concat")
def concat(site: Site) -> Value:
    """Concat."""
    return site.call(concatenate, site.integer("axis", 0), *(site.tensor(i) for i in range(len(site.inputs))))


def split_sizes(x: Tensor, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
    """Parts of the given sizes."""
    return torch.split(x, list(sizes), axis)


def split_evenly(x: Tensor, count: int, axis: int) -> tuple[Tensor, ...]:
    """So many parts of one size, the last of which may be smaller."""
    size = -(-x.shape[axis] // count)
    return torch.split(x, [size] * (count - 1) + [x.shape[axis] - size * (count - 1)], axis)


@operator("Split")
def split(site: Site) -> Value | Sequence[Value]:
    """Split; even parts are counted, not sized, which lets widths change."""
    axis, count = site.integer("axis", 0), len(site.node.output)
    sizes = site.ints("split") or site.fixed_numbers(1)
    source = site.tensor(0)
    if sizes is None or len(set(sizes)) == 1:
        parts = site.call(split_evenly, source, count, axis)
    else:
        parts = site.call(split_sizes, source, sizes, axis)
    return [site.call(part, parts, index) for index in range(count)]


def part(parts: Sequence[Tensor], index: int) -> Tensor:
    """One of several outputs."""
    return parts[index]


def expand(x: Tensor, shape: Any) -> Tensor:
    """Broadcast to ``shape``, in which a 1 leaves an axis as it is."""
    sizes = host.integers(shape)
    # Comparing would ask a symbolic size for its value; a stated 1 is enough.
    padded = [1] * (x.ndim - len(sizes)) + sizes
    source = [1] * (len(padded) - x.ndim) + list(x.shape)
    wanted = [
        have if isinstance(want, int) and want == 1 else want
        for want, have in zip(padded, source, strict=True)
    ]
    return x.expand(wanted)


@operator("Expand")
def expand_operator(site: Site) -> Value:
    """Expand."""
    return site.call(expand, site.tensor(0), site.numbers(1))


def tile(x: Tensor, repeats: Any) -> Tensor:
    """Repeat along every axis."""
    return x.repeat(host.integers(repeats))


@operator("Tile")
def tile_operator(site: Site) -> Value:
    """Tile."""
    return site.call(tile, site.tensor(0), site.numbers(1))


@operator("Pad")
def pad(site: Site) -> Value:
    """Pad: amounts and value are attributes before operator set 11, inputs since."""
    mode = site.text("mode", "constant")
    if site.opset < 11:
        return site.call(
            pad_tensor, site.tensor(0), site.ints("pads") or [], None, mode, site.number("value", 0.0)
        )
    value = site.constant(2)
    source = site.value(0)
    if isinstance(source, fx.Node) and source in site.builder.integers and mode == "constant":
        _check_zero(site.builder.integers[source][0], value)
        value = None
    filling = 0.0 if value is None else cast("float", value.reshape(-1)[0].item())
    return site.call(pad_tensor, site.tensor(0), site.numbers(1), site.fixed_numbers(3), mode, filling)


def _check_zero(rounding: Rounding, value: Array | None) -> None:
    """Refuse padding of integers with one that does not stand for the real number 0."""
    filling = 0 if value is None else int(value.reshape(-1)[0].item())
    if rounding.zero_point.size != 1 or filling != int(rounding.zero_point.item()):
        raise UnsupportedError(f"it pads integers with {filling}, which is not their zero point")


def depth_to_space(x: Tensor, block: int, mode: str) -> Tensor:
    """(N, C, H, W) -> (N, C / block^2, H * block, W * block)."""
    n, c, h, w = x.shape
    if mode == "CRD":
        return (
            x.reshape(n, c // block**2, block, block, h, w)
            .permute(0, 1, 4, 2, 5, 3)
            .reshape(n, c // block**2, h * block, w * block)
        )
    return (
        x.reshape(n, block, block, c // block**2, h, w)
        .permute(0, 3, 4, 1, 5, 2)
        .reshape(n, c // block**2, h * block, w * block)
    )


def space_to_depth(x: Tensor, block: int) -> Tensor:
    """(N, C, H, W) -> (N, C * block^2, H / block, W / block)."""
    n, c, h, w = x.shape
    pieces = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return pieces.reshape(n, c * block**2, h // block, w // block)


@operator("DepthToSpace")
def depth_to_space_operator(site: Site) -> Value:
    """DepthToSpace."""
    return site.call(depth_to_space, site.tensor(0), site.integer("blocksize", 1), site.text("mode", "DCR"))


@operator("SpaceToDepth")
def space_to_depth_operator(site: Site) -> Value:
    """SpaceToDepth."""
    return site.call(space_to_depth, site.tensor(0), site.integer("blocksize", 1))


@operator("Shape")
def shape_operator(site: Site) -> Value:
    """Shape: numbers, not a tensor."""
    end = attribute(site.node, "end")
    return site.host(host.shape_of, site.tensor(0), site.integer("start", 0), end)


@operator("Size")
def size_operator(site: Site) -> Value:
    """Size."""
    return site.host(host.size_of, site.tensor(0))


@operator("ConstantOfShape", "Range")
def filled(_site: Site) -> Value:
    """ConstantOfShape and Range of what is computed from data, not from sizes."""
    raise UnsupportedError("its size depends on data")
