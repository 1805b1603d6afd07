"""Keep zeros through training; a file of its own, because training needs nothing else of pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from deploycnn.core import Artifact, Json
from deploycnn.errors import PassRequirementError


def keep_zeros(model: nn.Module, names: Sequence[str]) -> int:
    """Let training leave exact zeros at zero: where a weight is zero now, its gradient is zero from here on.

    With a zero gradient from the first step on, momentum, Adam's moments and weight decay add nothing either.

    Args:
        model: About to be trained.
        names: Layers whose zeros are meant.

    Returns:
        The number of weights held.
    """
    named, held = dict(model.named_modules()), 0
    for name in names:
        layer = named.get(name)
        if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):  # noqa: SLF001 - as in layers.py
            continue
        zero = layer.weight.detach() == 0
        held += int(zero.sum())
        hold(layer.weight, zero)
    return held


def hold(weight: Tensor, zero: Tensor) -> None:
    """Give the weights where ``zero`` is true no gradient."""
    weight.register_hook(_masked(zero))


def _masked(zero: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes gradients zero where ``zero`` is true; the mask follows the gradient's device once."""

    def of(grad: Tensor) -> Tensor:
        nonlocal zero
        zero = zero.to(grad.device)
        return grad.masked_fill(zero, 0.0)

    return of


def meant(lineage: Sequence[Artifact]) -> tuple[str, ...]:
    """Layers whose zeros were made on purpose, by the artifacts that a model was made from."""
    return tuple(_made(lineage).get("layers", ()))


def refuse_fours(lineage: Sequence[Artifact], where: str) -> None:
    """Refuse to take channels out of a model with two zeros in each four weights.

    Raises:
        PassRequirementError: it is one; ``where`` names the pass.
    """
    if _made(lineage).get("pattern") == "2:4":
        raise PassRequirementError(
            f"{where}: behind sparse: 2:4 it would take weights out of their fours; put sparse behind it"
        )


def _made(lineage: Sequence[Artifact]) -> Mapping[str, Json]:
    """What the last pass that made zeros on purpose recorded; nothing where none did."""
    for artifact in reversed(lineage):
        record = artifact.facts.record.get("sparsity")
        if isinstance(record, Mapping):
            return record
    return {}
