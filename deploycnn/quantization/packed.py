"""How integer weights are stored where no runtime computes with them as they are.

DequantizeLinear of INT4 (operator set 21) runs in onnxruntime and OpenVINO, but onnxruntime 1.32 does not fuse it: the
convolution behind it then computes in float. A Cast to INT8 in front of DequantizeLinear is folded when the file is
loaded: the file keeps its 4-bit size, and onnxruntime runs the 8-bit graph. Numbers are the same; in OpenVINO only
these were compared, not the speed.

Weights only: DequantizeLinear is worse still, because onnxruntime then converts the weights at every call; a Cast and
a product of constants are folded when the file is loaded. All other tools here know Q/DQ: ``unpack`` gives it to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploycnn.graph.cleanup import remove_unused
from deploycnn.graph.model import consumers, copy_of, initializers, producers, sort_nodes
from deploycnn.graph.names import unique
from deploycnn.quantization.pools import is_mean
from deploycnn.quantization.selections import is_selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What the constants of convolutions and matrix products take.

    Attributes:
        stored_bytes: Integers and their scales.
        float_bytes: The same in float32.
        four_bit_share: Share of the numbers that have 4 bits, in [0, 1].
    """

    stored_bytes: int
    float_bytes: int
    four_bit_share: float


def pack(model: ModelProto) -> int:
    """Bring a Q/DQ graph into the form that runtimes load well; return how many weights were changed.

    4-bit weights of integer layers are widened; where no activation is rounded, weights are folded.
    """
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return widen(model)
    return fold(model)


def packed(model: ModelProto) -> ModelProto:
    """A packed copy."""
    made = copy_of(model)
    pack(made)
    return made


def unpack(model: ModelProto) -> int:
    """Undo :func:`pack`; return how many weights were changed."""
    return narrow(model) + unfold(model)


def measure(model: ModelProto) -> Weights:
    """Count the integer weights of a Q/DQ graph: stored integers of more than one axis, without those added to it."""
    model = copy_of(model)
    unpack(model)
    weights = initializers(model.graph)
    stored = numbers = four = 0
    for node in _dequantizers(model):
        tensor = weights.get(node.input[0])
        if tensor is None or len(tensor.dims) < 2:
            continue
        if is_selection(array := numpy_helper.to_array(tensor)) or is_mean(array):
            continue
        size = int(np.prod(tensor.dims))
        narrowed = tensor.data_type in {TensorProto.INT4, TensorProto.UINT4}
        scale = weights.get(node.input[1])
        stored += (size + 1) // 2 if narrowed else size
        stored += 0 if scale is None else 4 * int(np.prod(scale.dims))
        numbers, four = numbers + size, four + size * narrowed
    return Weights(
        stored_bytes=stored, float_bytes=4 * numbers, four_bit_share=four / numbers if numbers else 0.0
    )


def widen(model: ModelProto) -> int:
    """Put a Cast to INT8 behind every INT4 initializer that is dequantized; return how many."""
    graph = model.graph
    weights = initializers(graph)
    taken = {name for node in graph.node for name in (*node.input, *node.output, node.name)} | set(weights)
    made: dict[str, str] = {}
    for node in _dequantizers(model):
        source = node.input[0]
        if source not in weights or weights[source].data_type != TensorProto.INT4:
            continue
        if source not in made:
            made[source] = unique(f"{source}_int8", taken)
            name = unique(f"{source}_Cast", taken)
            taken |= {made[source], name}
            graph.node.append(helper.make_node("Cast", [source], [made[source]], name, to=TensorProto.INT8))
        node.input[0] = made[source]
        if len(node.input) > 2 and node.input[2]:
            _set_type(weights[node.input[2]], TensorProto.INT8)
    sort_nodes(model)
    return len(made)


