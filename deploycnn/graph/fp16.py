"""FP32 to FP16 on the ONNX graph: weights and activations are halves, graph inputs and outputs stay float32.

Which inputs of an operator may be FP16 is read from the operator's own ONNX schema (``Resize`` wants float32
scales, ``DequantizeLinear`` makes float32 before opset 19), so nothing here is a list of special cases that
ages. A node stays FP32 where its schema, its constants or its activations do not fit into FP16; casts are put
only where a value crosses between the two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploycnn.core import Json
from deploycnn.graph import bfloat16
from deploycnn.graph.cleanup import simplify
from deploycnn.graph.half_nodes import ELEMENTS, Half, element_types, half_inputs, nodes_to_keep
from deploycnn.graph.half_range import HALF_MAX
from deploycnn.graph.model import (
    check_onnx,
    infer_shapes,
    initializers,
    is_quantized,
    names_used,
    opset_of,
)
from deploycnn.graph.names import name_nodes, rename_in_node, unique
from deploycnn.graph.opset import raise_opset

#: From here on QuantizeLinear and DequantizeLinear take FP16.
_QDQ_OPSET = 19

#: From here on convolutions and poolings take BF16.
_BF16_OPSET = 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp16Record:
    """What was converted.

    Attributes:
        converted: Number of nodes that compute in FP16.
        casts: Number of casts inserted, those at graph inputs and outputs included.
        kept: Name of each node left in FP32 -> why.
    """

    converted: int
    casts: int
    kept: Mapping[str, str]

    def to_json(self) -> Json:
        """The record kept with the artifact."""
        return {"converted": self.converted, "casts": self.casts, "kept_fp32": dict(self.kept)}


def convert_fp16(
    model: ModelProto,
    *,
    keep_ops: Collection[str] = (),
    peaks: Mapping[str, float] | None = None,
    half: Half = "fp16",
) -> tuple[ModelProto, Fp16Record]:
    """Convert a float32 model; graph inputs and outputs keep their names and types.

    Args:
        model: With any opset; not changed.
        keep_ops: Operator types, or names of nodes, to leave in FP32.
        peaks: Largest magnitude seen of each value, by name. Nodes that read or make one too large for FP16
            stay in FP32.
        half: "fp16", or "bf16" with float32's range and 8 bits of precision: nothing overflows or vanishes there.

    Raises:
        PassRequirementError: the model does not make a valid FP16 graph.
    """
    if half == "bf16":
        model = raise_opset(model, _BF16_OPSET)
    source = simplify(raise_opset(model, _QDQ_OPSET) if is_quantized(model) else model)
    name_nodes(source)
    kept = nodes_to_keep(source, keep_ops, peaks or {}, half)
    rewriter = _Rewriter(source, kept, half)
    converted = rewriter.rewrite()
    check_onnx(converted, f"the {half.upper()} graph")
    record = Fp16Record(converted=rewriter.converted, casts=rewriter.casts, kept=kept)
    return converted, record


class _Rewriter:
    """Rewrites a simplified, named model node by node; casts a value when first needed in the other type."""

    def __init__(self, source: ModelProto, kept: Mapping[str, str], half: Half) -> None:
        self.half = half
        self.model = ModelProto()
        self.model.CopyFrom(source)
        self.types = element_types(source)
        self.opset = opset_of(source)
        self.kept = kept
        self.constants = initializers(source.graph)
        self.outputs = {value.name for value in source.graph.output}
        self.taken = set(self.types)
        self.nodes: list[NodeProto] = []
        self.dequantized = {
            node.output[0]: node for node in source.graph.node if node.op_type == "DequantizeLinear"
        }
        #: Float32 name of the source graph -> its name as float32 / as FP16 in the new graph.
        self.floats: dict[str, str] = {value.name: value.name for value in source.graph.input}
        self.halves: dict[str, str] = {}
        self.converted = 0
        self.casts = 0

    def rewrite(self) -> ModelProto:
        graph = self.model.graph
        for node in self.model.graph.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            touches = any(self._is_float(name) for name in (*node.input, *node.output))
            if node.name in self.kept or not touches:
                self._keep(copy)
            else:
                self._convert(copy)
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(self._constants())
        return infer_shapes(self.model)

    def _is_float(self, name: str) -> bool:
        return self.types.get(name) == TensorProto.FLOAT

    def _cast(self, name: str, target: str, to: int) -> None:
        suffix = "fp32" if to == TensorProto.FLOAT else self.half
        self.nodes.append(helper.make_node("Cast", [name], [target], name=f"{name}/Cast_{suffix}", to=to))
        self.casts += 1

    def _new_name(self, name: str, suffix: str) -> str:
        fresh = unique(f"{name}_{suffix}", self.taken)
        self.taken.add(fresh)
        return fresh

    def _as_half(self, name: str) -> str:
        if name not in self.halves:
            self.halves[name] = self._new_name(name, self.half)
            if name not in self.constants:
                self._cast(self.floats[name], self.halves[name], ELEMENTS[self.half][0])
        return self.halves[name]

    def _as_float(self, name: str) -> str:
        if name not in self.floats:
            if name in self.constants:
                self.floats[name] = name
            else:
                self.floats[name] = self._new_name(name, "fp32")
                if name in self.dequantized:
                    self._dequantize_again(self.dequantized[name], self.floats[name])
                else:
                    self._cast(self.halves[name], self.floats[name], TensorProto.FLOAT)
        return self.floats[name]

    def _dequantize_again(self, node: NodeProto, target: str) -> None:
        """The float32 value from the integers themselves: a cast between them and a convolution hides them from it."""
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{node.name}/fp32"
        copy.input[1] = self._as_float(node.input[1])
        copy.output[0] = target
        self.nodes.append(copy)

    def _keep(self, node: NodeProto) -> None:
        captured = {name for name in self._captured(node) if self._is_float(name)}
        for name in captured | {name for name in node.input if self._is_float(name)}:
            self._as_float(name)
        outputs = list(node.output)
        rename_in_node(
            node, {name: self.floats[name] for name in captured | set(node.input) if name in self.floats}
        )
        for name in outputs:
            if self._is_float(name):
                self.floats[name] = name
        self.nodes.append(node)

    def _captured(self, node: NodeProto) -> set[str]:
        return {
            name
            for name in names_used(node)
            if name in self.halves or name in self.floats or name in self.constants
        }

    def _convert(self, node: NodeProto) -> None:
        halves = set(half_inputs(node, self.types, self.opset, self.half))
        for position, name in enumerate(node.input):
            if self._is_float(name):
                node.input[position] = self._as_half(name) if position in halves else self._as_float(name)
        to_float = []
        for position, name in enumerate(node.output):
            if not self._is_float(name):
                continue
            # The name itself goes to the float32 value where that is a graph output.
            self.halves[name] = self._new_name(name, self.half) if name in self.outputs else name
            node.output[position] = self.halves[name]
            if name in self.outputs:
                self.floats[name] = name
                to_float.append(name)
        self.nodes.append(node)
        self.converted += 1
        for name in to_float:
            self._cast(self.halves[name], name, TensorProto.FLOAT)

    def _constants(self) -> list[TensorProto]:
        tensors = []
        for name, tensor in self.constants.items():
            if tensor.data_type != TensorProto.FLOAT or name in self.floats or name in self.outputs:
                tensors.append(tensor)
            if name in self.halves:
                content = numpy_helper.to_array(tensor)
                if self.half == "bf16":
                    tensors.append(bfloat16.constant(self.halves[name], content))
                    continue
                finite = np.where(np.isfinite(content), np.clip(content, -HALF_MAX, HALF_MAX), content)
                tensors.append(numpy_helper.from_array(finite.astype(np.float16), self.halves[name]))
        return tensors
