"""Times of kernels as times of ONNX nodes."""

from __future__ import annotations

import pytest

from deploycnn.engines.audit import Asked
from deploycnn.engines.layers import Layer
from deploycnn.engines.node_times import node_times


def asked(node: str, macs: int | None) -> Asked:
    return Asked(node=node, operator="Conv", precision="fp32", macs=macs)


def layer(name: str, kind: str, *nodes: str) -> Layer:
    return Layer(name=name, kind=kind, onnx_nodes=nodes)


def test_kernels_go_by_the_product_that_they_compute_in_the_order_of_the_engine() -> None:
    layers = [
        layer("to NHWC", "Reformat"),
        layer("conv1 + relu1", "CaskConvolution", "conv1", "relu1"),
        layer("merged", "CaskConvolution", "branch1", "branch2", "relu2", "relu3"),
        layer("pool", "Pooling", "pool"),
        layer("untimed", "CaskConvolution", "conv9"),
    ]
    products = [asked("conv1", 10), asked("branch1", 30), asked("branch2", 10), asked("conv9", 1)]
    times = {"to NHWC": 0.1, "conv1 + relu1": 1.0, "merged": 4.0, "pool": 0.2}
    found = node_times(layers, products, times)
    assert found == pytest.approx({"to NHWC": 0.1, "conv1": 1.0, "branch1": 3.0, "branch2": 1.0, "pool": 0.2})
    assert list(found) == ["to NHWC", "conv1", "branch1", "branch2", "pool"]
    assert sum(found.values()) == pytest.approx(sum(times.values()))


def test_kernels_of_one_node_count_together_and_unknown_macs_for_the_first() -> None:
    layers = [
        layer("conv1 prepare", "Reformat", "conv1"),
        layer("conv1", "CaskConvolution", "conv1"),
        layer("both", "CaskConvolution", "a", "b"),
    ]
    products = [asked("conv1", 5), asked("a", None), asked("b", None)]
    times = {"conv1 prepare": 0.5, "conv1": 1.0, "both": 2.0}
    assert node_times(layers, products, times) == {"conv1": 1.5, "a": 2.0}
