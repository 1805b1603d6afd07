"""Whether a model's path depends on what it sees, so that no single run shows all of it."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deploycnn.errors import PassRequirementError
from deploycnn.pruning.tracing import forward

#: Operators that turn tensors into Python values or shapes.
_PEEKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)  # noqa: SLF001 - its only name


class _NoPeeking(TorchDispatchMode):
    """Refuses to turn tensors into Python values, which is what control flow that depends on data does."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PEEKS:
            frames = [frame for frame in traceback.extract_stack() if _is_models(frame.filename)]
            place = frames[-1] if frames else None
            seen = (
                f' ({Path(place.filename).name}:{place.lineno}: "{place.line}")' if place is not None else ""
            )
            raise PassRequirementError(
                f"{self.where}: which way the model takes depends on the values in the images{seen}, so no single run "
                "shows which channels depend on one another; write it without this choice (torch.where)"
            )
        return func(*args, **(kwargs or {}))


def _is_models(filename: str) -> bool:
    """Whether code is the model's: neither PyTorch's nor what runs the model here."""
    return f"{os.sep}torch{os.sep}" not in filename and Path(filename).parent != Path(__file__).parent


def check_control_flow(model: nn.Module, images: Tensor, where: str) -> None:
    """Refuse a model whose path depends on what it sees.

    Raises:
        PassRequirementError: it does; names the line, and ``where`` the pass or option that asks.
    """
    weight = next(model.parameters(), images)
    with torch.no_grad(), _NoPeeking(where):
        forward(model, images.to(weight.dtype))
