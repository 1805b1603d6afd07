"""PyTorch to ONNX."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Interval, MinLen

from deploycnn.core import MAIN_FILE, Artifact, Context, Draft, Format, Pass
from deploycnn.errors import PassRequirementError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Export(Pass):
    """Export to ONNX with a dynamic batch, batch norms folded, and checked against PyTorch on real images."""

    consumes: ClassVar[Format | None] = "torch"
    produces: ClassVar[Format] = "onnx"
    version: ClassVar[int] = 5

    opset: Annotated[
        int,
        Interval(ge=17, le=23),
        "Version of the ONNX operator set. 18 is the dynamo exporter's own, and all runtimes read it.",
    ] = 18
    absolute_tolerance: Annotated[
        float,
        Gt(0),
        "Largest error of a logit that is always accepted, where the largest logits are 1 or more; less below.",
    ] = 1e-4
    relative_tolerance: Annotated[
        float,
        Ge(0),
        "Largest error of a logit as a share of the image's largest logit, added to the absolute one.",
    ] = 1e-4
    parity_images: Annotated[int, Ge(1), "Images on which the graph is compared with PyTorch."] = 16
    parity_batch_sizes: Annotated[
        tuple[int, ...], MinLen(2), "Batch sizes at which it is compared; two at least, for the dynamic axis."
    ] = (1, 5)

    def precision_after(self, before: str | None) -> str | None:  # noqa: ARG002 - graphs are written in FP32
        """FP32."""
        return "fp32"

    def requires(self, source: Artifact) -> None:
        """Check what can be checked without loading the model."""
        if len(set(self.parity_batch_sizes)) < 2 or min(self.parity_batch_sizes) < 1:
            raise PassRequirementError(
                "export: parity_batch_sizes must hold two different positive sizes, "
                f"got {self.parity_batch_sizes}"
            )
        if len(source.inputs) != 1 or len(source.inputs[0].shape) != 4:
            raise PassRequirementError(
                f"export: the model must take one batch of images (N, C, H, W), it takes {source.inputs}"
            )

    def run(self, source: Artifact, ctx: Context) -> Draft:
        """Write ``model.onnx``.

        Raises:
            PassRequirementError: PyTorch cannot export the model; names the reason.
            ParityError: the graph does not compute what the model computes.
            PreprocessingError: the model was made for images prepared otherwise.
        """
        import torch

        from deploycnn.graph.export import export_onnx
        from deploycnn.graph.model import load_onnx, save_onnx, tensor_specs
        from deploycnn.graph.parity import Tolerance, evaluator, measure_parity, module_evaluator
        from deploycnn.graph.probe import parity_images
        from deploycnn.models.artifact import load_model
        from deploycnn.models.drafting import image_shape

        preprocessing = source.facts.preprocessing
        if ctx.data is not None:
            ctx.data.preprocessing.check_same(preprocessing, "export")
            preprocessing = ctx.data.preprocessing.to_json()
        classes = source.facts.classes or (ctx.data.dataset.classes if ctx.data is not None else ())
        torch.set_num_threads(ctx.threads)
        shape = image_shape(source, ctx, "export")
        model = load_model(source.path).cpu().eval()
        ctx.progress(0, 3, "exporting to ONNX")
        graph = export_onnx(model, shape, opset=self.opset, preprocessing=preprocessing, classes=classes)
        path = ctx.output / MAIN_FILE["onnx"]
        size = save_onnx(graph, path)
        ctx.progress(1, 3, "comparing with PyTorch")
        images, images_source = parity_images(ctx.data, shape, self.parity_images, ctx.seed)
        parity = measure_parity(
            module_evaluator(model),
            # What is written is what is checked.
            evaluator(path, threads=ctx.threads),
            images,
            batch_sizes=self.parity_batch_sizes,
            tolerance=Tolerance(absolute=self.absolute_tolerance, relative=self.relative_tolerance),
            source=images_source,
            against="pytorch",
        )
        if not parity.informative:
            ctx.log.warning("outputs hardly depend on the image: their equality to PyTorch's says little")
        ctx.log.info("parity: largest error %.3g on %d %s", parity.max_abs_error, len(images), images_source)
        parity.check("export: the ONNX graph")
        ctx.progress(3, 3, "exported")
        batchnorms = sum(node.op_type == "BatchNormalization" for node in graph.graph.node)
        return Draft(
            format="onnx",
            inputs=tensor_specs(graph.graph.input),
            outputs=tensor_specs(load_onnx(path).graph.output),
            facts=replace(
                source.facts,
                size_bytes=size,
                preprocessing=preprocessing,
                classes=tuple(classes),
                precision="fp32",
                record={
                    "parity": parity.to_json(),
                    "export": {
                        "opset": self.opset,
                        "nodes": len(graph.graph.node),
                        "batchnorms_left": batchnorms,
                    },
                },
            ),
        )
