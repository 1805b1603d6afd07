"""What training can be told: the fields that ``train`` and ``distill`` share. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from deploycnn.data.augment import Augmentation

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "linear", "one_cycle"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train.

    Raises:
        ValueError: ``warmup_epochs`` leaves nothing of ``epochs``.
    """

    #: Peak learning rates where the recipe gives none, for batches of 128 images.
    default_lr: ClassVar[Mapping[Optimizer, float]] = {"sgd": 0.1, "adamw": 1e-3}

    epochs: Annotated[
        int, Ge(0), "Passes over the training split. 0 keeps the weights (batch norms: see reestimate_bn)."
    ] = 30
    optimizer: Annotated[Optimizer, "sgd: with momentum; adamw: Adam with decoupled weight decay."] = "sgd"
    lr: Annotated[float | None, Gt(0), "Peak learning rate; null: by optimizer and batch_size."] = None
    batch_size: Annotated[int, Ge(2), "Images per step."] = 128
    schedule: Annotated[
        Schedule,
        "How the learning rate falls after warm-up (cosine, linear), or rises and falls (one_cycle).",
    ] = "cosine"
    warmup_epochs: Annotated[
        float | None, Ge(0), "Of rising learning rate; null: a tenth of epochs, at most 5 (one_cycle: 30%)."
    ] = None
    momentum: Annotated[float, Ge(0), Lt(1), "Of sgd; beta 1 of adamw."] = 0.9
    nesterov: Annotated[bool, "Nesterov's momentum, for sgd."] = True
    weight_decay: Annotated[float, Ge(0), "Of kernels and matrices; see decay_all."] = 5e-4
    decay_all: Annotated[bool, "Decay biases and the scales and shifts of norms too."] = False
    ema: Annotated[
        float | None,
        Gt(0),
        Lt(1),
        "Decay per step of a moving average of the weights, which is what is scored and kept; null: none.",
    ] = None
    label_smoothing: Annotated[
        float, Ge(0), Lt(1), "Share of each label that is spread over all classes."
    ] = 0.0
    mixup: Annotated[float, Ge(0), "Blend pairs of images, shares from Beta(mixup, mixup); 0: off."] = 0.0
    cutmix: Annotated[
        float, Ge(0), "Paste boxes between images, shares from Beta(cutmix, cutmix); 0: off."
    ] = 0.0
    max_grad_norm: Annotated[float | None, Gt(0), "Clip the gradient to this norm; null: never."] = None
    # Small shifts change no class, so they are safe where nothing is known of the data; flips are not.
    augment: Annotated[
        Augmentation, "Random changes of the training images; what is given replaces the default as a whole."
    ] = field(default_factory=lambda: Augmentation(crop_padding=2))
    reestimate_bn: Annotated[bool, "First compute the batch-norm statistics anew, on training images."] = (
        False
    )
    keep: Annotated[
        Literal["best", "last"],
        "Which epoch's weights: best on val, or last (where the model had seen the val images before).",
    ] = "best"
    early_stopping_patience: Annotated[
        int | None, Ge(1), "Stop after so many epochs without a better one on val; null: never."
    ] = None
    max_minutes: Annotated[
        float | None,
        Gt(0),
        "Plan steps and schedule for so many minutes, or for epochs where these are shorter. Weights then depend "
        "on the machine's speed; null: no limit.",
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        "Of the arithmetic while training; weights stay fp32. auto: bf16 or fp16 on a GPU; on a CPU fp32, or bf16 "
        "where it has that and some steps, timed, are faster.",
    ] = "auto"

    def __post_init__(self) -> None:
        if self.warmup_epochs is not None and 0 < self.epochs <= self.warmup_epochs:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs}) should be less than epochs ({self.epochs})"
            )

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up.

        Where it is not given it grows with the batch (Goyal et al. 2017), for SGD; for AdamW with its root
        (Malladi et al. 2022).
        """
        if self.lr is not None:
            return self.lr
        scale = self.batch_size / 128
        return self.default_lr[self.optimizer] * (scale if self.optimizer == "sgd" else scale**0.5)

    def warmup_steps(self, steps_per_epoch: int, total: int | None = None) -> int:
        """Steps of rising learning rate, at least one fewer than all of ``total`` (default: those of all epochs)."""
        total = self.epochs * steps_per_epoch if total is None else total
        if self.warmup_epochs is not None:
            epochs = self.warmup_epochs
        elif self.schedule == "one_cycle":
            epochs = 0.3 * total / steps_per_epoch
        else:
            epochs = min(5.0, 0.1 * total / steps_per_epoch)
        return min(round(epochs * steps_per_epoch), max(0, total - 1))
