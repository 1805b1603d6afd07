"""MACs of a model after pruning, known without pruning it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from deploycnn.pruning.layers import Side, is_depthwise, run_watched, width
from deploycnn.pruning.surgery import Removals


def macs_by_layer(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Multiply-accumulates of every convolution and linear layer, for one image.

    Args:
        model: In evaluation mode.
        images: (N, C, H, W).
    """
    found: defaultdict[str, int] = defaultdict(int)

    def count(name: str, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        # Each weight is used once per position: of the output, or of the input where that is the smaller map.
        if isinstance(layer, nn.Linear):
            positions = output.numel() // (len(images) * layer.out_features)
        else:
            positions = math.prod((inputs if layer.transposed else output).shape[2:])
        found[name] += positions * layer.weight.numel()  # type: ignore[operator] # MIXING layers have weights

    run_watched(model, images, count)
    return dict(found)


def macs_after(model: nn.Module, by_layer: Mapping[str, int], cuts: Removals) -> int:
    """The sum of ``by_layer`` once ``cuts`` are made; exact, as MACs are proportional to widths."""
    total = 0
    for name, macs in by_layer.items():
        layer = model.get_submodule(name)
        sides: tuple[Side, ...] = ("out",) if is_depthwise(layer) else ("out", "in")
        kept = whole = 1
        for side in sides:
            size = width(layer, side)
            whole *= size
            kept *= size - len(cuts.get((name, side), ()))
        total += macs * kept // whole
    return total
