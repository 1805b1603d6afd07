"""Simplify an inference graph without changing what it computes.

Every step is a plain rewrite of the ``ModelProto`` in place, so that names survive and the same input gives
the same bytes. Quantize/dequantize pairs are never folded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from deploycnn.graph.axes import spell_out_axes
from deploycnn.graph.batchnorm import fold_batchnorm
from deploycnn.graph.gelu import order_gelu
from deploycnn.graph.model import (
    QUANTIZED_OPS,
    attribute,
    consumers,
    infer_shapes,
    initializers,
    names_used,
    opset_of,
    producers,
    shape_of,
    subgraphs,
    value_types,
)
from deploycnn.graph.names import rename_in_node

#: Never evaluated ahead of time: they are random, or mark quantization.
_NOT_FOLDED = QUANTIZED_OPS | {
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial",
}  # fmt: skip

#: Folding may not blow a file up (an expanded constant) beyond this.
_MAX_FOLDED_BYTES = 2**24


def simplify(model: ModelProto) -> ModelProto:
    """An equivalent model with constants and batch norms folded, and nothing unused in it.

    Local functions are inlined, initializers are no longer graph inputs, spatial means become
    ``GlobalAveragePool`` (which every runtime knows best, and which has an INT8 kernel); slices, paddings and GELUs
    have the forms that onnxruntime's optimizers understand.
    """
    model = onnx.inliner.inline_local_functions(model) if model.functions else _copy(model)
    constants_to_initializers(model)
    drop_initializer_inputs(model)
    while _fold_static_shapes(model) + fold_constants(model) + remove_identities(model):
        remove_unused(model)
    fold_batchnorm(model)
    pool_spatial_means(model)
    order_gelu(model)
    spell_out_axes(model)
    remove_unused(model)
    relaxed = infer_shapes(model)
    del model.graph.value_info[:]
    model.graph.value_info.extend(relaxed.graph.value_info)
    return model


def _copy(model: ModelProto) -> ModelProto:
    duplicate = ModelProto()
    duplicate.CopyFrom(model)
    return duplicate


def _remove(model: ModelProto, doomed: list[NodeProto]) -> None:
    for node in doomed:
        model.graph.node.remove(node)


def constants_to_initializers(model: ModelProto) -> int:
    """Turn ``Constant`` nodes into initializers; return how many."""
    graph = model.graph
    doomed = []
    for node in graph.node:
        if (
            node.op_type != "Constant"
            or node.domain not in {"", "ai.onnx"}
            or attribute(node, "sparse_value")
        ):
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(_constant_tensor(node))
        tensor.name = node.output[0]
        doomed.append(node)
    _remove(model, doomed)
    return len(doomed)


def _constant_tensor(node: NodeProto) -> TensorProto:
    (held,) = node.attribute
    if held.name == "value":
        tensor: TensorProto = held.t
        return tensor
    value = helper.get_attribute_value(held)
    dtype = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    return numpy_helper.from_array(np.asarray(value, dtype=dtype.get(held.name, np.object_)))


def drop_initializer_inputs(model: ModelProto) -> None:
    """Stop listing initializers as graph inputs: they are constants, and may then be folded and quantized."""
    weights = initializers(model.graph)
    kept = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    # Initializers that are not inputs came with IR version 4.
    model.ir_version = max(model.ir_version, 4)


def fold_constants(model: ModelProto) -> int:
    """Evaluate nodes whose inputs are all constant; return how many."""
    graph = model.graph
    weights = initializers(graph)
    outputs = {value.name for value in graph.output}
    doomed = []
    for node in graph.node:
        if (
            node.op_type in _NOT_FOLDED
            or node.domain not in {"", "ai.onnx"}
            or not any(node.input)
            or any(name and name not in weights for name in node.input)
            or any(name in outputs for name in node.output)
            or any(True for _ in subgraphs(node))
        ):
            continue
        values = evaluate(node, {name: weights[name] for name in node.input if name}, opset_of(model))
        before = sum(weights[name].ByteSize() for name in node.input if name)
        if sum(value.nbytes for value in values) > max(before, _MAX_FOLDED_BYTES):
            continue
        for name, value in zip(node.output, values, strict=True):
            weights[name] = graph.initializer.add()
            weights[name].CopyFrom(numpy_helper.from_array(value, name))
        doomed.append(node)
    _remove(model, doomed)
    return len(doomed)


def evaluate(node: NodeProto, constants: dict[str, TensorProto], opset: int) -> list[npt.NDArray[np.generic]]:
    """Outputs of one node for constant inputs, by the ONNX reference implementation."""
    graph = helper.make_graph(
        [node],
        "constant",
        [],
        [helper.make_value_info(name, onnx.TypeProto()) for name in node.output],
        list(constants.values()),
    )
    holder = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return [np.asarray(value) for value in ReferenceEvaluator(holder).run(None, {})]


def _fold_static_shapes(model: ModelProto) -> int:
    """Replace ``Shape`` and ``Size`` of tensors whose shape is fully known by constants; return how many."""
    graph = model.graph
    shaped = [node for node in graph.node if node.op_type in {"Shape", "Size"}]
    if not shaped:
        return 0
    types = value_types(infer_shapes(model))
    outputs = {value.name for value in graph.output}
    doomed = []
    for node in shaped:
        shape = shape_of(types[node.input[0]]) if node.input[0] in types else None
        if shape is None or None in shape or node.output[0] in outputs:
            continue
        known = np.array(shape, dtype=np.int64)
        if node.op_type == "Size":
            known = np.array(known.prod(), dtype=np.int64)
        else:
            start, end = cast("int", attribute(node, "start", 0)), cast("int | None", attribute(node, "end"))
            known = known[start:end]
        graph.initializer.append(numpy_helper.from_array(known, node.output[0]))
        doomed.append(node)
    _remove(model, doomed)
    return len(doomed)


def _is_unit_pool(node: NodeProto) -> bool:
    if len(node.output) > 1 and node.output[1]:
        return False
    lists = (
        attribute(node, "kernel_shape"),
        attribute(node, "strides", [1]),
        attribute(node, "dilations", [1]),
    )
    pads = cast("list[int]", attribute(node, "pads", [0]))
    return not any(pads) and all(set(cast("list[int]", values)) == {1} for values in lists)


#: Operators that pass their first input through, and when.
_IDENTITIES: dict[str, Callable[[NodeProto], bool]] = {
    "Identity": lambda _: True,
    "Dropout": lambda node: len(node.input) < 3 and (len(node.output) < 2 or not node.output[1]),
    "AveragePool": _is_unit_pool,
    "MaxPool": _is_unit_pool,
    "Concat": lambda node: len(node.input) == 1,
}


def remove_identities(model: ModelProto) -> int:
    """Remove nodes that pass their input through; return how many.

    One between a graph input (or initializer) and a graph output stays: both names must survive.
    """
    graph = model.graph
    outputs = {value.name for value in graph.output}
    made_by = producers(graph)
    renamed: dict[str, str] = {}
    doomed = []
    for node in graph.node:
        passes_through = _IDENTITIES.get(node.op_type)
        if passes_through is None or node.domain not in {"", "ai.onnx"} or not passes_through(node):
            continue
        source, target = renamed.get(node.input[0], node.input[0]), node.output[0]
        if target not in outputs:
            renamed[target] = source
        elif source in made_by and source not in outputs and source not in renamed.values():
            renamed[source] = target
        else:
            continue
        doomed.append(node)
        # A single step at a time where an output is renamed keeps the bookkeeping simple.
        if target in outputs:
            break
    _remove(model, doomed)
    for node in graph.node:
        rename_in_node(node, renamed)
    return len(doomed)


def pool_spatial_means(model: ModelProto) -> int:
    """Turn means over H and W of 4-D tensors into ``GlobalAveragePool`` (+ ``Flatten``); return how many."""
    graph = model.graph
    candidates = [node for node in graph.node if node.op_type == "ReduceMean"]
    if not candidates:
        return 0
    types = value_types(infer_shapes(model))
    weights = initializers(graph)
    changed = 0
    for node in candidates:
        shape = shape_of(types[node.input[0]]) if node.input[0] in types else None
        if len(node.input) > 1 and node.input[1] in weights:
            axes = numpy_helper.to_array(weights[node.input[1]]).tolist()
        else:
            axes = cast("list[int]", attribute(node, "axes", []))
        if shape is None or len(shape) != 4 or {axis % 4 for axis in axes} != {2, 3}:
            continue
        keeps_rank = attribute(node, "keepdims", 1)
        node.op_type = "GlobalAveragePool"
        del node.input[1:], node.attribute[:]
        if not keeps_rank:
            target = node.output[0]
            node.output[0] = f"{target}_pooled"
            flatten = helper.make_node(
                "Flatten", [node.output[0]], [target], name=f"{node.name}_flatten", axis=1
            )
            flatten.metadata_props.extend(node.metadata_props)
            graph.node.insert(list(graph.node).index(node) + 1, flatten)
        changed += 1
    return changed


def remove_unused(model: ModelProto) -> int:
    """Remove nodes that no graph output depends on, and initializers nobody reads; return how many went."""
    graph = model.graph
    needed = {value.name for value in graph.output}
    doomed = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(names_used(node))
        else:
            doomed.append(node)
    _remove(model, doomed)
    read = set(consumers(graph)) | {value.name for value in graph.output}
    unread = [index for index, tensor in enumerate(graph.initializer) if tensor.name not in read]
    for index in reversed(unread):
        del graph.initializer[index]
    return len(doomed) + len(unread)
