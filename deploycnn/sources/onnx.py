"""An ONNX file as it is: ``source: {onnx: model.onnx}``."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from deploycnn.core import MAIN_FILE, Context, Draft, Facts, Format, Json, Source, TensorSpec
from deploycnn.errors import SourceError
from deploycnn.files import sha256_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Onnx(Source):
    """An ONNX model from anywhere: opset 9 or newer, static or dynamic batch, weights inside or beside it.

    The file is copied byte for byte; weights in files beside it are put inside. Nothing outside the model's
    folder is read.
    """

    main: ClassVar[str] = "path"
    produces: ClassVar[Format] = "onnx"

    path: Annotated[Path, "The .onnx file."]

    @classmethod
    def build(cls, options: Mapping[str, Any], _num_classes: int | None) -> nn.Module:
        """The base architecture of a torch artifact that the pass `to_torch` made, all weights zero.

        Args:
            options: ``graph``: the graph without weights, by ``graph.bridge.skeleton``.

        Raises:
            ArtifactError: the graph is damaged.
        """
        from deploycnn.graph.bridge import to_torch
        from deploycnn.graph.bridge.skeleton import from_skeleton

        return to_torch(from_skeleton(options["graph"])).module

    def extra_identity(self) -> Json:
        """The files that hold the model's external data."""
        from deploycnn.models.onnx_import import external_files

        files = external_files(self.path)
        return [sha256_of(file) for file in files]

    def run(self, ctx: Context) -> Draft:
        """Check the file, copy it and describe it."""
        from deploycnn.graph.metadata import CLASSES, PREPROCESSING, get_metadata
        from deploycnn.graph.model import opset_of, save_onnx
        from deploycnn.models import onnx_import, onnx_macs

        model, external = onnx_import.read_foreign(self.path)
        inputs, outputs = onnx_macs.specs_of(model)
        self._check_specs(inputs, outputs, ctx)
        metadata = get_metadata(model)
        preprocessing = self._metadata(metadata, PREPROCESSING)
        classes = tuple(self._metadata(metadata, CLASSES) or ())
        image_shape = None
        if ctx.data is not None:
            if preprocessing is not None:
                ctx.data.preprocessing.check_same(preprocessing, f"onnx: {self.path}")
            if classes and classes != ctx.data.dataset.classes:
                raise SourceError(
                    f"onnx: {self.path}: made for the classes {', '.join(classes[:5])}, ..., the data have "
                    f"{', '.join(ctx.data.dataset.classes[:5])}, ...; use the data that it was made for"
                )
            preprocessing, classes = ctx.data.preprocessing.to_json(), ctx.data.dataset.classes
            image_shape = ctx.data.preprocessing.input_shape
        target = ctx.output / MAIN_FILE["onnx"]
        if external:
            save_onnx(model, target)
        else:
            shutil.copyfile(self.path, target)
        counts = onnx_macs.count_onnx(model, image_shape)
        return Draft(
            format="onnx",
            inputs=inputs,
            outputs=outputs,
            facts=Facts(
                params=counts.params,
                macs=counts.macs,
                size_bytes=sum(file.stat().st_size for file in ctx.output.iterdir()),
                preprocessing=preprocessing,
                classes=classes,
                precision=onnx_import.precision_of(model),
                record={
                    "file": self.path.name,
                    "producer": model.producer_name,
                    "opset": opset_of(model),
                },
            ),
        )

    def _check_specs(
        self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], ctx: Context
    ) -> None:
        """Check that the graph takes images of the data and returns as many logits as there are classes."""
        where = f"onnx: {self.path}"
        if len(inputs) != 1:
            names = ", ".join(spec.name for spec in inputs) or "none"
            raise SourceError(f"{where}: should have one input, the images; its inputs are: {names}")
        if not outputs:
            raise SourceError(f"{where}: has no outputs; export it again")
        if ctx.data is None:
            return
        wanted, given = ctx.data.preprocessing.input_shape, inputs[0].shape
        if len(given) != 4 or any(
            axis not in (None, size) for axis, size in zip(given[1:], wanted, strict=True)
        ):
            shape = "x".join("?" if axis is None else str(axis) for axis in given)
            raise SourceError(
                f"{where}: takes {shape} (N, C, H, W), but preprocessing gives {'x'.join(map(str, wanted))} "
                "images; set preprocessing.size and channels to the model's"
            )
        logits = outputs[0].shape
        if len(logits) == 2 and logits[1] not in (None, ctx.num_classes):
            raise SourceError(
                f"{where}: gives {logits[1]} logits, but the data have {ctx.num_classes} classes"
            )

    def _metadata(self, metadata: dict[str, str], key: str) -> Json:
        if key not in metadata:
            return None
        try:
            return json.loads(metadata[key])
        except ValueError as error:
            raise SourceError(
                f"onnx: {self.path}: its metadata {key} is damaged ({error}); export it again"
            ) from error
