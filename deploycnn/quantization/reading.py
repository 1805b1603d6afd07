"""Read any Q/DQ graph: the float graph inside it, and what is rounded on which edge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.cleanup import simplify
from deploycnn.graph.model import attribute, infer_shapes, initializers, value_types
from deploycnn.graph.names import name_nodes
from deploycnn.graph.opset import raise_opset
from deploycnn.quantization.insertion import MIN_OPSET
from deploycnn.quantization.lifting import lift_clips, lift_pads
from deploycnn.quantization.structure import COMPUTE

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})

#: A node's name and the position of one of its inputs.
Edge = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """A Q/DQ pair, or a constant's DequantizeLinear.

    Attributes:
        node: Name of the DequantizeLinear.
        quantizer: Name of the QuantizeLinear; empty where integers are stored.
        dtype: "uint8", "int8", "int4", "int32", ...
        scale: Shape () or (channels,); ``None`` where it is computed.
        zero_point: Likewise, zeros where it is left out.
        axis: Of the channels.
        integers: A constant's integers.
    """

    node: str
    quantizer: str
    dtype: str
    scale: npt.NDArray[np.float64] | None
    zero_point: npt.NDArray[np.int64] | None
    axis: int
    integers: npt.NDArray[np.int64] | None = None

    @property
    def per_channel(self) -> bool:
        """Whether there is a scale for each channel (one channel included, if it is written as a vector)."""
        return self.scale is not None and self.scale.ndim == 1 and self.scale.size > 1

    def same_numbers(self, other: Rounding) -> bool:
        """Whether scale and zero point are those of ``other``."""
        return self.dtype == other.dtype and all(
            mine is not None and theirs is not None and np.array_equal(np.ravel(mine), np.ravel(theirs))
            for mine, theirs in ((self.scale, other.scale), (self.zero_point, other.zero_point))
        )


@dataclass(slots=True, kw_only=True)
class Reading:
    """What ``read_qdq`` finds.

    Attributes:
        model: The float graph: no Q/DQ, no casts between float types, real numbers as float32, shapes inferred, nodes
            named as in the file.
        activations: Q/DQ pairs by the edge that reads through them.
        constants: Integer constants by the edge that reads them.
        outputs: Q/DQ pairs in front of graph outputs, by value of ``model``.
        quantizers: QuantizeLinear nodes by the value (of ``model``) that they round.
        again: QuantizeLinear nodes that round what is rounded already.
        lifted: Nodes that the file does not have -> the node whose part they are (``lifting.py``).
    """

    model: ModelProto = field(default_factory=ModelProto)
    activations: dict[Edge, Rounding] = field(default_factory=dict)
    constants: dict[Edge, Rounding] = field(default_factory=dict)
    outputs: dict[str, Rounding] = field(default_factory=dict)
    quantizers: dict[str, list[str]] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)
    lifted: dict[str, str] = field(default_factory=dict)


def read_qdq(model: ModelProto) -> Reading:
    """Take a Q/DQ graph apart.

    Raises:
        PassRequirementError: its float graph cannot be brought to opset 13.
    """
    named = ModelProto()
    named.CopyFrom(model)
    name_nodes(named)
    source = simplify(named)
    reading = Reading(lifted=lift_pads(source) | lift_clips(source))
    _Stripper(source, reading).strip()
    _widen(reading.model)
    reading.model = infer_shapes(simplify(raise_opset(reading.model, MIN_OPSET)))
    return reading


def _widen(model: ModelProto) -> None:
    """Let all real numbers be float32: placement asks what is computed, not how finely, and shapes are inferred."""
    for tensor in model.graph.initializer:
        if tensor.data_type in _FLOATS:
            content = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(content, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in _FLOATS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        for held in node.attribute:
            if node.op_type == "Cast" and held.name == "to" and held.i in _FLOATS:
                held.i = TensorProto.FLOAT


class _Stripper:
    """Replaces every Q and DQ by its input, and notes what it was."""

    def __init__(self, source: ModelProto, reading: Reading) -> None:
        self._source = source
        self._reading = reading
        self._constants = initializers(source.graph)
        self._types = value_types(infer_shapes(source))
        #: Values that layers with weights read.
        self._by_layers = {
            name for node in source.graph.node if node.op_type in COMPUTE for name in node.input
        }
        #: Value -> what stands for it in the float graph.
        self._alias: dict[str, str] = {}
        self._quantized: dict[str, NodeProto] = {}
        self._pairs: dict[str, Rounding] = {}
        self._stored: dict[str, Rounding] = {}

    def strip(self) -> None:
        """Fill in ``reading``."""
        target = self._reading.model
        target.CopyFrom(self._source)
        del target.graph.node[:], target.graph.value_info[:]
        for node in self._source.graph.node:
            if node.op_type == "QuantizeLinear":
                self._quantizer(node)
            elif node.op_type == "DequantizeLinear":
                self._dequantizer(node, target)
            elif node.op_type == "Cast" and self._only_precision(node):
                self._cast(node)
            else:
                self._keep(node, target)
        for output in target.graph.output:
            value = self._resolve(output.name)
            if output.name in self._pairs:
                self._reading.outputs[value] = self._pairs[output.name]
            output.name = value

    def _resolve(self, name: str) -> str:
        while name in self._alias:
            name = self._alias[name]
        return name

    def _quantizer(self, node: NodeProto) -> None:
        self._quantized[node.output[0]] = node
        if node.input[0] in self._pairs:
            self._reading.again.append(node.name)
        elif node.input[0] not in self._constants:
            self._reading.quantizers.setdefault(self._resolve(node.input[0]), []).append(node.name)
        self._alias[node.output[0]] = node.input[0]

    def _dequantizer(self, node: NodeProto, target: ModelProto) -> None:
        name = node.output[0]
        quantizer = self._quantized.get(node.input[0])
        if node.input[0] in self._constants:
            rounding = self._rounding(node, None)
            self._stored[name] = rounding
            target.graph.initializer.append(numpy_helper.from_array(_real(rounding), name))
        elif quantizer is not None and quantizer.input[0] in self._constants:
            self._stored[name] = self._rounding(node, quantizer)
            self._alias[name] = quantizer.input[0]
        else:
            if quantizer is not None:
                self._pairs[name] = self._rounding(node, quantizer)
            self._alias[name] = node.input[0]

    def _only_precision(self, node: NodeProto) -> bool:
        """Whether a cast goes from one float type to another, and hides no integers from a layer with weights."""
        source = self._types.get(node.input[0])
        return (
            source is not None
            and source.type.tensor_type.elem_type in _FLOATS
            and attribute(node, "to", 0) in _FLOATS
            and node.output[0] not in self._by_layers
        )

    def _cast(self, node: NodeProto) -> None:
        """The value is the same in another precision, so that it is rounded where it was before."""
        self._alias[node.output[0]] = node.input[0]
        if node.input[0] in self._pairs:
            self._pairs[node.output[0]] = self._pairs[node.input[0]]

    def _keep(self, node: NodeProto, target: ModelProto) -> None:
        kept = target.graph.node.add()
        kept.CopyFrom(node)
        for position, name in enumerate(node.input):
            kept.input[position] = self._resolve(name)
            if name in self._pairs:
                self._reading.activations[node.name, position] = self._pairs[name]
            elif name in self._stored:
                self._reading.constants[node.name, position] = self._stored[name]

    def _rounding(self, node: NodeProto, quantizer: NodeProto | None) -> Rounding:
        scale = self._array(node, 1)
        zero_point = self._array(node, 2) if len(node.input) > 2 and node.input[2] else np.zeros(())
        return Rounding(
            node=node.name,
            quantizer=quantizer.name if quantizer is not None else "",
            dtype=self._dtype(node, quantizer),
            scale=None if scale is None else scale.astype(np.float64),
            zero_point=None if zero_point is None else zero_point.astype(np.int64),
            axis=cast("int", attribute(node, "axis", 1)),
            integers=None if quantizer is not None else self._integers(node),
        )

    def _integers(self, node: NodeProto) -> npt.NDArray[np.int64] | None:
        array = self._array(node, 0)
        return None if array is None else array.astype(np.int64)

    def _array(self, node: NodeProto, position: int) -> npt.NDArray[np.generic] | None:
        tensor = self._constants.get(node.input[position])
        return None if tensor is None else numpy_helper.to_array(tensor)

    def _dtype(self, node: NodeProto, quantizer: NodeProto | None) -> str:
        """The integers' type, from the constant, the zero point or the attribute that gives it."""
        names = [node.input[0]] if quantizer is None else []
        names += [
            holder.input[2] for holder in (node, quantizer) if holder is not None and len(holder.input) > 2
        ]
        for name in names:
            if name in self._constants:
                return str(helper.tensor_dtype_to_np_dtype(self._constants[name].data_type))
        stated = cast("int", attribute(quantizer, "output_dtype", 0)) if quantizer is not None else 0
        return str(helper.tensor_dtype_to_np_dtype(stated)) if stated else "uint8"


