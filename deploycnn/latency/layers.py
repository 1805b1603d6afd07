"""The layers of a torch model as latency tables know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from deploycnn.latency.model import Kind
from deploycnn.pruning.layers import CONVOLUTIONS, groups_of, is_depthwise, run_watched, width


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer with weights.

    Attributes:
        name: Of the module.
        kind: What it has in common with others.
        key: Of its table: ``kind.name``, or the name that a table measured elsewhere has for it.
    """

    name: str
    kind: Kind
    key: str


def layers_of(model: nn.Module, images: Tensor) -> list[Layer]:
    """All convolutions and linear layers that run, in the order in which they run first.

    Args:
        model: In evaluation mode.
        images: (N, C, H, W).
    """
    found: dict[str, Kind] = {}

    def note(name: str, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        found.setdefault(name, _kind(layer, inputs, output))

    run_watched(model, images, note)
    return [Layer(name=name, kind=kind, key=kind.name) for name, kind in found.items()]


def _kind(layer: nn.Module, inputs: Tensor, output: Tensor) -> Kind:
    widest = (width(layer, "in"), width(layer, "out"))
    if not isinstance(layer, CONVOLUTIONS):
        return Kind(
            op="linear", kernel=(), stride=(), groups="1", inputs=(), outputs=(), tail=(), widest=widest
        )
    return Kind(
        op="transposed" if layer.transposed else "conv",
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        groups="depthwise" if is_depthwise(layer) else str(groups_of(layer)),
        inputs=tuple(inputs.shape[2:]),
        outputs=tuple(output.shape[2:]),
        tail=(),
        widest=widest,
    )


def with_tails(
    layers: Sequence[Layer], times: Mapping[str, float], operators: Mapping[str, str]
) -> list[Layer]:
    """The layers with what the runtime runs behind each of them.

    Args:
        layers: Of ``layers_of``.
        times: Of the dense model (``Stopwatch.layer_ms``).
        operators: Node name -> operator of the float graph.
    """
    tails: dict[str, list[str]] = {layer.name: [] for layer in layers}
    for owner, node, _ in owned([layer.name for layer in layers], times):
        if node in operators and not node.startswith(f"{owner}/"):
            tails[owner].append(operators[node])
    kinds = {layer.name: replace(layer.kind, tail=tuple(sorted(tails[layer.name]))) for layer in layers}
    return [Layer(name=name, kind=kind, key=kind.name) for name, kind in kinds.items()]


def owned(names: Sequence[str], times: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(layer, node, milliseconds): nodes that belong to no layer count for the last one before them."""
    known = set(names)
    found = []
    current = names[0]
    for node, ms in times.items():
        parts = node.split("/")
        for end in range(len(parts) - 1, 0, -1):
            if "/".join(parts[:end]) in known:
                current = "/".join(parts[:end])
                break
        found.append((current, node, ms))
    return found


def layer_sums(names: Sequence[str], times: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of each layer with what runs behind it."""
    sums = dict.fromkeys(names, 0.0)
    for owner, _, ms in owned(names, times):
        sums[owner] += ms
    return sums
