"""The deploy bundle: what a person copies to the machine that will serve the model.

::

    best/
      model.onnx           with preprocessing and class names in its metadata
      model.onnx.data      weights, where the model is larger than 2 GB
      deploy.json          preprocessing, classes, input and output, runtime, evidence, sha256 of the model's files
      predict.py           runs the model on image files; needs numpy, Pillow and the runtime, not deploycnn

A TensorRT engine's bundle holds ``model.engine`` and ``layers.json`` (for audits) instead of the first, no script,
and in ``deploy.json`` where the engine may run; ``deploycnn profile`` and ``audit`` take the folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploycnn import __version__, files, schema
from deploycnn.core import Artifact

#: The script that goes into every bundle; a file of its own so that it is linted and tested as it ships.
PREDICT = Path(__file__).with_name("_bundle") / "predict.py"

#: What lies beside a model in the store and stays there.
_NOT_THE_MODEL = ("manifest.json", "log.txt")


def write_bundle(
    folder: Path, artifact: Artifact, *, variant: str, runtime: str | None, evidence: Mapping[str, Any]
) -> None:
    """Write the bundle of ``artifact`` to ``folder``, replacing an earlier one at once.

    Args:
        folder: Where it goes; made anew.
        artifact: The model; its format must be ``onnx`` or ``engine``.
        variant: Name of the variant.
        runtime: Runtime spec that it was measured fastest on, where it was measured.
        evidence: The variant's entry in report.json, or what else is known of it.

    Raises:
        StorageError: no space or no permission.
    """
    if artifact.format not in ("onnx", "engine"):
        raise ValueError(f"a bundle holds an onnx model or an engine, not {artifact.format}")
    with files.storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            digests = _copy_model(artifact.path, staging)
            description = {
                "schema_version": 1,
                "deploycnn": __version__,
                "variant": variant,
                "key": artifact.key,
                "sha256": digests[artifact.path.name],
                "files": digests,
                "runtime": runtime,
                "preprocessing": artifact.facts.preprocessing,
                "classes": list(artifact.facts.classes),
                "inputs": schema.to_json(artifact.inputs),
                "outputs": schema.to_json(artifact.outputs),
                "evidence": dict(evidence),
            }
            if artifact.format == "engine":
                description["engine"] = artifact.facts.record["engine"]
            else:
                shutil.copyfile(PREDICT, staging / "predict.py")
            (staging / "deploy.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            staging.chmod(0o755)
            files.sync_folder(staging)
            _replace_folder(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _copy_model(model: Path, folder: Path) -> dict[str, str]:
    """Copy an artifact's files, weights beside the model included; the sha256 of each by name."""
    digests = {}
    for item in sorted(model.parent.rglob("*")):
        name = item.relative_to(model.parent)
        if not item.is_file() or str(name) in _NOT_THE_MODEL:
            continue
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(item, copy)
        digests[str(name)] = files.sha256_of(copy)
    return digests


def _replace_folder(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``; a kill in between leaves the old or the new one, or none."""
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old."))
        folder.replace(old)  # an empty folder may be replaced by a rename
    new.replace(folder)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
