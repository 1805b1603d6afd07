"""The end of a classifier."""

from __future__ import annotations

from typing import cast

from onnx import ModelProto

from deploycnn.graph.model import attribute, consumers, opset_of, producers


def drop_final_softmax(model: ModelProto) -> bool:
    """Let a classifier return logits instead of probabilities, in place; whether there was a Softmax to drop.

    Only a Softmax over the classes that nothing else reads is dropped; the output keeps its name.
    """
    graph = model.graph
    if len(graph.output) != 1:
        return False
    name = graph.output[0].name
    last = producers(graph).get(name)
    if last is None or last.op_type != "Softmax" or name in consumers(graph):
        return False
    axis = cast("int", attribute(last, "axis", 1 if opset_of(model) < 13 else -1))
    before = producers(graph).get(last.input[0])
    if axis not in {1, -1} or before is None or len(consumers(graph)[last.input[0]]) != 1:
        return False
    position = list(before.output).index(last.input[0])
    graph.node.remove(last)
    before.output[position] = name
    return True
