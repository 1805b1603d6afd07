"""What integers do between Q and DQ, as what it does to real numbers: paddings, and ranges that stand for a ReLU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploycnn.graph.model import attribute, consumers, initializers, lasting_names, producers, sort_nodes
from deploycnn.graph.names import names_taken, unique


def lift_pads(model: ModelProto) -> dict[str, str]:
    """Let each ``Pad`` between Q and DQ (``RulePack.on_integers``) stand between DQ and Q, in place.

    One behind another is lifted too. Those stay where they are that pad with a number other than their zero point, or
    have more than one.

    Args:
        model: Its nodes are sorted.

    Returns:
        Names of the Q and DQ that were added -> name of the ``Pad``.
    """
    graph = model.graph
    constants, made_by = initializers(graph), producers(graph)
    taken = names_taken(graph)
    lifted = dict[str, str]()
    for node in [held for held in graph.node if held.op_type == "Pad"]:
        quantizer = made_by.get(node.input[0])
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            continue
        numbers = list(quantizer.input[1:])
        if not _pads_zeros(node, numbers, constants):
            continue
        real = unique(f"{node.output[0]}.real", taken)
        padded = unique(f"{node.output[0]}.padded", taken | {real})
        taken |= {real, padded}
        rounding = helper.make_node("QuantizeLinear", [padded, *numbers], [node.output[0]], name=padded)
        graph.node.append(helper.make_node("DequantizeLinear", [node.input[0], *numbers], [real], name=real))
        graph.node.append(rounding)
        made_by[node.output[0]] = rounding
        node.input[0], node.output[0] = real, padded
        if len(node.input) > 2:
            node.input[2] = ""
        lifted |= {real: node.name, padded: node.name}
    if lifted:
        sort_nodes(model)
    return lifted


def lift_clips(model: ModelProto) -> dict[str, str]:
    """Put a ``Relu`` before each Q that stands for one, in place: its zero point is the least integer there is.

    Quantizers fold a ReLU into the range of the layer, sum or product before it. Without it, placement would want one
    scale for what is clipped and what is not.

    Args:
        model: Its nodes are sorted.

    Returns:
        Name of each ``Relu`` that was added -> name of the node before it.
    """
    graph = model.graph
    constants, made_by, read_by = initializers(graph), producers(graph), consumers(graph)
    outputs = lasting_names(graph)
    taken = names_taken(graph)
    lifted = dict[str, str]()
    for quantizer in [held for held in graph.node if held.op_type == "QuantizeLinear"]:
        value = quantizer.input[0]
        maker = made_by.get(value)
        if (
            maker is None
            or maker.op_type not in _CLIPPED
            or len(read_by[value]) != 1
            or value in outputs
            or not _begins_at_zero(quantizer, constants)
        ):
            continue
        clipped = unique(f"{value}.clipped", taken)
        taken.add(clipped)
        graph.node.append(helper.make_node("Relu", [value], [clipped], name=clipped))
        quantizer.input[0] = clipped
        lifted[clipped] = maker.name
    if lifted:
        sort_nodes(model)
    return lifted


#: What a ReLU is folded into.
_CLIPPED = frozenset({"Conv", "Gemm", "MatMul", "Add", "Mul", "BatchNormalization"})


def _begins_at_zero(quantizer: NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Whether the least integer reads as 0."""
    name = _input(quantizer.input, 2)
    if not name:
        return len(quantizer.input) == 2 and not attribute(quantizer, "output_dtype", 0)  # uint8, from 0
    if name not in constants:
        return False
    zero_point = numpy_helper.to_array(constants[name])
    return zero_point.dtype.kind in "iu" and bool((zero_point == np.iinfo(zero_point.dtype).min).all())


def _pads_zeros(node: NodeProto, numbers: list[str], constants: dict[str, TensorProto]) -> bool:
    """Whether a ``Pad`` of integers adds what their scale and zero point read as 0, or copies of what is there."""
    if any(name in constants and numpy_helper.to_array(constants[name]).size != 1 for name in numbers):
        return False
    if attribute(node, "mode", b"constant") not in {b"constant", "constant"}:
        return True
    filling, zero = (
        numpy_helper.to_array(constants[name]).item() if name in constants else (None if name else 0)
        for name in (_input(node.input, 2), _input(numbers, 1))
    )
    return filling is not None and filling == zero


def _input(names: Sequence[str], position: int) -> str:
    return names[position] if len(names) > position else ""
