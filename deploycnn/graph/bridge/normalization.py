"""Norms over layers, groups, instances and neighbourhoods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploycnn.graph.bridge.builder import UnsupportedError
from deploycnn.graph.bridge.layers import fill
from deploycnn.graph.bridge.site import Site, operator
from deploycnn.graph.bridge.values import Constant, Value


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None, axis: int, epsilon: float) -> Tensor:
    """Normalize over all axes from ``axis`` on."""
    axes = list(range(axis % x.ndim, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    return normal * scale if bias is None else normal * scale + bias


@operator("LayerNormalization")
def layer_normalization(site: Site) -> Value:
    """LayerNormalization: a leaf where scale and bias are constant and as large as what is normalized."""
    site.only_output(1, "statistics")
    scale, bias = site.value(1), site.value(2)
    axis, epsilon = site.integer("axis", -1), site.number("epsilon", 1e-5)
    rank = site.rank(0)
    normalized = rank - (axis % rank)
    source = site.tensor(0)
    if (
        isinstance(scale, Constant)
        and scale.array.ndim == normalized
        and (bias is None or (isinstance(bias, Constant) and bias.array.shape == scale.array.shape))
    ):
        module = nn.LayerNorm(scale.array.shape, eps=epsilon, bias=bias is not None)
        fill(site, module, scale, bias if isinstance(bias, Constant) else None, source)
        return site.builder.leaf(site.node, module, source)
    added = site.tensor(2) if bias is not None else None
    return site.call(layer_norm, source, site.tensor(1), added, axis, epsilon)


def rms_norm(x: Tensor, scale: Tensor, axis: int, epsilon: float) -> Tensor:
    """Divide by the root of the mean square over all axes from ``axis`` on."""
    axes = list(range(axis % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale


@operator("RMSNormalization")
def rms_normalization(site: Site) -> Value:
    """RMSNormalization (operator set 23)."""
    scale = site.value(1)
    weight = site.builder.free_parameter(scale) if isinstance(scale, Constant) else site.tensor(1)
    return site.call(rms_norm, site.tensor(0), weight, site.integer("axis", -1), site.number("epsilon", 1e-5))


_INSTANCE: dict[int, type[nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d]] = {
    3: nn.InstanceNorm1d,
    4: nn.InstanceNorm2d,
    5: nn.InstanceNorm3d,
}


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Normalize each channel of each image."""
    return functional.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@operator("InstanceNormalization")
def instance_normalization(site: Site) -> Value:
    """InstanceNormalization."""
    scale, bias = site.value(1), site.value(2)
    epsilon, rank, source = site.number("epsilon", 1e-5), site.rank(0), site.tensor(0)
    if isinstance(scale, Constant) and isinstance(bias, Constant) and rank in _INSTANCE:
        module = _INSTANCE[rank](scale.array.size, eps=epsilon, affine=True)
        fill(site, module, scale, bias, source)
        return site.builder.leaf(site.node, module, source)
    return site.call(instance_norm, source, site.tensor(1), site.tensor(2), epsilon)


def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, groups: int, epsilon: float, per_group: bool
) -> Tensor:
    """Normalize groups of channels; scale and bias are per channel or, in operator set 18, per group."""
    normal = functional.group_norm(x, groups, eps=epsilon)
    if per_group:
        repeats = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    shape = (-1, *([1] * (x.ndim - 2)))
    return normal * scale.reshape(shape) + bias.reshape(shape)


@operator("GroupNormalization")
def group_normalization(site: Site) -> Value:
    """GroupNormalization."""
    scale, bias = site.value(1), site.value(2)
    groups, epsilon = site.integer("num_groups", 1), site.number("epsilon", 1e-5)
    source = site.tensor(0)
    if not isinstance(scale, Constant) or not isinstance(bias, Constant):
        return site.call(group_norm, source, site.tensor(1), site.tensor(2), groups, epsilon, site.opset < 21)
    if site.opset >= 21:
        module = nn.GroupNorm(groups, scale.array.size, eps=epsilon)
        fill(site, module, scale, bias, source)
        return site.builder.leaf(site.node, module, source)
    weight, added = site.builder.free_parameter(scale), site.builder.free_parameter(bias)
    return site.call(group_norm, source, weight, added, groups, epsilon, True)


def lp_normalize(x: Tensor, axis: int, p: int) -> Tensor:
    """Divide by the norm along an axis."""
    norm: Tensor = torch.linalg.vector_norm(x, ord=p, dim=axis, keepdim=True)
    return x / norm


@operator("LpNormalization")
def lp_normalization(site: Site) -> Value:
    """LpNormalization."""
    return site.call(lp_normalize, site.tensor(0), site.integer("axis", -1), site.integer("p", 2))


def local_response(x: Tensor, size: int, alpha: float, beta: float, bias: float) -> Tensor:
    """LRN of (N, C, ...): the window of an even size reaches one channel further up than down."""
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    flat = x.square().flatten(2).transpose(1, 2)
    sums = functional.avg_pool1d(functional.pad(flat, (before, after)), size, 1)
    around: Tensor = (bias + alpha * sums.transpose(1, 2).reshape(x.shape)) ** beta
    return x / around


@operator("LRN")
def lrn(site: Site) -> Value:
    """LRN."""
    return site.call(
        local_response,
        site.tensor(0),
        site.integer("size", 1),
        site.number("alpha", 0.0001),
        site.number("beta", 0.75),
        site.number("bias", 1.0),
    )


def mean_variance(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Zero mean and unit variance over ``axes``."""
    centred = x - x.mean(list(axes), keepdim=True)
    return centred / torch.sqrt(centred.square().mean(list(axes), keepdim=True) + 1e-9)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(site: Site) -> Value:
    """MeanVarianceNormalization."""
    return site.call(mean_variance, site.tensor(0), site.ints("axes") or [0, 2, 3])


@operator("Einsum")
def einsum(site: Site) -> Value:
    """Einsum."""
    equation = site.text("equation", "")
    if not equation:
        raise UnsupportedError("it has no equation")
    return site.call(torch.einsum, equation, *(site.tensor(index) for index in range(len(site.inputs))))
