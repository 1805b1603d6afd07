"""Quantization-aware training of exactly the graph that is deployed, with the float graph as teacher.

The Q/DQ graph becomes a module through :mod:`deploycnn.graph.bridge`; the one training loop trains it; weights and
scales go back into the same file, whose nodes stay as they were. Batch norms are folded by then; one that is left
keeps its statistics.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, TensorProto
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deploycnn.core import Context, Json
from deploycnn.data.base import Data
from deploycnn.errors import PassRequirementError, TrainingError
from deploycnn.graph.bridge import Bridge, FakeQuantize, to_torch
from deploycnn.graph.model import copy_of, initializers
from deploycnn.graph.probe import parity_images
from deploycnn.pruning import zeros
from deploycnn.quantization.agreement import (
    Agreement,
    measure_agreement,
    measure_by_layer,
    saturates_here,
)
from deploycnn.quantization.packed import pack, unpack
from deploycnn.quantization.reconstruction import Layer, along, find_layers
from deploycnn.tasks import classification
from deploycnn.training.history import History
from deploycnn.training.loop import fit
from deploycnn.training.losses import Loss
from deploycnn.training.settings import TrainingSettings

#: How near to the border of its rounding interval a weight may start.
_MARGIN = 0.49


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The result.

    Attributes:
        model: The Q/DQ graph with trained weights and scales; the given one where every epoch made it worse.
        history: Of the training.
        agreement: Of the fake-quantized module with onnxruntime, for ``model``.
        kept: Whether ``model`` has the trained weights.
        scales_learned: How many quantizers' scales were trained.
    """

    model: ModelProto
    history: History
    agreement: Agreement
    kept: bool
    scales_learned: int

    def to_json(self) -> Json:
        """The record kept with the artifact, without the history."""
        return {
            "agreement": asdict(self.agreement),
            "training_kept": self.kept,
            "scales_learned": self.scales_learned,
            "initial_val_top1": self.history.initial_val_top1,
            "kept_val_top1": self.history.kept_val_top1,
        }


def fine_tune(
    quantized: ModelProto,
    full: ModelProto,
    data: Data,
    settings: TrainingSettings,
    *,
    loss: Loss,
    ctx: Context,
    learn_scales: bool,
    parity_count: int,
    min_agreement: float = 0.0,
) -> Tuned:
    """Train a Q/DQ graph.

    Training starts from what the graph computes: each float weight is moved into the interval that rounds to its
    present integer, so that learned rounding and equalization are not lost.

    Args:
        quantized: With Q/DQ; left as it is.
        full: The float graph that it was made from, prepared, for the weights.
        data: Images: train trains, val picks the epoch.
        settings: See :class:`~deploycnn.training.settings.TrainingSettings`.
        loss: What to minimize.
        ctx: Seed, device, threads, scratch folder, progress and log.
        learn_scales: Train scales too (LSQ, Esser et al. 2020).
        parity_count: Images on which the module and onnxruntime are compared.
        min_agreement: Share of logits that must be within one step, before training and after it.

    Raises:
        ParityError: fewer are.
        PassRequirementError: the bridge lacks an operator, nothing is quantized, or the outputs do not fit the data.
        TrainingError: the loss, or a scale, became useless.
    """
    plain = copy_of(quantized)
    was_packed = unpack(plain)
    bridge = _trainable(plain, full, learn_scales)
    if zeros.meant(ctx.lineage):
        held = keep_zeros(bridge, find_layers(full, plain))
        ctx.log.info("qat: %d zeros of the sparse model are kept", held)
    sample, _ = parity_images(data, (0, 0, 0), 1, ctx.seed)
    classification.check_model(
        bridge.module, torch.from_numpy(sample), len(data.dataset.classes), "qat: the model"
    )
    images, where = parity_images(data, (0, 0, 0), parity_count, ctx.seed)
    compared = partial(_compared, images=images, source=where, least=min_agreement, ctx=ctx)
    if min_agreement > 0:
        # Nobody should learn after hours that the graph is not what onnxruntime runs.
        compared(bridge, quantized, "qat: before any training")
    history = fit(Frozen(bridge.module), data, settings, loss=loss, ctx=ctx)
    _check_scales(bridge)
    scales = sum(
        any(held.requires_grad for held in quantizer.parameters())
        for quantizer in bridge.quantizers().values()
    )
    kept = settings.keep == "last" or history.kept_val_top1 >= history.initial_val_top1
    if not kept:
        ctx.log.warning(
            "qat: every epoch was worse on val than before (%.4f, best %.4f): the graph stays as it was",
            history.initial_val_top1,
            history.kept_val_top1,
        )
        bridge = to_torch(plain)
    trained = bridge.write_back()
    if was_packed:
        pack(trained)
    agreement = compared(bridge, trained, "qat: the trained graph")
    return Tuned(model=trained, history=history, agreement=agreement, kept=kept, scales_learned=scales)


