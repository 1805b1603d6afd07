"""Splits of channels: which channel is in which part, and where a model has the sizes of parts.

``torch.split(x, self.sizes, dim=1)``, as in Res2Net and MixNet, says how wide the parts are in numbers that belong to
no layer: pruning changes them with the channels. Which attribute a split reads is found by watching the model run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch_pruning as tp
from torch import nn
from torch.overrides import TorchFunctionMode
from torch_pruning import ops
from torch_pruning.dependency.index_mapping import _SplitIndexMapping

from deploycnn.models.delta import plain_attributes
from deploycnn.pruning.layers import RUN_ERRORS


@dataclass(frozen=True, slots=True)
class Split:
    """An attribute of a module that tells how it splits channels.

    Attributes:
        attribute: Its name.
        parts: How many there are.
        tells: What its value is: the size of each part, the one size of all, or how many channels the equal parts have
            together.
    """

    attribute: str
    parts: int
    tells: Literal["sizes", "size", "total"]

    @property
    def uniform(self) -> bool:
        """All parts have one size."""
        return self.tells != "sizes"

    def __str__(self) -> str:
        """For keys, beside the sides of layers."""
        return f"split {self.attribute}"

    def sizes(self, module: nn.Module) -> list[int]:
        """Channels of each part."""
        value: Any = getattr(module, self.attribute)
        if self.tells == "sizes":
            return [int(size) for size in value]
        return [int(value) // (self.parts if self.tells == "total" else 1)] * self.parts

    def resize(self, module: nn.Module, sizes: Sequence[int]) -> None:
        """Give the parts other sizes.

        Raises:
            ValueError: parts of one size would have different ones.
        """
        if self.tells == "sizes":
            setattr(module, self.attribute, type(getattr(module, self.attribute))(sizes))
            return
        if len(set(sizes)) > 1:
            raise ValueError(f"parts of one size would have {list(sizes)} channels")
        setattr(module, self.attribute, sum(sizes) if self.tells == "total" else sizes[0])

    def remove(self, module: nn.Module, channels: npt.NDArray[np.int64]) -> None:
        """Make the parts as much smaller as channels are taken from them; raises as ``resize`` does."""
        self.resize(module, sizes_after(self.sizes(module), channels))


def parts_of(sizes: Sequence[int], channels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The part in which each channel lies, where parts have these sizes."""
    return np.searchsorted(np.cumsum(sizes), channels, side="right").astype(np.int64)


def sizes_after(sizes: Sequence[int], removed: npt.NDArray[np.int64]) -> list[int]:
    """What is left of the parts without some channels."""
    lost = np.bincount(parts_of(sizes, removed), minlength=len(sizes))
    return [int(size - count) for size, count in zip(sizes, lost, strict=True)]


@dataclass(frozen=True, slots=True)
class _Call:
    """A split that ran: in which module and on what that ran, the how many-th of that run, and what autograd has."""

    module: str
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    place: int
    sizes: int | tuple[int, ...]
    parts: int
    node: object


