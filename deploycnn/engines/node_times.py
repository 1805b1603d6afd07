"""Times of an engine's layers, told by the nodes of the graph that it was built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploycnn.engines.audit import Asked, products_of
from deploycnn.engines.layers import Layer


def node_times(
    layers: Sequence[Layer], asked: Sequence[Asked], times: Mapping[str, float]
) -> dict[str, float]:
    """Milliseconds by ONNX node, in the order in which the engine runs.

    A kernel goes by the convolution or matrix product that it computes. Where it computes several (branches that read
    the same value), each has the share of its MACs. Kernels without one go by the first node that they name, and by
    TensorRT's own name where they name none (moves between layouts).

    Args:
        layers: From ``layers.parse``.
        asked: From ``audit.asked_of``.
        times: Layer name -> milliseconds, of the profiler.
    """
    products = products_of(layers, asked)
    found: dict[str, float] = {}
    for layer in layers:
        ms = times.get(layer.name)
        if ms is None:
            continue
        computed = products.get(layer.name, [])
        macs = [item.macs or 0 for item in computed]
        if sum(macs):
            shares = {item.node: ms * count / sum(macs) for item, count in zip(computed, macs, strict=True)}
        else:
            names = [item.node for item in computed] or [*layer.onnx_nodes, layer.name]
            shares = {names[0]: ms}
        for name, share in shares.items():
            found[name] = found.get(name, 0.0) + share
    return found
