"""First layers in a shape that onnxruntime's fast integer convolution takes.

On x86 it has two: one that copies windows into a matrix, and one that reads the image in place. The latter wants input
channels in fours and output channels in eights (``MlasConvSym``), which images do not have. So they get channels of
zeros, and kernels get zeros for these. Exact. The channels are added to the rounded image (``RulePack.on_integers``),
which is a copy of bytes.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from deploycnn.graph.cleanup import remove_unused
from deploycnn.graph.model import attribute, infer_shapes, initializers, names_used, sort_nodes
from deploycnn.graph.names import names_taken, unique

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
        padded, stored = unique(f"{node.name}/Pad", taken), node.input[1]
        output = unique(f"{node.name}/Pad_output", taken)
        weight = np.pad(numpy_helper.to_array(weights[stored]), ((0, 0), (0, missing), (0, 0), (0, 0)))
        if sum(list(names_used(other)).count(stored) for other in model.graph.node) > 1:
            stored = unique(f"{stored}_aligned", taken)
            model.graph.initializer.append(TensorProto(name=stored))
            weights[stored] = model.graph.initializer[-1]
        taken |= {amounts, padded, output, stored}
        weights[stored].CopyFrom(numpy_helper.from_array(weight, stored))
        counts = np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(counts, amounts))
        model.graph.node.append(helper.make_node("Pad", [node.input[0], amounts], [output], name=padded))
        node.input[0], node.input[1] = output, stored
        changed += 1
    if changed:
        sort_nodes(model)
        remove_unused(model)
        model.CopyFrom(infer_shapes(model))
    return changed
