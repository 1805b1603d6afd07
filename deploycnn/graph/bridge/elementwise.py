"""Operators that work element by element: functions, arithmetic, comparisons, types."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, fx
from torch.nn import functional

from deploycnn.graph.bridge.builder import UnsupportedError
from deploycnn.graph.bridge.site import Site, operator
from deploycnn.graph.bridge.values import Constant, Value

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": functional.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}


@operator(*UNARY)
def unary(site: Site) -> Value:
    """Functions of one tensor without attributes."""
    return site.call(UNARY[site.node.op_type], site.tensor(0))


@operator("Dropout")
def dropout(site: Site) -> Value:
    """Dropout is left out: what is trained is what is deployed."""
    site.only_output(1, "the mask")
    return site.tensor(0)


@operator("Identity")
def identity(site: Site) -> Value:
    """The value itself."""
    value = site.value(0)
    if value is None:
        raise UnsupportedError("input 0 is missing")
    return value


def divide(a: Any, b: Any) -> Tensor:
    """ONNX divides integers toward zero."""
    both_whole = not any(
        value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float)
        for value in (a, b)
    )
    return torch.div(a, b, rounding_mode="trunc" if both_whole else None)


def modulo(a: Any, b: Any) -> Tensor:
    """Remainder with the sign of the divisor."""
    return torch.remainder(a, b)


def truncated_modulo(a: Any, b: Any) -> Tensor:
    """Remainder with the sign of the dividend."""
    return torch.fmod(a, b)


def power(a: Any, b: Any) -> Tensor:
    """``a ** b`` in the type of ``a``."""
    result = torch.pow(a, b)
    return result.to(a.dtype) if isinstance(a, Tensor) else result


def aligned(a: Any, b: Any) -> tuple[Any, Any]:
    """Two operands on one device: computed shapes live on the CPU."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.device != b.device:
        target = b.device if a.device.type == "cpu" else a.device
        return a.to(target), b.to(target)
    return a, b


BINARY: dict[str, Callable[[Any, Any], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Div": divide,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": power,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}

#: Operators whose constant operand is learned where it stands behind a learned layer: scales and shifts.
_LEARNED_OPERANDS = frozenset({"Add", "Sub", "Mul", "Div"})


def operand(site: Site, index: int) -> Any:
    """An operand: a number, a parameter, or a tensor."""
    value = site.value(index)
    number = site.scalar(index)
    if number is not None:
        return number
    learned = any(isinstance(other, fx.Node) and other in site.builder.learned for other in site.inputs)
    if (
        isinstance(value, Constant)
        and learned
        and site.node.op_type in _LEARNED_OPERANDS
        and value.array.dtype == np.float32
        and value.array.size > 1
        and bool(np.isfinite(value.array).all())
    ):
        return site.builder.free_parameter(value)
    return site.tensor(index)


def on_one_device(a: Any, b: Any, name: str) -> Tensor:
    """A binary operator of a computed shape and a tensor."""
    return BINARY[name](*aligned(a, b))


@operator(*BINARY)
def binary(site: Site) -> Value:
    """Functions of two tensors, which broadcast."""
    a, b = operand(site, 0), operand(site, 1)
    if any(isinstance(value, fx.Node) and value in site.builder.host for value in site.inputs):
        return site.call(on_one_device, a, b, site.node.op_type)
    name = site.node.op_type
    if not isinstance(a, fx.Node):
        # Comparisons and logarithmic functions want their tensor first.
        a = site.tensor(0)
    return site.call(BINARY[name], a, b)


@operator("Mod")
def mod(site: Site) -> Value:
    """Remainders."""
    function = truncated_modulo if site.integer("fmod", 0) else modulo
    return site.call(function, site.tensor(0), site.tensor(1))


def add_all(*tensors: Tensor) -> Tensor:
    """Sum of tensors that broadcast."""
    return reduce(torch.add, tensors)


def mean_all(*tensors: Tensor) -> Tensor:
    """Mean of tensors that broadcast."""
    return add_all(*tensors) / len(tensors)


def largest(*tensors: Tensor) -> Tensor:
    """Maximum of tensors that broadcast."""
    return reduce(torch.maximum, tensors)


def smallest(*tensors: Tensor) -> Tensor:
    """Minimum of tensors that broadcast."""
    return reduce(torch.minimum, tensors)


VARIADIC = {"Max": largest, "Mean": mean_all, "Min": smallest, "Sum": add_all}


@operator(*VARIADIC)
def variadic(site: Site) -> Value:
    """Functions of any number of tensors."""
    tensors = [site.tensor(index) for index in range(len(site.inputs))]
    return site.call(VARIADIC[site.node.op_type], *tensors)


def choose(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` where the condition holds, else ``b``."""
    device = next((x.device for x in (condition, a, b) if x.device.type != "cpu"), condition.device)
    return torch.where(condition.to(device), a.to(device), b.to(device))


@operator("Where")
def where(site: Site) -> Value:
    """Where."""
    return site.call(choose, site.tensor(0), site.tensor(1), site.tensor(2))


TORCH_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in another type."""
    return x.to(dtype)


def convert_like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` in the type of ``other``."""
    return x.to(other.dtype)


@operator("Cast")
def cast(site: Site) -> Value:
    """Cast."""
    target = site.integer("to", 0)
    if target not in TORCH_DTYPES:
        raise UnsupportedError(f"a cast to {TensorProto.DataType.Name(target)}")
    return site.call(convert, site.tensor(0), TORCH_DTYPES[target])


@operator("CastLike")
def cast_like(site: Site) -> Value:
    """CastLike."""
    return site.call(convert_like, site.tensor(0), site.tensor(1))
