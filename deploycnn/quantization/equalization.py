"""Cross-layer equalization: move scales of channels between layers so that all channels fill the 8-bit range.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", sections 4.1.1
and 4.1.2. Weights here have a scale for each output channel, so it is not the ranges of the maker's rows that have to
be equal but those of the activations, against the weights that read them. With a_c the peak of channel c on
calibration images and w_c the strength with which readers weigh it (each of their outputs counted as a share of its
own size), channel c is divided by

    s_c = sqrt(a_c / w_c)    where a layer reads several channels at once, as in SmoothQuant (Xiao et al. 2023)
    s_c = a_c                where only depthwise layers read it, whose weights have a scale for each channel.

Both are canonical: whatever positive factors the channels were multiplied by beforehand, the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from deploycnn.errors import PassRequirementError
from deploycnn.graph.cleanup import remove_unused
from deploycnn.graph.model import infer_shapes, sort_nodes
from deploycnn.graph.names import unique
from deploycnn.graph.observe import observe
from deploycnn.quantization.channels import (
    ChannelGroup,
    channel_groups,
    gather_inputs,
    is_depthwise,
    rows,
    spread_inputs,
    upper_bound,
)
from deploycnn.quantization.structure import Structure

Floats = npt.NDArray[np.float64]

#: A channel below a clip's bound may grow until this share of the bound is its peak on calibration images.
_HEADROOM = 0.5


def equalize(
    model: ModelProto,
    images: Iterable[npt.NDArray[np.float32]],
    *,
    through_gates: bool = False,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> ModelProto:
    """An equivalent graph whose channels fill the 8-bit range more evenly.

    Equal up to float32 rounding; where a ``Clip`` (ReLU6) bounds a value, equal as long as no channel exceeds twice
    its peak on calibration images.

    Args:
        model: Float, prepared (``static.prepare``); it is left as it is.
        images: Batches of calibration images (N, C, H, W); streamed once.
        through_gates: Also equalize x of ``x * sigmoid(x)``, at the cost of a product in front of the sigmoid. Off,
            such values keep their scale: no weight could absorb it.
        threads: CPU threads.
        progress: Called with the number of images done.

    Raises:
        PassRequirementError: the graph has nothing to equalize; or images as in ``observe``.
    """
    groups = channel_groups(model, through_gates=through_gates)
    if not groups:
        raise PassRequirementError(
            "equalization: no layer's output channels can be rescaled in the layers that read them; leave equalize out"
        )
    peaks = channel_peaks(
        model, [name for group in groups for name in group.values], images, threads=threads, progress=progress
    )
    changed = ModelProto()
    changed.CopyFrom(model)
    _apply(changed, [_scales(model, group, peaks) for group in groups])
    return infer_shapes(changed)


def channel_peaks(
    model: ModelProto,
    values: Iterable[str],
    images: Iterable[npt.NDArray[np.float32]],
    *,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Floats]:
    """Largest magnitude of each channel of each value (N, C, ...), shape (C,).

    Raises:
        PassRequirementError: no images, or images as in ``observe``.
    """
    found: dict[str, Floats] = {}

    def visit(name: str, content: npt.NDArray[np.float32]) -> None:
        flat = content.reshape(*content.shape[:2], -1)
        peak = np.maximum(flat.max(axis=(0, 2)), -flat.min(axis=(0, 2))).astype(np.float64)
        found[name] = np.maximum(found[name], peak) if name in found else peak

    if not observe(model, list(values), images, visit, threads=threads, progress=progress):
        raise PassRequirementError("no calibration images; give data with a non-empty training split")
    return found


def _scales(
    model: ModelProto, group: ChannelGroup, peaks: Mapping[str, Floats]
) -> tuple[ChannelGroup, Floats, float | None]:
    """The group, what each of its channels is divided by, and the bound that its clips have then."""
    graph = Structure(model)
    read = [name for name in group.values if graph.read_by.get(name)]
    # What bounds and activations read is not rounded: only what comes out of them is.
    inner = {
        node.input[0] for node in graph.nodes if node.op_type in {"Relu", "Clip", "Min", "LeakyRelu", "PRelu"}
    }
    peak = np.max(
        [peaks[name] for name in read if name not in inner] or [peaks[name] for name in read], axis=0
    )
    alive = peak > 0
    if not alive.any():
        return group, np.ones(group.channels), None
    full = [_reading(graph, node, peak) for node in group.readers]
    strength = np.max([weight for weight in full if weight is not None] or [np.zeros(group.channels)], axis=0)
    scales = np.where(alive, peak, 1.0)
    if strength.any():
        # Channels that no weight reads are as good as dead.
        alive &= strength > 0
        scales = np.sqrt(np.divide(peak, strength, out=np.ones_like(peak), where=alive))
    scales[~alive] = 1.0
    if group.bounds:
        return group, *_within_bounds(graph, group, scales, peak)
    scales[alive] /= np.exp(np.log(scales[alive]).mean()) if alive.any() else 1.0
    return group, scales, None


def _reading(graph: Structure, node: NodeProto, peak: Floats) -> Floats | None:
    """How strongly a reader weighs each input channel, as a share of its outputs; ``None`` for depthwise layers."""
    weight = numpy_helper.to_array(graph.constants[node.input[1]]).astype(np.float64)
    if is_depthwise(node, weight.shape):
        return None
    power = np.square(rows(node, weight)).sum(axis=2)
    size = (power * np.square(spread_inputs(node, len(power), peak))).sum(axis=1, keepdims=True)
    share = np.divide(power, size, out=np.zeros_like(power), where=size > 0)
    return np.sqrt(gather_inputs(node, share))


def _within_bounds(
    graph: Structure, group: ChannelGroup, scales: Floats, peak: Floats
) -> tuple[Floats, float | None]:
    """Scales under which one common bound stands for all channels' own ones, and that bound.

    A channel that reaches its bound is divided by bound / common; one that stays below may be divided by less, so
    that it grows, until the common bound is ``1 / _HEADROOM`` times its peak.
    """
    bounds = [upper_bound(node, graph, group.channels) for node in group.bounds]
    if any(bound is None or not np.allclose(bound, cast("Floats", bounds[0])) for bound in bounds):
        return np.ones(group.channels), None
    bound = cast("Floats", bounds[0])
    if not np.isfinite(bound).all():
        return np.ones(group.channels), None
    common = float(np.exp(np.log(bound).mean()))
    least = np.minimum(bound, np.maximum(peak, 1e-6 * bound) / _HEADROOM)
    # The channels that are bounded fix the common unit: the largest wish is met exactly by reaching the bound.
    wish = scales / max(float((scales / bound).max()), np.finfo(np.float64).tiny)
    return np.clip(wish, least, bound) / common, common


def rescale(model: ModelProto, scales: Iterable[tuple[ChannelGroup, Floats]]) -> None:
    """Divide the channels of each group by its scales, in place; what the graph computes stays.

    Args:
        model: The graph that the groups were found in, or a copy of it.
        scales: Groups with positive numbers of shape (channels,).
    """
    _apply(model, [(group, by_channel, None) for group, by_channel in scales])


def _apply(model: ModelProto, scales: Iterable[tuple[ChannelGroup, Floats, float | None]]) -> None:
    weights = _Weights(model)
    for group, by_channel, common in scales:
        for node in group.makers:
            weights.scale_outputs(node, 1.0 / by_channel)
        for node in group.readers:
            weights.scale_inputs(node, by_channel)
        for node in group.bounds:
            weights.bound(node, by_channel, common)
        for node in group.gates:
            weights.product_before(node, by_channel)
    weights.store()


class _Weights:
    """The constants of a graph in float64 while they change."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._graph = Structure(model)
        self._nodes = {node.output[0]: node for node in self._graph.nodes}
        self._taken = set(self._graph.constants) | {
            name for node in self._graph.nodes for name in (*node.input, *node.output, node.name)
        }
        self._arrays: dict[str, Floats] = {}
        self._types: dict[str, np.dtype[np.generic]] = {}

    def _array(self, name: str) -> Floats:
        if name not in self._arrays:
            held = numpy_helper.to_array(self._graph.constants[name])
            self._types[name] = held.dtype
            self._arrays[name] = held.astype(np.float64)
        return self._arrays[name]

    def scale_outputs(self, node: NodeProto, factor: Floats) -> None:
        """Multiply a layer's output channels, bias included."""
        table = rows(node, self._array(node.input[1]))
        table *= factor[:, None, None]
        if len(node.input) > 2 and node.input[2]:
            bias = self._array(node.input[2])
            if bias.size != factor.size:
                self._arrays[node.input[2]] = np.broadcast_to(bias.reshape(-1), factor.shape) * factor
            else:
                bias *= factor.reshape(bias.shape)

    def scale_inputs(self, node: NodeProto, factor: Floats) -> None:
        """Multiply a layer's weights of each input channel."""
        table = rows(node, self._array(node.input[1]))
        table *= spread_inputs(node, len(table), factor)[:, :, None]

    def bound(self, found: NodeProto, scales: Floats, common: float | None) -> None:
        """Divide a bound by the scales, or put ``common`` in its place.

        Where it is the same for all channels it becomes one ``Clip``, else ``Relu`` and ``Min``.
        """
        node = self._nodes[found.output[0]]
        upper = cast("Floats", upper_bound(node, self._graph, len(scales))) / scales
        if common is not None:
            upper = np.full(len(scales), common)
        source = node.input[0]
        maker = self._nodes.get(source)
        even = np.allclose(upper, upper[0], rtol=1e-6)
        if even and (node.op_type == "Clip" or self._only_relu(maker, source)):
            source = source if node.op_type == "Clip" else cast("NodeProto", maker).input[0]
            ends = (self._store_new(f"{node.name}_low", np.float64(0)), upper.mean())
            self._become(node, "Clip", [source, ends[0], self._store_new(f"{node.name}_high", ends[1])])
            return
        if node.op_type == "Clip":
            positive = unique(f"{source}_positive", self._taken)
            name = unique(f"{node.name}_relu", self._taken)
            self._taken |= {positive, name}
            self._model.graph.node.append(helper.make_node("Relu", [source], [positive], name=name))
            source = positive
        shape = upper.reshape(1, -1, 1, 1)
        self._become(node, "Min", [source, self._store_new(f"{node.name}_bound", shape)])

    def _only_relu(self, maker: NodeProto | None, value: str) -> bool:
        return maker is not None and maker.op_type == "Relu" and len(self._graph.read_by[value]) == 1

    def product_before(self, found: NodeProto, scales: Floats) -> None:
        """Give a sigmoid the unscaled value: multiply it by the scales again."""
        node = self._nodes[found.output[0]]
        value = unique(f"{node.input[0]}_unscaled", self._taken)
        self._taken.add(value)
        factor = self._store_new(f"{node.name}_scales", scales.reshape(1, -1, 1, 1))
        name = unique(f"{node.name}_unscale", self._taken)
        self._model.graph.node.append(helper.make_node("Mul", [node.input[0], factor], [value], name=name))
        node.input[0] = value

    def _become(self, node: NodeProto, op: str, inputs: list[str]) -> None:
        node.op_type = op
        del node.input[:], node.attribute[:]
        node.input.extend(inputs)

    def _store_new(self, stem: str, array: npt.NDArray[np.float64] | np.float64) -> str:
        name = unique(stem, self._taken)
        self._taken.add(name)
        self._model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def store(self) -> None:
        """Write everything back."""
        for name, array in self._arrays.items():
            self._graph.constants[name].CopyFrom(
                numpy_helper.from_array(array.astype(self._types[name]), name)
            )
        sort_nodes(self._model)
        remove_unused(self._model)
