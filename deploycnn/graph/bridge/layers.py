"""Operators with weights that become leaf modules: convolutions, batch norms, PRelu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from deploycnn.graph.bridge.builder import UnsupportedError
from deploycnn.graph.bridge.fake_quant import (
    BiasQuantize,
    FakeQuantize,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
)
from deploycnn.graph.bridge.padding import Window, pad_for
from deploycnn.graph.bridge.site import Site, operator
from deploycnn.graph.bridge.values import Constant, RoundedConstant, Value

_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_QUANTIZED = {1: QuantizedConv1d, 2: QuantizedConv2d, 3: QuantizedConv3d}
_FUNCTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: dict[int, type[nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_TRANSPOSED_FUNCTIONS = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_BATCHNORMS: dict[int, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}

Parameter = Constant | RoundedConstant


def fill(site: Site, module: nn.Module, weight: Parameter, bias: Parameter | None, source: fx.Node) -> None:
    """Give a freshly made layer its parameters and, where the file stores integers, its quantizers."""
    builder = site.builder
    path = builder.path_of(site.node)
    module.register_parameter("weight", builder.parameter(weight, f"{path}.weight"))
    if bias is not None:
        module.register_parameter("bias", builder.parameter(bias, f"{path}.bias"))
    if not isinstance(weight, RoundedConstant):
        return
    rounder, quantizer = builder.quantizer(weight.rounding, f"{path}.weight_fake_quant", weight=True)
    module.add_module("weight_fake_quant", rounder)
    builder.note_rounded(weight, f"{path}.weight", quantizer)
    module.register_module("bias_fake_quant", None)
    if isinstance(bias, RoundedConstant):
        module.add_module("bias_fake_quant", _bias_quantizer(site, bias, source, rounder))
        builder.note_rounded(bias, f"{path}.bias", f"{path}.bias_fake_quant")
        builder.note_rounding(bias.rounding, f"{path}.bias_fake_quant")


def _bias_quantizer(
    site: Site, bias: RoundedConstant, source: fx.Node, of_weight: FakeQuantize
) -> BiasQuantize:
    """The bias's quantizer; its scale follows input scale x weight scale where it is that product."""
    tied: tuple[FakeQuantize, ...] = ()
    if source in site.builder.on_grid:
        pair = (site.builder.quantizer_at(site.builder.on_grid[source]), of_weight)
        product = pair[0].scale.double() * pair[1].scale.double()
        stored = torch.from_numpy(np.array(bias.rounding.scale)).double()
        if product.numel() in (1, stored.numel()) and torch.allclose(product, stored, rtol=1e-5, atol=0):
            tied = pair
    rounding = bias.rounding
    return BiasQuantize(
        torch.from_numpy(np.array(rounding.scale)),
        torch.from_numpy(np.array(rounding.zero_point)),
        axis=rounding.axis,
        tied=tied,
    )


def _learnable(value: Value | None) -> bool:
    return isinstance(value, Constant | RoundedConstant)


def fits_layer(weight: Value | None, bias: Value | None) -> bool:
    """Whether weight and bias are constants that one leaf module can hold.

    An integer bias beside a float weight, which no quantizer writes, is left to the functional form.
    """
    if not _learnable(weight) or not (bias is None or _learnable(bias)):
        return False
    return isinstance(weight, RoundedConstant) or not isinstance(bias, RoundedConstant)


