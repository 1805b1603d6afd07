"""Resize and Upsample, after the formulas of ONNX's specification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional

from deploycnn.graph.bridge import host
from deploycnn.graph.bridge.builder import UnsupportedError
from deploycnn.graph.bridge.site import Site, operator
from deploycnn.graph.bridge.values import Array, Value


def _coordinates(
    size: int, out: int, scale: float, mode: str, region: tuple[float, float]
) -> tuple[Array, Array]:
    """Where each output element lies in the input, and whether that is outside the region to be resized."""
    places = np.arange(out, dtype=np.float64)
    outside = np.zeros(out, dtype=bool)
    if mode == "asymmetric":
        return places / scale, outside
    if mode == "align_corners":
        return (places * (size - 1) / (out - 1) if out > 1 else places * 0), outside
    if mode == "pytorch_half_pixel" and out <= 1:
        return places * 0, outside
    if mode in {"half_pixel", "pytorch_half_pixel"}:
        return (places + 0.5) / scale - 0.5, outside
    if mode == "half_pixel_symmetric":
        adjusted = out / (scale * size)
        centre = size / 2
        return centre * (1 - adjusted) + (places + 0.5) / scale - 0.5, outside
    if mode == "tf_half_pixel_for_nn":
        return (places + 0.5) / scale, outside
    first, last = region
    if out > 1:
        found = first * (size - 1) + places * (last - first) * (size - 1) / (out - 1)
    else:
        found = places * 0 + 0.5 * (first + last) * (size - 1)
    return found, (found < 0) | (found > size - 1)


def _nearest(places: Array, mode: str) -> Array:
    if mode == "floor":
        return np.floor(places)
    if mode == "ceil":
        return np.ceil(places)
    if mode == "round_prefer_ceil":
        return np.floor(places + 0.5)
    return np.ceil(places - 0.5)


def _kernel(distance: Array, mode: str, a: float) -> Array:
    d = np.abs(distance)
    if mode == "linear":
        triangle: Array = np.clip(1 - d, 0, None)
        return triangle
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    weights: Array = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    return weights


def matrix(
    size: int,
    out: int,
    scale: float,
    *,
    mode: str,
    coordinates: str,
    nearest: str,
    cubic: float,
    exclude: bool,
    antialias: bool,
    region: tuple[float, float],
) -> tuple[Array, Array]:
    """(out, size) weights of one axis, and which outputs take the extrapolation value."""
    places, outside = _coordinates(size, out, scale, coordinates, region)
    weights = np.zeros((out, size))
    if coordinates != "tf_crop_and_resize":
        outside[:] = False
    if mode == "nearest":
        chosen = np.clip(_nearest(places, nearest), 0, size - 1).astype(np.int64)
        weights[np.arange(out), chosen] = 1.0
        return weights, outside
    shrink = min(scale, 1.0) if antialias else 1.0
    reach = math.ceil((1 if mode == "linear" else 2) / shrink)
    for row, place in enumerate(places):
        taps = np.arange(math.floor(place) - reach + 1, math.floor(place) + reach + 1)
        shares = _kernel((taps - place) * shrink, mode, cubic)
        if exclude or antialias:
            shares = np.where((taps >= 0) & (taps < size), shares, 0.0)
        shares = shares / shares.sum() if shares.sum() != 0 and (exclude or antialias) else shares
        np.add.at(weights[row], np.clip(taps, 0, size - 1), shares)
    return weights, outside


def resize(
    x: Tensor,
    scales: Any,
    sizes: Any,
    axes: Sequence[int] | None,
    options: tuple[str, str, str, float, bool, bool],
    policy: str,
    region: Sequence[float] | None,
    extrapolation: float,
) -> Tensor:
    """Resize along every axis whose size changes."""
    mode, coordinates, nearest, cubic, exclude, antialias = options
    chosen = [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    factors, targets = _targets(x, scales, sizes, chosen, policy)
    outside_any = None
    corners = list(region) if region else [0.0] * len(chosen) + [1.0] * len(chosen)
    for index, axis in enumerate(chosen):
        size, out = int(x.shape[axis]), targets[index]
        part = (corners[index], corners[index + len(chosen)])
        if out == size and factors[index] == 1.0 and part == (0.0, 1.0):
            continue
        weights, outside = matrix(
            size,
            out,
            factors[index],
            mode=mode,
            coordinates=coordinates,
            nearest=nearest,
            cubic=cubic,
            exclude=exclude,
            antialias=antialias,
            region=part,
        )
        if mode == "nearest":
            x = x.index_select(axis, torch.from_numpy(weights.argmax(axis=1)).to(x.device))
        else:
            dense = torch.from_numpy(weights).to(device=x.device, dtype=x.dtype)
            x = torch.movedim(torch.movedim(x, axis, -1) @ dense.T, -1, axis)
        if outside.any():
            mask = torch.from_numpy(outside).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
            outside_any = mask if outside_any is None else outside_any | mask
    if outside_any is not None:
        x = torch.where(outside_any.to(x.device), torch.full_like(x, extrapolation), x)
    return x


def _targets(
    x: Tensor, scales: Any, sizes: Any, axes: Sequence[int], policy: str
) -> tuple[list[float], list[int]]:
    if sizes is None:
        factors = [float(factor) for factor in host.array(scales).reshape(-1).tolist()]
        return factors, [
            math.floor(x.shape[axis] * factor) for axis, factor in zip(axes, factors, strict=True)
        ]
    wanted = [int(size) for size in host.integers(sizes)]
    lengths = [int(x.shape[axis]) for axis in axes]
    if policy != "stretch":
        ratios = [want / have for want, have in zip(wanted, lengths, strict=True)]
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        wanted = [math.floor(ratio * have + 0.5) for have in lengths]
        return [ratio] * len(axes), wanted
    return [want / have for want, have in zip(wanted, lengths, strict=True)], wanted


def interpolate(x: Tensor, scales: Any, sizes: Any, mode: str, align_corners: bool | None) -> Tensor:
    """The cases that PyTorch's own interpolation computes: (N, C, H, W) along H and W."""
    if sizes is not None:
        wanted = host.integers(sizes)[2:]
    else:
        factors = host.array(scales).reshape(-1)[2:].tolist()
        wanted = [math.floor(size * factor) for size, factor in zip(x.shape[2:], factors, strict=True)]
    return functional.interpolate(x, size=wanted, mode=mode, align_corners=align_corners)


