"""Paddings of convolutions and pools, and of Pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deploycnn.graph.bridge import host
from deploycnn.graph.bridge.site import Site


class Window:
    """Geometry of a convolution or pool: kernel, strides, dilations, paddings.

    Attributes:
        begin: Padding before each spatial axis; ``None`` where ``auto_pad`` leaves it to the input's size.
        end: Padding after each spatial axis.
        same_upper: For ``begin=None``: whether the odd element goes to the end.
    """

    def __init__(self, site: Site, kernel: Sequence[int]) -> None:
        axes = len(kernel)
        self.kernel = tuple(kernel)
        self.strides = tuple(site.ints("strides") or [1] * axes)
        self.dilations = tuple(site.ints("dilations") or [1] * axes)
        auto = site.text("auto_pad", "NOTSET")
        pads = site.ints("pads") or [0] * (2 * axes)
        self.begin: tuple[int, ...] | None = tuple(pads[:axes])
        self.end: tuple[int, ...] | None = tuple(pads[axes:])
        self.same_upper = auto == "SAME_UPPER"
        self.valid = auto == "VALID"
        if auto == "VALID":
            self.begin = self.end = (0,) * axes
        elif auto in {"SAME_UPPER", "SAME_LOWER"}:
            self.begin = self.end = None

    @property
    def symmetric(self) -> bool:
        """Whether both sides are padded alike, by known amounts."""
        return self.begin is not None and self.begin == self.end


def same_pads(
    sizes: Sequence[Any],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    upper: bool,
) -> list[tuple[Any, Any]]:
    """(before, after) of each axis so that the output has ``ceil(size / stride)`` elements."""
    pads = []
    for size, extent, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        needed = (-(-size // stride) - 1) * stride + (extent - 1) * dilation + 1 - size
        total = torch.sym_max(needed, 0)
        small = total // 2
        pads.append((small, total - small) if upper else (total - small, small))
    return pads


def pad_same(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    upper: bool,
    value: float = 0.0,
) -> Tensor:
    """Pad the spatial axes of (N, C, ...) as ``auto_pad`` says."""
    return pad_spatial(x, same_pads(x.shape[2:], kernel, strides, dilations, upper), value)


def pad_spatial(x: Tensor, pads: Sequence[tuple[Any, Any]], value: float = 0.0) -> Tensor:
    """Pad the last axes by (before, after) each."""
    flat = [amount for pair in reversed(pads) for amount in pair]
    return functional.pad(x, flat, value=value)


def pad_for(site: Site, x: Any, window: Window, value: float = 0.0) -> Any:
    """``x`` padded ahead of a layer that itself does not pad."""
    if window.begin is None or window.end is None:
        return site.call(
            pad_same,
            x,
            list(window.kernel),
            list(window.strides),
            list(window.dilations),
            window.same_upper,
            value,
        )
    if not any((*window.begin, *window.end)):
        return x
    return site.call(
        pad_spatial, x, [list(pair) for pair in zip(window.begin, window.end, strict=True)], value
    )


def pad_tensor(x: Tensor, pads: Any, axes: Sequence[int] | None, mode: str, value: float | bool) -> Tensor:
    """ONNX's Pad: ``pads`` are all amounts before, then all after; negative ones cut."""
    amounts = host.integers(pads)
    chosen = [axis % x.ndim for axis in (axes if axes is not None else range(x.ndim))]
    half = len(chosen)
    around = dict(zip(chosen, zip(amounts[:half], amounts[half:], strict=True), strict=True))
    if mode == "constant":
        flat = [amount for axis in reversed(range(x.ndim)) for amount in around.get(axis, (0, 0))]
        return functional.pad(x, flat, value=value)
    for axis, (before, after) in around.items():
        cut = x.narrow(axis, max(-before, 0), x.shape[axis] + min(before, 0) + min(after, 0))
        extra = (max(before, 0), max(after, 0))
        if any(extra):
            source = np.pad(np.arange(cut.shape[axis]), extra, mode=mode)  # type: ignore[call-overload]
            cut = cut.index_select(axis, torch.from_numpy(source).to(cut.device))
        x = cut
    return x
