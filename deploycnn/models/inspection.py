"""What a model is made of: one row per layer, for torch models and ONNX files alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploycnn.errors import SourceError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer, in the order of execution.

    Attributes:
        name: Its module's or node's name; functions in a module's own code are ``module:function``.
        kind: Module class or operator.
        input_shape: Shape of its first activation input for one image; empty where unknown.
        output_shape: Shape of its first output.
        params: Trained parameters first used here.
        macs: Multiply-accumulates; ``None`` where unknown.
        receptive_field: Height and width, in input pixels, that one output position sees; ``None`` where it
            is unknown.
        activation_bytes: Size of its outputs.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    params: int
    macs: int | None
    receptive_field: tuple[int, int] | None
    activation_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTable:
    """All layers of a model and their totals.

    Attributes:
        name: The file's name or the model's class.
        input_shape: (C, H, W) of the image that it was inspected with.
        params: Trained parameters of the whole model.
        macs: For one image; ``None`` where unknown.
        activation_bytes: Sum over all layers: what training has to keep.
        peak_activation_bytes: Largest input and output of one layer together: the least that inference needs.
    """

    name: str
    rows: tuple[LayerRow, ...]
    input_shape: tuple[int, ...]
    params: int
    macs: int | None
    activation_bytes: int
    peak_activation_bytes: int


def inspect_model(
    model: nn.Module | Path | str, input_shape: Sequence[int] | None = None, *, name: str | None = None
) -> ModelTable:
    """Inspect a torch model, a torch artifact (its folder or model.safetensors) or an ONNX file.

    Args:
        model: What to inspect.
        input_shape: (C, H, W); required for torch models, for ONNX only where the graph leaves it open.
        name: For people; the file's name or the model's class where not given.

    Raises:
        SourceError: the file is of another kind, or the image's shape has to be given.
        ArtifactError: the file is missing or damaged.
    """
    if not isinstance(model, Path | str):
        from deploycnn.models.inspect_torch import inspect_torch

        if input_shape is None:
            raise SourceError("give the image's shape (channels, height, width) to inspect a torch model")
        return inspect_torch(model, input_shape, name or type(model).__name__)
    path = Path(model)
    if path.suffix == ".onnx":
        from deploycnn.models.inspect_onnx import inspect_onnx

        return inspect_onnx(path, input_shape, name or path.name)
    if path.is_dir() and (path / "model.onnx").is_file():
        return inspect_model(path / "model.onnx", input_shape, name=name or path.name)
    if path.is_dir() and (path / "variants").is_dir():
        made = ", ".join(str(item) for item in sorted((path / "variants").iterdir()))
        raise SourceError(f"{path}: a run directory; name one of its variants: {made or 'it has none yet'}")
    if path.is_dir() or path.suffix == ".safetensors":
        from deploycnn.models.artifact import load_model

        return inspect_model(load_model(path), input_shape or _stored_shape(path), name=name or path.name)
    if not path.exists():
        raise SourceError(f"{path}: no such file; name an .onnx file, an artifact's folder, or source:name")
    raise SourceError(
        f"{path}: inspect takes .onnx files and torch artifacts; for a checkpoint, use a recipe that loads it"
    )


def _stored_shape(path: Path) -> tuple[int, ...] | None:
    """(C, H, W) from the manifest beside an artifact's weights, where there is one."""
    import json

    manifest = (path if path.is_dir() else path.parent) / "manifest.json"
    if not manifest.is_file():
        return None
    inputs = json.loads(manifest.read_text(encoding="utf-8")).get("inputs")
    return tuple(inputs[0]["shape"][1:]) if inputs else None


def total(
    name: str, rows: Sequence[LayerRow], input_shape: Sequence[int], peak: int, params: int
) -> ModelTable:
    """The table of ``rows``."""
    known = [row.macs for row in rows if row.macs is not None]
    return ModelTable(
        name=name,
        rows=tuple(rows),
        input_shape=tuple(input_shape),
        params=params,
        macs=sum(known) if len(known) == len(rows) else None,
        activation_bytes=sum(row.activation_bytes for row in rows),
        peak_activation_bytes=peak,
    )
