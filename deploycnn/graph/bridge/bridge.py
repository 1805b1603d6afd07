"""The result of an import: the module and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import ModelProto
from torch import fx

from deploycnn.graph.bridge.builder import Slot
from deploycnn.graph.bridge.fake_quant import BiasQuantize, FakeQuantize
from deploycnn.graph.bridge.writeback import write


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    """An ONNX model as a trainable module.

    Attributes:
        module: Takes the graph's inputs, float32 images (N, C, H, W), and returns its outputs: a tensor, or a
            tuple where there are several. Leaf modules are named after the ONNX nodes.
        module_of: ONNX node name -> path of its module, for nodes with weights and QuantizeLinear nodes.
        slots: Which tensor of the module belongs into which ONNX tensor.
        original: The ONNX model that was imported, with local functions inlined.
        evaluated: Its tensors from which constants were computed.
    """

    module: fx.GraphModule
    module_of: Mapping[str, str]
    slots: tuple[Slot, ...]
    original: ModelProto
    evaluated: frozenset[str] = frozenset()

    def write_back(self) -> ModelProto:
        """A copy of the original with the module's parameters in the same initializers.

        Float tensors are written as floats. Tensors that are stored as integers are rounded again with the
        present scale and zero point; int32 biases with input scale x weight scale. What was not trained is
        bit for bit as it was.

        Raises:
            PassRequirementError: a tensor no longer has the original's shape, or two layers that shared one
                hold different values.
            TrainingError: a learned scale is not a positive number.
        """
        return write(self.original, self.slots, self.module)

    def quantizers(self) -> dict[str, FakeQuantize]:
        """Path -> quantizer of activations and weights (not of biases, whose scales follow from these)."""
        return {
            name: module
            for name, module in self.module.named_modules()
            if isinstance(module, FakeQuantize) and not isinstance(module, BiasQuantize)
        }

    def learn_scales(self, learn: bool = True) -> None:
        """Make all scales of activations and weights parameters (LSQ), or fixed again."""
        for module in self.quantizers().values():
            module.learn_scale(learn)
