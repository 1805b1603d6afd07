"""What layers of a quantized graph read, in bounded memory, and patches of it.

Values that many layers need are kept as the integers that the deployed graph passes on, a byte each, and only as
long as a later layer needs them. The next value is computed from what is kept, so that the graph is run once in
all, not once for each layer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from deploycnn.graph.model import attribute, initializers, names_used, producers, shape_of, value_types
from deploycnn.graph.observe import image_input
from deploycnn.graph.parity import cpu_session
from deploycnn.quantization.reconstruction import Layer

Array = npt.NDArray[Any]
Reals = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

_BATCH = 32


class Frontier:
    """Values of a quantized graph on a fixed set of images, computed in graph order.

    Attributes:
        kept_bytes: What is held now.
        peak_bytes: The most that was held.
    """

    def __init__(self, model: ModelProto, images_NCHW: Reals, *, threads: int = 1) -> None:
        """Begin with the images alone.

        Args:
            model: With inferred shapes; its weights may change later, until a value that depends on them is read.
            images_NCHW: Preprocessed.
            threads: CPU threads.
        """
        self.model, self.threads = model, threads
        self.name, shape = image_input(model)
        self.batch = shape[0] or _BATCH
        self.made_by = producers(model.graph)
        self.types = value_types(model)
        self.kept: dict[str, Array] = {self.name: images_NCHW}
        self.count = len(images_NCHW)
        self.peak_bytes = self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """Of all values held, the images included."""
        return sum(content.nbytes for content in self.kept.values())

    def read(self, value: str) -> tuple[Array, float, int]:
        """``value`` on all images as integers with scale and zero point, or in real units with 1.0 and 0."""
        stored, scale, zero_point = self.storage(value)
        if stored not in self.kept:
            self.kept[stored] = self._compute(stored)
            self.peak_bytes = max(self.peak_bytes, self.kept_bytes)
        return self.kept[stored], scale, zero_point

    def storage(self, value: str) -> tuple[str, float, int]:
        """Where ``value`` is kept: the integers that it is dequantized from, where they have one scale."""
        node = self.made_by.get(value)
        weights = initializers(self.model.graph)
        if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in weights:
            return value, 1.0, 0
        scale = numpy_helper.to_array(weights[node.input[1]])
        if scale.size != 1:
            return value, 1.0, 0
        has_zero = len(node.input) > 2 and node.input[2] in weights
        zero_point = int(numpy_helper.to_array(weights[node.input[2]]).item()) if has_zero else 0
        return node.input[0], float(scale.item()), zero_point

    def forget_all_but(self, wanted: Sequence[str]) -> None:
        """Drop what is not needed to compute ``wanted``, values that will be read later."""
        needed = self._leaves([self.storage(value)[0] for value in wanted])
        self.kept = {name: content for name, content in self.kept.items() if name in needed}

    def _leaves(self, targets: Iterable[str]) -> set[str]:
        """Kept values from which ``targets`` can be computed."""
        found, seen, stack = set(), set(), list(targets)
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self.kept:
                found.add(name)
            elif name in self.made_by:
                stack.extend(names_used(self.made_by[name]))
        return found

    def _compute(self, value: str) -> Array:
        leaves = sorted(self._leaves([value]))
        session = cpu_session(self._between(leaves, value), threads=self.threads, integers=False)
        pieces = []
        for start in range(0, self.count, self.batch):
            feeds = {name: self.kept[name][start : start + self.batch] for name in leaves}
            short = self.batch - len(feeds[leaves[0]])
            pad = short if self.types[self.name].type.tensor_type.shape.dim[0].HasField("dim_value") else 0
            if pad:
                feeds = {
                    name: np.concatenate([content, np.repeat(content[-1:], pad, axis=0)])
                    for name, content in feeds.items()
                }
            (content,) = session.run([value], feeds)
            pieces.append(content[: len(content) - pad])
        return np.concatenate(pieces)

    def _between(self, leaves: Sequence[str], value: str) -> ModelProto:
        """The part of the graph that makes ``value`` from ``leaves``."""
        needed, seen, stack = set(), set(leaves), [value]
        while stack:
            name = stack.pop()
            if name not in seen and name in self.made_by:
                needed.add(id(self.made_by[name]))
                stack.extend(names_used(self.made_by[name]))
            seen.add(name)
        nodes = [node for node in self.model.graph.node if id(self.made_by.get(node.output[0])) in needed]
        used = {name for node in nodes for name in names_used(node)}
        graph = helper.make_graph(
            nodes,
            "part",
            [self._declare(name) for name in leaves],
            [self._declare(value)],
            [tensor for tensor in self.model.graph.initializer if tensor.name in used],
        )
        part = helper.make_model(graph, opset_imports=list(self.model.opset_import))
        part.ir_version = self.model.ir_version
        return part

    def _declare(self, name: str) -> ValueInfoProto:
        """A graph input or output; of any batch size."""
        known = self.types.get(name)
        if known is not None and shape_of(known) is not None:
            return known
        node = self.made_by[name]
        kind: int = TensorProto.FLOAT
        if node.op_type == "QuantizeLinear":
            zero_points = initializers(self.model.graph)
            kind = zero_points[node.input[2]].data_type if len(node.input) > 2 else TensorProto.UINT8
        return helper.make_tensor_value_info(name, kind, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Where a convolution looks: kernel (height, width), strides, dilations, padding (top, left) and groups."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]
    groups: int

    @classmethod
    def of(cls, node: NodeProto, kernel: tuple[int, int], size: tuple[int, int]) -> Window:
        """The window of a Conv node on inputs of ``size`` (height, width)."""
        strides = _pair(node, "strides")
        dilations = _pair(node, "dilations")
        mode = cast("bytes", attribute(node, "auto_pad", b"NOTSET")).decode()
        pads = cast("list[int]", attribute(node, "pads", [0, 0, 0, 0]))
        if mode.startswith("SAME"):
            before, after = [], []
            for extent, step, width, hole in zip(size, strides, kernel, dilations, strict=True):
                total = max(0, (-(-extent // step) - 1) * step + (width - 1) * hole + 1 - extent)
                first = (total + 1) // 2 if mode == "SAME_LOWER" else total // 2
                before.append(first)
                after.append(total - first)
            pads = before + after
        elif mode == "VALID":
            pads = [0, 0, 0, 0]
        groups = int(cast("int", attribute(node, "group", 1)))
        return cls(
            kernel=kernel, strides=strides, dilations=dilations, pads=(pads[0], pads[1], pads[2], pads[3]),
            groups=groups,
        )  # fmt: skip

    def patches(self, inputs_NCHW: Array, places_NP2: Positions, padding: int) -> Array:
        """What the kernel sees at output rows and columns ``places_NP2``, shape (N * P, groups, C/groups * kernel).

        Args:
            inputs_NCHW: Integers or reals.
            places_NP2: P (row, column) of the output for each image.
            padding: What stands outside of the image: the integer of zero.
        """
        top, left, bottom, right = self.pads
        padded = np.pad(inputs_NCHW, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=padding)
        rows = places_NP2[:, :, 0, None] * self.strides[0] + np.arange(self.kernel[0]) * self.dilations[0]
        columns = places_NP2[:, :, 1, None] * self.strides[1] + np.arange(self.kernel[1]) * self.dilations[1]
        images = np.arange(len(inputs_NCHW))[:, None, None, None]
        # Advanced indices around a slice come first: (N, P, kernel height, kernel width, C).
        found = padded[images, :, rows[:, :, :, None], columns[:, :, None, :]]
        found = np.moveaxis(found, 4, 2)
        return found.reshape(found.shape[0] * found.shape[1], self.groups, -1)


def _pair(node: NodeProto, name: str) -> tuple[int, int]:
    values = cast("list[int]", attribute(node, name, [1, 1]))
    return values[0], values[-1]


def choose_places(rng: np.random.Generator, images: int, size: tuple[int, int], per_image: int) -> Positions:
    """Distinct (row, column) pairs for each image, shape (images, min(per_image, height * width), 2)."""
    height, width = size
    total = height * width
    if per_image >= total:
        flat = np.broadcast_to(np.arange(total), (images, total))
    else:
        flat = np.stack([rng.choice(total, per_image, replace=False) for _ in range(images)])
    return np.stack((flat // width, flat % width), axis=-1)


def pixels(content: Array, op_type: str) -> Array:
    """A view (N, height, width, channels): of images for convolutions, of rows (height) for matrix products."""
    if op_type == "Conv":
        return np.moveaxis(content, 1, 3)
    return content.reshape(len(content), -1, 1, content.shape[-1])


def take(content_NHWC: Array, places_NP2: Positions) -> Array:
    """The chosen pixels, shape (N * P, channels)."""
    images = np.arange(len(content_NHWC))[:, None]
    found = content_NHWC[images, places_NP2[:, :, 0], places_NP2[:, :, 1]]
    return found.reshape(-1, found.shape[-1])


@dataclass(slots=True, kw_only=True)
class Samples:
    """What the float graph gives for one layer: where, the layer's output, and what is added to it."""

    places: Positions
    targets: list[Reals]
    addends: list[Reals]


