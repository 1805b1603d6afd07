"""What happened while training, as it goes into the artifact's record. Loads no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

#: Why training ended: all epochs done, no better one for long, or the minutes that were planned for are over.
Stopped = Literal["finished", "early_stopping", "max_minutes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One pass over the training split.

    Attributes:
        epoch: Counted from 1.
        loss: Mean training loss.
        lr: Learning rate of the last step.
        train_top1: On the augmented images, while the weights changed; in [0, 1]. Mixed ones count for the class
            of the larger share.
        val_top1: After the epoch, in [0, 1].
        val_loss: Cross-entropy after the epoch.
        seconds: Wall-clock time, validation included.
        steps: Of the optimizer; the last epoch of a budget in minutes has fewer than the others.
    """

    epoch: int
    loss: float
    lr: float
    train_top1: float
    val_top1: float
    val_loss: float
    seconds: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """All epochs of a training.

    Attributes:
        epochs: In order.
        initial_val_top1: Before the first step (batch norms re-estimated, where that was asked for).
        kept_epoch: Whose weights were kept; 0 stands for the initial ones.
        kept_val_top1: Their top-1 on val.
        stopped: Why training ended.
        precision: Of the arithmetic: "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda".
    """

    epochs: tuple[Epoch, ...]
    initial_val_top1: float
    kept_epoch: int
    kept_val_top1: float
    stopped: Stopped
    precision: str
    device: str

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {**dataclasses.asdict(self), "epochs": [dataclasses.asdict(epoch) for epoch in self.epochs]}
