"""Remove whole channels."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, Lt

from deploycnn import targets
from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Format, Json, Pass, Table
from deploycnn.errors import RecipeError
from deploycnn.training.settings import TrainingSettings

if TYPE_CHECKING:
    import torch

    from deploycnn.pruning.importance import Criterion
    from deploycnn.pruning.latency_goal import LatencyGoal
    from deploycnn.pruning.pruner import Goal

Importance = Literal[
    "magnitude",
    "group_norm",
    "bn_scale",
    "taylor",
    "fisher",
    "group_fisher",
    "hrank",
    "chip",
    "random",
]

#: Fields of which exactly one is set.
_GOALS = ("pruning_ratio", "macs_ratio", "params_ratio", "latency_ratio")

#: Those that look at no images of the training split.
_OF_WEIGHTS = ("magnitude", "group_norm", "bn_scale", "random")


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Remove the least important channels of all layers that depend on one another.

    Set one of ``pruning_ratio``, ``macs_ratio``, ``params_ratio`` and ``latency_ratio``. The model is smaller and less
    accurate afterwards: `distill` or `train` should follow.
    """

    consumes: ClassVar[Format] = "torch"
    produces: ClassVar[Format] = "torch"
    version: ClassVar[int] = 13

    pruning_ratio: Annotated[
        Annotated[float, Gt(0), Lt(1)] | None, "Share of the prunable channels to remove."
    ] = None
    macs_ratio: Annotated[
        Annotated[float, Gt(0), Lt(1)] | None,
        "Share of the multiply-accumulates to keep at most; met most closely with `scope: global`.",
    ] = None
    params_ratio: Annotated[
        Annotated[float, Gt(0), Lt(1)] | None, "Share of the parameters to keep at most, by an exact solver."
    ] = None
    latency_ratio: Annotated[
        Annotated[float, Gt(0), Lt(1)] | None,
        "Share of the dense latency to keep on the recipe's target, at the first batch size and threads of `profile`; "
        "measured, and corrected where it is off.",
    ] = None
    latency_precision: Annotated[
        targets.Precision,
        "For latency_ratio: what the model will be deployed as; FP16 on GPUs only.",
    ] = "fp32"
    latency_table: Annotated[
        Path | None, "For latency_ratio: a table made by `deploycnn latency-table`, also on another machine."
    ] = None
    drop_blocks: Annotated[
        bool,
        "For latency_ratio: whole residual blocks may go as well as channels; how many, training images decide.",
    ] = False
    importance: Annotated[
        Importance,
        "What the least important channels are told by; taylor, the fishers, hrank and chip look at training images.",
    ] = "magnitude"
    norm: Annotated[Literal["l1", "l2"], "Of the weights, for `importance: magnitude`."] = "l2"
    importance_images: Annotated[int, Gt(0), "Training images for an importance that looks at them."] = 512
    scope: Annotated[
        Literal["layer", "global"],
        "Remove the same share from every layer, or the least important channels of the whole model.",
    ] = "layer"
    round_to: Annotated[
        Annotated[int, Ge(1)] | None,
        "Keep widths multiples of this; null: 8, and with latency_ratio the step that the target's kernels show.",
    ] = None
    max_ratio: Annotated[float, Gt(0), Lt(1), "Most that one layer may lose, in all steps together."] = 0.9
    protect: Annotated[tuple[str, ...], "Names of layers or modules whose output channels stay."] = ()
    ratios: Annotated[
        dict[str, Annotated[float, Interval(ge=0, lt=1)]],
        "Module name -> share of its channels to remove, in place of `pruning_ratio`.",
    ] = field(default_factory=dict, hash=False)

    steps: Annotated[
        int, Ge(1), "Cuts in which the goal is reached; channels are ranked anew before each."
    ] = 1
    tune: Annotated[
        TrainingSettings | None,
        "Training between the cuts (options as of `train`), with `steps` of 2 or more.",
    ] = None

    sensitivity: Annotated[
        bool,
        "Also tabulate val top-1 without 25, 50 and 75 % of each group alone; takes its time, needs `data`.",
    ] = False

    def __post_init__(self) -> None:
        given = [name for name in _GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            names = f"{', '.join(_GOALS[:-1])} and {_GOALS[-1]}"
            raise RecipeError(f"prune: set exactly one of {names}, got {' and '.join(given) or 'none'}")
        if self.latency_table is not None and self.latency_ratio is None:
            raise RecipeError("prune: latency_table is for latency_ratio; set that or leave the table out")
        if self.latency_precision != "fp32" and self.latency_ratio is None:
            raise RecipeError("prune: latency_precision is for latency_ratio; set that or leave it out")
        if self.norm != "l2" and self.importance != "magnitude":
            raise RecipeError(f"prune: norm is for importance magnitude, not {self.importance}; leave it out")
        if self.drop_blocks and self.latency_ratio is None:
            raise RecipeError(
                "prune: drop_blocks is for latency_ratio; set that, or write the pass drop_blocks before this one"
            )
        for name, ratio in {"pruning_ratio": self.pruning_ratio, **self.ratios}.items():
            if ratio is not None and ratio > self.max_ratio:
                raise RecipeError(
                    f"prune: {name} is {ratio:g}, more than max_ratio = {self.max_ratio:g}; "
                    "lower it or raise max_ratio"
                )
        if (self.steps > 1) != (self.tune is not None):
            raise RecipeError(
                f"prune: steps is {self.steps} and tune is {'set' if self.tune else 'not set'}; set both or none"
            )
        if self.steps > 1 and given[0] in {"params_ratio", "latency_ratio"}:
            raise RecipeError(
                f"prune: steps are for pruning_ratio and macs_ratio, not for {given[0]}; write a prune for each step, "
                "with distill or train between them"
            )
        if self.steps > 1 and self.ratios:
            raise RecipeError(
                "prune.ratios: do not go with steps; write a prune for each step in the recipe instead"
            )
        # So that a recipe without data is refused before any work is done.
        object.__setattr__(
            self,
            "needs_data",
            self.importance not in _OF_WEIGHTS or self.steps > 1 or self.sensitivity or self.drop_blocks,
        )
        object.__setattr__(self, "timing_decides", self.latency_ratio is not None)

    def check_target(self, target: str) -> None:
        """Refuse precisions that nobody deploys there."""
        targets.check_half(self.latency_precision, target, "prune.latency_precision")

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Prune ``source``; widths, MACs and what was left alone are recorded under "pruning".

        Raises:
            PassRequirementError: nothing can be pruned, a name is unknown, or the goal cannot be reached.
            PreprocessingError: the model was made for images prepared otherwise.
        """
        import torch

        from deploycnn.models.artifact import load_model, save_model
        from deploycnn.models.drafting import image_shape
        from deploycnn.models.macs import count_macs, count_params
        from deploycnn.pruning import zeros
        from deploycnn.pruning.charts import width_table
        from deploycnn.pruning.control_flow import check_control_flow
        from deploycnn.pruning.criteria import criterion
        from deploycnn.pruning.structure import check_modules
        from deploycnn.pruning.verification import check_exported, check_stored
        from deploycnn.training.determinism import deterministic

        if ctx.data is not None:
            ctx.data.preprocessing.check_same(source.facts.preprocessing, "prune")
        zeros.refuse_fours(ctx.lineage, "prune")
        wanted = criterion(self.importance, norm=self.norm, images=self.importance_images, ctx=ctx)
        shape = image_shape(source, ctx, "prune")
        model = load_model(source.path)
        images = torch.randn((2, *shape), generator=torch.Generator().manual_seed(ctx.seed))
        with deterministic(threads=ctx.threads, device=ctx.device):
            if self.latency_ratio is not None:
                # Before anything is exported, timed or ranked for the goal's sake, which takes minutes.
                check_modules(model, self.protect, "prune.protect")
                check_control_flow(model, images, "prune")
            goal = self._goal(model, images, ctx)
            tables = [_sensitivity(model, images, wanted, self.protect, ctx)] if self.sensitivity else []
            model, record = self._cut(model, images, wanted, goal, source, ctx)
            save_model(model, ctx.output)
            check_stored(model, images, ctx.output)
            ctx.progress(0, 1, "comparing with the ONNX graph")
            parity = check_exported(model, images, source.path, threads=ctx.threads, log=ctx.log)
        ctx.log.info(
            "pruned to %.1f%% of the MACs, %d groups of layers left alone",
            100 * record["macs_ratio"],
            len(record["protected"]),
        )
        if goal.latency is not None:
            level = logging.INFO if record["latency"]["met"] else logging.WARNING
            ctx.log.log(level, "latency_ratio: %s", record["latency"]["words"])
        facts = dataclasses.replace(
            source.facts,
            params=count_params(model),
            macs=count_macs(model, shape),
            size_bytes=(ctx.output / MAIN_FILE["torch"]).stat().st_size,
            record={
                "pruning": self._options() | record | {"exported": parity},
                "tables": [
                    *(table.to_json() for table in (width_table(record["widths"]), *tables)),
                    *(goal.latency.tables() if goal.latency is not None else ()),
                ],
            },
        )
        return Draft(format="torch", inputs=source.inputs, outputs=source.outputs, facts=facts)

    def _cut(
        self,
        model: torch.nn.Module,
        images: torch.Tensor,
        wanted: Criterion,
        goal: Goal,
        source: Artifact,
        ctx: Context,
    ) -> tuple[torch.nn.Module, dict[str, Json]]:
        """The pruned model and its record, in one cut or in several with training between them."""
        from deploycnn.pruning.pruner import prune
        from deploycnn.pruning.schedule import prune_in_steps
        from deploycnn.pruning.verification import check_exported

        if self.tune is None:
            return model, prune(model, images, wanted, goal, seed=ctx.seed)

        def tune(cut: torch.nn.Module, step: int) -> Json:
            # Before minutes of training are spent on it.
            check_exported(cut, images, source.path, threads=ctx.threads, log=ctx.log)
            return _tune(cut, step, self.tune, ctx)

        return prune_in_steps(
            model, images, wanted, goal, steps=self.steps, tune=tune, scratch=ctx.scratch, seed=ctx.seed
        )

    def _goal(self, model: torch.nn.Module, images: torch.Tensor, ctx: Context) -> Goal:
        from deploycnn.pruning.pruner import Goal

        return Goal(
            pruning_ratio=self.pruning_ratio,
            macs_ratio=self.macs_ratio,
            params_ratio=self.params_ratio,
            latency=self._latency(model, images, ctx),
            scope=self.scope,
            round_to=self.round_to,
            max_ratio=self.max_ratio,
            protect=self.protect,
            ratios=self.ratios,
        )

    def _latency(self, model: torch.nn.Module, images: torch.Tensor, ctx: Context) -> LatencyGoal | None:
        """The goal of latency, with what measures it here or the table that was measured elsewhere."""
        if self.latency_ratio is None:
            return None
        from deploycnn.latency.goal import latency_goal
        from deploycnn.pruning.dropping import ranked_blocks

        model.eval()
        goal = latency_goal(
            model,
            images,
            ratio=self.latency_ratio,
            precision=self.latency_precision,
            table=self.latency_table,
            ctx=ctx,
        )
        if self.drop_blocks:
            goal.dropping = ranked_blocks(
                model, images, protect=self.protect, ratios=self.ratios, limit=self.importance_images, ctx=ctx
            )
        return goal

    def _options(self) -> dict[str, Json]:
        """What was asked for."""
        options: dict[str, Json] = {
            "importance": self.importance,
            "scope": self.scope,
        }
        if self.importance == "magnitude":
            options["norm"] = self.norm
        asked = {name: getattr(self, name) for name in _GOALS}
        return options | {"asked": {name: ratio for name, ratio in asked.items() if ratio is not None}}


def _sensitivity(
    model: torch.nn.Module, images: torch.Tensor, ranked: Criterion, protect: tuple[str, ...], ctx: Context
) -> Table:
    """On at most 512 images of val; none of it decides what is cut."""
    from deploycnn.pruning.charts import sensitivity
    from deploycnn.training import artifact
    from deploycnn.training.device import model_home, model_to
    from deploycnn.training.evaluate import evaluate

    data = artifact.needed_data(ctx, "prune.sensitivity")

    def top1(scored: torch.nn.Module) -> float:
        model_to(scored, ctx.device)
        try:
            return evaluate(
                scored, data.dataset.val, data.preprocessing, batch_size=64, device=ctx.device, limit=512
            ).top1
        finally:
            model_home(scored)

    return sensitivity(
        model,
        images,
        ranked,
        top1,
        protect=protect,
        seed=ctx.seed,
        progress=lambda done, total: ctx.progress(done, total, "sensitivity"),
    )


def _tune(model: torch.nn.Module, step: int, settings: TrainingSettings | None, ctx: Context) -> Json:
    """Train after the cut of that number; what it was like, without the epochs' details."""
    from deploycnn.pruning import zeros
    from deploycnn.training import artifact
    from deploycnn.training.loop import fit
    from deploycnn.training.losses import CrossEntropy

    data = artifact.needed_data(ctx, "prune.tune")
    if settings is None:
        raise TypeError("called with settings only")
    scratch = ctx.scratch / f"tune-{step}"
    scratch.mkdir(exist_ok=True)
    zeros.keep_zeros(model, zeros.meant(ctx.lineage))
    # Another seed for each, so that no tuning sees the augmentations of the one before.
    part = dataclasses.replace(ctx, scratch=scratch, seed=ctx.seed + step)
    history = fit(
        model, data, settings, loss=CrossEntropy(label_smoothing=settings.label_smoothing), ctx=part
    )
    return {
        "epochs": len(history.epochs),
        "val_top1_before": history.initial_val_top1,
        "val_top1_after": history.kept_val_top1,
    }
