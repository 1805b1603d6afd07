"""Save and load torch models as ``model.safetensors`` and ``architecture.json``; no pickle anywhere.

``architecture.json`` names the source that can build the base architecture, its options, and the delta that
turns the base into this model. Loading rebuilds the base, applies the delta and puts the stored tensors in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from deploycnn import registry
from deploycnn.core import MAIN_FILE, Json
from deploycnn.errors import ArtifactError
from deploycnn.models import delta as deltas

SCHEMA_VERSION = 1
ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = MAIN_FILE["torch"]

_KEYS = ("source", "options", "num_classes")


def architecture(source: str, options: Mapping[str, Json], num_classes: int | None) -> dict[str, Json]:
    """The description of a base architecture that :func:`save_model` takes.

    Args:
        source: Registry name of a source with ``build(options, num_classes)``.
        options: What that ``build`` needs, as plain JSON values.
        num_classes: Outputs of the classifier; ``None`` leaves it to the source.
    """
    return {"source": source, "options": dict(options), "num_classes": num_classes}


def get_architecture(model: nn.Module) -> dict[str, Json]:
    """The architecture that a loaded or freshly built model carries along.

    Raises:
        ArtifactError: it carries none, so it did not come from a source or from :func:`load_model`.
    """
    described = getattr(model, "deploycnn_architecture", None)
    if not isinstance(described, dict):
        raise ArtifactError(f"{type(model).__name__} carries no architecture; build it through a source")
    return {key: described[key] for key in _KEYS}


def set_architecture(model: nn.Module, described: Mapping[str, Json]) -> None:
    """Attach an architecture to ``model``, for :func:`get_architecture`."""
    model.deploycnn_architecture = {key: described[key] for key in _KEYS}  # type: ignore[assignment]


def build_base(described: Mapping[str, Json]) -> nn.Module:
    """The base architecture with arbitrary weights; PyTorch's global generators are left as they were.

    Raises:
        SourceError: the source cannot build it (a user's module is gone, a package is missing).
        RecipeError: there is no such source.
    """
    source: Any = registry.get("source", described["source"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base: nn.Module = source.build(described["options"], described["num_classes"])
    return base


def save_model(model: nn.Module, folder: Path | str, architecture: Mapping[str, Json] | None = None) -> None:
    """Write ``model`` to ``folder`` as model.safetensors and architecture.json.

    Args:
        model: Any model whose modules are those of its architecture; widths may have been pruned.
        folder: Existing folder.
        architecture: See :func:`architecture`; taken from the model where not given.

    Raises:
        ArtifactError: the model is not its architecture with other widths, so it could not be loaded again.
    """
    folder = Path(folder)
    described = architecture if architecture is not None else get_architecture(model)
    changes = deltas.difference(model, build_base(described))
    kept = (deltas.persistent_names(model) | set(changes.transient)) - changes.shared.keys()
    stored = {
        name: _storable(tensor) for name, tensor in sorted(deltas.tensors(model).items()) if name in kept
    }
    content = {
        "schema_version": SCHEMA_VERSION,
        **{key: described[key] for key in _KEYS},
        "delta": changes.to_json(),
    }
    # Through bytes: safetensors' own writer does not report a full disk as an OSError.
    (folder / WEIGHTS_FILE).write_bytes(safetensors.torch.save(stored, metadata={"format": "pt"}))
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    (folder / ARCHITECTURE_FILE).write_text(text, encoding="utf-8")


def _storable(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU where needed; views of one storage are taken apart."""
    plain = tensor.detach().cpu().contiguous()
    whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    return plain if whole else plain.clone()


def load_model(path: Path | str) -> nn.Module:
    """Load a torch artifact: its folder, or any of its two files.

    Returns:
        The model on the CPU in eval mode, bit for bit as it was saved, with its architecture attached.

    Raises:
        ArtifactError: a file is missing, truncated or of another schema version, or delta, architecture and
            tensors do not fit together (all missing and unexpected tensors are named).
        SourceError: the base architecture cannot be built here.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    described = read_architecture(folder)
    try:
        model = _stored_base(described)
        deltas.apply(deltas.Delta.from_json(described["delta"]), model, read_tensors(folder / WEIGHTS_FILE))
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from error
    set_architecture(model, described)
    return model.eval()


def _stored_base(described: Mapping[str, Json]) -> nn.Module:
    """As ``build_base``, of a file that may be damaged."""
    try:
        return build_base(described)
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{ARCHITECTURE_FILE} is damaged: {described['source']} cannot build a model of its options "
            f"({type(error).__name__}: {error}); make the artifact again"
        ) from error


def read_architecture(folder: Path) -> dict[str, Json]:
    """The content of architecture.json.

    Raises:
        ArtifactError: missing, damaged or of another schema version.
    """
    path = folder / ARCHITECTURE_FILE
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path}: missing; a torch artifact is {WEIGHTS_FILE} and {ARCHITECTURE_FILE}"
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged ({error}); make the artifact again") from error
    if not isinstance(described, dict) or described.get("schema_version") != SCHEMA_VERSION:
        found = described.get("schema_version") if isinstance(described, dict) else None
        raise ArtifactError(
            f"{path}: schema version {found}, this version of deploycnn reads {SCHEMA_VERSION}"
        )
    if lacking := [key for key in (*_KEYS, "delta") if key not in described]:
        raise ArtifactError(f"{path}: damaged, lacks {', '.join(lacking)}; make the artifact again")
    classes = described["num_classes"]
    if (
        not isinstance(described["options"], dict)
        or not isinstance(described["source"], str)
        or (classes is not None and (type(classes) is not int or classes < 1))
    ):
        raise ArtifactError(
            f"{path}: damaged, source, options or num_classes are of the wrong type or value; make the artifact again"
        )
    return described


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ArtifactError: missing, truncated or not safetensors.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing; make the artifact again") from error
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ArtifactError(
            f"{path}: truncated or not safetensors ({error}); make the artifact again"
        ) from error
