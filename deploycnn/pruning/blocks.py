"""Whole residual blocks: which can go, and which are missed least.

A block whose branch computes nothing passes its input on. So a module is a residual block, and can be an identity, if
it gives its input back once all its parameters are zero: this is tried out, not guessed from names.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from deploycnn.errors import PassRequirementError, nearest
from deploycnn.models.delta import drop
from deploycnn.pruning.layers import MIXING
from deploycnn.pruning.structure import check_modules
from deploycnn.pruning.tracing import forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Missed:
    """A block and what its loss costs.

    Attributes:
        name: Of the module.
        loss_increase: Mean cross-entropy on training images without it and those dropped before it was last looked
            at, less that of the whole model.
        dropped: Whether it is gone.
    """

    name: str
    loss_increase: float
    dropped: bool


def droppable(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Names of the modules that can be an identity, in the order of the model's modules; of nested ones the innermost.

    Args:
        model: Left as it is.
        images: Example input, (N, C, H, W).
    """
    calls: Counter[str] = Counter()
    values: dict[str, Tensor] = {}
    shapes: dict[str, torch.Size] = {}
    handles = []
    for name, module in model.named_modules():
        if not name or not any(
            isinstance(layer, MIXING) for layer in module.modules() if layer is not module
        ):
            continue

        def before(
            _: nn.Module, inputs: tuple[object, ...], named: dict[str, object], name: str = name
        ) -> None:
            calls[name] += 1
            # Looked at before the module runs, which may write into its input. An identity takes nothing beside it.
            if len(inputs) == 1 and not named and isinstance(inputs[0], Tensor):
                values[name] = _like(inputs[0])

        def after(_: nn.Module, __: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor):
                shapes[name] = output.shape

        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
    try:
        with torch.no_grad():
            forward(model, images)
    finally:
        for handle in handles:
            handle.remove()
    found = [
        name
        for name, value in values.items()
        if calls[name] == 1
        and shapes.get(name) == value.shape
        and _passes_on(model.get_submodule(name), value)
    ]
    inner_most = {name for name in found if not any(other.startswith(name + ".") for other in found)}
    return tuple(name for name, _ in model.named_modules() if name in inner_most)


def _like(value: Tensor) -> Tensor:
    """Random numbers in the place of an input, as a gate gives back the zeros that a branch makes before training.

    Signs stay possible ones: behind a ReLU there are no negative numbers.
    """
    drawn = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    return drawn if bool((value >= 0).all()) else 2 * drawn - 1


def _passes_on(block: nn.Module, value: Tensor) -> bool:
    """Whether a block with all parameters zero gives its input back."""
    if isinstance(block, torch.fx.GraphModule):
        return False
    silent = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in silent.parameters():
            parameter.zero_()
        return torch.equal(silent(value.clone()), value)


def rank_and_drop(
    model: nn.Module,
    candidates: Sequence[str],
    count: int,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    *,
    until: float = math.inf,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> list[Missed]:
    """Drop blocks one after the other in place, each time the one without which the loss is least.

    Args:
        model: In evaluation mode, on the device of the images.
        candidates: Of :func:`droppable`.
        count: How many to drop, at most all.
        batches: Gives (images, class indices) of the training split, anew with each call.
        until: Drop no block without which the loss is above this and above that of the whole model.
        progress: Called with the number of blocks tried and of all trials.

    Returns:
        Every candidate, those dropped first, in that order.
    """
    left, dropped = list(candidates), []
    increases: dict[str, float] = {}
    trials = sum(len(candidates) - index for index in range(count))
    tried = 0
    base: float | None = None
    for _ in range(count):
        whole, without = _losses(model, left, batches())
        base = whole if base is None else base
        increases |= {name: loss - base for name, loss in without.items()}
        tried += len(left)
        progress(tried, trials)
        least = min(left, key=lambda name: increases[name])
        if increases[least] > 0 and base + increases[least] > until:
            break
        drop(model, (least,))
        left.remove(least)
        dropped.append(least)
    return [
        Missed(name=name, loss_increase=increases[name], dropped=name in dropped)
        for name in [*dropped, *left]
    ]


def _losses(
    model: nn.Module, names: Sequence[str], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, dict[str, float]]:
    """Mean cross-entropy of the model, and without each of some blocks alone.

    What runs before a block is the same with and without it, so for each batch blocks run once, are then recalled, and
    only what comes after the missing one runs again.
    """
    blocks = {name: model.get_submodule(name) for name in names}
    whole, without, seen = 0.0, dict.fromkeys(names, 0.0), 0
    with torch.no_grad():
        for images, labels in batches:
            logits, outputs = _recorded(model, blocks, images)
            whole += _total_loss(logits, labels)
            try:
                for name, output in outputs.items():
                    drop(model, (name,))
                    without[name] += _total_loss(model(images), labels)
                    model.set_submodule(name, _Recalled(output))
            finally:
                for name, block in blocks.items():
                    model.set_submodule(name, block)
            seen += len(images)
    if not seen:
        raise PassRequirementError("drop_blocks: needs images, but the training split has none")
    return whole / seen, {name: total / seen for name, total in without.items()}


def _total_loss(logits: Tensor, labels: Tensor) -> float:
    return float(functional.cross_entropy(logits, labels, reduction="sum"))


def _recorded(
    model: nn.Module, blocks: Mapping[str, nn.Module], images: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """A model's output, and that of each block, in the order in which they run."""
    outputs: dict[str, Tensor] = {}

    def keep(_: nn.Module, __: object, output: Tensor, name: str) -> None:
        outputs[name] = output.clone()  # what comes next may write into it

    handles = [block.register_forward_hook(partial(keep, name=name)) for name, block in blocks.items()]
    try:
        return model(images), outputs
    finally:
        for handle in handles:
            handle.remove()


class _Recalled(nn.Module):
    """Gives what a block gave."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Tensor:
        return self.output.clone()


def check_names(model: nn.Module, candidates: Sequence[str], names: Sequence[str]) -> None:
    """Names that a user gives must be blocks that can go.

    Raises:
        PassRequirementError: one is not.
    """
    check_modules(model, names, "drop_blocks.names")
    for name in names:
        if name not in candidates:
            raise PassRequirementError(
                f'drop_blocks.names: "{name}" is no residual block with an identity shortcut, so it cannot be dropped; '
                f"{nearest(name, candidates)}"
            )
