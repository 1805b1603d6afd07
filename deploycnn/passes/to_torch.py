"""ONNX to PyTorch, to be trained and pruned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt

from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Format, Pass, TensorSpec
from deploycnn.errors import PassRequirementError

if TYPE_CHECKING:
    from torch import fx

    from deploycnn.graph.parity import Parity


@dataclass(frozen=True, kw_only=True)
class ToTorch(Pass):
    """Turn an ONNX classifier from anywhere into a PyTorch model that `train`, `prune` and `distill` take.

    Checked against onnxruntime on real images. A Softmax that ends the graph is left out, because training
    wants logits.
    """

    consumes: ClassVar[Format | None] = "onnx"
    produces: ClassVar[Format] = "torch"

    absolute_tolerance: Annotated[float, Gt(0), "Largest error of an output that is always accepted."] = 1e-4
    relative_tolerance: Annotated[
        float,
        Ge(0),
        "Largest error of an output as a share of the image's largest, added to the absolute one.",
    ] = 1e-4
    parity_images: Annotated[int, Ge(1), "Images on which both are compared."] = 16

    def check_precision(self, precision: str) -> None:
        """Refuse what is not FP32."""
        if precision != "fp32":
            raise PassRequirementError(
                f"to_torch: the model is {precision}; training wants fp32, so give the float32 model"
            )

    def requires(self, source: Artifact) -> None:
        """Refuse what is not FP32 or not one batch of images."""
        super().requires(source)
        if len(source.inputs) != 1 or len(source.inputs[0].shape) != 4:
            raise PassRequirementError(
                f"to_torch: the model must take one batch of images (N, C, H, W), it takes {source.inputs}"
            )

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Write ``model.safetensors`` and ``architecture.json``.

        Raises:
            PassRequirementError: the bridge lacks an operator of the model, or it returns no logits.
            ParityError: the module does not compute what the graph computes.
            PreprocessingError: the model was made for images prepared otherwise.
        """
        import torch

        from deploycnn.graph.bridge import to_torch
        from deploycnn.graph.bridge.skeleton import skeleton
        from deploycnn.graph.bridge.tail import drop_final_softmax
        from deploycnn.graph.model import load_onnx, runtime_inputs
        from deploycnn.models.artifact import architecture, save_model, set_architecture
        from deploycnn.models.drafting import INPUT_NAME, OUTPUT_NAME, image_shape
        from deploycnn.models.macs import count_params, run_counted

        preprocessing = source.facts.preprocessing
        if ctx.data is not None:
            ctx.data.preprocessing.check_same(preprocessing, "to_torch")
            preprocessing = ctx.data.preprocessing.to_json()
        shape = image_shape(source, ctx, "to_torch")
        torch.set_num_threads(ctx.threads)
        model = load_onnx(source.path)
        (value,) = runtime_inputs(model)
        softmax = drop_final_softmax(model)
        ctx.progress(0, 2, "importing")
        bridge = to_torch(model)
        logits, macs = run_counted(bridge.module, shape)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            found = list(logits.shape) if isinstance(logits, torch.Tensor) else "several outputs"
            raise PassRequirementError(
                f"to_torch: the model must return one tensor of logits (N, classes); for one image it returns {found}"
            )
        ctx.progress(1, 2, "comparing with onnxruntime")
        batch = value.type.tensor_type.shape.dim[0]
        fixed = batch.dim_value if batch.HasField("dim_value") else None
        parity = self._parity(source, bridge.module, shape, fixed, softmax, ctx)
        options = {"graph": skeleton(bridge), "in_channels": shape[0]}
        described = architecture("onnx", options, int(logits.shape[1]))
        set_architecture(bridge.module, described)
        save_model(bridge.module, ctx.output, described)
        ctx.progress(2, 2, "imported")
        record = {"leaves": len(bridge.module_of), "final_softmax_dropped": softmax}
        return Draft(
            format="torch",
            inputs=(TensorSpec(name=INPUT_NAME, dtype="float32", shape=(None, *shape)),),
            outputs=(TensorSpec(name=OUTPUT_NAME, dtype="float32", shape=(None, int(logits.shape[1]))),),
            facts=replace(
                source.facts,
                params=count_params(bridge.module),
                macs=macs,
                size_bytes=(ctx.output / MAIN_FILE["torch"]).stat().st_size,
                preprocessing=preprocessing,
                classes=source.facts.classes or (ctx.data.dataset.classes if ctx.data is not None else ()),
                record={"parity": parity.to_json(), "to_torch": record},
            ),
        )

    def _parity(
        self,
        source: Artifact,
        module: fx.GraphModule,
        shape: tuple[int, int, int],
        fixed_batch: int | None,
        softmax: bool,
        ctx: Context,
    ) -> Parity:
        from torch import nn

        from deploycnn.graph.parity import Tolerance, evaluator, measure_parity, module_evaluator
        from deploycnn.graph.probe import parity_images

        images, images_source = parity_images(ctx.data, shape, self.parity_images, ctx.seed)
        size = fixed_batch or 1
        parity = measure_parity(
            evaluator(source.path, threads=ctx.threads),
            module_evaluator(nn.Sequential(module, nn.Softmax(dim=1)).eval() if softmax else module),
            images[: max(len(images) // size, 1) * size],
            batch_sizes=(1, 5) if fixed_batch is None else (fixed_batch,),
            tolerance=Tolerance(absolute=self.absolute_tolerance, relative=self.relative_tolerance),
            source=images_source,
            against="fp32 onnx",
        )
        ctx.log.info("parity: largest error %.3g on %d %s", parity.max_abs_error, len(images), images_source)
        parity.check("to_torch: the PyTorch model")
        return parity
