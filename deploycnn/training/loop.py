"""The one training loop.

A run that is killed at any moment and started again ends with the same weights, bit for bit, as one that was
not: after each epoch all that later epochs depend on is saved at once, and whatever is random is drawn from
streams that depend on the seed and the epoch alone. An interrupted epoch is simply done again.
"""

from __future__ import annotations

import hashlib
import math
import time

import torch
from torch import Tensor, nn

from deploycnn.core import Context
from deploycnn.data.base import Data
from deploycnn.data.loader import Batch
from deploycnn.errors import TrainingError
from deploycnn.tasks import classification
from deploycnn.training import batchnorm, checkpoint, feed, optimizers, precision, schedules
from deploycnn.training.checkpoint import Progress
from deploycnn.training.determinism import deterministic, seed_everything
from deploycnn.training.device import images_to, labels_to, model_home, model_to
from deploycnn.training.evaluate import Score, evaluate
from deploycnn.training.history import Epoch, History, Stopped
from deploycnn.training.losses import Loss
from deploycnn.training.settings import TrainingSettings

#: Seconds between two reports of progress within an epoch.
REPORT_INTERVAL_S = 0.5
#: Steps between two looks at the loss on a GPU, where looking means waiting.
GPU_CHECK_INTERVAL = 25


def fit(model: nn.Module, data: Data, settings: TrainingSettings, *, loss: Loss, ctx: Context) -> History:
    """Train ``model`` in place; it ends on the CPU, in evaluation mode, with the weights of the kept epoch.

    Only ``data.dataset.train`` and ``.val`` are read. Checkpoints go to ``ctx.scratch``, from where an
    interrupted training is continued.

    Args:
        model: Images (N, C, H, W) -> logits (N, K), float32.
        data: Images with their preprocessing.
        settings: How to train.
        loss: What to minimize; what it holds must be on ``ctx.device``.
        ctx: Seed, device, threads, scratch folder, progress and log.

    Raises:
        TrainingError: the loss became infinite or not a number; names step and last good checkpoint.
        RuntimeUnavailable: the device does not have the precision that was asked for.
        StorageError: a checkpoint cannot be written.
    """
    with deterministic(threads=ctx.threads, device=ctx.device):
        try:
            return _Training(model, data, settings, loss, ctx).run()
        finally:
            model_home(model)


