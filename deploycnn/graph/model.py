"""Load, save and describe ONNX models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from deploycnn.core import TensorSpec
from deploycnn.errors import ArtifactError, PassRequirementError

#: Protobuf cannot serialize more; a margin is left for the graph around the weights.
MAX_SELF_CONTAINED_BYTES = 2**31 - 2**24

#: Operators whose presence says that a model is already quantized.
QUANTIZED_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}
)

#: Types that weights are stored in, and hardly anything else that is cast.
_WEIGHT_INTEGERS = frozenset({TensorProto.INT8, TensorProto.INT4})


def load_onnx(path: Path) -> ModelProto:
    """Read a model with its external data; nodes that are out of order are put in order, as runtimes do.

    Raises:
        ArtifactError: the file is missing, truncated or not ONNX, says no operator set, a node of it depends on its own
            result, or its external data is missing or lies outside the model's folder.
    """
    try:
        # From its bytes: by a path, the library would take a file for text or JSON by how its name ends.
        model = onnx.load_model_from_string(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); give an .onnx file") from error
    except (DecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path}: not an ONNX model, or truncated ({error}); fetch or export it again"
        ) from error
    if not model.graph.node and not model.graph.output:
        raise ArtifactError(f"{path}: not an ONNX model (no graph in it); fetch or export it again")
    if not model.opset_import:
        raise ArtifactError(
            f"{path}: not valid ONNX: it says no operator set (opset_import); export it again"
        )
    if loop := _cycle(model.graph):
        raise ArtifactError(
            f"{path}: not valid ONNX: {loop[0]} is made of {loop[-2]}, which is made of {loop[0]}; export it again"
        )
    if not _in_order(model.graph):
        sort_nodes(model)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: its external data cannot be read: {reason}") from error
    return model


def _cycle(graph: GraphProto) -> list[str]:
    """Values that are made of each other in a circle, the first one again at the end; empty where there is none."""
    made_by = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    reads = {
        index: {
            made_by[name]
            for name in names_used(node)
            # Branches often name their results as the node that holds them does.
            if name in made_by and (made_by[name] != index or name in node.input)
        }
        for index, node in enumerate(graph.node)
    }
    try:
        TopologicalSorter(reads).prepare()
    except CycleError as error:
        return [graph.node[index].output[0] for index in error.args[1]]
    return []


def _in_order(graph: GraphProto) -> bool:
    """Whether each node stands behind those whose results it reads."""
    to_come = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        if not to_come.isdisjoint(node.input):
            return False
        to_come.difference_update(node.output)
    return True


def save_onnx(model: ModelProto, path: Path) -> int:
    """Write ``model`` as one file (above 2 GB, with a data file beside it); return the bytes written."""
    if model.ByteSize() < MAX_SELF_CONTAINED_BYTES:
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path.stat().st_size
    data = path.with_name(f"{path.name}.data")
    onnx.save_model(model, str(path), save_as_external_data=True, location=data.name)
    return path.stat().st_size + data.stat().st_size


def opset_of(model: ModelProto) -> int:
    """The version of the default operator set."""
    return next((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), 0)


def runtime_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """Graph inputs that are fed at run time: old models list their initializers as inputs too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def copy_of(model: ModelProto) -> ModelProto:
    """A model of its own with the same content."""
    duplicate = ModelProto()
    duplicate.CopyFrom(model)
    return duplicate


def is_quantized(model: ModelProto) -> bool:
    """Whether the graph holds quantized operators of ONNX or of onnxruntime, or integer weights behind a Cast."""
    small = {item.name for item in model.graph.initializer if item.data_type in _WEIGHT_INTEGERS}
    return any(
        node.op_type in QUANTIZED_OPS
        or node.op_type.startswith("QLinear")
        or (node.op_type == "Cast" and node.input[0] in small)
        for node in model.graph.node
    )


