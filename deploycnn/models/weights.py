"""Load other people's checkpoints: safetensors, or PyTorch files read without running any code from them."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from deploycnn.core import Json
from deploycnn.errors import SourceError
from deploycnn.models.delta import listing

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt", ".tar")

#: Keys under which training scripts keep the state dict.
WRAPPERS = ("state_dict", "model", "model_state_dict", "net")

#: Put before every key by DataParallel and torch.compile.
PREFIXES = ("module.", "_orig_mod.")

#: What torch.load raises for files that are cut short or of another kind.
_DAMAGED = (RuntimeError, EOFError, ValueError, LookupError, OSError, struct.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What was loaded.

    Attributes:
        tensors: How many tensors were taken from the checkpoint.
        new_head: Tensors of the classifier that were left at their initial values.
        left_out: Tensors of the checkpoint that were not used, as the source said beforehand.
    """

    tensors: int
    new_head: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """For an artifact's record."""
        return {"tensors": self.tensors, "new_head": list(self.new_head), "left_out": list(self.left_out)}


def load_weights(
    model: nn.Module, path: Path | str, *, new_head: bool = False, ignore: Sequence[str] = ()
) -> Loaded:
    """Load a checkpoint file into ``model``, in place.

    Args:
        model: The architecture that the checkpoint belongs to.
        path: A ``.safetensors`` or PyTorch file.
        new_head: Leave a classifier that has another number of classes at its initial values.
        ignore: Prefixes of keys that the model is known to lack, such as auxiliary classifiers.

    Raises:
        SourceError: the file is missing, truncated, holds code, or does not fit; all missing, unexpected and
            misshaped tensors are listed.
    """
    path = Path(path)
    return fit_weights(model, read_state_dict(path), where=str(path), new_head=new_head, ignore=ignore)


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Parameter name -> tensor, without wrappers and prefixes.

    Raises:
        SourceError: missing, truncated, not a checkpoint, or it holds objects that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return _unprefixed(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, ValueError) as error:
            raise SourceError(f"{path}: truncated or not safetensors ({error}); fetch it again") from error
    if path.suffix not in TORCH_SUFFIXES:
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise SourceError(f'{path}: unknown kind of weights file "{path.suffix}"; known: {known}')
    return _unprefixed(_unwrapped(_read_torch(path), path))


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            # About pickle protocols that are then refused anyway.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{path}: refused, not executed: besides tensors it holds Python objects, which could run code"
            f"{_culprit(str(error))}; save the state dict alone: torch.save(model.state_dict(), ...)"
        ) from error
    except _DAMAGED as error:
        if "TorchScript" in str(error):
            raise SourceError(
                f"{path}: a TorchScript program, not a checkpoint; save its state dict"
            ) from error
        reason = f"{type(error).__name__} {str(error).partition(chr(10))[0][:120]}".strip()
        raise SourceError(
            f"{path}: truncated or not a PyTorch checkpoint ({reason}); fetch it again"
        ) from error


def _culprit(message: str) -> str:
    """What the file refers to, as PyTorch's refusal tells it."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    return f" ({found[1]})" if found else ""


def _unwrapped(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside ``content``."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise SourceError(
            f"{path}: holds no state dict but {type(content).__name__}; save model.state_dict()"
        )
    foreign = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        raise SourceError(
            f"{path}: its state dict holds values that are no tensors: {listing(foreign)}; "
            f"keep it alone, or under one of the keys {', '.join(WRAPPERS)}"
        )
    return {str(key): value for key, value in content.items()}


def _unprefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    while state and (
        prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), "")
    ):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def fit_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    where: str,
    new_head: bool = False,
    ignore: Sequence[str] = (),
) -> Loaded:
    """Copy ``state`` into ``model``, in place and only if all of it fits.

    Args:
        model: The architecture.
        state: Parameter name -> tensor.
        where: Where the weights come from, for messages.
        new_head: As in :func:`load_weights`.
        ignore: As in :func:`load_weights`.

    Raises:
        SourceError: as in :func:`load_weights`; the model is unchanged then.
    """
    own = model.state_dict()
    left_out = tuple(sorted(key for key in state if key not in own and key.startswith(tuple(ignore))))
    head = _other_head(model, state)
    if head and not new_head:
        wanted, given = own[head[0]].shape[0], state[head[0]].shape[0]
        raise SourceError(
            f"{where}: its classifier ({', '.join(head)}) tells {given} classes apart, the model needs "
            f"{wanted}; set new_head: true to keep all else and train a new one, or check num_classes"
        )
    used = {key: value for key, value in state.items() if key not in left_out and key not in head}
    problems = _misfits(own, used, head)
    if problems:
        raise SourceError(f"{where}: does not fit {type(model).__name__}: {'; '.join(problems)}")
    with torch.no_grad():
        for key, value in used.items():
            own[key].copy_(value)
    return Loaded(tensors=len(used), new_head=head, left_out=left_out)


def _other_head(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Weights of linear and 1x1 layers whose number of outputs, and nothing else, is not the checkpoint's.

    Only if no other tensor is misshaped: then it is the classifier, else another architecture.
    """
    own = model.state_dict()
    misshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    owners = {key.rpartition(".")[0] for key in misshaped}
    for owner in owners:
        layer = model.get_submodule(owner)
        if not (
            isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
        ):
            return ()
    if any(own[key].shape[1:] != state[key].shape[1:] or not state[key].ndim for key in misshaped):
        return ()
    outputs = {(own[key].shape[0], state[key].shape[0]) for key in misshaped}
    return tuple(misshaped) if len(outputs) == 1 else ()


def _misfits(own: Mapping[str, Tensor], used: Mapping[str, Tensor], head: Sequence[str]) -> list[str]:
    # Checkpoints from before PyTorch 0.4.1 do not count batches; nothing at inference depends on it.
    missing = [
        key for key in own if key not in used and key not in head and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in used if key not in own]
    both = [key for key in used if key in own]
    misshaped = [
        f"{key} is {list(used[key].shape)}, not {list(own[key].shape)}"
        for key in both
        if used[key].shape != own[key].shape
    ]
    retyped = [key for key in both if used[key].is_floating_point() != own[key].is_floating_point()]
    broken = [key for key in both if used[key].is_floating_point() and not torch.isfinite(used[key]).all()]
    kinds = (
        ("missing tensors", missing),
        ("unexpected tensors", unexpected),
        ("tensors of another shape", misshaped),
        ("integers where floats belong, or the reverse", retyped),
        ("tensors with NaN or infinite values", broken),
    )
    return [f"{kind} ({len(keys)}): {listing(keys)}" for kind, keys in kinds if keys]
