"""The one training loop.

A run that is killed at any moment and started again ends with the same weights, bit for bit, as one that was
not: after each epoch all that later epochs depend on is saved at once, and whatever is random is drawn from
streams that depend on the seed and the epoch alone. An interrupted epoch is simply done again. (With a budget in
minutes the clock decides how many steps there are; a continued run goes on with the plan that was saved.)
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deploycnn.core import Context
from deploycnn.data.base import Data
from deploycnn.errors import TrainingError
from deploycnn.tasks import classification
from deploycnn.training import batchnorm, checkpoint, feed, rehearsal, schedules
from deploycnn.training.budget import Pace, Plan, steps_that_fit
from deploycnn.training.checkpoint import Progress
from deploycnn.training.determinism import deterministic, seed_everything
from deploycnn.training.device import model_home, model_to
from deploycnn.training.evaluate import Score, evaluate
from deploycnn.training.history import Epoch, History, Stopped
from deploycnn.training.losses import Loss
from deploycnn.training.settings import TrainingSettings
from deploycnn.training.step import Stepper
from deploycnn.training.view import View

#: Seconds between two reports of progress within an epoch.
REPORT_INTERVAL_S = 0.5
#: Steps between two looks at the loss on a GPU, where looking means waiting.
GPU_CHECK_INTERVAL = 25
#: A budget in minutes is planned anew after each of so many equal parts of it.
REPLAN_PARTS = 40

#: Seconds; tests put a clock of their own here.
clock = time.perf_counter


def fit(
    model: nn.Module,
    data: Data,
    settings: TrainingSettings,
    *,
    loss: Loss,
    ctx: Context,
    spent_s: float = 0.0,
) -> History:
    """Train ``model`` in place; it ends on the CPU, in evaluation mode, with the weights of the kept epoch.

    Only ``data.dataset.train`` and ``.val`` are read. Checkpoints go to ``ctx.scratch``, from where an
    interrupted training is continued.

    Args:
        model: Images (N, C, H, W) -> logits (N, K), float32.
        data: Images with their preprocessing.
        settings: How to train.
        loss: What to minimize; what it holds must be on ``ctx.device``.
        ctx: Seed, device, threads, scratch folder, progress and log.
        spent_s: Seconds of ``max_minutes`` that are gone already, for what the loss needs.

    Raises:
        TrainingError: the loss became infinite or not a number; names step and last good checkpoint.
        RuntimeUnavailable: the device does not have the precision that was asked for.
        StorageError: a checkpoint cannot be written.
    """
    with deterministic(threads=ctx.threads, device=ctx.device):
        try:
            return _Training(model, data, settings, loss, ctx, spent_s).run()
        finally:
            model_home(model)


def _identity(model: nn.Module, data: Data, settings: TrainingSettings, seed: int) -> str:
    """What a checkpoint belongs to: the weights that training started from too, as one pass may train several times."""
    digest = hashlib.sha256(f"{settings}|{seed}|{data.fingerprint}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class _Training:
    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: TrainingSettings,
        loss: Loss,
        ctx: Context,
        spent_s: float,
    ) -> None:
        self.identity = _identity(model, data, settings, ctx.seed)
        self.model = model_to(model, ctx.device)
        self.data, self.settings, self.ctx = data, settings, ctx
        self.spent_s = spent_s
        self.stepper = Stepper(self.model, settings, loss, ctx.device)
        self.steps_per_epoch = feed.count_steps(len(data.dataset.train), settings.batch_size)
        self.most_steps = self.steps_per_epoch * settings.epochs
        self.path = ctx.scratch / checkpoint.FILE
        self.last_report = 0.0

    def run(self) -> History:
        progress = self.start()
        while (stopped := self.why_stop(progress)) is None:
            self.one_epoch(progress)
        self.report(progress, len(progress.epochs), "done")
        kept_epoch, kept = len(progress.epochs), self.score_of_last(progress)
        if self.settings.keep == "best" and progress.best is not None:
            kept_epoch, kept = progress.best_epoch, progress.best
            self.model.load_state_dict(progress.best_state)
        else:
            self.stepper.keep_average()
        return History(
            epochs=tuple(progress.epochs),
            initial_val_top1=progress.initial.top1,
            kept_epoch=kept_epoch,
            kept_val_top1=kept.top1,
            stopped=stopped,
            precision=self.stepper.precision,
            device=self.ctx.device,
        )

    # -- beginning and end -----------------------------------------------------------------------

    def start(self) -> Progress:
        """Continue from the checkpoint, or begin: re-estimate where asked for, score, plan, save."""
        state = checkpoint.load(self.path, self.identity)
        if state is not None:
            self.stepper.restore(state)
            progress = Progress.from_state(state["progress"])
            self.ctx.log.info("continuing after epoch %d", len(progress.epochs))
            return progress
        started = clock()
        if self.settings.reestimate_bn:
            layers = batchnorm.reestimate(self.model, feed.plain_batches(self.data, self.settings, self.ctx))
            self.ctx.log.info("re-estimated the statistics of %d batch-norm layers", layers)
            self.stepper.restart_average()
        self.choose_precision()
        begun = clock()
        initial = self.validate()
        pace = Pace(pause_s=clock() - begun)
        self.ctx.log.info("before training: val top-1 %.4f", initial.top1)
        progress = Progress(initial=initial, plan=self.first_plan(pace, started), pace=pace)
        self.save(progress)
        return progress

    def save(self, progress: Progress) -> None:
        state = {"identity": self.identity, **self.stepper.state(), "progress": progress.to_state()}
        checkpoint.save(self.path, state)

    def why_stop(self, progress: Progress) -> Stopped | None:
        """Decided by what is in the checkpoint, so that a continued run decides alike."""
        done, patience = len(progress.epochs), self.settings.early_stopping_patience
        if progress.plan.left == 0:
            return "max_minutes" if progress.plan.limited else "finished"
        if patience is not None and done > 0 and done - progress.best_epoch >= patience:
            return "early_stopping"
        return None

    @staticmethod
    def score_of_last(progress: Progress) -> Score:
        if not progress.epochs:
            return progress.initial
        return Score(top1=progress.epochs[-1].val_top1, loss=progress.epochs[-1].val_loss)

    # -- minutes ---------------------------------------------------------------------------------

    def first_plan(self, pace: Pace, started: float) -> Plan:
        """All epochs, or as many steps, at least one, as the minutes will hold."""
        steps, limited = self.most_steps, False
        if self.settings.max_minutes is not None and steps > 0:
            self.probe(pace)
            pace.spent_s = self.spent_s + clock() - started
            fitting = max(1, self.fitting(pace, pace.spent_s, taken=0))
            steps, limited = min(fitting, steps), fitting < steps
            self.ctx.log.info(
                "planned %d steps of %.3g s, %.3g epochs", steps, pace.step_s, steps / self.steps_per_epoch
            )
        warmup = self.settings.warmup_steps(self.steps_per_epoch, steps)
        return Plan(total=steps, warmup=warmup, left=steps, limited=limited)

    def probe(self, pace: Pace) -> None:
        """Time some steps, then put everything back as it was."""
        seed_everything(self.ctx.seed, 0)
        warmup = min(rehearsal.PACE_WARMUP, self.steps_per_epoch - 1)
        pace.add(*rehearsal.pace(self.stepper, self.views(1), warmup, clock))

    def choose_precision(self) -> None:
        """What is fastest here, where that has to be timed and training is long enough for it to matter."""
        if len(self.stepper.choices) == 1 or self.most_steps < rehearsal.WORTH_STEPS:
            return
        seed_everything(self.ctx.seed, 0)
        chosen, seconds = rehearsal.fastest(self.stepper, self.views(1), self.identity, clock)
        self.stepper.precision = chosen
        told = ", ".join(f"{name} {taken:.3g} s" for name, taken in seconds.items())
        self.ctx.log.info("training in %s: a step takes %s", chosen, told)

    def fitting(self, pace: Pace, spent_s: float, *, taken: int) -> int:
        """Steps that the minutes still hold."""
        seconds = 60 * (self.settings.max_minutes or math.inf) - spent_s
        return steps_that_fit(seconds, pace, steps_per_epoch=self.steps_per_epoch, taken=taken)

    def replan(self, progress: Progress, spent_s: float) -> None:
        """Let the rest of the schedule take the time that is left."""
        if self.settings.max_minutes is None:
            return
        fitting = self.fitting(progress.pace, spent_s, taken=progress.plan.taken)
        allowed = self.most_steps - progress.plan.taken
        progress.plan.stretch(min(fitting, allowed), limited=fitting < allowed)
        progress.pace.fade()

    # -- an epoch --------------------------------------------------------------------------------

    def one_epoch(self, progress: Progress) -> None:
        """Train, validate, remember the best, save."""
        started, number, pace = clock(), len(progress.epochs) + 1, progress.pace
        seed_everything(self.ctx.seed, number)
        taken = progress.plan.taken
        loss, train_top1, lr = self.train(progress, number, started)
        trained = clock()
        with self.stepper.averaged():
            score = self.validate()
            if not math.isfinite(score.loss):
                raise self.diverged("validation loss", score.loss, number, self.steps_per_epoch, lr)
            if progress.best is None or score.better_than(progress.best):
                progress.best, progress.best_epoch = score, number
                if self.settings.keep == "best":
                    state = self.model.state_dict()
                    progress.best_state = {
                        name: tensor.to("cpu", copy=True) for name, tensor in state.items()
                    }
        ended = clock()
        progress.epochs.append(
            Epoch(
                epoch=number,
                loss=loss,
                lr=lr,
                train_top1=train_top1,
                val_top1=score.top1,
                val_loss=score.loss,
                seconds=ended - started,
                steps=progress.plan.taken - taken,
            )
        )
        pace.spent_s, pace.pause_s = pace.spent_s + ended - started, ended - trained
        if progress.plan.left > 0:
            self.replan(progress, pace.spent_s)
        self.save(progress)
        told = f"epoch {number}/{self.epochs_in(progress)}: loss {loss:.4f}, val top-1 {score.top1:.4f}"
        self.ctx.log.info("%s, train top-1 %.4f, lr %.3g", told, train_top1, lr)
        self.report(progress, number, told)

    def train(self, progress: Progress, number: int, started: float) -> tuple[float, float, float]:
        """Train for one epoch: mean loss, top-1 on the augmented images, last learning rate."""
        self.model.train()
        plan, pace, minutes = progress.plan, progress.pace, self.settings.max_minutes or math.inf
        check_interval = 1 if self.ctx.device == "cpu" else GPU_CHECK_INTERVAL
        pending: list[Tensor] = []
        total_loss, images_seen, lr = 0.0, 0, 0.0
        hits = torch.zeros((), dtype=torch.int64, device=self.ctx.device)
        mark = planned = clock()
        for step, view in enumerate(self.views(number)):
            lr = self.lr_at(plan)
            loss, logits_NK = self.stepper.step(view, lr)
            labels_N = view.main_labels
            plan.advance()
            hits += classification.correct(logits_NK, labels_N)
            images_seen += len(labels_N)
            pending.append(loss * len(labels_N))
            last = plan.left == 0 or step == self.steps_per_epoch - 1
            if len(pending) == check_interval or last:
                total_loss += self.checked_sum(pending, number, step, lr)
                now = clock()
                pace.add(len(pending), now - mark)
                mark = now
                pending.clear()
                if not last and now - planned > 60 * minutes / REPLAN_PARTS:
                    self.replan(progress, pace.spent_s + now - started)
                    planned = now
            if time.monotonic() - self.last_report > REPORT_INTERVAL_S:
                done = number - 1 + (step + 1) / self.steps_per_epoch
                self.report(progress, done, f"epoch {number}/{self.epochs_in(progress)}")
            if plan.left == 0:
                break
        return total_loss / images_seen, hits.item() / images_seen, lr

    def views(self, epoch: int) -> Iterator[View]:
        return feed.train_views(
            self.data, self.settings, seed=self.ctx.seed, epoch=epoch, device=self.ctx.device
        )

    def lr_at(self, plan: Plan) -> float:
        factor = schedules.factor(self.settings.schedule, plan.position, plan.total, plan.warmup)
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

    def epochs_in(self, progress: Progress) -> int:
        """As planned, the last one perhaps not whole."""
        return -(-(progress.plan.taken + progress.plan.left) // self.steps_per_epoch)

    def report(self, progress: Progress, done: float, message: str) -> None:
        self.last_report = time.monotonic()
        epochs = (progress.plan.taken + progress.plan.left) / self.steps_per_epoch
        self.ctx.progress(min(done, epochs), max(1.0, epochs), message)
