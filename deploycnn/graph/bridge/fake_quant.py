"""Rounding to integers as ONNX's QuantizeLinear and DequantizeLinear do it, with gradients.

Forward: ``(clip(rint(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``, the division in float32 and
ties to even, as the specification of QuantizeLinear says. Backward: the straight-through estimator, zero outside
the range (Bengio et al. 2013), and for a learned scale the gradient of LSQ (Esser et al., "Learned Step Size
Quantization", ICLR 2020).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

#: Limits of a rounded number before the zero point is added: numbers, or tensors that broadcast to the input.
Limit = float | Tensor

#: Of e: what a learned scale keeps of its start at least.
_LEAST_EXPONENT = -30.0


class _Round(torch.autograd.Function):
    """Round to multiples of ``scale`` within limits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Limit, high: Limit, factor: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.low, ctx.high, ctx.factor = low, high, factor
        return rounded(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        ratio = x / scale
        steps = ratio.round()
        clipped = steps.clamp(ctx.low, ctx.high)
        inside = steps == clipped
        of_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, steps - ratio, clipped)
            of_scale = (gradient * slope).sum_to_size(scale.shape) * ctx.factor
        return gradient * inside, of_scale, None, None, None


def rounded(x: Tensor, scale: Tensor, low: Limit, high: Limit) -> Tensor:
    """``clip(rint(x / scale), low, high) * scale`` without gradients; ``scale`` broadcasts to ``x``."""
    return (x / scale).round_().clamp_(low, high).mul_(scale)  # type: ignore[arg-type]


class PositiveScale(nn.Module):
    """A learned scale as the way it went from its start: further up as it is, down to the start only by shares.

    With the start s0 and the way u, the scale is s0 + u for u >= 0, and s0 * exp(u / s0) below. The slope at u = 0
    is 1 on both sides, so a step begins as large as on the scale itself, which is what LSQ's scaling of gradients is
    for; but no step, however large, takes a scale to zero or beyond, as steps on the scale itself do: scales are small
    numbers. At u = 0 the scale is the start to the bit.
    """

    start: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone())

    def forward(self, way: Tensor) -> Tensor:
        """The scale, of the way's shape."""
        ratio = way / self.start
        # Below the limits exp would be 0; above them the branch that is not taken would overflow, its gradient be NaN.
        shrunk = self.start * ratio.clamp(_LEAST_EXPONENT, 0.0).exp()
        return torch.where(way < 0, shrunk, self.start + way)

    def right_inverse(self, scale: Tensor) -> Tensor:
        """The way to ``scale``, which is positive."""
        return torch.where(scale < self.start, self.start * (scale / self.start).log(), scale - self.start)


class FakeQuantize(nn.Module):
    """QuantizeLinear followed by DequantizeLinear, trainable through.

    Attributes:
        scale: float32, shape () or (channels,), or with ``block_size`` that of the input with the axis divided;
            a buffer, or after :meth:`learn_scale` computed by :class:`PositiveScale` from a parameter.
        zero_point: int32 of the same shape; a buffer.
        qmin: Smallest integer.
        qmax: Largest integer.
        axis: Axis of the channels; ``None`` for one scale in all.
        block_size: Neighbours along ``axis`` that share a scale (opset 21); 0 for one scale per channel.
        batched: Whether the input's first axis counts images, as that of activations does.
        enabled: Whether it rounds at all; otherwise the input passes through.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor,
        *,
        qmin: int,
        qmax: int,
        axis: int | None = None,
        block_size: int = 0,
        batched: bool = False,
    ) -> None:
        super().__init__()
        if scale.shape != zero_point.shape:
            raise ValueError(f"scale has shape {tuple(scale.shape)}, zero_point {tuple(zero_point.shape)}")
        if scale.numel() != 1 and axis is None:
            raise ValueError(f"{scale.numel()} scales need an axis")
        self.register_buffer("scale", scale.detach().to(torch.float32).clone())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32).clone())
        self.qmin, self.qmax, self.axis, self.block_size = qmin, qmax, axis, block_size
        self.batched = batched
        self.enabled = True
        self._refresh()

    def _refresh(self) -> None:
        # Numbers clamp faster than tensors do, and reading them off a GPU in every step would wait for it.
        self._zero = int(self.zero_point) if self.zero_point.numel() == 1 else None

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._refresh()

    def learn_scale(self, learn: bool = True) -> None:
        """Train the scale too (LSQ), as a positive number; or make it a buffer again.

        Modules that shared one scale tensor do not share it afterwards; ``Bridge.learn_scales`` keeps them tied.
        """
        value = self.scale.detach().clone()
        if parametrize.is_parametrized(self, "scale"):
            parametrize.remove_parametrizations(self, "scale")
        del self.scale
        if learn:
            self.register_parameter("scale", nn.Parameter(value))
            parametrize.register_parametrization(self, "scale", PositiveScale(value))
        else:
            self.register_buffer("scale", value)

    def spread(self, parameters: Tensor, ndim: int, length: int) -> Tensor:
        """``scale`` or ``zero_point`` in a shape that broadcasts to an input with ``length`` along the axis."""
        if self.axis is None or parameters.numel() == 1:
            return parameters.reshape(())
        axis = self.axis % ndim
        if self.block_size:
            return parameters.repeat_interleave(self.block_size, dim=axis).narrow(axis, 0, length)
        shape = [1] * ndim
        shape[axis] = -1
        return parameters.reshape(shape)

    def limits(self, ndim: int, length: int) -> tuple[Limit, Limit]:
        """Smallest and largest ``rint(x / scale)`` that do not saturate."""
        if self._zero is not None:
            return float(self.qmin - self._zero), float(self.qmax - self._zero)
        zero = self.spread(self.zero_point, ndim, length).to(torch.float32)
        return self.qmin - zero, self.qmax - zero

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``, of any shape; per channel along ``axis``."""
        if not self.enabled:
            return x
        length = x.shape[self.axis] if self.axis is not None and x.ndim else 1
        scale = self.spread(self.scale, x.ndim, length)
        low, high = self.limits(x.ndim, length)
        if not torch.is_grad_enabled() or not (x.requires_grad or scale.requires_grad):
            return rounded(x, scale, low, high)
        result: Tensor = _Round.apply(x, scale, low, high, self.gradient_factor(x))
        return result

    def gradient_factor(self, x: Tensor) -> float:
        """LSQ's 1 / sqrt(N Qp), which keeps the steps of scales and weights of one relative size (section 2.2).

        N counts the weights that share a scale, or the features of one image that do: the loss is a mean over images,
        so their number changes no gradient. Qp is the largest integer above the zero point.
        """
        count = x.numel() / max(self.zero_point.numel(), 1)
        if self.batched:
            count /= max(len(x), 1)
        return 1.0 / math.sqrt(max(count * (self.qmax - (self._zero or 0)), 1.0))

    def quantize(self, x: Tensor) -> Tensor:
        """The integers (int32) of ``x``, zero point included."""
        length = x.shape[self.axis] if self.axis is not None and x.ndim else 1
        scale = self.spread(self.scale.detach(), x.ndim, length)
        low, high = self.limits(x.ndim, length)
        steps = (x.detach() / scale).round_().clamp_(low, high)  # type: ignore[arg-type]
        return steps.to(torch.int32) + self.spread(self.zero_point, x.ndim, length)

    def extra_repr(self) -> str:
        """Range and axis."""
        return f"qmin={self.qmin}, qmax={self.qmax}, axis={self.axis}, scales={self.scale.numel()}"