class _Training:
    def __init__(
        self, model: nn.Module, data: Data, settings: TrainingSettings, loss: Loss, ctx: Context
    ) -> None:
        self.model = model_to(model, ctx.device)
        self.data, self.settings, self.loss, self.ctx = data, settings, loss, ctx
        self.precision = precision.resolve(settings.precision, ctx.device)
        self.optimizer = optimizers.build(
            model,
            settings.optimizer,
            lr=settings.peak_lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(ctx.device, enabled=self.precision == "fp16")
        self.steps_per_epoch = feed.count_steps(len(data.dataset.train), settings.batch_size)
        self.total_steps = self.steps_per_epoch * settings.epochs
        self.warmup_steps = settings.warmup_steps(self.steps_per_epoch)
        self.path = ctx.scratch / checkpoint.FILE
        self.identity = hashlib.sha256(f"{settings}|{ctx.seed}|{data.fingerprint}".encode()).hexdigest()
        self.last_report = 0.0

    def run(self) -> History:
        progress = self.start()
        while (stopped := self.why_stop(progress)) is None:
            self.one_epoch(progress)
        self.report(max(1, self.settings.epochs), "done")
        kept_epoch, kept = len(progress.epochs), self.score_of_last(progress)
        if self.settings.keep == "best" and progress.best is not None:
            kept_epoch, kept = progress.best_epoch, progress.best
            self.model.load_state_dict(progress.best_state)
        return History(
            epochs=tuple(progress.epochs),
            initial_val_top1=progress.initial.top1,
            kept_epoch=kept_epoch,
            kept_val_top1=kept.top1,
            stopped=stopped,
            precision=self.precision,
            device=self.ctx.device,
        )

    # -- beginning and end -----------------------------------------------------------------------

    def start(self) -> Progress:
        """Continue from the checkpoint, or begin: re-estimate where asked for, score, save."""
        state = checkpoint.load(self.path, self.identity)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            progress = Progress.from_state(state["progress"])
            self.ctx.log.info("continuing after epoch %d", len(progress.epochs))
            return progress
        if self.settings.reestimate_bn:
            layers = batchnorm.reestimate(self.model, feed.plain_batches(self.data, self.settings, self.ctx))
            self.ctx.log.info("re-estimated the statistics of %d batch-norm layers", layers)
        progress = Progress(initial=self.validate())
        self.ctx.log.info("before training: val top-1 %.4f", progress.initial.top1)
        self.save(progress)
        return progress

    def save(self, progress: Progress) -> None:
        checkpoint.save(
            self.path,
            {
                "identity": self.identity,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": progress.to_state(),
            },
        )

    def why_stop(self, progress: Progress) -> Stopped | None:
        """Decided by what is in the checkpoint, so that a continued run decides alike."""
        done, settings = len(progress.epochs), self.settings
        if done >= settings.epochs:
            return "finished"
        if done == 0:
            return None
        patience = settings.early_stopping_patience
        if patience is not None and done - progress.best_epoch >= patience:
            return "early_stopping"
        if settings.max_minutes is not None:
            spent = sum(epoch.seconds for epoch in progress.epochs)
            if spent * (done + 1) / done > 60 * settings.max_minutes:
                return "max_minutes"
        return None

    @staticmethod
    def score_of_last(progress: Progress) -> Score:
        if not progress.epochs:
            return progress.initial
        return Score(top1=progress.epochs[-1].val_top1, loss=progress.epochs[-1].val_loss)

    # -- an epoch --------------------------------------------------------------------------------

    def one_epoch(self, progress: Progress) -> None:
        """Train, validate, remember the best, save."""
        started, number = time.perf_counter(), len(progress.epochs) + 1
        seed_everything(self.ctx.seed, number)
        loss, train_top1, lr = self.train(number)
        score = self.validate()
        if not math.isfinite(score.loss):
            raise self.diverged("validation loss", score.loss, number, self.steps_per_epoch, lr)
        if progress.best is None or score.better_than(progress.best):
            progress.best, progress.best_epoch = score, number
            if self.settings.keep == "best":
                state = self.model.state_dict()
                progress.best_state = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        progress.epochs.append(
            Epoch(
                epoch=number,
                loss=loss,
                lr=lr,
                train_top1=train_top1,
                val_top1=score.top1,
                val_loss=score.loss,
                seconds=time.perf_counter() - started,
            )
        )
        self.save(progress)
        told = f"epoch {number}/{self.settings.epochs}: loss {loss:.4f}, val top-1 {score.top1:.4f}"
        self.ctx.log.info("%s, train top-1 %.4f, lr %.3g", told, train_top1, lr)
        self.report(number, told)

    def train(self, number: int) -> tuple[float, float, float]:
        """Train for one epoch: mean loss, top-1 on the augmented images, last learning rate."""
        self.model.train()
        check_interval = 1 if self.ctx.device == "cpu" else GPU_CHECK_INTERVAL
        pending: list[Tensor] = []
        total_loss, images_seen, lr = 0.0, 0, 0.0
        hits = torch.zeros((), dtype=torch.int64, device=self.ctx.device)
        batches = feed.train_batches(self.data, self.settings, seed=self.ctx.seed, epoch=number)
        for step, batch in enumerate(batches):
            lr = self.lr_at((number - 1) * self.steps_per_epoch + step)
            loss, logits_NK, labels_N = self.one_step(batch, lr)
            hits += classification.correct(logits_NK, labels_N)
            images_seen += len(labels_N)
            pending.append(loss * len(labels_N))
            if len(pending) == check_interval or step == self.steps_per_epoch - 1:
                total_loss += self.checked_sum(pending, number, step, lr)
                pending.clear()
            if time.monotonic() - self.last_report > REPORT_INTERVAL_S:
                done = number - 1 + (step + 1) / self.steps_per_epoch
                self.report(done, f"epoch {number}/{self.settings.epochs}")
        return total_loss / images_seen, hits.item() / images_seen, lr

    def one_step(self, batch: Batch, lr: float) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the optimizer: the batch's loss, logits and labels."""
        device = self.ctx.device
        images_NCHW, labels_N = images_to(batch.images, device), labels_to(batch.labels, device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, precision.DTYPES[self.precision], enabled=self.precision != "fp32"):
            logits_NK = self.model(images_NCHW)
            loss = self.loss(logits_NK, labels_N, images_NCHW)
        self.scaler.scale(loss).backward()
        if self.settings.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), logits_NK.detach(), labels_N

    def lr_at(self, step: int) -> float:
        factor = schedules.factor(self.settings.schedule, step, self.total_steps, self.warmup_steps)
        return self.settings.peak_lr * factor

    def validate(self) -> Score:
        return evaluate(
            self.model,
            self.data.dataset.val,
            self.data.preprocessing,
            batch_size=self.settings.batch_size,
            device=self.ctx.device,
        )

    # -- telling ---------------------------------------------------------------------------------

    def checked_sum(self, losses: list[Tensor], number: int, last_step: int, lr: float) -> float:
        values = [loss.item() for loss in losses] if len(losses) == 1 else torch.stack(losses).tolist()
        for index, value in enumerate(values):
            if not math.isfinite(value):
                step = last_step - len(values) + index + 2  # people count from 1
                raise self.diverged("loss", value, number, step, lr)
        return float(sum(values))

    def diverged(self, what: str, value: float, number: int, step: int, lr: float) -> TrainingError:
        when = f"after epoch {number - 1}" if number > 1 else "from before the first step"
        return TrainingError(
            f"training diverged: {what} became {value} at epoch {number}, "
            f"step {step} of {self.steps_per_epoch}, lr {lr:.3g}; "
            f"the last good checkpoint ({when}) is {self.path}; "
            f"lower `lr` (peak now {self.settings.peak_lr:.3g}), or set `max_grad_norm: 1`"
        )

    def report(self, done: float, message: str) -> None:
        self.last_report = time.monotonic()
        self.ctx.progress(done, max(1, self.settings.epochs), message)