@operator("Conv")
def conv(site: Site) -> Value:
    """Conv: a leaf where weight and bias are constant."""
    weight, bias = site.value(1), site.value(2)
    shape = site.shape(1)
    if shape is None or len(shape) - 2 not in _CONVOLUTIONS:
        raise UnsupportedError(f"its weight has shape {shape}; 1, 2 or 3 spatial axes are supported")
    axes = len(shape) - 2
    groups = site.integer("group", 1)
    kernel = site.ints("kernel_shape") or [int(size or 0) for size in shape[2:]]
    window = Window(site, kernel)
    source = site.tensor(0)
    padded = source if window.symmetric else pad_for(site, source, window)
    padding = window.begin if window.symmetric and window.begin is not None else (0,) * axes
    if not fits_layer(weight, bias):
        return site.call(
            _FUNCTIONS[axes],
            padded,
            site.tensor(1),
            site.tensor(2) if bias is not None else None,
            list(window.strides),
            list(padding),
            list(window.dilations),
            groups,
        )
    assert isinstance(weight, Constant | RoundedConstant)  # noqa: S101 - for the type checker
    outputs, per_group = weight.array.shape[:2]
    kinds: Any = _QUANTIZED if isinstance(weight, RoundedConstant) else _CONVOLUTIONS
    module = kinds[axes](
        per_group * groups,
        outputs,
        tuple(kernel),
        stride=window.strides,
        padding=padding,
        dilation=window.dilations,
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    fill(site, module, weight, bias, source)  # type: ignore[arg-type]
    return site.builder.leaf(site.node, module, padded)


def crop(x: Tensor, begin: Sequence[int], end: Sequence[int]) -> Tensor:
    """Cut so many elements off both ends of the spatial axes of (N, C, ...)."""
    for axis, (before, after) in enumerate(zip(begin, end, strict=True), start=2):
        x = x.narrow(axis, before, x.shape[axis] - before - after)
    return x


def crop_to_product(x: Tensor, source: Tensor, strides: Sequence[int], upper: bool) -> Tensor:
    """Cut a transposed convolution's output to ``size * stride`` (``auto_pad: SAME_*``)."""
    for axis, stride in enumerate(strides, start=2):
        wanted = source.shape[axis] * stride
        spare = x.shape[axis] - wanted
        small = spare // 2
        x = x.narrow(axis, small if upper else spare - small, wanted)
    return x


@operator("ConvTranspose")
def conv_transpose(site: Site) -> Value:
    """ConvTranspose; paddings that are not the same on both sides are cut off afterwards."""
    weight, bias = site.value(1), site.value(2)
    shape = site.shape(1)
    if shape is None or len(shape) - 2 not in _TRANSPOSED:
        raise UnsupportedError(f"its weight has shape {shape}; 1, 2 or 3 spatial axes are supported")
    axes = len(shape) - 2
    groups = site.integer("group", 1)
    kernel = site.ints("kernel_shape") or [int(size or 0) for size in shape[2:]]
    window = Window(site, kernel)
    extra = tuple(site.ints("output_padding") or [0] * axes)
    wanted = site.ints("output_shape")
    plain = window.symmetric and not wanted
    padding = window.begin if plain and window.begin is not None else (0,) * axes
    source = site.tensor(0)
    made: fx.Node
    if isinstance(weight, Constant) and (bias is None or isinstance(bias, Constant)):
        module = _TRANSPOSED[axes](
            weight.array.shape[0],
            weight.array.shape[1] * groups,
            tuple(kernel),  # type: ignore[arg-type]
            stride=window.strides,  # type: ignore[arg-type]
            padding=padding,  # type: ignore[arg-type]
            output_padding=extra,  # type: ignore[arg-type]
            groups=groups,
            bias=bias is not None,
            dilation=window.dilations,  # type: ignore[arg-type]
            device="meta",
        )
        fill(site, module, weight, bias, source)
        made = site.builder.leaf(site.node, module, source)
    else:
        made = site.call(
            _TRANSPOSED_FUNCTIONS[axes],
            source,
            site.tensor(1),
            site.tensor(2) if bias is not None else None,
            list(window.strides),
            list(padding),
            list(extra),
            groups,
            list(window.dilations),
        )
    if wanted:
        return site.call(crop_to_shape, made, wanted[-axes:], site.text("auto_pad", "NOTSET") == "SAME_UPPER")
    if window.begin is None or window.end is None:
        return site.call(crop_to_product, made, source, list(window.strides), window.same_upper)
    if plain:
        return made
    return site.call(crop, made, list(window.begin), list(window.end))


def crop_to_shape(x: Tensor, sizes: Sequence[int], upper: bool) -> Tensor:
    """Cut the spatial axes to ``sizes``: the specification's split of the total padding."""
    for axis, size in enumerate(sizes, start=2):
        spare = x.shape[axis] - size
        x = x.narrow(axis, spare // 2 if upper else spare - spare // 2, size)
    return x


@operator("BatchNormalization")
def batch_normalization(site: Site) -> Value:
    """BatchNormalization: its momentum is the share of the old statistics, PyTorch's that of the new."""
    site.only_output(1, "running statistics")
    values = [site.value(index) for index in range(1, 5)]
    epsilon = site.number("epsilon", 1e-5)
    source = site.tensor(0)
    if not all(isinstance(value, Constant) for value in values):
        scale, bias, mean, var = (site.tensor(index) for index in range(1, 5))
        return site.call(functional.batch_norm, source, mean, var, scale, bias, False, 0.0, epsilon)
    constants = [value for value in values if isinstance(value, Constant)]
    shape = site.shape(0)
    rank = 4 if shape is None else len(shape)
    if rank not in _BATCHNORMS:
        raise UnsupportedError(f"its input has {rank} axes; 2 to 5 are supported")
    module = _BATCHNORMS[rank](
        constants[0].array.size, eps=epsilon, momentum=1.0 - site.number("momentum", 0.9)
    )
    fill(site, module, constants[0], constants[1], source)
    called = site.builder.leaf(site.node, module, source)
    path = site.builder.path_of(site.node)
    for name, value in (("running_mean", constants[2]), ("running_var", constants[3])):
        module.register_buffer(name, torch.from_numpy(np.array(value.array)))
        site.builder.note_float(f"{path}.{name}", value)
    return called


@operator("PRelu")
def prelu(site: Site) -> Value:
    """PRelu: a leaf where there is one constant slope, or one per channel."""
    slope = site.value(1)
    shape = site.shape(0)
    if isinstance(slope, Constant) and shape is not None and len(shape) >= 2:
        sizes = slope.array.shape
        channels = (1,) * (len(shape) - len(sizes)) + sizes
        if len(channels) == len(shape) and slope.array.size == channels[1]:
            flat = slope.changed("flat", lambda array: array.reshape(-1), lambda array: array.reshape(sizes))
            module = nn.PReLU(flat.array.size)
            fill(site, module, flat, None, site.tensor(0))
            return site.builder.leaf(site.node, module, site.tensor(0))
    return site.call(leak, site.tensor(0), site.tensor(1))


def leak(x: Tensor, slope: Tensor) -> Tensor:
    """``x`` where positive, else ``slope * x``."""
    return torch.where(x >= 0, x, slope * x)
