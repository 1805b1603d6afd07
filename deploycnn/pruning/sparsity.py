"""Zeros among the weights: single ones (unstructured), or two among each four (2:4).

A mask is ``True`` where a weight stays. Nothing of the model's structure changes, so any runtime runs the result; only
sparse kernels gain by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from deploycnn.errors import PassRequirementError
from deploycnn.pruning.counting import counted
from deploycnn.pruning.layers import CONVOLUTIONS, MIXING
from deploycnn.pruning.structure import check_modules, is_inside

Scope = Literal["layer", "global"]

#: Layer -> mask of its weight.
Masks = Mapping[str, Tensor]

#: Buffer that holds a mask while weights are masked step by step. It is gone afterwards.
_MASK = "pruning_mask"


def weighty(model: nn.Module, protect: Sequence[str]) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name, each weight once, without those in ``protect``.

    Raises:
        PassRequirementError: a name in ``protect`` is unknown, or nothing is left.
    """
    check_modules(model, protect, "sparse.protect")
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, layer in model.named_modules():
        kept = any(is_inside(name, wanted) for wanted in protect)
        if isinstance(layer, MIXING) and not kept and id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            found[name] = layer
    if not found:
        raise PassRequirementError(
            "sparse.protect: no convolution or linear layer is left to make sparse; protect fewer"
        )
    return found


def magnitude_masks(layers: Mapping[str, nn.Module], sparsity: float, scope: Scope) -> dict[str, Tensor]:
    """Masks that drop the ``sparsity`` share of weights with the least magnitude.

    Han et al., "Learning both Weights and Connections" (NeurIPS 2015). The number dropped is exact: of equal weights
    the earlier ones go first.

    Args:
        layers: Name -> layer.
        sparsity: Share of weights to drop, in [0, 1].
        scope: "layer": this share of each layer. "global": of all together.
    """
    sizes = {name: weight_of(layer).detach().abs() for name, layer in layers.items()}
    if scope == "layer":
        return {name: _keep_largest(size, round(sparsity * size.numel())) for name, size in sizes.items()}
    joined = torch.cat([size.flatten() for size in sizes.values()])
    kept = _keep_largest(joined, round(sparsity * len(joined)))
    parts = kept.split([size.numel() for size in sizes.values()])
    return {name: part.view(size.shape) for (name, size), part in zip(sizes.items(), parts, strict=True)}


def _keep_largest(sizes: Tensor, dropped: int) -> Tensor:
    kept = torch.ones(sizes.numel(), dtype=torch.bool, device=sizes.device)
    kept[torch.sort(sizes.flatten(), stable=True).indices[:dropped]] = False
    return kept.view(sizes.shape)


def why_not_two_four(layer: nn.Module) -> str | None:
    """Why a layer's weights cannot be 2:4 in the way that sparse tensor cores read them; ``None`` where they can."""
    if isinstance(layer, CONVOLUTIONS) and layer.transposed:
        return "a transposed convolution"
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        return "a convolution in groups"
    if weight_of(layer).shape[1] % 4:
        return f"{weight_of(layer).shape[1]} input channels are no multiple of 4"
    return None


def two_four_mask(weight: Tensor) -> Tensor:
    """Keep the two largest of each four consecutive input channels, for each output and each place of the kernel.

    Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021).

    Args:
        weight: (out, in, ...), in a multiple of 4.
    """
    fours = weight.detach().abs().unflatten(1, (-1, 4))
    order = torch.sort(fours, dim=2, descending=True, stable=True).indices
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, order[:, :, :2], value=True)
    return kept.flatten(1, 2)


def cubic(step: int, steps: int, start: float, final: float) -> float:
    """Sparsity at a step: ``final + (start - final) * (1 - step / steps) ** 3``.

    Zhu & Gupta, "To Prune, or Not to Prune" (2017): fast at first, where much is redundant, slow at the end.
    """
    return final + (start - final) * (1 - min(step, steps) / max(steps, 1)) ** 3


def apply(layers: Mapping[str, nn.Module], masks: Masks) -> None:
    """Write exact zeros."""
    with torch.no_grad():
        for name, mask in masks.items():
            weight_of(layers[name]).masked_fill_(~mask, 0.0)


def zeros_ratio(layers: Mapping[str, nn.Module]) -> float:
    """Share of exact zeros among the layers' weights."""
    weights = [weight_of(layer) for layer in layers.values()]
    return float(sum(int((weight == 0).sum()) for weight in weights) / sum(w.numel() for w in weights))


@contextmanager
def gradually(
    model: nn.Module, names: Sequence[str], *, sparsity: float, scope: Scope, steps: int
) -> Iterator[None]:
    """While the model trains inside, more and more of its weights become zero, by the cubic schedule.

    Masks grow each of 100 times (or each step, where there are fewer) during ``steps`` runs in training mode, and are
    applied before every run, so what momentum moves comes back to zero. Dropped weights stay dropped. Masks and count
    are buffers meanwhile, so that a checkpoint holds them.

    Args:
        model: To be trained.
        names: Layers to make sparse.
        sparsity: In the end.
        scope: As for :func:`magnitude_masks`.
        steps: Training steps after which it is reached.
    """
    layers = {name: model.get_submodule(name) for name in names}
    for layer in layers.values():
        layer.register_buffer(_MASK, torch.ones_like(weight_of(layer), dtype=torch.bool))
    every = max(1, steps // 100)

    def masks() -> dict[str, Tensor]:
        return {name: layer.get_buffer(_MASK) for name, layer in layers.items()}

    def before(module: nn.Module, inputs: object) -> None:
        del inputs
        apply(layers, masks())
        if not module.training:
            return
        step = count() - 1
        if step <= steps and (step % every == 0 or step == steps):
            wanted = magnitude_masks(layers, cubic(step, steps, 0.0, sparsity), scope)
            for name, layer in layers.items():
                # Zeros sort first, so masks only shrink, but for a weight that momentum moved off zero.
                layer.get_buffer(_MASK).logical_and_(wanted[name])
            apply(layers, masks())

    with counted(model) as count:
        handle = model.register_forward_pre_hook(before)
        try:
            yield
            apply(layers, masks())
            apply(layers, magnitude_masks(layers, sparsity, scope))
        finally:
            handle.remove()
            for layer in layers.values():
                delattr(layer, _MASK)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a convolution or linear layer."""
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight")
    return weight
