"""Grows a ``torch.fx`` graph value by value: constants, parameters, leaf modules, calls, quantizers."""

from __future__ import annotations

import hashlib
import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto, numpy_helper
from torch import Tensor, fx, nn

from deploycnn.errors import PassRequirementError
from deploycnn.graph.bridge.fake_quant import FakeQuantize
from deploycnn.graph.bridge.host import as_tensor
from deploycnn.graph.bridge.values import (
    INTEGER_RANGES,
    Array,
    Change,
    Constant,
    RoundedConstant,
    Rounding,
    Value,
    same,
)
from deploycnn.graph.model import consumers, infer_shapes, opset_of, shape_of, value_types
from deploycnn.graph.names import unique


class UnsupportedError(Exception):
    """A node that the bridge cannot express; says why. Collected by the importer, never shown alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A tensor of the torch module and the ONNX tensor that it is written into.

    Attributes:
        path: Of the parameter or buffer in the module.
        origin: Name of the ONNX tensor.
        undo: From the module's layout to the ONNX tensor's.
        quantizer: Path of the quantizer that makes the stored integers; ``None`` for floats.
        rounding: As it was imported, where a quantizer is named.
        digest: Of the tensor as it was imported: what is not trained is not written. ``None`` where it must
            be written anyway.
    """

    path: str
    origin: str
    undo: Change = same
    quantizer: str | None = None
    rounding: Rounding | None = None
    digest: bytes | None = None


def to_torch_tensor(array: Array) -> Tensor:
    """A tensor with a copy of ``array``; bfloat16 included."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def digest(array: Array) -> bytes:
    """Tells whether an array is still the same, without a copy of it."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


#: Names that a module already has.
_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


