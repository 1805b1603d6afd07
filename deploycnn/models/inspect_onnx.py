"""Per-layer table of an ONNX file, by walking its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from deploycnn.graph import model as graphs
from deploycnn.models import onnx_macs
from deploycnn.models.inspection import LayerRow, ModelTable, total
from deploycnn.models.onnx_fields import OnnxGraph, field_of_node
from deploycnn.models.receptive_field import Field

#: Operators that only rename, reshape or requantize what another one computed.
_PLUMBING = frozenset(
    [
        "Identity",
        "Dropout",
        "Cast",
        "CastLike",
        "QuantizeLinear",
        "DequantizeLinear",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
    ]
)

#: From here on a value is a shape, not an image.
_SHAPES = frozenset({"Shape", "Size"})


def inspect_onnx(path: Path, input_shape: Sequence[int] | None, name: str) -> ModelTable:
    """Walk the graph of an ONNX file in its own order.

    Args:
        path: The file.
        input_shape: (C, H, W) of one image, needed where the graph leaves these open.
        name: For people.

    Raises:
        ArtifactError: the file is missing, truncated or not ONNX.
    """
    model = graphs.load_onnx(path)
    params = onnx_macs.params_by_output(model)
    typed = onnx_macs.with_shapes(model, input_shape)
    shapes = onnx_macs.known_shapes(typed)
    itemsize = _item_sizes(graphs.value_types(typed))
    batch = onnx_macs.batch_of(typed, shapes)
    image = graphs.runtime_inputs(typed)[0].name
    graph = OnnxGraph(shapes=shapes, constants=graphs.initializers(typed.graph))
    fields: dict[str, Field | None] = {image: Field()}
    rows: list[LayerRow] = []
    peak = 0
    for node in typed.graph.node:
        sources = [value for value in node.input if value in fields]
        if node.op_type == "Constant":
            graph.add_constant(node)
        if not sources or node.op_type in _SHAPES:
            continue
        seen = field_of_node(node, fields, graph)
        fields.update({output: seen for output in node.output if output})
        if node.op_type in _PLUMBING:
            continue

        def size(values: Sequence[str]) -> int:
            return sum(math.prod(shapes.get(value, (0,))) * itemsize(value) for value in values) // batch

        produced = size([output for output in node.output if output])
        peak = max(peak, produced + size(sources))
        macs = onnx_macs.node_macs(node, shapes)
        rows.append(
            LayerRow(
                name=node.name or node.output[0],
                kind=node.op_type,
                input_shape=shapes.get(sources[0], ()),
                output_shape=shapes.get(node.output[0], ()),
                params=params.get(node.output[0], 0),
                macs=None if macs is None else macs // batch,
                receptive_field=seen.size if seen is not None else None,
                activation_bytes=produced,
            )
        )
    return total(name, rows, shapes.get(image, ())[1:], peak, sum(params.values()))


def _item_sizes(types: Mapping[str, onnx.ValueInfoProto]) -> Callable[[str], int]:
    """Bytes of one element of a value."""

    def itemsize(name: str) -> int:
        kind = types[name].type.tensor_type.elem_type if name in types else TensorProto.UNDEFINED
        if kind in {TensorProto.UNDEFINED, TensorProto.STRING}:
            return 0
        size: int = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
        return size

    return itemsize
