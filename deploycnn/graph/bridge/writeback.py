"""Trained tensors go back into the ONNX tensors that they came from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, fx

from deploycnn.errors import PassRequirementError, TrainingError
from deploycnn.graph.bridge.builder import Slot, digest
from deploycnn.graph.bridge.fake_quant import BiasQuantize, FakeQuantize
from deploycnn.graph.bridge.values import Array


def write(original: ModelProto, slots: Sequence[Slot], module: fx.GraphModule) -> ModelProto:
    """A copy of ``original`` with the module's tensors in it."""
    model = ModelProto()
    model.CopyFrom(original)
    store = _Store(model)
    for slot in slots:
        tensor = _tensor(module, slot.path)
        if _untouched(slot, tensor, module):
            continue
        if slot.path.endswith(".scale") and not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
            raise TrainingError(
                f"write_back: {slot.path} was trained to {float(tensor.min()):.3g}, and scales are positive; "
                "lower the learning rate or keep scales fixed"
            )
        array = _array(tensor) if slot.quantizer is None else _integers(slot, tensor, module)
        store.put(slot.origin, slot.undo(array), slot.path)
    return model


def _tensor(module: fx.GraphModule, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    holder = module.get_submodule(owner)
    if name == "scale" and isinstance(holder, FakeQuantize):
        return _effective_scale(holder)
    found: Tensor = getattr(holder, name)
    return found.detach()


def _effective_scale(quantizer: FakeQuantize) -> Tensor:
    """A quantizer's scale; that of a bias follows from input and weight where these were trained."""
    scale = quantizer.scale.detach()
    if not isinstance(quantizer, BiasQuantize) or not quantizer.tied:
        return scale
    # Rounding of the product may differ in the last bit from the file's; only a change counts.
    product = quantizer.current_scale().detach()
    return scale if bool(((product - scale).abs() <= 1e-5 * scale).all()) else product


def _array(tensor: Tensor) -> Array:
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:  # NumPy has no such type
        return plain.to(torch.float32).numpy()
    found: Array = plain.numpy()
    return found


def _integers(slot: Slot, tensor: Tensor, module: fx.GraphModule) -> Array:
    quantizer = module.get_submodule(slot.quantizer or "")
    assert isinstance(quantizer, FakeQuantize)  # noqa: S101 - for the type checker
    return _array(quantizer.quantize(tensor))


def _untouched(slot: Slot, tensor: Tensor, module: fx.GraphModule) -> bool:
    """Whether a tensor, and the scale and zero point that its integers were read with, are as imported."""
    if slot.digest != digest(_array(tensor)):
        return False
    if slot.quantizer is None:
        return True
    assert slot.rounding is not None  # noqa: S101 - for the type checker
    quantizer = module.get_submodule(slot.quantizer)
    assert isinstance(quantizer, FakeQuantize)  # noqa: S101 - for the type checker
    scale = _effective_scale(quantizer)
    return np.array_equal(_array(scale), slot.rounding.scale) and np.array_equal(
        _array(quantizer.zero_point), slot.rounding.zero_point
    )


class _Store:
    """The tensors of a model by name: initializers, constants, and values of folded nodes."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.written: dict[str, Array] = {}
        for node in model.graph.node:
            if node.op_type == "Constant":
                (held,) = node.attribute
                if held.name == "value":
                    self.tensors[node.output[0]] = held.t

    def put(self, name: str, array: Array, path: str) -> None:
        """Write ``array`` in the tensor's own type; a tensor that was computed becomes an initializer.

        Raises:
            PassRequirementError: its shape is another, or another layer already wrote something else.
        """
        if name in self.written:
            if not np.array_equal(self.written[name], array):
                raise PassRequirementError(
                    f'write_back: layers that share "{name}" hold different values, {path} the last; tie them'
                )
            return
        self.written[name] = array
        tensor = self.tensors.get(name)
        if tensor is None:
            self._replace_node(name, array)
            return
        before = numpy_helper.to_array(tensor)
        if before.size != array.size:
            raise PassRequirementError(
                f'write_back: {path} has shape {array.shape}, but "{name}" of the ONNX model has {before.shape}; '
                "export the module instead"
            )
        content = array.reshape(before.shape).astype(before.dtype)
        if content.tobytes() != before.tobytes():
            own_name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(content, own_name))

    def _replace_node(self, name: str, array: Array) -> None:
        """Put a constant in place of the node that computed it, once training changed it."""
        graph = self.model.graph
        for node in graph.node:
            if name not in node.output:
                continue
            if len([output for output in node.output if output]) > 1:
                raise PassRequirementError(
                    f'write_back: "{name}" is one of several outputs of node "{node.name}"; simplify the model first'
                )
            if node.op_type != "Constant":
                graph.node.remove(node)
                graph.initializer.append(numpy_helper.from_array(array, name))
            else:
                _set_constant(node, array)
            return
        raise PassRequirementError(f'write_back: the ONNX model has no tensor "{name}"')


def _set_constant(node: NodeProto, array: Array) -> None:
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(array)))