class Builder:
    """State of one import.

    Attributes:
        values: What each ONNX value became.
        host: Nodes whose value is an array of Python numbers (shapes), not a tensor.
        integers: Nodes that stand for the integers of a QuantizeLinear -> its rounding and quantizer. Their
            tensors hold the real values of those integers, so that most operators need not know.
        on_grid: Nodes whose values were rounded -> path of the quantizer.
        evaluated: ONNX tensors from which others were computed while importing.
        learned: Nodes that depend on the input through a layer with weights.
    """

    def __init__(self, model: ModelProto, float_weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        self.opset = opset_of(model)
        self.readers = consumers(model.graph)
        self.outputs = {value.name for value in model.graph.output}
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[str, Value] = {}
        self.host: set[fx.Node] = set()
        self.integers: dict[fx.Node, tuple[Rounding, str]] = {}
        self.on_grid: dict[fx.Node, str] = {}
        self.learned: set[fx.Node] = set()
        self.module_of: dict[str, str] = {}
        self.slots: list[Slot] = []
        self.evaluated: set[str] = set()
        self.float_weights = dict(float_weights)
        self.float_weights_used: set[str] = set()
        #: ONNX Add nodes that became the bias of a linear layer -> the value that stands for their output.
        self.absorbed: dict[str, fx.Node] = {}
        self._types = value_types(infer_shapes(model))
        self._taken: set[str] = set()
        self._parameters: dict[tuple[str, ...], nn.Parameter] = {}
        self._buffers: dict[str, list[tuple[Array, fx.Node]]] = {}
        self._quantizers: dict[tuple[object, ...], tuple[FakeQuantize, str]] = {}
        self._peaks = _largest_integers(model)

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Shape of an ONNX value as far as ONNX infers it."""
        return shape_of(self._types[name]) if name in self._types else None

    def path(self, name: str) -> str:
        """A free attribute name like ``name``."""
        plain = re.sub(r"\W", "_", name, flags=re.ASCII).strip("_") or "node"
        if plain[0].isdigit() or keyword.iskeyword(plain):
            plain = f"n{plain}"
        chosen = unique(plain, self._taken | _RESERVED)
        self._taken.add(chosen)
        return chosen

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> fx.Node:
        """Call a function at run time."""
        node = self.graph.call_function(function, arguments, options)
        if any(source in self.learned for source in node.all_input_nodes):
            self.learned.add(node)
        return node

    def call_module(self, path: str, *arguments: Any) -> fx.Node:
        """Call a module of the root at run time."""
        node = self.graph.call_module(path, arguments)
        if any(source in self.learned for source in node.all_input_nodes):
            self.learned.add(node)
        return node

    def path_of(self, node: NodeProto) -> str:
        """Where the ONNX node's module is."""
        if node.name not in self.module_of:
            self.module_of[node.name] = self.path(node.name)
        return self.module_of[node.name]

    def leaf(self, node: NodeProto, module: nn.Module, *arguments: Any) -> fx.Node:
        """Add ``module`` under the ONNX node's name and call it."""
        path = self.path_of(node)
        self.root.add_module(path, module)
        called = self.call_module(path, *arguments)
        if next(module.parameters(), None) is not None:
            self.learned.add(called)
        return called

    def tensor(self, value: Value) -> fx.Node:
        """``value`` as a tensor at run time."""
        if isinstance(value, fx.Node):
            return self.call(as_tensor, value) if value in self.host else value
        if isinstance(value, Constant):
            return self._buffer(value)
        if isinstance(value, RoundedConstant):
            path = self.path(f"{value.origin}_master")
            self.root.register_parameter(path, self.parameter(value, path))
            quantizer = self.root_quantizer(value.rounding, f"{value.origin}_quantizer", weight=True)
            self.note_rounded(value, path, quantizer)
            node = self.call_module(quantizer, self.graph.get_attr(path))
            self.learned.add(node)
            return node
        raise TypeError(f"a {type(value).__name__} is no tensor")

    def _buffer(self, value: Constant) -> fx.Node:
        for array, node in self._buffers.setdefault(value.origin, []):
            if array is value.array:
                return node
        path = self.path(value.origin)
        # Not persistent: it is in the ONNX file, and nothing changes it.
        self.root.register_buffer(path, to_torch_tensor(value.array), persistent=False)
        node = self.graph.get_attr(path)
        self._buffers[value.origin].append((value.array, node))
        return node

    def parameter(self, value: Constant | RoundedConstant, path: str) -> nn.Parameter:
        """A parameter with the constant's content; one that several layers read is shared.

        Args:
            value: The constant.
            path: Where the parameter will be; noted for floats. Rounded constants are noted by their user.
        """
        if isinstance(value, Constant):
            self.note_float(path, value)
        key = (value.origin, *value.layout)
        if key not in self._parameters:
            self._parameters[key] = nn.Parameter(to_torch_tensor(value.array))
        return self._parameters[key]

    def free_parameter(self, value: Constant) -> fx.Node:
        """A parameter of the root that an operator without a module reads."""
        path = self.path(value.origin)
        self.root.register_parameter(path, self.parameter(value, path))
        node = self.graph.get_attr(path)
        self.learned.add(node)
        return node

    def note_rounded(self, value: RoundedConstant, path: str, quantizer: str) -> None:
        """Remember where the master of a rounded constant is written."""
        self.slots.append(
            Slot(
                path=path,
                origin=value.origin,
                undo=value.undo,
                quantizer=quantizer if value.stored_as_integers else None,
                rounding=value.rounding,
                digest=None if value.given else digest(value.array),
            )
        )

    def quantizer(self, rounding: Rounding, path: str, *, weight: bool) -> tuple[FakeQuantize, str]:
        """The module that rounds so and its path; ONNX nodes that share scale and zero point share it.

        Args:
            rounding: How it rounds.
            path: Where the caller puts it if it is new.
            weight: Whether it rounds weights, which have ranges of their own.
        """
        key = (*rounding.key, weight)
        if key not in self._quantizers:
            low, high = self._weight_range(rounding) if weight else INTEGER_RANGES[rounding.dtype]
            module = FakeQuantize(
                to_torch_tensor(rounding.scale),
                to_torch_tensor(rounding.zero_point),
                qmin=low,
                qmax=high,
                axis=rounding.axis,
                block_size=rounding.block_size,
                batched=not weight,
            )
            self._quantizers[key] = module, path
            self.note_rounding(rounding, path)
        return self._quantizers[key]

    def root_quantizer(self, rounding: Rounding, name: str, *, weight: bool) -> str:
        """Path of the quantizer of a value or of a constant that no layer holds."""
        module, path = self.quantizer(rounding, self.path(name), weight=weight)
        if "." not in path:
            self.root.add_module(path, module)
        return path

    def quantizer_at(self, path: str) -> FakeQuantize:
        """The quantizer at ``path``."""
        module = self.root.get_submodule(path)
        assert isinstance(module, FakeQuantize)  # noqa: S101 - for the type checker
        return module

    def note_rounding(self, rounding: Rounding, path: str) -> None:
        """Remember where scale and zero point of the quantizer at ``path`` are written."""
        self.slots.append(
            Slot(path=f"{path}.scale", origin=rounding.scale_origin, digest=digest(rounding.scale))
        )
        if rounding.zero_origin:
            self.slots.append(
                Slot(
                    path=f"{path}.zero_point", origin=rounding.zero_origin, digest=digest(rounding.zero_point)
                )
            )

    def _weight_range(self, rounding: Rounding) -> tuple[int, int]:
        """Integers that weights may take: no more bits than the file uses, nor -128 where it never does."""
        low, high = INTEGER_RANGES[rounding.dtype]
        peaks = self._peaks.get(rounding.dtype)
        if low == 0 or peaks is None or rounding.zero_point.any():
            return low, high
        half = (high + 1) // 2
        if max(-peaks[0], peaks[1]) <= half:  # one bit is left out for CPUs whose 8-bit sums saturate
            return -max(-peaks[0], peaks[1]), max(-peaks[0], peaks[1])
        return max(low, -high if peaks[0] > low else low), high

    def note_float(self, path: str, value: Constant) -> None:
        """Remember where a float tensor that training changes is written."""
        self.slots.append(Slot(path=path, origin=value.origin, undo=value.undo, digest=digest(value.array)))

    def given_master(self, initializer: str, value: str, shape: tuple[int, ...]) -> Array | None:
        """The caller's float weights for a tensor stored as integers.

        Raises:
            PassRequirementError: they have another shape.
        """
        for name in (initializer, initializer.removesuffix("_quantized"), value):
            if name in self.float_weights:
                self.float_weights_used.add(name)
                given = np.asarray(self.float_weights[name], dtype=np.float32)
                if given.shape != shape:
                    raise PassRequirementError(
                        f'float_weights: "{name}" has shape {given.shape}, the model stores {shape}'
                    )
                return given
        return None

    def check_float_weights(self) -> None:
        """Refuse float weights that belong nowhere.

        Raises:
            PassRequirementError: names them.
        """
        unused = sorted(self.float_weights.keys() - self.float_weights_used)
        if unused:
            raise PassRequirementError(
                f"float_weights: the model stores no tensor as integers that is called {', '.join(unused[:10])}; "
                "give the names of its integer initializers"
            )

    def read(self, name: str) -> Value | None:
        """The value of an ONNX name; ``None`` for an optional input that is not given."""
        return self.values[name] if name else None


def _largest_integers(model: ModelProto) -> dict[str, tuple[int, int]]:
    """Smallest and largest stored integer over all quantized weights, by type."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    peaks: dict[str, tuple[int, int]] = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        array = numpy_helper.to_array(tensors[node.input[0]])
        name = array.dtype.name
        if name in INTEGER_RANGES and array.size:
            low, high = peaks.get(name, (0, 0))
            wide = array.astype(np.int64)
            peaks[name] = (min(low, int(wide.min())), max(high, int(wide.max())))
    return peaks
