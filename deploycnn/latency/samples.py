"""Width configurations that a table is measured from, and what a profile of one tells of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import nn

from deploycnn.latency.layers import Layer, layer_sums
from deploycnn.latency.model import Sample
from deploycnn.pruning.layers import is_depthwise, width
from deploycnn.pruning.surgery import Removals

#: Random configurations that are profiled and raced.
CONFIGS = 32


def configurations(draw: Callable[[np.random.Generator], Removals], *, seed: int = 0) -> list[Removals]:
    """Random width configurations to measure a table from.

    Args:
        draw: Makes one.
        seed: Of all.
    """
    generator = np.random.default_rng(seed)
    return [draw(generator) for _ in range(CONFIGS)]


def widths_after(layers: Sequence[Layer], model: nn.Module, cuts: Removals) -> dict[str, tuple[int, int]]:
    """(in, out) channels that each layer keeps."""
    found = {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        outer = cuts.get((layer.name, "out"), ())
        inner = outer if is_depthwise(module) else cuts.get((layer.name, "in"), ())
        found[layer.name] = (width(module, "in") - len(inner), width(module, "out") - len(outer))
    return found


def samples_of(
    layers: Sequence[Layer], model: nn.Module, cuts: Removals, times: Mapping[str, float], config: int
) -> list[Sample]:
    """What a profile of one configuration tells of each layer."""
    sums = layer_sums([layer.name for layer in layers], times)
    kept = widths_after(layers, model, cuts)
    return [
        Sample(
            kind=layer.key,
            width_in=kept[layer.name][0],
            width_out=kept[layer.name][1],
            ms=sums[layer.name],
            config=config,
        )
        for layer in layers
        if sums[layer.name] > 0
    ]