class BiasQuantize(FakeQuantize):
    """int32 biases: ``rint(bias / scale) * scale``, where the scale is usually input scale x weight scale.

    In float64, because float32 has no room for 32-bit integers.
    """

    def __init__(
        self, scale: Tensor, zero_point: Tensor, *, axis: int | None = 0, tied: tuple[FakeQuantize, ...] = ()
    ) -> None:
        super().__init__(scale, zero_point, qmin=-(2**31), qmax=2**31 - 1, axis=axis)
        # A tuple, so that the quantizers of input and weight are not registered here a second time.
        self.tied = tied

    def current_scale(self) -> Tensor:
        """The scale in use: the product of the tied quantizers' scales where there are such."""
        if not self.tied:
            return self.scale
        product = self.tied[0].scale.detach() * self.tied[1].scale.detach()
        return (
            product.expand(self.scale.shape) if self.scale.numel() > 1 else product.reshape(self.scale.shape)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x`` of shape (channels,); the gradient is 1."""
        if not self.enabled:
            return x
        with torch.no_grad():
            scale = self.current_scale().double()
            error = ((x.double() / scale).round_() * scale).to(x.dtype) - x
        return x + error

    def quantize(self, x: Tensor) -> Tensor:
        """The integers (int64, within int32) of ``x``."""
        steps = (x.detach().double() / self.current_scale().double()).round_()
        return steps.clamp_(self.qmin, self.qmax).to(torch.int64)


class _Quantized(nn.Module):
    """What convolutions and linear layers with rounded weights share."""

    weight_fake_quant: FakeQuantize
    bias_fake_quant: BiasQuantize | None
    bias: Tensor | None
    weight: Tensor

    def rounded_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are computed with."""
        bias = self.bias
        if bias is not None and self.bias_fake_quant is not None:
            bias = self.bias_fake_quant(bias)
        return self.weight_fake_quant(self.weight), bias


class QuantizedConv1d(_Quantized, nn.Conv1d):
    """A convolution whose float weight is rounded in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, L) -> (N, C', L')."""
        result: Tensor = self._conv_forward(x, *self.rounded_parameters())
        return result


class QuantizedConv2d(_Quantized, nn.Conv2d):
    """A convolution whose float weight is rounded in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        result: Tensor = self._conv_forward(x, *self.rounded_parameters())
        return result


class QuantizedConv3d(_Quantized, nn.Conv3d):
    """A convolution whose float weight is rounded in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C', D', H', W')."""
        result: Tensor = self._conv_forward(x, *self.rounded_parameters())
        return result


class QuantizedLinear(_Quantized, nn.Linear):  # type: ignore[misc]
    """A linear layer whose float weight is rounded in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        weight, bias = self.rounded_parameters()
        return functional.linear(x, weight, bias)
