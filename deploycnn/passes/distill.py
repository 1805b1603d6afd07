"""Train a model to agree with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from deploycnn.core import Artifact, Context, Draft, Facts, Format, Pass
from deploycnn.training.settings import Optimizer, TrainingSettings

Method = Literal["kd", "dkd", "dist"]

#: Weights and temperature where the recipe gives none: those of the papers, except beta of dkd.
#: There it is 0.5 to 8 by dataset; 8 kept a student from learning at all in 6 short epochs, 2 did not.
_TEMPERATURE: Mapping[Method, float] = {"kd": 4.0, "dkd": 4.0, "dist": 1.0}
_ALPHA: Mapping[Method, float] = {"kd": 0.9, "dkd": 1.0, "dist": 1.0}
_BETA: Mapping[Method, float] = {"kd": 0.0, "dkd": 2.0, "dist": 1.0}


@dataclass(frozen=True, kw_only=True)
class Distill(TrainingSettings, Pass):
    """Train on labels and on a teacher's outputs for the same augmented images.

    kd: Hinton et al. 2015. dkd: Zhao et al. 2022. dist: Huang et al. 2022.

    Raises:
        ValueError: not exactly one of ``teacher`` and ``teacher_folder`` is given, or ``beta`` with kd.
    """

    consumes: ClassVar[Format] = "torch"
    produces: ClassVar[Format] = "torch"
    version: ClassVar[int] = 2
    needs_data: ClassVar[bool] = True
    # Half of what training from scratch takes: the student comes with weights worth keeping.
    default_lr: ClassVar[Mapping[Optimizer, float]] = {"sgd": 0.05, "adamw": 5e-4}

    teacher: Annotated[str | None, "Variant whose last torch model teaches."] = None
    teacher_folder: Annotated[
        Path | None, "Instead of a variant: folder with a teacher's model.safetensors and architecture.json."
    ] = None
    method: Annotated[
        Method, "kd: softened outputs; dkd: target and other classes apart; dist: correlations."
    ] = "kd"
    temperature: Annotated[float | None, Gt(0), "Divides the logits; null: 4 for kd and dkd, 1 for dist."] = (
        None
    )
    alpha: Annotated[
        float | None,
        Ge(0),
        "Weight of kd's term (null: 0.9), dkd's target class (1) or dist's relation among classes (1).",
    ] = None
    beta: Annotated[
        float | None, Ge(0), "Weight of dkd's other classes (null: 2) or dist's relation among images (1)."
    ] = None
    label_weight: Annotated[
        float | None, Ge(0), "Weight of the labels' cross-entropy; null: 1 - alpha for kd, else 1."
    ] = None
    reestimate_bn: Annotated[bool, "First compute the batch-norm statistics anew, on training images."] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.teacher is None) == (self.teacher_folder is None):
            raise ValueError("give `teacher` (a variant's name) or `teacher_folder`, and not both")
        if self.method == "kd" and self.beta is not None:
            raise ValueError("beta belongs to dkd and dist; kd has alpha only")

    def references(self) -> tuple[str, ...]:
        """The teacher's variant."""
        return (self.teacher,) if self.teacher is not None else ()

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Train ``source``; the history is recorded under "training", the teacher under "teacher".

        Raises:
            TrainingError: the loss became infinite or not a number.
            PreprocessingError: student or teacher were made for images prepared otherwise.
            PassRequirementError: student or teacher do not fit the data's classes.
            ArtifactError: the teacher's files are missing or damaged.
        """
        from deploycnn.training import artifact
        from deploycnn.training.device import model_to
        from deploycnn.training.losses import Distillation

        data = artifact.needed_data(ctx, "distill")
        path, facts, name = self._teacher(ctx)
        teacher = artifact.load_checked(path, facts, data, f"distill: the teacher {name}")
        loss = Distillation(
            teacher=model_to(teacher.requires_grad_(False), ctx.device),
            method=self.method,
            temperature=_given(self.temperature, _TEMPERATURE[self.method]),
            alpha=self._alpha,
            beta=_given(self.beta, _BETA[self.method]),
            label_weight=self._label_weight,
            label_smoothing=self.label_smoothing,
        )
        record = {
            "teacher": {"name": name, "val_top1": artifact.val_top1(teacher, data, self.batch_size, ctx)}
        }
        return artifact.train(source, self, ctx, loss=loss, where="distill", record=record)

    @property
    def _alpha(self) -> float:
        return _given(self.alpha, _ALPHA[self.method])

    @property
    def _label_weight(self) -> float:
        return _given(self.label_weight, max(0.0, 1 - self._alpha) if self.method == "kd" else 1.0)

    def _teacher(self, ctx: Context) -> tuple[Path, Facts, str]:
        """Path, facts and name of the teacher."""
        from deploycnn.training import artifact

        if self.teacher_folder is not None:
            facts = artifact.stored_facts(self.teacher_folder)
            if facts.preprocessing is None:
                ctx.log.warning("%s: no manifest.json says which images it was made for", self.teacher_folder)
            return self.teacher_folder, facts, str(self.teacher_folder)
        (name,) = self.references()
        return ctx.references[name].path, ctx.references[name].facts, name


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