class Watch(TorchFunctionMode):
    """Notes the splits and concatenations of a model that runs inside ``watching``.

    Attributes:
        calls: Splits, in the order in which they ran.
        joined: Autograd's node of a concatenation of channels -> channels of its inputs, as far as autograd knows them.
        running: Names and inputs of the modules that run now, the innermost last.
    """

    def __init__(self) -> None:
        """Nothing has run."""
        super().__init__()
        self.calls: list[_Call] = []
        self.joined: dict[object, list[int]] = {}
        self.running: list[tuple[str, tuple[tuple[Any, ...], dict[str, Any]]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func``, and note it if it splits or joins."""
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in {"cat", "concat", "concatenate"} and found.dim() > 1 and found.grad_fn is not None:
            tensors = args[0] if args else (kwargs or {})["tensors"]
            widths = [tensor.shape[1] for tensor in tensors if tensor.dim() > 1]
            if len(widths) == len(tensors) and sum(widths) == found.shape[1]:
                self.joined[found.grad_fn] = [
                    width for width, tensor in zip(widths, tensors, strict=True) if tensor.requires_grad
                ]
        if name in {"split", "split_with_sizes"} and self.running:
            sizes = [
                *args[1:2],
                *(value for key, value in (kwargs or {}).items() if key.startswith("split_size")),
            ][0]
            plain = tuple(map(int, sizes)) if isinstance(sizes, list | tuple) else int(sizes)
            module, inputs = self.running[-1]
            place = sum(call.inputs is inputs for call in self.calls)
            self.calls.append(_Call(module, inputs, place, plain, len(found), found[0].grad_fn))
        return found


@contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """Watch ``model`` while it runs in the block."""
    watch = Watch()

    def enter(name: str) -> Any:
        return lambda _, args, kwargs: watch.running.append((name, (args, kwargs)))

    def leave(*_: object) -> None:
        watch.running.pop()

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks
        hooks += [
            module.register_forward_pre_hook(enter(name), with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


def splits_of(model: nn.Module, watch: Watch) -> dict[object, tuple[str, Split]]:
    """Autograd's node -> the module and the attribute that says the sizes, where one does.

    Args:
        model: As it was watched; left as it is.
        watch: What it did.
    """
    found = {}
    for call in watch.calls:
        if part_sizes(call.node) is None:
            continue  # of rows, say
        module = model.get_submodule(call.module)
        for split in _candidates(module, call):
            if _drives(module, call, split):
                found[call.node] = (call.module, split)
                break
    return found


def _candidates(module: nn.Module, call: _Call) -> Iterator[Split]:
    """Attributes that may say the sizes."""
    sizes = (call.sizes,) * call.parts if isinstance(call.sizes, int) else call.sizes
    for name, value in plain_attributes(module).items():
        if isinstance(value, list | tuple):
            if tuple(value) == sizes and not isinstance(call.sizes, int):
                yield Split(name, call.parts, "sizes")
        elif isinstance(value, int) and not isinstance(value, bool) and len(set(sizes)) == 1:
            if value == sizes[0]:
                yield Split(name, call.parts, "size")
            elif value == sum(sizes):
                yield Split(name, call.parts, "total")


def _drives(module: nn.Module, call: _Call, split: Split) -> bool:
    """Whether the split has other sizes when the attribute says so."""
    before, sizes = getattr(module, split.attribute), split.sizes(module)
    split.resize(
        module, [size + 1 for size in sizes] if split.uniform else [sizes[0] + 1, *sizes[1:-1], sizes[-1] - 1]
    )
    args, kwargs = call.inputs
    try:
        with watching(module) as watch, torch.no_grad():
            module(*args, **kwargs)
    except RUN_ERRORS:
        pass  # other sizes need not fit: the split ran before
    finally:
        setattr(module, split.attribute, before)
    return any(
        not again.module and again.place == call.place and again.sizes != call.sizes for again in watch.calls
    )


def map_parts(graph: tp.DependencyGraph, watch: Watch) -> None:
    """Tell Torch-Pruning which part of a split each reader has, and how wide the inputs of concatenations are.

    It takes the order in which it comes across readers for that of the parts, and guesses widths from layers around;
    autograd knows the numbers of parts, and ``watch`` saw the widths.
    """
    for node in graph.module2node.values():
        if node.type == ops.OPTYPE.CONCAT and len(watch.joined.get(node.grad_fn, ())) == len(node.inputs):
            node.module.concat_sizes = watch.joined[node.grad_fn]
        sizes = part_sizes(node.grad_fn) if node.type == ops.OPTYPE.SPLIT else None
        if sizes is None:
            continue
        node.module.offsets = None  # else it maps them anew for every group
        borders = [0, *accumulate(sizes)]
        for reader in dict.fromkeys(node.outputs):
            read = [
                part for maker, part in getattr(reader.grad_fn, "next_functions", ()) if maker is node.grad_fn
            ]
            there = [edge for edge in node.dependencies if edge.target is reader]
            back = [edge for edge in reader.dependencies if edge.target is node]
            if len(read) == len(there) == len(back):
                for part, one, other in zip(read, there, back, strict=True):
                    span = borders[part : part + 2]
                    one.index_mapping[0] = _SplitIndexMapping(offset=span, reverse=False)
                    other.index_mapping[0] = _SplitIndexMapping(offset=span, reverse=True)


def part_sizes(node: Any) -> list[int] | None:
    """Channels of each part of a split along the channels, as autograd has it; ``None`` of another split."""
    shape = getattr(node, "_saved_self_sym_sizes", None)
    if shape is None or node._saved_dim % (1 << 64) not in {1, (1 - len(shape)) % (1 << 64)}:  # noqa: SLF001
        return None
    named = getattr(node, "_saved_split_sizes", None)
    if named is not None:
        return [int(size) for size in named]
    size = int(node._saved_split_size)  # noqa: SLF001 - as are the others, for which there is no other way
    return [min(size, shape[1] - start) for start in range(0, shape[1], size)]