def narrow(model: ModelProto) -> int:
    """Undo :func:`widen`: DequantizeLinear reads INT4 itself; return how many Casts went."""
    graph = model.graph
    weights, made_by = initializers(graph), producers(graph)
    casts = set()
    for node in _dequantizers(model):
        cast = made_by.get(node.input[0])
        if cast is None or cast.op_type != "Cast" or cast.input[0] not in weights:
            continue
        if weights[cast.input[0]].data_type != TensorProto.INT4:
            continue
        casts.add(cast.name)
        node.input[0] = cast.input[0]
        if len(node.input) > 2 and node.input[2]:
            _set_type(weights[node.input[2]], TensorProto.INT4)
    remove_unused(model)
    return len(casts)


def fold(model: ModelProto) -> int:
    """Put Cast and Mul in place of DequantizeLinear of weights; return how many.

    For graphs that compute in float. onnxruntime leaves DequantizeLinear alone when it loads a graph, so weights are
    converted at every call; a Cast and a product of constants are computed once.
    """
    graph = model.graph
    weights, read_by = initializers(graph), consumers(graph)
    taken = {name for node in graph.node for name in (*node.input, *node.output, node.name)} | set(weights)
    count = 0
    for node in _dequantizers(model):
        if any(name and name not in weights for name in node.input):
            continue
        has_zero = len(node.input) > 2 and node.input[2]
        if has_zero and numpy_helper.to_array(weights[node.input[2]]).astype(np.int32).any():
            continue
        if not read_by.get(node.output[0]):
            continue
        scale = numpy_helper.to_array(weights[node.input[1]])
        axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
        rank = len(weights[node.input[0]].dims)
        if scale.ndim:
            scale = scale.reshape([-1 if index == axis % rank else 1 for index in range(rank)])
        real = unique(f"{node.input[0]}_real", taken)
        wide = unique(f"{node.input[1]}_wide", taken)
        taken |= {real, wide}
        graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), wide))
        graph.node.append(
            helper.make_node("Cast", [node.input[0]], [real], f"{node.name}_Cast", to=TensorProto.FLOAT)
        )
        graph.node.append(helper.make_node("Mul", [real, wide], [node.output[0]], f"{node.name}_Mul"))
        graph.node.remove(node)
        count += 1
    sort_nodes(model)
    remove_unused(model)
    return count


def unfold(model: ModelProto) -> int:
    """Undo :func:`fold`: DequantizeLinear in place of each Cast and Mul of constants; return how many."""
    graph = model.graph
    weights, made_by = initializers(graph), producers(graph)
    taken = {name for node in graph.node for name in (*node.input, *node.output, node.name)} | set(weights)
    count = 0
    for node in list(graph.node):
        cast = made_by.get(node.input[0]) if node.op_type == "Mul" else None
        if cast is None or cast.op_type != "Cast" or node.input[1] not in weights:
            continue
        integers = weights.get(cast.input[0])
        if integers is None or integers.data_type not in {TensorProto.INT4, TensorProto.INT8}:
            continue
        scale = numpy_helper.to_array(weights[node.input[1]])
        axis = _long_axis(scale, len(integers.dims))
        if axis is None:
            continue
        flat = unique(f"{cast.input[0]}_scale", taken)
        taken.add(flat)
        graph.initializer.append(numpy_helper.from_array(scale.reshape(-1 if scale.ndim else ()), flat))
        made = helper.make_node(
            "DequantizeLinear", [cast.input[0], flat], [node.output[0]], node.name.removesuffix("_Mul")
        )
        if scale.ndim:
            made.attribute.append(helper.make_attribute("axis", axis))
        graph.node.append(made)
        graph.node.remove(node)
        count += 1
    sort_nodes(model)
    remove_unused(model)
    return count


def _long_axis(scale: npt.NDArray[np.generic], rank: int) -> int | None:
    """The one axis along which scales differ, 0 where there is none; ``None`` where there are several."""
    if scale.ndim not in {0, rank}:
        return None
    long = [axis for axis, size in enumerate(scale.shape) if size > 1]
    return None if len(long) > 1 else long[0] if long else 0


def _dequantizers(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == "DequantizeLinear"]


def _set_type(tensor: TensorProto, kind: int) -> None:
    values = numpy_helper.to_array(tensor).astype(np.int32)
    tensor.CopyFrom(helper.make_tensor(tensor.name, kind, values.shape, values.reshape(-1).tolist()))
