"""Set weights to zero, singly or two of each four."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Gt, Lt

from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Format, Json, Pass, Table
from deploycnn.errors import PassRequirementError, RecipeError
from deploycnn.training.settings import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Share of a gradual training after which the last weight is gone; the rest is for recovery.
_RAMP = 0.75

_NO_GAIN = (
    "zeros at any place bring no speed-up: onnxruntime, OpenVINO and TensorRT multiply by them as by other weights; "
    "only the compressed file is smaller"
)


@dataclass(frozen=True, kw_only=True)
class Sparse(Pass):
    """Set the smallest weights to zero, anywhere or two of each four input channels (2:4, for sparse tensor cores).

    `train`, `distill`, `sparsify` and `qat` that follow keep the zeros. Only 2:4 can make a model faster, on NVIDIA
    GPUs since Ampere and with `build_engine: {sparse_weights: true}`; the report says which layers can profit.
    """

    consumes: ClassVar[Format] = "torch"
    produces: ClassVar[Format] = "torch"
    version: ClassVar[int] = 3
    main: ClassVar[str | None] = "pattern"

    pattern: Annotated[Literal["unstructured", "2:4"], "Zeros anywhere, or two of each four."]
    sparsity: Annotated[
        Annotated[float, Gt(0), Lt(1)] | None, "Share of zeros; for `unstructured` only, 2:4 has one half."
    ] = None
    scope: Annotated[
        Literal["layer", "global"], "Unstructured: this share of every layer, or of the whole model."
    ] = "global"
    gradual: Annotated[
        TrainingSettings | None,
        "Train meanwhile (options as of `train`; the last epoch is kept): zeros grow over 3/4 of it, fast at first. "
        "null: all at once.",
    ] = None
    permute: Annotated[bool, "2:4: reorder channels first, so that fewer large weights are lost."] = True
    gpu: Annotated[str | None, "2:4: GPU to forecast for, by name (A100) or compute capability (8.6)."] = None
    protect: Annotated[tuple[str, ...], "Names of layers or modules that get no zeros."] = ()

    def __post_init__(self) -> None:
        if (self.pattern == "unstructured") != (self.sparsity is not None):
            need = "is needed for" if self.sparsity is None else "does not go with"
            raise RecipeError(f"sparse.sparsity: {need} pattern {self.pattern}")
        if self.pattern == "2:4" and self.gradual is not None:
            raise RecipeError(
                "sparse.gradual: goes with pattern unstructured; 2:4 is made at once, `train` recovers"
            )
        if self.gradual is not None and (self.gradual.max_minutes or self.gradual.early_stopping_patience):
            raise RecipeError(
                "sparse.gradual: zeros grow by a schedule over all `epochs`, so it cannot end sooner; leave "
                "max_minutes and early_stopping_patience out"
            )
        if self.pattern == "unstructured" and not self.permute:
            raise RecipeError("sparse.permute: channels are reordered for pattern 2:4 only; leave it out")
        if self.pattern == "2:4" and self.scope != "global":
            raise RecipeError(
                "sparse.scope: goes with pattern unstructured; 2:4 is the same share everywhere"
            )
        if self.pattern == "unstructured" and self.gpu is not None:
            raise RecipeError("sparse.gpu: the forecast is for pattern 2:4; leave it out")
        object.__setattr__(self, "needs_data", self.gradual is not None)

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Write the model with zeros; what was done is recorded under "sparsity".

        Raises:
            PassRequirementError: a name or GPU is unknown, no layer can be 2:4, or images are needed and missing.
            PreprocessingError: the model was made for images prepared otherwise.
            TrainingError: the gradual training diverged.
        """
        from deploycnn.models.artifact import load_model, save_model
        from deploycnn.pruning import sparsity
        from deploycnn.training import artifact

        facts = source.facts
        if self.gradual is not None:
            data = artifact.needed_data(ctx, "sparse")
            model = artifact.load_checked(source.path, facts, data, "sparse: the model")
            facts = dataclasses.replace(
                facts, preprocessing=data.preprocessing.to_json(), classes=data.dataset.classes
            )
        else:
            if ctx.data is not None:
                ctx.data.preprocessing.check_same(facts.preprocessing, "sparse")
            model = load_model(source.path)
        layers = sparsity.weighty(model, self.protect)
        record: dict[str, Json] = {}
        if self.pattern == "2:4":
            done, tables = self._two_four(model, layers, source, ctx)
        else:
            done, tables = self._unstructured(model, layers, ctx, record)
        save_model(model, ctx.output)
        found = dataclasses.asdict(self) | {
            "gradual": self.gradual is not None,
            "protect": list(self.protect),
        }
        record["sparsity"] = (
            found
            | {
                "layers": list(done["layers"]),
                "zeros_ratio": sparsity.zeros_ratio({name: layers[name] for name in done["layers"]}),
            }
            | done
        )
        record["tables"] = [table.to_json() for table in tables]
        ctx.log.info(
            "%.1f%% of the weights of %d layers are zero",
            100 * record["sparsity"]["zeros_ratio"],
            len(done["layers"]),
        )
        facts = dataclasses.replace(
            facts, size_bytes=(ctx.output / MAIN_FILE["torch"]).stat().st_size, record=record
        )
        return Draft(format="torch", inputs=source.inputs, outputs=source.outputs, facts=facts)

    def _unstructured(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        ctx: Context,
        record: dict[str, Json],
    ) -> tuple[dict[str, Any], list[Table]]:
        from deploycnn.pruning import sparsity

        if self.sparsity is None:
            raise TypeError("checked when it was made")
        if self.gradual is None:
            sparsity.apply(layers, sparsity.magnitude_masks(layers, self.sparsity, self.scope))
        else:
            record["training"] = self._train(model, tuple(layers), ctx)
        ctx.log.warning("sparse: %s", _NO_GAIN)
        return {"layers": tuple(layers), "speed_up": _NO_GAIN}, [_zeros_table(layers)]

    def _train(self, model: nn.Module, names: tuple[str, ...], ctx: Context) -> Json:
        from deploycnn.pruning import sparsity
        from deploycnn.training import artifact, feed
        from deploycnn.training.loop import fit
        from deploycnn.training.losses import CrossEntropy

        if self.gradual is None or self.sparsity is None:
            raise TypeError("called for gradual training only")
        data = artifact.needed_data(ctx, "sparse")
        # An earlier epoch is better on val because it has fewer zeros.
        settings = dataclasses.replace(self.gradual, keep="last")
        steps = settings.epochs * feed.count_steps(len(data.dataset.train), settings.batch_size)
        loss = CrossEntropy(label_smoothing=settings.label_smoothing)
        with sparsity.gradually(
            model, names, sparsity=self.sparsity, scope=self.scope, steps=max(1, round(_RAMP * steps))
        ):
            return fit(model, data, settings, loss=loss, ctx=ctx).to_json()

    def _two_four(
        self, model: nn.Module, layers: Mapping[str, nn.Module], source: Artifact, ctx: Context
    ) -> tuple[dict[str, Any], list[Table]]:
        import torch

        from deploycnn.models.drafting import image_shape
        from deploycnn.models.macs import count_macs
        from deploycnn.pruning import sparsity
        from deploycnn.pruning.costs import macs_by_layer
        from deploycnn.pruning.sparse_forecast import forecast

        shape = image_shape(source, ctx, "sparse")
        images = torch.randn((2, *shape), generator=torch.Generator().manual_seed(ctx.seed))
        able = {name: layer for name, layer in layers.items() if sparsity.why_not_two_four(layer) is None}
        if not able:
            reasons = {sparsity.why_not_two_four(layer) for layer in layers.values()}
            raise PassRequirementError(
                f"sparse: no layer can be 2:4: {'; '.join(sorted(filter(None, reasons)))}"
            )
        done: dict[str, Any] = {"layers": tuple(able)}
        tables = []
        if self.gpu is not None:
            told = forecast(layers, macs_by_layer(model, images), count_macs(model, shape), self.gpu)
            (ctx.log.info if told.macs_ratio else ctx.log.warning)("sparse: %s", told.sentence())
            done |= {"speed_up": told.sentence(), "speed_up_bound": told.bound}
            tables.append(told.table())
        else:
            done["speed_up"] = (
                "2:4 weights bring no speed-up on CPUs; on NVIDIA GPUs since Ampere they can: name one as `gpu`"
            )
        if self.permute:
            done["permutation"] = _permute(model, images, able, ctx)
        sparsity.apply(
            able, {name: sparsity.two_four_mask(sparsity.weight_of(layer)) for name, layer in able.items()}
        )
        return done, [*tables, _zeros_table(layers)]