class Sampler:
    """Visits the float graph's values and keeps samples of what layers should give."""

    def __init__(self, layers: Sequence[Layer], images: int, samples: int, seed: int) -> None:
        """Choose about ``samples`` positions for each layer, evenly over ``images``."""
        self.layers = layers
        self.images, self.per_image, self.seed = images, max(1, -(-samples // images)), seed
        self.seen: dict[str, int] = {}
        self.samples: dict[str, Samples] = {}
        self.lock = threading.Lock()
        self.by_value: dict[str, list[tuple[int, bool]]] = {}
        for number, layer in enumerate(layers):
            self.by_value.setdefault(layer.target, []).append((number, False))
            if layer.target_addend is not None:
                self.by_value.setdefault(layer.target_addend, []).append((number, True))

    @property
    def values(self) -> list[str]:
        """What there is to visit."""
        return list(self.by_value)

    def visit(self, value: str, content: Reals) -> None:
        """Take samples of the next batch of ``value``."""
        first = self.seen.get(value, 0)
        self.seen[value] = first + len(content)
        for number, added in self.by_value.get(value, ()):
            layer = self.layers[number]
            view = pixels(content, layer.op_type)
            # A layer's output and its addend may be visited at the same time.
            with self.lock:
                if layer.node.name not in self.samples:
                    rng = np.random.default_rng([self.seed, 0xADA, number])
                    places = choose_places(rng, self.images, (view.shape[1], view.shape[2]), self.per_image)
                    self.samples[layer.node.name] = Samples(places=places, targets=[], addends=[])
            mine = self.samples[layer.node.name]
            taken = take(view, mine.places[first : first + len(content)])
            (mine.addends if added else mine.targets).append(taken)
