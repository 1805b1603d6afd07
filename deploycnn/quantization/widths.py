"""Channel counts that onnxruntime's fast integer convolutions take.

On x86 the fast kernel of depthwise convolutions takes 16 channels at a time, that of the others input and output
channels in fours, of which at least 16 outputs (``MlasConvSym``); what does not fit goes through kernels that take 2.3
to 2.7 times as long (depthwise, 3x3 and 5x5) and 1.2 to 2.2 times (others). So values get channels of zeros behind
their own: who makes them gets weights of zeros for these, and so does who reads them. Exact: what is between a zero
channel and its zero weights has no say. Float layers lose nothing either, as their kernels take 16 channels at a time.

Values that must have the same channels get the same ones (``channel_sets.py``), if that is worth its cost.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from deploycnn.graph.constants import replace_constant
from deploycnn.graph.model import attribute, infer_shapes, initializers
from deploycnn.graph.names import names_taken, unique
from deploycnn.quantization.channel_sets import ChannelSet, ChannelSets

#: What the kernels take: channels of depthwise convolutions, channels of others, and at least so many outputs of these.
_DEPTHWISE, _DENSE, _LEAST_OUTPUTS = 16, 4, 16

# Nanoseconds on one core of a Sapphire Rapids (VNNI), of which only the ratios matter.
#: Of a depthwise convolution, for each product: with the fast kernel, and without.
_FAST_TAP, _SLOW_TAP = 0.06, 0.14
#: What one pixel costs more where a convolution does not get the fast kernel.
_SLOW_PIXEL = 15.0
#: Of another input channel of a convolution, for each tap: at all, and for each output channel.
_TAP, _TAP_OUTPUT = 0.04, 0.0026
#: What a change must gain.
_LEAST_GAIN = 1000.0
#: A value's channels: which one of its old ones each is, -1 for a new one of zeros.
Order = npt.NDArray[np.int64]


def align_channels(model: ModelProto) -> int:
    """Add channels of zeros where that makes integer convolutions faster, in place; return to how many values.

    Args:
        model: A simplified float32 model whose nodes are named and whose shapes are inferred.
    """
    sets = ChannelSets(model)
    while True:
        decided = _decided(sets)
        narrow = [node for node in sets.paddings if _zeros_behind(sets, node, decided) < 0]
        if not narrow:
            break
        sets.hold(*(sets.root(node.input[0]) for node in narrow))
    orders = {name: decided[sets.root(name)] for name, _ in sets.graph.values() if sets.root(name) in decided}
    if orders:
        _Padding(model, sets, orders).apply()
        model.CopyFrom(infer_shapes(model))
    return len(orders)


def _zeros_behind(sets: ChannelSets, node: NodeProto, orders: Mapping[str, Order]) -> int:
    """How many channels of zeros a ``Pad`` must add behind, by the orders of sets or of values."""
    before, _ = sets.graph.zero_channels(node) or (0, 0)
    widths = []
    for name in (node.output[0], node.input[0]):
        order = orders.get(name, orders.get(sets.root(name)))
        widths.append(sets.channels(name) if order is None else len(order))
    return widths[0] - before - widths[1]


def _decided(sets: ChannelSets) -> dict[str, Order]:
    """The new channels of every set that gets some, by what it is called."""
    decided: dict[str, Order] = {}
    for family in sets.families():
        best, most = dict[str, Order](), _LEAST_GAIN
        for depthwise in (_DEPTHWISE, _DENSE):
            orders = _orders(sets, family, depthwise)
            gain = sum(_gain(sets, sets.sets[root], len(order)) for root, order in orders.items())
            if gain > most:
                best, most = orders, gain
        decided |= {root: order for root, order in best.items() if len(order) > sets.sets[root].channels}
    return decided


def _orders(sets: ChannelSets, family: list[str], depthwise: int) -> dict[str, Order]:
    orders: dict[str, Order] = {}
    for root in family:
        here = sets.sets[root]
        if root in sets.parts:
            parts = [orders[part] for part in sets.parts[root]]
            starts = np.cumsum([0, *(sets.sets[part].channels for part in sets.parts[root])])
            orders[root] = np.concatenate(
                [np.where(part < 0, part, part + start) for part, start in zip(parts, starts, strict=False)]
            )
            continue
        wanted = here.channels
        if root not in sets.held:
            multiple = depthwise if here.depthwise else _DENSE
            wanted += -wanted % multiple
            if here.makers and len(family) == 1:
                wanted = max(wanted, _LEAST_OUTPUTS)
        added = wanted - here.channels
        orders[root] = np.concatenate([np.arange(here.channels), np.full(added, -1)]).astype(np.int64)
    return orders


def _gain(sets: ChannelSets, here: ChannelSet, channels: int) -> float:
    """Nanoseconds for one image."""
    added = channels - here.channels
    gain = -added * here.per_channel
    for node in here.depthwise:
        rates = [
            count * (_SLOW_TAP if count % _DEPTHWISE else _FAST_TAP) for count in (here.channels, channels)
        ]
        gain += sets.taps(node) * sets.pixels(node.output[0]) * (rates[0] - rates[1])
    for node in here.makers:
        slow = [count % _DENSE != 0 or count < _LEAST_OUTPUTS for count in (here.channels, channels)]
        gain += _SLOW_PIXEL * sets.pixels(node.output[0]) * (slow[0] - slow[1])
    for node in here.readers:
        outputs = sets.channels(node.output[0])
        pixels = sets.pixels(node.output[0])
        slow = [count % _DENSE != 0 for count in (here.channels, channels)]
        gain += _SLOW_PIXEL * pixels * (slow[0] - slow[1])
        gain -= added * pixels * sets.taps(node) * (_TAP + _TAP_OUTPUT * outputs)
    return gain


class _Padding:
    """Gives nodes the weights and amounts of other channels."""

    def __init__(self, model: ModelProto, sets: ChannelSets, orders: Mapping[str, Order]) -> None:
        self._model = model
        self._sets = sets
        self._orders = orders
        self._taken = names_taken(model.graph)

    def apply(self) -> None:
        for node in self._sets.graph.nodes:
            if node.op_type == "Conv":
                self._convolution(node)
            elif node.op_type in {"Gemm", "MatMul"} and node.input[0] in self._orders:
                rows_out = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
                self._gather(node, 1, self._orders[node.input[0]], axis=1 if rows_out else 0)
            elif node.op_type == "Split" and any(name in self._orders for name in node.output):
                self._split(node)
        for node in self._sets.paddings:
            if {node.input[0], node.output[0]} & set(self._orders):
                amounts = numpy_helper.to_array(self._sets.graph.constants[node.input[1]]).copy()
                amounts[len(amounts) // 2 + 1] = _zeros_behind(self._sets, node, self._orders)
                replace_constant(self._model.graph, node, 1, amounts, self._taken)

    def _convolution(self, node: NodeProto) -> None:
        source, result = self._orders.get(node.input[0]), self._orders.get(node.output[0])
        if result is not None:
            self._gather(node, 1, result, axis=0)
            if len(node.input) > 2 and node.input[2]:
                self._gather(node, 2, result, axis=0)
        if source is None:
            return
        if attribute(node, "group", 1) == 1:
            self._gather(node, 1, source, axis=1)
        else:
            next(held for held in node.attribute if held.name == "group").i = len(source)

    def _split(self, node: NodeProto) -> None:
        sizes = [
            len(self._orders[name]) if name in self._orders else self._sets.channels(name)
            for name in node.output
        ]
        amounts = np.array(sizes, np.int64)
        if len(node.input) > 1 and node.input[1]:
            replace_constant(self._model.graph, node, 1, amounts, self._taken)
            return
        name = unique(f"{node.name}.sizes", self._taken)
        self._taken.add(name)
        self._model.graph.initializer.append(numpy_helper.from_array(amounts, name))
        kept = [held for held in node.attribute if held.name != "num_outputs"]
        del node.attribute[:]
        node.attribute.extend(kept)
        del node.input[1:]
        node.input.append(name)

    def _gather(self, node: NodeProto, position: int, order: Order, axis: int) -> None:
        """Order one axis of a constant, with zeros for what is new."""
        held = initializers(self._model.graph)[node.input[position]]
        values = np.take(numpy_helper.to_array(held), np.maximum(order, 0), axis=axis)
        np.moveaxis(values, axis, 0)[order < 0] = 0
        replace_constant(self._model.graph, node, position, values, self._taken)
