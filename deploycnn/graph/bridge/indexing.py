"""Operators that choose elements by place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploycnn.graph.bridge import host
from deploycnn.graph.bridge.site import Site, operator
from deploycnn.graph.bridge.values import Constant, Value


def take_slice(x: Tensor, starts: Any, ends: Any, axes: Any, steps: Any) -> Tensor:
    """ONNX's Slice; negative steps go backwards."""
    begin, end = host.integers(starts), host.integers(ends)
    chosen = host.integers(axes) if axes is not None else list(range(len(begin)))
    strides = host.integers(steps) if steps is not None else [1] * len(begin)
    for start, stop, axis, step in zip(begin, end, chosen, strides, strict=True):
        size = x.shape[axis]
        if step > 0:
            index = [slice(None)] * (axis % x.ndim) + [slice(start, stop, step)]
            x = x[tuple(index)]
        else:
            places = range(size)[slice(start, None if stop < -size else stop, step)]
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    return x


@operator("Slice")
def slice_operator(site: Site) -> Value:
    """Slice: all attributes before operator set 10, all inputs since."""
    if site.opset < 10:
        bounds: list[Any] = [site.ints("starts"), site.ints("ends"), site.ints("axes"), None]
    else:
        bounds = [site.numbers(index) for index in range(1, 5)]
    return site.call(take_slice, site.tensor(0), *bounds)


def gather(x: Tensor, indices: Any, axis: int) -> Tensor:
    """Elements along ``axis`` at ``indices`` (a number, or a tensor of any shape)."""
    if isinstance(indices, int):
        return x.select(axis, indices)
    places = indices.to(x.device)
    places = torch.where(places < 0, places + x.shape[axis], places)
    chosen = x.index_select(axis, places.reshape(-1))
    around = axis % x.ndim
    return chosen.reshape((*x.shape[:around], *places.shape, *x.shape[around + 1 :]))


@operator("Gather")
def gather_operator(site: Site) -> Value:
    """Gather; indices that count up evenly are a slice."""
    indices, axis = site.value(1), site.integer("axis", 0)
    if isinstance(indices, Constant):
        array = indices.array
        if array.ndim == 0:
            return site.call(gather, site.tensor(0), int(array), axis)
        step = int(array[1] - array[0]) if array.ndim == 1 and array.size > 1 else 0
        if step > 0 and array[0] >= 0 and bool((np.diff(array) == step).all()):
            bounds = ([int(array[0])], [int(array[-1]) + 1], [axis], [step])
            return site.call(take_slice, site.tensor(0), *bounds)
    return site.call(gather, site.tensor(0), site.tensor(1), axis)


def gather_elements(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """``x`` at one index per element of the result."""
    places = indices.to(x.device)
    return x.gather(axis, torch.where(places < 0, places + x.shape[axis], places))


@operator("GatherElements")
def gather_elements_operator(site: Site) -> Value:
    """GatherElements."""
    return site.call(gather_elements, site.tensor(0), site.tensor(1), site.integer("axis", 0))


def cumulative_sum(x: Tensor, axis: int, exclusive: bool, backwards: bool) -> Tensor:
    """Running sums."""
    source = x.flip(axis) if backwards else x
    sums = source.cumsum(axis)
    sums = sums - source if exclusive else sums
    return sums.flip(axis) if backwards else sums


@operator("CumSum")
def cumsum(site: Site) -> Value:
    """CumSum."""
    axis = site.fixed_numbers(1) or [0]
    flags = bool(site.integer("exclusive", 0)), bool(site.integer("reverse", 0))
    return site.call(cumulative_sum, site.tensor(0), int(axis[0]), *flags)


def triangle(x: Tensor, diagonal: int, upper: bool) -> Tensor:
    """The upper or lower triangle of matrices."""
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@operator("Trilu")
def trilu(site: Site) -> Value:
    """Trilu."""
    diagonal = site.fixed_numbers(1) or [0]
    return site.call(triangle, site.tensor(0), int(diagonal[0]), bool(site.integer("upper", 1)))
