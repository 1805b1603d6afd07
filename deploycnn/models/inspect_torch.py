"""Per-layer table of a torch model, from the operators that really run.

No tracing: one forward pass is watched at PyTorch's dispatcher, so any Python control flow works, and
functions in a module's own code are seen as well as its submodules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from deploycnn.models.aten_fields import KNOWN, UNKNOWN, FieldOrUnknown, field_after
from deploycnn.models.inspection import LayerRow, ModelTable, total
from deploycnn.models.macs import count_params, evaluating, without_fused_attention
from deploycnn.models.receptive_field import Field

#: Operators without work of their own; views are known by their schema.
_IDLE = frozenset(
    {"clone", "detach", "alias", "_to_copy", "contiguous", "empty", "zeros", "ones", "arange", "full"}
)


def inspect_torch(model: nn.Module, input_shape: Sequence[int], name: str) -> ModelTable:
    """Run one black image through ``model`` in eval mode and note every layer.

    Args:
        model: Its mode and weights stay as they are.
        input_shape: (C, H, W).
        name: For people.
    """
    reference = next(model.parameters(), torch.zeros(()))
    image = torch.zeros((1, *input_shape), dtype=reference.dtype, device=reference.device)
    tape = _Tape(model)
    tape.fields[image] = Field()
    with evaluating(model), without_fused_attention(), torch.no_grad(), tape.hooked(), tape:
        model(image)
    return total(name, tape.rows, input_shape, tape.peak_bytes, count_params(model))


@dataclass(slots=True)
class _Call:
    """A module that is running."""

    name: str
    module: nn.Module
    inputs: list[Tensor]
    leaf: bool
    works: bool = False
    params: int = 0
    macs: int = 0


class _Tape(TorchDispatchMode):
    """Notes every operator; knows which module is running from hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.rows: list[LayerRow] = []
        self.peak_bytes = 0
        self.fields: WeakIdKeyDictionary = WeakIdKeyDictionary()
        #: Parameters that a tensor (a parameter, or a view of one) stands for, until they are counted.
        self.uncounted: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for parameter in model.parameters():
            self.uncounted[parameter] = parameter
        self.counted: set[int] = set()
        self.calls: list[_Call] = []

    def hooked(self) -> _Hooks:
        """Context in which modules report when they start and end."""
        return _Hooks(self)

    def started(self, name: str, module: nn.Module, inputs: Sequence[object]) -> None:
        tensors = [item for item in tree_leaves(inputs) if isinstance(item, Tensor)]
        self.calls.append(_Call(name, module, tensors, leaf=not any(module.children())))

    def ended(self, output: object) -> None:
        call = self.calls.pop()
        if not (call.leaf and call.works):
            return
        outputs = [item for item in tree_leaves(output) if isinstance(item, Tensor)]
        if isinstance(call.module, nn.Linear) and call.inputs[0].ndim > 2:
            # Works on every position alone, though PyTorch flattens the positions for it.
            given = self.fields.get(call.inputs[0])
            if isinstance(given, Field) and given.axes and outputs[0].ndim - 1 not in given.axes:
                self.fields[outputs[0]] = given
        self.add_row(call.name, type(call.module).__name__, call.inputs, outputs, call.params, call.macs)

    def add_row(
        self,
        name: str,
        kind: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        params: int,
        macs: int,
    ) -> None:
        seen: FieldOrUnknown | None = self.fields.get(outputs[0]) if outputs else None
        produced = sum(_bytes(tensor) for tensor in outputs)
        self.peak_bytes = max(self.peak_bytes, produced + sum(_bytes(tensor) for tensor in inputs))
        self.rows.append(
            LayerRow(
                name=name,
                kind=kind,
                input_shape=tuple(inputs[0].shape) if inputs else (),
                output_shape=tuple(outputs[0].shape) if outputs else (),
                params=params,
                macs=macs,
                receptive_field=seen.size if isinstance(seen, Field) else None,
                activation_bytes=produced,
            )
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        packet = func._overloadpacket  # noqa: SLF001 - no public name
        if packet not in flop_registry and packet.__name__ not in KNOWN:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        output = func(*args, **kwargs)
        self.note(func, args, kwargs, output)
        return output

    def note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        inputs = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        outputs = [item for item in tree_leaves(output) if isinstance(item, Tensor)]
        self.spread_fields(func, args, kwargs, inputs, outputs)
        op = func._overloadpacket.__name__  # noqa: SLF001
        owned = [self.uncounted[tensor] for tensor in inputs if tensor in self.uncounted]
        if func.is_view or op in _IDLE or not outputs:
            for tensor in outputs:
                if owned:
                    self.uncounted[tensor] = owned[0]
            return
        params = sum(parameter.numel() for parameter in owned if id(parameter) not in self.counted)
        self.counted.update(id(parameter) for parameter in owned)
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)  # noqa: SLF001
        macs = formula(*args, **kwargs, out_val=output) // 2 if formula else 0
        call = self.calls[-1] if self.calls else None
        if call is not None and call.leaf:
            call.works = True
            call.params += params
            call.macs += macs
            return
        activations = [tensor for tensor in inputs if tensor not in self.uncounted]
        if not activations and not params:
            return  # Makes a constant.
        name = f"{call.name}:{op}" if call is not None and call.name else op
        self.add_row(name, op.rstrip("_"), activations or inputs, outputs, params, macs)

    def spread_fields(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        given = [(self.fields[tensor], tuple(tensor.shape)) for tensor in inputs if tensor in self.fields]
        if not given:
            return
        for tensor in outputs:
            if tensor.ndim != outputs[0].ndim or not tensor.numel():
                continue  # Saved statistics.
            if any(seen is UNKNOWN for seen, _ in given):
                self.fields[tensor] = UNKNOWN
            else:
                self.fields[tensor] = field_after(func, args, kwargs, given, tuple(tensor.shape))


class _Hooks:
    """Tells a tape which module is running."""

    def __init__(self, tape: _Tape) -> None:
        self.tape = tape
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.tape.model.named_modules():
            self.handles += [
                module.register_forward_pre_hook(self._starter(name)),
                module.register_forward_hook(lambda _module, _inputs, output: self.tape.ended(output)),
            ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _starter(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: self.tape.started(name, module, inputs)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
