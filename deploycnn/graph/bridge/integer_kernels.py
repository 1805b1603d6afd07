"""A fake-quantized module in the arithmetic of onnxruntime's integer kernels on CPUs.

Between two roundings the module computes in float32, whose last bits decide which way a value near the middle of two
steps goes. One step there moves some values of the next layer over such a middle, and so on: behind many layers two
correct implementations differ by as much as rounding itself does. So what runs is modelled bit by bit here, for
evaluation: products are summed exactly, and rounded as MLAS does it (``qlinearconv.cc``, ``requantize.cpp``,
``qladd.cpp``, ``qlmul.cpp``, ``qlgavgpool.cpp``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from deploycnn.graph.bridge.fake_quant import FakeQuantize, QuantizedConv2d, QuantizedLinear
from deploycnn.graph.bridge.pooling import global_average
from deploycnn.graph.bridge.quantized import real

#: Float32 holds every integer up to this, so that no order of summation rounds.
_EXACT_IN_FLOAT32 = 2**24

#: Functions that move values and change none, also outside a Q/DQ pair.
_MOVERS = frozenset({torch.flatten, torch.permute})


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's sums of products, bias included, and what one of them is worth."""

    sums: Tensor
    worth: Tensor

    def rounded(self, target: FakeQuantize) -> Tensor:
        """Integers minus zero point."""
        return (self.sums * (self.worth / target.scale)).round()


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two values on grids."""

    values: tuple[Tensor, Tensor]
    grids: tuple[FakeQuantize, FakeQuantize]


class _Sum(_Pair):
    """Two values on grids that are added."""

    def rounded(self, target: FakeQuantize) -> Tensor:
        """Integers minus zero point, which takes part in the float32 sum.

        Multiplied and added at once, as the kernel of CPUs with AVX2 does, in this order: with 16 bits of operands and
        few scales, sums next to the middle of two steps are common enough to see.
        """
        zero = target.zero_point.float()
        ratios = [grid.scale / target.scale for grid in self.grids]
        zeros = [grid.zero_point.float() for grid in self.grids]
        one, other = (
            _steps(value, grid) + shift
            for value, grid, shift in zip(self.values, self.grids, zeros, strict=True)
        )
        fixed = zero - _fused(zeros[0], ratios[0], ratios[1] * zeros[1])
        return _fused(one, ratios[0], _fused(other, ratios[1], fixed)).round() - zero


class _Product(_Pair):
    """Two values on grids that are multiplied."""

    def rounded(self, target: FakeQuantize) -> Tensor:
        """Integers minus zero point, which takes part in the float32 product."""
        one, other = (_steps(value, grid) for value, grid in zip(self.values, self.grids, strict=True))
        ratio = self.grids[0].scale * self.grids[1].scale / target.scale
        zero = target.zero_point.float()
        return (one * other * ratio + zero).round() - zero


#: What is made of two values on grids.
_PAIRS: dict[Any, type[_Sum | _Product]] = {torch.add: _Sum, torch.mul: _Product}


@dataclass(frozen=True, slots=True)
class _Mean:
    """A value on a grid whose spatial mean is taken."""

    value: Tensor
    grid: FakeQuantize

    def rounded(self, target: FakeQuantize) -> Tensor:
        """Integers minus zero point."""
        steps = _steps(self.value, self.grid).flatten(2)
        total = steps.sum(dim=2).reshape(*steps.shape[:2], *([1] * (self.value.ndim - 2)))
        return (total * (self.grid.scale / (target.scale * steps.shape[2]))).round()


#: Functions whose operands the rounding behind them needs.
_NOTED = frozenset({*_PAIRS, global_average})


class IntegerKernels(fx.Interpreter):
    """Runs a module of :func:`~deploycnn.graph.bridge.importer.to_torch` in integers, without gradients.

    Convolutions, linear layers, additions and products of two values and global means that stand between roundings
    with one scale for a whole activation are modelled; whatever else there is computes in float32, as in the module.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._modules = dict(module.named_modules())
        self._pending: dict[fx.Node, _Layer | _Sum | _Product | _Mean] = {}

    def __call__(self, *images: Tensor) -> Any:
        """Outputs of the graph; no gradients."""
        with torch.no_grad():
            return self.run(*images)

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node."""
        if n.op == "call_function" and n.target in _NOTED and len(n.users) == 1:
            self._note(n)
        value = self._run_module(n) if n.op == "call_module" else super().run_node(n)
        for done in self.user_to_last_uses.get(n, ()):
            self._pending.pop(done, None)
        return value

    def _note(self, node: fx.Node) -> None:
        """Keep what a function is given, where the rounding behind it depends on it."""
        operands = [value for value in node.args[:2] if isinstance(value, fx.Node)]
        values = [self.env[operand] for operand in operands]
        grids = [grid for operand in operands if (grid := self._grid(operand)) is not None]
        if node.target in _PAIRS and len(node.args) == len(grids) == 2:
            self._pending[node] = _PAIRS[node.target]((values[0], values[1]), (grids[0], grids[1]))
        elif grids and node.target is global_average:
            self._pending[node] = _Mean(values[0], grids[0])

    def _run_module(self, node: fx.Node) -> Any:
        module = self._modules[str(node.target)]
        source = node.args[0] if node.args else None
        if isinstance(module, QuantizedConv2d | QuantizedLinear):
            grid = self._grid(source)
            # What others read too is computed in float, and rounded for each.
            if grid is not None and isinstance(source, fx.Node) and len(node.users) == 1:
                found = _multiply(module, self.env[source], grid)
                self._pending[node] = found
                return found.sums * found.worth
        elif isinstance(module, FakeQuantize) and source in self._pending and _whole(module):
            steps = self._pending[source].rounded(module)  # type: ignore[index]
            low, high = module.limits(steps.ndim, 1)
            return steps.clamp(low, high) * module.scale  # type: ignore[arg-type]
        return super().run_node(node)

    def _grid(self, value: Any) -> FakeQuantize | None:
        """The quantizer on whose grid a value is, where there is one scale for all of it."""
        integers = False
        while isinstance(value, fx.Node):
            if value.op == "call_module":
                module = self._modules[str(value.target)]
                return module if isinstance(module, FakeQuantize) and _whole(module) else None
            # What stands between a Q and its DQ works on integers: slices, paddings with zeros, maxima.
            integers = integers or value.target is real
            if value.op != "call_function" or not (integers or value.target in _MOVERS):
                return None
            value = value.args[0]
        return None


def _whole(module: FakeQuantize) -> bool:
    return module.enabled and module.scale.numel() == 1


def _steps(value: Tensor, grid: FakeQuantize) -> Tensor:
    """The integers, zero point taken off, of a value that is on a grid."""
    return (value / grid.scale).round()


def _fused(factor: Tensor, other: Tensor, term: Tensor) -> Tensor:
    """``factor * other + term``, rounded to float32 once: float64 holds the product of two float32 exactly."""
    return (factor.double() * other.double() + term.double()).float()


def _multiply(module: QuantizedConv2d | QuantizedLinear, value: Tensor, grid: FakeQuantize) -> _Layer:
    quantizer = module.weight_fake_quant
    length = module.weight.shape[0]
    spread = quantizer.spread(quantizer.zero_point, module.weight.ndim, length)
    weight = quantizer.quantize(module.weight) - spread
    largest = int(weight.abs().flatten(1).sum(dim=1).max()) * max(abs(grid.qmin), abs(grid.qmax))
    kind = torch.float32 if largest < _EXACT_IN_FLOAT32 else torch.float64
    steps = _steps(value, grid).to(kind)
    if isinstance(module, QuantizedConv2d):
        # Padding is with zeros, which are exact: everything else is a Pad of its own.
        sums = functional.conv2d(
            steps, weight.to(kind), None, module.stride, module.padding, module.dilation, module.groups
        )
    else:
        sums = functional.linear(steps, weight.to(kind))
    sums = sums.double()
    shape = [1, -1, 1, 1] if isinstance(module, QuantizedConv2d) else [-1]
    worth = (grid.scale * quantizer.scale).detach()
    worth = worth.reshape(shape) if worth.numel() > 1 else worth.reshape(())
    if module.bias is not None:
        if module.bias_fake_quant is not None:
            sums += module.bias_fake_quant.quantize(module.bias).double().reshape(shape)
        else:
            # Float biases are rounded to the integers of the sums when the file is loaded.
            sums += (module.bias.detach().reshape(shape) / worth).round().double()
    return _Layer(sums.float(), worth)
