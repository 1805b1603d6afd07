"""Layers that are float between integers, and onnxruntime's way of making integers of them too.

When it loads a Q/DQ graph, its ``WeightBiasQuantization`` rounds the float weights of any convolution or ``Gemm`` that
stands between DQ and Q, to int8 with one scale for all of them, and its bias to int32. A layer that was left in float
for its accuracy is then worse than a quantized one would have been. It looks from the layer through ReLU and Clip to a
Q, and no further. So a ``LeakyRelu`` stands behind such layers: slope 0 is ReLU, slope 1 changes nothing, and either is
computed within the convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import ModelProto, NodeProto, TensorProto, helper

from deploycnn.graph.model import initializers
from deploycnn.graph.names import names_taken, unique
from deploycnn.quantization.structure import Structure, has_kernel

#: What ``WeightBiasQuantization`` looks at.
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm"})

#: What it looks through.
_CLIPS = frozenset({"Relu", "Clip"})


def guard_float_layers(model: ModelProto) -> int:
    """Put a ``LeakyRelu`` behind every layer that onnxruntime would make integers of, in place; return how many."""
    return _guard(model, requantized_layers(model))


def guard_operators(model: ModelProto) -> int:
    """The same behind operators that onnxruntime would fuse into integer kernels that lack their attributes."""
    lacking = [node for node in model.graph.node if not has_kernel(node)]
    if not lacking:
        return 0
    graph = Structure(model)
    return _guard(
        model, [node for node in lacking if _from_integers(graph, node) and _to_integers(graph, node)]
    )


def _guard(model: ModelProto, nodes: Iterable[NodeProto]) -> int:
    taken, changed = names_taken(model.graph), 0
    for node in nodes:
        made = node.output[0]
        (reader, *others) = [other for other in model.graph.node if made in other.input]
        if reader.op_type == "Relu" and not others:
            reader.op_type = "LeakyRelu"
            reader.attribute.append(helper.make_attribute("alpha", 0.0))
        else:
            name, value = unique(f"{node.name}/float", taken), unique(f"{made}_float", taken)
            taken |= {name, value}
            node.output[0] = value
            guard = helper.make_node("LeakyRelu", [value], [made], name=name, alpha=1.0)
            model.graph.node.insert(list(model.graph.node).index(node) + 1, guard)
        changed += 1
    return changed


def requantized_layers(model: ModelProto) -> list[NodeProto]:
    """Layers with float weights that onnxruntime makes integers of when it loads a Q/DQ graph."""
    return list(_requantized(model))


def _requantized(model: ModelProto) -> Iterator[NodeProto]:
    graph = Structure(model)
    weights = initializers(model.graph)
    for node in graph.nodes:
        if (
            node.op_type in _LAYERS
            and node.input[1] in weights
            and weights[node.input[1]].data_type == TensorProto.FLOAT
            and _from_integers(graph, node)
            and _to_integers(graph, node)
        ):
            yield node


def _from_integers(graph: Structure, node: NodeProto) -> bool:
    """Whether a DQ stands before it. onnxruntime moves DQ behind what only moves data."""
    maker = graph.made_by.get(node.input[0])
    while maker is not None and graph.moves(maker):
        maker = graph.made_by.get(maker.input[0])
    # One of activations: constants were folded.
    return maker is not None and maker.op_type == "DequantizeLinear"


def _to_integers(graph: Structure, node: NodeProto) -> bool:
    """Whether no node but a Q reads what it makes, clipped or moved or as it is. Graph outputs do not count there."""
    value = node.output[0]
    while readers := graph.read_by.get(value, ()):
        if all(reader.op_type == "QuantizeLinear" for reader in readers):
            return True
        if len(readers) != 1 or len(readers[0].output) != 1:
            return False
        if readers[0].op_type not in _CLIPS and not graph.moves(readers[0]):
            return False
        value = readers[0].output[0]
    return False
