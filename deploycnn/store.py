"""The run directory: content-addressed artifacts, measurements and failures.

Everything is written to a temporary name and renamed when it is whole, so existence means completeness: a killed
process leaves nothing that a later one could mistake for a result. One process at a time works in a run
directory (a lock held by the operating system, gone with the process that held it).

::

    runs/NAME/
      run.json             schema version
      recipe.yaml          resolved, rerunnable
      plan.txt             variant x step -> key, hit / miss / failed
      artifacts/int8-3fa9c1d2.../  manifest.json  model.onnx  log.txt
      artifacts/.partial/  checkpoints of the step that is being made
      variants/NAME -> ../artifacts/...
      environments/ID.json
      measurements/        raw timing samples, predictions, peak memory
      failures/            tracebacks; never a cache hit
      report.html report.md report.json
      best/                the deploy bundle of the winner
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploycnn import __version__, files, schema
from deploycnn.core import MAIN_FILE, Artifact, Draft, Facts, TensorSpec
from deploycnn.errors import ArtifactError, StorageError
from deploycnn.plan import Plan, Step

#: Layout of the run directory and of manifest.json.
SCHEMA_VERSION = 1


class Store:
    """A run directory that is open and locked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.artifacts = root / "artifacts"
        self.partial = self.artifacts / ".partial"
        self.measurements = root / "measurements"

    @classmethod
    @contextlib.contextmanager
    def open(cls, root: Path) -> Iterator[Store]:
        """Open or make the run directory ``root`` and hold its lock.

        Raises:
            ArtifactError: it belongs to another schema version, is no run directory, or is in use.
            StorageError: it cannot be written.
        """
        check_schema(root)
        with files.storage_errors(root):
            try:
                root.mkdir(parents=True, exist_ok=True)
            except (FileNotFoundError, NotADirectoryError, FileExistsError) as error:
                # Below a file, or where no folders can be.
                raise StorageError(
                    f"{root}: cannot be made ({error.strerror}); choose another place with --out"
                ) from error
            lock = (root / ".lock").open("w")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ArtifactError(
                    f"{root}: another process is working in this run; wait for it, or use --out"
                ) from error
            store = cls(root)
            with files.storage_errors(root):
                for folder in (store.artifacts, store.partial, store.measurements):
                    folder.mkdir(parents=True, exist_ok=True)
            if not (root / "run.json").exists():
                files.write_json(
                    root / "run.json", {"schema_version": SCHEMA_VERSION, "deploycnn": __version__}
                )
            yield store
        finally:
            lock.close()

    # -- artifacts -------------------------------------------------------------------------------

    def folder(self, step: Step) -> Path:
        """Where the artifact of ``step`` lies once it is made."""
        return self.artifacts / step.folder

    def has(self, step: Step) -> bool:
        """Whether the artifact of ``step`` has been made."""
        return (self.folder(step) / "manifest.json").exists()

    def load(self, step: Step) -> Artifact:
        """The artifact of ``step``, its files checked against their hashes.

        Raises:
            ArtifactError: a file is missing or has changed since.
        """
        return load_artifact(self.folder(step))

    def discard(self, step: Step) -> None:
        """Move a damaged artifact out of the way."""
        grave = self.root / "failures" / f"damaged-{step.folder}-{time.time_ns()}"
        with files.storage_errors(grave):
            grave.parent.mkdir(exist_ok=True)
            self.folder(step).rename(grave)

    @contextlib.contextmanager
    def workplace(self, step: Step) -> Iterator[tuple[Path, Path]]:
        """An empty output folder and the scratch folder of ``step``, which survives an interruption."""
        base = self.partial / step.folder
        output, scratch = base / "output", base / "scratch"
        with files.storage_errors(base):
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True)
            scratch.mkdir(exist_ok=True)
            yield output, scratch

    def commit(
        self, step: Step, draft: Draft, output: Path, *, seconds: float, extra: Mapping[str, Any]
    ) -> Artifact:
        """Turn a pass's output folder into an artifact, at once."""
        contents = {
            str(item.relative_to(output)): _describe(item)
            for item in sorted(output.rglob("*"))
            if item.is_file()
        }
        if MAIN_FILE[draft.format] not in contents:
            raise RuntimeError(f"{step.name} wrote no {MAIN_FILE[draft.format]} to its output folder")
        size_bytes = sum(int(item["bytes"]) for name, item in contents.items() if not name.endswith(".txt"))
        facts = dataclasses.replace(draft.facts, size_bytes=size_bytes)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "deploycnn": __version__,
            "key": step.key,
            "step": step.name,
            "version": step.component.version,
            "options": schema.to_json(step.component),
            "parents": [step.parent] if step.parent else [],
            "references": dict(step.references),
            "format": draft.format,
            "inputs": schema.to_json(draft.inputs),
            "outputs": schema.to_json(draft.outputs),
            "facts": schema.to_json(facts),
            "files": contents,
            "seconds": round(seconds, 3),
            **extra,
        }
        with files.storage_errors(output):
            files.write_json(output / "manifest.json", manifest)
            files.sync_folder(output)
            output.rename(self.folder(step))
            shutil.rmtree(output.parent, ignore_errors=True)
        return load_artifact(self.folder(step))

    def manifest(self, step: Step) -> dict[str, Any]:
        """The manifest of an artifact that has been made."""
        return read_manifest(self.folder(step))

    # -- the rest of the run ---------------------------------------------------------------------

    def link_variants(self, plan: Plan) -> None:
        """Make ``variants/NAME`` point at each variant's last artifact, where it has been made."""
        folder = self.root / "variants"
        with files.storage_errors(folder):
            folder.mkdir(exist_ok=True)
            for name, keys in plan.chains.items():
                step, link = plan.step(keys[-1]), folder / name
                link.unlink(missing_ok=True)
                if self.has(step):
                    link.symlink_to(Path("..") / "artifacts" / step.folder)

    def record_failure(self, step_folder: str, error: BaseException) -> Path:
        """Keep a failure's traceback for people; it never counts as a result."""
        path = self.root / "failures" / f"{step_folder}.txt"
        files.write_text(path, "".join(traceback.format_exception(error)))
        return path

    def clear_failure(self, step_folder: str) -> None:
        """Forget an earlier failure of a step that works now."""
        (self.root / "failures" / f"{step_folder}.txt").unlink(missing_ok=True)

    def measurement(self, name: str) -> dict[str, Any] | None:
        """A stored measurement, or ``None``. A file that cannot be read does not count."""
        try:
            loaded: dict[str, Any] = json.loads(
                (self.measurements / f"{name}.json").read_text(encoding="utf-8")
            )
        except (FileNotFoundError, ValueError):
            return None
        return loaded

    def write_measurement(self, name: str, value: Mapping[str, Any]) -> None:
        """Store a measurement, at once."""
        files.write_json(self.measurements / f"{name}.json", value)