def _native(
    site: Site, options: tuple[str, str, str, float, bool, bool], scales: Any, sizes: Any
) -> tuple[str, bool | None] | None:
    """PyTorch's mode for this Resize, where it has one."""
    mode, coordinates, nearest, _, exclude, antialias = options
    shape = site.shape(0)
    if (
        shape is None
        or len(shape) != 4
        or exclude
        or antialias
        or isinstance(scales, fx.Node)
        or isinstance(sizes, fx.Node)
    ):
        return None
    if scales is not None:
        if list(scales[:2]) != [1.0, 1.0] or any(factor != round(factor) for factor in scales):
            return None  # PyTorch would divide by the ratio of the sizes, ONNX divides by the scale
    elif shape[:2] != tuple(sizes[:2]) or None in shape:
        return None
    if mode == "nearest" and coordinates == "asymmetric" and nearest == "floor":
        whole = scales is not None or all(
            want % have == 0 for want, have in zip(sizes[2:], (int(s or 1) for s in shape[2:]), strict=True)
        )
        return ("nearest", None) if whole else None
    if mode == "linear" and coordinates in {"half_pixel", "pytorch_half_pixel"}:
        return "bilinear", False
    if mode == "linear" and coordinates == "align_corners":
        return "bilinear", True
    return None


@operator("Resize")
def resize_operator(site: Site) -> Value:
    """Resize: operator set 10 has scales only, 11 adds region and sizes, 18 axes and antialiasing."""
    first = site.opset < 11
    scales = site.numbers(1 if first else 2)
    sizes = None if first else site.numbers(3)
    if isinstance(scales, list) and not scales:
        scales = None
    if isinstance(sizes, list) and not sizes:
        sizes = None
    region = None if first else site.fixed_numbers(1)
    coordinates = site.text("coordinate_transformation_mode", "asymmetric" if first else "half_pixel")
    options = (
        site.text("mode", "nearest"),
        coordinates,
        site.text("nearest_mode", "floor" if first else "round_prefer_floor"),
        site.number("cubic_coeff_a", -0.75),
        bool(site.integer("exclude_outside", 0)),
        bool(site.integer("antialias", 0)),
    )
    return _resized(site, scales, sizes, options, region if coordinates == "tf_crop_and_resize" else None)


def _resized(
    site: Site,
    scales: Any,
    sizes: Any,
    options: tuple[str, str, str, float, bool, bool],
    region: list[Any] | None,
) -> Value:
    if scales is None and sizes is None:
        raise UnsupportedError("it has neither scales nor sizes")
    axes, policy = site.ints("axes"), site.text("keep_aspect_ratio_policy", "stretch")
    if axes is None and policy == "stretch":
        native = _native(site, options, scales, sizes)
        if native is not None:
            return site.call(interpolate, site.tensor(0), scales, sizes, *native)
    return site.call(
        resize,
        site.tensor(0),
        scales,
        sizes,
        axes,
        options,
        policy,
        region,
        site.number("extrapolation_value", 0.0),
    )


@operator("Upsample")
def upsample(site: Site) -> Value:
    """Upsample (until operator set 9): scales from the corner."""
    scales = site.fixed_numbers(1)
    options = (site.text("mode", "nearest"), "asymmetric", "floor", -0.75, False, False)
    return _resized(site, scales, None, options, None)
