"""Pools and reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from deploycnn.graph.bridge.builder import UnsupportedError
from deploycnn.graph.bridge.padding import Window, pad_spatial, same_pads
from deploycnn.graph.bridge.site import Site, operator
from deploycnn.graph.bridge.values import Value

_MAX_POOLS: dict[int, Callable[..., Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVG_POOLS: dict[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}
_CONVS: dict[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}


def _amounts(
    x: Tensor,
    pads: Sequence[tuple[int, int]] | None,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    ceil: bool,
    upper: bool,
) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
    """Paddings of each axis; then those with what the last windows need beyond them (``ceil_mode``)."""
    plain = list(pads) if pads is not None else same_pads(x.shape[2:], kernel, strides, dilations, upper)
    if not ceil or pads is None:
        return plain, plain
    full = []
    for size, (before, after), extent, stride, dilation in zip(
        x.shape[2:], plain, kernel, strides, dilations, strict=True
    ):
        reach = (extent - 1) * dilation + 1
        outputs = -(-(size + before + after - reach) // stride) + 1
        # A window that starts beyond the image and the padding before it is left out.
        outputs = outputs - 1 if (outputs - 1) * stride >= size + before else outputs
        needed = (outputs - 1) * stride + reach - size - before
        full.append((before, torch.sym_max(needed, after)))
    return plain, full


def max_pool(
    x: Tensor,
    pads: Sequence[tuple[int, int]] | None,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    ceil: bool,
    upper: bool,
) -> Tensor:
    """MaxPool with any paddings (``None``: so that the size is divided by the stride)."""
    _, full = _amounts(x, pads, kernel, strides, dilations, ceil, upper)
    padded = pad_spatial(x, full, -torch.inf) if any(map(any, full)) else x
    return _MAX_POOLS[x.ndim - 2](padded, kernel, strides, 0, dilations)


def average_pool(
    x: Tensor,
    pads: Sequence[tuple[int, int]] | None,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    ceil: bool,
    upper: bool,
    count_pads: bool,
) -> Tensor:
    """AveragePool with any paddings; ``count_pads``: whether these count as zeros."""
    plain, full = _amounts(x, pads, kernel, strides, dilations, ceil, upper)
    sums = _window_sums(pad_spatial(x, full), kernel, strides, dilations)
    ones = x.new_ones((1, 1, *x.shape[2:]))
    counted = pad_spatial(ones, plain, 1.0) if count_pads else pad_spatial(ones, plain)
    beyond = [(0, right - after) for (_, after), (_, right) in zip(plain, full, strict=True)]
    return sums / _window_sums(pad_spatial(counted, beyond), kernel, strides, dilations)


def _window_sums(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Tensor:
    channels = x.shape[1]
    weight = x.new_ones((1, 1, *kernel)).expand(channels, 1, *kernel)
    return _CONVS[x.ndim - 2](x, weight, None, strides, 0, dilations, channels)


def _kernel(site: Site) -> list[int]:
    kernel = site.ints("kernel_shape")
    if not kernel or len(kernel) > 3:
        raise UnsupportedError(f"its kernel has {len(kernel or [])} axes; 1 to 3 are supported")
    return kernel


def _common(site: Site, window: Window) -> tuple[Any, ...]:
    pads = None
    if window.begin is not None and window.end is not None:
        pads = list(zip(window.begin, window.end, strict=True))
    ceil = bool(site.integer("ceil_mode", 0))
    return pads, list(window.kernel), list(window.strides), list(window.dilations), ceil, window.same_upper


@operator("MaxPool")
def max_pool_operator(site: Site) -> Value:
    """MaxPool."""
    site.only_output(1, "indices")
    window = Window(site, _kernel(site))
    source, begin = site.tensor(0), window.begin
    if (
        begin is not None
        and window.symmetric
        and all(2 * pad <= size for pad, size in zip(begin, window.kernel, strict=True))
    ):
        return site.call(
            _MAX_POOLS[len(begin)],
            source,
            list(window.kernel),
            list(window.strides),
            list(begin),
            list(window.dilations),
            bool(site.integer("ceil_mode", 0)),
        )
    return site.call(max_pool, source, *_common(site, window))


@operator("AveragePool")
def average_pool_operator(site: Site) -> Value:
    """AveragePool."""
    window = Window(site, _kernel(site))
    count = bool(site.integer("count_include_pad", 0))
    source, begin = site.tensor(0), window.begin
    if (
        begin is not None
        and window.symmetric
        and not site.integer("ceil_mode", 0)
        and set(window.dilations) == {1}
        and all(2 * pad <= size for pad, size in zip(begin, window.kernel, strict=True))
    ):
        return site.call(
            _AVG_POOLS[len(begin)],
            source,
            list(window.kernel),
            list(window.strides),
            list(begin),
            False,
            count,
        )
    return site.call(average_pool, source, *_common(site, window), count)


def lp_pool(
    x: Tensor,
    pads: Sequence[tuple[int, int]] | None,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    ceil: bool,
    upper: bool,
    p: int,
) -> Tensor:
    """The p-norm of each window."""
    _, full = _amounts(x, pads, kernel, strides, dilations, ceil, upper)
    return _window_sums(pad_spatial(x.abs() ** p, full), kernel, strides, dilations) ** (1.0 / p)


@operator("LpPool")
def lp_pool_operator(site: Site) -> Value:
    """LpPool."""
    window = Window(site, _kernel(site))
    return site.call(lp_pool, site.tensor(0), *_common(site, window), site.integer("p", 2))


def global_average(x: Tensor) -> Tensor:
    """Mean over the spatial axes, which stay with length 1."""
    return functional.adaptive_avg_pool2d(x, 1) if x.ndim == 4 else x.mean(_spatial(x), keepdim=True)


def global_max(x: Tensor) -> Tensor:
    """Maximum over the spatial axes."""
    return x.amax(_spatial(x), keepdim=True)


def global_lp(x: Tensor, p: int) -> Tensor:
    """The p-norm over the spatial axes."""
    return (x.abs() ** p).sum(_spatial(x), keepdim=True) ** (1.0 / p)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


@operator("GlobalAveragePool")
def global_average_pool(site: Site) -> Value:
    """GlobalAveragePool."""
    return site.call(global_average, site.tensor(0))


@operator("GlobalMaxPool")
def global_max_pool(site: Site) -> Value:
    """GlobalMaxPool."""
    return site.call(global_max, site.tensor(0))


@operator("GlobalLpPool")
def global_lp_pool(site: Site) -> Value:
    """GlobalLpPool."""
    return site.call(global_lp, site.tensor(0), site.integer("p", 2))


def _product(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}


def reduce(x: Tensor, name: str, axes: Sequence[int] | None, keepdims: bool) -> Tensor:
    """A reduction over ``axes``; over all where they are not given."""
    chosen = [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    return _REDUCTIONS[name](x, chosen, keepdims) if chosen else x


@operator(*_REDUCTIONS)
def reduction(site: Site) -> Value:
    """Reductions: axes are an attribute, or an input since operator set 18 (13 for ReduceSum)."""
    axes: list[Any] | fx.Node | None = site.axes("axes", 1)
    if not axes:
        if site.integer("noop_with_empty_axes", 0) and len(site.node.input) < 2 + (axes == []):
            return _without_axes(site)
        axes = None
    return site.call(reduce, site.tensor(0), site.node.op_type, axes, bool(site.integer("keepdims", 1)))


def _without_axes(site: Site) -> fx.Node:
    """A reduction over no axis still takes its function of each element."""
    functions = {
        "ReduceL1": torch.abs,
        "ReduceL2": torch.abs,
        "ReduceLogSum": torch.log,
        "ReduceSumSquare": torch.square,
    }
    function = functions.get(site.node.op_type)
    return site.tensor(0) if function is None else site.call(function, site.tensor(0))


def extreme_index(x: Tensor, axis: int, keepdims: bool, last: bool, largest: bool) -> Tensor:
    """Index of the first or last extreme along an axis."""
    source = x.flip(axis) if last else x
    found = (source.argmax if largest else source.argmin)(axis, keepdim=keepdims)
    return x.shape[axis] - 1 - found if last else found


@operator("ArgMax", "ArgMin")
def arg_extreme(site: Site) -> Value:
    """ArgMax and ArgMin."""
    return site.call(
        extreme_index,
        site.tensor(0),
        site.integer("axis", 0),
        bool(site.integer("keepdims", 1)),
        bool(site.integer("select_last_index", 0)),
        site.node.op_type == "ArgMax",
    )