def _permute(model: nn.Module, images: torch.Tensor, names: Collection[str], ctx: Context) -> Json:
    """Reorder channels for the layers that will be 2:4; what the model computes must stay.

    Raises:
        RuntimeError: it does not: an error of ours.
    """
    import copy

    import torch

    from deploycnn.pruning.permutation import permute_group
    from deploycnn.pruning.structure import analyse, shrunk

    trial = shrunk(model, images)
    structure = analyse(model, trial, seed=ctx.seed, where="sparse.permute")
    before_after = []
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(trial.double())
        for index, group in enumerate(structure.groups):
            ctx.progress(index, len(structure.groups), "permuting channels")
            found = permute_group(model, group, names, seed=ctx.seed)
            before_after += [found] if found is not None else []
        got = copy.deepcopy(model).double()(trial.double())
    if float((got - expected).abs().max()) > 1e-9 * float(expected.abs().max()):
        raise RuntimeError("reordering channels changed what the model computes")
    before, after = (sum(pair[i] for pair in before_after) for i in (0, 1))
    gain = after / before - 1 if before else 0.0
    ctx.log.info(
        "permuted %d groups: 2:4 keeps %.2f%% more magnitude of what reads them",
        len(before_after),
        100 * gain,
    )
    return {"groups": len(before_after), "kept_magnitude_gain_ratio": gain}


def _zeros_table(layers: Mapping[str, nn.Module]) -> Table:
    from deploycnn.pruning import sparsity

    rows = tuple(
        (name, sparsity.weight_of(layer).numel(), sparsity.zeros_ratio({name: layer}))
        for name, layer in layers.items()
    )
    return Table(title="Zeros by layer", columns=("layer", "weights", "share of zeros"), rows=rows)
