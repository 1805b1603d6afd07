"""Remove whole residual blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt

from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Format, Pass, Table
from deploycnn.errors import PassRequirementError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploycnn.pruning.blocks import Missed

#: Images per forward pass while blocks are ranked.
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class DropBlocks(Pass):
    """Replace residual blocks by their shortcuts: those without which the loss on training images rises least.

    Fewer layers make a model faster where narrower ones do not. `prune` may follow, `distill` or `train` should.
    """

    consumes: ClassVar[Format] = "torch"
    produces: ClassVar[Format] = "torch"
    version: ClassVar[int] = 2
    main: ClassVar[str | None] = "count"

    count: Annotated[
        Annotated[int, Ge(1)] | None, "How many to drop, one after the other, ranked anew after each."
    ] = None
    names: Annotated[tuple[str, ...], "Which to drop, in place of `count`."] = ()
    protect: Annotated[tuple[str, ...], "Names of modules in which no block is dropped, with `count`."] = ()
    importance_images: Annotated[int, Gt(0), "Training images on which blocks are ranked."] = 256

    def __post_init__(self) -> None:
        if (self.count is None) == (not self.names):
            raise RecipeError("drop_blocks: set exactly one of count and names")
        if self.names and self.protect:
            raise RecipeError("drop_blocks.protect: goes with count; leave those out of names instead")
        object.__setattr__(self, "needs_data", self.count is not None)

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Write the shallower model; what was dropped is recorded under "blocks".

        Raises:
            PassRequirementError: there are fewer blocks than asked for, a name is unknown or no block, or images are
                missing.
            PreprocessingError: the model was made for images prepared otherwise.
        """
        import torch

        from deploycnn.models.artifact import load_model, save_model
        from deploycnn.models.delta import drop
        from deploycnn.models.drafting import image_shape
        from deploycnn.models.macs import count_macs, count_params
        from deploycnn.pruning.blocks import check_names, droppable
        from deploycnn.pruning.structure import check_modules, is_inside, shrunk
        from deploycnn.training.determinism import deterministic

        if ctx.data is not None:
            ctx.data.preprocessing.check_same(source.facts.preprocessing, "drop_blocks")
        model = load_model(source.path)
        check_modules(model, self.protect, "drop_blocks.protect")
        shape = image_shape(source, ctx, "drop_blocks")
        images = torch.randn((2, *shape), generator=torch.Generator().manual_seed(ctx.seed))
        before = count_macs(model, shape)
        with deterministic(threads=ctx.threads, device=ctx.device):
            candidates = tuple(
                name
                for name in droppable(model, shrunk(model, images))
                if not any(is_inside(name, kept) for kept in self.protect)
            )
            if self.count is None:
                check_names(model, candidates, self.names)
                drop(model, self.names)
                ranked: list[Missed] = []
            else:
                ranked = self._ranked(model, candidates, self.count, ctx)
        save_model(model, ctx.output)
        gone = list(self.names) or [block.name for block in ranked if block.dropped]
        after = count_macs(model, shape)
        ctx.log.info("dropped %s: %.1f%% of the MACs are left", ", ".join(gone), 100 * after / before)
        record = {
            "blocks": {
                "dropped": gone,
                "candidates": list(candidates),
                "macs_before": before,
                "macs_after": after,
                "macs_ratio": after / before,
            },
            "tables": [_table(ranked).to_json()] if ranked else [],
        }
        facts = dataclasses.replace(
            source.facts,
            params=count_params(model),
            macs=after,
            size_bytes=(ctx.output / MAIN_FILE["torch"]).stat().st_size,
            record=record,
        )
        return Draft(format="torch", inputs=source.inputs, outputs=source.outputs, facts=facts)

    def _ranked(
        self, model: nn.Module, candidates: tuple[str, ...], count: int, ctx: Context
    ) -> list[Missed]:
        from deploycnn.data.calibration import calibration_indices
        from deploycnn.pruning.blocks import rank_and_drop
        from deploycnn.pruning.criteria import training_images

        if count > len(candidates):
            raise PassRequirementError(
                f"drop_blocks.count: {count}, but the model has {len(candidates)} residual blocks with an identity "
                "shortcut that may go; ask for fewer, or prune channels"
            )
        if ctx.data is None:
            raise PassRequirementError(
                "drop_blocks: ranking blocks needs images, but the recipe has no `data`; add it or give `names`"
            )
        data = ctx.data
        indices = calibration_indices(data.dataset.train.labels, self.importance_images, ctx.seed)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            return training_images(data, indices, ctx, _BATCH)

        model.to(ctx.device)
        try:
            return rank_and_drop(
                model,
                candidates,
                count,
                batches,
                progress=lambda done, total: ctx.progress(done, total, "ranking blocks"),
            )
        finally:
            model.cpu()


def _table(ranked: list[Missed]) -> Table:
    rows = tuple((block.name, block.loss_increase, block.dropped) for block in ranked)
    return Table(
        title="Residual blocks",
        columns=("block", "rise of the training loss without it and those before it", "dropped"),
        rows=rows,
    )