def check_schema(root: Path) -> None:
    """Refuse to touch what is not a run directory of this schema version.

    Raises:
        ArtifactError: it is of another version or no run directory at all.
    """
    if root.is_file():
        raise ArtifactError(f"{root}: is a file, not a run directory; choose another place with --out")
    if not root.is_dir():
        return
    marker = root / "run.json"
    if not marker.exists():
        if any(item.name != ".lock" for item in root.iterdir()):
            raise ArtifactError(
                f"{root}: is not a run directory and not empty; choose another place with --out"
            )
        return
    try:
        version = json.loads(marker.read_text(encoding="utf-8"))["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{marker}: damaged; delete the run directory or choose another with --out"
        ) from error
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{root}: written with run schema {version}, this version of deploycnn reads {SCHEMA_VERSION}; "
            "choose another place with --out"
        )


def load_artifact(folder: Path) -> Artifact:
    """The artifact in ``folder``, its files checked against the manifest's hashes.

    Raises:
        ArtifactError: the manifest is missing, of another schema version, or a file does not match it.
    """
    manifest = read_manifest(folder)
    try:
        return _checked(folder, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / 'manifest.json'}: damaged: {type(error).__name__} {error}; delete the folder"
        ) from error


def _checked(folder: Path, manifest: Mapping[str, Any]) -> Artifact:
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing; the manifest lists it")
        if path.stat().st_size != expected["bytes"] or files.sha256_of(path) != expected["sha256"]:
            raise ArtifactError(f"{path}: changed since it was made (its sha256 does not match the manifest)")
    facts = dict(manifest["facts"])
    facts["classes"] = tuple(facts["classes"])
    return Artifact(
        key=manifest["key"],
        format=manifest["format"],
        path=folder / MAIN_FILE[manifest["format"]],
        inputs=_specs(manifest["inputs"]),
        outputs=_specs(manifest["outputs"]),
        parents=tuple(manifest["parents"]),
        facts=Facts(**facts),
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``folder/manifest.json`` says.

    Raises:
        ArtifactError: it is missing, damaged or of another schema version.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing; this is not an artifact folder") from error
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged: {error}; delete the folder") from error
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{path}: damaged: holds no mapping; delete the folder")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema version {manifest.get('schema_version')}, expected {SCHEMA_VERSION}"
        )
    return manifest


def _specs(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=item["name"], dtype=item["dtype"], shape=tuple(item["shape"])) for item in items
    )


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
