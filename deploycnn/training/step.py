"""One step of training, and all the state that steps change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deploycnn.training import optimizers, precision
from deploycnn.training.ema import Ema
from deploycnn.training.losses import Loss
from deploycnn.training.settings import TrainingSettings
from deploycnn.training.view import View


class Stepper:
    """A model with its loss, optimizer, loss scaling and averaged weights.

    ``precision`` is the first of ``choices``; it may be changed between steps.
    """

    def __init__(self, model: nn.Module, settings: TrainingSettings, loss: Loss, device: str) -> None:
        """Begin with the present weights of ``model``, which is on ``device``.

        Raises:
            RuntimeUnavailable: the device does not have the precision that was asked for.
        """
        self.model, self.settings, self.loss, self.device = model, settings, loss, device
        self.choices = precision.choices(settings.precision, device)
        self.precision = self.choices[0]
        self.trained = loss.trained.to(device)
        self.optimizer = optimizers.build(
            nn.ModuleList([model, self.trained]),
            settings.optimizer,
            lr=settings.peak_lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
            decay_all=settings.decay_all,
        )
        self.scaler = torch.amp.GradScaler(device, enabled=self.precision == "fp16")
        self.ema = Ema(model, settings.ema) if settings.ema is not None else None

    def step(self, view: View, lr: float) -> tuple[Tensor, Tensor]:
        """One step of the optimizer: the batch's loss and logits."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        dtype = precision.DTYPES[self.precision]
        with torch.autocast(self.device, dtype, enabled=self.precision != "fp32"):
            logits_NK = self.model(view.images)
            loss = self.loss(logits_NK, view)
        self.scaler.scale(loss).backward()
        if self.settings.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [*self.model.parameters(), *self.trained.parameters()]
            nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update()
        return loss.detach(), logits_NK.detach()

    # -- averaged weights ------------------------------------------------------------------------

    def restart_average(self) -> None:
        """Begin anew with the present weights."""
        if self.ema is not None:
            self.ema = Ema(self.model, self.ema.decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """With the averaged weights in the model, where there are any."""
        with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
            yield

    def keep_average(self) -> None:
        """Let the model have the averaged weights for good, where there are any."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.average)

    # -- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a step changes: tensors, not copied, and plain values."""
        return {
            "model": self.model.state_dict(),
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "precision": self.precision,
            "ema": self.ema.to_state() if self.ema is not None else {},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.trained.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.precision = state["precision"]
        if self.ema is not None:
            self.ema.load(**state["ema"])