def _real(rounding: Rounding) -> npt.NDArray[np.float32]:
    """The real numbers of a stored constant; of unknown scale, its integers.

    Raises:
        PassRequirementError: there is another number of scales than of channels.
    """
    integers, scale, zero_point = rounding.integers, rounding.scale, rounding.zero_point
    assert integers is not None  # noqa: S101 - it is stored
    if scale is None or zero_point is None:
        return integers.astype(np.float32)
    if scale.ndim == 1 and scale.size > 1 and integers.ndim:
        shape = [-1 if index == rounding.axis % integers.ndim else 1 for index in range(integers.ndim)]
        if scale.size == integers.shape[rounding.axis % integers.ndim]:
            scale = scale.reshape(shape)
            zero_point = zero_point.reshape(shape) if zero_point.ndim and zero_point.size > 1 else zero_point
    elif scale.size == 1:
        scale, zero_point = scale.reshape(()), zero_point.reshape(-1)[:1].reshape(())
    elif scale.ndim == integers.ndim:
        scale, zero_point = (_unblocked(held, integers.shape) for held in (scale, zero_point))
    try:
        return np.asarray((integers - zero_point) * scale, dtype=np.float32)
    except ValueError as error:
        raise PassRequirementError(
            f'node "{rounding.node}": {scale.size} scales for values of shape {integers.shape}; quantize the model anew'
        ) from error


def _unblocked(held: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Scales or zero points of blocks, repeated for each element (``block_size`` of operator set 21)."""
    for axis, (count, size) in enumerate(zip(held.shape, shape, strict=False)):
        if 1 < count < size:
            held = np.repeat(held, -(-size // count), axis=axis).take(range(size), axis=axis)
    return held
