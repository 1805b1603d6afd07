"""Move a model to another version of the ONNX operator set."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx
import onnx.version_converter
from onnx import ModelProto, NodeProto, helper, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.metadata import get_metadata, set_metadata
from deploycnn.graph.model import (
    attribute,
    infer_shapes,
    initializers,
    opset_of,
    runtime_inputs,
    shape_of,
    value_types,
)

#: The oldest IR version that goes with an operator set; readers of that age know no newer one.
_IR_OF_OPSET = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}


def raise_opset(model: ModelProto, opset: int) -> ModelProto:
    """``model`` at operator set ``opset`` if it is older, by ONNX's own converter.

    Raises:
        PassRequirementError: the converter has no rule for an operator of this model; names its reason.
    """
    if opset_of(model) >= opset:
        return model
    named = {value.name for value in runtime_inputs(model)}
    try:
        converted = onnx.version_converter.convert_version(model, opset)
    except (onnx.version_converter.ConvertError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise PassRequirementError(
            f"the model has opset {opset_of(model)}, {opset} is needed, and converting fails: {reason}; "
            f"export it again at opset {opset} or newer"
        ) from error
    # The converter lists initializers as inputs for the sake of IR version 3, and forgets the metadata.
    kept = [value for value in converted.graph.input if value.name in named]
    del converted.graph.input[:]
    converted.graph.input.extend(kept)
    set_metadata(converted, get_metadata(model))
    converted.ir_version = max(_IR_OF_OPSET.get(opset, 4), 4)
    return converted


def lower_opset_to_17(model: ModelProto) -> ModelProto:
    """An opset 18 ``model`` written with operator set 17.

    ONNX's converter has no rule for ``Split`` and the reductions, the operators of a CNN that changed in 18.

    Raises:
        PassRequirementError: the model uses something that 17 cannot express; names the node.
    """
    lowered = ModelProto()
    lowered.CopyFrom(model)
    types = value_types(infer_shapes(lowered))
    constants = {name: numpy_helper.to_array(tensor) for name, tensor in initializers(lowered.graph).items()}
    for node in lowered.graph.node:
        if node.op_type == "Split":
            source = types.get(node.input[0])
            _explicit_split(lowered, node, shape_of(source) if source is not None else None)
        elif node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) > 1:
            if node.input[1] not in constants:
                raise PassRequirementError(
                    f'node "{node.name}" reduces over computed axes; use opset 18 or newer'
                )
            axes = constants[node.input[1]].tolist()
            _drop_attributes(node, "noop_with_empty_axes")
            node.attribute.append(helper.make_attribute("axes", axes))
            del node.input[1:]
        elif not _known_to_17(node):
            raise PassRequirementError(
                f'node "{node.name}" ({node.op_type}) needs opset 18; use opset 18 or newer'
            )
    for entry in lowered.opset_import:
        if entry.domain in {"", "ai.onnx"}:
            entry.version = 17
    lowered.ir_version = _IR_OF_OPSET[17]
    return lowered


def _known_to_17(node: NodeProto) -> bool:
    try:
        schema = onnx.defs.get_schema(node.op_type, 17, node.domain)
    except onnx.defs.SchemaError:
        return False
    inputs = [name for name in node.input if name]
    return len(inputs) <= schema.max_input and all(held.name in schema.attributes for held in node.attribute)


def _drop_attributes(node: NodeProto, *names: str) -> None:
    kept = [held for held in node.attribute if held.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _explicit_split(model: ModelProto, node: NodeProto, shape: tuple[int | None, ...] | None) -> None:
    """Write out the sizes that ``num_outputs`` (new in opset 18, with a smaller last part) stands for."""
    count = cast("int", attribute(node, "num_outputs", 0))
    if not count:
        return
    length = shape[cast("int", attribute(node, "axis", 0))] if shape is not None else None
    if length is None:
        raise PassRequirementError(
            f'node "{node.name}" splits an axis of unknown length; use opset 18 or newer'
        )
    part = -(-length // count)
    sizes = [part] * (count - 1) + [length - part * (count - 1)]
    name = f"{node.name or node.output[0]}/split"
    model.graph.initializer.append(numpy_helper.from_array(np.array(sizes, dtype=np.int64), name))
    node.input.append(name)
    _drop_attributes(node, "num_outputs")
