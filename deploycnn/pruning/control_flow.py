"""Whether a model's path depends on what it sees, so that no single run shows all of it."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from deploycnn.errors import PassRequirementError
from deploycnn.pruning.tracing import forward

#: Operators that turn tensors into Python values or shapes.
_PEEKS = (
    torch.ops.aten._local_scalar_dense.default,  # noqa: SLF001 - its only name
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
)

#: Methods that read a tensor's memory by themselves, past all operators.
_READS = frozenset({"tolist", "numpy", "__array__", "__dlpack__"})

#: Operators that take the shape and type of a tensor, but not its values.
_OF_SHAPE = frozenset(
    {
        "aten::empty_like",
        "aten::full_like",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::new_full",
        "aten::new_ones",
        "aten::new_zeros",
        "aten::ones_like",
        "aten::rand_like",
        "aten::randn_like",
        "aten::zeros_like",
    }
)


class _NoPeeking(TorchDispatchMode):
    """Refuses to turn what was computed from images into Python values, which control flow that depends on them does.

    Values of constants and weights are the same in every run: a model may look at them.
    """

    def __init__(self, images: Tensor, where: str) -> None:
        super().__init__()
        self.where = where
        self.computed = WeakTensorKeyDictionary({images: True})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        from_images = any(value in self.computed for value in _tensors((args, kwargs)))
        if from_images and func in _PEEKS:
            raise self.refusal()
        found = func(*args, **kwargs)
        if from_images and func.name().partition(".")[0] not in _OF_SHAPE:
            for value in _tensors(found):
                self.computed[value] = True
        return found

    def refusal(self) -> PassRequirementError:
        """The error, with the line of the model that looks."""
        frames = [frame for frame in traceback.extract_stack() if _is_models(frame.filename)]
        place = frames[-1] if frames else None
        seen = f' ({Path(place.filename).name}:{place.lineno}: "{place.line}")' if place is not None else ""
        return PassRequirementError(
            f"{self.where}: which way the model takes depends on the values in the images{seen}, so no single run "
            "shows which channels depend on one another; write it without this choice (torch.where)"
        )


class _NoReading(TorchFunctionMode):
    """Refuses what ``_NoPeeking`` does not see: tensors that become lists and arrays without an operator."""

    def __init__(self, peeking: _NoPeeking) -> None:
        super().__init__()
        self.peeking = peeking

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, unless it reads what was computed from images."""
        if getattr(func, "__name__", "") in _READS and args[0] in self.peeking.computed:
            raise self.peeking.refusal()
        return func(*args, **(kwargs or {}))


def _tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _is_models(filename: str) -> bool:
    """Whether code is the model's: neither PyTorch's nor what runs the model here."""
    return f"{os.sep}torch{os.sep}" not in filename and Path(filename).parent != Path(__file__).parent


def check_control_flow(model: nn.Module, images: Tensor, where: str) -> None:
    """Refuse a model whose path depends on what it sees, or that goes through time.

    Raises:
        PassRequirementError: it does; names the line or the module, and ``where`` the pass or option that asks.
    """
    for name, module in model.named_modules():
        # Torch-Pruning would follow every path through the steps in time, of which there are too many to end.
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            raise PassRequirementError(
                f'{where}: "{name}" is an nn.{type(module).__name__}, and which channels depend on one another cannot '
                "be followed through time; make the convolutions in front of it a model of their own"
            )
    weight = next(model.parameters(), images)
    images = images.to(weight.dtype)
    with torch.no_grad(), _NoPeeking(images, where) as peeking, _NoReading(peeking):
        forward(model, images)
