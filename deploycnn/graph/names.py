"""Readable, unique names: nodes are called after the module they come from."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence, Set

import onnx
from onnx import GraphProto, ModelProto, NodeProto

from deploycnn.graph.model import initializers, opset_of, producers, subgraphs

#: Where the dynamo exporter notes the module path of a node, as the repr of a list of strings.
SCOPES = "pkg.torch.onnx.name_scopes"


def unique(name: str, taken: Set[str]) -> str:
    """``name``, or ``name_1``, ``name_2``, ... whichever is free first."""
    if name not in taken:
        return name
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def names_taken(graph: GraphProto) -> set[str]:
    """Names of all values and nodes of a graph."""
    return (
        set(initializers(graph))
        | set(producers(graph))
        | {value.name for value in graph.input}
        | {node.name for node in graph.node}
    )


def name_nodes(model: ModelProto) -> None:
    """Give every unnamed or doubly named node a unique name: ``Conv_0``, ``Conv_1``, ..."""
    taken: set[str] = set()
    for node in model.graph.node:
        if not node.name or node.name in taken:
            node.name = unique(node.name or f"{node.op_type}_0", taken | _names_of(model))
        taken.add(node.name)


def _names_of(model: ModelProto) -> set[str]:
    return {node.name for node in model.graph.node if node.name}


def _module_paths(graph: GraphProto, parameters: Set[str]) -> list[str]:
    """The module each node belongs to; one that the exporter put in (``Split``) to where all that read it are."""
    paths = [_module_path(node, parameters) for node in graph.node]
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    for index in reversed(range(len(paths))):
        if paths[index] is None:
            read_by = {other for name in graph.node[index].output for other in readers.get(name, ())}
            paths[index] = _common([paths[other] or "" for other in read_by])
    return [path or "" for path in paths]


def _common(paths: Sequence[str]) -> str:
    """The innermost module that holds all of these."""
    first, *others = [path.split(".") for path in paths] or [[""]]
    depth = next(
        (at for at, part in enumerate(first) if any(other[at : at + 1] != [part] for other in others)),
        len(first),
    )
    return ".".join(first[:depth])


def _module_path(node: NodeProto, parameters: Set[str]) -> str | None:
    """The module a node belongs to; for a layer with weights, the module that owns the weight.

    Folding gives a convolution the scope of its batch norm, so the weight's name is the better witness. ``None``: the
    exporter did not note it.
    """
    for name in node.input[1:]:
        if name in parameters:
            return str(name).rpartition(".")[0]
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            scopes: list[str] = ast.literal_eval(entry.value)
            return scopes[-2] if len(scopes) > 1 else ""
    return None


def _formal_inputs(node: NodeProto, opset: int) -> list[str]:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return []
    return [formal.name for formal in schema.inputs]


def rename_after_modules(model: ModelProto, parameters: Iterable[str]) -> None:
    """Name nodes ``<module path>/<operator>``, values ``<node>_output_<i>``, constants after their consumer.

    Args:
        model: As the dynamo exporter made it; renamed in place. Graph inputs and outputs keep their names.
        parameters: Names in the module's state dict; initializers of these names keep them.
    """
    graph = model.graph
    known = frozenset(parameters)
    opset = opset_of(model)
    fixed = {value.name for value in (*graph.input, *graph.output)}
    constants = {tensor.name for tensor in graph.initializer} - known
    taken_nodes: set[str] = set()
    taken_values = fixed | known
    renamed: dict[str, str] = {}
    for node, path in zip(graph.node, _module_paths(graph, known), strict=True):
        node.name = unique(f"{path}/{node.op_type}" if path else node.op_type, taken_nodes)
        taken_nodes.add(node.name)
        formals = _formal_inputs(node, opset)
        for position, name in enumerate(node.input):
            if name in constants and name not in renamed:
                formal = formals[position] if position < len(formals) else str(position)
                wanted = (
                    f"{path}.bias"
                    if formal == "B" and path and node.op_type != "Gemm"
                    else f"{node.name}/{formal}"
                )
                renamed[name] = unique(wanted, taken_values)
                taken_values.add(renamed[name])
        for position, name in enumerate(node.output):
            if name and name not in fixed:
                renamed[name] = unique(f"{node.name}_output_{position}", taken_values)
                taken_values.add(renamed[name])
    for node in graph.node:
        rename_in_node(node, renamed)
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for value in graph.value_info:
        value.name = renamed.get(value.name, value.name)


def rename_in_node(node: NodeProto, renamed: dict[str, str]) -> None:
    """Rename the values that a node reads and makes, and those its subgraphs capture."""
    for names in (node.input, node.output):
        for position, name in enumerate(names):
            names[position] = renamed.get(name, name)
    for graph in subgraphs(node):
        for inner in graph.node:
            rename_in_node(inner, renamed)
        for output in graph.output:
            output.name = renamed.get(output.name, output.name)
