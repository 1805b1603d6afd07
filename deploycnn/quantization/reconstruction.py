"""The problems that layer-wise recovery solves: what a layer of the deployed graph gets, and what it should give.

Inputs come from the quantized graph, with all earlier layers as they were already decided, so that each layer also
mends what those before it did (the asymmetric reconstruction of AdaRound, Nagel et al. 2020, section 3.3). Targets
come from the float graph. Both are taken at a sample of output positions, where a convolution is a plain matrix
product of the patch under its kernel.

Legend: S samples (image and position), G groups, K inputs of one output (channels x kernel), O outputs of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from deploycnn.graph.model import attribute, consumers, initializers, names_used, producers

Array = npt.NDArray[Any]
Reals = npt.NDArray[np.float32]
Activation = Literal["none", "clip", "silu", "hardswish"]

_COMPUTE = frozenset({"Conv", "Gemm", "MatMul"})

#: Axes of the weights of a convolution of images.
_CONV_RANK = 4

#: Attributes of HardSigmoid and their defaults.
_HARD_SIGMOID = (("alpha", 0.2), ("beta", 0.5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A weight as the Q/DQ graph stores it.

    Attributes:
        name: Initializer of the integers.
        integers: Their values, in the shape of the weight.
        scale: Shape () or (channels,).
        zero_point: Like ``scale``.
        axis: Of the channels; ``None`` for one scale in all.
        low: Smallest integer in use: symmetric formats leave out the most negative one.
        high: Largest integer.
    """

    name: str
    integers: npt.NDArray[np.int32]
    scale: Reals
    zero_point: npt.NDArray[np.int32]
    axis: int | None
    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A convolution or matrix product whose weight is stored as integers.

    Attributes:
        node: Its name, in both graphs.
        op_type: "Conv", "Gemm" or "MatMul".
        initializer: Name of the float weight.
        weight: The float weight, as the node takes it.
        stored: The same as integers.
        bias: As deployed, shape (outputs,); zeros where there is none.
        source: Value of the quantized graph that it reads.
        addend: Value of the quantized graph that is added to its output before the activation, if any.
        target: Value of the float graph that it should give, before the activation and without the addend.
        target_addend: Value of the float graph that is added to it.
        activation: What follows.
        bounds: Of a ``clip``.
    """

    node: NodeProto
    op_type: str
    initializer: str
    weight: Reals
    stored: Constant
    bias: Reals
    source: str
    addend: str | None
    target: str
    target_addend: str | None
    activation: Activation
    bounds: tuple[float, float]


def find_layers(full: ModelProto, quantized: ModelProto) -> list[Layer]:
    """Layers of ``quantized`` with integer weights that ``full`` has in float, in graph order.

    Convolutions of other than images are left out, and weights that one layer takes otherwise than another.

    Args:
        full: The float graph that was quantized.
        quantized: With Q/DQ; its convolutions and matrix products have the names that they have in ``full``.
    """
    graph = full.graph
    weights, read_by = initializers(graph), consumers(graph)
    deployed = {node.name: node for node in quantized.graph.node}
    latest = _latest_layer(graph)
    view = _Constants(quantized)
    layers = []
    for index, node in enumerate(graph.node):
        twin = deployed.get(node.name)
        if node.op_type not in _COMPUTE or twin is None or node.input[1] not in weights:
            continue
        stored = view.integers(twin.input[1])
        if stored is None:
            continue
        weight = numpy_helper.to_array(weights[node.input[1]]).astype(np.float32)
        if node.op_type == "Conv" and weight.ndim != _CONV_RANK:
            continue
        addend, behind = _addend(node, read_by, latest, index)
        activation, bounds = _activation(behind, read_by, weights)
        layers.append(
            Layer(
                node=twin,
                op_type=node.op_type,
                initializer=node.input[1],
                weight=weight,
                stored=stored,
                bias=_bias(twin, view, weight, node.op_type),
                source=twin.input[0],
                addend=_twin_of_addend(deployed, read_by, node, addend),
                target=node.output[0],
                target_addend=addend,
                activation=activation,
                bounds=bounds,
            )
        )
    axes: dict[str, set[int | None]] = {}
    for layer in layers:
        axes.setdefault(layer.initializer, set()).add(layer.stored.axis)
    return [layer for layer in layers if len(axes[layer.initializer]) == 1]


class _Constants:
    """Constants of a Q/DQ graph, integers through DequantizeLinear."""

    def __init__(self, model: ModelProto) -> None:
        self.weights = initializers(model.graph)
        self.made_by = producers(model.graph)

    def integers(self, value: str) -> Constant | None:
        """The integers behind ``value``; ``None`` where it is something else."""
        node = self.made_by.get(value)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        name = node.input[0]
        cast_from = self.made_by.get(name)
        if cast_from is not None and cast_from.op_type == "Cast":
            name = cast_from.input[0]
        if name not in self.weights or any(item and item not in self.weights for item in node.input[1:]):
            return None
        tensor = self.weights[name]
        scale = numpy_helper.to_array(self.weights[node.input[1]]).astype(np.float32)
        zero_point = np.zeros(scale.shape, np.int32)
        if len(node.input) > 2 and node.input[2]:
            zero_point = numpy_helper.to_array(self.weights[node.input[2]]).astype(np.int32)
        integers = numpy_helper.to_array(tensor).astype(np.int32)
        low, high = INTEGER_BOUNDS.get(tensor.data_type, (0, 0))
        if not zero_point.any() and low < 0 and integers.min() > low:
            low += 1
        return Constant(
            name=name,
            integers=integers,
            scale=scale,
            zero_point=zero_point,
            axis=int(cast("int", attribute(node, "axis", 1))) if scale.ndim else None,
            low=low,
            high=high,
        )

    def real(self, value: str) -> Reals | None:
        """A constant in real units, integers or not; ``None`` where it is computed."""
        if value in self.weights:
            return numpy_helper.to_array(self.weights[value]).astype(np.float32)
        stored = self.integers(value)
        return None if stored is None else dequantize(stored, stored.integers)


#: Smallest and largest value of the integer types that weights have.
INTEGER_BOUNDS: Mapping[int, tuple[int, int]] = {
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT32: (-(2**31), 2**31 - 1),
}


def along(values: Array, axis: int | None, rank: int) -> Array:
    """Per-channel ``values`` in a shape that broadcasts against a tensor of ``rank`` dimensions."""
    if axis is None or values.ndim == 0:
        return values.reshape(())
    return values.reshape([-1 if index == axis % rank else 1 for index in range(rank)])


def dequantize(stored: Constant, integers: Array) -> Reals:
    """``(integers - zero_point) * scale``."""
    rank = integers.ndim
    shifted = (integers - along(stored.zero_point, stored.axis, rank)).astype(np.float32)
    return shifted * along(stored.scale, stored.axis, rank)


def _bias(node: NodeProto, view: _Constants, weight: Reals, op_type: str) -> Reals:
    outputs = weight.shape[0] if op_type == "Conv" or attribute(node, "transB", 0) else weight.shape[-1]
    found = view.real(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return np.zeros(outputs, np.float32) if found is None else np.broadcast_to(found.reshape(-1), (outputs,))


def _addend(
    node: NodeProto, read_by: Mapping[str, list[NodeProto]], latest: Mapping[str, int], index: int
) -> tuple[str | None, str]:
    """What is added to a node's output where all that follows it is that addition, and the sum's name.

    Nothing that is decided after the node may enter the addend.
    """
    output = node.output[0]
    readers = read_by.get(output, [])
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None, output
    others = [name for name in readers[0].input if name != output]
    if len(others) != 1 or latest.get(others[0], index) >= index:
        return None, output
    return others[0], readers[0].output[0]


def _latest_layer(graph: GraphProto) -> dict[str, int]:
    """Value -> position of the last convolution or matrix product that it depends on, -1 for none."""
    latest = dict.fromkeys((value.name for value in graph.input), -1)
    for index, node in enumerate(graph.node):
        depends = max((latest.get(name, -1) for name in names_used(node)), default=-1)
        own = index if node.op_type in _COMPUTE else -1
        latest.update(dict.fromkeys(node.output, max(depends, own)))
    return latest


def _twin_of_addend(
    deployed: Mapping[str, NodeProto],
    read_by: Mapping[str, list[NodeProto]],
    node: NodeProto,
    addend: str | None,
) -> str | None:
    """What the quantized graph adds in the place of ``addend``."""
    if addend is None:
        return None
    addition = read_by[node.output[0]][0]
    return str(deployed[addition.name].input[list(addition.input).index(addend)])


def _activation(
    value: str, read_by: Mapping[str, list[NodeProto]], weights: Mapping[str, TensorProto]
) -> tuple[Activation, tuple[float, float]]:
    """The activation through which alone ``value`` is read."""
    everything = (-np.inf, np.inf)
    readers = read_by.get(value, [])
    kinds = sorted(reader.op_type for reader in readers)
    if kinds == ["Relu"]:
        return "clip", (0.0, np.inf)
    if kinds == ["Clip"]:
        low, high = (_scalar(readers[0], place, weights) for place in (1, 2))
        if low is not None and high is not None:
            return "clip", (low, high)
    if kinds == ["HardSwish"]:
        return "hardswish", everything
    if kinds in (["Mul", "Sigmoid"], ["HardSigmoid", "Mul"]):
        gate, product = sorted(readers, key=lambda reader: reader.op_type == "Mul")
        slope, offset = (cast("float", attribute(gate, name, default)) for name, default in _HARD_SIGMOID)
        if set(product.input) == {value, gate.output[0]} and len(read_by.get(gate.output[0], [])) == 1:
            if gate.op_type == "Sigmoid":
                return "silu", everything
            if abs(slope - 1 / 6) < 1e-6 and offset == 0.5:
                return "hardswish", everything
    return "none", everything


def _scalar(node: NodeProto, place: int, weights: Mapping[str, TensorProto]) -> float | None:
    absent = -np.inf if place == 1 else np.inf
    if len(node.input) <= place or not node.input[place]:
        return float(absent)
    name = node.input[place]
    return float(numpy_helper.to_array(weights[name]).item()) if name in weights else None
