"""First layers in a shape that onnxruntime's fast integer convolution takes.

On x86 it has two: one that copies windows into a matrix, and one that reads the image in place. The latter wants input
channels in fours and output channels in eights (``MlasConvSym``), which images do not have. So they get channels of
zeros, and kernels get zeros for these. Exact. The channels are added to the rounded image (``RulePack.on_integers``),
which is a copy of bytes. A first layer that stays float gives them back: there they cost 4 to 6% of ResNet-18.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from deploycnn.graph.cleanup import remove_unused
from deploycnn.graph.constants import replace_constant
from deploycnn.graph.model import attribute, infer_shapes, initializers, sort_nodes
from deploycnn.graph.names import names_taken, unique
from deploycnn.quantization.structure import Structure

#: What ``MlasConvSym`` asks of input and output channels on x86.
_INPUTS, _OUTPUTS = 4, 8


def align_first_layers(model: ModelProto) -> int:
    """Rewrite convolutions that read the model's input, in place; return how many.

    Args:
        model: A simplified float32 model whose nodes are named and whose shapes are inferred.
    """
    weights = initializers(model.graph)
    inputs = {value.name for value in model.graph.input}
    taken, changed = names_taken(model.graph), 0
    for node in list(model.graph.node):
        if node.op_type != "Conv" or node.input[0] not in inputs or node.input[1] not in weights:
            continue
        outputs, channels, *kernel = weights[node.input[1]].dims
        missing = -channels % _INPUTS
        if len(kernel) != 2 or attribute(node, "group", 1) != 1 or outputs % _OUTPUTS or not missing:
            continue
        amounts = unique(f"{node.name}/pads", taken)
        padded, output = unique(f"{node.name}/Pad", taken), unique(f"{node.name}/Pad_output", taken)
        taken |= {amounts, padded, output}
        weight = numpy_helper.to_array(weights[node.input[1]])
        weight = np.pad(weight, ((0, 0), (0, missing), (0, 0), (0, 0)))
        replace_constant(model.graph, node, 1, weight, taken)
        counts = np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(counts, amounts))
        model.graph.node.append(helper.make_node("Pad", [node.input[0], amounts], [output], name=padded))
        node.input[0] = output
        changed += 1
    if changed:
        sort_nodes(model)
        remove_unused(model)
        model.CopyFrom(infer_shapes(model))
    return changed


def release_float_layers(model: ModelProto) -> int:
    """Take channels of zeros away from convolutions that stayed float, in place; return from how many."""
    graph = Structure(model)
    taken, changed = names_taken(model.graph), 0
    for node in graph.nodes:
        maker = graph.made_by.get(node.input[0]) if node.op_type == "Conv" else None
        if maker is None or maker.op_type != "Pad" or node.input[1] not in graph.constants:
            continue
        if attribute(node, "group", 1) != 1:
            continue
        weight = numpy_helper.to_array(graph.constants[node.input[1]])
        before, added = graph.zero_channels(maker) or (0, 0)
        if (
            weight.dtype != np.float32
            or before
            or not 0 < added < weight.shape[1]
            or weight[:, -added:].any()
        ):
            continue
        replace_constant(model.graph, node, 1, weight[:, :-added], taken)
        node.input[0] = maker.input[0]
        changed += 1
    if changed:
        remove_unused(model)
    return changed
