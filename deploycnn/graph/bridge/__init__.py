"""The bridge between ONNX and PyTorch: the graph that is trained is the graph that is deployed."""

from deploycnn.graph.bridge.bridge import Bridge
from deploycnn.graph.bridge.fake_quant import FakeQuantize
from deploycnn.graph.bridge.importer import supported_operators, to_torch

__all__ = ["Bridge", "FakeQuantize", "supported_operators", "to_torch"]
