"""Train a model to agree with one or more teachers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from deploycnn.core import Artifact, Context, Draft, Facts, Format, Pass
from deploycnn.training.settings import Optimizer, TrainingSettings
from deploycnn.training.teaching import TeachingSettings

if TYPE_CHECKING:
    from torch import nn

    from deploycnn.data.base import Data
    from deploycnn.training.features import Features
    from deploycnn.training.logit_cache import LogitCache
    from deploycnn.training.losses import Loss

#: Stands for the student's own weights as they were, where a variant's name is expected.
SELF = "self"
#: Records of passes that take something away from a model, or train it towards that.
_CUTS = frozenset({"pruning", "blocks", "sparsity", "sparsified"})
#: Weight of the term of features where the recipe gives none: for at that of Zagoruyko & Komodakis 2017. Hints are
#: summed over all stages; 100, which comparisons use with one stage, made a ResNet-20 diverge within 3 steps at both
#: default learning rates, 10 at the higher one; 1 did not.
_FEATURE_WEIGHT: Mapping[str, float] = {"at": 1000.0, "fitnet": 1.0}


@dataclass(frozen=True, kw_only=True)
class Distill(TeachingSettings, TrainingSettings, Pass):
    """Train on labels and on what teachers put out for the same augmented images.

    kd: Hinton et al. 2015. dkd: Zhao et al. 2022. dist: Huang et al. 2022. at: Zagoruyko & Komodakis 2017.
    fitnet: Romero et al. 2015. self: Furlanello et al. 2018.

    Raises:
        ValueError: not exactly one of ``teacher``, ``teachers`` and ``teacher_folder`` is given, or options that
            do not go together.
    """

    consumes: ClassVar[Format] = "torch"
    produces: ClassVar[Format] = "torch"
    version: ClassVar[int] = 6
    needs_data: ClassVar[bool] = True
    # Half of what training from scratch takes: the student comes with weights worth keeping.
    default_lr: ClassVar[Mapping[Optimizer, float]] = {"sgd": 0.05, "adamw": 5e-4}

    teacher: Annotated[
        str | None,
        "Variant whose last torch model teaches; self: the model as it was before it was first pruned, or else as "
        "it comes.",
    ] = None
    teachers: Annotated[tuple[str, ...], "Instead of one: several; their losses are averaged."] = ()
    teacher_weights: Annotated[
        tuple[float, ...],
        "Of the teachers' losses, in their order; empty: all the same. Their sum does not matter.",
    ] = ()
    teacher_folder: Annotated[
        Path | None, "Instead of a variant: folder with a teacher's model.safetensors and architecture.json."
    ] = None
    features: Annotated[
        Literal["at", "fitnet"] | None,
        "Also compare feature maps. at: where they are active; fitnet: their content, through 1x1 convolutions; "
        "null: do not.",
    ] = None
    feature_weight: Annotated[float | None, Ge(0), "Of that term; null: 1000 for at, 1 for fitnet."] = None
    feature_layers: Annotated[
        tuple[str, ...],
        "Layers to compare: NAME, or STUDENT=TEACHER; empty: the last of each resolution that both have.",
    ] = ()
    cache_teacher: Annotated[
        bool, "Keep a teacher's outputs where it sees the same views of an image again; changes no bit."
    ] = True
    reestimate_bn: Annotated[bool, "First compute the batch-norm statistics anew, on training images."] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.teacher is not None, bool(self.teachers), self.teacher_folder is not None)
        if sum(given) != 1:
            raise ValueError("give one of `teacher` (a variant's name), `teachers` and `teacher_folder`")
        self.check_teaching()
        self._check_teachers()
        if self.features is None and (self.feature_layers or self.feature_weight is not None):
            raise ValueError("feature_layers and feature_weight need `features` (at or fitnet)")

    def _check_teachers(self) -> None:
        if len(set(self.teachers)) < len(self.teachers):
            raise ValueError("teachers should be different ones; weigh them by `teacher_weights`")
        if not self.teacher_weights:
            return
        if len(self.teacher_weights) != len(self.teachers):
            raise ValueError(
                f"teacher_weights should be one for each of `teachers`: {len(self.teachers)}, "
                f"not {len(self.teacher_weights)}"
            )
        if min(self.teacher_weights) < 0 or sum(self.teacher_weights) <= 0:
            raise ValueError("teacher_weights should not be negative, nor all 0")

    def references(self) -> tuple[str, ...]:
        """The teachers' variants."""
        return tuple(name for name in self._names if name != SELF)

    @property
    def _names(self) -> tuple[str, ...]:
        return (self.teacher,) if self.teacher is not None else self.teachers

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Train ``source``; the history is recorded under "training", teachers under "teacher" and "teachers".

        Raises:
            TrainingError: the loss became infinite or not a number.
            PreprocessingError: student or teacher were made for images prepared otherwise.
            PassRequirementError: student or teacher do not fit the data's classes, or layers are not there.
            ArtifactError: the teacher's files are missing or damaged.
        """
        from deploycnn.training import artifact

        data, begun = artifact.needed_data(ctx, "distill"), time.perf_counter()
        teachers: list[nn.Module] = []
        told: list[dict[str, Any]] = []
        for path, facts, name in self._found(source, ctx):
            teacher = artifact.load_checked(path, facts, data, f"distill: the teacher {name}")
            teacher = self._ready(teacher.requires_grad_(False), name, data, ctx)
            teachers.append(teacher)
            told.append({"name": name, "val_top1": artifact.val_top1(teacher, data, self.batch_size, ctx)})
        hooked: list[Features] = []

        def loss(student: nn.Module) -> Loss:
            return self._loss(student, teachers, ctx, hooked, record)

        record: dict[str, Any] = {"teacher": told[0], "teachers": told}
        try:
            return artifact.train(
                source,
                self,
                ctx,
                loss=loss,
                where="distill",
                record=record,
                spent_s=time.perf_counter() - begun,
            )
        finally:
            for features in hooked:
                features.close()

    def _ready(self, teacher: nn.Module, name: str, data: Data, ctx: Context) -> nn.Module:
        """A teacher where and as it is computed."""
        from deploycnn.training import artifact
        from deploycnn.training.device import model_to
        from deploycnn.training.teacher import answering

        if ctx.device == "cpu" and self.features is None:
            views = self.epochs * len(data.dataset.train)
            teacher = answering(teacher, artifact.sample(data, 8), views=views, name=name, ctx=ctx)
        return model_to(teacher, ctx.device)

    def _loss(
        self,
        student: nn.Module,
        teachers: list[nn.Module],
        ctx: Context,
        hooked: list[Features],
        record: dict[str, Any],
    ) -> Loss:
        """What to minimize; hooks go to ``hooked``, layers that are compared to ``record``."""
        from deploycnn.training.losses import Averaged, Distillation

        losses = []
        for teacher in teachers:
            features = self._features(student, teacher, ctx)
            if features is not None:
                hooked.append(features)
                record["features"] = [*record.get("features", []), [list(pair) for pair in features.pairs]]
            losses.append(
                Distillation(
                    teacher=teacher,
                    method=self.method,
                    **self.weights,
                    label_smoothing=self.label_smoothing,
                    features=features,
                    feature_weight=self._feature_weight,
                    cache=self._cache(ctx) if features is None else None,
                )
            )
        if len(losses) == 1:
            return losses[0]
        shares = self.teacher_weights or (1.0,) * len(losses)
        return Averaged(losses=tuple(losses), weights=tuple(share / sum(shares) for share in shares))

    @property
    def _feature_weight(self) -> float:
        if self.feature_weight is not None:
            return self.feature_weight
        return _FEATURE_WEIGHT[self.features] if self.features is not None else 0.0

    def _features(self, student: nn.Module, teacher: nn.Module, ctx: Context) -> Features | None:
        from deploycnn.training import artifact
        from deploycnn.training.features import Features, find_pairs

        if self.features is None:
            return None
        teacher.to("cpu")
        images = artifact.sample(artifact.needed_data(ctx, "distill"))
        pairs = find_pairs(student, teacher, images, self.feature_layers, "distill")
        ctx.log.info("comparing %s", ", ".join(f"{ours} with {theirs}" for ours, theirs in pairs))
        features = Features(student, teacher, pairs, self.features, images, seed=ctx.seed)
        teacher.to(ctx.device)
        return features

    def _cache(self, ctx: Context) -> LogitCache | None:
        """Where views come again; it remembers if asked to, and if there is memory for it."""
        from deploycnn.training import artifact, logit_cache

        data, views = artifact.needed_data(ctx, "distill"), logit_cache.views_of(self)
        images, classes = len(data.dataset.train), len(data.dataset.classes)
        if views is None:
            return None
        keep = self.cache_teacher and logit_cache.fits(images, classes, views)
        return logit_cache.LogitCache(images, classes, views, self.batch_size, keep=keep)

    def _found(self, source: Artifact, ctx: Context) -> list[tuple[Path, Facts, str]]:
        """Path, facts and name of each teacher."""
        from deploycnn.training import artifact

        if self.teacher_folder is not None:
            facts = artifact.stored_facts(self.teacher_folder)
            if facts.preprocessing is None:
                ctx.log.warning("%s: no manifest.json says which images it was made for", self.teacher_folder)
            return [(self.teacher_folder, facts, str(self.teacher_folder))]
        found = []
        for name in self._names:
            teacher = before_pruning(source, ctx) if name == SELF else ctx.references[name]
            found.append((teacher.path, teacher.facts, name))
        return found


def before_pruning(source: Artifact, ctx: Context) -> Artifact:
    """The torch model from which the first pruning in ``source``'s chain started; ``source`` where there was none."""
    chain = [artifact for artifact in ctx.lineage if artifact.format == "torch"]
    for before, after in itertools.pairwise(chain):
        if _CUTS & set(after.facts.record):
            return before
    return source
