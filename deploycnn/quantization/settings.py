"""What an INT8 quantization is asked to do, and what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from deploycnn.core import Json

Calibrator = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Settings:
    """Settings of ``quantize_static``.

    Attributes:
        calibrator: How a value's range is chosen from what calibration saw (see ``ranges.choose_range``).
        percentile: For ``percentile``: share of values, in percent, that each end of the range must cover.
        per_channel: One weight scale per output channel instead of one per layer.
        reduce_range: 7-bit weights, for x86 CPUs whose 8-bit multiply-add saturates (no VNNI).
        activation_type: uint8 with a zero point (U8S8) or symmetric int8 (S8S8).
        exclude: Names of nodes to leave in float.
        target: Whose placement rules are followed (``packs.get``).
        threads: CPU threads for calibration.
    """

    calibrator: Calibrator = "minmax"
    percentile: float = 99.999
    per_channel: bool = True
    reduce_range: bool = False
    activation_type: Literal["uint8", "int8"] = "uint8"
    exclude: tuple[str, ...] = ()
    target: str = "cpu"
    threads: int = 1

    @property
    def scheme(self) -> str:
        """The scheme in words."""
        activations = "asymmetric uint8" if self.activation_type == "uint8" else "symmetric int8"
        weights = "7-bit" if self.reduce_range else "int8"
        granularity = "per channel" if self.per_channel else "per tensor"
        return f"QDQ, activations {activations} per tensor, weights symmetric {weights} {granularity}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedCounts:
    """What a runtime makes of a Q/DQ graph on this machine.

    Attributes:
        quantized: Operators that compute on integers (``QLinearConv``, ``QGemm``, ...); for OpenVINO,
            convolutions and matrix products that do.
        stray: Q/DQ nodes left over.
        float_compute: Convolutions and matrix products left in float.
        by_operator: Count of every operator in the optimized graph.
        runtime: "onnxruntime" or "openvino".
        layers: Whether each convolution and matrix product of the file computes on integers, by node name.
    """

    quantized: int
    stray: int
    float_compute: int
    by_operator: Mapping[str, int]
    runtime: str = "onnxruntime"
    layers: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationRecord:
    """What was quantized, and how.

    Attributes:
        scheme: In words.
        calibrator: Name, with the percentile where it matters.
        images: Calibration images that were run.
        ranges: Range chosen for each quantized value, (low, high).
        quantized_nodes: Names of the nodes between Q and DQ.
        float_compute_nodes: Convolutions and matrix products left in float -> why.
        opset: Of the quantized model.
        fused: What onnxruntime makes of it here.
    """

    scheme: str
    calibrator: str
    images: int
    ranges: Mapping[str, tuple[float, float]]
    quantized_nodes: tuple[str, ...]
    float_compute_nodes: Mapping[str, str]
    opset: int
    fused: FusedCounts

    def to_json(self) -> Json:
        """The record kept with the artifact: ranges are summed up, the five widest named."""
        widest = sorted(self.ranges.items(), key=lambda item: item[1][0] - item[1][1])[:5]
        return {
            "scheme": self.scheme,
            "calibrator": self.calibrator,
            "images": self.images,
            "ranges": {"values": len(self.ranges), "widest": {name: list(bounds) for name, bounds in widest}},
            "quantized_nodes": len(self.quantized_nodes),
            "float_compute_nodes": dict(self.float_compute_nodes),
            "opset": self.opset,
            "fused": asdict(self.fused),
        }
