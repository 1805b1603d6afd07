"""An ONNX graph becomes a ``torch.fx`` graph, node by node."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import torch
from onnx import ModelProto, NodeProto, numpy_helper
from torch import fx

from deploycnn.errors import PassRequirementError
from deploycnn.graph.bridge import (  # noqa: F401 - each enters its operators into the table
    activations,
    elementwise,
    indexing,
    linear,
    normalization,
    pooling,
    resizing,
    shaping,
)
from deploycnn.graph.bridge.bridge import Bridge
from deploycnn.graph.bridge.builder import Builder, UnsupportedError
from deploycnn.graph.bridge.constants import folded
from deploycnn.graph.bridge.on_host import HOST_OPERATORS
from deploycnn.graph.bridge.quantized import KEEP_INTEGERS, to_integers
from deploycnn.graph.bridge.site import OPERATORS, Site
from deploycnn.graph.bridge.values import Broken, Constant, RoundedConstant, Value
from deploycnn.graph.cleanup import _constant_tensor
from deploycnn.graph.model import names_used, opset_of, runtime_inputs, sort_nodes
from deploycnn.graph.names import name_nodes


def to_torch(
    model: ModelProto, *, float_weights: Mapping[str, npt.NDArray[np.generic]] | None = None
) -> Bridge:
    """Make a trainable module of an ONNX CNN, with or without Q/DQ.

    Convolutions, matrix products and norms with constant weights become leaf modules (``nn.Conv2d``,
    ``nn.Linear``, ``nn.BatchNorm2d``, ...); QuantizeLinear and DequantizeLinear become
    :class:`~deploycnn.graph.bridge.fake_quant.FakeQuantize`. The batch size is free even where the file fixes
    it. Dropout is left out; in training mode batch norms use batch statistics.

    Args:
        model: Operator set 9 or newer; left as it is. Float32 images (N, C, H, W) go in.
        float_weights: Float values of tensors that ``model`` stores as integers, by the name of the integer
            initializer, of that without ``_quantized``, or of the dequantized value. Training starts from them
            instead of from the rounded values.

    Returns:
        The module, and the way back. The module is in eval mode.

    Raises:
        PassRequirementError: the bridge lacks some of the model's operators (all are named, with the file's
            opset), or ``float_weights`` do not fit.
    """
    inlined = onnx.inliner.inline_local_functions(model) if model.functions else _copy(model)
    original = _copy(inlined)
    sort_nodes(inlined)
    name_nodes(inlined)
    builder = Builder(inlined, float_weights or {})
    _refuse_unknown(inlined)
    for tensor in inlined.graph.initializer:
        builder.values[tensor.name] = Constant(array=numpy_helper.to_array(tensor), origin=tensor.name)
    for value in runtime_inputs(inlined):
        builder.values[value.name] = builder.graph.placeholder(builder.path(value.name))
    problems: dict[str, str] = {}
    for node in _constants_first(inlined):
        _import(builder, node, problems)
    _raise_for(problems, inlined)
    builder.check_float_weights()
    builder.graph.output(_outputs(builder, [value.name for value in inlined.graph.output]))
    return _finish(builder, original)


def _copy(model: ModelProto) -> ModelProto:
    duplicate = ModelProto()
    duplicate.CopyFrom(model)
    return duplicate


def _constants_first(model: ModelProto) -> list[NodeProto]:
    """Nodes in topological order, those that do not depend on the input first: layers look ahead for biases."""
    computed = {value.name for value in runtime_inputs(model)}
    fixed, rest = [], []
    for node in model.graph.node:
        if any(name in computed for name in names_used(node)):
            computed.update(node.output)
            rest.append(node)
        else:
            fixed.append(node)
    return fixed + rest


def supported_operators() -> frozenset[str]:
    """Operators of the default domain that the bridge knows."""
    return frozenset(OPERATORS) | {"Constant"}


def _refuse_unknown(model: ModelProto) -> None:
    unknown = {
        node.name: f"{node.domain + '.' if node.domain not in {'', 'ai.onnx'} else ''}{node.op_type}"
        for node in model.graph.node
        if node.domain not in {"", "ai.onnx"} or node.op_type not in supported_operators()
    }
    _raise_for(unknown, model)


def _raise_for(problems: Mapping[str, str], model: ModelProto) -> None:
    if not problems:
        return
    listing = [f'{what} (node "{name}")' for name, what in problems.items()]
    more = f" and {len(listing) - 20} more" if len(listing) > 20 else ""
    raise PassRequirementError(
        f"the bridge to PyTorch lacks {'; '.join(listing[:20])}{more}, in this model of opset {opset_of(model)}; "
        "use passes that need no training (export, fp16, int8 without qat), or a model without these"
    )


def _import(builder: Builder, node: NodeProto, problems: dict[str, str]) -> None:
    """Import one node; what cannot be expressed is noted, and its readers skipped."""
    outputs: Sequence[Value]
    if any(isinstance(builder.values.get(name), Broken) for name in node.input):
        outputs = [Broken()] * len(node.output)
    else:
        try:
            outputs = _outputs_of(builder, node)
        except UnsupportedError as error:
            problems[node.name] = f"{node.op_type}: {error}"
            outputs = [Broken()] * len(node.output)
    for name, value in zip(node.output, outputs, strict=False):
        if name:
            builder.values[name] = value


def _outputs_of(builder: Builder, node: NodeProto) -> Sequence[Value]:
    if node.op_type == "Constant":
        if any(held.name == "sparse_value" for held in node.attribute):
            raise UnsupportedError("a sparse constant")
        array = numpy_helper.to_array(_constant_tensor(node))
        return [Constant(array=array, origin=node.output[0])]
    if node.name in builder.absorbed:
        return [builder.absorbed[node.name]]
    site = Site(builder, node)
    known = folded(site)
    if known is not None:
        return known
    given = [value for value in site.inputs if value is not None]
    made: Value | Sequence[Value]
    if _all_on_host(builder, given) and node.op_type in HOST_OPERATORS:
        made = HOST_OPERATORS[node.op_type](site)
    else:
        made = OPERATORS[node.op_type](site)
    outputs = list(made) if isinstance(made, Sequence) else [made]
    _keep_marks(builder, node, given, outputs)
    return outputs


def _all_on_host(builder: Builder, values: Sequence[Value]) -> bool:
    nodes = [value for value in values if isinstance(value, fx.Node)]
    return (
        bool(nodes)
        and all(node in builder.host for node in nodes)
        and not any(isinstance(value, RoundedConstant) for value in values)
    )


def _keep_marks(builder: Builder, node: NodeProto, given: Sequence[Value], outputs: Sequence[Value]) -> None:
    """Integers stay integers through operators that only move them; others may not read them."""
    marked = [value for value in given if isinstance(value, fx.Node) and value in builder.integers]
    if not marked or node.op_type in {"DequantizeLinear", "Shape", "Size"}:
        return
    rounding, path = builder.integers[marked[0]]
    alike = all(builder.integers[value][0].equals(rounding) for value in marked)
    joins = node.op_type == "Concat" and alike and len(marked) == len(given)
    if (node.op_type not in KEEP_INTEGERS and not joins) or rounding.axis is not None:
        raise UnsupportedError("it computes with integers; a DequantizeLinear before it is missing")
    for output in outputs:
        if isinstance(output, fx.Node):
            builder.integers[output] = (rounding, path)


_DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "uint16": torch.uint16,
    "int16": torch.int16,
}


def _outputs(builder: Builder, names: Sequence[str]) -> Any:
    """The graph's result: one tensor, or a tuple of several."""
    found = []
    for name in names:
        value = builder.values[name]
        tensor = builder.tensor(value)
        if tensor in builder.integers:
            rounding, path = builder.integers[tensor]
            scale = builder.graph.get_attr(f"{path}.scale")
            zero = builder.graph.get_attr(f"{path}.zero_point")
            tensor = builder.call(to_integers, tensor, scale, zero, _DTYPES.get(rounding.dtype, torch.int8))
        found.append(tensor)
    return found[0] if len(found) == 1 else tuple(found)


def _finish(builder: Builder, original: ModelProto) -> Bridge:
    for node in reversed(list(builder.graph.nodes)):
        # All is free of side effects; fx's own clean-up would want a finished module.
        if not node.users and node.op not in {"placeholder", "output"}:
            builder.graph.erase_node(node)
    builder.graph.lint()
    with warnings.catch_warnings():
        # fx warns of attributes that it will not see, which are none of ours.
        warnings.simplefilter("ignore")
        module = fx.GraphModule(builder.root, builder.graph, class_name="ImportedNet")
    modules = dict(module.named_modules())
    tensors = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tensors |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return Bridge(
        module=module.eval(),
        module_of={name: path for name, path in builder.module_of.items() if path in modules},
        slots=tuple(slot for slot in builder.slots if slot.path in tensors),
        original=original,
        evaluated=frozenset(builder.evaluated),
    )
