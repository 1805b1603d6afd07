"""AdaRound: learn for each weight whether to round it up or down, on the deployed graph, layer by layer.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization". Each layer is given the inputs
that it gets in the quantized graph, all earlier layers being decided, and is to give what it gives in the float
graph, behind its activation (asymmetric reconstruction, section 3.3). Where its output is added to a shortcut, the
sum is what is compared, so that the last layer of a residual block also mends what went wrong on the shortcut: the
aim of block reconstruction (Li et al. 2021, "BRECQ") at a layer's cost.

Memory: the samples of one layer, ``cache_bytes`` for values kept between layers, and the targets of all layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - what everybody calls it
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor

from deploycnn.core import Json
from deploycnn.errors import PassRequirementError
from deploycnn.graph.model import attribute, infer_shapes, initializers
from deploycnn.graph.observe import observe
from deploycnn.quantization.reconstruction import Layer, along, find_layers
from deploycnn.quantization.rounding import Problem, Settings, solve
from deploycnn.quantization.sampling import Frontier, Sampler, Samples, Window, pixels, take
from deploycnn.quantization.types import IntegerWeight
from deploycnn.training.determinism import deterministic

_BATCH = 32

#: Types that are stored two numbers to a byte.
_PACKED = frozenset({TensorProto.INT4, TensorProto.UINT4})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """What rounding did to a layer.

    Attributes:
        node: Its name.
        nearest_mse: Error of the rounding that was there, on the images that judge.
        rounded_mse: Error of what was kept, on the same images.
        changed: Share of the weights, in [0, 1], that are rounded otherwise than before.
        kept: Whether the learned rounding was kept; where it was no better on the judging images, what was there
            stayed.
        samples: How many samples there were, the judging ones included.
        seconds: Time spent.
    """

    node: str
    nearest_mse: float
    rounded_mse: float
    changed: float
    kept: bool
    samples: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """The result.

    Attributes:
        weights: Integers by name of the float initializer.
        model: The Q/DQ graph that has them.
        layers: What was done to each.
        images: How many images were used.
        peak_cache_bytes: Most that was kept between layers.
    """

    weights: Mapping[str, IntegerWeight]
    model: ModelProto
    layers: tuple[LayerRecord, ...]
    images: int
    peak_cache_bytes: int

    def to_json(self) -> Json:
        """The record kept with the artifact."""
        return {
            "images": self.images,
            "peak_cache_bytes": self.peak_cache_bytes,
            "layers": [asdict(layer) for layer in self.layers],
        }


def adaround(
    full: ModelProto,
    quantized: ModelProto,
    images_NCHW: npt.NDArray[np.float32],
    settings: Settings,
    *,
    bounds: Mapping[str, tuple[int, int]] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Rounded:
    """Learn the rounding of all integer weights of a Q/DQ graph, in graph order.

    Scales stay as they are. The same seed gives the same integers.

    Args:
        full: The float graph that was quantized.
        quantized: With Q/DQ; left as it is.
        images_NCHW: Preprocessed training images.
        settings: See :class:`~deploycnn.quantization.rounding.Settings`.
        bounds: Name of a float weight -> smallest and largest integer, where they are not those of the type.
        progress: Called with the layers done, and all.

    Raises:
        PassRequirementError: there are fewer than two images, none of the weights is stored as integers, or a
            value is NaN or infinite (named).
    """
    if len(images_NCHW) < 2:
        raise PassRequirementError(f"adaround: needs at least two images, got {len(images_NCHW)}")
    model, full = infer_shapes(quantized), infer_shapes(full)
    layers = find_layers(full, model)
    if not layers:
        raise PassRequirementError(
            "adaround: the graph stores no weight as integers, of convolutions of images and matrix products, "
            "which are those that it learns; quantize it first"
        )
    images = _that_fit(model, layers, images_NCHW, settings)
    sampler = Sampler(layers, len(images), settings.samples, settings.seed)
    observe(full, sampler.values, _chunks(images), sampler.visit, threads=settings.threads)
    frontier = Frontier(model, images, threads=settings.threads)
    tensors = initializers(model.graph)
    weights, records = {}, []
    with deterministic(threads=settings.threads, device="cpu"):
        for number, layer in enumerate(layers):
            limits = (bounds or {}).get(layer.initializer, (layer.stored.low, layer.stored.high))
            samples = sampler.samples.pop(layer.node.name)
            integers, record = _decide(layer, frontier, samples, limits, settings, number)
            records.append(record)
            weights[layer.initializer] = IntegerWeight(
                integers=integers.astype(np.int8), scale=layer.stored.scale, axis=layer.stored.axis
            )
            _store(tensors[layer.stored.name], integers)
            frontier.forget_all_but(_reads(layers[number + 1 :]))
            progress(number + 1, len(layers))
    return Rounded(
        weights=weights,
        model=model,
        layers=tuple(records),
        images=len(images),
        peak_cache_bytes=frontier.peak_bytes,
    )


def _reads(layers: Sequence[Layer]) -> list[str]:
    """Values of the quantized graph that these layers will ask for."""
    return [name for layer in layers for name in (layer.source, layer.addend) if name is not None]


def _chunks(images: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    for start in range(0, len(images), _BATCH):
        yield images[start : start + _BATCH]


def _that_fit(
    model: ModelProto, layers: Sequence[Layer], images: npt.NDArray[np.float32], settings: Settings
) -> npt.NDArray[np.float32]:
    """As many images as ``cache_bytes`` has room for, found by a trial with one."""
    trial = Frontier(model, images[:1], threads=settings.threads)
    for number, layer in enumerate(layers):
        for name in _reads([layer]):
            trial.read(name)
        trial.forget_all_but(_reads(layers[number + 1 :]))
    return images[: max(2, settings.cache_bytes // trial.peak_bytes)]


def _decide(
    layer: Layer,
    frontier: Frontier,
    samples: Samples,
    limits: tuple[int, int],
    settings: Settings,
    number: int,
) -> tuple[npt.NDArray[np.int32], LayerRecord]:
    """The learned rounding, or what was there where that is no worse on the images that judge."""
    started = time.perf_counter()
    problem = make_problem(layer, frontier, samples, limits, settings)
    learned = solve(problem, settings, torch.Generator().manual_seed((settings.seed << 20) + number))
    stored = layer.stored
    shifted = stored.integers - along(stored.zero_point, stored.axis, layer.weight.ndim)
    present = torch.from_numpy(np.array(to_matrix(shifted, layer, len(problem.weight)), np.float32))
    judging = problem.trained, len(problem.inputs)
    before, after = problem.mse(present, *judging), problem.mse(learned, *judging)
    kept = after < before
    chosen = learned if kept else present
    integers = from_matrix(chosen.to(torch.int32).numpy(), layer)
    return integers + along(stored.zero_point, stored.axis, integers.ndim), LayerRecord(
        node=layer.node.name,
        nearest_mse=before,
        rounded_mse=after if kept else before,
        changed=float((chosen != present).double().mean()),
        kept=kept,
        samples=len(problem.inputs),
        seconds=time.perf_counter() - started,
    )


def make_problem(
    layer: Layer, frontier: Frontier, samples: Samples, limits: tuple[int, int], settings: Settings
) -> Problem:
    """Sample what the layer reads, and put its weight into the shape (groups, outputs, inputs)."""
    places = samples.places
    inputs_SGK = _inputs(layer, frontier, places)
    groups = inputs_SGK.shape[1]
    targets, addend_SGO = np.concatenate(samples.targets), None
    if layer.addend is not None:
        targets = targets + np.concatenate(samples.addends)
        content, scale, zero_point = frontier.read(layer.addend)
        addend = _real(take(pixels(content, layer.op_type), places), scale, zero_point)
        addend_SGO = torch.from_numpy(addend).reshape(len(addend), groups, -1)
    activate = activation(layer)
    scale_GOK = to_matrix(
        np.broadcast_to(along(layer.stored.scale, layer.stored.axis, layer.weight.ndim), layer.weight.shape),
        layer,
        groups,
    )
    return Problem(
        inputs=inputs_SGK,
        targets=activate(torch.from_numpy(targets)).reshape(len(targets), groups, -1),
        addend=addend_SGO,
        weight=torch.from_numpy(np.array(to_matrix(layer.weight, layer, groups))),
        scale=torch.from_numpy(np.array(scale_GOK[:, :, :1])),
        bias=torch.from_numpy(np.array(layer.bias)).reshape(groups, -1),
        low=limits[0],
        high=limits[1],
        activate=activate,
        # Whole images judge, and at least one of them.
        judged=places.shape[1] * max(1, round(settings.holdout * len(places))),
    )


def _inputs(layer: Layer, frontier: Frontier, places_NP2: npt.NDArray[np.int64]) -> Tensor:
    """What the layer sees at each place, shape (S, G, K)."""
    content, scale, zero_point = frontier.read(layer.source)
    pieces = []
    for start in range(0, len(content), _BATCH):
        part, places = content[start : start + _BATCH], places_NP2[start : start + _BATCH]
        if layer.op_type == "Conv":
            window = Window.of(layer.node, layer.weight.shape[2:], part.shape[2:])
            found = window.patches(part, places, zero_point)
        else:
            found = take(pixels(part, layer.op_type), places)[:, None]
        pieces.append(_real(found, scale, zero_point))
    return torch.from_numpy(np.concatenate(pieces))


def _real(content: npt.NDArray[Any], scale: float, zero_point: int) -> npt.NDArray[np.float32]:
    """Integers or reals to real units."""
    real: npt.NDArray[np.float32] = content.astype(np.float32)
    real -= np.float32(zero_point)
    real *= np.float32(scale)
    return real


def to_matrix(weight: npt.NDArray[Any], layer: Layer, groups: int) -> npt.NDArray[Any]:
    """(groups, outputs, inputs) from a weight as its node takes it."""
    if layer.op_type == "Conv":
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    return (weight if _outputs_first(layer) else weight.T)[None]


def from_matrix(matrix_GOK: npt.NDArray[Any], layer: Layer) -> npt.NDArray[Any]:
    """The inverse of :func:`to_matrix`."""
    if layer.op_type == "Conv":
        return matrix_GOK.reshape(layer.weight.shape)
    rows: npt.NDArray[Any] = matrix_GOK[0]
    return rows if _outputs_first(layer) else rows.T


def _outputs_first(layer: Layer) -> bool:
    return layer.op_type == "Gemm" and bool(attribute(layer.node, "transB", 0))


def activation(layer: Layer) -> Callable[[Tensor], Tensor]:
    """The layer's activation."""
    low, high = layer.bounds
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda x: x,
        "clip": lambda x: x.clamp(low, high),
        "silu": F.silu,
        "hardswish": F.hardswish,
    }
    return known[layer.activation]


def _store(tensor: TensorProto, integers: npt.NDArray[np.int32]) -> None:
    """Put integers into an initializer of whatever integer type."""
    if tensor.data_type in _PACKED:
        values = integers.reshape(-1).tolist()
        made = helper.make_tensor(tensor.name, tensor.data_type, list(tensor.dims), values)
    else:
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        made = numpy_helper.from_array(np.ascontiguousarray(integers.astype(kind)), tensor.name)
    tensor.CopyFrom(made)
