"""What computes on integers between Q and DQ, as what it computes on real numbers."""

from __future__ import annotations

from onnx import ModelProto, helper, numpy_helper

from deploycnn.graph.model import consumers, initializers, producers, sort_nodes
from deploycnn.graph.names import names_taken, unique


def lift_pads(model: ModelProto) -> int:
    """Let each ``Pad`` between Q and DQ (``RulePack.on_integers``) stand between DQ and Q, in place; return how many.

    Others than those that pad with their zero point stay where they are.
    """
    graph = model.graph
    constants, made_by, read_by = initializers(graph), producers(graph), consumers(graph)
    taken = names_taken(graph)
    lifted = 0
    for node in [held for held in graph.node if held.op_type == "Pad"]:
        quantizer, readers = made_by.get(node.input[0]), read_by.get(node.output[0], [])
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            continue
        numbers = list(quantizer.input[1:])
        filling, zero = (
            constants.get(held.input[2]) if len(held.input) > 2 else None for held in (node, quantizer)
        )
        if (
            filling is None
            or zero is None
            or numpy_helper.to_array(filling).item() != numpy_helper.to_array(zero).reshape(-1)[0]
            or any(held.op_type != "DequantizeLinear" or list(held.input[1:]) != numbers for held in readers)
        ):
            continue
        real = unique(f"{node.output[0]}.real", taken)
        padded = unique(f"{node.output[0]}.padded", taken | {real})
        taken |= {real, padded}
        graph.node.append(helper.make_node("DequantizeLinear", [node.input[0], *numbers], [real], name=real))
        graph.node.append(
            helper.make_node("QuantizeLinear", [padded, *numbers], [node.output[0]], name=padded)
        )
        node.input[0], node.input[2], node.output[0] = real, "", padded
        lifted += 1
    if lifted:
        sort_nodes(model)
    return lifted
