"""Train with a penalty that makes channels small, before `prune` cuts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Lt

from deploycnn.core import Artifact, Context, Draft, Format, Json, Pass, Table
from deploycnn.errors import PassRequirementError
from deploycnn.training.settings import Optimizer, TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploycnn.pruning.groups import ChannelGroup

#: Strength where the recipe gives none.
_STRENGTH: Mapping[str, float] = {"group_lasso": 1e-4, "growing": 0.1}
_PRUNING_RATIO = 0.5
#: Share of the training during which the strength of `growing` grows.
_RAMP = 0.75


@dataclass(frozen=True, kw_only=True)
class Sparsify(TrainingSettings, Pass):
    """Train with a penalty on whole channels, in the groups in which `prune` removes them; `prune` should follow.

    group_lasso: Wen et al. 2016, all channels. growing: Wang et al. 2021, those with the smallest norm now.

    Raises:
        ValueError: `growing` is given a training that may end before its schedule.
    """

    consumes: ClassVar[Format] = "torch"
    produces: ClassVar[Format] = "torch"
    version: ClassVar[int] = 4
    needs_data: ClassVar[bool] = True
    default_lr: ClassVar[Mapping[Optimizer, float]] = {"sgd": 0.02, "adamw": 2e-4}

    method: Annotated[
        Literal["group_lasso", "growing"], "Pull on all channels, or a growing one on the smallest."
    ] = "group_lasso"
    strength: Annotated[
        Annotated[float, Gt(0)] | None, "Of the penalty (growing: at its end); null: 1e-4, growing: 0.1."
    ] = None
    pruning_ratio: Annotated[
        float, Gt(0), Lt(1), "growing: share of each group's channels, the smallest, to make smaller."
    ] = _PRUNING_RATIO
    protect: Annotated[tuple[str, ...], "Names of layers or modules whose output channels feel nothing."] = ()
    keep: Annotated[Literal["best", "last"], "Which epoch's weights: the last has the smallest channels."] = (
        "last"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "group_lasso" and self.pruning_ratio != _PRUNING_RATIO:
            raise ValueError("pruning_ratio is for growing; group_lasso pulls on all channels")
        if self.method == "growing" and (self.max_minutes or self.early_stopping_patience):
            raise ValueError(
                "growing follows a schedule over all `epochs`, so it cannot end sooner; leave max_minutes and "
                "early_stopping_patience out, or choose group_lasso"
            )

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Train ``source``; the history is recorded under "training", what became small under "sparsified".

        Raises:
            TrainingError: the loss became infinite or not a number.
            PreprocessingError: the model was made for images prepared otherwise.
            PassRequirementError: it does not fit the data's classes, or has no channels that could be cut.
        """
        import torch

        from deploycnn.pruning import regularization, zeros
        from deploycnn.pruning.counting import counted
        from deploycnn.pruning.structure import analyse, shrunk
        from deploycnn.training import artifact, feed
        from deploycnn.training.loop import fit
        from deploycnn.training.losses import CrossEntropy

        data = artifact.needed_data(ctx, "sparsify")
        model = artifact.load_checked(source.path, source.facts, data, "sparsify: the model")
        shape = data.preprocessing.input_shape
        images = torch.randn((2, *shape), generator=torch.Generator().manual_seed(ctx.seed))
        trial = shrunk(model, images)
        groups = analyse(model, trial, protect=self.protect, seed=ctx.seed, where="sparsify").groups
        if not groups:
            raise PassRequirementError(
                "sparsify: no channel of this model can be pruned, so there is nothing to shrink"
            )
        before = [regularization.share_small(model, group) for group in groups]
        zeros.keep_zeros(model, zeros.meant(ctx.lineage))
        steps = self.epochs * feed.count_steps(len(data.dataset.train), self.batch_size)
        with counted(model) as count:
            loss = regularization.Regularized(
                loss=CrossEntropy(label_smoothing=self.label_smoothing),
                penalty=self._penalty(model, groups, count, max(1, round(_RAMP * steps))),
            )
            history = fit(model, data, self, loss=loss, ctx=ctx)
        after = [regularization.share_small(model, group) for group in groups]
        table = Table(
            title="Channels smaller than a tenth of their group's largest",
            columns=("group", "channels", "share before", "share after"),
            rows=tuple((g.name, g.width, b, a) for g, b, a in zip(groups, before, after, strict=True)),
        )
        sparsified = {"method": self.method, "strength": self._strength, "groups": len(groups)}
        record: dict[str, Json] = {"sparsified": sparsified, "tables": [table.to_json()]}
        return artifact.trained_draft(source, model, history, ctx, record)

    @property
    def _strength(self) -> float:
        return self.strength if self.strength is not None else _STRENGTH[self.method]

    def _penalty(
        self, model: nn.Module, groups: Sequence[ChannelGroup], count: Callable[[], int], ramp: int
    ) -> Callable[[], Tensor]:
        from deploycnn.pruning import regularization

        if self.method == "group_lasso":
            return lambda: regularization.group_lasso(model, groups, self._strength)
        chosen = regularization.smallest(model, groups, self.pruning_ratio)
        return lambda: regularization.growing(
            model, groups, chosen, self._strength * min(1.0, count() / ramp)
        )
