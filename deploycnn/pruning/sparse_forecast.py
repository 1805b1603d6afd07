"""Which layers can be faster with 2:4 weights on a GPU, told before any training.

Sparse tensor cores came with Ampere (compute capability 8.0). TensorRT times sparse kernels against dense ones and
takes the faster; its maintainers report that sparse ones win for convolutions with 256 input channels and more, each
place of the kernel counting, and as many output channels (NVIDIA/TensorRT issues 3849 and 4065). That is the rule
here; it is a forecast and no measurement. A layer that it names can become twice as fast at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from deploycnn.core import Table
from deploycnn.errors import PassRequirementError, nearest
from deploycnn.pruning.sparsity import weight_of, why_not_two_four

#: Compute capabilities of GPUs by name (developer.nvidia.com/cuda-gpus).
CAPABILITIES: Mapping[str, tuple[int, int]] = {
    "V100": (7, 0),
    "T4": (7, 5),
    "RTX 2080": (7, 5),
    "A100": (8, 0),
    "A30": (8, 0),
    "A10": (8, 6),
    "A40": (8, 6),
    "RTX 3090": (8, 6),
    "Jetson Xavier": (7, 2),
    "Jetson Orin": (8, 7),
    "L4": (8, 9),
    "L40S": (8, 9),
    "RTX 4090": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "B200": (10, 0),
    "RTX 5090": (12, 0),
}

_LEAST_CAPABILITY = (8, 0)
_LEAST_CHANNELS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What 2:4 can bring on a GPU.

    Attributes:
        gpu: As the recipe names it.
        reasons: Layer -> why it cannot or will hardly be faster; ``None`` where it can.
        macs_ratio: Share of the model's MACs in layers that can.
    """

    gpu: str
    reasons: Mapping[str, str | None]
    macs_ratio: float

    @property
    def bound(self) -> float:
        """Most that the whole model can become faster: these layers twice, the rest as before."""
        return 1 / (1 - self.macs_ratio / 2)

    def sentence(self) -> str:
        """In words."""
        able = sum(reason is None for reason in self.reasons.values())
        if not able:
            reasons = list(dict.fromkeys(reason for reason in self.reasons.values() if reason))
            return (
                f"on {self.gpu} no layer is expected to be faster with 2:4 weights: {'; '.join(reasons[:3])}"
            )
        return (
            f"on {self.gpu} {able} of {len(self.reasons)} layers ({self.macs_ratio:.0%} of the MACs) can be faster "
            f"with 2:4 weights in FP16 or INT8, so the model at most {self.bound:.2f} times; TensorRT must be told "
            "(`build_engine: {sparse_weights: true}`)"
        )

    def table(self) -> Table:
        """A row per layer."""
        rows = tuple(
            (name, reason is None, reason or "expected to be faster") for name, reason in self.reasons.items()
        )
        return Table(
            title=f"Forecast of 2:4 on {self.gpu}", columns=("layer", "can be faster", "why"), rows=rows
        )


def capability_of(gpu: str) -> tuple[int, int]:
    """Compute capability of a GPU given by name, or as "8.6".

    Raises:
        PassRequirementError: the name is unknown.
    """
    for name, capability in CAPABILITIES.items():
        if gpu.lower() == name.lower():
            return capability
    major, _, minor = gpu.partition(".")
    if major.isdigit() and minor.isdigit():
        return int(major), int(minor)
    raise PassRequirementError(
        f'sparse.gpu: unknown GPU "{gpu}"; give its compute capability, such as 8.6, or a name: '
        f"{nearest(gpu, CAPABILITIES)}"
    )


def forecast(layers: Mapping[str, nn.Module], macs: Mapping[str, int], total: int, gpu: str) -> Forecast:
    """Say of each layer whether 2:4 weights can make it faster.

    Args:
        layers: Convolutions and linear layers by name.
        macs: Of each, for one image.
        total: MACs of the whole model.
        gpu: Name or compute capability.

    Raises:
        PassRequirementError: the GPU is unknown.
    """
    capability = capability_of(gpu)
    reasons = {name: _reason(layer, capability) for name, layer in layers.items()}
    able = sum(macs.get(name, 0) for name, reason in reasons.items() if reason is None)
    return Forecast(gpu=gpu, reasons=reasons, macs_ratio=able / total if total else 0.0)


def _reason(layer: nn.Module, capability: tuple[int, int]) -> str | None:
    if capability < _LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} has no sparse tensor cores (8.0 and newer have)"
    misfit = why_not_two_four(layer)
    if misfit is not None:
        return misfit
    weight = weight_of(layer)
    if min(len(weight), weight[0].numel()) < _LEAST_CHANNELS:
        return f"too narrow for sparse kernels to win (fewer than {_LEAST_CHANNELS} outputs, or inputs times kernel)"
    return None
