"""Matrix products: linear layers where one side is a constant matrix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn

from deploycnn.graph.bridge.builder import UnsupportedError
from deploycnn.graph.bridge.fake_quant import QuantizedLinear
from deploycnn.graph.bridge.layers import Parameter, fill, fits_layer
from deploycnn.graph.bridge.site import Site, operator
from deploycnn.graph.bridge.values import Array, Constant, RoundedConstant, Value


def _transposed(weight: Parameter) -> Parameter:
    """A (K, N) matrix as the (N, K) weight of a linear layer."""

    def flip(array: Array) -> Array:
        return np.ascontiguousarray(array.T)

    if isinstance(weight, Constant):
        return weight.changed("flip", flip, flip)
    axis = weight.rounding.axis
    if weight.rounding.block_size:
        raise UnsupportedError("its blocked weight would have to be transposed")
    return weight.changed("flip", flip, flip, None if axis is None else 1 - axis % 2)


def _as_bias(value: Value | None, outputs: int) -> Parameter | None:
    """A constant of shape (N,) or (1, ..., N) as a bias of N numbers; ``None`` where it is no such."""
    if not isinstance(value, Constant | RoundedConstant):
        return None
    shape = value.array.shape
    if value.array.size != outputs or not shape or shape[-1] != outputs:
        return None
    if len(shape) == 1:
        return value
    if isinstance(value, RoundedConstant):
        return None
    return value.changed("flat", lambda array: array.reshape(-1), lambda array: array.reshape(shape))


def _linear(site: Site, weight: Parameter, bias: Parameter | None, source: fx.Node) -> fx.Node:
    outputs, inputs = weight.array.shape
    kind = QuantizedLinear if isinstance(weight, RoundedConstant) else nn.Linear
    module = kind(inputs, outputs, bias=bias is not None, device="meta")
    fill(site, module, weight, bias, source)
    return site.builder.leaf(site.node, module, source)


@operator("Gemm")
def gemm(site: Site) -> Value:
    """Gemm: a linear layer where it is one."""
    weight, bias = site.value(1), site.value(2)
    alpha, beta = site.number("alpha", 1.0), site.number("beta", 1.0)
    transposed = bool(site.integer("transB", 0))
    if (
        isinstance(weight, Constant | RoundedConstant)
        and not site.integer("transA", 0)
        and alpha == 1.0
        and (beta == 1.0 or bias is None)
    ):
        layout = weight if transposed else _transposed(weight)
        added = _as_bias(bias, layout.array.shape[0])
        if (bias is None or added is not None) and fits_layer(layout, added):
            return _linear(site, layout, added, site.tensor(0))
    return site.call(
        multiply,
        site.tensor(0),
        site.tensor(1),
        site.tensor(2) if bias is not None else None,
        alpha,
        beta,
        bool(site.integer("transA", 0)),
        transposed,
    )


def multiply(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, flip_a: bool, flip_b: bool
) -> Tensor:
    """``alpha * a @ b + beta * c`` of matrices."""
    product = torch.matmul(a.T if flip_a else a, b.T if flip_b else b)
    product = product if alpha == 1.0 else product * alpha
    if c is None:
        return product
    return product + (c if beta == 1.0 else c * beta)


@operator("MatMul")
def matmul(site: Site) -> Value:
    """MatMul: a linear layer where its right side is a constant matrix, with the bias that is added next."""
    weight = site.value(1)
    if not isinstance(weight, Constant | RoundedConstant) or weight.array.ndim != 2:
        return site.call(torch.matmul, site.tensor(0), site.tensor(1))
    layout = _transposed(weight)
    adding, bias = _bias_behind(site, layout.array.shape[0]) if isinstance(weight, Constant) else (None, None)
    called = _linear(site, layout, bias, site.tensor(0))
    if adding is not None:
        site.builder.absorbed[adding] = called
    return called


def _bias_behind(site: Site, outputs: int) -> tuple[str | None, Parameter | None]:
    """The Add node that alone reads the product and adds a constant vector, and that vector."""
    name = site.node.output[0]
    readers = site.builder.readers.get(name, [])
    if len(readers) != 1 or name in site.builder.outputs or readers[0].op_type != "Add":
        return None, None
    others = [other for other in readers[0].input if other != name]
    if len(others) != 1:
        return None, None
    value = site.builder.values.get(others[0])
    bias = _as_bias(value, outputs)
    if not isinstance(value, Constant) or bias is None or value.array.ndim != 1:
        return None, None
    return readers[0].name, bias
