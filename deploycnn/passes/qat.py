"""Fine-tune a quantized graph until it agrees with its float graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Interval

from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Format, Pass
from deploycnn.errors import PassRequirementError
from deploycnn.quantization.qat_settings import QatSettings

if TYPE_CHECKING:
    from torch import nn

    from deploycnn.quantization.packs import RulePack

#: Images on which the trained graph and onnxruntime are compared.
_PARITY_IMAGES = 512

_FLOAT = frozenset({"fp32", "fp16", "bf16"})


@dataclass(frozen=True, kw_only=True)
class Qat(QatSettings, Pass):
    """Quantization-aware training of exactly the graph that is deployed, taught by the float graph it came from.

    Put it behind ``int8``. Weights and scales (unless `learn_scales: false`) change; nodes do not. LSQ: Esser et al.
    2020. The teacher's term is that of ``distill``.
    """

    consumes: ClassVar[Format | None] = "onnx"
    produces: ClassVar[Format] = "onnx"
    version: ClassVar[int] = 11
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    teacher: Annotated[
        str | None, "Variant whose last torch model teaches; null: the float ONNX model that was quantized."
    ] = None
    min_agreement: Annotated[
        float,
        Interval(ge=0, le=1),
        "Share of logits that must lie within one output step of onnxruntime's; less is an error.",
    ] = 0.999

    def references(self) -> tuple[str, ...]:
        """The teacher's variant, where one is named."""
        return (self.teacher,) if self.teacher is not None else ()

    def check_precision(self, precision: str) -> None:
        """Refuse what is not quantized."""
        if precision in _FLOAT:
            raise PassRequirementError(f"qat: the model is {precision}, not quantized; put int8 before it")

    def requires(self, source: Artifact) -> None:
        """Refuse what ``int8`` returned in float, too."""
        if source.facts.precision in _FLOAT and "int8" in source.facts.record:
            raise PassRequirementError(
                f"qat: the model is {source.facts.precision}, as int8 left all of it float "
                f"({source.facts.record['int8']['do_no_harm']}); leave qat out, or say int8: {{do_no_harm: false}}"
            )
        super().requires(source)

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Write ``model.onnx``; the history is recorded under "training", the rest under "qat".

        Raises:
            PassRequirementError: no float ONNX model is in the chain, the bridge lacks an operator, or model or
                teacher do not fit the data.
            PreprocessingError: the model was made for images prepared otherwise.
            TrainingError: the loss or a scale became useless.
            ParityError: onnxruntime does not compute what was trained.
        """
        from deploycnn.graph.metadata import get_metadata, set_metadata
        from deploycnn.graph.model import check_onnx, load_onnx, runtime_inputs, save_onnx, tensor_specs
        from deploycnn.quantization.preparation import prepare
        from deploycnn.quantization.qat import fine_tune
        from deploycnn.training.artifact import needed_data, val_top1
        from deploycnn.training.losses import Distillation

        data = needed_data(ctx, "qat")
        data.preprocessing.check_same(source.facts.preprocessing, "qat")
        original = _float_ancestor(ctx)
        full = load_onnx(original.path)
        teacher, name = self._teacher(ctx)
        teacher_top1 = val_top1(teacher, data, self.batch_size, ctx)
        loss = Distillation(
            teacher=teacher,
            method=self.method,
            **self.weights,
            label_smoothing=self.label_smoothing,
        )
        quantized = load_onnx(source.path)
        tuned = fine_tune(
            quantized,
            prepare(full, _rules(source)),
            data,
            self,
            loss=loss,
            ctx=ctx,
            learn_scales=self.learn_scales,
            parity_count=_PARITY_IMAGES,
            min_agreement=self.min_agreement,
        )
        set_metadata(tuned.model, get_metadata(quantized))
        path = ctx.output / MAIN_FILE["onnx"]
        check_onnx(tuned.model, "qat: the trained graph")
        save_onnx(tuned.model, path)
        record = {
            **source.facts.record,
            "training": tuned.history.to_json(),
            "teacher": {"name": name, "val_top1": teacher_top1},
            "qat": tuned.to_json(),
        }
        return Draft(
            format="onnx",
            inputs=tensor_specs(runtime_inputs(tuned.model)),
            outputs=tensor_specs(tuned.model.graph.output),
            facts=replace(source.facts, size_bytes=path.stat().st_size, record=record),
        )

    def _teacher(self, ctx: Context) -> tuple[nn.Module, str]:
        """The teacher, frozen, where it is computed, and what it is called."""
        from deploycnn.graph.model import load_onnx
        from deploycnn.training import artifact
        from deploycnn.training.device import model_to
        from deploycnn.training.teacher import graph_teacher

        if self.teacher is None:
            return graph_teacher(load_onnx(_float_ancestor(ctx).path), ctx), "the float model"
        found = ctx.references[self.teacher]
        model = artifact.load_checked(
            found.path, found.facts, artifact.needed_data(ctx, "qat"), f"qat: the teacher {self.teacher}"
        )
        return model_to(model.requires_grad_(False), ctx.device), self.teacher


def _rules(source: Artifact) -> RulePack | None:
    """The rules by which ``int8`` made it: its rewrites of the float graph change weights; ``None`` if another did."""
    from deploycnn.quantization import packs

    made = source.facts.record.get("int8")
    return None if made is None else replace(packs.get(made["target"]), rewrites=tuple(made["rewrites"]))


def _float_ancestor(ctx: Context) -> Artifact:
    """The float ONNX model that the input was quantized from.

    Raises:
        PassRequirementError: there is none.
    """
    for artifact in reversed(ctx.lineage):
        if artifact.format == "onnx" and artifact.facts.precision == "fp32":
            return artifact
    raise PassRequirementError(
        "qat: no float ONNX model stands before it in its variant; begin the variant with one and quantize it here"
    )
