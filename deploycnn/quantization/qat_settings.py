"""What quantization-aware training can be told, in the pass ``qat`` and as a rung of ``int8: auto``.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from deploycnn.training.settings import Optimizer, TrainingSettings
from deploycnn.training.teaching import Method, TeachingSettings


@dataclass(frozen=True, kw_only=True)
class QatSettings(TeachingSettings, TrainingSettings):
    """How to fine-tune a quantized graph.

    Raises:
        ValueError: ``beta`` with kd, or scales are to be learned with adamw, which would undo LSQ's scaling of their
            gradients.
    """

    # Batch norms, which would forgive large steps, are folded, so gradients may be of any size: at 2e-4 a ResNet-20
    # with 4-bit weights trains and a ResNet-56 diverges. Clipped to norm 1, both train at 2e-3.
    default_lr: ClassVar[Mapping[Optimizer, float]] = {"sgd": 2e-3, "adamw": 1e-4}
    default_alpha: ClassVar[Mapping[Method, float]] = {"kd": 1.0, "dkd": 1.0, "dist": 1.0}

    epochs: Annotated[int, Ge(0), "Passes over the training split."] = 2
    weight_decay: Annotated[float, Ge(0), "Of kernels and matrices; biases and scales are not decayed."] = (
        1e-5
    )
    max_grad_norm: Annotated[float | None, Gt(0), "Clip the gradient to this norm; null: never."] = 1.0
    label_weight: Annotated[
        float | None, Ge(0), "Weight of the labels' cross-entropy; null: as in distill."
    ] = 0.0
    learn_scales: Annotated[bool, "Train the scales of activations and weights too (LSQ)."] = True

    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        "Of the arithmetic while training. Between its roundings the deployed graph computes in fp32.",
    ] = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_teaching()
        if self.learn_scales and self.optimizer == "adamw":
            raise ValueError("learn_scales needs optimizer sgd: adamw would undo LSQ's scaling of gradients")