def shape_of(value: ValueInfoProto) -> tuple[int | None, ...] | None:
    """The tensor's shape, ``None`` for a dynamic axis; ``None`` as a whole where even the rank is unknown."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim
    )


def tensor_specs(values: Sequence[ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Graph inputs or outputs as the specifications kept with artifacts."""
    return tuple(
        TensorSpec(
            name=value.name,
            dtype=str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            shape=shape_of(value) or (),
        )
        for value in values
    )


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Graphs held by a control-flow node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def names_used(node: NodeProto) -> Iterator[str]:
    """Every value that a node reads, including those its subgraphs capture."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        yield from _captured(graph)


def _captured(graph: GraphProto) -> Iterator[str]:
    """What a branch or loop body reads from outside."""
    # Names may occur outside again, later: that is not what is meant here.
    own = {value.name for value in graph.input} | initializers(graph).keys()
    for node in graph.node:
        yield from (name for name in names_used(node) if name not in own)
        own.update(node.output)
    yield from (output.name for output in graph.output if output.name not in own)


def lasting_names(graph: GraphProto) -> set[str]:
    """Values that others know by name: outputs of the graph, and what branches and loop bodies read from outside.

    Whoever rewrites the nodes that make or read such a value must keep it, as it is, under its name.
    """
    return {value.name for value in graph.output} | {
        name for node in graph.node for inner in subgraphs(node) for name in _captured(inner)
    }


def consumers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Value name -> nodes that read it, in graph order and each node once."""
    found: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(names_used(node)):
            found.setdefault(name, []).append(node)
    return found


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """Value name -> the node that makes it."""
    return {name: node for node in graph.node for name in node.output if name}


def initializers(graph: GraphProto) -> dict[str, TensorProto]:
    """Initializer name -> tensor."""
    return {tensor.name: tensor for tensor in graph.initializer}


def attribute(node: NodeProto, name: str, default: object = None) -> object:
    """The value of a node's attribute."""
    for candidate in node.attribute:
        if candidate.name == name:
            return onnx.helper.get_attribute_value(candidate)
    return default


def value_types(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Every value whose type is known: inputs, outputs and what shape inference found."""
    graph = model.graph
    return {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}


def infer_shapes(model: ModelProto) -> ModelProto:
    """``model`` with the types and shapes of all intermediate values, as far as ONNX can tell.

    Stale annotations are dropped first: they would win over what is inferred.
    """
    # Inference goes through protobuf serialization, so it is fed the graph without the weights' bytes only
    # where they would not fit.
    inferred = ModelProto()
    inferred.CopyFrom(model)
    del inferred.graph.value_info[:]
    if model.ByteSize() >= MAX_SELF_CONTAINED_BYTES:
        return inferred
    return onnx.shape_inference.infer_shapes(inferred, data_prop=True)


def check_onnx(model: ModelProto, what: str) -> None:
    """Check a model made from someone else's against the ONNX specification, types and shapes included.

    Raises:
        PassRequirementError: it is not valid; names the reason.
    """
    if model.ByteSize() >= MAX_SELF_CONTAINED_BYTES:
        return
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PassRequirementError(
            f"{what} is not valid ONNX: {reason}; check the model it was made from"
        ) from error


def sort_nodes(model: ModelProto) -> None:
    """Put the nodes into topological order, as ONNX demands; nodes that are in order keep theirs.

    There must be such an order; ``load_onnx`` refuses files without one.
    """
    graph = model.graph
    nodes = list(graph.node)
    made_by = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    ordered: list[int] = []
    placed: set[int] = set()
    for root in range(len(nodes)):
        stack = [root]
        while stack:
            missing = [made_by[name] for name in names_used(nodes[stack[-1]]) if name in made_by]
            missing = [index for index in missing if index not in placed and index != stack[-1]]
            if missing:
                stack.extend(missing)
                continue
            index = stack.pop()
            if index not in placed:
                placed.add(index)
                ordered.append(index)
    if ordered == list(range(len(nodes))):
        return
    copies = [NodeProto.FromString(nodes[index].SerializeToString()) for index in ordered]
    del graph.node[:]
    graph.node.extend(copies)
