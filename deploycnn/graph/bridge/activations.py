"""Activations with attributes, and softmaxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from deploycnn.graph.bridge.site import Site, operator
from deploycnn.graph.bridge.values import Value


@operator("Clip")
def clip(site: Site) -> Value:
    """Clip: limits are attributes before operator set 11, inputs since."""
    low: Any
    high: Any
    if site.opset < 11:
        low = site.number("min", -math.inf) if site.has("min") else None
        high = site.number("max", math.inf) if site.has("max") else None
    else:
        limits = [site.value(index) for index in (1, 2)]
        if any(isinstance(limit, fx.Node) for limit in limits):
            low, high = (site.tensor(i) if site.value(i) is not None else None for i in (1, 2))
        else:
            low, high = (_number(site, index) for index in (1, 2))
    if low is None and high is None:
        return site.tensor(0)
    if (low, high) == (0.0, 6.0):
        return site.call(functional.relu6, site.tensor(0))
    return site.call(torch.clamp, site.tensor(0), low, high)


def _number(site: Site, index: int) -> float | None:
    array = site.constant(index)
    return None if array is None else array.reshape(-1)[0].item()


@operator("LeakyRelu")
def leaky_relu(site: Site) -> Value:
    """LeakyRelu."""
    return site.call(functional.leaky_relu, site.tensor(0), site.number("alpha", 0.01))


def hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``clip(alpha * x + beta, 0, 1)``."""
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operator("HardSigmoid")
def hardsigmoid(site: Site) -> Value:
    """HardSigmoid; PyTorch's own has a slope of 1/6."""
    alpha, beta = site.number("alpha", 0.2), site.number("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return site.call(functional.hardsigmoid, site.tensor(0))
    return site.call(hard_sigmoid, site.tensor(0), alpha, beta)


@operator("Elu")
def elu(site: Site) -> Value:
    """Elu."""
    return site.call(functional.elu, site.tensor(0), site.number("alpha", 1.0))


@operator("Celu")
def celu(site: Site) -> Value:
    """Celu."""
    return site.call(functional.celu, site.tensor(0), site.number("alpha", 1.0))


def scaled_elu(x: Tensor, alpha: float, gamma: float) -> Tensor:
    """``gamma * elu(x, alpha)``."""
    return gamma * functional.elu(x, alpha)


@operator("Selu")
def selu(site: Site) -> Value:
    """Selu."""
    alpha = site.number("alpha", 1.67326319217681884765625)
    gamma = site.number("gamma", 1.05070102214813232421875)
    return site.call(scaled_elu, site.tensor(0), alpha, gamma)


def above(x: Tensor, alpha: float) -> Tensor:
    """``x`` where it is above ``alpha``, else 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


@operator("ThresholdedRelu")
def thresholded_relu(site: Site) -> Value:
    """ThresholdedRelu."""
    return site.call(above, site.tensor(0), site.number("alpha", 1.0))


def shrink(x: Tensor, lambd: float, bias: float) -> Tensor:
    """Values toward zero by ``bias``, those within ``lambd`` become 0."""
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


@operator("Shrink")
def shrinkage(site: Site) -> Value:
    """Shrink."""
    return site.call(shrink, site.tensor(0), site.number("lambd", 0.5), site.number("bias", 0.0))


@operator("Gelu")
def gelu(site: Site) -> Value:
    """Gelu."""
    return site.call(functional.gelu, site.tensor(0), approximate=site.text("approximate", "none"))


def swish(x: Tensor, alpha: float) -> Tensor:
    """``x * sigmoid(alpha * x)``."""
    return functional.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("Swish")
def swish_operator(site: Site) -> Value:
    """Swish (operator set 24)."""
    return site.call(swish, site.tensor(0), site.number("alpha", 1.0))


def over_flattened(x: Tensor, name: str, axis: int) -> Tensor:
    """A softmax over all axes from ``axis`` on, as before operator set 13."""
    start = axis % x.ndim if x.ndim else 0
    return _SOFTMAXES[name](x.flatten(start), start).reshape(x.shape)


def hardmax(x: Tensor, axis: int) -> Tensor:
    """1 at the first maximum, else 0."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


_SOFTMAXES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Softmax": torch.softmax,
    "LogSoftmax": torch.log_softmax,
    "Hardmax": hardmax,
}


def normalized(x: Tensor, name: str, axis: int) -> Tensor:
    """A softmax over one axis."""
    return _SOFTMAXES[name](x, axis)


@operator(*_SOFTMAXES)
def softmax(site: Site) -> Value:
    """Softmax, LogSoftmax and Hardmax."""
    if site.opset < 13:
        return site.call(over_flattened, site.tensor(0), site.node.op_type, site.integer("axis", 1))
    return site.call(normalized, site.tensor(0), site.node.op_type, site.integer("axis", -1))