def _compared(
    bridge: Bridge,
    model: ModelProto,
    what: str,
    *,
    images: npt.NDArray[np.float32],
    source: str,
    least: float,
    ctx: Context,
) -> Agreement:
    """The module against onnxruntime: end to end, or layer by layer where that is too little.

    Raises:
        ParityError: it is too little either way.
    """
    found = measure_agreement(
        bridge.module,
        model,
        images,
        source=source,
        threads=ctx.threads,
        integers=not saturates_here(model),
    )
    if found.within_one_step < least:
        ctx.log.info(
            "%s: end to end %.2f%% of the logits are within one step of onnxruntime's; compared layer by layer",
            what,
            100 * found.within_one_step,
        )
        found = measure_by_layer(bridge, model, images, source=source, threads=ctx.threads)
    found.check(least, what)
    return found


def _trainable(quantized: ModelProto, full: ModelProto, learn_scales: bool) -> Bridge:
    """A Q/DQ graph with the float graph's weights, which round to its integers.

    Raises:
        PassRequirementError: the bridge lacks an operator, or nothing is quantized.
    """
    layers = find_layers(full, quantized)
    if not layers:
        raise PassRequirementError("qat: the graph stores no weight as integers; put it behind int8")
    bridge = to_torch(quantized, float_weights=starting_weights(layers))
    limit_weights(bridge, layers)
    if learn_scales:
        bridge.learn_scales()
    # Convolutions that the float graph does not have are shortcuts without weights and pools (selections.py, pools.py).
    known = {node.name for node in full.graph.node if node.op_type == "Conv"}
    for name, path in bridge.module_of.items():
        module = bridge.module.get_submodule(path)
        if name not in known and isinstance(module, nn.Conv2d):
            module.requires_grad_(False)
    return bridge


class Frozen(nn.Module):
    """Trains all but batch norms' statistics."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits (N, K)."""
        logits_NK: torch.Tensor = self.module(images_NCHW)
        return logits_NK

    def train(self, mode: bool = True) -> Frozen:
        """As usual, except that batch norms stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def starting_weights(layers: list[Layer]) -> dict[str, npt.NDArray[np.generic]]:
    """Float weights that round to the present integers, as near to the float graph's as these allow.

    A weight of the float graph that lies more than a step away (its layer was equalized, say) says nothing; there
    the integer itself is the start, as it is for a weight of another shape.

    Returns:
        By name of the integer initializer.
    """
    found: dict[str, npt.NDArray[np.generic]] = {}
    for layer in layers:
        stored, rank = layer.stored, layer.stored.integers.ndim
        scale = along(stored.scale, stored.axis, rank).astype(np.float64)
        steps = (stored.integers - along(stored.zero_point, stored.axis, rank)).astype(np.float64)
        if layer.weight.shape != steps.shape:
            found[stored.name] = (steps * scale).astype(np.float32)
            continue
        wanted = layer.weight.astype(np.float64) / scale - steps
        offset = np.where(np.abs(wanted) <= 1.0, np.clip(wanted, -_MARGIN, _MARGIN), 0.0)
        found[stored.name] = ((steps + offset) * scale).astype(np.float32)
    return found


def keep_zeros(bridge: Bridge, layers: list[Layer]) -> int:
    """Hold the weights that are zero in the float graph at zero; how many there are.

    Weights whose integer only happens to be zero are trained.
    """
    held = 0
    for layer in layers:
        weight: nn.Parameter = bridge.module.get_parameter(f"{bridge.module_of[layer.node.name]}.weight")
        zero = torch.from_numpy(layer.weight == 0)
        # Linear layers hold what a MatMul reads the other way round.
        for mask in (zero, zero.T) if zero.dim() == 2 else (zero,):
            if mask.shape == weight.shape and bool((weight[mask] == 0).all()):
                zeros.hold(weight, mask)
                held += int(mask.sum())
                break
    return held


def limit_weights(bridge: Bridge, layers: list[Layer]) -> None:
    """Keep trained integers within the bits in use: symmetric, and 7 where no 8-bit weight needs more.

    A file whose weights all fit into 7 bits was made for CPUs that saturate beyond.
    """
    tensors = initializers(bridge.original.graph)
    eight = [layer for layer in layers if tensors[layer.stored.name].data_type == TensorProto.INT8]
    largest = max((int(np.abs(layer.stored.integers).max()) for layer in eight), default=0)
    for layer in layers:
        if layer.stored.zero_point.any():
            continue
        kind = tensors[layer.stored.name].data_type
        top = 7 if kind == TensorProto.INT4 else 63 if largest <= 63 else 127
        quantizer = getattr(
            bridge.module.get_submodule(bridge.module_of[layer.node.name]), "weight_fake_quant", None
        )
        if isinstance(quantizer, FakeQuantize):
            quantizer.qmin, quantizer.qmax = -top, top


def _check_scales(bridge: Bridge) -> None:
    for name, quantizer in bridge.quantizers().items():
        scale = quantizer.scale.detach()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise TrainingError(
                f"qat: a scale of {name} became {float(scale.min()):.3g} in training; lower `lr`, or set "
                "`learn_scales: false`"
            )
