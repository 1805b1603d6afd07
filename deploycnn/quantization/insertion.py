"""From a plan and ranges to the Q/DQ graph.

Names follow onnxruntime's quantizer, which other tools know: ``W_quantized``, ``W_scale``, ``W_zero_point``,
``X_QuantizeLinear``, ``X_DequantizeLinear_Output``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.cleanup import remove_unused
from deploycnn.graph.model import attribute, infer_shapes, sort_nodes, value_types
from deploycnn.graph.names import unique
from deploycnn.graph.opset import raise_opset
from deploycnn.quantization.first_layers import release_float_layers
from deploycnn.quantization.grids import Grid, activation_parameters, fold_clips
from deploycnn.quantization.guards import guard_float_layers, guard_operators
from deploycnn.quantization.placement import output_axis
from deploycnn.quantization.pools import convolve_pools
from deploycnn.quantization.selections import Selection, find_selections
from deploycnn.quantization.structure import Structure
from deploycnn.quantization.types import ActivationPlan, IntegerWeight, Plan, Ranges, WeightPlan
from deploycnn.quantization.weights import quantize_bias, quantize_weight, with_room_for_bias

#: The first operator set with per-channel DequantizeLinear, and that with 4-bit integers.
MIN_OPSET = 13
MIN_OPSET_4_BITS = 21

_NUMPY = {"uint8": np.uint8, "int8": np.int8, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}


def build(
    model: ModelProto,
    plan: Plan,
    ranges: Ranges,
    weights: Mapping[str, IntegerWeight] | None = None,
) -> ModelProto:
    """The quantized graph.

    A plan without activations makes a graph whose weights are integers and which computes in float.

    Args:
        model: The float graph that ``plan`` was made of; it is left as it is.
        plan: Of ``placement.place``.
        ranges: For each value of ``plan.activations`` that has none of its own (``ranges_needed``).
        weights: Integer weights by initializer, of a recovery that rounds otherwise; the rest are rounded to
            nearest.

    Returns:
        A graph with the inputs, outputs and metadata of ``model``, whose opset is raised where the plan needs it.

    Raises:
        PassRequirementError: a range is missing or not finite, a weight is not finite, or the opset cannot be
            raised.
    """
    four_bits = any(weight.number.dtype.endswith("4") for weight in plan.weights)
    source = raise_opset(model, MIN_OPSET_4_BITS if four_bits else MIN_OPSET)
    draft = ModelProto()
    draft.CopyFrom(source)
    parameters = activation_parameters(draft, plan, ranges)
    fold_clips(draft, plan, parameters)
    builder = _Builder(draft, plan, parameters)
    builder.quantize_weights(weights or {})
    for activation in plan.activations:
        builder.round(activation)
    builder.finish()
    release_float_layers(draft)
    if plan.guards_float:
        guard_float_layers(draft)
    guard_operators(draft)
    draft = infer_shapes(draft)
    if plan.convolves_pools and convolve_pools(draft, value_types(draft)):
        draft = infer_shapes(draft)
    return draft


def ranges_needed(plan: Plan) -> tuple[str, ...]:
    """Values whose range calibration has to find."""
    return tuple(item.value for item in plan.activations if item.fixed is None)


class _Builder:
    """Adds Q/DQ to a graph in place."""

    def __init__(self, model: ModelProto, plan: Plan, parameters: Mapping[str, Grid]) -> None:
        self._model = model
        self._plan = plan
        self._parameters = parameters
        self._graph = Structure(model)
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._taken = {name for node in self._graph.nodes for name in (*node.input, *node.output, node.name)}
        self._taken |= set(self._graph.inputs) | self._graph.outputs | set(self._graph.constants)
        #: Names of scale and zero point by group of tied values.
        self._scales: dict[str, tuple[str, str]] = {}
        #: Names of the integers of values.
        self._integers: dict[str, str] = {}
        # Both only move data, so that what they make has the scale of what they read (units.py).
        integer = set(plan.quantized_nodes)
        #: What is padded, by name of the node that pads it on integers.
        self._pads = {
            node.name: node.input[0]
            for node in self._graph.nodes
            if node.op_type in plan.on_integers and node.name in integer and self._graph.pads_zeros(node)
        }
        #: What is a convolution instead of slices and paddings, by the value that it makes.
        self._selections: dict[str, Selection] = {}
        if plan.convolves_selections:
            self._selections = find_selections(self._graph, value_types(model), integer)

    def finish(self) -> None:
        """Sort, and drop what nobody reads any more."""
        # New nodes stand at the end so far.
        sort_nodes(self._model)
        remove_unused(self._model)
        self._model.producer_name, self._model.producer_version = "deploycnn", ""

    # Activations.

    def round(self, item: ActivationPlan) -> None:
        """Put Q/DQ between a value and its readers."""
        value = item.value
        if value in self._graph.constants:
            rounded = self._constant(item)
        else:
            rounded = self._selected(item) or self._padded(item) or self._pair(item)
        for node in self._graph.nodes:
            if item.readers is None or node.name in item.readers:
                for position, name in enumerate(node.input):
                    if name == value:
                        node.input[position] = rounded

    def _pair(self, item: ActivationPlan) -> str:
        """Q/DQ behind a value; return the name of what readers should take."""
        value = item.value
        source, rounded = value, self._name(f"{value}_DequantizeLinear_Output")
        if value in self._graph.outputs and value in self._graph.made_by and item.readers is None:
            # It keeps its name; what the node makes gets another.
            source, rounded = self._name(f"{value}_QuantizeLinear_Input"), value
            maker = self._graph.made_by[value]
            maker.output[list(maker.output).index(value)] = source
        return self._rounded(item, source, rounded)

    def _rounded(self, item: ActivationPlan, source: str, rounded: str) -> str:
        """Q/DQ from one name to another; return the latter."""
        integers = self._name(f"{item.value}_QuantizeLinear_Output")
        self._add("QuantizeLinear", [source, *self._scale(item)], integers, f"{item.value}_QuantizeLinear")
        return self._real(item, integers, rounded)

    def _selected(self, item: ActivationPlan) -> str | None:
        """A shortcut without weights as a convolution; ``None`` for other values."""
        selection = self._selections.get(item.value)
        if selection is None:
            return None
        reader = self._nodes[selection.reader]
        if not self._same_integers(selection.source, reader, item):
            return None
        name, weight = self._graph.made_by[item.value].name, selection.weight()
        ones = IntegerWeight(integers=weight, scale=np.ones(len(weight), np.float32), axis=0)
        made = self._name(f"{item.value}_selection")
        node = helper.make_node(
            "Conv",
            [reader.input[0], self._store_weight(f"{name}_weight", ones, "int8")],
            [made],
            name=self._name(f"{name}_selected"),
            strides=selection.strides,
        )
        self._model.graph.node.append(node)
        return self._rounded(item, made, self._name(f"{item.value}_DequantizeLinear_Output"))

    def _same_integers(self, source: str, reader: NodeProto, item: ActivationPlan) -> bool:
        """Whether ``reader`` takes the integers of ``source``, and nobody wants the value in float."""
        return (
            source in self._integers
            and reader.input[0] != source  # it reads in float
            and item.value not in self._graph.outputs
        )

    def _padded(self, item: ActivationPlan) -> str | None:
        """What pads zeros, on integers; ``None`` where something else makes the value, or the integers are others."""
        maker = self._graph.made_by.get(item.value)
        source = self._pads.get(maker.name) if maker is not None else None
        if maker is None or source is None or not self._same_integers(source, maker, item):
            return None
        integers = self._name(f"{item.value}_quantized")
        node = helper.make_node(
            "Pad",
            [self._integers[source], maker.input[1], self._scale(item)[1], *maker.input[3:]],
            [integers],
            name=self._name(f"{maker.name}_quantized"),
        )
        node.attribute.extend(maker.attribute)
        self._model.graph.node.append(node)
        return self._real(item, integers, self._name(f"{item.value}_DequantizeLinear_Output"))

    def _real(self, item: ActivationPlan, integers: str, rounded: str) -> str:
        """DequantizeLinear behind the integers of a value; return its output, which readers should take."""
        self._add(
            "DequantizeLinear", [integers, *self._scale(item)], rounded, f"{item.value}_DequantizeLinear"
        )
        self._integers[item.value] = integers
        return rounded

    def _constant(self, item: ActivationPlan) -> str:
        """A constant operand in the format of activations, stored as integers."""
        value = item.value
        scale, zero_point, number = self._parameters[value]
        real = numpy_helper.to_array(self._graph.constants[value]).astype(np.float64)
        integers = np.clip(np.rint(real / np.float64(scale)) + zero_point, number.qmin, number.qmax)
        held = self._store(f"{value}_quantized", integers.astype(_NUMPY[number.dtype]))
        rounded = self._name(f"{value}_DequantizeLinear_Output")
        self._add("DequantizeLinear", [held, *self._scale(item)], rounded, f"{value}_DequantizeLinear")
        return rounded

    def _scale(self, item: ActivationPlan) -> tuple[str, str]:
        """Names of the scale and zero point of a value, which it shares with those that it is tied to."""
        group = item.tied or item.value
        if group not in self._scales:
            scale, zero_point, number = self._parameters[item.value]
            self._scales[group] = (
                self._store(f"{group}_scale", np.asarray(scale)),
                self._store(f"{group}_zero_point", np.asarray(zero_point, dtype=_NUMPY[number.dtype])),
            )
        return self._scales[group]

    # Weights and biases.

    def quantize_weights(self, given: Mapping[str, IntegerWeight]) -> None:
        """Store every planned constant once, and the biases that go with integer kernels."""
        plans: dict[tuple[str, int | None], list[WeightPlan]] = {}
        for item in self._plan.weights:
            plans.setdefault((item.initializer, item.axis), []).append(item)
        for (initializer, _), items in plans.items():
            array = numpy_helper.to_array(self._graph.constants[initializer])
            weight = given.get(initializer) or quantize_weight(array, items[0])
            if weight.integers.shape != array.shape or weight.axis != items[0].axis:
                raise PassRequirementError(
                    f'integer weights for "{initializer}" have shape {weight.integers.shape} and axis {weight.axis}; '
                    f"the plan wants {array.shape} and {items[0].axis}"
                )
            biased = [
                (self._nodes[item.node], bias, scale)
                for item in items
                for bias, scale in self._bias(self._nodes[item.node], weight)
            ]
            # Float biases too: onnxruntime rounds them to int32 itself, and they overflow where weights are next to 0.
            for _, bias, scale in biased:
                weight = with_room_for_bias(weight, bias, float(scale), items[0].number)
            stored = self._store_weight(initializer, weight, items[0].number.dtype)
            for item in items:
                self._nodes[item.node].input[1] = stored
            for node, bias, scale in biased if self._plan.integer_bias else ():
                self._store_bias(node, bias, scale, weight)

    def _bias(
        self, node: NodeProto, weight: IntegerWeight
    ) -> Iterable[tuple[npt.NDArray[np.float64], np.float32]]:
        """The bias of a node and the scale of its input; nothing where either is missing."""
        scale = self._input_scale(node)
        if scale is None or len(node.input) < 3 or not node.input[2]:
            return []
        bias = numpy_helper.to_array(self._graph.constants[node.input[2]]).astype(np.float64)
        channels = weight.integers.shape[output_axis(node)]
        bias = np.broadcast_to(bias.reshape(-1), (channels,))
        return [(bias * cast("float", attribute(node, "beta", 1.0)), scale)]

    def _input_scale(self, node: NodeProto) -> np.float32 | None:
        for item in self._plan.activations:
            if item.value == node.input[0] and (item.readers is None or node.name in item.readers):
                return self._parameters[item.value].scale
        return None

    def _store_weight(self, name: str, weight: IntegerWeight, dtype: str) -> str:
        """Integers and their DequantizeLinear; return its output, which layers should take."""
        kind = _NUMPY[dtype]
        inputs = [
            self._store(f"{name}_quantized", weight.integers.astype(kind)),
            self._store(f"{name}_scale", weight.scale),
            self._store(f"{name}_zero_point", np.zeros(weight.scale.shape, dtype=kind)),
        ]
        rounded = self._name(f"{name}_DequantizeLinear_Output")
        self._add("DequantizeLinear", inputs, rounded, f"{name}_DequantizeLinear", weight.axis)
        return rounded

    def _store_bias(
        self, node: NodeProto, bias: npt.NDArray[np.float64], input_scale: np.float32, weight: IntegerWeight
    ) -> None:
        name = node.input[2]
        integers, scale = quantize_bias(bias, input_scale, weight.scale)
        rounded = self._name(f"{name}_DequantizeLinear_Output")
        inputs = [
            self._store(f"{name}_quantized", integers),
            self._store(f"{name}_quantized_scale", scale),
            self._store(f"{name}_quantized_zero_point", np.zeros(scale.shape, dtype=np.int32)),
        ]
        self._add("DequantizeLinear", inputs, rounded, f"{name}_DequantizeLinear", 0 if scale.ndim else None)
        node.input[2] = rounded
        kept = [held for held in node.attribute if held.name != "beta"]
        del node.attribute[:]
        node.attribute.extend(kept)

    # Small things.

    def _name(self, wanted: str) -> str:
        name = unique(wanted, self._taken)
        self._taken.add(name)
        return name

    def _store(self, wanted: str, array: npt.NDArray[np.generic]) -> str:
        name = self._name(wanted)
        self._model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _add(self, op: str, inputs: list[str], output: str, name: str, axis: int | None = None) -> None:
        node = helper.make_node(op, inputs, [output], name=self._name(name))
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self._model.graph.node.append(node)
